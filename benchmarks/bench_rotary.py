"""Times forward and backward of rotary positions of q and k in bf16, compared with transformers' code.

    y = x ∘ cos + rotate_half(x) ∘ sin

A head has 128 values, and k has a fourth of the heads of q. The lower bound of the time counts one read and one write
of q and k in the forward, and of the gradients of q and k in the backward. q and k are views of one tensor x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_ext import ops

from .grid import Variant
from .harness import Comparison
from .peers import Problem, weightless_comparison

HEAD, GROUPS = 128, 4


def _half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., HEAD // 2 :], x[..., : HEAD // 2]), -1)


def _rotary(problem: Problem, compile: bool) -> Comparison:
    tokens, heads = problem.tokens, problem.k // HEAD
    width = problem.k + problem.k // GROUPS
    problem = Problem(tokens, width, width, device=problem.device)
    turns = torch.arange(HEAD // 2, device=problem.device) * (-2.0 / HEAD)
    angles = torch.arange(tokens, device=problem.device)[:, None] * 10000.0**turns
    angles = torch.cat((angles, angles), -1)[None]
    cos, sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = x.view(1, tokens, -1, HEAD).transpose(1, 2).split((heads, heads // GROUPS), 1)
        return q, k

    def joined(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat((q, k), 1).transpose(1, 2).reshape(tokens, width)

    def stock(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = ((part * cos) + (_half(part) * sin) for part in split(x))
        return joined(q, k)

    return weightless_comparison(
        problem,
        compile,
        ours=lambda x, weight: joined(*ops.rotary_embedding(*split(x), cos, sin)),
        eager=lambda x, weight: stock(x, cos, sin),
        formula=lambda linear, x, mask: stock(x, cos.double(), sin.double()),
        bytes_moved=4 * 2 * tokens * width,
    )


VARIANTS = (Variant("rotary_embedding", "bf16, heads of 128", _rotary),)
