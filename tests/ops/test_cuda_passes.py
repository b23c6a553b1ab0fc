"""The passes of the CUDA kernels over activations: every rank, mask, number of tiles and chunk, one call after another.

The operators' battery has small shapes. Here a pass is cut into chunks of several tiles, rows and columns end in the
middle of a tile, and ranks go past what one launch makes.
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

SCALING = 0.75
SEED = torch.tensor([0x1234_5678_9ABC, 77])
# (T, K, N): several tiles and chunks both ways; ends within a tile; no multiple of 8; few of each.
SHAPES = [(330, 584, 328), (64, 64, 64), (129, 1160, 72), (70, 99, 333), (3, 8, 1040), (1100, 40, 24)]
# One, two, four and eight tiles of 16 ranks, ends between them, and more than one launch makes.
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
    """Within the rounding of the result's type, and what a float32 sum of so many terms leaves."""
    eps = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[got.dtype]
    # Where the result has 16 bits its products are of two terms of eight bits.
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
    if p:  # the very elements, though most of dX could be nearly zero
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
    """A and B of ones show the mask: S counts what is kept of a row, dX is zero where nothing is."""
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
    """Warps without a slab, with some, and with more than wait in registers; outputs and tokens that end anywhere."""
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
    absmax[4 * 17 + 1] = float("nan")  # of output 17
    y = cuda_call("nf4_linear", torch.randn(4, 256).bfloat16(), packed, absmax, *rest, None)
    nan = y.isnan()
    assert nan[:, 17].all() and nan.sum() == 4


@pytest.mark.parametrize(("rank", "p"), [(16, 0.1), (40, 0.0)])
def test_blocks_of_more_tiles_than_are_on_their_way(cuda_call: Callable[..., Any], rank: int, p: float) -> None:
    """So many row tiles that a block has seven of columns, and four of rows: stages come round, the last tile ends."""
    check(cuda_call, (25570, 440, 24), rank, p, torch.bfloat16, torch.float32)
