"""Tests of the modules of peft_ext.nn: state, round trips, merging. The tests of the operators cover the arithmetic."""

import copy
import io
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiers import first
from torch import nn

import peft_ext
from peft_ext import ops
from peft_ext.nn import AdaLoRALinear, DoRALinear, IA3Linear, LoRALinear, NF4Linear

DOUBLE = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
BASE = pytest.mark.parametrize("base", ["dense", "nf4"])


# For each adapted layer: its class, the arguments of the class, and the names of the trainable parameters.
ADAPTED = {
    "lora": (LoRALinear, {"r": 4}, ["lora_A", "lora_B"]),
    "dora": (DoRALinear, {"r": 4}, ["lora_magnitude_vector", "lora_A", "lora_B"]),
    "dora-peft": (DoRALinear, {"r": 4, "dropout_mode": "peft"}, ["lora_magnitude_vector", "lora_A", "lora_B"]),
    "dora-norm_grad": (DoRALinear, {"r": 4, "norm_grad": True}, ["lora_magnitude_vector", "lora_A", "lora_B"]),
    "adalora": (AdaLoRALinear, {"r": 4}, ["lora_A", "lora_B", "lora_E"]),
    "ia3": (IA3Linear, {}, ["ia3_l"]),
    "ia3-feedforward": (IA3Linear, {"feedforward": True}, ["ia3_l"]),
}
KIND = pytest.mark.parametrize("kind", ADAPTED)
THEIRS = pytest.mark.cpu_only("it takes bitsandbytes' CPU tensors")


@pytest.fixture(autouse=True)
def _on_the_device(device: torch.device) -> Iterator[None]:
    """Makes modules and tensors on the device of the operators."""
    with nullcontext() if device.type == "cpu" else device:
        yield


def make_base(base: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> nn.Linear:
    linear = nn.Linear(65, 33, dtype=dtype, **kwargs)
    return NF4Linear.from_linear(linear) if base == "nf4" else linear


def make_adapted(kind: str, base: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> nn.Module:
    """Returns an adapted layer with an effective adapter: every parameter is moved away from its initial value."""
    cls, own, trainable = ADAPTED[kind]
    module = cls.from_linear(make_base(base, dtype), **own, **kwargs)
    with torch.no_grad():
        for name in trainable:
            parameter = getattr(module, name)
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@DOUBLE
def test_nf4_linear_is_the_op(double_quant: bool) -> None:
    linear = nn.Linear(65, 33, dtype=torch.bfloat16)
    module = NF4Linear.from_linear(linear, double_quant=double_quant)
    x = torch.randn(4, 65, dtype=torch.bfloat16)
    assert torch.equal(module(x), ops.nf4_linear(x, ops.nf4_quantize(linear.weight, 64, double_quant), linear.bias))
    assert module.bias is linear.bias
    assert torch.equal(module.dequantize(), module.nf4.dequantize(torch.bfloat16))


@DOUBLE
def test_nf4_linear_state_dict_round_trip(double_quant: bool) -> None:
    module = NF4Linear.from_linear(nn.Linear(65, 33), double_quant=double_quant)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh = NF4Linear(65, 33, double_quant=not double_quant)  # the state dict decides about double quantization
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(3, 65)
    assert torch.equal(fresh(x), module(x))
    assert fresh.nf4.tensors().keys() == module.nf4.tensors().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.nf4.tensors().values(), module.nf4.tensors().values(), strict=True)
    )


@THEIRS
@DOUBLE
def test_nf4_linear_shares_bitsandbytes_state_dict(double_quant: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compress_statistics=double_quant)
    theirs = theirs.to("cpu")
    theirs.weight = bnb.nn.Params4bit(
        torch.randn(32, 64), requires_grad=False, quant_type="nf4", compress_statistics=double_quant
    ).to("cpu")
    state = theirs.state_dict()
    module = NF4Linear(64, 32)
    module.load_state_dict(state)
    assert module.state_dict().keys() == state.keys()
    for key, value in module.state_dict().items():
        if "quant_state" not in key:
            assert torch.equal(value.reshape(-1), state[key].reshape(-1)), key
    x = torch.randn(3, 64)
    torch.testing.assert_close(module(x), theirs.train()(x), rtol=1e-5, atol=1e-5)


def test_nf4_linear_load_errors_name_what_came() -> None:
    module = NF4Linear.from_linear(nn.Linear(64, 32))
    before = module.nf4
    good = module.state_dict()
    with pytest.raises(RuntimeError, match="Missing key.*weight.absmax"):
        module.load_state_dict({k: v for k, v in good.items() if k != "weight.absmax"})
    with pytest.raises(RuntimeError, match="wanted torch.uint8 with 1024 for shape"):
        module.load_state_dict({**good, "weight": good["weight"][:-1]})
    with pytest.raises(RuntimeError, match="Unexpected key.*extra"):
        module.load_state_dict({**good, "extra": torch.zeros(1)})
    other = NF4Linear.from_linear(nn.Linear(32, 64)).state_dict()
    with pytest.raises(RuntimeError, match=r"nf4 has shape \(64, 32\), wanted \(32, 64\)"):
        module.load_state_dict(other)
    assert all(torch.equal(a, b) for a, b in zip(before.tensors().values(), module.nf4.tensors().values(), strict=True))


def test_a_state_brings_the_dtype_of_its_weight() -> None:
    module, other = NF4Linear.from_linear(nn.Linear(64, 32).bfloat16()), NF4Linear.from_linear(nn.Linear(64, 32))
    other.load_state_dict(module.state_dict())
    assert other.quant_dtype is torch.bfloat16 and other.dequantize().dtype is torch.bfloat16


@DOUBLE
def test_casting_keeps_codes_and_scales(double_quant: bool) -> None:
    for cast in (nn.Module.half, nn.Module.double, lambda m: m.type(torch.bfloat16), lambda m: m.to(torch.float16)):
        module = NF4Linear.from_linear(nn.Linear(65, 33), double_quant=double_quant)
        before = {name: tensor.clone() for name, tensor in module.nf4.tensors().items()}
        cast(module)
        assert module.bias.dtype is not torch.float32
        for name, tensor in module.nf4.tensors().items():
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
        assert module(torch.randn(2, 65, dtype=module.bias.dtype)).dtype is module.bias.dtype


def test_eval_then_train_then_save_is_bit_identical() -> None:
    """In eval mode bitsandbytes' layer repacks its weight; NF4Linear must not change."""
    module = NF4Linear.from_linear(nn.Linear(64, 32, dtype=torch.bfloat16))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        module.eval()(x)
    x.requires_grad_()
    module.train()(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@DOUBLE
def test_meta_construction_and_materialization(double_quant: bool, device: torch.device) -> None:
    module = NF4Linear(64, 32, double_quant=double_quant, device="meta")
    assert all(t.is_meta for t in module.nf4.tensors().values())
    source = NF4Linear.from_linear(nn.Linear(64, 32), double_quant=double_quant)
    module.to_empty(device=device)
    module.load_state_dict(source.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(module(x), source(x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@BASE
@KIND
def test_copies_are_independent(kind: str, base: str, clone) -> None:
    module = make_adapted(kind, base)
    x = torch.randn(3, 65)
    module(x).sum().backward()
    twin = clone(module)
    assert torch.equal(twin(x), module(x))
    with torch.no_grad():
        getattr(twin, ADAPTED[kind][2][-1]).mul_(2.0)
    assert not torch.equal(twin(x), module(x))


@BASE
@KIND
def test_an_adapted_layer_starts_as_its_base_and_trains_its_adapter_alone(kind: str, base: str) -> None:
    cls, own, trainable = ADAPTED[kind]
    linear = make_base(base)
    dropout = {} if kind.startswith("ia3") else {"lora_dropout": 0.5}
    module = cls.from_linear(linear, **own, **dropout)
    assert module.base_layer is linear and module.training
    x = torch.randn(3, 65)
    torch.testing.assert_close(module(x), linear(x), rtol=1e-5, atol=1e-5)
    assert [n for n, p in module.named_parameters() if p.requires_grad] == trainable
    module = make_adapted(kind, base, **dropout)
    module(x).sum().backward()
    assert all(getattr(module, name).grad.abs().sum() > 0 for name in trainable)
    assert all(p.grad is None for p in module.base_layer.parameters())


@BASE
@KIND
def test_an_adapted_layer_is_its_merged_weight(kind: str, base: str) -> None:
    """The layer's forward must agree with a linear layer whose weight is the merged weight."""
    module = make_adapted(kind, base).double().eval()
    x = torch.randn(5, 65, dtype=torch.float64)
    weight = module.base_layer.dequantize(torch.float64) if base == "nf4" else module.base_layer.weight
    bias = module.merged_bias(module.base_layer.bias)
    # NF4Linear keeps the dtype float32 of the quantized layer, also after ``double()``. The merge computes DoRA's norm
    # from the weight dequantized to float32, and forward from the weight dequantized to float64.
    tolerance = 1e-12 if base == "dense" else 1e-6
    wanted = nn.functional.linear(x, module.merged_weight(weight), bias)
    torch.testing.assert_close(module(x), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@BASE
@KIND
def test_merge_and_exact_unmerge(kind: str, base: str, dtype: torch.dtype) -> None:
    module = make_adapted(kind, base, dtype).eval()
    x = torch.randn(5, 65, dtype=dtype)
    before, bits = module(x), {k: v.clone() for k, v in module.state_dict().items()}
    held = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    module.merge()
    module.merge()  # a second merge changes nothing
    assert module.merged and "merged=True" in repr(module)
    assert held == [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    merged = module(x)
    # A merge rounds a dense weight once. A merge into NF4 also has a quantization error.
    bound = 0.2 if base == "nf4" else 20 * torch.finfo(dtype).eps
    assert (merged - before).norm() <= bound * before.norm()
    assert torch.equal(copy.deepcopy(module)(x), merged)
    module.unmerge()
    module.unmerge()
    assert torch.equal(module(x), before)
    assert all(torch.equal(value, bits[key]) for key, value in module.state_dict().items())


@BASE
@KIND
def test_a_merged_layer_can_be_cast_and_unmerged(kind: str, base: str) -> None:
    module = make_adapted(kind, base).eval()
    twin = copy.deepcopy(module).double()
    module.merge()
    module.double()
    module.unmerge()
    x = torch.randn(5, 65, dtype=torch.float64)
    assert torch.equal(module(x), twin(x))


@BASE
@KIND
def test_adapted_state_dict_round_trip(kind: str, base: str) -> None:
    cls, own, trainable = ADAPTED[kind]
    module = make_adapted(kind, base)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh = cls.from_linear(make_base(base), **own)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(3, 65)
    assert torch.equal(fresh(x), module(x))
    assert set(trainable) <= module.state_dict().keys()


@BASE
@KIND
def test_adapted_meta_construction_and_materialization(kind: str, base: str, device: torch.device) -> None:
    cls, own, _ = ADAPTED[kind]
    linear = NF4Linear(65, 33, device="meta") if base == "nf4" else nn.Linear(65, 33, device="meta")
    module = cls.from_linear(linear, **own)
    assert all(p.is_meta for p in module.parameters())
    source = make_adapted(kind, base)
    module.to_empty(device=device)
    module.load_state_dict(source.state_dict())
    x = torch.randn(2, 65)
    assert torch.equal(module(x), source(x))
    module.reset_parameters()
    torch.testing.assert_close(module(x), module.base_layer(x), rtol=1e-5, atol=1e-5)


@KIND
def test_constructed_with_its_own_base(kind: str) -> None:
    cls, own, trainable = ADAPTED[kind]
    module = cls(65, 33, **own, bias=False, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16)
    assert (module.in_features, module.out_features) == (65, 33) and module.base_layer.bias is None
    assert {getattr(module, name).dtype for name in trainable} == {torch.bfloat16}
    x = torch.randn(3, 65, dtype=torch.bfloat16)
    assert module(x).dtype == torch.bfloat16
    module.merge()
    module.unmerge()
    torch.testing.assert_close(module(x), module.base_layer(x), rtol=2e-2, atol=2e-2)
    assert {getattr(cls(65, 33, **own, dtype=torch.bfloat16), name).dtype for name in trainable} == {torch.float32}


@KIND
def test_constructed_on_meta_in_float64(kind: str) -> None:
    cls, own, _ = ADAPTED[kind]
    module = cls(65, 33, **own, device="meta", dtype=torch.float64, adapter_dtype=torch.float64)
    assert all(p.is_meta and p.dtype is torch.float64 for p in module.parameters())
    assert module(torch.randn(3, 65, device="meta", dtype=torch.float64)).shape == (3, 33)


@pytest.mark.parametrize("kind", first(ADAPTED, list(ADAPTED)[:2]))
def test_an_adapted_layer_compiles_without_a_graph_break(kind: str) -> None:
    torch._dynamo.reset()
    module = make_adapted(kind, "nf4").eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 65, requires_grad=True)
    torch.testing.assert_close(compiled(x), module(x))
    wanted = torch.autograd.grad(module(x).sum(), (x, *(getattr(module, name) for name in ADAPTED[kind][2])))
    got = torch.autograd.grad(compiled(x).sum(), (x, *(getattr(module, name) for name in ADAPTED[kind][2])))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_dora_norm_follows_every_change() -> None:
    """DoRA's norm follows every change of weights, also through ``.data``, which does not change a tensor's version."""
    module = make_adapted("dora", "dense").eval()
    x = torch.randn(3, 65)

    def wanted() -> torch.Tensor:
        direction = module.base_layer.weight + module.delta_weight()
        weight = module.lora_magnitude_vector[:, None] * direction / direction.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, weight, module.base_layer.bias)

    for change in (
        lambda: module.lora_B.data.mul_(3),
        lambda: module.base_layer.weight.data.add_(0.1),
        lambda: setattr(module.lora_A, "data", module.lora_A.data.flip(0)),
        lambda: module.lora_B.detach().zero_(),
    ):
        module(x)
        change()
        torch.testing.assert_close(module(x), wanted(), rtol=1e-5, atol=1e-5)


def test_adalora_is_pefts_formula() -> None:
    module = make_adapted("adalora", "dense").eval()
    module.ranknum.fill_(3)
    x = torch.randn(5, 65)
    delta = (x @ (module.lora_A * module.lora_E).T @ module.lora_B.T) * module.scaling / (3 + 1e-5)
    torch.testing.assert_close(module(x), module.base_layer(x) + delta, rtol=1e-5, atol=1e-5)
    assert module.scaling == 16.0 and AdaLoRALinear(8, 8, r=4, lora_alpha=0).scaling == 4.0
    assert "ranknum" in module.state_dict()


def test_ia3_vectors_have_pefts_shapes() -> None:
    assert IA3Linear(65, 33).ia3_l.shape == (33, 1) and IA3Linear(65, 33, feedforward=True).ia3_l.shape == (1, 65)


def test_scaling_rule_and_bad_arguments() -> None:
    assert LoRALinear(8, 8, r=4, lora_alpha=16).scaling == 4.0
    assert LoRALinear(8, 8, r=4, lora_alpha=16, use_rslora=True).scaling == 8.0
    with pytest.raises(ValueError, match="LoRALinear: r is 0, wanted at least 1"):
        LoRALinear(8, 8, r=0)
    with pytest.raises(ValueError, match=r"LoRALinear: lora_dropout is 1.0, wanted 0 <= p < 1"):
        LoRALinear(8, 8, lora_dropout=1.0)
    with pytest.raises(ValueError, match="AdaLoRALinear: r is 0, wanted at least 1"):
        AdaLoRALinear(8, 8, r=0)
    with pytest.raises(ValueError, match="DoRALinear: lora_dropout is -1, wanted 0 <= p < 1"):
        DoRALinear(8, 8, lora_dropout=-1)
    with pytest.raises(ValueError, match="DoRALinear: dropout_mode is 'base', wanted 'lora' or 'peft'"):
        DoRALinear(8, 8, dropout_mode="base")


@THEIRS
@DOUBLE
def test_from_and_to_bitsandbytes_share_storage(double_quant: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(33, 66, dtype=torch.bfloat16)
    params = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=double_quant)
    params = params.to("cpu")
    nf4 = peft_ext.NF4Weight.from_bitsandbytes(params)
    assert nf4.packed.data_ptr() == params.data_ptr() and nf4.absmax.data_ptr() == params.quant_state.absmax.data_ptr()
    assert nf4.dtype == torch.bfloat16 and tuple(nf4.shape) == (33, 66)
    theirs = bnb.functional.dequantize_4bit(params.data, params.quant_state)
    assert torch.equal(nf4.dequantize(), theirs)
    back = nf4.to_bitsandbytes()
    assert back.data_ptr() == params.data_ptr() and back.quant_state.absmax.data_ptr() == nf4.absmax.data_ptr()
    assert torch.equal(bnb.functional.dequantize_4bit(back.data, back.quant_state), theirs)
    assert peft_ext.NF4Weight.from_bitsandbytes(back).packed.data_ptr() == nf4.packed.data_ptr()


@THEIRS
def test_bits_are_bitsandbytes() -> None:
    """Compares codes and scales with bitsandbytes' for several dtypes, shapes and block sizes, with full blocks and
    tail blocks."""
    bnb = pytest.importorskip("bitsandbytes")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((64, 64), (33, 65), (7, 31), (1, 1), (576, 1536)):
            for blocksize in (64, 32, 4096):
                weight = torch.randn(shape).to(dtype)
                ours = ops.nf4_quantize(weight, blocksize)
                packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=blocksize)
                assert torch.equal(ours.packed, packed) and torch.equal(ours.absmax, state.absmax)


@THEIRS
def test_double_quantization_against_bitsandbytes() -> None:
    """Compares double quantization with bitsandbytes; the code table must have bitsandbytes' bits.

    In bitsandbytes the offset is PyTorch's mean, whose last bits depend on the threads; in peft_ext the offset is
    exact. The scales of the scales depend on the offset. bitsandbytes' 8-bit codes on the CPU are not the nearest codes
    for about 0.2% of the scales.
    """
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(576, 1536)
    ours = ops.nf4_quantize(weight, 64, double_quant=True)
    _, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.nested.code, state.state2.code)
    close = {"rtol": 1e-6, "atol": 0.0}
    torch.testing.assert_close(ours.nested.offset, state.offset, **close)
    plain = ops.nf4_quantize(weight, 64).absmax
    assert torch.equal(ours.nested.offset, plain.double().mean().float())
    torch.testing.assert_close(ours.nested.absmax, state.state2.absmax, rtol=1e-5, atol=0.0)
    differ = ours.absmax != state.absmax
    assert differ.float().mean() < 0.01
    # Where the codes differ, peft_ext's code is at least as near as bitsandbytes' code.
    plain = plain - state.offset
    scale = state.state2.absmax.repeat_interleave(256)[: plain.numel()]
    near, far = (state.state2.code[c.int()] * scale - plain for c in (ours.absmax, state.absmax))
    assert (near.abs() <= far.abs() * (1 + 1e-5) + 1e-6 * scale).all()


@THEIRS
def test_unquantized_fp4_and_repacked_weights_are_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(64, 64)
    raw = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    with pytest.raises(ValueError, match="from_bitsandbytes: the weight is not quantized yet"):
        peft_ext.NF4Weight.from_bitsandbytes(raw)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="fp4")
    with pytest.raises(ValueError, match="from_bitsandbytes: quant_type is 'fp4', wanted 'nf4'"):
        peft_ext.NF4Weight.from_bitsandbytes(packed, state)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="from_bitsandbytes: bitsandbytes repacked the weight"):
        peft_ext.NF4Weight.from_bitsandbytes(packed, state)


def test_a_state_is_assigned_to_a_layer_without_data():
    held = NF4Linear.from_linear(nn.Linear(128, 64))
    empty = copy.deepcopy(held).to("meta")
    with pytest.warns(UserWarning, match="on the meta device, which holds no data"):
        empty.load_state_dict(held.state_dict())
    state = held.state_dict()
    empty.load_state_dict(state, assign=True)
    x = torch.randn(3, 128)
    assert torch.equal(empty(x), held(x))
    assert empty.weight.data_ptr() == state["weight"].data_ptr() and empty.bias.data_ptr() == state["bias"].data_ptr()


def test_a_dense_state_is_not_passed_over_where_it_need_not_be_whole():
    dense = nn.Linear(128, 64)
    held = NF4Linear.from_linear(nn.Linear(128, 64))
    with pytest.raises(RuntimeError, match="weight comes without weight.absmax"):
        held.load_state_dict(dense.state_dict(), strict=False)
    held.load_state_dict({}, strict=False)


def test_hooks_before_a_state_is_loaded_run():
    held, seen = NF4Linear.from_linear(nn.Linear(128, 64)), []
    held.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: seen.append((module, prefix)))
    held.load_state_dict(held.state_dict())
    assert seen == [(held, "")]
