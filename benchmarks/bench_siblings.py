"""Times a training step of three LoRA layers with one input: the layers computed together, and each layer alone.

    Y_i = x W_iᵀ + s · dropout_i(x) Aᵀ B_iᵀ        the three layers share A, of rank 16

The layers have a half, a quarter and a quarter of the N outputs, a bf16 base and float32 adapters. Every contender
except "frozen" concatenates the three results. The contender "frozen" is PyTorch's bf16 F.linear of all N outputs at
once. The lower bound of the time counts the reads of W, x and dY, the writes of Y and dX, and the products with W, A
and B.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ext import ops

from .grid import Variant
from .harness import Comparison, Contender
from .peers import (
    COMPILE_RANDOM,
    SCALING,
    Problem,
    comparison_of,
    compiled,
    frozen,
    functional,
    layer_bytes,
    low_rank_bytes,
    low_rank_flops,
    philox_mask,
)


def _sizes(problem: Problem) -> list[int]:
    return [problem.n // 2, problem.n // 4, problem.n - problem.n // 2 - problem.n // 4]


def _parts(problem: Problem, weight: Tensor, lora_B: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(weight.split(_sizes(problem)), lora_B.split(_sizes(problem)), strict=True))


def _layers(dropout: float, problem: Problem, compile: bool) -> Comparison:
    how = {"training": True}

    def ours(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        weights, bs = zip(*_parts(problem, weight, lora_B), strict=True)
        as_ = [lora_A] * len(bs)
        return torch.cat(ops.lora_linears(x, weights, as_, bs, scalings=SCALING, dropout_ps=dropout, **how), dim=-1)

    def each(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        parts = _parts(problem, weight, lora_B)
        return torch.cat([ops.lora_linear(x, w, lora_A, b, scaling=SCALING, dropout_p=dropout, **how)
                          for w, b in parts], dim=-1)  # fmt: skip

    def eager(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        def low_rank(b: Tensor) -> Tensor:
            return F.linear(F.linear(F.dropout(x, dropout), lora_A.to(x.dtype)), b.to(x.dtype))

        return torch.cat([F.linear(x, w) + SCALING * low_rank(b) for w, b in _parts(problem, weight, lora_B)], dim=-1)

    def masks() -> list[Any]:
        """Returns the dropout mask of each layer, or 1.0 for each layer if no dropout is used. The masks are drawn in
        the order in which the operators draw the layers' seeds."""
        return [philox_mask(problem, dropout)() for _ in range(3)] if dropout else [1.0] * 3

    def formula(linear: Any, x: Tensor, masks: list[Any], lora_A: Tensor, lora_B: Tensor) -> Tensor:
        low = [(x * mask) @ lora_A.t() @ b.t() for mask, b in zip(masks, lora_B.split(_sizes(problem)), strict=True)]
        return linear(x) + SCALING * torch.cat(low, dim=-1)

    names = ("lora_A", "lora_B")
    exact = problem.exact("bf16", formula, names, masks)
    contend = {"ours": ours, "ours, each alone": each, "torch eager": eager}
    if compile:
        contend["torch.compile"] = compiled(eager)

    def make(name: str, forward: Any) -> Contender:
        drawn = COMPILE_RANDOM if dropout and name.startswith("torch") else exact
        return functional(problem, "bf16", forward, names, drawn)

    makers = {name: partial(make, name, forward) for name, forward in contend.items()}
    makers["frozen"] = partial(frozen, problem)
    tokens, k = problem.tokens, problem.k
    # The products of S = dropout(x) Aᵀ, of dA and of the low-rank part of dX are counted for each of the three layers,
    # because with dropout the layers have different masks.
    flops = 4 * tokens * problem.n * k + low_rank_flops(problem) + 2 * 6 * tokens * problem.rank * k
    return comparison_of(makers, layer_bytes(problem, "bf16") + low_rank_bytes(problem), flops)


VARIANTS = (
    Variant("lora_linears", "bf16 base, three layers", partial(_layers, 0.0)),
    Variant("lora_linears", "bf16 base, three layers, dropout 0.05", partial(_layers, 0.05)),
)
