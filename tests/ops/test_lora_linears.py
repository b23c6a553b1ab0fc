"""Tests layers of one input beyond the battery: panels larger than a cache, many layers, and unused outputs."""

from __future__ import annotations

import pytest
import torch
from nf4_cases import nf4_weight
from op_db import SEED
from torch import Tensor

from peft_ext import NF4Weight, ops, reference
from peft_ext._native import STATE, TILE_PATHS


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 0.1) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


class Layers:
    """Layers with weights [N, K] for each N in ``sizes``; each layer except every ``frozen``-th has an adapter.

    Each layer has its own dropout seed.
    """

    def __init__(self, sizes: list[int], k: int, dtype: torch.dtype, nf4: bool, frozen: int, device: torch.device):
        torch.manual_seed(0)
        self.x = draw(2, 20, k, dtype=dtype, scale=1.0).to(device)
        make = (lambda n: nf4_weight(n, k, dtype, 64, True)) if nf4 else (lambda n: draw(n, k, dtype=dtype))
        self.weights = [make(n).to(device) for n in sizes]
        adapted = [not frozen or i % frozen for i in range(len(sizes))]
        self.As = [draw(3 + i, k).to(device) if has else None for i, has in enumerate(adapted)]
        pairs = zip(sizes, self.As, strict=True)
        self.Bs = [None if a is None else draw(n, a.shape[0]).to(device) for n, a in pairs]
        self.seeds = [(SEED + i).to(device) for i in range(len(sizes))]
        self.grads = [draw(2, 20, n, dtype=dtype).to(device) for n in sizes]

    def step(self, p: float, used: list[int], wide: bool = False) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Returns the outputs, and the gradients of a backward through the outputs with the indices ``used``."""
        to = (lambda t: t.double()) if wide else (lambda t: t.clone())
        x = to(self.x).requires_grad_()
        As, Bs = ([None if t is None else to(t).requires_grad_() for t in held] for held in (self.As, self.Bs))
        weights = [self._wide(w) for w in self.weights] if wide else self.weights
        ys = ops.lora_linears(x, weights, As, Bs, scalings=0.5, dropout_ps=p, training=True, seeds=self.seeds)
        torch.autograd.backward([ys[i] for i in used], [self.grads[i].to(ys[i].dtype) for i in used])
        leaves = {"x": x, **{f"{name}{i}": t for name, held in (("A", As), ("B", Bs)) for i, t in enumerate(held)
                             if t is not None}}  # fmt: skip
        return list(ys), {name: t.grad for name, t in leaves.items()}

    def _wide(self, weight: Tensor | NF4Weight) -> Tensor:
        return (reference.nf4_dequantize(weight, self.x.dtype) if isinstance(weight, NF4Weight) else weight).double()


@pytest.mark.parametrize("used", ["all", "some"])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("sizes", "frozen"),
    [
        ([5000, 4500, 70], 0),
        ([4100, 4200, 64, 9000, 33], 2),
        ([40, 33, 70, 1, 64, 65, 96, 17, 128, 50, 31], 3),
        ([3000, 1700, 2050], 0),
    ],
    ids=["beyond a cache", "a frozen one first", "eleven layers", "parts of the depth with two layers"],
)
def test_against_float64(
    sizes: list[int], frozen: int, dtype: torch.dtype, nf4: bool, p: float, used: str, device: torch.device
) -> None:
    layers = Layers(sizes, 64, dtype, nf4, frozen, device)
    indices = list(range(len(sizes)))[:: 1 if used == "all" else 2]
    (ys, grads), (wide_ys, wide_grads) = layers.step(p, indices), layers.step(p, indices, wide=True)
    rounding = 2**-7 if dtype is torch.bfloat16 else 1e-5
    for i, (y, wanted) in enumerate(zip(ys, wide_ys, strict=True)):
        assert y.dtype is dtype and (y.double() - wanted).norm() <= rounding * wanted.norm(), i
    for name, wanted in wide_grads.items():
        if wanted is None:
            assert grads[name] is None, name
        else:
            assert (grads[name].double() - wanted).norm() <= rounding * wanted.norm(), name


def test_as_many_bits_as_each_layer_alone(device: torch.device) -> None:
    layers = Layers([5000, 4500, 70], 64, torch.bfloat16, False, 0, device)
    ys, grads = layers.step(0.5, [0, 1, 2])
    for i, y in enumerate(ys):
        a, b = layers.As[i].clone().requires_grad_(), layers.Bs[i].clone().requires_grad_()
        one = ops.lora_linear(layers.x, layers.weights[i], a, b, scaling=0.5, dropout_p=0.5, training=True,
                              seed=layers.seeds[i])  # fmt: skip
        one.backward(layers.grads[i])
        assert torch.equal(y, one) and torch.equal(grads[f"A{i}"], a.grad) and torch.equal(grads[f"B{i}"], b.grad)


def test_any_count_of_threads_has_the_bits_of_one(device: torch.device, request: pytest.FixtureRequest) -> None:
    if STATE.isa not in TILE_PATHS or request.config.getoption("--device") != "cpu":
        pytest.skip("the products are PyTorch's, whose bits may depend on its threads")
    layers, found = Layers([5000, 4500, 70], 64, torch.bfloat16, False, 0, device), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 16, 64):
            torch.set_num_threads(threads)
            found.append(layers.step(0.5, [0, 1, 2]))
    finally:
        torch.set_num_threads(before)
    (ys, grads), *others = found
    for other_ys, other_grads in others:
        assert all(map(torch.equal, ys, other_ys))
        assert all(torch.equal(grads[name], other_grads[name]) for name in grads)


@pytest.mark.parametrize(("how", "said"), [
    ({"scaling": float("nan")}, "lora_linear: scaling is nan, wanted a finite number"),
    ({"dropout_p": 1.5, "training": True}, "lora_linear: dropout_p is 1.5, wanted 0 <= p < 1"),
])  # fmt: skip
def test_numbers_are_checked_under_a_compiler_as_well(how: dict, said: str) -> None:
    torch._dynamo.reset()
    x, weight, lora_A, lora_B = draw(40, 32), draw(32, 32), draw(8, 32), draw(32, 8)
    call = torch.compile(lambda x: ops.lora_linear(x, weight, lora_A, lora_B, **how), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=said):
        call(x)


@pytest.mark.parametrize("op", [ops.lora_linear, ops.lora_residual], ids=lambda op: op.__name__)
def test_a_column_of_rank_scales_has_a_column_of_gradients(op, device: torch.device) -> None:
    torch.manual_seed(0)
    x, w, a, b = (torch.randn(*s).to(device) for s in ((6, 64), (32, 64), (4, 64), (32, 4)))
    other = w if op is ops.lora_linear else torch.randn(6, 32).to(device)
    results = []
    for shape in ((4,), (4, 1)):
        scale = torch.linspace(-1, 2, 4, dtype=torch.float64).float().to(device).view(shape).requires_grad_()
        y = op(x, other, a, b, rank_scale=scale, scaling=0.5)
        (grad,) = torch.autograd.grad(y.square().sum(), scale)
        assert grad.shape == shape and grad.dtype == scale.dtype
        results.append((y, grad.flatten()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    with pytest.raises(ValueError, match=r"rank_scale has shape \(2, 2\), wanted \(4,\) or \(4, 1\)"):
        op(x, other, a, b, rank_scale=torch.ones(2, 2, device=device))
