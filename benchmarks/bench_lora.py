"""Times a LoRA or AdaLoRA layer's training step with float32 adapters of rank 16, compared with PEFT's own layer.

The lower bound of the time counts the frozen layer's two products and the adapter's six products. The contender
"frozen" is PyTorch's bf16 F.linear without adapter, forward and backward: ``frozen 0.80x`` says that the frozen layer
takes 0.80 of the time of peft_ext's adapted layer. On a GPU, Unsloth's autograd function is a peer in the LoRA cases
without dropout.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from peft_ext import NF4Weight, ops

from .grid import Variant
from .harness import Comparison, Contender
from .peers import (
    RANK,
    SCALING,
    Exact,
    Problem,
    dense,
    draw_seed,
    functional,
    layer_bytes,
    layer_comparison,
    low_rank_bytes,
    low_rank_flops,
    peft_config,
)

_ADALORA_SCALING = SCALING * RANK / (RANK + 1e-5)  # PEFT's scaling of AdaLoRA is alpha / (unpruned ranks + 1e-5)


def _layer(base: str, dropout: float, problem: Problem, compile: bool) -> Comparison:
    def ours(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        seed = draw_seed(problem) if dropout else None
        return ops.lora_linear(x, weight, lora_A, lora_B, scaling=SCALING, dropout_p=dropout, training=True, seed=seed)

    def eager(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        low_rank = F.linear(F.linear(F.dropout(x, dropout), lora_A.to(x.dtype)), lora_B.to(x.dtype))
        return F.linear(x, dense(weight)) + SCALING * low_rank

    def formula(linear: Any, x: Tensor, mask: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return linear(x) + SCALING * ((x * mask) @ lora_A.t() @ lora_B.t())

    def unsloth(exact: Exact) -> Contender:
        from unsloth.kernels.fast_lora import LoRA_W

        def forward(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor) -> Tensor:
            state = getattr(weight, "quant_state", None)
            return LoRA_W.apply(x.unsqueeze(0), weight, state, lora_A, lora_B, SCALING).squeeze(0)

        enter = NF4Weight.to_bitsandbytes if base == "nf4" else lambda weight: weight
        return functional(problem, base, forward, ("lora_A", "lora_B"), exact, enter=enter)

    return layer_comparison(
        problem,
        base,
        compile,
        ours=ours,
        eager=eager,
        formula=formula,
        config=lambda: peft_config("LoraConfig", r=RANK, lora_alpha=SCALING * RANK, lora_dropout=dropout),
        where={"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"},
        bytes_moved=layer_bytes(problem, base) + low_rank_bytes(problem),
        flops=4 * problem.tokens * problem.n * problem.k + low_rank_flops(problem),
        dropout=dropout,
        more={"Unsloth": unsloth} if problem.device == "cuda" and not dropout else None,
    )


def _adalora(problem: Problem, compile: bool) -> Comparison:
    def ours(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor, lora_E: Tensor) -> Tensor:
        return ops.lora_linear(x, weight, lora_A, lora_B, scaling=_ADALORA_SCALING, rank_scale=lora_E)

    def eager(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor, lora_E: Tensor) -> Tensor:
        scaled = (_ADALORA_SCALING * lora_A * lora_E[:, None]).to(x.dtype)
        return F.linear(x, dense(weight)) + F.linear(F.linear(x, scaled), lora_B.to(x.dtype))

    def formula(linear: Any, x: Tensor, mask: Any, lora_A: Tensor, lora_B: Tensor, lora_E: Tensor) -> Tensor:
        return linear(x) + _ADALORA_SCALING * ((x @ lora_A.t() * lora_E) @ lora_B.t())

    return layer_comparison(
        problem,
        "bf16",
        compile,
        ours=ours,
        eager=eager,
        formula=formula,
        config=lambda: peft_config("AdaLoraConfig", init_r=RANK, lora_alpha=SCALING * RANK, total_step=1000),
        where={name: f"{name}.default" for name in ("lora_A", "lora_B", "lora_E")},
        bytes_moved=layer_bytes(problem, "bf16") + low_rank_bytes(problem),
        flops=4 * problem.tokens * problem.n * problem.k + low_rank_flops(problem),
    )


VARIANTS = (
    Variant("lora_linear", "bf16 base", partial(_layer, "bf16", 0.0)),
    Variant("lora_linear", "bf16 base, dropout 0.05", partial(_layer, "bf16", 0.05), everywhere=True),
    Variant("lora_linear", "NF4 base", partial(_layer, "nf4", 0.0)),
    Variant("lora_linear", "NF4 base, dropout 0.05", partial(_layer, "nf4", 0.05), everywhere=True),
    Variant("lora_linear", "AdaLoRA, bf16 base", _adalora),
)
