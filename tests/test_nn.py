"""The modules: state, round trips, merging. Their arithmetic is the ops' and is tested there."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import peft_ext
from peft_ext import ops
from peft_ext.nn import LoRALinear, NF4Linear

DOUBLE = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
BASE = pytest.mark.parametrize("base", ["dense", "nf4"])


def make_lora(base: str, dtype: torch.dtype = torch.float32, **kwargs) -> LoRALinear:
    linear = nn.Linear(65, 33, dtype=dtype)
    if base == "nf4":
        linear = NF4Linear.from_linear(linear)
    module = LoRALinear.from_linear(linear, r=4, **kwargs)
    nn.init.normal_(module.lora_B)
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
    fresh = NF4Linear(65, 33, double_quant=not double_quant)  # the file decides
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(3, 65)
    assert torch.equal(fresh(x), module(x))
    assert fresh.nf4.tensors().keys() == module.nf4.tensors().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.nf4.tensors().values(), module.nf4.tensors().values(), strict=True)
    )


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


def test_casting_keeps_codes_and_scales() -> None:
    module = NF4Linear.from_linear(nn.Linear(64, 32), double_quant=False)
    before = {k: v.clone() for k, v in module.nf4.tensors().items()}
    module.half()
    assert module.bias.dtype == torch.float16
    for name, tensor in module.nf4.tensors().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert module(torch.randn(2, 64, dtype=torch.float16)).dtype == torch.float16


def test_eval_then_train_then_save_is_bit_identical() -> None:
    """bitsandbytes' layer repacks itself in eval; this one must not."""
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
def test_meta_construction_and_materialization(double_quant: bool) -> None:
    module = NF4Linear(64, 32, double_quant=double_quant, device="meta")
    assert all(t.is_meta for t in module.nf4.tensors().values())
    source = NF4Linear.from_linear(nn.Linear(64, 32), double_quant=double_quant)
    module.to_empty(device="cpu")
    module.load_state_dict(source.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(module(x), source(x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@BASE
def test_copies_are_independent(base: str, clone) -> None:
    module = make_lora(base)
    twin = clone(module)
    x = torch.randn(3, 65)
    assert torch.equal(twin(x), module(x))
    with torch.no_grad():
        twin.lora_B.add_(1.0)
    assert not torch.equal(twin(x), module(x))


@BASE
def test_lora_linear_starts_as_its_base_and_trains_its_adapter_alone(base: str) -> None:
    linear = nn.Linear(65, 33)
    linear = NF4Linear.from_linear(linear) if base == "nf4" else linear
    module = LoRALinear.from_linear(linear, r=4, lora_dropout=0.5)
    x = torch.randn(3, 65)
    torch.testing.assert_close(module(x), linear(x), rtol=1e-6, atol=1e-6)
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    module(x).sum().backward()
    assert module.lora_B.grad.abs().sum() > 0
    assert all(p.grad is None for p in module.base_layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@BASE
def test_merge_and_exact_unmerge(base: str, dtype: torch.dtype) -> None:
    module = make_lora(base, dtype).eval()
    x = torch.randn(5, 65, dtype=dtype)
    before, bits = module(x), {k: v.clone() for k, v in module.state_dict().items()}
    module.merge()
    module.merge()  # a second time changes nothing
    assert module.merged and "merged=True" in repr(module)
    merged = module(x)
    # A merge rounds the weight once; into NF4 it costs a quantization error.
    bound = 0.2 if base == "nf4" else 20 * torch.finfo(dtype).eps
    assert (merged - before).norm() <= bound * before.norm()
    module.unmerge()
    module.unmerge()
    assert torch.equal(module(x), before)
    assert all(torch.equal(value, bits[key]) for key, value in module.state_dict().items())


def test_scaling_rule_and_bad_arguments() -> None:
    assert LoRALinear(8, 8, r=4, lora_alpha=16).scaling == 4.0
    assert LoRALinear(8, 8, r=4, lora_alpha=16, use_rslora=True).scaling == 8.0
    with pytest.raises(ValueError, match="LoRALinear: r is 0, wanted at least 1"):
        LoRALinear(8, 8, r=0)
    with pytest.raises(ValueError, match=r"LoRALinear: lora_dropout is 1.0, wanted 0 <= p < 1"):
        LoRALinear(8, 8, lora_dropout=1.0)


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


def test_bits_are_bitsandbytes() -> None:
    """Real weights' shapes and dtypes, full and tail blocks, against bitsandbytes itself."""
    bnb = pytest.importorskip("bitsandbytes")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((64, 64), (33, 65), (7, 31), (1, 1), (576, 1536)):
            for blocksize in (64, 32, 4096):
                weight = torch.randn(shape).to(dtype)
                ours = ops.nf4_quantize(weight, blocksize)
                packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=blocksize)
                assert torch.equal(ours.packed, packed) and torch.equal(ours.absmax, state.absmax)


def test_double_quantization_against_bitsandbytes() -> None:
    """Map, scales and offset have its bits; its CPU's 8-bit codes miss the nearest for about 0.2% of the scales."""
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(576, 1536)
    ours = ops.nf4_quantize(weight, 64, double_quant=True)
    _, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.nested.code, state.state2.code)
    assert torch.equal(ours.nested.absmax, state.state2.absmax)
    assert torch.equal(ours.nested.offset, state.offset)
    differ = ours.absmax != state.absmax
    assert differ.float().mean() < 0.01
    # Where the codes differ, ours is at least as near.
    plain = ops.nf4_quantize(weight, 64).absmax - state.offset
    scale = state.state2.absmax.repeat_interleave(256)[: plain.numel()]
    near, far = (state.state2.code[c.int()] * scale - plain for c in (ours.absmax, state.absmax))
    assert (near.abs() <= far.abs() * (1 + 1e-5)).all()


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
