"""Tests of BitFit, partial fine-tuning and Diff Pruning as PEFT methods: numbers, files, and operations on a model."""

import copy
import json
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("aenum")
pytest.importorskip("bitsandbytes")

import peft
from bitsandbytes.nn import Linear4bit
from peft import PeftConfig, PeftModel, get_layer_status, get_model_status, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tiers import first
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)
from tuner_models import (
    CASES,
    PREFIX,
    VOCAB,
    Mixed,
    adapter_parameters,
    assert_same,
    batch,
    config_of,
    data_loss,
    every_case,
    every_method,
    gradients,
    logits,
    make,
    make_base,
    make_spread,
    of_base,
    reference,
    spread,
    state_bits,
    train,
    wrapped,
)

import peft_ext
from peft_ext.model import get_peft_model, load_adapter
from peft_ext.tuners import BitFitConfig, DiffPruningConfig, PartialConfig
from peft_ext.tuners.bitfit import BitFitModel
from peft_ext.tuners.layer import ReplacingLayer
from peft_ext.tuners.register import register

pytestmark = pytest.mark.filterwarnings("ignore")


@every_case
def test_starts_as_the_base_model_and_trains_its_own_tensors_alone(method, name):
    model, base = make(method, name)
    wanted = logits(base)
    assert torch.equal(logits(model), wanted)
    # The w of a new Diff Pruning adapter is 0, so the adapter adds 0, whatever gates are drawn in training.
    assert torch.equal(logits(model.train()), wanted)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(model)) and all(f".{PREFIX[method]}" in n for n in trained)
    assert set(gradients(model)) == trained


@pytest.mark.parametrize(("method", "name"), CASES[:8])
def test_gradients_are_those_of_the_model_with_these_tensors_bit_for_bit(method, name):
    model, base = make_spread(method, name)
    plain = reference(model, base)
    assert torch.equal(logits(model), logits(plain))
    assert not torch.equal(logits(model), logits(base))
    for mode in (False, True):
        actual = {of_base(n): g for n, g in gradients(model.train(mode)).items()}
        wanted = gradients(plain.train(mode))
        assert_same(actual, wanted)
        assert all(g.abs().sum() > 0 for n, g in wanted.items() if "k_proj.bias" not in n and "key.bias" not in n)


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
    ours = load_adapter(copy.deepcopy(base), tmp_path, "mine", blocks=False, low_cpu_mem_usage=low_cpu_mem_usage)
    assert ours.active_adapters == ["mine"] and torch.equal(logits(ours), logits(model))


@every_method
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


@every_method
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
    assert_same(get_peft_model_state_dict(model), saved)  # the adapter's saved state does not depend on a merge
    clone = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for one in (model, clone):
        one.unmerge_adapter()
        assert_same(state_bits(one), before)
        assert torch.equal(logits(one), wanted)
    model.merge_adapter()
    own = {p.data_ptr() for p in adapter_parameters(model).values()}
    assert not any(p.data_ptr() in own for n, p in model.named_parameters() if "_tensors." not in n)
    with model.disable_adapter():  # disables all adapter layers at once, also those that a forward does not reach
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


@every_method
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
    assert_same(actual, wanted)  # under Diff Pruning, the recomputation must draw the same random u as the forward


@pytest.mark.parametrize("method", ["partial", "diff"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_that_checkpoints_itself_is_computed_again_with_the_adapter(method, reentrant):
    """A layer of BEiT has parameters of its own, so that the adapter wraps the layer, which checkpoints its forward."""
    torch.manual_seed(1)
    base = BeitForImageClassification(
        BeitConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8,
                   patch_size=4, layer_scale_init_value=0.5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )  # fmt: skip
    model = peft.get_peft_model(base, config_of(method, target_modules=["layers.1"])).train()
    spread(model)
    assert [name for name in wrapped(model) if name.endswith("layers.1")]
    pixels = torch.randn(3, 3, 8, 8, requires_grad=True)

    def step():
        model.zero_grad()
        torch.manual_seed(5)
        loss = model(pixel_values=pixels, labels=torch.tensor([0, 1, 1])).loss
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted = step()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    functions = {name: module.__dict__.get("_gradient_checkpointing_func") for name, module in base.named_modules()}
    assert wanted.keys() == set(adapter_parameters(model))
    assert_same(step(), wanted)
    for name, module in base.named_modules():
        assert module.__dict__.get("_gradient_checkpointing_func") is functions[name]


def test_two_threads_run_one_layer_one_after_the_other():
    inside, second, left = threading.Event(), threading.Event(), threading.Event()

    class Slow(nn.Linear):
        def forward(self, x):
            if inside.is_set():
                second.set()
                left.wait(1.0)
            else:
                inside.set()
                second.wait(0.3)
            return super().forward(x)

    model = spread(peft.get_peft_model(nn.Sequential(Slow(8, 8)), PartialConfig(target_modules=["0"])))
    x = torch.randn(2, 8)
    layer = model.base_model.model[0]
    weight, own = layer.base_layer.weight, layer.partial_tensors["default"]
    found = []

    def first_call():
        found.append(model(x))
        left.set()

    calls = [threading.Thread(target=first_call), threading.Thread(target=lambda: found.append(model(x)))]
    calls[0].start()
    assert inside.wait(10)
    calls[1].start()
    for call in calls:
        call.join()
    assert layer.base_layer.weight is weight
    wanted = nn.functional.linear(x, own.weight, own.bias)
    assert len(found) == 2 and all(torch.equal(y, wanted) for y in found)


def test_a_merge_waits_for_a_call_in_another_thread():
    """During a call, the base layer holds the adapter's tensors; a merge would keep them as the unmerged tensors."""
    inside, left = threading.Event(), threading.Event()

    class Slow(nn.Linear):
        def forward(self, x):
            inside.set()
            left.wait(10)
            return super().forward(x)

    model = spread(peft.get_peft_model(nn.Sequential(Slow(8, 8)), PartialConfig(target_modules=["0"])))
    layer, x, found = model.base_model.model[0], torch.randn(2, 8), []
    weight = layer.base_layer.weight.detach().clone()
    own = layer.partial_tensors["default"].weight.detach().clone()
    calls = [threading.Thread(target=lambda: found.append(model(x))), threading.Thread(target=layer.merge)]
    calls[0].start()
    assert inside.wait(10)
    calls[1].start()
    calls[1].join(0.5)
    left.set()
    for call in calls:
        call.join()
    assert layer.merged and torch.equal(layer.base_layer.weight, own)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight) and torch.equal(layer.partial_tensors["default"].weight, own)


def test_two_threads_leave_the_checkpoint_function_as_it_was():
    """The second thread comes while the first thread has replaced the function."""
    inside, left = threading.Event(), threading.Event()

    class Slow(nn.Linear):
        gradient_checkpointing = True

        def forward(self, x):
            inside.set()
            left.wait(0.5)
            return super().forward(x)

    def function(run, *args):
        return run(*args)

    model = spread(peft.get_peft_model(nn.Sequential(Slow(8, 8)), PartialConfig(target_modules=["0"])))
    base = model.base_model.model[0].base_layer
    base._gradient_checkpointing_func = function
    calls = [threading.Thread(target=model, args=(torch.randn(2, 8),)) for _ in range(2)]
    calls[0].start()
    assert inside.wait(10) and base._gradient_checkpointing_func is not function
    calls[1].start()
    for call in calls:
        call.join(30)
    assert base._gradient_checkpointing_func is function


@pytest.mark.parametrize("method", first(["BitFit", "diff"], ["BitFit"]))
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


@every_method
def test_generates_and_is_injected_without_a_peft_model(method):
    model, base = make_spread(method, "gpt2")
    ids = torch.tensor([[3, 4, 5]])
    wanted = reference(model, base).generate(ids, max_new_tokens=4, do_sample=False) if method != "diff" else None
    actual = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert actual.shape == (1, 7) and (wanted is None or torch.equal(actual, wanted))
    injected = inject_adapter_in_model(config_of(method, "gpt2"), copy.deepcopy(base))
    assert type(injected) is GPT2LMHeadModel and torch.equal(logits(injected), logits(base))
    loss = injected(**batch(injected)).loss
    # In training, the loss of a model with an adapter from inject_adapter_in_model includes Diff Pruning's penalty.
    assert (injected.train()(**batch(injected)).loss > loss) == (method == "diff")


@pytest.mark.parametrize(
    ("method", "name", "config"),
    [
        pytest.param("BitFit", "bert", {"task_type": "SEQ_CLS"}, marks=pytest.mark.slow),
        ("partial", "llama", {"num_last_layers": None, "target_modules": ["model.layers.1", "lm_head"]}),
        pytest.param("diff", "llama", {"sparsity_penalty": 1.25e-7}, marks=pytest.mark.slow),
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
        ("llama", BitFitConfig(), "no bias of kind all among the targets in LlamaForCausalLM; add_bias adds"),
        ("gpt2", BitFitConfig(bias_kinds="query"), "no bias of kind query"),
        ("llama", BitFitConfig(add_bias=["nope"]), "add_bias is .'nope'., which is no linear layer"),
        ("llama", PartialConfig(), "give target_modules, num_last_layers or layers_to_transform"),
        ("llama", PartialConfig(num_last_layers=3), "num_last_layers is 3, wanted at most 2, the number of layers of"),
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
        # A training with FSDP stores the 4-bit codes as bfloat16.
        held = nn.Sequential(Linear4bit(64, 64, quant_type="nf4", quant_storage=torch.bfloat16)).to("cpu")
        assert held[0].weight.dtype is torch.bfloat16
        with pytest.raises(ValueError, match="0 is a Linear4bit whose weight is quantized"):
            peft.get_peft_model(held, replace(config, target_modules=["0"]))
    outer = peft.get_peft_model(Mixed(), PartialConfig(target_modules=["layers.1.inner"]))
    with pytest.raises(ValueError, match="layers.1 already contains an adapter, of layers.1.inner"):
        outer.add_adapter("other", PartialConfig(target_modules=["layers.1"]))
    assert list(outer.peft_config) == ["default"]


@pytest.mark.parametrize("config", [PartialConfig(target_modules=["up"]), BitFitConfig(), DiffPruningConfig()])
def test_the_copies_of_data_parallel_are_refused(config):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x):
            return self.up(x)

    model = peft.get_peft_model(Net(), copy.deepcopy(config))
    layer = model.base_model.model.up
    replica = layer._replicate_for_data_parallel()  # as nn.DataParallel makes it, on each of several GPUs
    with pytest.raises(RuntimeError, match="nn.DataParallel makes copies without parameters; wanted DistributedDataP"):
        replica(torch.randn(2, 8))


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
            self.inner.bias = nn.Parameter(torch.zeros(8))  # a parameter of the module that also has a list of layers

    for config in (BitFitConfig(), PartialConfig(target_modules=["inner"]), DiffPruningConfig()):
        with pytest.warns(UserWarning, match="inner.bias stays frozen"):
            model = peft.get_peft_model(Outer(), config)
        assert "inner.head" in wrapped(model) and "inner" not in wrapped(model)


def test_registering():
    register("bitfit", BitFitConfig, BitFitModel)  # registering again is no error
    with pytest.raises(RuntimeError, match="PEFT has a method 'lora' already"):
        register("lora", BitFitConfig, BitFitModel)
    kind = BitFitConfig().peft_type
    assert kind == "BITFIT" and pickle.loads(pickle.dumps(kind)) is kind and peft.PeftType("BITFIT") is kind
