"""Times forward and backward of a language model's loss from its last hidden states h in bf16, by peft_ext and by
transformers' computation, which makes the logits z.

    loss = Σ_t (log Σ_v exp z_tv - z_t[label]) / T        z = h Wᵀ,  V = 49,152; W [V, K] is frozen

The lower bound of the time counts the two products that compute the logits z = h Wᵀ and the gradient dh, two reads of
W, one read of h, and the write of dh.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ext import ops

from .grid import Variant
from .harness import Comparison, Contender
from .peers import Problem, comparison_of, compiled

VOCABULARY = 49_152


def _loss(problem: Problem, compile: bool) -> Comparison:
    generator = torch.Generator(problem.device).manual_seed(0)
    tokens, k = problem.tokens, problem.k
    draw = {"generator": generator, "device": problem.device}
    weight = torch.randn(VOCABULARY, k, **draw).to(torch.bfloat16) * k**-0.5
    hidden = torch.randn(tokens, k, **draw).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (tokens,), **draw)

    def contender(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contender:
        def run() -> Tensor:
            hidden.grad = None
            loss = loss_of(hidden, weight, labels)
            loss.backward()
            return loss.detach()

        return Contender(run, lambda loss: {"loss": loss, "grad": hidden.grad}, exact)

    def exact() -> dict[str, Tensor]:
        # To save memory, float64 logits are made for 128 tokens at a time, and the gradient is computed by its formula.
        wide, loss, grads = weight.double(), 0.0, []
        for part, label in zip(hidden.detach().double().split(128), labels.split(128), strict=True):
            z = part @ wide.T
            loss = loss + F.cross_entropy(z, label, reduction="sum")
            p = z.softmax(-1)
            p[torch.arange(len(label), device=p.device), label] -= 1
            grads.append(p @ wide)
        return {"loss": loss / tokens, "grad": torch.cat(grads) / tokens}

    def stock(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    makers = {"ours": lambda: contender(ops.linear_cross_entropy), "torch eager": lambda: contender(stock)}
    if compile:
        makers["torch.compile"] = lambda: contender(compiled(stock))
    moved = 2 * (2 * VOCABULARY * k + 2 * tokens * k)
    return comparison_of(makers, moved, 4 * tokens * k * VOCABULARY)


VARIANTS = (Variant("linear_cross_entropy", "V=49152", _loss, tokens=(512,)),)
