"""IA3 over a frozen dense or packed weight, in plain PyTorch.

    output:  Y = l∘(x Wᵀ + b),  l [N]           feedforward:  Y = (l∘x) Wᵀ + b,  l [K]

Source: IA3 (arXiv 2205.05638).
"""

from __future__ import annotations

from typing import Optional, Union

from torch import Tensor

from ..weights.packed import PackedWeight
from .common import SMALLEST_SCALE, dense, rows, sum_dtype

__all__ = [
    "ia3_linear",
    "ia3_linear_backward",
    "ia3_linear_forward",
    "ia3_scale",
    "ia3_scale_backward",
    "ia3_scale_forward",
]


def ia3_linear_forward(
    x: Tensor, weight: Union[Tensor, PackedWeight], bias: Optional[Tensor], ia3_l: Tensor, feedforward: bool
) -> tuple[Tensor, Tensor]:
    """Returns ``(Y [..., N], Z [T, N])`` for T tokens and N output features: Z is the output before scaling by ia3_l,
    or Y with ``feedforward``.

    ia3_l is ``[K]`` with ``feedforward``, otherwise ``[N]``.
    """
    wide = sum_dtype(x.dtype)
    w, factor = dense(weight, x.dtype).to(wide), ia3_l.to(wide)
    y = (factor * x.to(wide) if feedforward else x.to(wide)) @ w.t()
    y = y if bias is None else y + bias.to(wide)
    return (y if feedforward else factor * y).to(x.dtype), rows(y.to(x.dtype))


def ia3_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    bias: Optional[Tensor],
    ia3_l: Tensor,
    z: Optional[Tensor],
    z_is_scaled: bool,
    feedforward: bool,
) -> tuple[Tensor, Optional[Tensor]]:
    """Returns the gradients of x and ia3_l. The gradient of ia3_l is None if ia3_l scales the output and z is None.

    With ``U = dY W``: feedforward: ``dX = l∘U``, ``dl = Σ_t x∘U``; output: ``dX = (l∘dY) W``, ``dl = Σ_t dY∘Z``. If
    ``z_is_scaled``, the argument z is Y, and ``Z = Y / l``; where ``|l| < SMALLEST_SCALE``, Z is computed again from x.
    """
    wide = sum_dtype(x.dtype)
    w, factor = dense(weight, x.dtype).to(wide), ia3_l.to(wide)
    flat, wide_x = rows(grad).to(wide), rows(x).to(wide)
    if feedforward:
        u = flat @ w
        return (factor * u).to(x.dtype).view(x.shape), (wide_x * u).sum(0).to(ia3_l.dtype)
    grad_x = ((factor * flat) @ w).to(x.dtype).view(x.shape)
    if z is None:
        return grad_x, None
    z = rows(z).to(wide)
    if z_is_scaled:
        small = factor.abs() < SMALLEST_SCALE
        z = z / factor.masked_fill(small, 1)
        again = wide_x @ w[small].t()
        z[:, small] = again if bias is None else again + bias[small].to(wide)
    return grad_x, (flat * z).sum(0).to(ia3_l.dtype)


def ia3_scale_forward(x: Tensor, ia3_l: Tensor) -> Tensor:
    """Returns ``x∘l``, computed in float32 (float64 for float64 inputs), rounded once to x's dtype; l ``[K]``."""
    wide = sum_dtype(x.dtype)
    return (x.to(wide) * ia3_l.to(wide)).to(x.dtype)


def ia3_scale_backward(grad: Tensor, x: Tensor, ia3_l: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and ia3_l: ``dX = l∘dY``, ``dl = Σ_t dY∘x``."""
    wide = sum_dtype(x.dtype)
    return ia3_scale_forward(grad, ia3_l), (rows(grad).to(wide) * rows(x).to(wide)).sum(0).to(ia3_l.dtype)


def ia3_linear(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    ia3_l: Tensor,
    bias: Optional[Tensor] = None,
    *,
    feedforward: bool = False,
    save_output: bool = False,
) -> Tensor:
    """See :func:`peft_ext.ops.ia3_linear`; gradients come from PyTorch's autograd."""
    return ia3_linear_forward(x, weight, bias, ia3_l.reshape(-1), feedforward)[0]


def ia3_scale(x: Tensor, ia3_l: Tensor) -> Tensor:
    """See :func:`peft_ext.ops.ia3_scale`; gradients come from PyTorch's autograd."""
    return ia3_scale_forward(x, ia3_l.reshape(-1))
