"""LoRA on the gated activation of an MLP, in plain PyTorch.

    h = act(gate) ∘ up     x̃ = dropout(h)     S = x̃ Aᵀ     Y = h Wᵀ + (S∘ρ) Bᵀ + b     ρ = s · rank_scale, or ρ = s

Sources: gated units (arXiv 2002.05202), LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from typing import Any, Optional, Union

from torch import Tensor

from ..weights.packed import PackedWeight
from .activations import gated_activation_backward, gated_activation_forward
from .common import dropout_seed
from .lora import lora_linear_backward, lora_linear_forward

__all__ = ["gated_lora_linear", "gated_lora_linear_backward", "gated_lora_linear_forward"]


def gated_lora_linear_forward(
    gate: Tensor, up: Optional[Tensor], activation: str, weight: Union[Tensor, PackedWeight], *args: Any
) -> tuple[Tensor, Tensor]:
    """Returns ``(Y [..., N], S [T, R])``. h is rounded to gate's dtype; ``args`` are the further arguments of
    ``peft_ext.reference.lora.lora_linear_forward``."""
    return lora_linear_forward(gated_activation_forward(gate, up, activation), weight, *args)


def gated_lora_linear_backward(
    grad: Tensor, gate: Tensor, up: Optional[Tensor], activation: str, weight: Union[Tensor, PackedWeight], *args: Any
) -> tuple[Tensor, Optional[Tensor], Tensor, Tensor, Optional[Tensor]]:
    """Returns the gradients of gate, up, lora_A, lora_B and rank_scale; ``args`` are the further arguments of
    ``peft_ext.reference.lora.lora_linear_backward``.

    With up None, the gradient of gate holds the gradients of both halves, and the gradient of up is None. The gradient
    of rank_scale is None if rank_scale is None.
    """
    h = gated_activation_forward(gate, up, activation)
    grad_h, *grads = lora_linear_backward(grad, h, weight, *args)
    return (*gated_activation_backward(grad_h, gate, up, activation), *grads)


def gated_lora_linear(
    gate: Tensor,
    up: Optional[Tensor],
    activation: str,
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
    """See :func:`peft_ext.ops.gated_lora_linear`; gradients come from PyTorch's autograd."""
    seed = dropout_seed(seed, dropout_p, training, gate.device)
    args = (bias, lora_A, lora_B, rank_scale, scaling, dropout_p, seed)
    return gated_lora_linear_forward(gate, up, activation, weight, *args)[0]
