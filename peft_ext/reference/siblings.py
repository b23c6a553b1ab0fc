"""Several linear layers with one common input, each with or without a LoRA adapter, in plain PyTorch.

    Y_i = x W_iᵀ + (dropout_i(x) A_iᵀ ∘ ρ_i) B_iᵀ + b_i

Source: LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

import torch.nn.functional as F
from torch import Tensor

from ..weights.packed import PackedWeight
from .common import dense
from .lora import lora_linear

__all__ = ["lora_linears"]


def lora_linears(
    x: Tensor,
    weights: Sequence[Union[Tensor, PackedWeight]],
    lora_As: Sequence[Optional[Tensor]],
    lora_Bs: Sequence[Optional[Tensor]],
    biases: Sequence[Optional[Tensor]],
    *,
    rank_scales: Sequence[Optional[Tensor]],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    training: bool,
    seeds: Sequence[Optional[Tensor]],
) -> tuple[Tensor, ...]:
    """See :func:`peft_ext.ops.lora_linears`; gradients come from PyTorch's autograd."""
    return tuple(
        F.linear(x, dense(weight, x.dtype), bias)
        if lora_A is None
        else lora_linear(x, weight, lora_A, lora_B, bias, rank_scale=rank_scale, scaling=scaling, dropout_p=p,
                         training=training, seed=seed)
        for weight, bias, lora_A, lora_B, rank_scale, scaling, p, seed in zip(
            weights, biases, lora_As, lora_Bs, rank_scales, scalings, dropout_ps, seeds, strict=True
        )
    )  # fmt: skip
