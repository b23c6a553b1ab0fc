"""Activation functions and gated activations, in plain PyTorch.

    y = act(u)        gated: y = act(gate) ∘ up        relu2(u) = relu(u)²

Sources: gated units (arXiv 2002.05202), GELU (arXiv 1606.08415), squared ReLU (arXiv 2109.08668).
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import sum_dtype

__all__ = [
    "ACTIVATIONS",
    "activated",
    "activation",
    "activation_backward",
    "gated_activation",
    "gated_activation_backward",
    "gated_activation_forward",
    "slope_times",
]

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "relu2")


def activated(u: Tensor, activation: str) -> Tensor:
    """Returns ``act(u)``."""
    if activation == "relu":
        return torch.relu(u)
    if activation == "relu2":
        return torch.square(torch.relu(u))
    if activation == "silu":
        return F.silu(u)
    return F.gelu(u, approximate="tanh" if activation == "gelu_tanh" else "none")


def slope_times(grad: Tensor, u: Tensor, activation: str) -> Tensor:
    """Returns ``grad ∘ act'(u)``."""
    if activation == "relu":
        return torch.where(u > 0, grad, 0.0)
    if activation == "relu2":
        return grad * 2 * torch.relu(u)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, u)
    return torch.ops.aten.gelu_backward(grad, u, approximate="tanh" if activation == "gelu_tanh" else "none")


def _halves(gate: Tensor, up: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    return (gate, up) if up is not None else gate.chunk(2, -1)


def gated_activation_forward(gate: Tensor, up: Optional[Tensor], activation: str) -> Tensor:
    """Returns ``act(gate) ∘ up``, computed in float32 (float64 for float64 inputs) and rounded once to gate's dtype.

    With up None, ``gate`` holds both factors: the first half of its last dimension is gate, and the second half is up.
    """
    wide = sum_dtype(gate.dtype)
    first, second = _halves(gate, up)
    return (activated(first.to(wide), activation) * second.to(wide)).to(gate.dtype)


def gated_activation_backward(
    grad: Tensor, gate: Tensor, up: Optional[Tensor], activation: str
) -> tuple[Tensor, Optional[Tensor]]:
    """Returns the gradients of gate and up: ``dY ∘ up ∘ act'(gate)`` and ``dY ∘ act(gate)``.

    With up None, the first result holds the gradients of both halves, one after the other, and the second result is
    None.
    """
    wide = sum_dtype(gate.dtype)
    first, second = (value.to(wide) for value in _halves(gate, up))
    grad = grad.to(wide)
    grads = (
        slope_times(grad * second, first, activation).to(gate.dtype),
        (grad * activated(first, activation)).to(gate.dtype),
    )
    return grads if up is not None else (torch.cat(grads, -1), None)


def activation_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """Returns ``dY ∘ act'(x)``."""
    wide = sum_dtype(x.dtype)
    return slope_times(grad.to(wide), x.to(wide), activation).to(x.dtype)


def gated_activation(gate: Tensor, up: Optional[Tensor], activation: str) -> Tensor:
    """See :func:`peft_ext.ops.gated_activation`; gradients come from PyTorch's autograd."""
    return gated_activation_forward(gate, up, activation)


def activation(x: Tensor, activation: str) -> Tensor:
    """See :func:`peft_ext.ops.activation`; gradients come from PyTorch's autograd."""
    return activated(x.to(sum_dtype(x.dtype)), activation).to(x.dtype)
