"""A bottleneck adapter, in plain PyTorch.

    U = x Dᵀ + b_d  [T, M]        H = act(U)        Y = residual + s · (H Vᵀ + b_v)  [T, N]

D is ``down_weight [M, K]`` and V is ``up_weight [N, M]``. If no residual is given, the residual is x, and N must be K.

Sources: Houlsby and others (arXiv 1902.00751); Pfeiffer and others (arXiv 2005.00247); for the parallel adapter, He and
others (arXiv 2110.04366).
"""

from __future__ import annotations

from typing import Optional

import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS as GATES
from .activations import activated, slope_times
from .common import rows, sum_dtype

__all__ = ["ACTIVATIONS", "bottleneck_adapter", "bottleneck_adapter_backward", "bottleneck_adapter_forward"]

ACTIVATIONS = GATES[:4]  # the activations of a bottleneck adapter: "gelu", "gelu_tanh", "relu", "silu"


def bottleneck_adapter_forward(
    x: Tensor,
    residual: Optional[Tensor],
    down_weight: Tensor,
    down_bias: Optional[Tensor],
    up_weight: Tensor,
    up_bias: Optional[Tensor],
    scale: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Returns ``(Y [..., N], U [T, M])``; U is ``x Dᵀ + b_d``, the input of the activation.

    The backward needs x and U, besides the weights.
    """
    wide = sum_dtype(x.dtype)
    u = F.linear(rows(x).to(wide), down_weight.to(wide), None if down_bias is None else down_bias.to(wide))
    v = F.linear(activated(u, activation), up_weight.to(wide), None if up_bias is None else up_bias.to(wide))
    residual = x if residual is None else residual
    return (residual.to(wide) + scale * v.view(residual.shape)).to(x.dtype), u


def bottleneck_adapter_backward(
    grad: Tensor, x: Tensor, u: Tensor, down_weight: Tensor, up_weight: Tensor, scale: float, activation: str, own: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, down_weight, down_bias, up_weight and up_bias.

    With ``dU = s · dY V ∘ act'(U)``: ``dX = dU D`` (plus dY if ``own``, that is if x is the residual), ``dD = dUᵀ x``,
    ``db_d = Σ dU``, ``dV = s · dYᵀ H``, ``db_v = s · Σ dY``. The biases' gradients are float32, or float64 for float64
    inputs.
    """
    wide = sum_dtype(x.dtype)
    flat, u = rows(grad).to(wide), u.to(wide)
    grad_u = slope_times(scale * flat @ up_weight.to(wide), u, activation)
    grad_v = scale * flat.t() @ activated(u, activation)
    grad_x = grad_u @ down_weight.to(wide)
    grad_x = (grad_x + flat if own else grad_x).view(x.shape).to(x.dtype)
    grad_d = grad_u.t() @ rows(x).to(wide)
    return grad_x, grad_d.to(down_weight.dtype), grad_u.sum(0), grad_v.to(up_weight.dtype), scale * flat.sum(0)


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Optional[Tensor],
    up_weight: Tensor,
    up_bias: Optional[Tensor],
    *,
    scale: float = 1.0,
    activation: str = "gelu",
    residual: Optional[Tensor] = None,
) -> Tensor:
    """See :func:`peft_ext.ops.bottleneck_adapter`; gradients come from PyTorch's autograd."""
    return bottleneck_adapter_forward(x, residual, down_weight, down_bias, up_weight, up_bias, scale, activation)[0]
