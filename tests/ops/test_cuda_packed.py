"""Tests the CUDA kernels of packed weights in formats other than NF4, on a GPU and under the emulator.

The decoded weights have the bits of the reference's decoders. Every operator on a packed weight gives the result that
the operator gives on the decoded weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Optional

import packed_weights
import pytest
import torch
import torch.nn.functional as F
from packed_weights import KINDS, packed_weight
from torch import Tensor

from peft_ext.reference.formats import decoded
from peft_ext.reference.nf4 import merged_of
from peft_ext.weights.packed import PackedWeight

pytestmark = pytest.mark.slow

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, K), before both are rounded to the multiples that a packed format needs: fewer values than a load of 16 bytes,
# than a warp or than a thread block takes; several thread blocks in both dimensions; rows and columns that end in the
# middle of a thread block.
SHAPES = [(1, 1), (3, 7), (7, 33), (8, 130), (9, 512), (17, 1025), (130, 96), (5, 2050)]
SCALING = 0.75


def drawn(kind: str, n: int, k: int, *, wild: bool = False) -> PackedWeight:
    n, k = packed_weights.fitting(kind, n, k)
    return packed_weight(kind, n, k, torch.Generator().manual_seed(131 * n + k), wild=wild)


def dense_args(weight: PackedWeight, dtype: torch.dtype) -> tuple:
    dense = decoded(weight, dtype).contiguous()
    return (dense, None, None, None, None, 0, list(dense.shape))


def assert_bits(got: Tensor, want: Tensor) -> None:
    """Asserts that dtypes, shapes and bits are equal. All NaNs count as equal."""
    assert got.dtype == want.dtype and got.shape == want.shape
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[want.element_size()]
    nan = want.isnan()
    wrong = (got.isnan() != nan) | (~nan & (got.contiguous().view(kind) != want.contiguous().view(kind)))
    assert not wrong.any(), f"{wrong.sum().item()} of {want.numel()} elements differ"


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_the_reference_s(cuda_call: Callable[..., Any], kind: str, shape: tuple, dtype: torch.dtype) -> None:
    for wild in (False, True):
        weight = drawn(kind, *shape, wild=wild)
        assert_bits(cuda_call("nf4_dequantize", *weight.op_args(), dtype), decoded(weight, dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_at_any_address_and_with_any_strides(cuda_call: Callable[..., Any], kind: str) -> None:
    weight = drawn(kind, 12, 160)
    want = decoded(weight, torch.bfloat16)
    for move in (packed_weights.shifted, lambda part: part.t().contiguous().t() if part.dim() == 2 else part):
        moved = weight.map(move)
        assert_bits(cuda_call("nf4_dequantize", *moved.op_args(), torch.bfloat16), want)
        x = torch.randn(2, weight.shape[1]).bfloat16()
        assert torch.equal(cuda_call("nf4_linear", x, *moved.op_args(), None),
                           cuda_call("nf4_linear", x, *weight.op_args(), None))  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 64), (8, 0)], ids=str)
def test_a_weight_without_elements(cuda_call: Callable[..., Any], shape: tuple) -> None:
    weight = packed_weight("mxfp4", *shape, torch.Generator())
    assert cuda_call("nf4_dequantize", *weight.op_args(), torch.float16).shape == shape


# --- few tokens -------------------------------------------------------------------------------------------------------


def check_few(
    cuda_call: Callable[..., Any], weight: PackedWeight, tokens: int, dtype: torch.dtype, adapted: bool
) -> None:
    """Compares with float64. The bound is 1.5 times the error of plain PyTorch on the decoded weight, the rounding of
    the result, and of a float32 sum."""
    n, k = weight.shape
    generator = torch.Generator().manual_seed(n + tokens)
    draw = functools.partial(torch.randn, generator=generator)
    exact, x = decoded(weight, torch.float64), draw(tokens, k).to(dtype)
    a, b, bias = draw(5, k) / 8, (draw(n, 5) / 8).to(dtype), draw(n).to(dtype)
    rho = draw(5)
    want = x.double() @ exact.T
    if adapted:
        y, s = cuda_call("lora_linear", x, *weight.op_args(), bias, a, b, rho, SCALING, 0.0, None)
        want_s = x.double() @ a.double().T
        assert (s.double() - want_s).abs().max() <= 2.0**-22 * want_s.abs().max() * k**0.5
        want = want + SCALING * (want_s * rho.double()) @ b.double().T + bias.double()
    else:
        y = cuda_call("nf4_linear", x, *weight.op_args(), None)
    plain = F.linear(x, decoded(weight, dtype)).double() - F.linear(x.double(), exact)
    error, rounding = (y.double() - want).abs(), torch.finfo(dtype).eps / 2 * want.abs()
    sums = 2.0**-24 * (8 + k**0.5) * (x.double().abs() @ exact.abs().T).max()
    assert y.dtype == dtype
    assert error.max() <= 1.5 * plain.abs().max() + 2 * rounding.max() + sums, (tokens, adapted)
    assert error.norm() <= 1.5 * plain.norm() + rounding.norm() + sums * error.numel() ** 0.5, (tokens, adapted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 39), (33, 64), (6, 1024), (130, 1088), (8, 4171)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens(cuda_call: Callable[..., Any], kind: str, shape: tuple, dtype: torch.dtype) -> None:
    weight = drawn(kind, *shape)
    for tokens in (1, 2, 4, 5, 8, 9):
        check_few(cuda_call, weight, tokens, dtype, adapted=tokens % 2 == 0)


def test_few_tokens_do_not_depend_on_the_other_tokens(cuda_call: Callable[..., Any]) -> None:
    weight = drawn("mxfp4", 37, 1056)
    x = torch.randn(8, 1056).bfloat16()
    every = cuda_call("nf4_linear", x, *weight.op_args(), None)
    for tokens in (1, 3, 4, 7):
        assert torch.equal(cuda_call("nf4_linear", x[:tokens], *weight.op_args(), None), every[:tokens]), tokens
    x[2, 5] = float("nan")
    assert torch.equal(cuda_call("nf4_linear", x, *weight.op_args(), None).isnan().all(1), torch.arange(8) == 2)


def test_a_nan_in_the_weight_leaves_other_outputs_alone(cuda_call: Callable[..., Any]) -> None:
    weight = drawn("fp8", 40, 256)
    weight.parts[0].view(torch.uint8)[17, 77] = 0x7F  # NaN in fp8
    for tokens in (4, 20):
        nan = cuda_call("nf4_linear", torch.randn(tokens, 256).bfloat16(), *weight.op_args(), None).isnan()
        assert nan[:, 17].all() and nan.sum() == tokens


def test_few_tokens_of_a_mixed_batch(cuda_call: Callable[..., Any]) -> None:
    weight, dtype = drawn("mxfp4", 43, 96), torch.bfloat16
    generator = torch.Generator().manual_seed(5)
    draw = functools.partial(torch.randn, generator=generator)
    lora_A, lora_B = [draw(r, 96) / 8 for r in (3, 16)], [draw(43, r) / 8 for r in (3, 16)]
    x, bias, adapters, scaling = draw(6, 1, 96).to(dtype), draw(43).to(dtype), [1, -1, 0, 0, 1, -1], [0.5, 2.0]
    y, s = cuda_call("grouped_lora_linear", x, *weight.op_args(), bias, lora_A, lora_B, scaling, adapters)
    want = F.linear(x.double(), decoded(weight, torch.float64), bias.double())
    for i, g in enumerate(adapters):
        if g >= 0:
            want[i] += scaling[g] * x[i].double() @ lora_A[g].double().T @ lora_B[g].double().T
    assert s.shape == (6, 16)
    torch.testing.assert_close(y.double(), want, rtol=2.0**-8, atol=2.0**-8 * want.abs().max().item() / 8)


# --- operators on a packed weight -------------------------------------------------------------------------------------


def both(cuda_call: Callable[..., Any], weight: PackedWeight, dtype: torch.dtype, name: str, before: list,
         after: list) -> tuple[Any, Any]:  # fmt: skip
    """Returns an operator's result on the packed weight, and on the decoded weight."""
    return (cuda_call(name, *before, *weight.op_args(), *after),
            cuda_call(name, *before, *dense_args(weight, dtype), *after))  # fmt: skip


def assert_equal(got: Any, want: Any) -> None:
    for one, other in zip(*((r,) if isinstance(r, Tensor) else r for r in (got, want)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_the_decoded_weight(cuda_call: Callable[..., Any], kind: str, dtype: torch.dtype) -> None:
    weight = drawn(kind, 72, 160)
    n, k = weight.shape
    tokens, r = 70, 8
    x, grad, bias = torch.randn(tokens, k).to(dtype), torch.randn(tokens, n).to(dtype), torch.randn(n).to(dtype)
    a, b = torch.randn(r, k) / 8, torch.randn(n, r) / 8
    seed = torch.tensor([77, 5])
    run = functools.partial(both, cuda_call, weight, dtype)
    (y, s), want = run("lora_linear", [x], [bias, a, b, None, SCALING, 0.1, seed])
    assert_equal((y, s), want)
    exact = F.linear(x.double(), decoded(weight, torch.float64), bias.double())
    assert (y.double() - exact).norm() < exact.norm()
    assert_equal(*run("lora_linear_backward", [grad, x], [a, b, None, s, SCALING, 0.1, seed, True]))
    assert_equal(*run("nf4_linear_backward", [grad], []))
    assert_equal(*run("grouped_lora_linear", [x], [bias, [a], [b], [SCALING], [0, -1]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [3, 150])
def test_output_scales(cuda_call: Callable[..., Any], tokens: int, dtype: torch.dtype) -> None:
    """DoRA and (IA)³ may scale the weight before the weight is rounded, and so the bits may differ from those on the
    decoded weight."""
    weight = drawn("mxfp4", 72, 128)
    n, k = weight.shape
    x, grad, g = torch.randn(tokens, k).to(dtype), torch.randn(tokens, n).to(dtype), torch.rand(n) + 0.5
    a, b = torch.randn(4, k) / 8, torch.randn(n, 4) / 8
    run = functools.partial(both, cuda_call, weight, dtype)

    def near(got: Any, want: Any) -> None:
        for one, other in zip(got, want, strict=True):
            bound = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 2.0**-18
            assert one.dtype == other.dtype and one.shape == other.shape
            assert (one.double() - other.double()).norm() <= bound * max(other.double().norm(), 1e-30)

    for want_z in (False, True):
        near(*run("dora_linear", [x], [None, a, b, g, SCALING, 0.0, None, False, want_z]))
        near(*run("ia3_linear", [x], [None, g, False, want_z]))
    y, s, z = cuda_call("dora_linear", x, *weight.op_args(), None, a, b, g, SCALING, 0.0, None, False, True)
    near(*run("dora_linear_backward", [grad, x], [a, b, g, s, z, False, SCALING, 0.0, None, False, True, True]))
    near(*run("ia3_linear_backward", [grad, x], [None, g, z, False, False, True, True]))
    length = torch.rand(k) + 0.5
    near(*run("ia3_linear", [x], [None, length, True, False]))
    seed = torch.tensor([7, 1])
    near(*run("dora_linear", [x], [None, a, b, g, SCALING, 0.25, seed, True, True]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_rows(cuda_call: Callable[..., Any], dtype: torch.dtype, kind: str) -> None:
    weight = drawn(kind, 70, 96)
    n, k = weight.shape
    a, b, grad = torch.randn(6, k) / 8, torch.randn(n, 6) / 8, torch.randn(n)
    run = functools.partial(both, cuda_call, weight, dtype)
    (norm, u), want = run("dora_weight_norm", [], [a, b, SCALING, dtype])
    assert_equal((norm, u), want)
    exact = (decoded(weight, torch.float64) + SCALING * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(norm.double(), exact, rtol=2.0**-7, atol=0)
    assert_equal(*run("dora_weight_norm_backward", [grad], [a, b, norm, u, SCALING, dtype]))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_one_input(cuda_call: Callable[..., Any], kind: str) -> None:
    weights = [drawn(kind, n, 96) for n in (24, 40)]
    k, dtype = weights[0].shape[1], torch.bfloat16
    x, a = torch.randn(20, k).to(dtype), torch.randn(4, k) / 8
    b = [torch.randn(weight.shape[0], 4) / 8 for weight in weights]
    grads = [torch.randn(20, weight.shape[0]).to(dtype) for weight in weights]

    def lists(packed: bool) -> tuple[list, list, list]:
        tensors, sizes = [], []
        for weight, lora_B in zip(weights, b, strict=True):
            *parts, layout, shape = weight.op_args() if packed else dense_args(weight, dtype)
            held = [*parts, None, a, lora_B]
            sizes += [sum(1 << i for i, part in enumerate(held) if part is not None), layout, *shape]
            tensors += [part for part in held if part is not None]
        return tensors, sizes, [SCALING, 0.0] * 2

    got, want = (cuda_call("lora_linears", x, *lists(packed)) for packed in (True, False))
    assert_equal(got, want)
    got, want = (
        cuda_call("lora_linears_backward", grads, x, *lists(packed), list(got[2:]), True) for packed in (True, False)
    )
    assert_equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts(cuda_call: Callable[..., Any], dtype: torch.dtype, kind: str) -> None:
    experts, r = 3, 4
    n, k = packed_weights.fitting(kind, 40, 96)
    generator = torch.Generator().manual_seed(9)
    weight = packed_weights.stacked([packed_weight(kind, n, k, generator) for _ in range(experts)])
    x, grad = torch.randn(30, k).to(dtype), torch.randn(30, n).to(dtype)
    a, b, g = torch.randn(experts, r, k) / 8, torch.randn(experts, n, r) / 8, torch.rand(experts, n) + 0.5
    offsets = torch.tensor([11, 11, 30])
    run = functools.partial(both, cuda_call, weight, dtype)
    (y, s, z), want = run("lora_experts", [x], [None, offsets, a, b, g, SCALING, 0.0, None, True])
    assert_equal((y, s, z), want)
    last = F.linear(x[11:].double(), decoded(weight, torch.float64)[2])  # the rows of the third expert
    low_rank = x[11:].double() @ a[2].double().T @ b[2].double().T
    exact = g[2].double() * (last + SCALING * low_rank)
    torch.testing.assert_close(y[11:].double(), exact, rtol=0.02, atol=0.02 * exact.abs().max().item())
    assert_equal(*run("lora_experts_backward", [grad, x],
                      [offsets, a, b, g, s, z, SCALING, 0.0, None, True, True]))  # fmt: skip
    assert_equal(*run("dora_experts_weight_norm", [], [None, a, b, SCALING, dtype]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6, 64), (70, 131)], ids=str)
def test_merged(cuda_call: Callable[..., Any], shape: tuple, dtype: torch.dtype, kind: str) -> None:
    weight = drawn(kind, *shape)
    n, k = weight.shape
    a, b, g = torch.randint(-4, 5, (20, k)).float(), torch.randint(-4, 5, (n, 20)).float(), torch.rand(n) + 0.5
    for row_scale in (None, g):
        got = cuda_call("nf4_dequantize_merged", *weight.op_args(), a, b, row_scale, 0.5, dtype)
        # With small integers and a scaling of a half, only the sum and the product with g are rounded.
        assert_bits(got, merged_of(decoded(weight, torch.float32), a, b, row_scale, 0.5).to(dtype))
    got = cuda_call("nf4_dequantize_merged", *weight.op_args(), a, torch.zeros_like(b), None, 0.5, dtype)
    assert torch.equal(got, decoded(weight, dtype))


# --- errors -----------------------------------------------------------------------------------------------------------


def refuses(cuda_call: Callable[..., Any], message: str, part0: Tensor, part1: Optional[Tensor], layout: int,
            shape: list[int], *more: Optional[Tensor]) -> None:  # fmt: skip
    parts = [part0, part1, *more, *[None] * (3 - len(more))]
    with pytest.raises(RuntimeError, match=f"nf4_dequantize: {message}"):
        cuda_call("nf4_dequantize", *parts, layout, shape, torch.bfloat16)


def test_refuses(cuda_call: Callable[..., Any]) -> None:
    weight = drawn("mxfp4", 6, 64)
    blocks, scales, *_, layout, shape = weight.op_args()
    refused = functools.partial(refuses, cuda_call)
    refused(r"part 0 of a Mxfp4 weight \[6, 64\] has 160 bytes, wanted 192 on weight's device", blocks[:5], scales,
            layout, shape)  # fmt: skip
    refused("part 1 of a Mxfp4 weight is None, wanted 12 bytes", blocks, None, layout, shape)
    refused(r"part 2 of a Mxfp4 weight \[6, 64\] has 12 bytes, wanted 0", blocks, scales, layout, shape, scales)
    refused(r"Mxfp4 weight \[6, 64\] has group 16 and option 0, wanted group 32", blocks, scales, layout - 16, shape)
    refused(r"Mxfp4 weight \[4, 96\] has group 31", blocks, scales, layout - 1, [4, 96])
    refused("layout is .*, which names no format", blocks, scales, 255 << 32 | 32, shape)
    refused(r"weight has 3 dimensions, wanted \[N, K\]", blocks, scales, layout, [1, 6, 64])
    refused("blocksize is 33, wanted a power of two", blocks, torch.zeros(12), 33, shape)
    refused("absmax is None, wanted the scales of an NF4 weight", blocks, None, 64, shape)
    with pytest.raises(RuntimeError, match="a size of a new tensor is -6, wanted 0 or more"):
        cuda_call("nf4_dequantize", *weight.op_args()[:6], [-6, 64], torch.bfloat16)
    with pytest.raises(RuntimeError, match="a size of .* wanted one that 63 bits hold"):
        cuda_call("nf4_dequantize", *weight.op_args()[:6], [2**40, 2**40], torch.bfloat16)


def test_merging_into_nf4_refuses_other_formats(cuda_call: Callable[..., Any]) -> None:
    weight = drawn("mxfp4", 6, 64)
    with pytest.raises(RuntimeError, match="nf4_merge: layout is .*, wanted the block size of an NF4 weight"):
        cuda_call("nf4_merge", *weight.op_args(), torch.zeros(2, 64), torch.zeros(6, 2), None, 1.0)
