"""Three LoRA layers of one input, with half, a quarter and a quarter of N, in a training step: together and each alone.

    Y_i = x W_iᵀ + s · dropout_i(x) Aᵀ B_iᵀ        A: one for all three, of rank 16

bf16 base and float32 adapters. The results are set side by side, in all contenders alike. "frozen" is PyTorch's bf16
F.linear of all N at once. The floor: W, x and dY read, Y and dX written, and the products of W and of the ranks.
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
    compiled,
    frozen,
    functional,
    gather,
    layer_bytes,
    low_rank_bytes,
    low_rank_flops,
)


def _parts(problem: Problem, weight: Tensor, lora_B: Tensor) -> list[tuple[Tensor, Tensor]]:
    sizes = [problem.n // 2, problem.n // 4, problem.n - problem.n // 2 - problem.n // 4]
    return list(zip(weight.split(sizes), lora_B.split(sizes), strict=True))


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

    def formula(linear: Any, x: Tensor, mask: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return linear(x) + SCALING * (x @ lora_A.t() @ lora_B.t())

    names = ("lora_A", "lora_B")
    # Each layer has a mask of its own, which no formula here has: with dropout nothing is compared.
    exact = COMPILE_RANDOM if dropout else problem.exact("bf16", formula, names)
    contend = {"ours": ours, "ours, each alone": each, "torch eager": eager}
    if compile:
        contend["torch.compile"] = compiled(eager)

    def make(forward: Any) -> Contender:
        return functional(problem, "bf16", forward, names, exact)

    makers = {name: partial(make, forward) for name, forward in contend.items()}
    makers["frozen"] = partial(frozen, problem)
    contenders, absent = gather(makers)
    tokens, k = problem.tokens, problem.k
    # x's part of the ranks is there three times.
    flops = 4 * tokens * problem.n * k + low_rank_flops(problem) + 2 * 6 * tokens * problem.rank * k
    return Comparison(contenders, layer_bytes(problem, "bf16") + low_rank_bytes(problem), flops, absent=absent)


VARIANTS = (
    Variant("lora_linears", "bf16 base, three layers", partial(_layers, 0.0)),
    Variant("lora_linears", "bf16 base, three layers, dropout 0.05", partial(_layers, 0.05)),
)
