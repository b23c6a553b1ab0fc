"""Times forward and backward of attention in bf16 or float32, compared with PyTorch's function.

    dropout(softmax(scale q kᵀ + bias)) v        query i sees all keys, or the keys j <= i (causal)

The tokens are cut into sequences of 512, and a head has 64 values. k and v have a fourth of the heads of q; q, k and v
are views of one tensor x. The lower bound of the time counts seven matrix products of queries x keys x 64 for each
head, or half of each product in causal attention. Without bias PyTorch's function gets no mask, so that its fastest
kernel runs. With dropout PyTorch's function computes the plain formula. The bias is one matrix for each head and the
same for all sequences, like T5's relative positions.
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

HEAD, GROUPS, SEQUENCE = 64, 4, 512


def _attention(
    problem: Problem, compile: bool, causal: bool, p: float = 0.0, dtype: torch.dtype = torch.bfloat16,
    biased: bool = False,
) -> Comparison:  # fmt: skip
    tokens, heads = problem.tokens, problem.k // HEAD
    kv_heads, sequences = heads // GROUPS, tokens // SEQUENCE
    parts = (heads, kv_heads, kv_heads)
    problem = Problem(tokens, sum(parts) * HEAD, heads * HEAD, device=problem.device)

    bias = torch.randn(1, heads, SEQUENCE, SEQUENCE, generator=torch.Generator().manual_seed(0)) if biased else None

    def split(x: Tensor) -> tuple[Tensor, ...]:
        return x.view(-1, SEQUENCE, sum(parts), HEAD).transpose(1, 2).split(parts, 1)

    def joined(y: Tensor) -> Tensor:
        return y.transpose(1, 2).reshape(-1, heads * HEAD)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        how = {"is_causal": causal, "dropout_p": p, "training": True, "seed": draw_seed(problem) if p else None}
        how["bias"] = None if bias is None else bias.to(dtype)
        return joined(ops.scaled_dot_product_attention(*split(x.to(dtype)), **how)).to(x.dtype)

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        how = {"is_causal": causal, "dropout_p": p, "enable_gqa": True}
        how["attn_mask"] = None if bias is None else bias.to(dtype)
        return joined(F.scaled_dot_product_attention(*split(x.to(dtype)), **how)).to(x.dtype)

    def mask() -> Tensor:
        keep = reference.dropout_keep_mask(draw_seed(problem), p, torch.Size((sequences, heads, SEQUENCE, SEQUENCE)))
        return keep.mT / (1 - p)

    def formula(linear: object, x: Tensor, drawn: Tensor | float) -> Tensor:
        found = []
        for i, sequence in enumerate(x.split(SEQUENCE)):
            q, k, v = split(sequence)
            k, v = (part.repeat_interleave(GROUPS, 1) for part in (k, v))
            scores = (q @ k.mT) * HEAD**-0.5
            if bias is not None:
                scores = scores + bias.to(dtype).to(scores.dtype)
            if causal:
                hidden = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool, device=x.device).triu(1)
                scores = scores.masked_fill(hidden, float("-inf"))
            found.append(joined((scores.softmax(-1) * (drawn[i] if p else 1.0)) @ v))
        return torch.cat(found)

    seen = tokens * SEQUENCE // (2 if causal else 1)
    moved = 2 * 2 * dtype.itemsize * tokens * (heads + kv_heads) * HEAD
    return weightless_comparison(problem, compile, ours=ours, eager=eager, formula=formula, bytes_moved=moved,
                                 flops=14 * seen * heads * HEAD, mask=mask if p else None)  # fmt: skip


def _variant(
    case: str, causal: bool, p: float = 0.0, dtype: torch.dtype = torch.bfloat16, biased: bool = False
) -> Variant:
    build = partial(_attention, causal=causal, p=p, dtype=dtype, biased=biased)
    return Variant("scaled_dot_product_attention", case, build, tokens=(512, 2048), devices=("cpu",))


VARIANTS = (
    _variant("bf16, causal", True),
    _variant("bf16, causal, dropout 0.1", True, 0.1),
    _variant("bf16, all keys", False),
    _variant("bf16, all keys, dropout 0.1", False, 0.1),
    _variant("bf16, all keys, bias", False, biased=True),
    _variant("bf16, all keys, bias, dropout 0.1", False, 0.1, biased=True),
    _variant("float32, causal", True, dtype=torch.float32),
    _variant("float32, all keys", False, dtype=torch.float32),
)
