"""The most usual call of a layer, known at once.

The reasons of :mod:`.reasons` are asked one by one, and that is most of what Python takes of a call. What passes here,
by the same questions in a third of their time, they have nothing against.
"""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from ...nn import NF4Linear
from ...weight import NF4Weight
from .base import DTYPES, FOUR_BIT, LINEAR, operands, sums_wider
from .reasons import (
    accepts_input,
    any_global_hook,
    forward_is_replaced,
    hooked,
    replaced_on_instance,
    tensor_reason,
    weight_reason,
)

Operands = tuple[Union[Tensor, NF4Weight], Optional[Tensor]]


def is_usual(tensor: Any) -> bool:
    """Returns whether a parameter is a plain matrix in memory, of a dtype of the kernels."""
    return (
        (type(tensor) is nn.Parameter or type(tensor) is Tensor)
        and tensor.dtype in DTYPES
        and tensor.dim() == 2
        and not tensor.is_meta
        and tensor.layout is torch.strided
        and "ds_id" not in tensor.__dict__
    )


def usual_name(layer: Any) -> Optional[str]:
    """Returns the one active adapter; None: there are none or several, or a compiler is at it."""
    if torch.compiler.is_compiling():
        return None
    active = layer._active_adapter
    if type(active) is str:
        return active
    return active[0] if len(active) == 1 else None


def usual_operands(layer: Any, x: Any) -> Optional[Operands]:
    """Returns weight and bias of an adapter layer's base, an nn.Linear, NF4Linear or Linear4bit without hooks, where
    an eager call of the layer is outside autocast, runs its adapters, and multiplies x itself, in its dtype."""
    if not accepts_input(x) or (device := x.device.type) not in ("cpu", "cuda"):
        return None
    if torch.is_autocast_enabled(device) or any_global_hook():
        return None
    held = layer.__dict__
    if layer._disable_adapters or layer.merged_adapters or held.get("fan_in_fan_out"):
        return None
    if "forward" in held and replaced_on_instance(layer):
        return None
    if forward_is_replaced(type(layer)):
        return None
    base, dtype = layer._modules["base_layer"], x.dtype
    kind = type(base)
    if hooked(base):
        return None
    if kind in LINEAR:
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")  # none of its own under FSDP1
        if not is_usual(weight) or weight.dtype is not dtype or weight.requires_grad:
            return None
        return (weight, bias) if bias is None or bias.dtype is dtype else None
    if kind is NF4Linear:
        if tensor_reason("its weight", base._parameters["weight"]) is not None:
            return None
        bias = base._parameters["bias"]
        return base.nf4, bias if bias is None or bias.dtype is dtype else bias.to(dtype)
    if kind not in FOUR_BIT or weight_reason(base) is not None or sums_wider(base, x):
        return None
    found = operands(base, x)
    return found[1:3] if found is not None and found[0] is x and found[3] is dtype else None
