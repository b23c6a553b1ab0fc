"""Attention of q, k and v in bf16, heads of 64, a fourth as many for k and v, against PyTorch's own.

    softmax(scale q kᵀ) v, query i over the keys j <= i

Sequences of 512 tokens, as many as there are. q is of K columns, k and v are of K / 4; they are views of one x. The
floor multiplies what is seen, seven products of half the scores; PyTorch's function is given no mask, so that it takes
its fastest way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ext import ops

from .grid import Variant
from .harness import Comparison
from .peers import Problem, weightless_comparison

HEAD, GROUPS, SEQUENCE = 64, 4, 512


def _attention(problem: Problem, compile: bool) -> Comparison:
    tokens, heads = problem.tokens, problem.k // HEAD
    kv_heads = heads // GROUPS
    width = (heads + 2 * kv_heads) * HEAD
    problem = Problem(tokens, width, heads * HEAD, device=problem.device)

    def split(x: Tensor) -> tuple[Tensor, ...]:
        return x.view(-1, SEQUENCE, heads + 2 * kv_heads, HEAD).transpose(1, 2).split((heads, kv_heads, kv_heads), 1)

    def joined(y: Tensor) -> Tensor:
        return y.transpose(1, 2).reshape(tokens, heads * HEAD)

    def formula(x: Tensor, mask: Tensor) -> Tensor:
        found = []
        for sequence in x.split(SEQUENCE):
            q, k, v = split(sequence)
            k, v = (part.repeat_interleave(GROUPS, 1) for part in (k, v))
            scores = (q @ k.mT) * HEAD**-0.5
            hidden = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool, device=x.device).triu(1)
            found.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(-2)[0])
        return torch.cat(found)

    return weightless_comparison(
        problem,
        compile,
        ours=lambda x, weight: joined(ops.scaled_dot_product_attention(*split(x), is_causal=True)),
        eager=lambda x, weight: joined(F.scaled_dot_product_attention(*split(x), is_causal=True, enable_gqa=True)),
        formula=lambda linear, x, mask: formula(x, mask),
        names=(),
        bytes_moved=2 * 2 * 2 * tokens * (heads + kv_heads) * HEAD,
        flops=7 * tokens * SEQUENCE * heads * HEAD,
    )


VARIANTS = (
    Variant(
        "scaled_dot_product_attention", "bf16, causal, heads of 64", _attention, tokens=(512, 2048), devices=("cpu",)
    ),
)
