"""LoRA over a frozen weight with a different adapter for each sample of a batch, in plain PyTorch.

    S_i = x_i A_gᵀ         Y_i = x_i Wᵀ + s_g S_i B_gᵀ + b         g = adapters[i];  g = -1: Y_i = x_i Wᵀ + b

Sources: LoRA (arXiv 2106.09685); for several adapters in one batch, Punica (arXiv 2310.18547).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights.packed import PackedWeight
from .common import dense, sum_dtype

__all__ = ["grouped_lora_linear", "grouped_lora_linear_forward", "samples_of"]


def samples_of(adapters: Sequence[int], group: int) -> list[int]:
    """Returns the indices of the samples whose adapter has the number ``group``."""
    return [i for i, adapter in enumerate(adapters) if adapter == group]


def grouped_lora_linear_forward(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    bias: Optional[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    adapters: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Returns ``(Y [samples, ..., N], S [T, R])``; S is ``x Aᵀ`` with the A of each token's adapter.

    R is the largest rank of the adapters. S is 0 in the columns beyond the rank of the token's adapter.
    """
    wide = sum_dtype(x.dtype)
    y = F.linear(x, dense(weight, x.dtype), bias).to(wide)
    rank = max(a.shape[0] for a in lora_A)
    s = x.new_zeros((*x.shape[:-1], rank), dtype=wide)
    for group in sorted(set(adapters) - {-1}):
        index = torch.tensor(samples_of(adapters, group), device=x.device)
        a, b = lora_A[group].to(wide), lora_B[group].to(wide)
        part = x.index_select(0, index).to(wide) @ a.t()
        y = y.index_add(0, index, part @ (scaling[group] * b).t())
        s = s.index_copy(0, index, F.pad(part, (0, rank - a.shape[0])))
    return y.to(x.dtype), s.reshape(-1, rank)


def grouped_lora_linear(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    adapters: Sequence[int],
    bias: Optional[Tensor] = None,
    *,
    scaling: Sequence[float] = (),
) -> Tensor:
    """See :func:`peft_ext.ops.grouped_lora_linear`; gradients come from PyTorch's autograd."""
    scaling = scaling or [1.0] * len(lora_A)
    return grouped_lora_linear_forward(x, weight, bias, lora_A, lora_B, scaling, adapters)[0]
