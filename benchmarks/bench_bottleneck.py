"""Times a bottleneck adapter's training step with bf16 activations and float32 parameters, compared with plain PyTorch.

    Y = x + gelu(x Dᵀ) Vᵀ        D [64, K] and V [K, 64] are trained

PEFT has no bottleneck adapters. The lower bound of the time counts the three products with D and the three with V, two
reads of x and of dY, and the writes of Y and dX.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ext import ops

from .grid import Variant
from .harness import Comparison
from .peers import Problem, weightless_comparison


def _adapter(problem: Problem, compile: bool) -> Comparison:
    problem = Problem(problem.tokens, problem.k, problem.k, rank=64, device=problem.device)
    tokens, k, size = problem.tokens, problem.k, problem.rank

    def eager(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return x + F.linear(F.gelu(F.linear(x.float(), lora_A)), lora_B).to(torch.bfloat16)

    return weightless_comparison(
        problem,
        compile,
        ours=lambda x, weight, a, b: ops.bottleneck_adapter(x, a, None, b, None),
        eager=eager,
        formula=lambda linear, x, mask, lora_A, lora_B: x + F.gelu(x @ lora_A.T) @ lora_B.T,
        names=("lora_A", "lora_B"),
        bytes_moved=6 * 2 * tokens * k,
        flops=12 * tokens * k * size,
    )


VARIANTS = (Variant("bottleneck_adapter", "float32 parameters", _adapter),)
