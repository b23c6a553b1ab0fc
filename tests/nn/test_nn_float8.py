"""Tests Float8Linear: the quantization of the input, the product, the gradients, and the calls of torch._scaled_mm.

The tests run on a CPU, where torch._scaled_mm multiplies with scales of rows. For blocks of 128 x 128, an emulation
that checks the needs of cuBLAS takes the place of torch._scaled_mm.
"""

from __future__ import annotations

import copy
import io
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_ext
from peft_ext.nn import Float8Linear, LoRALinear, PackedLinear, float8
from peft_ext.reference import float8_linear
from peft_ext.reference.float8 import decode_tokens, quantize_tokens, quantized_input
from peft_ext.reference.formats import decoded
from peft_ext.weights.fp8 import fp8, quantize_fp8
from peft_ext.weights.mx import quantize_mxfp4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("weight", "weight_scale")
BLOCKS = ((128, 128), (32, 32), (1, 0), (0, 0), (128, 0))


def scales_of_rows_on_a_cpu() -> bool:
    """Returns whether this PyTorch's torch._scaled_mm multiplies with scales of rows on a CPU."""
    codes = torch.ones(16, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(codes, codes.t(), torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError):
        return False
    return True


ON_CPU = pytest.mark.skipif(not scales_of_rows_on_a_cpu(), reason="needs torch._scaled_mm with rows' scales on a CPU")


def layer_of(
    n: int, k: int, blocks: tuple[int, int], dtype: torch.dtype = torch.bfloat16, bias: bool = True,
    scales: torch.dtype = torch.float32, kind: type = Float8Linear,
) -> Any:  # fmt: skip
    torch.manual_seed(n + k)
    weight = quantize_fp8(torch.randn(n, k) * 0.05, *blocks)
    weight = fp8(weight.parts[0], weight.parts[1].to(scales), blocks)
    return kind.from_packed(weight, NAMES, torch.randn(n, dtype=dtype) if bias else None, dtype=dtype)


# --- the quantization -------------------------------------------------------------------------------------------------


def test_a_token_s_scale_is_its_largest_element_divided_by_448() -> None:
    x = torch.tensor([[448.0, -3.3, 1.0, 0.0, 17.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-2.0, 0.01, 2.0, 1e-7, 1.9]])
    codes, scales = quantize_tokens(x, 0)
    assert torch.equal(scales, torch.tensor([[1.0], [1e-12], [2.0 / 448]]))
    # e4m3 has 4 significant bits, so that -3.3 and 17 lie between -3.25 and -3.5, and between 16 and 18 (a tie).
    assert torch.equal(codes[0].float(), torch.tensor([448.0, -3.25, 1.0, 0.0, 16.0]))
    assert not codes[1].float().any() and torch.equal(codes[2, :1].float(), torch.tensor([-448.0]))
    assert torch.equal(decode_tokens(codes, scales, 0, torch.float32)[0], codes[0].float())


def test_each_block_of_columns_has_a_scale_of_its_own() -> None:
    x = torch.randn(3, 2, 70)
    codes, scales = quantize_tokens(x, 32)
    assert codes.shape == x.shape and scales.shape == (3, 2, 3) and codes.dtype is torch.float8_e4m3fn
    for first in range(0, 70, 32):
        part = x[..., first : first + 32]
        assert torch.equal(scales[..., first // 32], part.abs().amax(-1) / 448)
        alone = quantize_tokens(part, 0)[0]
        assert torch.equal(codes[..., first : first + 32].view(torch.uint8), alone.view(torch.uint8))
    decoded_x = decode_tokens(codes, scales, 32, torch.float32)
    assert torch.equal(decode_tokens(codes, scales, 32, torch.bfloat16), decoded_x.bfloat16())  # rounded once
    error = (decoded_x - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, scales.repeat_interleave(32, -1)[..., :70] / 1024)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(dtype: torch.dtype) -> None:
    layer = layer_of(48, 64, (32, 32), dtype, bias=False)
    x = torch.randn(6, 64, dtype=dtype)
    x[1], x[2, 5], x[3, 40] = 0, float("inf"), float("nan")
    x[4], x[5] = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    y = layer(x)
    assert not y[1].any() and y[2].isnan().all() and y[3].isnan().all()
    assert y[0].isfinite().all() and y[5].isfinite().all()
    torch.testing.assert_close(y[0], layer(x[:1])[0])
    assert torch.equal(quantize_tokens(x[4:5], 0)[0].float(), torch.full((1, 64), 448.0))
    for row, block in ((2, 0), (3, 1)):  # one block of columns decodes to NaN, the other one does not
        assert quantized_input(x[row], 32).isnan().view(2, 32).all(1).tolist() == [block == 0, block == 1]
        assert quantized_input(x[row], 32).isnan().sum() == 32


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("tokens", "n", "k"), [((5,), 48, 64), ((2, 7), 33, 130), ((1,), 1, 1), ((), 40, 48),
                                                ((64,), 128, 512), ((2, 0), 16, 32)])  # fmt: skip
def test_values_and_gradients(dtype: torch.dtype, blocks: tuple[int, int], tokens: tuple, n: int, k: int) -> None:
    layer, packed = (layer_of(n, k, blocks, dtype, kind=kind) for kind in (Float8Linear, PackedLinear))
    layer.bias.requires_grad_()
    x, grad = torch.randn(*tokens, k, dtype=dtype), torch.randn(*tokens, n, dtype=dtype)
    ours, stock = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(ours)
    wanted = float8_linear(x.double(), layer.packed, layer.bias.detach().double())
    y.backward(grad)
    packed(stock).backward(grad)
    assert y.dtype is dtype and y.shape == wanted.shape
    assert torch.equal(ours.grad, stock.grad)  # the gradient of a layer that does not quantize
    assert torch.equal(layer.bias.grad, grad.reshape(-1, n).sum(0))
    if y.numel():
        sums = k**0.5 if dtype is torch.float32 else 2
        assert (y.double() - wanted).abs().max() <= sums * torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_scales_of_every_dtype(scales: torch.dtype) -> None:
    layer = layer_of(48, 64, (32, 32), torch.float32, scales=scales)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x).double(), float8_linear(x.double(), layer.packed, layer.bias.double()))


def test_the_reference_has_the_straight_through_gradient() -> None:
    layer, x = layer_of(48, 64, (32, 32), torch.float32), torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    y, grad = layer(x), torch.randn(5, 48, dtype=torch.float64)
    y.backward(grad)
    weight = decoded(layer.packed, torch.float64)
    torch.testing.assert_close(x.grad, grad @ weight)
    codes, sizes = quantize_tokens(x.detach().float(), 32)
    quantized = codes.double() * sizes.double().repeat_interleave(32, -1)
    torch.testing.assert_close(y.detach(), quantized @ weight.T + layer.bias.double())
    assert (y - F.linear(x, weight, layer.bias.double())).abs().max() > 1e-3  # the input is quantized
    slope = torch.func.grad(lambda x: layer(x).sum())(torch.randn(5, 64))
    torch.testing.assert_close(slope, weight.sum(0).float().expand(5, 64))


def test_autocast_strides_and_refusals() -> None:
    layer = layer_of(48, 64, (32, 32))
    x = torch.randn(64, 6).t().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, layer(x.detach().contiguous().bfloat16())) and y.dtype is torch.bfloat16
    (slope,) = torch.autograd.grad(layer(x).sum(), x, create_graph=False)
    assert slope.shape == x.shape
    with pytest.raises(RuntimeError, match="Float8Linear: the gradient of a gradient"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="Float8Linear: .*63"):
        layer(torch.randn(3, 63))
    with pytest.raises(TypeError, match="Float8Linear: x is"):
        layer(torch.ones(3, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match="Float8Linear: weight has the format mxfp4, wanted fp8"):
        Float8Linear.from_packed(quantize_mxfp4(torch.randn(32, 64)), ("weight_packed", "weight_scale"))
    with pytest.raises(TypeError, match="Float8Linear: weight is Tensor, wanted a PackedWeight"):
        Float8Linear.from_packed(torch.randn(3, 4), NAMES)
    with pytest.raises(TypeError, match="linear is Float8Linear, a subclass of nn.Linear with a forward of its own"):
        LoRALinear.from_linear(layer)


@pytest.mark.parametrize("codes", [False, pytest.param(True, marks=ON_CPU)], ids=["decoded", "scaled_mm"])
def test_compiles_into_one_graph(codes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if codes:  # the trial of a GPU, which torch.compile could not trace
        monkeypatch.setattr(float8, "_tried", lambda device, blocks: float8._trial(device, blocks))
    torch._dynamo.reset()
    layer = layer_of(48, 64, (1, 0), bias=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (4, 6):
        x = torch.randn(2, tokens, 64, dtype=torch.bfloat16)
        ours, eager = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, wanted = compiled(ours), layer(eager)
        y.sum().backward()
        wanted.sum().backward()
        assert torch.equal(y, wanted) and torch.equal(ours.grad, eager.grad)


def test_state_dict_copies_and_dequantize() -> None:
    layer, other = layer_of(48, 64, (32, 32)), layer_of(48, 64, (32, 32), bias=False)
    assert set(layer.state_dict()) == {"bias", *NAMES}
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for same in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(same(x), layer(x)) and same.note == layer.note
    packed = PackedLinear.from_packed(layer.packed, NAMES)
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other.packed.dequantize(), layer.packed.dequantize())
    assert layer.note == "its input is quantized to 8-bit floats (e4m3), with a scale for each token and 32 columns"
    assert layer_of(4, 8, (1, 0)).note.endswith("with a scale for each token")
    model = nn.Sequential(layer)
    (row,) = peft_ext.explain(model).rows
    assert row.kind == "Float8Linear (fp8)" and row.fused
    assert row.reason == f"{layer.note}; its weight is decoded in each call: it is on cpu, wanted an NVIDIA GPU"
    peft_ext.dequantize_packed(model)
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, layer.dequantize())


# --- torch._scaled_mm -------------------------------------------------------------------------------------------------


def strict_scaled_mm(calls: list[str]) -> Any:
    """Returns a function that stands for torch._scaled_mm: checks the documented needs of PyTorch and cuBLAS on CUDA,
    and computes the product in float64."""

    def run(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        (t, k), n = a.shape, b.shape[1]
        assert a.dtype is b.dtype is torch.float8_e4m3fn and out_dtype is torch.bfloat16
        assert a.stride() == (k, 1) and b.stride() == (1, k) and k % 16 == 0 and n % 16 == 0 and t > 0
        assert scale_a.dtype is scale_b.dtype is torch.float32
        if scale_b.shape == (1, n):
            assert scale_a.shape == (t, 1) and scale_a.is_contiguous() and scale_b.is_contiguous()
            calls.append("rows")
        else:
            assert scale_a.shape == (t, k // 128) and scale_b.shape == (k // 128, n // 128)
            assert scale_a.stride(0) == 1 and scale_a.stride(1) == t and t % 4 == 0
            assert scale_b.stride(0) == 1 and scale_b.stride(1) == k // 128 and (k // 128) % 4 == 0 and n % 128 == 0
            scale_a = scale_a.repeat_interleave(128, 1)
            scale_b = scale_b.repeat_interleave(128, 0).repeat_interleave(128, 1)
            calls.append("blocks")
            return ((a.double() * scale_a.double()) @ (b.double() * scale_b.double())).to(out_dtype)
        return ((a.double() @ b.double()) * scale_a.double() * scale_b.double()).to(out_dtype)

    return run


def test_scaled_mm_takes_inputs_of_any_number_of_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "scaled_mm_reason", lambda *_: None)
    calls: list[str] = []
    monkeypatch.setattr(torch, "_scaled_mm", strict_scaled_mm(calls))
    layer = layer_of(32, 64, (1, 0), bias=False)
    for shape in ((64,), (3, 64), (2, 3, 64)):
        x = torch.randn(shape, dtype=torch.bfloat16)
        y, wanted = layer(x), float8_linear(x.double(), layer.packed)
        assert y.shape == wanted.shape
        assert (y.double() - wanted).abs().max() <= 2**-7 * wanted.abs().max()
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("blocks", "real"),
    [
        ((128, 128), False),
        ((1, 0), False),
        ((0, 0), False),
        pytest.param((1, 0), True, marks=ON_CPU),
        pytest.param((0, 0), True, marks=ON_CPU),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_mm_gets_codes_and_scales(
    blocks: tuple[int, int], bias: bool, real: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # real: PyTorch's own torch._scaled_mm runs on the CPU, after the checks of the emulation.
    calls: list[str] = []
    strict, own = strict_scaled_mm(calls), torch._scaled_mm
    monkeypatch.setattr(float8, "scaled_mm_reason", lambda *_: None)

    def scaled_mm(*args: Any, **options: Any) -> Tensor:
        y = strict(*args, **options)
        return own(*args, **options) if real else y

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    layer = layer_of(256, 1024, blocks, bias=bias)
    x, grad = torch.randn(12, 1024, dtype=torch.bfloat16), torch.randn(12, 256, dtype=torch.bfloat16)
    x[2] = 0
    ours = x.mT.contiguous().mT.requires_grad_()  # an input whose columns are not neighbours in memory
    y = layer(ours)
    y.backward(grad)
    given = None if layer.bias is None else layer.bias.double()
    wanted = float8_linear(x.double(), layer.packed, given)
    assert calls == ["blocks" if blocks == (128, 128) else "rows"] and y.shape == wanted.shape
    assert (y.double() - wanted).abs().max() <= 2**-7 * wanted.abs().max()
    monkeypatch.undo()
    stock = x.clone().requires_grad_()
    layer(stock).backward(grad)
    assert torch.equal(ours.grad, stock.grad)


@pytest.mark.parametrize(
    ("tokens", "n", "k", "blocks", "dtype", "called"),
    [
        (8, 128, 512, (128, 128), torch.bfloat16, True),
        (6, 128, 512, (128, 128), torch.bfloat16, False),
        (8, 192, 512, (128, 128), torch.bfloat16, False),
        (8, 128, 640, (128, 128), torch.bfloat16, False),
        (8, 128, 512, (128, 128), torch.float32, False),
        (7, 16, 16, (1, 0), torch.bfloat16, True),
        (7, 24, 16, (1, 0), torch.bfloat16, False),
        (7, 16, 24, (0, 0), torch.bfloat16, False),
        (7, 16, 16, (1, 0), torch.float16, False),
        (0, 16, 16, (1, 0), torch.bfloat16, False),
    ],
)
def test_other_calls_decode_the_weight(
    tokens: int, n: int, k: int, blocks: tuple, dtype: torch.dtype, called: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(float8, "scaled_mm_reason", lambda *_: None)
    monkeypatch.setattr(torch, "_scaled_mm", strict_scaled_mm(calls))
    layer, x = layer_of(n, k, blocks, dtype), torch.randn(tokens, k, dtype=dtype)
    y = layer(x)
    wanted = float8_linear(x.double(), layer.packed, layer.bias.double())
    assert bool(calls) == called and y.shape == wanted.shape and y.dtype is dtype
    if tokens:
        assert (y.double() - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize(
    ("capability", "cuda", "blocks", "wanted"),
    [
        ((8, 0), "12.9", (1, 0), "its GPU has compute capability 8.0 with CUDA 12.9, wanted 8.9 or higher"),
        ((8, 9), "12.6", (1, 0), None),
        ((12, 0), "12.8", (0, 0), None),
        ((9, 0), "12.9", (128, 128), None),
        ((9, 0), "13.0", (128, 128), None),
        ((9, 0), "12.8", (128, 128), "its GPU has compute capability 9.0 with CUDA 12.8, wanted 9.0 and CUDA"),
        (
            (10, 0),
            "13.0",
            (128, 128),
            "its GPU has compute capability 10.0 with CUDA 13.0, wanted 9.0 and CUDA",
        ),
        ((9, 0), "13.0", (64, 64), "torch._scaled_mm has no scaling for blocks of 64 x 64"),
        ((9, 0), "13.0", (1, 128), "torch._scaled_mm has no scaling for blocks of 1 x 128"),
    ],
)
def test_which_gpus_multiply_codes(
    capability: tuple, cuda: str, blocks: tuple, wanted: Optional[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(float8, "_trial", lambda device, blocks: None)
    found = float8._tried.__wrapped__(torch.device("cuda:0"), blocks)
    assert found is None if wanted is None else found.startswith(wanted)

    def fails(*args: Any) -> None:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")

    monkeypatch.setattr(float8, "_trial", lambda *_: str(type(torch.empty(1))))
    with FakeTensorMode():
        found = float8._tried.__wrapped__(torch.device("cuda:0"), blocks)
    assert wanted is not None or found == "<class 'torch.Tensor'>"  # and no fake tensor
    monkeypatch.setattr(float8, "_trial", fails)
    found = float8._tried.__wrapped__(torch.device("cuda:0"), blocks)
    assert wanted is not None or found == "torch._scaled_mm fails: CUBLAS_STATUS_NOT_SUPPORTED"


@pytest.mark.parametrize("blocks", [(128, 128), (1, 0), (0, 0)])
def test_a_trial_finds_a_wrong_product(blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = strict_scaled_mm([]), []
    state = torch.random.get_rng_state()
    monkeypatch.setattr(torch, "_scaled_mm", right)
    for dtype in (torch.float64, torch.float16, torch.float32):  # the trial does not depend on the default dtype
        torch.set_default_dtype(dtype)
        try:
            assert float8._trial(torch.device("cpu"), blocks) is None
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)

    def wrong(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **options: Any) -> Tensor:
        calls.append(1)
        scale_a = scale_a.roll(1, 0).t().contiguous().t() if scale_a.shape[1] > 1 else scale_a.roll(1, 0)
        return right(a, b, scale_a, scale_b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", wrong)
    assert "differs" in float8._trial(torch.device("cpu"), blocks) and calls
