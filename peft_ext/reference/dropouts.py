"""Dropout, in plain PyTorch.

    y = mask ∘ x / (1 - p)

Source: Dropout (Srivastava et al., JMLR 2014).
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from .common import dropped, sum_dtype

__all__ = ["dropout"]


def dropout(x: Tensor, dropout_p: float, seed: Optional[Tensor]) -> Tensor:
    """Returns the result of :func:`peft_ext.ops.dropout` in x's dtype. Without a seed the result equals x."""
    return dropped(x.to(sum_dtype(x.dtype)), dropout_p, seed).to(x.dtype)
