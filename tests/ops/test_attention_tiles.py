"""Tests attention in bfloat16 on the CPU paths with bfloat16 products: numbers of queries and keys, and sizes of heads,
beside those of a tile of AMX (16 rows, 16 lanes, 32 values of depth), of a strip and of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from peft_ext import _native, reference

FORWARD = torch.ops.peft_ext.scaled_dot_product_attention
BACKWARD = torch.ops.peft_ext.scaled_dot_product_attention_backward
QUERIES = (1, 15, 16, 17, 31, 33, 64, 97)
KEYS = (1, 15, 16, 17, 31, 33, 100, 193, 225)
# (head size of q and k, head size of v)
SIZES = ((8, 8), (40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (33, 20), (24, 72))
KINDS = ("all", "causal", "window", "random", "bias", "dropout", "causal dropout")

pytestmark = pytest.mark.cpu_only("it is about CPU paths")
PATHS = [
    path
    for path in (_native.STATE.module.isas() if _native.STATE.module is not None else [])
    if path in _native.TILE_PATHS
]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    before, threads = _native.STATE.isa, torch.get_num_threads()
    _native.STATE.module.set_isa(request.param)
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(threads)
    _native.STATE.module.set_isa(before)


def heads(batch: int, count: int, tokens: int, size: int) -> Tensor:
    return torch.randn(batch, tokens, count, size).bfloat16().transpose(1, 2)


def options(kind: str, t: int, s: int, size: int) -> tuple:
    """Returns the arguments of the operator after q, k and v."""
    mask = bias = None
    if kind == "window":
        after = torch.arange(t)[:, None] - torch.arange(s)
        mask = ((after >= -3) & (after < 20))[None, None]
    if kind == "random":
        mask = torch.rand(2, 1, t, s) > 0.4
    if kind == "bias":
        bias = torch.randn(1, 4, t, s)
    dropped = "dropout" in kind
    seed = torch.tensor([3, 5]) if dropped else None
    return mask, "causal" in kind, size**-0.5, 0.3 if dropped else 0.0, seed, bias


def step(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, how: tuple) -> list[Tensor]:
    y, lse = FORWARD(q, k, v, *how)
    return [y, lse, *BACKWARD(grad, q, k, v, y, lse, *how)]


def assert_right(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, how: tuple, found: list[Tensor]) -> None:
    """The gradients are those for the out and lse that the operator takes."""
    wide, taken = [value.double() for value in (q, k, v)], [value.double() for value in found[:2]]
    wanted = [*reference.scaled_dot_product_attention(*wide, *how),
              *reference.scaled_dot_product_attention_backward(grad.double(), *wide, *taken, *how)]  # fmt: skip
    for name, value, want in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        error = (value.double() - want).norm()
        assert error <= 1e-2 * want.norm() + 1e-3 * want.numel() ** 0.5, (name, q.shape, k.shape, how[1:])


def leave_nan_in_scratch() -> None:
    """Fills the memory that the next call takes with NaN."""
    large = [torch.full((1, 1, 193, 256), float("nan"), dtype=torch.bfloat16) for _ in range(4)]
    step(*large, options("all", 193, 193, 256))


@pytest.mark.parametrize(("size", "value_size"), SIZES)
def test_tails(size: int, value_size: int, path: str) -> None:
    """The memory that a call takes holds NaN before the call, so that a read of unwritten memory is seen."""
    torch.manual_seed(0)
    turn = size
    for t in QUERIES:
        leave_nan_in_scratch()
        for s in KEYS:
            turn += 1
            kind = KINDS[turn % len(KINDS)]
            q, k, v = heads(2, 4, t, size), heads(2, 2, s, size), heads(2, 2, s, value_size)
            grad, how = heads(2, 4, t, value_size), options(kind, t, s, size)
            assert_right(q, k, v, grad, how, step(q, k, v, grad, how))


@pytest.mark.parametrize("kind", KINDS)
def test_many_blocks(kind: str, path: str) -> None:
    """Several blocks of queries and keys, with the same bits on any number of threads."""
    torch.manual_seed(0)
    t, s, size = 333, 417, 72
    q, k, v = heads(2, 4, t, size), heads(2, 2, s, size), heads(2, 2, s, size)
    grad, how, found = heads(2, 4, t, size), options(kind, t, s, size), []
    for threads in (1, 3, 48):
        torch.set_num_threads(threads)
        found.append(step(q, k, v, grad, how))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))
    assert_right(q, k, v, grad, how, found[0])


@pytest.mark.skipif("amx_emulated" not in PATHS, reason="no AVX512-BF16")
def test_tiles_add_up_in_an_order_of_their_own(path: str) -> None:
    """The path with tiles does not run the dot products of vectors."""
    torch.manual_seed(0)
    q, k, v, grad = (heads(1, 2, 96, 64) for _ in range(4))
    how, found = options("causal", 96, 96, 64), {}
    for other in ("avx512_bf16", "amx_emulated"):
        _native.STATE.module.set_isa(other)
        found[other] = step(q, k, v, grad, how)
    assert not any(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))
