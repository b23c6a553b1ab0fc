"""Times forward and backward of a gated activation in bf16, by peft_ext and by plain PyTorch. gate and up are halves of
one tensor, as in Phi-3.

    y = act(gate) ∘ up

The lower bound of the time counts these bytes: the forward reads gate and up and writes y; the backward reads gate, up
and dY and writes the gradients of gate and up.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from peft_ext import ops

from .grid import Variant
from .harness import Comparison
from .peers import Problem, weightless_comparison

STOCK = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def _gated(activation: str, problem: Problem, compile: bool) -> Comparison:
    width = problem.k
    problem = Problem(problem.tokens, 2 * width, width, device=problem.device)
    act = STOCK[activation]

    def eager(gate_up: Tensor, weight: Any) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return act(gate) * up

    return weightless_comparison(
        problem,
        compile,
        ours=lambda gate_up, weight: ops.gated_activation(gate_up, None, activation),
        eager=eager,
        formula=lambda linear, gate_up, mask: eager(gate_up, None),
        bytes_moved=8 * 2 * problem.tokens * width,
    )


VARIANTS = tuple(Variant("gated_activation", f"bf16, {name}", partial(_gated, name)) for name in STOCK)
