"""64 experts that are layers of their own, with LoRA of rank 16 each, in a training step: together, and one by one.

    Y_t = x_t W_eᵀ + s · (x_t A_eᵀ) B_eᵀ        for every row t of layer e

Weights, adapters and rows as in :mod:`.bench_experts`. "PEFT" is its formula of each layer, one after the other, and
"frozen" PyTorch's bf16 F.linear of each.
"""

from __future__ import annotations

from functools import partial

from .bench_experts import experts
from .grid import Variant

VARIANTS = (
    Variant("lora_expert_linears", "bf16 base, 64 layers", partial(experts, "bf16", 0.0, are_modules=True)),
    Variant("lora_expert_linears", "bf16 base, 64 layers, dropout 0.05",
            partial(experts, "bf16", 0.05, are_modules=True)),
    Variant("lora_expert_linears", "NF4 base, 64 layers", partial(experts, "nf4", 0.0, are_modules=True)),
)  # fmt: skip
