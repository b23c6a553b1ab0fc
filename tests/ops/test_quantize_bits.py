"""Tests that NF4 kernels give the reference's codes and scales to the bit, also for edge cases.

The tests run the kernels of the CPU path in use, the CUDA kernels on a GPU, and the CUDA kernels under the emulator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_kernels import assert_same_bits, kernels
from torch import Tensor

from peft_ext.reference import nf4 as reference
from peft_ext.weights.nf4 import BLOCKSIZES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Numbers of elements below, at and above those of a vector, a quantization block, a warp and a thread block.
COUNTS = (1, 2, 7, 31, 32, 33, 63, 255, 1023, 1024, 1025, 2049, 4095, 4096, 4097, 8191, 8192, 8193, 2 * 8192 + 4333)


@pytest.fixture(scope="module", params=["cpu", "cuda", pytest.param("emulated", marks=pytest.mark.slow)])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    if request.param == "emulated" and request.config.getoption("--device") == "cuda":
        pytest.skip("--device cuda: the kernels run on the GPU")
    return kernels(request.param)


# --- nf4_quantize -----------------------------------------------------------------------------------------------------


def thresholds() -> Tensor:
    code = reference.nf4_code()
    return (code[:-1] + code[1:]) / 2


def weight(numel: int, blocksize: int, dtype: torch.dtype) -> Tensor:
    """Returns blocks of random numbers with scales from 2^-30 to 2^9.

    Every fifth block is zero, and every fifth block is so small that its scale is clamped.
    """
    blocks = -(-numel // blocksize)
    scale = torch.randint(-30, 10, (blocks, 1)).double().exp2()
    scale[::5] = 0
    scale[1::5] = 2.0**-140
    return (torch.randn(blocks, blocksize, dtype=torch.float64) * scale).view(-1)[:numel].to(dtype)


def check_quantize(call: Callable, value: Tensor, blocksize: int) -> None:
    packed, absmax = call("nf4_quantize", value, blocksize)
    want_packed, want_absmax = reference.quantize(value, blocksize)
    assert_same_bits(absmax, want_absmax)
    assert_same_bits(packed, want_packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize_has_the_bits_of_the_reference(call, blocksize, dtype):
    for numel in COUNTS:
        check_quantize(call, weight(numel, blocksize, dtype), blocksize)


@pytest.mark.parametrize("tail", [0, 45])
def test_quantize_every_threshold_and_its_neighbours(call, tail):
    """Tests each threshold, where a tie takes the lower code, and its neighbours, in a full and in a tail block.

    The kernels multiply a full block by the scale's reciprocal, and divide a tail block by the scale.
    """
    at = thresholds()
    up, down = (torch.nextafter(at, torch.full_like(at, way)) for way in (2.0, -2.0))
    edges = torch.cat([at, up, down, torch.tensor([1.0, -1.0, 0.0, -0.0, 1e-45, -1e-45])])
    for scale in (1.0, 2.0**100, 2.0**-100):
        flat = torch.cat([edges, torch.zeros(64 - len(edges)), edges[:tail], edges[-6:]])
        check_quantize(call, flat * scale, 64)


def test_quantize_multiplies_a_full_block_and_divides_the_tail(call):
    """For values within an ulp of a threshold times the scale, multiplication and division give different codes."""
    differ = 0
    for _ in range(40):
        scale = torch.rand(1) + 1.0
        near = (thresholds() * scale).view(torch.int32) + torch.randint(-1, 2, (15,), dtype=torch.int32)
        near = torch.cat([near.view(torch.float32), scale, torch.zeros(16)])
        # A full block of 32 values, and a tail block of the first 31 of these values.
        check_quantize(call, torch.cat([near, near[:-1]]), 32)
        (full, _), (tail, _) = reference.quantize(near, 32), reference.quantize(near[:-2], 32)
        differ += (full[:15] != tail).sum().item()
    assert differ > 0, "the values say nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_quantize_every_value_of_a_16_bit_type(call, dtype):
    """Quantizes every value up to 1 in blocks with scale 1 (31 values and a one), and all finite values in order."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    small = every[every.abs() <= 1]
    small = torch.cat([small, small.new_zeros(-len(small) % 31)]).view(-1, 31)
    check_quantize(call, torch.cat([small, torch.ones_like(small[:, :1])], 1).flatten(), 32)
    check_quantize(call, every[every.isfinite()], 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_nan_and_infinity(call, dtype):
    for blocksize in (32, 256, 2048):
        value = torch.randn(9 * blocksize + 5).to(dtype)
        value[3] = value[2 * blocksize - 1] = float("nan")
        value[4 * blocksize + 7] = float("inf")
        value[5 * blocksize] = float("-inf")
        value[7 * blocksize + 1], value[7 * blocksize + 30] = float("nan"), float("inf")
        for last in (0.5, float("nan"), float("inf")):  # the last element of the tail block
            value[-1] = last
            check_quantize(call, value, blocksize)


def test_quantize_largest_and_smallest_floats(call):
    info = torch.finfo(torch.float32)
    for scale in (info.max, info.tiny, 1e-38, 1.1e-38, 2.0**-149, 9e-39):
        value = torch.linspace(-1, 1, 3 * 64 + 9) * scale
        check_quantize(call, value, 64)


def test_quantize_where_memory_is_not_dense_or_aligned(call):
    wide = torch.randn(70, 97).bfloat16()
    for value in (wide.t(), wide[:, ::2], wide.flatten()[1:], wide[:, 3:50], wide[5:].view(5, 13, 97)):
        check_quantize(call, value, 64)


def test_quantize_of_nothing(call):
    packed, absmax = call("nf4_quantize", torch.zeros(0, 8), 64)
    assert packed.shape == (0, 1) and packed.dtype == torch.uint8
    assert absmax.shape == (0,) and absmax.dtype == torch.float32


# --- nf4_quantize_absmax ----------------------------------------------------------------------------------------------


def check_quantize_absmax(call: Callable, centred: Tensor) -> None:
    code = reference.dynamic_code()
    codes, absmax = call("nf4_quantize_absmax", centred, code)
    want_codes, want_absmax = reference.quantize_absmax(centred, code)
    assert_same_bits(absmax, want_absmax)
    assert_same_bits(codes, want_codes)


def test_quantize_absmax_has_the_bits_of_the_reference(call):
    for numel in (1, 3, 4, 127, 128, 255, 256, 257, 2047, 2048, 2049, 5000):
        centred = torch.randn(numel) * torch.randn(numel).exp()
        centred[256:512] = 0.0
        check_quantize_absmax(call, centred)


def test_quantize_absmax_every_threshold_and_its_neighbours(call):
    code = reference.dynamic_code()
    at = (code[:-1] + code[1:]) / 2
    for value in (at, torch.nextafter(at, torch.full_like(at, 2.0)), torch.nextafter(at, torch.full_like(at, -2.0))):
        check_quantize_absmax(call, torch.cat([value, torch.ones(1)]))


def test_quantize_absmax_nan_infinity_and_the_smallest(call):
    centred = torch.randn(5 * 256 + 3)
    centred[7], centred[300], centred[-1] = float("nan"), float("inf"), float("nan")
    centred[512:768] *= 2.0**-130
    check_quantize_absmax(call, centred)


def test_quantize_absmax_where_memory_is_not_dense_or_aligned(call):
    check_quantize_absmax(call, torch.randn(1600)[::2])
    check_quantize_absmax(call, torch.randn(1600)[1:])


def test_quantize_absmax_of_nothing(call):
    codes, absmax = call("nf4_quantize_absmax", torch.zeros(0), reference.dynamic_code())
    assert codes.shape == absmax.shape == (0,) and codes.dtype == torch.uint8


# --- nf4_scale_mean, which has no CUDA kernel -------------------------------------------------------------------------


def mean(absmax: Tensor) -> Tensor:
    """Returns the mean by the operator, and asserts that it has the reference's bits."""
    found = torch.ops.peft_ext.nf4_scale_mean(absmax)
    assert_same_bits(found, reference.scale_mean(absmax))
    return found


@pytest.mark.parametrize("count", [1, 255, 256, 8191, 8192, 8193, 100_003])
def test_the_mean_of_the_scales_has_no_order(count: int, device: torch.device) -> None:
    """The mean is the offset of double quantization: one other bit of the mean would change every weight."""
    absmax = (torch.rand(count) * 0.7).to(device)
    found = mean(absmax)
    assert found.shape == () and found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), absmax.cpu().double().mean(), rtol=2.0**-24, atol=0)
    threads = torch.get_num_threads()
    try:
        for changed in (1, 2, 3, 7):
            torch.set_num_threads(changed)
            assert torch.equal(mean(absmax.flip(0)), found)
    finally:
        torch.set_num_threads(threads)


def test_the_mean_of_odd_scales() -> None:
    infinite, unknown, tiny = (mean(torch.tensor([1.0, value])) for value in (float("inf"), float("nan"), 1e-45))
    assert infinite == float("inf") and unknown.isnan() and tiny == 0.5
    assert mean(torch.zeros(3)) == mean(torch.zeros(0)) == 0
    for value in (3e38, 1e-45, 2.0**-126, 1.0):
        assert_same_bits(mean(torch.full((3,), value)), torch.tensor(value))
    mean(torch.rand(64, 50).t()[::2])
    # A million scales of 1.5 times 2^-40 beside a 1: a sum in a coarser unit would lose the small scales.
    many = torch.full((1 << 20,), 1.5 * 2.0**-40)
    many[0] = 1.0
    assert mean(many) > 2.0**-20
    for power in (-140, -60, 60, 120):
        mean(torch.rand(20_000) * 2.0**power)
