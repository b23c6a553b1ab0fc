"""Tests that bottleneck adapters with AdapterHub's tensors compute AdapterHub's values, hidden states and gradients."""

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("aenum")

from adapterhub_numbers import CONFIGS, MODELS, WANTED, base, measured, numbers  # noqa: E402

import peft_ext  # noqa: E402
from peft_ext import BottleneckConfig  # noqa: E402
from peft_ext.tuners import config_from_adapterhub, from_adapterhub, to_adapterhub  # noqa: E402

# Bounds for float32 over two layers, one of whose norms may divide by a small number. WANTED has seven digits, and
# contains the errors of another CPU's float32 (at most 4e-6 of the float64 result).
_CLOSE = {"rtol": 1e-5, "atol": 5e-6}
_DIGITS = 1e-6


def adapted(kind, placement):
    return peft_ext.get_peft_model(base(kind), config_from_adapterhub(CONFIGS[placement], kind)).eval()


@pytest.mark.parametrize(("kind", "placement"), list(WANTED))
def test_computes_what_adapterhub_does(kind, placement):
    model = adapted(kind, placement)
    names = to_adapterhub(peft.get_peft_model_state_dict(model), kind, placement, "a")
    hub = {name: numbers(name, tensor.shape) for name, tensor in names.items()}
    state = from_adapterhub(hub, kind, placement)
    result = peft.set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "bottleneck" in key]
    count, y, hidden, slope = WANTED[kind, placement]
    assert len(hub) == count
    found = _measured(model, kind, placement)
    exact = _measured(model.double(), kind, placement)
    for ours, theirs, value in zip(found[:2], (y, hidden), exact[:2], strict=True):
        ours, theirs, value = (torch.tensor(numbers, dtype=torch.float64) for numbers in (ours, theirs, value))
        torch.testing.assert_close(value, theirs, **_CLOSE)
        assert (ours - value).abs().max() <= 1.5 * (theirs - value).abs().max() + _DIGITS
    assert found[2] == pytest.approx(slope, rel=1e-4, abs=1e-4)


def _measured(model, kind, placement):
    own = {name.replace(".default.", "."): p for name, p in model.named_parameters() if "bottleneck" in name}
    for parameter in own.values():
        parameter.grad = None
    return measured(model, kind, to_adapterhub(own, kind, placement, "a"))


@pytest.mark.parametrize(("kind", "placement"), list(WANTED))
def test_names_go_both_ways(kind, placement):
    state = peft.get_peft_model_state_dict(adapted(kind, placement))
    hub = to_adapterhub(state, kind, placement, "mine")
    assert all(".adapters.mine.adapter_" in name for name in hub)
    back = from_adapterhub(hub, kind, placement)
    assert list(back) == list(state) and all(back[name] is state[name] for name in state)


def test_the_placements_are_three_functions():
    outputs = [torch.tensor(WANTED["bert", placement][1]) for placement in CONFIGS]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["gpt2", "llama", "whisper"])
def test_a_block_that_is_checkpointed_has_its_adapter_recomputed(kind):
    model, grads = adapted(kind, "pfeiffer"), []
    for p in model.parameters():
        if p.requires_grad:
            p.data = numbers("start", p.shape)
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        model.train().zero_grad()
        torch.manual_seed(0)  # GPT-2 has dropout
        measured(model, kind, trained)
        grads.append([p.grad.clone() for p in trained.values()])
    for one, two in zip(*grads, strict=True):
        assert torch.equal(one, two)


def test_unloaded_blocks_have_no_hooks_left():
    model = adapted("gpt2", "pfeiffer")
    blocks = model.unload().h
    assert all(type(block).__name__ == "GPT2Block" and not block._forward_hooks for block in blocks)


def test_several_adapters_around_a_norm_run_in_turn():
    """As in AdapterHub's Stack, each adapter sees the norm of the sum so far, and the norm runs on the last sum."""
    model = adapted("bert", "pfeiffer")
    model.add_adapter("b", config_from_adapterhub(CONFIGS["pfeiffer"], "bert"))
    model.base_model.set_adapter(["default", "b"])
    layer = model.base_model.model.encoder.layer[0].output.LayerNorm
    for name, p in layer.bottleneck_adapters.named_parameters():
        p.data = numbers(name, p.shape)
    x, norm = numbers("x", (3, 8)), layer.base_layer
    z = x
    for name in ("default", "b"):
        adapter = layer.bottleneck_adapters[name]
        z = z + adapter.up(torch.relu(adapter.down(norm(z))))
    torch.testing.assert_close(layer(x), norm(z))


def test_a_norm_before_the_sum_is_refused():
    config = transformers.Gemma2Config(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, head_dim=4
    )
    with pytest.raises(ValueError, match="'pfeiffer' is not defined for model type 'gemma2'.*'after_ffn'"):
        peft.get_peft_model(transformers.Gemma2Model(config), BottleneckConfig(placement="pfeiffer"))


@pytest.mark.parametrize(("field", "value"), [
    ("ln_after", True), ("use_gating", True), ("phm_layer", True), ("inv_adapter", "nice"), ("dropout", 0.1),
    ("residual_before_ln", "post_add"), ("scaling", "learned"), ("reduction_factor", {"default": 16}),
    ("non_linearity", "leakyrelu"), ("mh_adapter", True), ("leave_out", [0]),
])  # fmt: skip
def test_what_these_adapters_have_not_is_refused(field, value):
    with pytest.raises(ValueError, match=f"config_from_adapterhub: .*{field}"):
        config_from_adapterhub({**CONFIGS["pfeiffer"], field: value}, "bert")


def test_wrong_names_are_refused():
    tensor = torch.zeros(1)
    with pytest.raises(ValueError, match="from_adapterhub: heads.default.1.weight is no tensor"):
        from_adapterhub({"heads.default.1.weight": tensor}, "bert")
    with pytest.raises(ValueError, match="attention.output.* is no tensor of a 'pfeiffer' adapter of a bert model"):
        from_adapterhub({"encoder.layer.0.attention.output.adapters.a.adapter_up.bias": tensor}, "bert")
    with pytest.raises(ValueError, match=r"from_adapterhub: state has the adapters \['a', 'b'\], wanted one"):
        from_adapterhub({f"encoder.layer.0.output.adapters.{n}.adapter_up.bias": tensor for n in "ab"}, "bert")
    with pytest.raises(ValueError, match="model_type is 'opt', wanted one of"):
        from_adapterhub({"layers.0.output_adapters.adapters.a.adapter_up.bias": tensor}, "opt")
    with pytest.raises(ValueError, match="placement is 'parallel', wanted one of"):
        to_adapterhub({"base_model.model.h.0.bottleneck_adapters.up.bias": tensor}, "gpt2", "parallel")
    assert set(MODELS) <= {kind for kind, _ in WANTED}
