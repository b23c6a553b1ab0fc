"""Times one DoRA layer's training step, norm included, with float32 adapters of rank 16, compared with PEFT's layer.

Each step computes DoRA's norm, because the norm changes in every training step. For the norm, the lower bound of the
time counts the operations of ``U = W Aᵀ`` and of ``|W|²``, and no read of W, because the forward reads W anyway. In
mode "peft" the dropout also acts on the base term: the lower bound adds the products of the dropped elements, in the
forward and in the backward. In mode "lora" the dropout acts only on the low-rank term, so that peft_ext and PEFT
compute different functions, and each of the two is verified against a float64 result of its own function.

The norm is also timed by itself, compared with a contender "dense": peft_ext's operator dequantizes W if W is NF4,
PyTorch forms W + s B A, and PyTorch takes the norms of the rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ext import NF4Weight, ops

from .grid import Variant
from .harness import Comparison
from .peers import (
    RANK,
    SCALING,
    Problem,
    comparison_of,
    dense,
    draw_seed,
    functional,
    layer_bytes,
    layer_comparison,
    low_rank_bytes,
    low_rank_flops,
    peft_config,
)


def _layer(base: str, dropout: float, mode: str, problem: Problem, compile: bool) -> Comparison:
    tokens, k, n, r = problem.tokens, problem.k, problem.n, problem.rank

    def ours(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
        return ops.dora_linear(
            x, weight, lora_A, lora_B, magnitude, scaling=SCALING, dropout_p=dropout, training=True,
            dropout_mode=mode, seed=draw_seed(problem) if dropout else None,
        )  # fmt: skip

    def eager(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
        held = dense(weight)
        adapted = held + (SCALING * lora_B.detach() @ lora_A.detach()).to(x.dtype)
        scale = (magnitude / adapted.norm(dim=1)).to(x.dtype)
        dropped = F.dropout(x, dropout)
        low_rank = SCALING * F.linear(F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype))
        y = F.linear(x, held)
        return y + (scale - 1) * (F.linear(dropped, held) if dropout else y) + scale * low_rank

    def scale_of(lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
        return magnitude / (problem.wide_weight(base) + SCALING * lora_B @ lora_A).norm(dim=1).detach()

    def formula(linear: Any, x: Tensor, mask: Any, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
        low_rank = SCALING * ((x * mask) @ lora_A.t() @ lora_B.t())
        return scale_of(lora_A, lora_B, magnitude) * (linear(x) + low_rank)

    def peft_formula(linear: Any, x: Tensor, mask: Any, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
        scale, dropped = scale_of(lora_A, lora_B, magnitude), x * mask
        low_rank = SCALING * (dropped @ lora_A.t() @ lora_B.t())
        return linear(x) + (scale - 1) * linear(dropped) + scale * low_rank

    drops_base = bool(dropout) and mode == "peft"
    theirs = peft_formula if dropout else formula
    return layer_comparison(
        problem,
        base,
        compile,
        ours=ours,
        eager=eager,
        formula=theirs if mode == "peft" else formula,
        peft_formula=theirs,
        config=lambda: peft_config(
            "LoraConfig", r=RANK, lora_alpha=SCALING * RANK, lora_dropout=dropout, use_dora=True
        ),
        where={
            "lora_A": "lora_A.default.weight",
            "lora_B": "lora_B.default.weight",
            "magnitude": "lora_magnitude_vector.default.weight",
        },
        # In addition to the bytes of a LoRA layer, DoRA reads the magnitude, writes the magnitude's gradient, and for
        # this gradient reads the layer's result before scaling once more.
        bytes_moved=layer_bytes(problem, base) + low_rank_bytes(problem) + 2 * tokens * n + 2 * 4 * n,
        flops=round(4 * (1 + dropout * drops_base) * tokens * n * k) + low_rank_flops(problem) + 2 * n * k * (r + 1),
        dropout=dropout,
    )


def _norm(base: str, problem: Problem, compile: bool) -> Comparison:
    def ours(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return ops.dora_weight_norm(weight, lora_A, lora_B, SCALING)

    def formed(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        held = ops.nf4_dequantize(weight, torch.bfloat16) if isinstance(weight, NF4Weight) else weight
        return torch.linalg.norm(held + (SCALING * (lora_B @ lora_A)).to(held.dtype), dim=1)

    def exact() -> dict[str, Tensor]:
        lora_A, lora_B = (problem.adapters.items[0][name].detach().double() for name in ("lora_A", "lora_B"))
        return {"y": (problem.wide_weight(base) + SCALING * lora_B @ lora_A).norm(dim=1)}

    def contender(forward: Any) -> Any:
        return functional(problem, base, forward, ("lora_A", "lora_B"), exact, training=False)

    makers = {"ours": lambda: contender(ours), "dense": lambda: contender(formed)}
    k, n, r = problem.k, problem.n, problem.rank
    moved = problem.weight_bytes(base) + 4 * r * (k + n) + 4 * n
    return comparison_of(makers, moved, 2 * n * k * (r + 1))


VARIANTS = (
    *(
        Variant("dora_weight_norm", f"{name} base", partial(_norm, base), (None,), graph=True)
        for base, name in (("bf16", "bf16"), ("nf4", "NF4"))
    ),
    Variant("dora_linear", "bf16 base", partial(_layer, "bf16", 0.0, "lora"), everywhere=True),
    Variant("dora_linear", "bf16 base, dropout 0.05 on the low rank", partial(_layer, "bf16", 0.05, "lora")),
    Variant("dora_linear", "bf16 base, dropout 0.05 as PEFT", partial(_layer, "bf16", 0.05, "peft")),
    Variant("dora_linear", "NF4 base, dropout 0.05 on the low rank", partial(_layer, "nf4", 0.05, "lora")),
    Variant("dora_linear", "NF4 base, dropout 0.05 as PEFT", partial(_layer, "nf4", 0.05, "peft"), everywhere=True),
)
