"""Times dropout by itself, forward and backward, over bf16 and float32 activations, compared with PyTorch's dropout.

    y = mask ∘ x / (1 - p)

PyTorch writes the mask in the forward and reads the mask in the backward. The lower bound of the time counts that x and
dY are read and that y and dX are written.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ext import ops, reference

from .grid import Variant
from .harness import Comparison
from .peers import Problem, draw_seed, weightless_comparison


def _dropout(p: float, dtype: torch.dtype, problem: Problem, compile: bool) -> Comparison:
    problem = Problem(problem.tokens, problem.k, problem.k, device=problem.device)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return ops.dropout(x.to(dtype), p, seed=draw_seed(problem)).to(x.dtype)

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return F.dropout(x.to(dtype), p).to(x.dtype)

    def mask() -> Tensor:
        return reference.dropout_keep_mask(draw_seed(problem), p, torch.Size((problem.tokens, problem.k))) / (1 - p)

    moved = 4 * dtype.itemsize * problem.tokens * problem.k
    return weightless_comparison(problem, compile, ours=ours, eager=eager, formula=lambda linear, x, drawn: x * drawn,
                                 bytes_moved=moved, mask=mask)  # fmt: skip


VARIANTS = tuple(
    Variant("dropout", f"{name}, p 0.1", partial(_dropout, 0.1, dtype), tokens=(512, 2048), devices=("cpu",))
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32))
)
