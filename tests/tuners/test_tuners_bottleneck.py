"""Tests of bottleneck adapters as a PEFT method: places, numbers, files, several adapters."""

import copy
import pickle

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("aenum")

from safetensors.torch import load_file  # noqa: E402
from tiny_models import ARCHITECTURES  # noqa: E402

import peft_ext  # noqa: E402
from peft_ext import BottleneckConfig  # noqa: E402

VOCAB = 29


def llama(seed=0):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )).eval()  # fmt: skip


def adapted(base=None, **config):
    """Returns a Llama, or ``base``, with bottleneck adapters; everything else is stock."""
    config = BottleneckConfig(task_type="CAUSAL_LM", **config)
    return peft_ext.get_peft_model(llama() if base is None else base, config, blocks=False)


def tokens():
    return torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


def trained(model, steps=12):
    batch = tokens()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=tokens()).logits


PLACES = {"houlsby": {"o_proj", "down_proj"}, "pfeiffer": {"0", "1"}, "after_ffn": {"down_proj"}, "parallel": {"mlp"}}


@pytest.mark.parametrize("placement", PLACES)
def test_trains_saves_and_loads(placement, tmp_path):
    base = logits(llama())
    model = adapted(placement=placement, bottleneck_dim=8)
    found = {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "bottleneck_place")}
    assert found == PLACES[placement]
    rows = peft_ext.explain(model).rows
    assert rows and all(row.fused and row.kind.startswith("bottleneck adapter over ") for row in rows)
    assert (logits(model) - base).abs().max() < 1e-3
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "bottleneck_adapters" in name
    }
    losses = trained(model)
    assert losses[-1] < losses[0] - 0.1
    wanted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
        assert {row.reason for row in peft_ext.explain(model).rows} == {"adapters are disabled"}
    model.save_pretrained(tmp_path)
    ours, theirs = (
        peft_ext.load_adapter(llama(), tmp_path, blocks=False),
        peft.PeftModel.from_pretrained(llama(), tmp_path),
    )
    for loaded in (ours, theirs):
        assert torch.equal(logits(loaded), wanted)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".bottleneck_adapters.down." in key or ".bottleneck_adapters.up." in key for key in keys)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), wanted)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    assert torch.equal(logits(model.unload()), base)


@pytest.mark.parametrize("placement", PLACES)
def test_gradients_are_those_of_plain_modules(placement):
    model = adapted(placement=placement, bottleneck_dim=8, init_weights="bert", scale=2.0)
    batch = tokens()
    plain = llama()
    adapters = {}
    for name, layer in list(model.base_model.model.named_modules()):
        if not hasattr(layer, "bottleneck_place"):
            continue
        adapter = copy.deepcopy(layer.bottleneck_adapters["default"])
        adapters[name] = adapter

        def hook(module, args, y, adapter=adapter):
            x = args[0] if placement == "parallel" else y
            return y + 2.0 * adapter.up(torch.nn.functional.gelu(adapter.down(x)))

        plain.get_submodule(name).register_forward_hook(hook)
    model(input_ids=batch, labels=batch).loss.backward()
    plain(input_ids=batch, labels=batch).loss.backward()
    assert adapters
    for name, adapter in adapters.items():
        mine = model.base_model.model.get_submodule(name).bottleneck_adapters["default"]
        for one, two in zip(mine.parameters(), adapter.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=2e-4, atol=1e-6)


def test_two_adapters_are_held_switched_and_deleted():
    model = adapted(bottleneck_dim=4, init_weights="bert")
    first = logits(model)
    model.add_adapter("other", BottleneckConfig(bottleneck_dim=6, init_weights="bert", task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    other = logits(model)
    assert not torch.equal(other, first)
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"other"}
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    status = peft.get_model_status(model)
    assert status.enabled is True and status.active_adapters == ["default"] and status.available_adapters == ["default"]


def test_counts_of_bert_base():
    for placement, count in (("pfeiffer", 894_528), ("after_ffn", 894_528), ("houlsby", 1_789_056)):
        with torch.device("meta"):
            model = transformers.BertModel(transformers.BertConfig())
        model = peft.get_peft_model(model, BottleneckConfig(placement=placement), low_cpu_mem_usage=True)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_over_an_nf4_base():
    losses = trained(adapted(peft_ext.quantize_nf4(llama(), progress=False), bottleneck_dim=8))
    assert losses[-1] < losses[0] - 0.1


def test_errors():
    with pytest.raises(ValueError, match="placement is 'before', wanted one of"):
        BottleneckConfig(placement="before")
    with pytest.raises(ValueError, match="activation is 'tanh', wanted one of"):
        BottleneckConfig(activation="tanh")
    with pytest.raises(ValueError, match="bottleneck_dim is 0, wanted at least 1"):
        BottleneckConfig(bottleneck_dim=0)
    with pytest.raises(ValueError, match="init is 'xavier', wanted one of"):
        BottleneckConfig(init_weights="xavier")
    config = transformers.BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    bert = transformers.BertModel(config)
    with pytest.raises(ValueError, match="placement 'parallel' has no default for model type 'bert'"):
        peft.get_peft_model(bert, BottleneckConfig(placement="parallel"))
    model = adapted()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="not linear and can't be merged"):
            merge()


_LAYERS = {"layers.0", "layers.1"}
EXPECTED = {  # for each placement, the names of the adapted modules of a layer
    "Llama": {"houlsby": {"o_proj", "down_proj"}, "pfeiffer": _LAYERS, "after_ffn": {"down_proj"}, "parallel": {"mlp"}},
    "Gemma2": {"houlsby": {"o_proj", "down_proj"}, "after_ffn": {"down_proj"}, "parallel": {"mlp"}},
    "Phi": {"houlsby": {"dense", "fc2"}, "pfeiffer": {"fc2"}, "after_ffn": {"fc2"}, "parallel": {"mlp"}},
    "GPT-2": {"houlsby": {"attn.c_proj", "mlp.c_proj"}, "pfeiffer": {"h.0", "h.1"}, "after_ffn": {"mlp.c_proj"},
              "parallel": {"mlp"}},
    "OPT": {"houlsby": {"out_proj", "fc2"}, "pfeiffer": _LAYERS, "after_ffn": {"fc2"}},
    "BERT": {"houlsby": {"attention.output.dense", "0.output.dense", "1.output.dense"},
             "pfeiffer": {"0.output.LayerNorm", "1.output.LayerNorm"},
             "after_ffn": {"0.output.dense", "1.output.dense"}},
    "T5": {"houlsby": {"SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"},
           "pfeiffer": {"encoder.block.0.layer.1", "encoder.block.1.layer.1", "decoder.block.0.layer.2",
                        "decoder.block.1.layer.2"},
           "after_ffn": {"DenseReluDense.wo"}, "parallel": {"DenseReluDense"}},
    "Whisper": {"houlsby": {"self_attn.out_proj", "encoder_attn.out_proj", "fc2"},
                "pfeiffer": {f"{coder}.layers.{i}" for coder in ("encoder", "decoder") for i in (0, 1)},
                "after_ffn": {"fc2"}},
}  # fmt: skip


def adapted_names(model):
    return {name for name, module in model.named_modules() if hasattr(type(module), "update_layer")}


@pytest.mark.parametrize(
    ("name", "placement"), [(name, placement) for name, places in EXPECTED.items() for placement in places]
)
def test_default_places(name, placement):
    architecture = ARCHITECTURES[name]
    model = peft.get_peft_model(architecture.build(), BottleneckConfig(placement=placement, bottleneck_dim=4))
    found, wanted = adapted_names(model), EXPECTED[name][placement]
    assert found and all(any(one.endswith(f".{place}") for place in wanted) for one in found)
    assert all(any(one.endswith(f".{place}") for one in found) for place in wanted)
    out = model(**architecture.batch())
    assert torch.isfinite(out.logits).all()


def test_opt_with_its_norms_behind_has_the_adapter_around_the_last():
    config = transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2,
        do_layer_norm_before=False, word_embed_proj_dim=16,
    )  # fmt: skip
    model = peft.get_peft_model(transformers.OPTModel(config), BottleneckConfig(placement="pfeiffer"))
    assert {name.rpartition("layers.")[2] for name in adapted_names(model)} == {"0.final_layer_norm"}


def test_the_hidden_states_of_an_adapted_block_are_what_the_next_one_takes():
    model, taken = adapted(placement="pfeiffer", bottleneck_dim=4, init_weights="bert").eval(), []
    layers = model.base_model.model.model.layers
    layers[1].base_layer.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    states = model(input_ids=tokens(), output_hidden_states=True).hidden_states
    assert torch.equal(states[1], taken[0])


def test_layers_to_transform_and_a_sublayer_called_by_keywords():
    config = BottleneckConfig(bottleneck_dim=4, layers_to_transform=[0], task_type="CAUSAL_LM")
    names = adapted_names(peft.get_peft_model(llama(), config))
    assert names and all(".layers.0." in name for name in names)
    config = BottleneckConfig(
        target_modules=["self_attn"], bottleneck_dim=4, init_weights="bert", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(llama(), config)  # the sublayer returns a tuple, and accepts only keyword arguments
    assert (logits(model) - logits(llama())).abs().max() > 0


def test_what_can_not_be_run_is_refused():
    model = adapted(bottleneck_dim=4)
    with pytest.raises(ValueError, match="adapter_names is given, but a batch of several adapters"):
        model(input_ids=tokens(), adapter_names=["default", "default"])
    config = BottleneckConfig(placement="parallel", target_modules=["down_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="down_proj takes 48 features and gives 32, wanted equal numbers"):
        peft.get_peft_model(llama(), config)
    with pytest.raises(ValueError, match="act_fn is a SiLU\\w* without parameters; target another"):
        peft.get_peft_model(llama(), BottleneckConfig(target_modules=["act_fn"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="reduction_factor is 0, wanted more than 0"):
        BottleneckConfig(reduction_factor=0)
    model.unmerge_adapter()  # no error, because nothing is merged


def test_accelerate_can_take_its_hooks_off():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = adapted(bottleneck_dim=4)
    wanted = logits(model)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    add_hook_to_module(layer.base_layer, ModelHook())
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        ({"placement": "houlsby"}, {"placement": "pfeiffer"}, r"model.layers.0.mlp.down_proj is in model.layers.0,"),
        ({"placement": "pfeiffer"}, {"placement": "houlsby"}, r"model.layers.0.mlp.down_proj is in model.layers.0,"),
        ({"placement": "parallel"}, {"target_modules": ["up_proj"]}, r"layers.0.mlp.up_proj is in model.layers.0.mlp,"),
    ],
)
def test_adapters_within_each_other_are_refused(first, second, match):
    model = adapted(init_weights="bert", bottleneck_dim=4, **first)
    wanted, base = logits(model), logits(llama())
    with pytest.raises(ValueError, match=match):
        model.add_adapter("other", BottleneckConfig(task_type="CAUSAL_LM", **second))
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), wanted)
    model.add_adapter("other", BottleneckConfig(task_type="CAUSAL_LM", **first))
    assert torch.equal(logits(model.unload()), base)
    with pytest.raises(ValueError, match="model.layers.0.mlp.down_proj is in model.layers.0.mlp, wanted no adapter wi"):
        adapted(target_modules=["mlp", "down_proj"])


def test_autocast_leaves_a_float32_residual_stream_as_it_is():
    model = adapted(placement="pfeiffer", bottleneck_dim=4, init_weights="mam")  # the adapter is the identity
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = model(input_ids=tokens(), output_hidden_states=True).hidden_states
        with model.disable_adapter():
            wanted = model(input_ids=tokens(), output_hidden_states=True).hidden_states
    assert all(state.dtype is torch.float32 for state in wanted)
    for state, stock in zip(found, wanted, strict=True):
        assert state.dtype is torch.float32 and torch.equal(state, stock)


def test_an_adapted_block_is_compiled_as_one_graph():
    class Block(transformers.modeling_layers.GradientCheckpointingLayer):
        out_features = 8

        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.inner(x)

    config = BottleneckConfig(target_modules=["0"], placement="pfeiffer", bottleneck_dim=4)
    model = peft_ext.get_peft_model(torch.nn.Sequential(Block()), config).base_model.model
    x = torch.randn(3, 8)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
