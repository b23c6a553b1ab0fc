"""BitFit, partial fine-tuning and Diff Pruning as methods of PEFT: numbers, files, and what a model can go through."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
pytest.importorskip("aenum")
bnb = pytest.importorskip("bitsandbytes")

from peft import PeftConfig, PeftModel, get_layer_status, get_model_status, inject_adapter_in_model  # noqa: E402
from peft.utils import get_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerState,
    TrainingArguments,
)

import peft_ext  # noqa: E402
from peft_ext.integrations.transformers import DiffPruningCallback  # noqa: E402
from peft_ext.model import get_peft_model, load_adapter  # noqa: E402
from peft_ext.nn import NF4Linear  # noqa: E402
from peft_ext.tuners import BitFitConfig, DiffPruningConfig, PartialConfig  # noqa: E402
from peft_ext.tuners.bitfit import BitFitModel  # noqa: E402
from peft_ext.tuners.diff_pruning import U_MIN, DenseDiff, SparseDiff  # noqa: E402
from peft_ext.tuners.layer import ReplacingLayer  # noqa: E402
from peft_ext.tuners.register import register  # noqa: E402

VOCAB, LAYERS, HIDDEN = 29, 2, 16


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- models -----------------------------------------------------------------------------------------------------------


def make_base(name):
    torch.manual_seed(1)
    if name == "llama":
        config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
                             vocab_size=VOCAB)  # fmt: skip
        model = LlamaForCausalLM(config)
    elif name.startswith("bert"):
        config = BertConfig(hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
                            vocab_size=VOCAB, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
        model = BertForMaskedLM(config) if name == "bert mlm" else BertForSequenceClassification(config)
    elif name == "gpt2":
        config = GPT2Config(n_embd=HIDDEN, n_layer=LAYERS, n_head=2, vocab_size=VOCAB, n_positions=16, resid_pdrop=0.0,
                            embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
        model = GPT2LMHeadModel(config)
    else:
        config = T5Config(d_model=HIDDEN, d_kv=8, d_ff=24, num_layers=LAYERS, num_heads=2, vocab_size=VOCAB,
                          dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)  # fmt: skip
        model = T5ForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # zeros and ones at first, which hide a bias that is dropped or a norm that is swapped
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def batch(model):
    ids = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 1, 1]) if isinstance(model, BertForSequenceClassification) else ids
    return {"input_ids": ids, "labels": labels}


# By architecture, a configuration of each method that has something to do there.
BITFIT = {"bert": {}, "gpt2": {}, "llama": {"add_bias": "all-linear"}, "t5": {"add_bias": ["q", "wo"]}}
CASES = [
    *(("BitFit", name) for name in BITFIT),
    *(("partial", name) for name in BITFIT),
    *(("diff", name) for name in BITFIT),
]
PREFIX = {"BitFit": "bitfit_", "partial": "partial_", "diff": "diff_pruning_"}
every_case = pytest.mark.parametrize(("method", "name"), CASES)


def config_of(method, name="bert", **config):
    if method == "BitFit":
        return BitFitConfig(**BITFIT[name], **config)
    if method == "partial":
        return PartialConfig(**{"num_last_layers": 1, **config})
    return DiffPruningConfig(**{"sparsity_penalty": 1e-3, **config})


def make(method, name="bert", **config):
    base = make_base(name)
    return peft.get_peft_model(copy.deepcopy(base), config_of(method, name, **config)), base


def adapter_parameters(model, adapter="default"):
    return {n: p for n, p in model.named_parameters() if f"_tensors.{adapter}." in n}


def spread(model, adapter="default", seed=3):
    """The adapter as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter_parameters(model, adapter).items():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += (noise if name.endswith("alpha") else 0.05 * noise).to(parameter.dtype)
    return model


def make_spread(method, name="bert", **config):
    model, base = make(method, name, **config)
    return spread(model), base


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**batch(getattr(model, "get_base_model", lambda: model)()), **kwargs).logits


def gradients(model):
    model.zero_grad()
    model(**batch(getattr(model, "get_base_model", lambda: model)())).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def reference(model, base, adapter="default"):
    """The base model with the adapter's tensors written into it, and they alone trained."""
    plain = copy.deepcopy(base)
    plain.requires_grad_(False)
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    for key, value in state.items():
        module, _, name = key.removeprefix("base_model.model.").rpartition("_tensors.")
        module = plain.get_submodule(module.rpartition(".")[0])
        path, _, leaf = name.rpartition(".")
        old = getattr(module.get_submodule(path), leaf)
        if old is None:
            module.get_submodule(path).register_parameter(leaf, nn.Parameter(value.clone()))
        else:
            old.data.copy_(value)
            old.requires_grad_(True)
    return plain


def of_base(name):
    """The base model's name of a tensor of an adapter."""
    head, _, tail = name.removeprefix("base_model.model.").rpartition("_tensors.default.")
    return f"{head.rpartition('.')[0]}.{tail}"


def state_bits(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert actual[name].dtype is tensor.dtype and torch.equal(actual[name], tensor), name


# --- the numbers ------------------------------------------------------------------------------------------------------


@every_case
def test_starts_as_the_base_model_and_trains_its_own_tensors_alone(method, name):
    model, base = make(method, name)
    wanted = logits(base)
    assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(model.train()), wanted)  # a difference of 0, whatever the gates
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(model)) and all(f".{PREFIX[method]}" in n for n in trained)
    assert set(gradients(model)) == trained


@pytest.mark.parametrize(("method", "name"), CASES[:8])
def test_gradients_are_those_of_the_model_with_these_tensors_bit_for_bit(method, name):
    model, base = make_spread(method, name)
    plain = reference(model, base)
    assert torch.equal(logits(model), logits(plain))
    assert not torch.equal(logits(model), logits(base))
    for train in (False, True):
        actual = {of_base(n): g for n, g in gradients(model.train(train)).items()}
        wanted = gradients(plain.train(train))
        assert_same(actual, wanted)
        assert all(g.abs().sum() > 0 for n, g in wanted.items() if "k_proj.bias" not in n and "key.bias" not in n)


def test_the_bias_of_every_linear_kind_runs_in_the_base_modules_own_forward():
    """NF4Linear, bitsandbytes' 4 and 8 bits, fused or not: the bias is added where the module itself adds one."""

    class Net(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.up, self.down = linear(64, 128, bias=False), linear(128, 64, bias=True)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    def linear4bit(*args, bias):
        return bnb.nn.Linear4bit(*args, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")

    def nf4(*args, bias):
        return NF4Linear.from_linear(nn.Linear(*args, bias=bias))

    def linear8bit(*args, bias):
        return bnb.nn.Linear8bitLt(*args, bias=bias, has_fp16_weights=False).to("cpu")

    kinds = [(nn.Linear, torch.float32), (linear8bit, torch.float32)]
    kinds += [(kind, dtype) for kind in (nf4, linear4bit) for dtype in (torch.float32, torch.bfloat16)]
    for kind, dtype in kinds:
        torch.manual_seed(4)
        base = Net(kind)
        plain = copy.deepcopy(base)
        for fused in (False, True):
            config = BitFitConfig(add_bias=["up"])
            model = get_peft_model(copy.deepcopy(base), config, accelerate=fused).eval()
            twin = copy.deepcopy(plain)
            twin = (peft_ext.accelerate(twin) if fused else twin).eval()
            x = torch.randn(5, 64, dtype=dtype)
            # bitsandbytes repacks a weight for good in eval mode without gradients: every run here has one.
            y = model(x.requires_grad_())
            assert torch.equal(y, twin(x)), kind
            spread(model)
            twin.up.bias = nn.Parameter(model.base_model.model.up.bitfit_tensors["default"].bias.detach().clone())
            twin.down.bias.data = model.base_model.model.down.bitfit_tensors["default"].bias.detach().clone()
            assert torch.equal(model(x), twin(x)), kind
            model(x).float().square().sum().backward()
            twin(x).float().square().sum().backward()
            for layer in ("up", "down"):
                mine = getattr(model.base_model.model, layer).bitfit_tensors["default"].bias
                assert mine.dtype is torch.float32 and torch.equal(mine.grad, getattr(twin, layer).bias.grad.float())
            y = model(x)
            model.merge_adapter()
            assert torch.equal(model(x), y), kind
            model.unmerge_adapter()
            assert model.base_model.model.up.base_layer.bias is None
            assert torch.equal(model(x), y), kind
            merged = model.merge_and_unload()
            assert type(merged.up.bias) is nn.Parameter and torch.equal(merged(x), y), kind


def test_counts_of_bert_base():
    def count(**config):
        with torch.device("meta"):
            model = BertForSequenceClassification(BertConfig())
        return peft.get_peft_model(model, BitFitConfig(**config)).get_nb_trainable_parameters()[0]

    assert count() - 2 == 102_912  # the head's two biases are no target once the head is trained whole
    assert count(task_type="SEQ_CLS") == 104_450
    assert count(bias_kinds=["query", "mlp_up"]) == 12 * (768 + 3072)
    kinds = {kind: count(bias_kinds=kind) for kind in ("attention", "mlp", "norm", "other")}
    assert kinds == {"attention": 12 * 4 * 768, "mlp": 12 * (3072 + 768), "norm": 25 * 768, "other": 768 + 2}
    assert count(target_modules=["encoder.layer.11"]) == 8448
    assert count(layers_to_transform=[3, 4], target_modules=["output"]) == 2 * 4 * 768


def test_print_trainable_parameters(capsys):
    model, base = make("partial", task_type="SEQ_CLS")
    model.print_trainable_parameters()
    layer = sum(p.numel() for p in base.bert.encoder.layer[1].parameters())
    head = sum(p.numel() for p in base.classifier.parameters())
    everything = sum(p.numel() for p in base.parameters())
    assert (
        f"trainable params: {layer + head:,d} || all params: {everything + layer + head:,d}" in capsys.readouterr().out
    )


# --- what is chosen ---------------------------------------------------------------------------------------------------


def wrapped(model):
    return {name for name, layer in model.base_model.layers() if "default" in layer.adapters}


def test_a_container_means_all_below_it():
    whole, _ = make("partial", "llama", num_last_layers=None, target_modules=["model.layers.1", "lm_head"])
    below = {f"model.layers.1.{part}" for part in ("input_layernorm", "post_attention_layernorm")}
    below |= {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    below |= {f"model.layers.1.self_attn.{part}_proj" for part in "qkvo"}
    assert wrapped(whole) == below | {"lm_head"}
    for config in (
        {"num_last_layers": 1},
        {"layers_to_transform": 1},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": r"model\.layers\.1"},
    ):
        assert wrapped(make("partial", "llama", **{"num_last_layers": None, **config})[0]) == below, config
    attention, _ = make("partial", "llama", target_modules=["self_attn"], exclude_modules=["q_proj"])
    assert wrapped(attention) == {f"model.layers.1.self_attn.{part}_proj" for part in "kvo"}
    linear, _ = make("partial", "gpt2", target_modules="all-linear")
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert wrapped(linear) == {f"transformer.h.1.{part}" for part in parts}
    both, _ = make("partial", "t5")
    assert {name.rsplit(".block.1.")[0] for name in wrapped(both)} == {"encoder", "decoder"}
    one, _ = make("partial", "t5", target_modules=["decoder"])
    assert {name.rsplit(".block.1.")[0] for name in wrapped(one)} == {"decoder"}


def test_a_second_adapter_finds_linear_layers_under_the_first():
    model, _ = make("partial", "llama", target_modules="all-linear")
    first = wrapped(model)
    model.add_adapter("second", PartialConfig(target_modules="all-linear"))
    second = {name for name, layer in model.base_model.layers() if "second" in layer.adapters}
    assert first < second and len(second) == 14
    assert model.peft_config["second"].target_modules >= first  # names, which a model without adapters has too


class Mixer(nn.Module):
    """A module with a parameter of its own beside its projections, as state-space layers have."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.randn(8))
        self.register_buffer("seen", torch.zeros(()))
        self.inner, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        self.seen.add_(1)
        return self.norm(self.inner(x)) * self.decay


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Mixer() for _ in range(2))
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) + 0 * layer.inner.bias.sum() + 0 * layer.decay.sum()
        return self.head(x)


def test_a_module_with_parameters_beside_its_children_is_one_unit_with_its_buffers():
    base = Mixed()
    before = state_bits(base)
    model = peft.get_peft_model(copy.deepcopy(base), PartialConfig(num_last_layers=1))
    assert wrapped(model) == {"layers.1"}
    keys = {key.rpartition("partial_tensors.")[2] for key in get_peft_model_state_dict(model)}
    assert keys == {"decay", "seen", "inner.weight", "inner.bias", "norm.weight", "norm.bias", "norm.running_mean",
                    "norm.running_var", "norm.num_batches_tracked"}  # fmt: skip
    x = torch.randn(16, 8)
    plain = copy.deepcopy(base)
    plain.requires_grad_(False).layers[1].requires_grad_(True)
    for net in (model, plain):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            net.train()(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(model.eval()(x), plain.eval()(x))
    inner = model.base_model.model.layers[1]
    assert inner.seen == 4 and inner.base_layer.seen == 0  # read through the wrapper; the base's own is untouched
    assert_same({k: v for k, v in inner.base_layer.state_dict().items()},
                {k.removeprefix("layers.1."): v for k, v in before.items() if k.startswith("layers.1.")})  # fmt: skip
    merged = model.merge_and_unload()
    assert type(merged.layers[1]) is Mixer
    assert torch.equal(merged(x), plain(x))


def test_tensors_are_read_and_children_run_through_the_wrapper():
    """PyTorch's encoder layer takes its attention's weights, and those of a layer in it, to a kernel of its own."""
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 8)
    for config in (PartialConfig(num_last_layers=1), BitFitConfig()):
        model = spread(peft.get_peft_model(copy.deepcopy(base), config))
        wanted = reference(model, base)(x)
        assert torch.equal(model(x), wanted)
        with torch.no_grad():
            torch.testing.assert_close(model(x), wanted)
    attention = model.base_model.model.layers[1].self_attn
    assert attention.out_proj.bias is attention.out_proj.bitfit_tensors["default"].bias
    unit = spread(peft.get_peft_model(Mixed(), PartialConfig(num_last_layers=1))).base_model.model.layers[1]
    own = unit.partial_tensors["default"]
    assert unit.decay is own.decay and unit.inner.weight is own.inner.weight and unit.norm is not unit.base_layer.norm
    assert torch.equal(unit.inner(x), nn.functional.linear(x, own.inner.weight, own.inner.bias))
    unit.enable_adapters(False)
    assert unit.decay is unit.base_layer.decay and unit.inner is unit.base_layer.inner
    added = peft.get_peft_model(make_base("llama"), BitFitConfig(add_bias=["q_proj"]))
    query = added.base_model.model.model.layers[0].self_attn.q_proj
    assert query.bias is query.bitfit_tensors["default"].bias and query.in_features == HIDDEN
    with pytest.raises(AttributeError, match="nope"):
        query.nope  # noqa: B018


def test_offloading_is_refused():
    model, _ = make("BitFit", "bert")
    accelerate.cpu_offload(model.base_model.model, execution_device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="BitFitLayer over LayerNorm: accelerate offloads it"):
        logits(model)


def test_tied_tensors_are_one_tensor_of_the_adapter():
    config = {"num_last_layers": None, "target_modules": ["wte", "lm_head"]}
    model, base = make_spread("partial", "gpt2", **config)
    names = set(adapter_parameters(model))
    assert names == {"base_model.model.transformer.wte.partial_tensors.default.weight"}
    plain = reference(model, base)
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert torch.equal(logits(model), logits(plain))
    (actual,), (wanted,) = gradients(model).values(), gradients(plain).values()
    assert torch.equal(actual, wanted)
    clone = copy.deepcopy(model)
    spread(clone, seed=5)
    assert not torch.equal(logits(clone), logits(model))
    assert torch.equal(logits(clone), logits(reference(clone, base)))
    wanted = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), wanted)
    model.unmerge_adapter()
    assert_same(state_bits(model.unload()), state_bits(base))
    merged = clone.merge_and_unload()
    assert merged.lm_head.weight is merged.transformer.wte.weight and merged.config.tie_word_embeddings

    base = make_base("bert mlm")  # whose head's bias hangs in two places
    biases = peft.get_peft_model(copy.deepcopy(base), BitFitConfig())
    wanted = sum(p.numel() for n, p in base.named_parameters() if n.endswith("bias"))
    assert biases.get_nb_trainable_parameters()[0] == wanted
    assert torch.equal(logits(spread(biases)), logits(reference(biases, base)))


# --- files ------------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_into_a_fresh_model(method, name, low_cpu_mem_usage, tmp_path):
    model, base = make_spread(method, name)
    model.eval().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert_same(saved, {k: v.detach() for k, v in get_peft_model_state_dict(model).items()})
    assert all(key.startswith("base_model.model.") and f".{PREFIX[method]}tensors." in key for key in saved)
    assert not any("default" in key or "base_layer" in key for key in saved)
    text = (tmp_path / "adapter_config.json").read_text()
    assert list(json.loads(text)) == sorted(json.loads(text))
    config = PeftConfig.from_pretrained(tmp_path)
    assert config == replace(model.peft_config["default"], inference_mode=True, auto_mapping=config.auto_mapping)

    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    trained = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert {n for n, p in trained.named_parameters() if p.requires_grad} == set(adapter_parameters(model))
    ours = load_adapter(copy.deepcopy(base), tmp_path, "mine", low_cpu_mem_usage=low_cpu_mem_usage)
    assert ours.active_adapters == ["mine"] and torch.equal(logits(ours), logits(model))


@pytest.mark.parametrize("method", list(PREFIX))
def test_an_adapter_stays_float32_over_a_bfloat16_model(method, tmp_path):
    base = make_base("bert").bfloat16()
    model = peft.get_peft_model(copy.deepcopy(base), config_of(method))
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert torch.equal(logits(model), logits(base))
    spread(model).save_pretrained(tmp_path)
    wanted = logits(model)
    assert wanted.dtype is torch.bfloat16
    for low in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low)
        assert not any(p.requires_grad for p in loaded.parameters())
        assert_same(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))
        assert torch.equal(logits(loaded), wanted)
    assert torch.equal(logits(model.merge_and_unload()), wanted)
    narrow = peft.get_peft_model(copy.deepcopy(base), config_of(method), autocast_adapter_dtype=False)
    assert {p.dtype for p in adapter_parameters(narrow).values()} == {torch.bfloat16}
    assert torch.equal(logits(narrow), logits(base))


@pytest.mark.parametrize("method", list(PREFIX))
def test_the_classification_head_goes_with_it(method, tmp_path):
    model, base = make_spread(method, "bert", task_type="SEQ_CLS")
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert head.weight.requires_grad and not model.base_model.model.classifier.original_module.weight.requires_grad
    assert "classifier" not in wrapped(model)
    head.weight.data += 1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    wanted = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), wanted)


# --- what a model goes through ----------------------------------------------------------------------------------------


@every_case
def test_merged_unmerged_disabled_and_unloaded(method, name):
    model, base = make_spread(method, name)
    before, wanted, bits = state_bits(model), logits(model), state_bits(base)
    saved = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), wanted)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model), wanted)
    assert get_model_status(model).merged_adapters == ["default"]
    assert_same(get_peft_model_state_dict(model), saved)  # what is saved is the adapter, merged or not
    clone = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for one in (model, clone):
        one.unmerge_adapter()
        assert_same(state_bits(one), before)
        assert torch.equal(logits(one), wanted)
    model.merge_adapter()
    own = {p.data_ptr() for p in adapter_parameters(model).values()}
    assert not any(p.data_ptr() in own for n, p in model.named_parameters() if "_tensors." not in n)
    with model.disable_adapter():  # all of it at once, whatever a forward reaches
        assert get_model_status(model).merged_adapters == []
        model.merge_adapter()
        assert torch.equal(logits(model), logits(base))
    merged = clone.merge_and_unload()
    assert torch.equal(logits(merged), wanted)
    assert not any(isinstance(module, ReplacingLayer) for module in merged.modules()) and not merged._forward_hooks
    assert_same(state_bits(model.unload()), bits)


@every_case
def test_two_adapters(method, name):
    model, base = make_spread(method, name)
    first = logits(model)
    model.add_adapter("second", config_of(method, name))
    assert torch.equal(logits(model), first)
    spread(model, "second", seed=7)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(second, first) and not torch.equal(second, logits(base))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapter_parameters(model, "second"))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="only one of them can be in effect"):
        model.base_model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default"] and torch.equal(logits(model), first)
    model.merge_adapter(["second"])
    assert torch.equal(logits(model), second)
    with pytest.raises(ValueError, match="only one of them can be in effect"):
        model.merge_adapter(["default"])
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="a batch of several adapters"):
        logits(model, adapter_names=["default", "second", "second"])

    model.delete_adapter("default")
    assert model.active_adapters == ["second"] and torch.equal(logits(model), second)
    assert not adapter_parameters(model) and all("default" not in layer.tied for _, layer in model.base_model.layers())
    model.delete_adapter("second")
    assert torch.equal(logits(model.base_model.model), logits(base))


def test_adapters_on_different_modules_run_together():
    model, base = make_spread("partial", "llama")
    model.add_adapter("other", PartialConfig(layers_to_transform=0))
    spread(model, "other")
    model.base_model.set_adapter(["default", "other"])
    plain = reference(model, reference(model, base), "other")
    assert torch.equal(logits(model), logits(plain))


@every_case
def test_status(method, name):
    model, _ = make(method, name)
    status = get_model_status(model)
    assert status.peft_types == {"default": {"BitFit": "BITFIT", "partial": "PARTIAL", "diff": "DIFF_PRUNING"}[method]}
    assert status.enabled is True and status.active_adapters == ["default"] == status.available_adapters
    assert status.requires_grad == {"default": True} and status.merged_adapters == []
    assert status.num_adapter_layers == len(wrapped(model)) == len(get_layer_status(model))
    assert {layer.name.removeprefix("model.") for layer in get_layer_status(model)} == wrapped(model)


@every_case
def test_copies_and_pickles(method, name):
    model, _ = make_spread(method, name)
    wanted = logits(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(clone), wanted)
        assert clone.peft_config == model.peft_config
        spread(clone, seed=9)
        assert not torch.equal(logits(clone), wanted)
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("method", list(PREFIX))
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(method, reentrant):
    model, _ = make_spread(method, "llama")
    model.train()
    torch.manual_seed(5)
    wanted = gradients(model)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.base_model.model.enable_input_require_grads()
    torch.manual_seed(5)
    actual = gradients(model)
    assert_same(actual, wanted)  # under Diff Pruning too: the same u is drawn again


@pytest.mark.parametrize("method", ["BitFit", "diff"])
def test_compiles(method):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

        def forward(self, x):
            return self.down(self.norm(torch.relu(self.up(x))))

    model = spread(peft.get_peft_model(Net(), config_of(method))).eval()
    x = torch.randn(3, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    model(x).sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, model(x))
    actual = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == wanted.keys() == set(adapter_parameters(model))
    for n, grad in wanted.items():
        torch.testing.assert_close(actual[n], grad)


@pytest.mark.parametrize("method", list(PREFIX))
def test_generates_and_is_injected_without_a_peft_model(method):
    model, base = make_spread(method, "gpt2")
    ids = torch.tensor([[3, 4, 5]])
    wanted = reference(model, base).generate(ids, max_new_tokens=4, do_sample=False) if method != "diff" else None
    actual = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert actual.shape == (1, 7) and (wanted is None or torch.equal(actual, wanted))
    injected = inject_adapter_in_model(config_of(method, "gpt2"), copy.deepcopy(base))
    assert type(injected) is GPT2LMHeadModel and torch.equal(logits(injected), logits(base))
    loss = injected(**batch(injected)).loss
    assert (injected.train()(**batch(injected)).loss > loss) == (method == "diff")  # its penalty comes along


# --- Trainer ----------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self, base, count=12):
        generator = torch.Generator().manual_seed(4)
        self.rows = []
        for _ in range(count):
            ids = torch.randint(3, VOCAB, (6,), generator=generator)
            label = (ids[0] % 2) if isinstance(base, BertForSequenceClassification) else ids
            self.rows.append({"input_ids": ids, "labels": label})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def train(model, folder, base, resume=None, callbacks=(), optimizers=(None, None), **arguments):
    arguments = {"max_steps": 12, "per_device_train_batch_size": 6, "learning_rate": 0.05, "save_strategy": "no",
                 "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0,
                 "lr_scheduler_type": "constant", **arguments}  # fmt: skip
    trainer = Trainer(model=model, args=TrainingArguments(folder, **arguments), train_dataset=Rows(base),
                      callbacks=list(callbacks), optimizers=optimizers)  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]


@torch.no_grad()
def data_loss(model, base):
    rows = Rows(base).rows
    return model.eval()(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss


@pytest.mark.parametrize(
    ("method", "name", "config"),
    [
        ("BitFit", "bert", {"task_type": "SEQ_CLS"}),
        ("partial", "llama", {"num_last_layers": None, "target_modules": ["model.layers.1", "lm_head"]}),
        ("diff", "llama", {"sparsity_penalty": 1.25e-7}),
    ],
)
def test_trains_under_trainer(method, name, config, tmp_path):
    model, base = make(method, name, **config)
    loss = data_loss(model, base)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    started = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    _, losses = train(model.train(), str(tmp_path), base)
    assert len(losses) == 12
    assert data_loss(model, base) < 0.9 * loss
    assert_same({n: p.detach() for n, p in model.named_parameters() if n in frozen}, frozen)
    unmoved = [n for n, p in model.named_parameters() if n in started and torch.equal(p, started[n])]
    assert not unmoved
    trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    trainer.save_model(str(tmp_path / "last"))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "last")
    assert torch.equal(logits(loaded), logits(model.eval()))


# --- Diff Pruning -----------------------------------------------------------------------------------------------------


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(5, 4, bias=False).double()

    def forward(self, x):
        return self.lin(x)


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_the_difference_is_the_papers_formula_in_float64(structured, train):
    model = peft.get_peft_model(One(), DiffPruningConfig(structured=structured, stretch_low=-0.5, stretch_high=1.25))
    spread(model).train(train)
    layer = model.base_model.model.lin
    ((_, diff),) = layer.diffs("default")
    diff.alpha.data -= 5  # gates that are open, closed and in between
    if structured:
        diff.group.data -= 5
    w, alpha = (p.detach().clone().requires_grad_() for p in (diff.w, diff.alpha))
    group = diff.group.detach().clone().requires_grad_() if structured else None
    x, g = torch.randn(6, 5).double(), torch.randn(6, 4).double()

    torch.manual_seed(11)
    model(x).backward(g)

    def gate(a):
        s = a
        if train:
            u = torch.empty(a.shape, dtype=torch.float64).uniform_(U_MIN, 1 - U_MIN)
            s = torch.log(u) - torch.log(1 - u) + a
        return torch.clamp(1 / (1 + torch.exp(-s)) * (1.25 + 0.5) - 0.5, 0, 1)

    torch.manual_seed(11)
    z = gate(alpha)
    theta = layer.base_layer.weight + (z if group is None else gate(group) * z) * w
    (x @ theta.T).backward(g)
    assert 0 < ((z == 0) | (z == 1)).sum() < z.numel()
    for actual, wanted in ((diff.w, w), (diff.alpha, alpha), (diff.group, group)):
        if wanted is not None:
            torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-12, atol=1e-12)
            assert wanted.grad.abs().sum() > 0


def test_gates_are_drawn_anew_while_training_and_fixed_in_eval():
    model, _ = make_spread("diff", "bert")
    assert torch.equal(logits(model.eval()), logits(model))
    model.train()
    torch.manual_seed(5)
    first = logits(model)
    assert not torch.equal(logits(model), first)
    torch.manual_seed(5)
    assert torch.equal(logits(model), first)
    draws = DenseDiff(torch.zeros(10_000), DiffPruningConfig()).gate(torch.zeros(10_000), True)
    # At α = 0 the gate is closed for u ≤ ½, and open where 3σ − 1.5 ≥ 1, that is u ≥ 5/6.
    assert abs((draws == 0).float().mean() - 1 / 2) < 0.02 and abs((draws == 1).float().mean() - 1 / 6) < 0.02


def expected_penalty(model, weight, low=-1.5, high=1.5):
    alphas = [p for n, p in model.named_parameters() if n.endswith((".alpha", ".group"))]
    return weight * sum(torch.sigmoid(a.double() - torch.log(torch.tensor(-low / high))).sum() for a in alphas)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_the_penalty_is_in_the_loss_while_training_whatever_way_in(task_type):
    model, _ = make_spread("diff", "bert", task_type=task_type, stretch_low=-0.3, stretch_high=1.2)
    wanted = expected_penalty(model, 1e-3, -0.3, 1.2)
    torch.testing.assert_close(model.penalty().double(), wanted)
    inputs = batch(model.get_base_model())

    def losses():
        torch.manual_seed(5)
        outputs = model(**inputs)
        data = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        torch.manual_seed(5)
        assert torch.equal(model.base_model(**inputs).loss, outputs.loss)
        return outputs, (outputs.loss - data).double()

    outputs, added = losses()  # in eval mode
    assert added.abs() < 1e-6
    model.train()
    outputs, added = losses()
    torch.testing.assert_close(added, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs["loss"], outputs.loss)
    with torch.no_grad():
        assert losses()[1].abs() < 1e-6
    with model.disable_adapter():
        assert losses()[1].abs() < 1e-6
    model.zero_grad()
    model.penalty().backward()
    for name, parameter in model.named_parameters():
        if name.endswith(".alpha"):
            s = torch.sigmoid(parameter - torch.log(torch.tensor(0.3 / 1.2)))
            torch.testing.assert_close(parameter.grad, 1e-3 * s * (1 - s))


@pytest.mark.parametrize("name", ["llama", "t5"])  # of the labels Trainer counts all but the first, or all
def test_a_step_of_several_batches_has_the_penalty_once(name):
    model, base = make_spread("diff", name, task_type="CAUSAL_LM" if name == "llama" else "SEQ_2_SEQ_LM")
    model.train()
    inputs = batch(base)
    halves = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(3)]
    halves[2]["labels"] = halves[2]["labels"].clone()
    halves[2]["labels"][:, 2:] = -100
    start = 1 if name == "llama" else 0
    items = sum(half["labels"][..., start:].ne(-100).sum() for half in halves)

    def total(weight):
        model.peft_config["default"].sparsity_penalty = weight
        torch.manual_seed(5)
        return sum(model(**half, num_items_in_batch=items).loss for half in halves)

    torch.testing.assert_close((total(1e-3) - total(0.0)).double(), expected_penalty(model, 1e-3), rtol=1e-4, atol=1e-5)


def dense_differences(model):
    return {name: diff.difference(sample=False).detach() for name, diff in model.base_model._diffs("default")}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_pruning_keeps_the_largest_over_all_tensors(name, tmp_path):
    config = config_of("diff", name)
    base = make_base(name)
    model = spread(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    differences = dense_differences(model)
    flat = torch.cat([d.flatten() for d in differences.values()])
    count = int(0.05 * flat.numel())
    threshold = flat.abs().sort(descending=True).values[count - 1]
    wanted = {n: torch.where(d.abs() >= threshold, d, 0) for n, d in differences.items()}
    sizes = {n: int((d != 0).sum()) for n, d in wanted.items() if (d != 0).any()}
    assert sum(sizes.values()) == count

    kept = model.prune(target=0.05)
    assert kept == sizes == model.peft_config["default"].kept and config.kept is None
    plain = copy.deepcopy(base)
    for n, d in wanted.items():
        plain.get_parameter(n).data += d
    assert torch.equal(logits(model), logits(plain))
    for n, diff in model.base_model._diffs("default"):
        assert isinstance(diff, SparseDiff) and diff.indices.dtype is torch.int32
        assert torch.equal(diff.indices.long(), wanted[n].flatten().nonzero().flatten())
        assert torch.equal(diff.values.detach(), wanted[n].flatten()[diff.indices.long()])
    assert model.get_nb_trainable_parameters()[0] == count

    # Only the kept entries train, on the gradient that a dense model has there; and there is no penalty.
    plain.requires_grad_(False)
    for n in wanted:
        plain.get_parameter(n).requires_grad_(True)
    model.train()
    actual, dense = gradients(model), gradients(plain.train())
    assert set(actual) == set(adapter_parameters(model)) and len(actual) == len(sizes)
    for n, diff in model.base_model._diffs("default"):
        assert torch.equal(diff.values.grad, dense[n].flatten()[diff.indices.long()])
    assert model.penalty() == 0

    model.eval().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in saved} == {"indices", "values"} and len(saved) == 2 * len(sizes)
    assert sum(t.numel() for k, t in saved.items() if k.endswith("values")) == count
    for low in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low)
        assert loaded.peft_config["default"].kept == sizes
        assert torch.equal(logits(loaded), logits(model))
    loaded.add_adapter("dense", config_of("diff", name))
    loaded.set_adapter("dense")
    assert torch.equal(logits(loaded), logits(base))

    before, bits = logits(model), state_bits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), before)
    model.unmerge_adapter()
    assert_same(state_bits(model), bits)
    assert torch.equal(logits(pickle.loads(pickle.dumps(copy.deepcopy(model)))), before)
    assert get_model_status(model).requires_grad == {"default": True}
    assert torch.equal(logits(model.merge_and_unload()), before)


def test_what_is_read_decides_whether_an_adapter_is_pruned(tmp_path):
    """A checkpoint from before or after the pruning goes into a model that is at the other side of it."""
    model, base = make_spread("diff", "bert")
    model.save_pretrained(tmp_path / "before")
    dense = logits(model)
    model.prune(0.1)
    model.save_pretrained(tmp_path / "after")
    sparse = logits(model)
    other = peft.get_peft_model(copy.deepcopy(base), config_of("diff"))
    for folder, wanted in (("after", sparse), ("before", dense), ("after", sparse)):
        other.load_adapter(tmp_path / folder, "default", is_trainable=True)
        assert torch.equal(logits(other), wanted)
        assert (other.peft_config["default"].kept is None) == (folder == "before")
        assert all(p.requires_grad for p in adapter_parameters(other).values())


def test_entries_that_are_zero_are_not_kept():
    model, _ = make("diff", "bert", target_modules=["query"])
    with pytest.raises(ValueError, match="is 0 everywhere"):
        model.prune(0.5)
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query
    query.diff_pruning_tensors["default"].weight.w.data[2, 3] = 0.5
    query.diff_pruning_tensors["default"].weight.alpha.data[2, 3] = 0.1
    query.diff_pruning_tensors["default"].bias.w.data[1] = 0.5
    query.diff_pruning_tensors["default"].bias.alpha.data[1] = -0.1  # closed in eval mode
    assert model.prune(0.5) == {"bert.encoder.layer.0.attention.self.query.weight": 1}
    assert query.diff_pruning_tensors["default"].weight.indices.tolist() == [2 * HIDDEN + 3]


@pytest.mark.parametrize("in_groups", [False, True])
def test_the_optimizer_goes_on_with_what_is_kept(in_groups):
    model, base = make_spread("diff", "bert", task_type="SEQ_CLS")
    if in_groups:
        groups = model.parameter_groups(0.01, gate_lr=0.2, weight_decay=0.3)
        named = {id(p): n for n, p in model.named_parameters()}
        assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.01, 0.3), (0.2, 0.0)]
        assert all(named[id(p)].endswith((".alpha", ".group")) for p in groups[1]["params"])
        everything = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for g in groups for p in g["params"]} == everything
    else:
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [{"params": [p for n, p in trained if "bias" not in n], "weight_decay": 0.1, "lr": 0.01},
                  {"params": [p for n, p in trained if "bias" in n], "weight_decay": 0.0, "lr": 0.02}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups)
    model.train()(**batch(base)).loss.backward()
    optimizer.step()
    model.prune(0.05, optimizer=optimizer)
    trained = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    held = [[trained[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    assert sorted(n for names in held for n in names) == sorted(trained.values())
    assert not in_groups or held[1] == []
    assert in_groups or all("bias" in n for n in held[1]) and not any("bias" in n for n in held[0])
    assert set(optimizer.state) <= {p for g in optimizer.param_groups for p in g["params"]}
    head = next(p for n, p in model.named_parameters() if n.endswith("modules_to_save.default.weight"))
    assert optimizer.state[head]["step"] == 1
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    model(**batch(base)).loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # A key's bias adds one number to a query's scores, which softmax does not see: its gradient is 0 but for rounding.
    key_biases = {n for n in trained.values() if ".key." in n and "bias" in n}
    assert moved | key_biases == set(trained.values())
    with pytest.raises(ValueError, match="pruned already"):
        model.prune(0.05)
    fresh, _ = make_spread("diff", "bert")
    with pytest.raises(ValueError, match="does not train bert"):
        fresh.prune(0.05, optimizer=optimizer)
    assert fresh.peft_config["default"].kept is None


def test_callback_prunes_under_trainer_and_a_run_is_resumed(tmp_path):
    def run(folder, resume=None, **arguments):
        model, base = make("diff", "bert", task_type="SEQ_CLS")
        callback = DiffPruningCallback(target=0.02, at=0.5)
        arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, **arguments}
        trainer, losses = train(model, str(tmp_path / folder), base, resume, [callback], **arguments)
        return model, trainer, losses, callback

    model, trainer, losses, callback = run("whole")
    assert callback.kept == model.peft_config["default"].kept and sum(callback.kept.values()) > 0
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == trained
    saved = load_file(tmp_path / "whole" / "checkpoint-3" / "adapter_model.safetensors")
    last = get_peft_model_state_dict(model)
    values = [key for key in last if key.endswith(".values")]
    assert values and any(not torch.equal(last[key], saved[key]) for key in values)
    assert all(torch.equal(last[key], saved[key]) for key in last if key.endswith(".indices"))
    for step in (1, 3):  # from before the pruning at step 2, and from after it
        other, _, _, again = run(f"resumed-{step}", str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert (again.kept is None) == (step == 3)
        assert_same(get_peft_model_state_dict(other), last)


def test_callback_errors():
    for arguments, match in (({"target": 0}, "target is 0"), ({"at": 0}, "at is 0"), ({"at": 1.5}, "at is 1.5")):
        with pytest.raises(ValueError, match=match):
            DiffPruningCallback(**arguments)
    state = TrainerState(max_steps=2)
    with pytest.raises(ValueError, match="at is 7, the run has 2 steps"):
        DiffPruningCallback(at=7).on_train_begin(None, state, None, model=make("diff")[0])
    with pytest.raises(TypeError, match="model is PeftModel, wanted a PeftModel with Diff Pruning"):
        DiffPruningCallback().on_train_begin(None, state, None, model=make("BitFit")[0])
    several = SimpleNamespace(world_size=2, deepspeed=None, fsdp=None)
    with pytest.raises(ValueError, match="under DDP, DeepSpeed or FSDP"):
        DiffPruningCallback().on_train_begin(several, state, None, model=make("diff")[0])


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_config", "error", "match"),
    [
        (lambda: BitFitConfig(bias_kinds=["atention"]), ValueError, "bias_kinds is .'atention'., wanted one or a list"),
        (lambda: BitFitConfig(target_modules=3), TypeError, "target_modules is 3, wanted names"),
        (lambda: BitFitConfig(add_bias=[1]), TypeError, "add_bias is .1., wanted names"),
        (lambda: PartialConfig(num_last_layers=0), ValueError, "num_last_layers is 0, wanted None or a number"),
        (lambda: PartialConfig(num_last_layers=1, layers_to_transform=1), ValueError, "layers_to_transform is 1"),
        (lambda: PartialConfig(layers_to_transform=-1), ValueError, "layers_to_transform is -1, wanted None, an index"),
        (lambda: PartialConfig(layers_pattern="h"), ValueError, "layers_pattern is 'h', wanted None where"),
        (lambda: DiffPruningConfig(sparsity_penalty=-1), ValueError, "sparsity_penalty is -1, wanted 0 or more"),
        (lambda: DiffPruningConfig(stretch_low=0), ValueError, "stretch_low is 0, wanted less than 0"),
        (lambda: DiffPruningConfig(stretch_high=1), ValueError, "stretch_high is 1, wanted more than 1"),
    ],
)
def test_configurations_that_are_refused(make_config, error, match):
    with pytest.raises(error, match=match):
        make_config()


@pytest.mark.parametrize(
    ("name", "config", "match"),
    [
        ("llama", BitFitConfig(), "no bias of kind all among the targets in LlamaForCausalLM; add_bias gives"),
        ("gpt2", BitFitConfig(bias_kinds="query"), "no bias of kind query"),
        ("llama", BitFitConfig(add_bias=["nope"]), "add_bias is .'nope'., which is no linear layer"),
        ("llama", PartialConfig(), "give target_modules, num_last_layers or layers_to_transform"),
        ("llama", PartialConfig(num_last_layers=3), "num_last_layers is 3, model.layers has 2 layers"),
        ("llama", PartialConfig(target_modules=["nope"]), "nothing to train in LlamaForCausalLM"),
        ("llama", PartialConfig(layers_to_transform=5), "nothing to train .* layers_to_transform=5"),
        (
            "gpt2",
            PartialConfig(target_modules=["lm_head"]),
            "lm_head.weight is also transformer.wte.weight, which is no",
        ),
        ("gpt2", DiffPruningConfig(exclude_modules=["wte"]), "lm_head.weight is also transformer.wte.weight"),
        ("llama", DiffPruningConfig(target_modules=["nope"]), "no parameters among the targets in LlamaForCausalLM"),
        ("llama", DiffPruningConfig(kept={"nope.weight": 3}), "kept names nope.weight, which is no tensor"),
    ],
)
def test_models_that_do_not_fit(name, config, match):
    base = make_base(name)
    before = state_bits(base)
    with pytest.raises(ValueError, match=match):
        peft.get_peft_model(base, copy.deepcopy(config))
    assert_same(state_bits(base), before)


def test_quantized_and_nested_targets_are_refused():
    for config in (PartialConfig(target_modules=["layers.1"]), DiffPruningConfig()):
        model = peft_ext.quantize_nf4(make_base("llama"), progress=False)
        with pytest.raises(ValueError, match="q_proj is a NF4Linear whose weight is quantized"):
            peft.get_peft_model(model, config)
    outer = peft.get_peft_model(Mixed(), PartialConfig(target_modules=["layers.1.inner"]))
    with pytest.raises(ValueError, match="layers.1 holds an adapter already, of layers.1.inner"):
        outer.add_adapter("other", PartialConfig(target_modules=["layers.1"]))
    assert list(outer.peft_config) == ["default"]


def test_shards_are_refused_and_what_can_not_be_wrapped_stays_frozen():
    sharded = Mixed()
    sharded.head.bias.ds_id = 0
    for config in (BitFitConfig(), PartialConfig(target_modules=["head"]), DiffPruningConfig()):
        with pytest.raises(ValueError, match="head.bias is a shard"):
            peft.get_peft_model(sharded, config)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Mixed()
            self.inner.bias = nn.Parameter(torch.zeros(8))  # beside a list of layers

    for config in (BitFitConfig(), PartialConfig(target_modules=["inner"]), DiffPruningConfig()):
        with pytest.warns(UserWarning, match="inner.bias stays frozen"):
            model = peft.get_peft_model(Outer(), config)
        assert "inner.head" in wrapped(model) and "inner" not in wrapped(model)


def test_prune_errors():
    model, _ = make_spread("diff", "bert")
    for arguments, match in (
        ({"target": 0}, "target is 0, wanted a fraction"),
        ({"target": 1.5}, "target is 1.5"),
        ({"target": 1e-9}, "leaves none"),
        ({"adapter_name": "nope"}, "adapter_name is 'nope', wanted one of"),
    ):
        with pytest.raises(ValueError, match=match):
            model.prune(**arguments)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into bert"):
        model.prune()
    model.unmerge_adapter()
    adapter_parameters(model).popitem()[1].data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)


def test_registering():
    register("bitfit", BitFitConfig, BitFitModel)  # once more is no error
    with pytest.raises(RuntimeError, match="PEFT has a method 'lora' already"):
        register("lora", BitFitConfig, BitFitModel)
    kind = BitFitConfig().peft_type
    assert kind == "BITFIT" and pickle.loads(pickle.dumps(kind)) is kind and peft.PeftType("BITFIT") is kind


# --- get_peft_model and load_adapter ----------------------------------------------------------------------------------


def test_get_peft_model_accelerates_what_peft_makes():
    config = peft.LoraConfig(target_modules="all-linear", r=4)
    model = get_peft_model(make_base("llama"), config, "mine")
    assert model.active_adapters == ["mine"] and peft_ext.explain(model).fused_share == 1
    stock = get_peft_model(make_base("llama"), config, accelerate=False, autocast_adapter_dtype=False)
    assert peft_ext.explain(stock).fused_share == 0
    with pytest.raises(TypeError, match="config is dict, wanted a PeftConfig"):
        get_peft_model(make_base("llama"), {"r": 4})
    with pytest.raises(ValueError, match="dora_dropout is 'x'"):
        get_peft_model(make_base("llama"), config, dora_dropout="x")


def test_load_adapter(tmp_path):
    base = make_base("llama")
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    saved = get_peft_model(copy.deepcopy(base), config)
    saved.save_pretrained(tmp_path / "a")
    first = logits(saved.eval())
    model = load_adapter(copy.deepcopy(base), tmp_path / "a")
    assert torch.equal(logits(model), first) and peft_ext.explain(model).fused_share == 1
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert load_adapter(model, str(tmp_path / "a"), "b", is_trainable=True) is model
    assert model.active_adapters == ["b"] and torch.equal(logits(model), first)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"b"}
    assert peft_ext.explain(model).fused_share == 1
    load_adapter(model, tmp_path / "a", "c")
    assert model.active_adapters == ["c"] and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="has an adapter 'b' already"):
        load_adapter(model, tmp_path / "a", "b")
    with pytest.raises(TypeError, match="model is dict, wanted a model"):
        load_adapter({}, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_adapter(base, tmp_path / "nope")

    other = tmp_path / "pickled"
    saved.save_pretrained(other, safe_serialization=False)
    with pytest.raises(ValueError, match="has adapter_model.bin, a pickle, and no adapter_model.safetensors"):
        load_adapter(copy.deepcopy(base), other)
    (other / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="has no adapter_model.safetensors"):
        load_adapter(copy.deepcopy(base), other)
    save_file(load_file(tmp_path / "a" / "adapter_model.safetensors"), other / "adapter_model.safetensors")
    loaded = load_adapter(copy.deepcopy(base), tmp_path, subfolder="pickled", accelerate=False)
    assert peft_ext.explain(loaded).fused_share == 0
    torch.testing.assert_close(logits(loaded), first)


def test_explain_names_the_methods_and_says_that_there_is_nothing_to_fuse():
    for config, method in (
        (BitFitConfig(), "BitFit"),
        (PartialConfig(num_last_layers=1), "partial fine-tuning"),
        (DiffPruningConfig(target_modules=["query"]), "Diff Pruning"),
    ):
        config_of_bert = BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                    intermediate_size=32)  # fmt: skip
        model = get_peft_model(BertForSequenceClassification(config_of_bert), config)
        rows = peft_ext.explain(model).rows
        assert rows and not any(row.fused for row in rows)
        assert any(row.kind == f"{method} over Linear" for row in rows)
        assert {row.reason for row in rows} == {
            f"{method} runs the layer's own code on the adapter's tensors: there is nothing to fuse"
        }


def ada_lora(**changes):
    return peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_r=6, target_r=3, tinit=2,
                              tfinal=4, total_step=16, **changes)  # fmt: skip


def ranknums(model):
    return {name: p for name, p in model.named_parameters() if ".ranknum." in name}


def ada_lora_s(model):
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def train_ada_lora(model, steps=16):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        model(**batch(model.get_base_model())).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def without_loss(model):
    """PEFT adds a term to an AdaLoRA model's loss for the adapter that trains, and fails where none does."""
    with torch.no_grad():
        return model.eval()(input_ids=batch(model.get_base_model())["input_ids"]).logits


def without_lost_ranks(model):
    """A copy whose tensors are cut to the ranks that are left, as they are on disk: sums of as many terms."""
    model = copy.deepcopy(model)
    ranks = {name.removesuffix(".default"): kept for name, kept in model.peft_config["default"].rank_pattern.items()}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "ranknum"):
            kept = torch.tensor(ranks[f"{name}.lora_E"])
            lora_A, lora_B, lora_E = layer.lora_A["default"], layer.lora_B["default"], layer.lora_E["default"]
            lora_A.data, lora_B.data, lora_E.data = lora_A.data[kept], lora_B.data[:, kept], lora_E.data[kept]
    return model


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ada_lora_s_divisor_is_not_trained(dtype, autocast):
    model = get_peft_model(make_base("llama").to(dtype), ada_lora(), autocast_adapter_dtype=autocast)
    train_ada_lora(model)
    assert len(ranknums(model)) == 14
    assert all(p.item() == 6 and not p.requires_grad for p in ranknums(model).values())
    assert {p.dtype for p in ada_lora_s(model).values()} == {torch.float32 if autocast else dtype}


@pytest.mark.parametrize("beside", [False, True], ids=["fresh", "beside another"])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_ada_lora_over_bfloat16_is_read_as_it_was_saved(tmp_path, is_trainable, beside):
    base = make_base("llama").bfloat16()
    model = get_peft_model(copy.deepcopy(base), ada_lora())
    train_ada_lora(model)
    kept = [sum(ranks) for ranks in model.peft_config["default"].rank_pattern.values()]
    assert 0 < sum(kept) < 6 * len(kept)
    wanted = without_loss(without_lost_ranks(model))
    torch.testing.assert_close(without_loss(model), wanted)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}

    fresh = copy.deepcopy(base)
    if beside:
        fresh = get_peft_model(fresh, ada_lora(inference_mode=True), "first")
    loaded = load_adapter(fresh, tmp_path, "mine", is_trainable=is_trainable)
    assert torch.equal(without_loss(loaded), wanted)
    assert_same(get_peft_model_state_dict(loaded, adapter_name="mine"), saved)
    assert loaded.peft_config["mine"].rank_pattern is not None
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert bool(trained) is is_trainable and not any("ranknum" in name for name in trained)
    if is_trainable:
        assert {name.rpartition(".")[2] for name in trained} == {"mine"}


def test_ada_lora_without_autocast_stays_in_the_base_s_dtype(tmp_path):
    base = make_base("llama").bfloat16()
    model = get_peft_model(copy.deepcopy(base), ada_lora())
    train_ada_lora(model)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    assert {p.dtype for p in ada_lora_s(loaded).values()} == {torch.bfloat16}
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    assert_same(get_peft_model_state_dict(loaded), get_peft_model_state_dict(stock))


def test_what_is_not_to_train_is_frozen_over_bfloat16_too(tmp_path):
    base = make_base("llama").bfloat16()
    get_peft_model(copy.deepcopy(base), peft.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded = load_adapter(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert {name.split(".")[-2] for name, p in loaded.named_parameters() if p.requires_grad} == {"ia3_l"}
