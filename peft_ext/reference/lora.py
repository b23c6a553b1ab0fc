"""LoRA over a frozen dense or packed weight, in plain PyTorch.

    x̃ = dropout(x)         S = x̃ Aᵀ         Y = x Wᵀ + (S∘ρ) Bᵀ + b         ρ = s · rank_scale, or ρ = s

``lora_residual`` adds the low-rank term to the output of any base layer: ``Y = residual + (S∘ρ) Bᵀ``.

Sources: LoRA (arXiv 2106.09685), QLoRA (arXiv 2305.14314); for the scale of each rank, AdaLoRA (arXiv 2303.10512).
"""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights.packed import PackedWeight
from .common import dense, dropout_seed, dropped, rows, sum_dtype

__all__ = [
    "lora_linear",
    "lora_linear_backward",
    "lora_linear_forward",
    "lora_residual",
    "lora_residual_backward",
    "lora_residual_forward",
]


def _rho(rank_scale: Optional[Tensor], scaling: float, wide: torch.dtype) -> Union[Tensor, float]:
    return scaling if rank_scale is None else scaling * rank_scale.reshape(-1).to(wide)


def lora_linear_forward(
    x: Tensor, weight: Union[Tensor, PackedWeight], bias: Optional[Tensor], *adapter: Any
) -> tuple[Tensor, Tensor]:
    """Returns ``(Y [..., N], S [T, R])``; S is ``dropout(x) Aᵀ``.

    The backward needs x, S and the seed, besides the weights.
    """
    return lora_residual_forward(x, F.linear(x, dense(weight, x.dtype), bias), *adapter)


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    lora_A: Tensor,
    lora_B: Tensor,
    rank_scale: Optional[Tensor],
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:
    """Returns the gradients of x, lora_A, lora_B and rank_scale. The gradient of rank_scale is None if rank_scale is
    None.

    With ``G = dY`` and ``P = G (B∘ρ)``: ``dX = G W + mask/(1-p) ∘ (P A)``, ``dA = Pᵀ x̃``, ``dB = ρ ∘ Gᵀ S``,
    ``d rank_scale = s · Σ_n B ∘ Gᵀ S``.
    """
    low_rank, *grads = _low_rank_backward(grad, x, lora_A, lora_B, rank_scale, s, scaling, dropout_p, seed)
    grad_x = ((grad @ dense(weight, x.dtype)).to(low_rank.dtype) + low_rank).to(x.dtype)
    return grad_x, *grads


def lora_residual_forward(
    x: Tensor,
    residual: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    rank_scale: Optional[Tensor],
    scaling: float,
    dropout_p: float,
    seed: Optional[Tensor],
) -> tuple[Tensor, Tensor]:
    """Returns ``(Y [..., N], S [T, R])`` with ``S = dropout(x) Aᵀ`` and ``Y = residual + (S∘ρ) Bᵀ``."""
    wide = sum_dtype(x.dtype)
    s = dropped(x.to(wide), dropout_p, seed) @ lora_A.to(wide).t()
    y = residual.to(wide) + s @ (_rho(rank_scale, scaling, wide) * lora_B.to(wide)).t()
    return y.to(x.dtype), s.reshape(-1, lora_A.shape[0])


def lora_residual_backward(
    grad: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    rank_scale: Optional[Tensor],
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:
    """Returns the gradients that :func:`lora_linear_backward` returns, without the base layer's term ``G W`` in dX.

    The gradient of the residual is ``grad`` itself, and is not among the results.
    """
    low_rank, *grads = _low_rank_backward(grad, x, lora_A, lora_B, rank_scale, s, scaling, dropout_p, seed)
    return low_rank.to(x.dtype), *grads


def _low_rank_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:
    """Returns the low-rank term of dX, in the dtype of the sums, and the gradients of the adapter."""
    lora_A, lora_B, rank_scale, s, scaling, dropout_p, seed = args
    wide = sum_dtype(x.dtype)
    rho, flat, b = _rho(rank_scale, scaling, wide), rows(grad).to(wide), lora_B.to(wide)
    p, gs = flat @ (rho * b), flat.t() @ s.to(wide)
    grad_a = p.t() @ rows(dropped(x.to(wide), dropout_p, seed))
    low_rank = dropped((p @ lora_A.to(wide)).view(x.shape), dropout_p, seed)
    grad_scale = None if rank_scale is None else (scaling * (b * gs).sum(0)).to(rank_scale.dtype).view(rank_scale.shape)
    return low_rank, grad_a.to(lora_A.dtype), (rho * gs).to(lora_B.dtype), grad_scale


def lora_linear(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Optional[Tensor] = None,
    *,
    rank_scale: Optional[Tensor] = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Optional[Tensor] = None,
) -> Tensor:
    """See :func:`peft_ext.ops.lora_linear`; gradients come from PyTorch's autograd."""
    seed = dropout_seed(seed, dropout_p, training, x.device)
    return lora_linear_forward(x, weight, bias, lora_A, lora_B, rank_scale, scaling, dropout_p, seed)[0]


def lora_residual(
    x: Tensor,
    residual: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    rank_scale: Optional[Tensor] = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Optional[Tensor] = None,
) -> Tensor:
    """See :func:`peft_ext.ops.lora_residual`; gradients come from PyTorch's autograd."""
    seed = dropout_seed(seed, dropout_p, training, x.device)
    return lora_residual_forward(x, residual, lora_A, lora_B, rank_scale, scaling, dropout_p, seed)[0]
