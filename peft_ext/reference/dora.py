"""DoRA over a frozen dense or packed weight, in plain PyTorch.

    g = magnitude / ‖W + s·B A‖  per row           Z = x Wᵀ + s·S Bᵀ,  S = x̃ Aᵀ           Y = g∘Z + b

The functions of this module compute the norm without the sum ``W + s·B A``:
``n² = ‖W‖² + 2 Σ_r U∘sB + Σ_r (sB A Aᵀ)∘sB`` with ``U = W Aᵀ``.

Source: DoRA (arXiv 2402.09353). Section 4.3 of DoRA's paper treats the norm as a constant in the backward.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from ..weights.packed import PackedWeight
from .common import SMALLEST_SCALE, dense, dropout_seed, dropped, rows, sum_dtype

__all__ = [
    "dora_linear",
    "dora_linear_backward",
    "dora_linear_forward",
    "dora_weight_norm",
    "dora_weight_norm_backward",
    "dora_weight_norm_forward",
    "output_scale",
]


def output_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Returns ``g = magnitude / norm`` in the norm's dtype. Where a norm is 0, g is 0 and gradients are finite."""
    # threshold replaces the norms that are not above 0, in one kernel launch on a GPU.
    return magnitude.to(norm.dtype) / torch.nn.functional.threshold(norm, 0.0, float("inf"))


# --- the norm ---------------------------------------------------------------------------------------------------------


def dora_weight_norm_forward(
    weight: Union[Tensor, PackedWeight], lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns ``(n [N], U [N, R])`` in float32, or in float64 if ``dtype`` is float64.

    n is ``‖W + s·B A‖`` of each row, and U is ``W Aᵀ``. A packed weight is dequantized to ``dtype`` first.
    """
    wide = sum_dtype(dtype)
    w, a, b = dense(weight, dtype).to(wide), lora_A.to(wide), scaling * lora_B.to(wide)
    u = w @ a.t()
    squared = ((w * w).sum(1) + ((2 * u + b @ (a @ a.t())) * b).sum(1)).clamp(min=0)
    zero = squared == 0  # the gradient of a square root is not finite at 0
    return squared.masked_fill(zero, 1).sqrt().masked_fill(zero, 0), u


def dora_weight_norm_backward(
    grad: Tensor,
    weight: Union[Tensor, PackedWeight],
    lora_A: Tensor,
    lora_B: Tensor,
    norm: Tensor,
    u: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of lora_A and lora_B.

    With ``c = grad / n`` for each row, and c = 0 where n = 0: ``dB = c∘(s U + s² B A Aᵀ)``,
    ``dA = s (c∘B)ᵀ W + s² (c∘B)ᵀ B A``.
    """
    wide = norm.dtype
    w, a, b = dense(weight, dtype).to(wide), lora_A.to(wide), scaling * lora_B.to(wide)
    c = (grad / norm).masked_fill(norm == 0, 0)[:, None]
    grad_b = c * scaling * (u + b @ (a @ a.t()))
    cb = (c * b).t()
    grad_a = cb @ w + (cb @ b) @ a
    return grad_a.to(lora_A.dtype), grad_b.to(lora_B.dtype)


def dora_weight_norm(
    weight: Union[Tensor, PackedWeight],
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    *,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """See :func:`peft_ext.ops.dora_weight_norm`; gradients come from PyTorch's autograd."""
    return dora_weight_norm_forward(weight, lora_A, lora_B, scaling, dtype or weight.dtype)[0]


# --- the layer --------------------------------------------------------------------------------------------------------


def dora_linear_forward(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    bias: Optional[Tensor],
    lora_A: Tensor,
    lora_B: Tensor,
    out_scale: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Optional[Tensor],
    drop_base: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(Y [..., N], S [T, R], Z [T, N])`` with ``S = x̃ Aᵀ``, ``Z = x Wᵀ + s·S Bᵀ`` and ``Y = g∘Z + b``.

    ``x̃`` is x after dropout. With ``drop_base``, ``Z = x̃ Wᵀ + s·S Bᵀ`` and ``Y = x Wᵀ + b + g∘Z - x̃ Wᵀ``.
    """
    wide = sum_dtype(x.dtype)
    w, g, wide_x = dense(weight, x.dtype).to(wide), out_scale.to(wide), x.to(wide)
    x_dropped = dropped(wide_x, dropout_p, seed)
    s = x_dropped @ lora_A.to(wide).t()
    low_rank = s @ (scaling * lora_B.to(wide)).t()
    base = wide_x @ w.t()
    if drop_base:
        base_dropped = x_dropped @ w.t()
        z = base_dropped + low_rank
        y = base + (g * z - base_dropped)
    else:
        z = base + low_rank
        y = g * z
    y = y if bias is None else y + bias.to(wide)
    return y.to(x.dtype), s.reshape(-1, lora_A.shape[0]), rows(z.to(x.dtype))


def dora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    lora_A: Tensor,
    lora_B: Tensor,
    out_scale: Tensor,
    s: Tensor,
    z: Optional[Tensor],
    z_is_scaled: bool,
    scaling: float,
    dropout_p: float,
    seed: Optional[Tensor],
    drop_base: bool,
) -> tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:
    """Returns the gradients of x, lora_A, lora_B and g. The gradient of g is None if z is None.

    With ``G = g∘dY`` and ``P = s G B``: ``dX = G W + mask/(1-p) ∘ (P A)``, ``dA = Pᵀ x̃``, ``dB = s Gᵀ S``,
    ``dg = Σ_t dY∘Z``. With ``drop_base``: ``dX = dY W + mask/(1-p) ∘ ((G - dY) W + P A)``. If ``z_is_scaled``, the
    argument z is Y, and ``Z = Y / g``; where ``|g| < SMALLEST_SCALE``, Z is computed again from x and S.
    """
    wide = sum_dtype(x.dtype)
    w, g = dense(weight, x.dtype).to(wide), out_scale.to(wide)
    a, b = lora_A.to(wide), scaling * lora_B.to(wide)
    flat = rows(grad).to(wide)
    scaled = g * flat
    p = scaled @ b
    grad_a = p.t() @ rows(dropped(x.to(wide), dropout_p, seed))
    grad_b = scaling * (scaled.t() @ s.to(wide))
    through_dropout = p @ a
    if drop_base:
        direct = flat @ w
        through_dropout = (scaled - flat) @ w + through_dropout
    else:
        direct = scaled @ w
    grad_x = direct.view(x.shape) + dropped(through_dropout.view(x.shape), dropout_p, seed)

    grad_g = None
    if z is not None:
        z = rows(z).to(wide)
        if z_is_scaled:
            small = g.abs() < SMALLEST_SCALE
            z = z / g.masked_fill(small, 1)
            z[:, small] = rows(x).to(wide) @ w[small].t() + s.to(wide) @ b[small].t()
        grad_g = (flat * z).sum(0)
    return grad_x.to(x.dtype), grad_a.to(lora_A.dtype), grad_b.to(lora_B.dtype), grad_g


def dora_linear(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Optional[Tensor] = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    dropout_mode: str = "lora",
    norm_grad: bool = False,
    weight_norm: Optional[Tensor] = None,
    seed: Optional[Tensor] = None,
    save_output: bool = False,
) -> Tensor:
    """See :func:`peft_ext.ops.dora_linear`; gradients come from PyTorch's autograd."""
    if weight_norm is None:
        weight_norm = dora_weight_norm(weight, lora_A, lora_B, scaling, dtype=x.dtype)
    g = output_scale(magnitude, weight_norm if norm_grad else weight_norm.detach())
    seed = dropout_seed(seed, dropout_p, training, x.device)
    drop_base = dropout_mode == "peft" and seed is not None
    return dora_linear_forward(x, weight, bias, lora_A, lora_B, g, scaling, dropout_p, seed, drop_base)[0]
