"""RMSNorm and LayerNorm over the last dimension, in plain PyTorch.

    x̂ = (x - μ) r      r = 1/√(mean (x - μ)² + eps)      y = x̂ ∘ (w + offset) + b       RMSNorm: μ = 0, b = 0

Sources: RMSNorm (arXiv 1910.07467), LayerNorm (arXiv 1607.06450).
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .common import rows, sum_dtype

__all__ = [
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_dtype",
    "rms_norm_forward",
]


def rms_norm_dtype(x: Tensor, weight: Optional[Tensor], round_before_weight: bool) -> torch.dtype:
    """Returns the output dtype of an RMSNorm.

    The output has x's dtype, or with ``round_before_weight`` the dtype of PyTorch's product of x and the weight.
    """
    if weight is None or not round_before_weight:
        return x.dtype
    return torch.promote_types(x.dtype, weight.dtype)


def rms_norm_forward(
    x: Tensor, weight: Optional[Tensor], eps: float, offset: float, round_before_weight: bool
) -> tuple[Tensor, Tensor]:
    """Returns ``(y [..., K], r [T])``; r is ``1/√(mean x² + eps)`` of each row."""
    wide = sum_dtype(x.dtype)
    values = x.to(wide)
    rstd = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    values = values * rstd
    if round_before_weight:
        values = values.to(x.dtype).to(wide)
    if weight is not None:
        values = values * (weight.to(wide) + offset)
    return values.to(rms_norm_dtype(x, weight, round_before_weight)), rstd.reshape(-1)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Optional[Tensor], rstd: Tensor, offset: float
) -> tuple[Tensor, Optional[Tensor]]:
    """Returns the gradients of x and weight: ``dX = r (g - x̂ mean (g ∘ x̂))`` with ``g = dY ∘ (w + offset)``, and
    ``dw = Σ_t dY ∘ x̂``. The weight's gradient is None if there is no weight."""
    grad_x, grad_weight, _ = _backward(grad, x, weight, offset, None, rstd)
    return grad_x, grad_weight


def _backward(
    grad: Tensor, x: Tensor, weight: Optional[Tensor], offset: float, mean: Optional[Tensor], rstd: Tensor
) -> tuple[Tensor, Optional[Tensor], Tensor]:
    wide = sum_dtype(x.dtype)
    dy, values, r = rows(grad).to(wide), rows(x).to(wide), rstd.to(wide).view(-1, 1)
    values = (values if mean is None else values - mean.to(wide).view(-1, 1)) * r
    g = dy if weight is None else dy * (weight.to(wide) + offset)
    along = (g * values).mean(-1, keepdim=True)
    grad_x = r * ((g if mean is None else g - g.mean(-1, keepdim=True)) - values * along)
    grad_weight = None if weight is None else (dy * values).sum(0).to(weight.dtype)
    return grad_x.to(x.dtype).view(x.shape), grad_weight, dy.sum(0)


def layer_norm_forward(
    x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(y [..., K], μ [T], r [T])``; μ is the mean of each row, and r is ``1/√(mean (x - μ)² + eps)``."""
    wide = sum_dtype(x.dtype)
    values = x.to(wide)
    mean = values.mean(-1, keepdim=True)
    values = values - mean
    rstd = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    values = values * rstd
    if weight is not None:
        values = values * weight.to(wide)
    if bias is not None:
        values = values + bias.to(wide)
    return values.to(x.dtype), mean.reshape(-1), rstd.reshape(-1)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Optional[Tensor], mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Optional[Tensor], Tensor]:
    """Returns the gradients of x, weight and bias. With ``g = dY ∘ w``: ``dX = r (g - mean g - x̂ mean (g ∘ x̂))``,
    ``dw = Σ_t dY ∘ x̂``, ``db = Σ_t dY``. The bias's gradient is float32, or float64 for float64 inputs."""
    return _backward(grad, x, weight, 0.0, mean, rstd)


def rms_norm(
    x: Tensor, weight: Optional[Tensor], eps: float, *, offset: float = 0.0, round_before_weight: bool = True
) -> Tensor:
    """See :func:`peft_ext.ops.rms_norm`; gradients come from PyTorch's autograd."""
    return rms_norm_forward(x, weight, eps, offset, round_before_weight)[0]


def layer_norm(x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], eps: float) -> Tensor:
    """See :func:`peft_ext.ops.layer_norm`; gradients come from PyTorch's autograd."""
    return layer_norm_forward(x, weight, bias, eps)[0]
