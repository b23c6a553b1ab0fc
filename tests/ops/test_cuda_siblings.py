"""Tests the passes of the CUDA kernels that read x once for several layers of one input.

Layers of one call differ in their ranks, dropout, dtypes and biases. Rows and columns end in the middle of a tile, and
passes are cut into several chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_kernels import Launches
from torch import Tensor

from peft_ext import ops
from peft_ext.reference.philox import dropout_keep_mask

pytestmark = pytest.mark.slow

# Sizes (T, K) of x: several tiles and chunks in both dimensions, ends within a tile, fewer rows or columns than a tile.
SHAPES = [(330, 584), (64, 64), (129, 1160), (3, 8), (1100, 40), (200, 200)]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class Layers:
    """Layers of one input, with a rank, a dropout probability and a dtype of the adapter each. Rank 0: no adapter."""

    def __init__(
        self, shape: tuple[int, int], ranks: list[int], ps: list[float], dtype: torch.dtype,
        adapters: list[torch.dtype], bias: bool = False, rank_scale: bool = False,
    ) -> None:  # fmt: skip
        t, k = shape
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(t + sum(ranks)))
        self.x, self.ranks, self.ps, self.count = draw(t, k).to(dtype), ranks, ps, len(ranks)
        sizes = [72, 40, 136, 8, 64, 96, 24, 48][: self.count]
        self.scalings = [0.75 - 0.25 * (i % 3) for i in range(self.count)]
        self.weights = [(draw(n, k) / k**0.5).to(dtype) for n in sizes]
        self.biases = [draw(n).to(dtype) if bias else None for n in sizes]
        self.As = [(draw(r, k) / 8).to(a) if r else None for r, a in zip(ranks, adapters, strict=True)]
        self.Bs = [(draw(n, r) / 8).to(a) if r else None for n, r, a in zip(sizes, ranks, adapters, strict=True)]
        self.scales = [draw(r) if r and rank_scale else None for r in ranks]
        self.seeds = [torch.tensor([17 + i, 1 << 40 | i]) if r and p else None
                      for i, (r, p) in enumerate(zip(ranks, ps, strict=True))]  # fmt: skip
        self.grads = [draw(t, n).to(dtype) for n in sizes]

    def lists(self, only: int | None = None) -> tuple[list[Tensor], list[int], list[float]]:
        """Returns the arguments of lora_linears, see peft_ext/ops/layer_lists.py."""
        tensors, sizes, numbers = [], [], []
        for i in range(self.count) if only is None else [only]:
            held = [self.weights[i], *[None] * 4, self.biases[i], self.As[i], self.Bs[i], self.scales[i], self.seeds[i]]
            tensors += [value for value in held if value is not None]
            sizes += [sum(1 << j for j, value in enumerate(held) if value is not None), 0, *self.weights[i].shape]
            numbers += [self.scalings[i], self.ps[i]]
        return tensors, sizes, numbers

    def run(self, call: Callable[..., Any], needs_x: bool = True) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Returns Y and S of each layer, and the gradient of x with those of each layer."""
        found = list(call("lora_linears", self.x, *self.lists()))
        s = found[self.count :]
        grads = call("lora_linears_backward", self.grads, self.x, *self.lists(), s, needs_x)
        return found[: self.count], s, list(grads)

    def alone(self, call: Callable[..., Any], i: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        y, s = call("lora_linears", self.x, *self.lists(i))
        return y, s, list(call("lora_linears_backward", [self.grads[i]], self.x, *self.lists(i), [s], True))

    def expected(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        x = self.x.double()
        ys, ss, own, grad_x = [], [], [], torch.zeros_like(x)
        for i in range(self.count):
            w, grad = self.weights[i].double(), self.grads[i].double()
            y = F.linear(x, w, None if self.biases[i] is None else self.biases[i].double())
            grad_x += grad @ w
            if not self.ranks[i]:
                ys, ss, own = [*ys, y], [*ss, torch.empty(0)], [*own, *[torch.empty(0)] * 3]
                continue
            a, b, p = self.As[i].double(), self.Bs[i].double(), self.ps[i]
            scale = torch.ones(self.ranks[i]).double() if self.scales[i] is None else self.scales[i].double()
            mask = dropout_keep_mask(self.seeds[i], p, x.shape).double() / (1 - p) if p else torch.ones_like(x)
            s = (x * mask) @ a.T
            to_s = self.scalings[i] * (grad @ b) * scale
            grad_x += mask * (to_s @ a)
            of_scale = self.scalings[i] * ((grad @ b) * s).sum(0) if self.scales[i] is not None else torch.empty(0)
            ys, ss = [*ys, y + self.scalings[i] * (s * scale) @ b.T], [*ss, s]
            own += [to_s.T @ (x * mask), self.scalings[i] * grad.T @ (s * scale), of_scale]
        return ys, ss, [grad_x, *own]


def assert_close(got: list[Tensor], want: list[Tensor], name: str, terms: int) -> None:
    """Asserts that errors are within the rounding of the result's dtype and of a float32 sum of ``terms`` terms."""
    assert len(got) == len(want)
    for i, (value, wide) in enumerate(zip(got, want, strict=True)):
        assert value.numel() == wide.numel(), f"{name} {i}"
        if value.numel() == 0:
            continue
        eps = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}[value.dtype]
        # In 16 bits, Y and dX are rounded several times: when PyTorch's product is added, and when the term of a layer
        # is added.
        rounds = 1.01 if value.dtype == F32 else 6.0
        left_out = 2.0**-24 * (8 + terms**0.5) if value.dtype == F32 else max(2.0**-16, eps)
        bound = eps * wide.abs() * rounds + wide.abs().max().item() * left_out
        worst = ((value.double() - wide).abs() / bound).max().item()
        assert worst <= 1, f"{name} {i} is off by {worst:.2f} of what is allowed"


def check(call: Callable[..., Any], layers: Layers, needs_x: bool = True) -> None:
    ys, ss, grads = layers.run(call, needs_x)
    want_ys, want_ss, want_grads = layers.expected()
    t, k = layers.x.shape
    assert_close(ys, want_ys, "y", k)
    assert_close(ss, want_ss, "s", k)
    assert_close(grads[1:], want_grads[1:], "gradient of a layer", 4 * max(t, 136))
    if needs_x:
        assert_close(grads[:1], want_grads[:1], "grad_x", 136)
    else:
        assert grads[0].numel() == 0


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_type(cuda_call: Callable[..., Any], shape: tuple, dtype: torch.dtype, p: float) -> None:
    check(cuda_call, Layers(shape, [8, 16, 5], [p] * 3, dtype, [F32, F32, F32]))
    check(cuda_call, Layers(shape, [32, 20], [p] * 2, dtype, [F32, dtype]))


@pytest.mark.parametrize(
    ("ranks", "ps"),
    [
        ([16, 16], [0.1, 0.0]),
        ([1, 2, 3, 4], [0.5, 0.1, 0.0, 0.9]),
        ([32, 32, 32], [0.1, 0.2, 0.0]),
        ([17, 32, 24, 31], [0.1] * 4),
        ([8, 32, 16, 20], [0.1, 0.0, 0.25, 0.05]),
        ([8, 64, 4, 40], [0.1] * 4),
        ([16, 0, 16], [0.1] * 3),
        ([0, 16, 0], [0.1] * 3),
        ([0, 0], [0.0, 0.0]),
        ([4] * 8, [0.1] * 8),
    ],
    ids=str,
)
def test_ranks_and_dropout_of_the_layers_differ(cuda_call: Callable[..., Any], ranks: list, ps: list) -> None:
    check(cuda_call, Layers((200, 136), ranks, ps, BF16, [F32] * len(ranks), bias=True))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("adapters", [(BF16, BF16), (F16, F16), (BF16, F32, BF16)], ids=str)
def test_dtypes_of_adapters_and_rank_scales(
    cuda_call: Callable[..., Any], dtype: torch.dtype, adapters: tuple[torch.dtype, ...]
) -> None:
    count = len(adapters)
    check(cuda_call, Layers((130, 96), [12] * count, [0.1] * count, dtype, list(adapters), rank_scale=True))
    check(cuda_call, Layers((130, 96), [30] * count, [0.0] * count, dtype, list(adapters), bias=True))


def test_without_a_gradient_of_x(cuda_call: Callable[..., Any]) -> None:
    for rank in (8, 32):
        check(cuda_call, Layers((200, 136), [rank] * 3, [0.1, 0.0, 0.3], BF16, [F32] * 3), needs_x=False)


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("rank", [16, 32])
def test_bits_of_a_layer_alone(cuda_call: Callable[..., Any], rank: int, dtype: torch.dtype, p: float) -> None:
    """One pass over x for several layers adds in the order of a pass for one layer."""
    layers = Layers((330, 584), [rank] * 3, [p] * 3, dtype, [F32] * 3)
    ys, ss, grads = layers.run(cuda_call)
    for i in range(3):
        y, s, own = layers.alone(cuda_call, i)
        assert torch.equal(ys[i], y) and torch.equal(ss[i], s)
        assert all(torch.equal(grads[1 + 3 * i + j], own[1 + j]) for j in range(3))


def test_dropped_elements_have_no_gradient(cuda_call: Callable[..., Any]) -> None:
    """With weights of zeros, dX is 0 exactly where every layer drops the element: the masks' bits go from dA to dX."""
    for rank in (8, 24):
        layers = Layers((200, 136), [rank] * 2, [0.5, 0.75], BF16, [F32] * 2)
        layers.weights = [torch.zeros_like(w) for w in layers.weights]
        grad_x = layers.run(cuda_call)[2][0]
        kept = torch.stack([dropout_keep_mask(layers.seeds[i], layers.ps[i], layers.x.shape) for i in range(2)]).any(0)
        assert not grad_x[~kept].any()
        assert grad_x[kept].count_nonzero() >= 0.99 * kept.sum()


def test_no_tokens_and_views(cuda_call: Callable[..., Any]) -> None:
    layers = Layers((0, 64), [8, 8], [0.1, 0.1], BF16, [F32, F32])
    ys, ss, grads = layers.run(cuda_call)
    assert [tuple(y.shape) for y in ys] == [(0, 72), (0, 40)] and not any(g.any() for g in grads)
    layers = Layers((70, 64), [8, 8], [0.1, 0.1], BF16, [F32, F32])
    apart = torch.empty(70, 72, dtype=BF16)[:, 3:67]  # rows that are not contiguous and not aligned to 16 bytes
    apart.copy_(layers.x)
    layers.x = apart
    check(cuda_call, layers)


# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["plain", "dropout"])
def test_launches_of_a_layer(launches: Launches, p: float, rank: int) -> None:
    """A forward: terms, S, its sums, Y0. A backward: terms, P and dB, their sums, dA, its sums, dX0."""
    layers = Layers((200, 136), [rank], [p], BF16, [F32], bias=True)
    weight = (layers.weights[0], *[None] * 4, 0, list(layers.weights[0].shape))
    adapter = (layers.As[0], layers.Bs[0], None)
    (_, s), forward = launches.of(
        "lora_linear", layers.x, *weight, layers.biases[0], *adapter, 0.75, p, layers.seeds[0]
    )
    _, backward = launches.of(
        "lora_linear_backward", layers.grads[0], layers.x, *weight, *adapter, s, 0.75, p, layers.seeds[0], True
    )
    assert (forward, backward) == (4, 6)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_launches_of_layers_of_one_input(launches: Launches, count: int) -> None:
    """All but Y0 of a forward, and all but the passes over dY of a backward, are launched once for all layers."""
    layers = Layers((200, 136), [8] * count, [0.1] * count, BF16, [F32] * count)
    found, forward = launches.of("lora_linears", layers.x, *layers.lists())
    _, backward = launches.of(
        "lora_linears_backward", layers.grads, layers.x, *layers.lists(), list(found[count:]), True
    )
    assert (forward, backward) == (3 + count, 5 + count)


def test_seeds_of_layers_of_one_input_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw on a GPU is one launch. The seeds on a CPU are those of a draw for each layer."""
    drawn, randint = [], torch.randint

    def counted(*args: Any, **named: Any) -> Tensor:
        drawn.append(randint(*args, **named))
        return drawn[-1]

    layers = Layers((20, 64), [4, 0, 4, 4], [0.5, 0.0, 0.5, 0.5], F32, [F32] * 4)
    named = {"scalings": 0.5, "dropout_ps": 0.5, "training": True}
    torch.manual_seed(3)
    seeds = [None if a is None else randint(0, 2**63 - 1, (2,)) for a in layers.As]
    want = ops.lora_linears(layers.x, layers.weights, layers.As, layers.Bs, seeds=seeds, **named)
    torch.manual_seed(3)
    monkeypatch.setattr(torch, "randint", counted)
    got = ops.lora_linears(layers.x, layers.weights, layers.As, layers.Bs, **named)
    assert len(drawn) == 1 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
