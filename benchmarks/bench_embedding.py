"""Times forward and backward of LoRA over a frozen embedding, by peft_ext and, as PEFT's layer computes it, by plain
PyTorch.

    Y = x + W[i] + s A[:, i]ᵀ Bᵀ

The indices i are [T], the table W is [V, N], A is [R, V], B is [N, R], and x and Y are [T, N]; in this benchmark V = N.
Each contender adds x to the result, because every comparison checks a gradient of x. The lower bound of the time counts
the products with A and B, the reads of the rows of W and of A that the indices name, and five reads or writes of a bf16
matrix [T, N], such as x, Y and their gradients.
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
from .peers import Problem, dense, weightless_comparison

SCALING = 2.0


def _embedding(base: str, problem: Problem, compile: bool) -> Comparison:
    problem = Problem(problem.tokens, problem.k, problem.k, device=problem.device)
    tokens, n, rank = problem.tokens, problem.k, problem.rank
    indices = torch.randint(n, (tokens,), generator=torch.Generator().manual_seed(0)).to(problem.device)

    # The problem has a linear layer's adapters lora_A [R, N] and lora_B [V, R]. The embedding's A is lora_B transposed,
    # and the embedding's B is lora_A transposed.
    def ours(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return x + ops.lora_embedding(indices, weight, lora_B.t(), lora_A.t(), scaling=SCALING)

    def eager(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        low_rank = F.embedding(indices, lora_B) @ lora_A
        return x + (F.embedding(indices, dense(weight)) + SCALING * low_rank).to(x.dtype)

    def formula(linear: Any, x: Tensor, mask: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        table = linear(torch.eye(n, dtype=torch.float64, device=x.device)).t()
        return x + table[indices] + SCALING * lora_B[indices] @ lora_A

    row = n / 2 if base == "nf4" else 2 * n  # bytes of a row of the table W
    return weightless_comparison(
        problem, compile, ours=ours, eager=eager, formula=formula, names=("lora_A", "lora_B"), base=base,
        bytes_moved=tokens * (row + 4 * rank + 5 * 2 * n), flops=6 * tokens * rank * n,
    )  # fmt: skip


VARIANTS = tuple(
    Variant("lora_embedding", f"{name} table", partial(_embedding, base), tokens=(512, 2048), devices=("cpu",))
    for name, base in (("bf16", "bf16"), ("NF4", "nf4"))
)
