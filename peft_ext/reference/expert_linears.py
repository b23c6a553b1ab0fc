"""The linear layers of a mixture's experts that are modules of their own, each with LoRA or without, in plain PyTorch.

    Y_t = x_t W_iᵀ + (dropout_i(x_t) A_iᵀ ∘ ρ_i) B_iᵀ + b_i        for every row t of layer i

Source: LoRA (arXiv 2106.09685); mixtures of experts (arXiv 1701.06538).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor

from ..weight import NF4Weight
from .siblings import lora_linears

__all__ = ["lora_expert_linears"]


def lora_expert_linears(
    x: Tensor,
    rows: Sequence[int],
    weights: Sequence[Union[Tensor, NF4Weight]],
    lora_As: Sequence[Optional[Tensor]],
    lora_Bs: Sequence[Optional[Tensor]],
    *,
    training: bool,
    **of_each: Sequence[Any],
) -> Tensor:
    """See :func:`peft_ext.ops.lora_expert_linears`; gradients come from PyTorch's autograd."""
    parts = [
        lora_linears(own, [weight], [lora_A], [lora_B], training=training,
                     **{name: values[i : i + 1] for name, values in of_each.items()})[0]
        for i, (own, weight, lora_A, lora_B) in enumerate(zip(x.split(list(rows)), weights, lora_As, lora_Bs,
                                                              strict=True))
    ]  # fmt: skip
    return torch.cat(parts)
