"""Tests the rank passes of the CUDA kernels over activations, with many ranks, with dropout, and over many tiles.

The battery has small shapes. In these tests a pass is cut into chunks of several tiles, rows and columns end in the
middle of a tile, and a rank may need several launches. Mixed batches have samples with and samples without an adapter,
and adapters of several ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ext.reference import nf4_quantize
from peft_ext.reference.philox import dropout_keep_mask

pytestmark = pytest.mark.slow

SCALING = 0.75
SEED = torch.tensor([0x1234_5678_9ABC, 77])
# Sizes (T, K, N): several tiles and chunks in both dimensions, ends within a tile, no multiples of 8, few rows, few
# columns.
SHAPES = [(330, 584, 328), (64, 64, 64), (129, 1160, 72), (70, 99, 333), (3, 8, 1040), (1100, 40, 24)]
# Ranks of one, two, four and eight tiles of 16 ranks, ranks that end within a tile, and ranks that need more than one
# launch.
RANKS = [1, 16, 24, 32, 50, 64, 100, 128, 130, 200]


@functools.cache
def operands(shape: tuple[int, int, int], rank: int, dtype: torch.dtype, adapter: torch.dtype) -> tuple[Tensor, ...]:
    t, k, n = shape
    generator = torch.Generator().manual_seed(t + 7 * rank)
    draw = functools.partial(torch.randn, generator=generator)
    return (
        draw(t, k).to(dtype), draw(t, n).to(dtype), (draw(rank, k) / 8).to(adapter), (draw(n, rank) / 8).to(adapter),
        draw(t, n).to(dtype),
    )  # fmt: skip


def expected(x: Tensor, residual: Tensor, a: Tensor, b: Tensor, grad: Tensor, p: float) -> dict[str, Tensor]:
    x, residual, a, b, grad = (value.double() for value in (x, residual, a, b, grad))
    mask = dropout_keep_mask(SEED, p, x.shape).double() / (1 - p) if p else torch.ones_like(x)
    s = (x * mask) @ a.T
    to_s = SCALING * grad @ b
    return {
        "y": residual + SCALING * s @ b.T, "s": s,
        "grad_x": mask * (to_s @ a), "grad_A": to_s.T @ (x * mask), "grad_B": SCALING * grad.T @ s,
    }  # fmt: skip


def close(got: Tensor, want: Tensor, name: str, terms: int) -> None:
    """Asserts that errors are within the rounding of the result's dtype and of a float32 sum of ``terms`` terms."""
    eps = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[got.dtype]
    # For a 16-bit result the kernels split a float32 operand into two terms of 8 bits each, and leave out 2^-16 of the
    # operand.
    left_out = 2.0**-24 * (8 + terms**0.5) if got.dtype == torch.float32 else 2.0**-16
    bound = eps * want.abs() * 1.01 + want.abs().max().item() * left_out
    worst = ((got.double() - want).abs() / bound).max().item()
    assert worst <= 1, f"{name} is off by {worst:.2f} of what is allowed"


def check(
    cuda_call: Callable[..., Any], shape: tuple[int, int, int], rank: int, p: float, dtype: Any, adapter: Any
) -> None:
    x, residual, a, b, grad = operands(shape, rank, dtype, adapter)
    want = expected(x, residual, a, b, grad, p)
    seed = SEED if p else None
    y, s = cuda_call("lora_residual", x, residual, a, b, None, SCALING, p, seed)
    grad_x, grad_a, grad_b, _ = cuda_call("lora_residual_backward", grad, x, a, b, None, s, SCALING, p, seed, True)
    close(y, want["y"], "y", rank)
    close(s, want["s"], "s", shape[1])
    close(grad_x, want["grad_x"], "grad_x", shape[2])
    close(grad_a, want["grad_A"], "grad_A", shape[0] * 4)
    close(grad_b, want["grad_B"], "grad_B", shape[0] * 4)
    if p:  # dX is 0 exactly at the dropped elements; few other elements are 0 by chance
        kept = dropout_keep_mask(SEED, p, x.shape)
        assert not grad_x[~kept].any()
        assert grad_x[kept].count_nonzero() >= 0.99 * kept.sum()


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["plain", "dropout"])
@pytest.mark.parametrize("rank", RANKS)
def test_every_rank(cuda_call: Callable[..., Any], rank: int, p: float) -> None:
    check(cuda_call, SHAPES[0], rank, p, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_type(
    cuda_call: Callable[..., Any], shape: tuple, dtype: torch.dtype, adapter: torch.dtype
) -> None:
    for rank, p in ((8, 0.2), (40, 0.0)):
        check(cuda_call, shape, rank, p, dtype, adapter)


@pytest.mark.parametrize("p", [2.0**-16, 0.25, 0.5 - 2.0**-16, 0.5, 0.75, 0.9, 1 - 2.0**-16], ids=lambda p: f"{p:.6f}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_threshold_drops_the_reference_s_elements(
    cuda_call: Callable[..., Any], dtype: torch.dtype, p: float
) -> None:
    """With A and B of ones, S counts the kept elements of a row, and dX is 0 exactly at dropped elements."""
    x = torch.ones(70, 72, dtype=dtype)
    a, b = torch.ones(1, 72), torch.ones(8, 1)
    kept = dropout_keep_mask(SEED, p, x.shape)
    residual, grad = torch.zeros(70, 8, dtype=dtype), torch.ones(70, 8, dtype=dtype)
    _, s = cuda_call("lora_residual", x, residual, a, b, None, 1.0, p, SEED)
    torch.testing.assert_close(s[:, 0] * (1 - p), kept.sum(1).float(), rtol=1e-6, atol=1e-6)
    grad_x = cuda_call("lora_residual_backward", grad, x, a, b, None, s, 1.0, p, SEED, True)[0]
    assert torch.equal(grad_x != 0, kept)


# --- few tokens against NF4 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("outputs", "inputs", "blocksize"),
    [(33, 64, 64), (16, 640, 128), (130, 1088, 64), (8, 4160, 64), (48, 96, 32), (72, 320, 4096)],
)
def test_few_tokens(
    cuda_call: Callable[..., Any], outputs: int, inputs: int, blocksize: int, dtype: torch.dtype, nested: bool
) -> None:
    """Covers warps with no slab of the weight, with few, and with more than registers hold; tails of all sizes."""
    generator = torch.Generator().manual_seed(outputs)
    draw = functools.partial(torch.randn, generator=generator)
    weight = nf4_quantize(draw(outputs, inputs) / 8, blocksize, nested)
    exact = weight.dequantize(torch.float64)
    a, b, bias = draw(5, inputs) / 8, (draw(outputs, 5) / 8).to(dtype), draw(outputs).to(dtype)
    for tokens in (1, 3, 8, 9, 16, 17, 40):
        x = draw(tokens, inputs).to(dtype)
        y, s = cuda_call("lora_linear", x, *weight.op_args(), bias, a, b, None, SCALING, 0.0, None)
        want_s = x.double() @ a.double().T
        want = x.double() @ exact.T + SCALING * want_s @ b.double().T + bias.double()
        plain = F.linear(x, weight.dequantize(dtype), bias).double() - F.linear(x.double(), exact, bias.double())
        error = y.double() - want
        rounding = torch.finfo(dtype).eps / 2 * want
        assert error.norm() <= 1.5 * plain.norm() + rounding.norm(), tokens
        assert error.abs().max() <= 1.5 * plain.abs().max() + 2 * rounding.abs().max(), tokens
        close(s, want_s, "s", inputs)


def test_few_tokens_of_a_weight_with_a_nan_leave_other_outputs_alone(cuda_call: Callable[..., Any]) -> None:
    weight = nf4_quantize(torch.randn(40, 256), 64)
    packed, absmax, *rest = weight.op_args()
    absmax = absmax.clone()
    # W has 4 scales per row. This is the second scale of row 17, from which output 17 is computed.
    absmax[4 * 17 + 1] = float("nan")
    y = cuda_call("nf4_linear", torch.randn(4, 256).bfloat16(), packed, absmax, *rest, None)
    nan = y.isnan()
    assert nan[:, 17].all() and nan.sum() == 4


@pytest.mark.parametrize(("rank", "p"), [(16, 0.1), (40, 0.0)])
def test_blocks_of_more_tiles_than_are_on_their_way(cuda_call: Callable[..., Any], rank: int, p: float) -> None:
    """A block has more tiles than the pipeline has stages, so that stages are reused, and the last tile is partial."""
    check(cuda_call, (25570, 440, 24), rank, p, torch.bfloat16, torch.float32)


# --- mixed batches ----------------------------------------------------------------------------------------------------


def mixed_batch(
    samples: int, length: int, inputs: int, outputs: int, ranks: list[int], dtype: torch.dtype, kinds: list[torch.dtype]
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[float], list[int]]:
    """Returns x, W, the adapters' A, B and scalings, and each sample's adapter; the samples use all adapters and
    none.
    """
    generator = torch.Generator().manual_seed(samples + 7 * length + inputs)
    draw = functools.partial(torch.randn, generator=generator)
    lora_A = [(draw(rank, inputs) / 8).to(kinds[g % len(kinds)]) for g, rank in enumerate(ranks)]
    lora_B = [(draw(outputs, rank) / (rank or 1) ** 0.5).to(kinds[g % len(kinds)]) for g, rank in enumerate(ranks)]
    adapters = [(5 * i + i // 3 + 1) % (len(ranks) + 1) - 1 for i in range(samples)]
    scaling = [0.5 + 0.25 * (g % 5) for g in range(len(ranks))]
    return (
        draw(samples, length, inputs).to(dtype), (draw(outputs, inputs) / 8).to(dtype), lora_A, lora_B, scaling,
        adapters,
    )  # fmt: skip


def mixed_expected(
    x: Tensor, weight: Tensor, lora_A: list[Tensor], lora_B: list[Tensor], scaling: list[float], adapters: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns, in float64, Y, the low-rank terms that the adapters add, and S."""
    x = x.double()
    s = torch.zeros(*x.shape[:-1], max(a.shape[0] for a in lora_A), dtype=torch.float64)
    added = torch.zeros(*x.shape[:-1], weight.shape[0], dtype=torch.float64)
    for i, g in enumerate(adapters):
        if g >= 0:
            part = x[i] @ lora_A[g].double().T
            s[i, :, : part.shape[1]] = part
            added[i] = scaling[g] * part @ lora_B[g].double().T
    return F.linear(x, weight.double()) + added, added, s.flatten(0, 1)


def check_mixed(cuda_call: Callable[..., Any], batch: tuple, weight: Any, bias: Any, note: str) -> Tensor:
    x, dense, *adapters = batch
    nf4 = not isinstance(weight, Tensor)
    exact = weight.dequantize(torch.float64) if nf4 else weight.double()
    args = weight.op_args() if nf4 else (weight, None, None, None, None, 0, list(weight.shape))
    y, s = cuda_call("grouped_lora_linear", x, *args, bias, *adapters)
    want, added, want_s = mixed_expected(x, exact, *adapters)
    offset = bias.double() if bias is not None else torch.zeros(exact.shape[0], dtype=torch.float64)
    want = want + offset
    assert s.shape == want_s.shape and torch.equal(s == 0, want_s == 0), note
    close(s, want_s, f"s, {note}", x.shape[-1])
    # The bound is 1.5 times plain PyTorch's error, plus the rounding of the result and of the added terms.
    held = weight.dequantize(x.dtype) if nf4 else weight
    plain = F.linear(x, held, bias).double() - F.linear(x.double(), exact) - offset
    rounding = torch.finfo(x.dtype).eps / 2 * (want.abs() + (added + offset).abs())
    sums = 2.0**-24 * (8 + x.shape[-1] ** 0.5) * want.abs().max()
    error = (y.double() - want).abs()
    assert error.norm() <= 1.5 * plain.norm() + rounding.norm() + sums * error.numel() ** 0.5, note
    assert error.max() <= 1.5 * plain.abs().max() + 2 * rounding.max() + sums, note
    return y


# (samples, tokens of a sample, K, N, ranks): generation; partial tiles; more adapters, and more runs of samples with
# one adapter, than a launch's arguments hold; ranks of every kind of pass; a single adapter; an adapter of rank 0.
MIXED = [
    (8, 1, 72, 40, [16, 16, 4]), (64, 1, 64, 96, [8, 3, 20]), (65, 1, 136, 72, [1, 16, 8]), (7, 9, 99, 33, [5, 2]),
    (9, 64, 64, 64, [16, 16, 16, 16]), (5, 129, 72, 136, [8, 16]), (6, 70, 99, 333, [4, 24, 16]),
    (150, 1, 64, 24, list(range(1, 61))), (12, 40, 200, 72, [32, 17]), (4, 100, 136, 80, [64, 8, 33]),
    (5, 70, 72, 64, [128, 130, 7]), (3, 65, 40, 200, [200]), (6, 33, 72, 40, [0, 8]), (1, 200, 8, 8, [2]),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", MIXED, ids=lambda shape: f"{shape[0]}x{shape[1]}-{shape[2]}-{shape[3]}")
def test_mixed_batches(cuda_call: Callable[..., Any], shape: tuple, dtype: torch.dtype) -> None:
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    for note, of in (("as x", [dtype]), ("float32", kinds[:1]), ("of each type", kinds)):
        batch = mixed_batch(*shape, dtype, of)
        bias = torch.linspace(-1, 1, shape[3]).to(dtype) if note != "float32" else None
        check_mixed(cuda_call, batch, batch[1], bias, note)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("samples", "length", "inputs"), [(8, 1, 640), (16, 1, 128), (5, 7, 128), (64, 1, 96),
                                                           (3, 50, 128)])  # fmt: skip
def test_mixed_batches_over_nf4(
    cuda_call: Callable[..., Any], samples: int, length: int, inputs: int, dtype: torch.dtype, nested: bool
) -> None:
    batch = mixed_batch(samples, length, inputs, 72, [16, 5, 40], dtype, [torch.float32, torch.bfloat16])
    weight = nf4_quantize(batch[1].float(), 64 if inputs % 64 == 0 else 32, nested)
    check_mixed(cuda_call, batch, weight, torch.linspace(-1, 1, 72).to(dtype), "NF4")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("samples", "length"), [(7, 1), (10, 33), (200, 1)])
def test_where_a_sample_is_in_a_batch_is_none_of_its_bits(
    cuda_call: Callable[..., Any], samples: int, length: int, dtype: torch.dtype
) -> None:
    x, weight, *lora, adapters = mixed_batch(samples, length, 136, 72, [16, 5, 20], dtype, [torch.float32])
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(1))
    args = (weight, None, None, None, None, 0, list(weight.shape), None, *lora)
    s = cuda_call("grouped_lora_linear", x, *args, adapters)[1]
    moved = cuda_call("grouped_lora_linear", x[order], *args, [adapters[i] for i in order])[1]
    assert torch.equal(moved.view(samples, length, -1), s.view(samples, length, -1)[order])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "NF4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("samples", "length"), [(4, 1), (6, 5), (20, 9), (5, 65)])
def test_what_is_not_finite_stays_with_its_own_samples(
    cuda_call: Callable[..., Any], samples: int, length: int, dtype: torch.dtype, nf4: bool, value: float
) -> None:
    x, weight, lora_A, lora_B, scaling, adapters = mixed_batch(
        samples, length, 128, 72, [8, 20, 8, 4], dtype, [torch.float32, dtype]
    )
    adapters = [g if g != 3 else -1 for g in adapters]  # no sample has adapter 3
    held = nf4_quantize(weight.float(), 64).op_args() if nf4 else (weight, *[None] * 4, 0, list(weight.shape))

    def call() -> tuple[Tensor, Tensor]:
        return cuda_call("grouped_lora_linear", x, *held, None, lora_A, lora_B, scaling, adapters)

    clean_y, clean_s = call()
    assert clean_y.isfinite().all()
    lora_A[3][1, 2] = lora_B[3][1, 2] = value
    assert all(torch.equal(found, clean) for found, clean in zip(call(), (clean_y, clean_s), strict=True))
    spoilt = torch.tensor([g == 0 for g in adapters])
    for matrix in (lora_B[0], lora_A[0]):
        kept = matrix[3, 5].clone()
        matrix[3, 5] = value
        y, s = call()
        assert torch.equal(y[~spoilt], clean_y[~spoilt])
        assert torch.equal(s.view(samples, length, -1)[~spoilt], clean_s.view(samples, length, -1)[~spoilt])
        assert not y[spoilt].isfinite().all(-1).any()
        matrix[3, 5] = kept


def test_a_mixed_batch_without_adapters(cuda_call: Callable[..., Any]) -> None:
    """Where no sample has an adapter, or there are no samples, S still has the columns of the largest rank."""
    x, weight, lora_A, lora_B, scaling, _ = mixed_batch(3, 40, 72, 40, [3, 8], torch.bfloat16, [torch.float32])
    lora_B[0][:] = float("nan")
    args = (weight, *[None] * 4, 0, list(weight.shape))
    for bias in (None, torch.linspace(-1, 1, 40).bfloat16()):
        y, s = cuda_call("grouped_lora_linear", x, *args, bias, lora_A, lora_B, scaling, [-1, -1, -1])
        assert s.shape == (120, 8) and not s.any()
        torch.testing.assert_close(y, F.linear(x, weight, bias))
    y, s = cuda_call("grouped_lora_linear", x[:0], *args, None, lora_A, lora_B, scaling, [])
    assert y.shape == (0, 40, 40) and s.shape == (0, 8)
