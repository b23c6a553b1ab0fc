"""Times a training step of 64 experts, each with LoRA of rank 16: bf16 or NF4 weights, float32 adapters.

    Y_t = x_t W_eᵀ + s · (x_t A_eᵀ) B_eᵀ        for every row t of expert e

The 64 weights [N / 8, K / 8] are cut from one weight [N, K]. Each of T tokens has eight rows, and each row goes to an
expert at random. The contender "PEFT", which only the cases without dropout have, is PEFT's computation over the bf16
weights: PEFT forms W + s B A of all experts and multiplies by PyTorch's grouped product. The contender "frozen" is the
grouped product of the bf16 weights, without adapters. The lower bound of the time counts, among others, the reads of
the weights, x and dY, the writes of Y and dX, and the products with W, A and B.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ext import NF4Weight, ops, reference

from .grid import Variant
from .harness import Comparison, Contender
from .peers import RANK, SCALING, Problem, Turns, comparison_of, draw_seed, functional, layer_bytes

EXPERTS, PARTS = 64, 8  # the weight [N, K] is cut into PARTS x PARTS weights, one for each expert


@lru_cache(maxsize=1)
def _routing(rows: int, device: str) -> Tensor:
    """Returns the argument ``offsets`` of the operator lora_experts, for ``rows`` rows of x that go to experts at
    random: for each expert, the number of rows of this expert and of all experts before it."""
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, EXPERTS, (rows,), generator=draw)
    return torch.bincount(chosen, minlength=EXPERTS).cumsum(0).to(torch.int32).to(device)


@lru_cache(maxsize=1)
def _adapters(k: int, n: int, device: str) -> dict[str, Tensor]:
    draw = torch.Generator(device).manual_seed(0)
    a = torch.randn(EXPERTS, RANK, k, generator=draw, device=device) * (3 * k) ** -0.5
    b = torch.randn(EXPERTS, n, RANK, generator=draw, device=device) * 0.02
    return {"lora_A": a.requires_grad_(), "lora_B": b.requires_grad_()}


def _stack(weight: Any) -> Any:
    """Returns a layer's weight [N, K] as the experts' stacked weights [64, N / 8, K / 8]."""
    n, k = weight.shape
    shape = (EXPERTS, n // PARTS, k // PARTS)
    if isinstance(weight, NF4Weight):
        dense = weight.dequantize(torch.bfloat16).view(shape)
        return NF4Weight.stack([ops.nf4_quantize(one, weight.blocksize, weight.nested is not None) for one in dense])
    return weight.view(shape)


def experts(base: str, dropout: float, problem: Problem, compile: bool) -> Comparison:
    tokens, k, n = problem.tokens, problem.k // PARTS, problem.n // PARTS
    offsets, held = _routing(tokens * PARTS, problem.device), _adapters(k, n, problem.device)

    def rows(x: Tensor) -> Tensor:
        return x.view(-1, k)

    counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()

    def ours(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        seed = draw_seed(problem) if dropout else None
        y = ops.lora_experts(rows(x), weight, offsets, lora_A, lora_B, scaling=SCALING, dropout_p=dropout,
                             training=True, seed=seed)  # fmt: skip
        return y.view(tokens, -1)

    def peft(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        summed = torch.baddbmm(weight, lora_B.to(weight.dtype), lora_A.to(weight.dtype), alpha=SCALING)
        return F.grouped_mm(rows(x), summed.transpose(1, 2), offs=offsets).view(tokens, -1)

    def eager(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        parts = rows(x).split(counts)
        found = [F.linear(part, w) + SCALING * F.linear(F.linear(part, a.to(w.dtype)), b.to(w.dtype))
                 for part, w, a, b in zip(parts, weight, lora_A, lora_B, strict=True)]  # fmt: skip
        return torch.cat(found).view(tokens, -1)

    def alone(x: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(rows(x), weight.transpose(1, 2), offs=offsets).view(tokens, -1)

    def exact(adapted: bool, base: str) -> dict[str, Tensor]:
        x = problem.x.detach().double().requires_grad_()
        a, b = (held[name].detach().double().requires_grad_() for name in ("lora_A", "lora_B"))
        weight = _stack(problem.weights(base).items[0])
        wide = (weight.dequantize(torch.bfloat16) if isinstance(weight, NF4Weight) else weight).double()
        parts = rows(x).split(counts)
        seed = draw_seed(problem) if dropout else None

        def low_rank(part: Tensor, expert: int) -> Tensor:
            if seed is not None:
                own_seed = seed + torch.tensor([0, expert], device=seed.device)
                mask = reference.dropout_keep_mask(own_seed, dropout, part.shape)
                part = part * mask / (1 - dropout)
            return SCALING * part @ a[expert].t() @ b[expert].t()

        y = torch.cat([part @ w.t() + (low_rank(part, e) if adapted else 0.0)
                       for e, (part, w) in enumerate(zip(parts, wide, strict=True))]).view(tokens, -1)  # fmt: skip
        y.backward(problem.grad.double())
        grads = {"grad_lora_A": a.grad, "grad_lora_B": b.grad} if adapted else {}
        return {"y": y.detach(), "grad_x": x.grad, **grads}

    names = ("lora_A", "lora_B")

    def make(forward: Any, base: str = "bf16", names: tuple[str, ...] = names) -> Contender:
        return functional(problem, base, forward, names, partial(exact, bool(names), base), enter=_stack,
                          adapters=Turns([held]))  # fmt: skip

    makers = {"ours": partial(make, ours, base)}
    if not dropout:
        makers["PEFT"] = partial(make, peft)
        makers["torch eager"] = partial(make, eager)
    makers["frozen"] = partial(make, alone, "bf16", ())
    count = tokens * PARTS
    adapters = sum(value.numel() * 4 for value in held.values())
    flops = 4 * count * n * k + 6 * count * RANK * (n + k)
    return comparison_of(makers, layer_bytes(problem, base) + 5 * adapters, flops)


VARIANTS = (
    Variant("lora_experts", "bf16 base, 64 experts", partial(experts, "bf16", 0.0)),
    Variant("lora_experts", "bf16 base, 64 experts, dropout 0.05", partial(experts, "bf16", 0.05)),
    Variant("lora_experts", "NF4 base, 64 experts", partial(experts, "nf4", 0.0)),
)
