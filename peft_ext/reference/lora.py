"""LoRA over a frozen dense or NF4 weight, in plain PyTorch.

    x̃ = dropout(x)         S = x̃ Aᵀ         Y = x Wᵀ + s·S Bᵀ + b

Source: LoRA (arXiv 2106.09685), QLoRA (arXiv 2305.14314).
"""

from __future__ import annotations

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weight import NF4Weight
from .nf4 import nf4_dequantize
from .philox import dropout_keep_mask

__all__ = ["dropped", "lora_linear", "lora_linear_backward", "lora_linear_forward"]


def _dense(weight: Union[Tensor, NF4Weight], dtype: torch.dtype) -> Tensor:
    return nf4_dequantize(weight, dtype) if isinstance(weight, NF4Weight) else weight


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Products are summed in float32, or in float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def dropped(x: Tensor, p: float, seed: Optional[Tensor]) -> Tensor:
    """``mask ∘ x / (1 - p)``, or ``x`` where there is no seed."""
    if seed is None:
        return x
    return torch.where(dropout_keep_mask(seed, p, x.shape), x * (1.0 / (1.0 - p)), 0.0)


def lora_linear_forward(
    x: Tensor,
    weight: Union[Tensor, NF4Weight],
    bias: Optional[Tensor],
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Optional[Tensor],
) -> tuple[Tensor, Tensor]:
    """``(Y [..., N], S [T, R])``; S is what the backward needs beside x and the seed."""
    wide = _sum_dtype(x.dtype)
    s = dropped(x.to(wide), dropout_p, seed) @ lora_A.to(wide).t()
    y = F.linear(x, _dense(weight, x.dtype), bias)
    y = (y.to(wide) + s @ (scaling * lora_B.to(wide)).t()).to(x.dtype)
    return y, s.reshape(-1, lora_A.shape[0])


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Union[Tensor, NF4Weight],
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """``dX = G W + mask/(1-p) ∘ (P A)``, ``dA = Pᵀ x̃``, ``dB = s Gᵀ S`` with ``P = s G B``."""
    wide = _sum_dtype(x.dtype)
    flat = grad.reshape(-1, grad.shape[-1]).to(wide)
    p = flat @ (scaling * lora_B.to(wide))
    grad_a = p.t() @ dropped(x.to(wide), dropout_p, seed).reshape(-1, x.shape[-1])
    grad_b = scaling * (flat.t() @ s.to(wide))
    low_rank = dropped((p @ lora_A.to(wide)).view(x.shape), dropout_p, seed)
    grad_x = ((grad @ _dense(weight, x.dtype)).to(wide) + low_rank).to(x.dtype)
    return grad_x, grad_a.to(lora_A.dtype), grad_b.to(lora_B.dtype)


def lora_linear(
    x: Tensor,
    weight: Union[Tensor, NF4Weight],
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Optional[Tensor] = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Optional[Tensor] = None,
) -> Tensor:
    """See :func:`peft_ext.ops.lora_linear`; gradients come from PyTorch's autograd."""
    if not training or dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=x.device)
    return lora_linear_forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)[0]
