"""Times one IA3 layer's training step over a bf16 or NF4 base, compared with PEFT's layer. Times IA3's scaling alone,
too.

    output: Y = l∘(x Wᵀ)        feedforward: Y = (l∘x) Wᵀ        the trained l is float32

The lower bound of the time counts the frozen layer's two products, and one more read of Y ("output") or x
("feedforward") for the gradient of l.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ext import ops

from .grid import Variant
from .harness import Comparison
from .peers import Problem, dense, layer_bytes, layer_comparison, peft_config, weightless_comparison


def _layer(base: str, feedforward: bool, problem: Problem, compile: bool) -> Comparison:
    name = "ia3_in" if feedforward else "ia3_out"

    def ours(x: Tensor, weight: Any, ia3_l: Tensor) -> Tensor:
        return ops.ia3_linear(x, weight, ia3_l, feedforward=feedforward)

    def eager(x: Tensor, weight: Any, ia3_l: Tensor) -> Tensor:
        if feedforward:
            return F.linear(x * ia3_l.to(x.dtype), dense(weight))
        return F.linear(x, dense(weight)) * ia3_l.to(x.dtype)

    def formula(linear: Any, x: Tensor, mask: Any, **held: Tensor) -> Tensor:
        return linear(x * held[name]) if feedforward else linear(x) * held[name]

    tokens, k, n = problem.tokens, problem.k, problem.n
    return layer_comparison(
        problem,
        base,
        compile,
        ours=ours,
        eager=eager,
        formula=formula,
        config=lambda: peft_config("IA3Config", feedforward_modules=["proj"] if feedforward else []),
        where={name: "ia3_l.default"},
        bytes_moved=layer_bytes(problem, base) + (2 * tokens + 2 * 4) * (k if feedforward else n),
        flops=4 * tokens * n * k,
    )


def _scale(problem: Problem, compile: bool) -> Comparison:
    """Compares peft_ext and PyTorch in forward and backward of ``y = x∘l``. The lower bound of the time counts two
    reads of x, one read of dY, and the writes of y and dX."""
    problem = Problem(problem.tokens, problem.k, problem.k, device=problem.device)

    def eager(x: Tensor, weight: Any, ia3_l: Tensor) -> Tensor:
        return (x * ia3_l).to(torch.bfloat16)

    return weightless_comparison(
        problem,
        compile,
        ours=lambda x, weight, ia3_l: ops.ia3_scale(x, ia3_l),
        eager=eager,
        formula=lambda linear, x, mask, ia3_in: x * ia3_in,
        names=("ia3_in",),
        bytes_moved=5 * 2 * problem.tokens * problem.k + 2 * 4 * problem.k,
    )


VARIANTS = (
    Variant("ia3_linear", "bf16 base, output", partial(_layer, "bf16", False), everywhere=True),
    Variant("ia3_linear", "bf16 base, feedforward", partial(_layer, "bf16", True)),
    Variant("ia3_linear", "NF4 base, output", partial(_layer, "nf4", False)),
    Variant("ia3_scale", "bf16", _scale),
)
