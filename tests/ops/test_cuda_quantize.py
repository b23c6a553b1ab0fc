"""Tests the CUDA kernels of NF4's merge and the errors of quantize, on a GPU and under the emulator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from cuda_kernels import assert_same_bits, kernels
from torch import Tensor

from peft_ext import _native, ops
from peft_ext.ops.library import has_kernel
from peft_ext.reference import nf4 as reference
from peft_ext.weights.nf4 import BLOCKSIZES

pytestmark = pytest.mark.slow

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# --- nf4_quantize; its bits are in test_quantize_bits.py --------------------------------------------------------------


def test_quantize_refuses(cuda_call):
    with pytest.raises(RuntimeError, match="nf4_quantize: weight is Int, wanted Float, BFloat16, Half or Double"):
        cuda_call("nf4_quantize", torch.zeros(64, dtype=torch.int32), 64)
    for blocksize in (16, 48, 8192, 0, -64):
        with pytest.raises(RuntimeError, match=f"nf4_quantize: blocksize is {blocksize}, wanted a power of two"):
            cuda_call("nf4_quantize", torch.zeros(64), blocksize)


def test_quantize_absmax_refuses(cuda_call):
    code = reference.dynamic_code()
    with pytest.raises(RuntimeError, match="nf4_quantize_absmax: centred is Half, wanted Float"):
        cuda_call("nf4_quantize_absmax", torch.zeros(8).half(), code)
    with pytest.raises(
        RuntimeError, match="nf4_quantize_absmax: code is Float with 16 elements, wanted Float with 256"
    ):
        cuda_call("nf4_quantize_absmax", torch.zeros(8), code[:16])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_public_function_takes_the_kernels(double_quant):
    value = torch.randn(96, 80, device="cuda")
    got = ops.nf4_quantize(value, 64, double_quant).tensors()
    for name, want in reference.nf4_quantize(value, 64, double_quant).tensors().items():
        assert torch.equal(got[name], want), name


# --- nf4_dequantize_merged --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["reference", "cuda", "emulated"])
def merge(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """Returns the operator: on the CPU, where the reference runs, or the CUDA kernel."""
    if request.param == "reference":
        return torch.ops.peft_ext.nf4_dequantize_merged
    if request.param == "emulated" and request.config.getoption("--device") == "cuda":
        pytest.skip("--device cuda: the kernels run on the GPU")
    return functools.partial(kernels(request.param), "nf4_dequantize_merged")


def merge_args(
    n: int, k: int, r: int, *, blocksize: int = 64, nested: bool = False, scaled: bool = False, scaling: float = 0.75
) -> tuple:
    nf4 = reference.nf4_quantize(torch.randn(n, k) * 0.05, blocksize, nested)
    row_scale = torch.rand(n) + 0.5 if scaled else None
    return (*nf4.op_args(), torch.randn(r, k), torch.randn(n, r) * 0.1, row_scale, scaling)


def check_merge(got: Tensor, args: tuple, dtype: torch.dtype) -> None:
    """Compares with float64.

    The bound is half an ulp of ``dtype``, plus float32 rounding of R products and three steps.
    """
    *held, lora_A, lora_B, row_scale, scaling = args
    base = reference.dequantize(*held, torch.float64)
    g = 1.0 if row_scale is None else row_scale.double()[:, None]
    want = g * (base + scaling * (lora_B.double() @ lora_A.double()))
    sizes = g * (base.abs() + abs(scaling) * (lora_B.double().abs() @ lora_A.double().abs()))
    assert got.dtype == dtype and got.shape == want.shape
    rounding = torch.finfo(dtype).eps if dtype != torch.float64 else torch.finfo(torch.float32).eps
    terms = lora_A.shape[0] + 4
    bound = rounding / 2 * want.abs() + terms * torch.finfo(torch.float32).eps * sizes
    if dtype == torch.float16:
        bound = bound + 2.0**-25  # the rounding of subnormal float16 numbers
    worst = ((got.double() - want).abs() / bound.clamp(min=1e-300)).amax().item() if got.numel() else 0.0
    assert worst <= 1.01, f"{worst} of the bound"


SHAPES = (
    (1, 1, 1), (3, 5, 2), (64, 128, 16), (65, 129, 17), (70, 132, 33), (33, 260, 64), (2, 1028, 512), (3, 1027, 130),
    (130, 36, 8), (64, 127, 15), (1, 640, 3),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("nested", "scaled"), [(False, False), (True, True)], ids=["plain", "nested-scaled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merged_is_within_rounding_of_float64(merge, shape, nested, scaled, dtype):
    args = merge_args(*shape, nested=nested, scaled=scaled)
    check_merge(merge(*args, dtype), args, dtype)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("k", [260, 259])
def test_merged_at_every_blocksize(merge, k, blocksize):
    args = merge_args(33, k, 4, blocksize=blocksize, nested=True)
    check_merge(merge(*args, torch.float32), args, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [132, 131])
def test_merged_of_a_zero_adapter_has_the_bits_of_dequantize(merge, k, dtype):
    *held, lora_A, lora_B, _, scaling = merge_args(70, k, 5, nested=True)
    got = merge(*held, lora_A, torch.zeros_like(lora_B), None, scaling, dtype)
    assert_same_bits(got, reference.dequantize(*held, dtype))


@pytest.mark.parametrize("k", [132, 131])
def test_merged_rounds_the_sum_once_where_products_are_exact(merge, k):
    """With small integers and a scaling of a half only the sum with the weight is rounded."""
    *held, _, _, _, _ = merge_args(70, k, 1)
    lora_A, lora_B = torch.randint(-4, 5, (40, k)).float(), torch.randint(-4, 5, (70, 40)).float()
    got = merge(*held, lora_A, lora_B, None, 0.5, torch.float32)
    want = reference.dequantize(*held, torch.float64) + 0.5 * (lora_B.double() @ lora_A.double())
    assert_same_bits(got, want.float())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_merged_takes_adapters_of_any_float_type_that_lie_anyhow(merge, dtype):
    *held, lora_A, lora_B, row_scale, scaling = merge_args(70, 132, 6, scaled=True)
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    dense = merge(*held, lora_A, lora_B, row_scale, scaling, torch.float32)
    check_merge(dense, (*held, lora_A, lora_B, row_scale, scaling), torch.float32)
    shifted = torch.cat([lora_A.new_zeros(1), lora_A.flatten()])[1:].view(lora_A.shape)
    got = merge(*held, shifted, lora_B.t().contiguous().t(), row_scale.double(), scaling,
                torch.float32)  # fmt: skip
    assert torch.equal(got, dense)


@pytest.mark.parametrize("shape", [(0, 8), (5, 0)], ids=str)
def test_merged_of_nothing(merge, shape):
    n, k = shape
    empty = torch.zeros(0, 1, dtype=torch.uint8), torch.zeros(0), None, None, None, 64, [n, k]
    got = merge(*empty, torch.zeros(2, k), torch.zeros(n, 2), None, 1.0, torch.bfloat16)
    assert got.shape == shape and got.dtype == torch.bfloat16


def test_merged_refuses(cuda_call):
    names = [argument.name for argument in torch.ops.peft_ext.nf4_dequantize_merged.default._schema.arguments]
    good = dict(zip(names, (*merge_args(6, 64, 4), torch.bfloat16), strict=True))
    nested = dict(zip(names, (*merge_args(6, 64, 4, nested=True), torch.bfloat16), strict=True))

    def refuses(message: str, kind: Optional[dict] = None, **wrong: Any) -> None:
        with pytest.raises(RuntimeError, match=f"nf4_dequantize_merged: {message}"):
            cuda_call("nf4_dequantize_merged", *{**(kind or good), **wrong}.values())

    refuses("absmax is None, wanted the scales", part1=None)
    refuses("absmax is Float with 5 elements, wanted Float with 6", part1=torch.zeros(5))
    refuses("weight is Char with 192 elements, wanted Byte with 192", weight=torch.zeros(192, dtype=torch.int8))
    refuses("blocksize is 48, wanted a power of two", layout=48)
    refuses(r"shape has 1 dimensions, wanted \[N, K\]", shape=[384])
    refuses("dtype is Int, wanted Float", dtype=torch.int32)
    refuses("of nested_absmax, nested_code and nested_offset some are None", kind=nested, part3=None)
    refuses("nested_code is Float with 16 elements, wanted Float with 256", kind=nested, part3=torch.zeros(16))
    refuses(r"lora_A has shape \[4, 63\], wanted \[R, 64\]", lora_A=torch.zeros(4, 63))
    refuses(r"lora_B has shape \[4, 5\], wanted \[6, R\]", lora_B=torch.zeros(4, 5))
    refuses("lora_B has rank 5, lora_A has rank 4", lora_B=torch.zeros(6, 5))
    refuses("lora_A has rank 0, wanted at least 1", lora_A=torch.zeros(0, 64), lora_B=torch.zeros(6, 0))
    refuses("lora_A is Int, wanted Float", lora_A=torch.zeros(4, 64, dtype=torch.int32))
    refuses(r"row_scale has shape \[6, 1\], wanted \[6\]", row_scale=torch.zeros(6, 1))


@pytest.mark.parametrize("scaled", [False, True])
def test_opcheck_of_the_merge(scaled):
    args = merge_args(6, 64, 4, nested=True, scaled=scaled)
    torch.library.opcheck(torch.ops.peft_ext.nf4_dequantize_merged.default, (*args, torch.bfloat16))


@pytest.mark.skipif(not _native.STATE.cuda_loaded, reason="the CUDA library is not loaded")
def test_kernels_are_registered():
    for name in ("nf4_quantize", "nf4_quantize_absmax", "nf4_dequantize_merged"):
        assert has_kernel(name, "CUDA")
