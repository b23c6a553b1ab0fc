"""Compares one operator for the activation and the layer with two operators, in a training step of LoRA on a gated
activation.

    h = silu(x) ∘ up      Y = h Wᵀ + s · dropout(h) Aᵀ Bᵀ

The layer has a bf16 base and a float32 adapter of rank 16; up is a constant. The contender "frozen" is PyTorch's
activation and bf16 F.linear, with the gradient of x. The lower bound of the time counts the reads of x, up, W and dY in
the forward and the backward, the writes of h, Y and dX, and the products with W, A and B. up needs no gradient, but
both contenders of peft_ext write the gradient of up, so that the lower bound counts this write.
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
    functional,
    layer_bytes,
    low_rank_bytes,
    low_rank_flops,
    philox_mask,
)


def _layer(dropout: float, problem: Problem, compile: bool) -> Comparison:
    drawn = torch.Generator().manual_seed(5)
    up = torch.randn(problem.x.shape, generator=drawn).to(problem.x)
    how = {"scaling": SCALING, "dropout_p": dropout, "training": True}

    def ours(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return ops.gated_lora_linear(x, up, "silu", weight, lora_A, lora_B, **how)

    def apart(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return ops.lora_linear(ops.gated_activation(x, up, "silu"), weight, lora_A, lora_B, **how)

    def eager(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        h = F.silu(x) * up
        low_rank = F.linear(F.linear(F.dropout(h, dropout), lora_A.to(x.dtype)), lora_B.to(x.dtype))
        return F.linear(h, weight) + SCALING * low_rank

    def frozen(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(F.silu(x) * up, weight)

    def formula(linear: Any, x: Tensor, mask: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        h = F.silu(x) * up.double()
        return linear(h) + SCALING * (h * mask) @ lora_A.t() @ lora_B.t()

    names = ("lora_A", "lora_B")
    exact = problem.exact("bf16", formula, names, philox_mask(problem, dropout) if dropout else None)
    without = problem.exact("bf16", lambda linear, x, mask: linear(F.silu(x) * up.double()))
    contend = {"ours": ours, "ours, two operators": apart, "torch eager": eager}
    if compile:
        contend["torch.compile"] = compiled(eager)

    def make(name: str, forward: Any) -> Contender:
        of_name = COMPILE_RANDOM if dropout and name.startswith("torch") else exact
        return functional(problem, "bf16", forward, names, of_name)

    makers = {name: partial(make, name, forward) for name, forward in contend.items()}
    makers["frozen"] = lambda: functional(problem, "bf16", frozen, (), without)
    moved = layer_bytes(problem, "bf16") + low_rank_bytes(problem) + 2 * 4 * problem.tokens * problem.k
    flops = 4 * problem.tokens * problem.n * problem.k + low_rank_flops(problem)
    return comparison_of(makers, moved, flops)


VARIANTS = (
    Variant("gated_lora_linear", "bf16 base", partial(_layer, 0.0)),
    Variant("gated_lora_linear", "bf16 base, dropout 0.05", partial(_layer, 0.05)),
)
