"""Times the training step of a norm over bf16 activations with a frozen weight, by peft_ext, and by the code of
transformers' RMSNorm and PyTorch's LayerNorm.

    RMSNorm: y = w ∘ x / √(mean x² + eps)        LayerNorm: y = w ∘ (x - μ) / √(mean (x - μ)² + eps) + b

The lower bound of the time counts these bytes: the forward reads x and writes y; the backward reads x and dY and writes
dX.
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
from .peers import Problem, weightless_comparison

EPS = 1e-5


def _norm(kind: str, dtype: torch.dtype, problem: Problem, compile: bool) -> Comparison:
    problem = Problem(problem.tokens, problem.k, problem.k, device=problem.device)
    draw = torch.Generator(problem.device).manual_seed(1)
    vectors = torch.randn(2, problem.k, generator=draw, device=problem.device)
    w, b = (1 + 0.1 * vectors[0]).to(dtype), vectors[1].to(dtype)

    def eager(x: Tensor, weight: Any) -> Tensor:
        if kind == "layer":
            return F.layer_norm(x, x.shape[-1:], w, b, EPS)
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        return (w * h.to(x.dtype)).to(torch.bfloat16)

    def ours(x: Tensor, weight: Any) -> Tensor:
        y = ops.layer_norm(x, w, b, EPS) if kind == "layer" else ops.rms_norm(x, w, EPS)
        return y.to(torch.bfloat16)

    def formula(linear: Any, x: Tensor, mask: Any) -> Tensor:
        if kind == "layer":
            return F.layer_norm(x, x.shape[-1:], w.double(), b.double(), EPS)
        return w.double() * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)

    return weightless_comparison(
        problem,
        compile,
        ours=ours,
        eager=eager,
        formula=formula,
        bytes_moved=5 * 2 * problem.tokens * problem.k,
    )


VARIANTS = (
    Variant("rms_norm", "bf16, frozen weight", partial(_norm, "rms", torch.bfloat16)),
    Variant("layer_norm", "bf16, frozen weight", partial(_norm, "layer", torch.bfloat16)),
)
