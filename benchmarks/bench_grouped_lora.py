"""Times a mixed batch: eight samples of one batch, each with its own adapter, in a forward without autograd.

T tokens are eight samples of T / 8 tokens, or T samples of one token if T is below 8. With T = 8 each sample has one
token, as in generation. PEFT (``adapter_names``) computes one adapter after the other: PEFT takes the adapter's samples
out of x and adds the adapter's term to the output's rows of these samples. The lower bound of the time counts the
frozen layer's product and the two products of the low-rank term. The contender "frozen" is PyTorch's bf16 F.linear
without adapters.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ext import ops
from peft_ext.bench.layer import stock_name

from .grid import Variant
from .harness import Comparison, Contender
from .peers import RANK, SCALING, Problem, Turns, comparison_of, dense, frozen, peft_config, stock_linear

ADAPTERS = 8
SETS = 4  # number of sets of adapters; the sets take turns, so that no set stays in a cache

Adapters = tuple[list[Tensor], list[Tensor]]


def _sets(problem: Problem, count: int) -> Turns[Adapters]:
    draw = torch.Generator(problem.device).manual_seed(1)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=draw, device=problem.device) * std

    first = (
        [normal(RANK, problem.k, std=(3 * problem.k) ** -0.5) for _ in range(count)],
        [normal(problem.n, RANK, std=0.02) for _ in range(count)],
    )
    copies = [([a.clone() for a in first[0]], [b.clone() for b in first[1]]) for _ in range(SETS - 1)]
    return Turns([first, *copies])


def _mixed(base: str, problem: Problem, compile: bool) -> Comparison:
    count = min(ADAPTERS, problem.tokens)
    samples = problem.x.detach().view(count, problem.tokens // count, problem.k)
    sets, weights, order = _sets(problem, count), problem.weights(base), list(range(count))

    def exact() -> dict[str, Tensor]:
        lora_A, lora_B = sets.items[0]
        y = samples.double() @ problem.wide_weight(base).t()
        delta = [
            SCALING * x.double() @ a.double().t() @ b.double().t()
            for x, a, b in zip(samples, lora_A, lora_B, strict=True)
        ]
        return {"y": y + torch.stack(delta)}

    held: list[Any] = []

    def take() -> None:
        held[:] = (weights.next(), *sets.next())

    @torch.no_grad()
    def ours() -> Tensor:
        weight, lora_A, lora_B = held
        return ops.grouped_lora_linear(samples, weight, lora_A, lora_B, order, scaling=[SCALING] * count)

    @torch.no_grad()
    def eager() -> Tensor:
        weight, lora_A, lora_B = held
        y = F.linear(samples, dense(weight))
        low_rank = torch.bmm(torch.bmm(samples.float(), torch.stack(lora_A).mT), torch.stack(lora_B).mT)
        return y + (SCALING * low_rank).to(y.dtype)

    def contender(run: Any) -> Contender:
        return Contender(run, lambda y: {"y": y}, exact, take)

    makers = {
        "ours": lambda: contender(ours),
        stock_name(base): lambda: _peft(problem, base, sets, samples, exact),
        "torch eager": lambda: contender(eager),
        "frozen": lambda: frozen(problem, training=False),
    }
    t, k, n = problem.tokens, problem.k, problem.n
    moved = problem.weight_bytes(base) + 2 * t * (k + n) + 4 * count * RANK * (k + n)
    return comparison_of(makers, moved, 2 * t * n * k + 2 * t * RANK * (k + n))


def _peft(problem: Problem, base: str, sets: Turns[Adapters], samples: Tensor, exact: Any) -> Contender:
    """Returns the contender "PEFT": a call of PEFT's layer with ``adapter_names``, with an adapter of its own for each
    sample."""
    from peft import get_peft_model

    model, set_next_weight = stock_linear(problem, base)
    config = peft_config("LoraConfig", r=RANK, lora_alpha=SCALING * RANK)
    names = [f"adapter{i}" for i in range(len(samples))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config, names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
    layer = model.base_model.model.proj.eval()

    def take() -> None:
        set_next_weight(layer.base_layer)
        for name, a, b in zip(names, *sets.next(), strict=True):
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = a, b

    @torch.no_grad()
    def run() -> Tensor:
        return layer(samples, adapter_names=names)

    return Contender(run, lambda y: {"y": y}, exact, take)


VARIANTS = tuple(
    Variant(
        "grouped_lora_linear", f"{name} base, {ADAPTERS} adapters", partial(_mixed, base), (8, 512), everywhere=True
    )
    for base, name in (("bf16", "bf16"), ("nf4", "NF4"))
)
