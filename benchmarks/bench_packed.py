"""Times layers over packed weights: LoRA's training step with dropout, and the forward of few tokens without adapter.

The contender "frozen" is PyTorch's bf16 F.linear on a dense bf16 weight of the same shape, with the gradient of x in a
training step. The contender "PyTorch decode" decodes the weight with PyTorch's operators and multiplies in bf16.
bitsandbytes' own product is a contender only in the forward over FP4.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from peft_ext import ops

from .grid import Variant
from .harness import Comparison, Contender
from .packed_bases import PACKED
from .peers import (
    SCALING,
    Problem,
    comparison_of,
    dense,
    draw_seed,
    frozen,
    functional,
    layer_bytes,
    low_rank_bytes,
    low_rank_flops,
    philox_mask,
    torch_mask,
    value_of,
)

_DROPOUT = 0.05


def _layer(base: str, problem: Problem, compile: bool) -> Comparison:
    def ours(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return ops.lora_linear(x, weight, lora_A, lora_B, scaling=SCALING, dropout_p=_DROPOUT, training=True,
                               seed=draw_seed(problem))  # fmt: skip

    def decoded(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        low_rank = F.linear(F.linear(F.dropout(x, _DROPOUT), lora_A.to(x.dtype)), lora_B.to(x.dtype))
        return F.linear(x, dense(weight)) + SCALING * low_rank

    def formula(linear: Any, x: Tensor, mask: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return linear(x) + SCALING * ((x * mask) @ lora_A.t() @ lora_B.t())

    names = ("lora_A", "lora_B")
    exact = problem.exact(base, formula, names, philox_mask(problem, _DROPOUT))
    theirs = problem.exact(base, formula, names, torch_mask(problem, _DROPOUT, problem.x.dtype))
    makers = {
        "ours": lambda: functional(problem, base, ours, names, exact),
        "PyTorch decode": lambda: functional(problem, base, decoded, names, theirs),
        "frozen": lambda: frozen(problem),
    }
    flops = 4 * problem.tokens * problem.n * problem.k + low_rank_flops(problem)
    return comparison_of(makers, layer_bytes(problem, base) + low_rank_bytes(problem), flops)


def _few_tokens(base: str, problem: Problem, compile: bool) -> Comparison:
    exact = value_of(problem.exact(base, lambda linear, x, mask: linear(x)))

    def contender(forward: Any, **options: Any) -> Contender:
        return functional(problem, base, forward, (), exact, training=False, **options)

    def bitsandbytes() -> Contender:
        from bitsandbytes import matmul_4bit
        from bitsandbytes.functional import QuantState, get_4bit_type

        if base != "FP4":
            raise ImportError("bitsandbytes has no such weight")

        def enter(weight: Any) -> Any:
            packed, absmax, *_ = weight.parts
            state = QuantState(absmax=absmax, shape=weight.shape, code=get_4bit_type("fp4", device="cpu"),
                               blocksize=weight.group, quant_type="fp4", dtype=problem.x.dtype)  # fmt: skip
            return packed.view(-1, 1), state

        return contender(lambda x, found: matmul_4bit(x, found[0].t(), found[1]), enter=enter)

    makers = {
        "ours": lambda: contender(ops.frozen_linear),
        "PyTorch decode": lambda: contender(lambda x, weight: F.linear(x, dense(weight))),
        "bitsandbytes": bitsandbytes,
        "frozen": lambda: frozen(problem, training=False),
    }
    tokens, k, n = problem.tokens, problem.k, problem.n
    moved = problem.weight_bytes(base) + 2 * tokens * (k + n)
    return comparison_of(makers, moved, 2 * tokens * n * k, reads=tokens <= 16)


VARIANTS = (
    *(Variant("nf4_linear", f"{base}, few tokens", partial(_few_tokens, base), (1, 4, 8, 16)) for base in PACKED),
    *(Variant("lora_linear", f"{base} base, dropout 0.05", partial(_layer, base), (512, 2048), everywhere=True)
      for base in PACKED),
)  # fmt: skip
