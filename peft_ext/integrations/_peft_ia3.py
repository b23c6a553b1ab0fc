"""PEFT's (IA)³ layers on :func:`peft_ext.ops.ia3_linear`; several active adapters multiply their vectors first.

Over a base layer that has to run on its own the product with the vector alone is fused, :func:`peft_ext.ops.ia3_scale`.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from .._imports import optional
from ._peft_base import (
    DTYPES,
    FOUR_BIT,
    Fused,
    MergesNF4,
    alone_reason,
    base_reason,
    enter,
    fuses,
    kernel_reason,
    layer_reason,
    short,
    sums_wider,
    takes,
    tensor_reason,
)

IA3Linear = IA3Linear4bit = None
with optional("peft", "(IA)³ over a linear layer that is not bitsandbytes' is not fused"):
    from peft.tuners.ia3 import Linear as IA3Linear
if FOUR_BIT:
    with optional("peft", "(IA)³ over bitsandbytes' Linear4bit is not fused"):
        from peft.tuners.ia3 import Linear4bit as IA3Linear4bit


class _IA3(Fused):
    """``l ∘ (x Wᵀ + b)``, or ``(l ∘ x) Wᵀ + b`` in a feedforward layer."""

    _reads = (*Fused._reads, "ia3_l", "is_feedforward")

    def _vectors(self) -> list[Optional[Tensor]]:
        """ia3_l of the active adapters that this layer has."""
        held = self._modules["ia3_l"]
        return [held._parameters.get(name) for name in self.active_adapters if name in held]

    # Whether the class's forward is the base layer's with the vector before or behind it, in one dtype.
    _scales_any_base = False

    def _stock_reason(self) -> Optional[str]:
        return self._how()[0]

    def _partly(self) -> Optional[str]:
        """Why the product with the vector alone is fused, where that is so."""
        reason, alone = self._how()
        return alone if reason is None else None

    def _how(self) -> tuple[Optional[str], Optional[str]]:
        """Why PEFT's own forward has to run; and else why the base layer has to run on its own."""
        vectors = self._vectors()
        if reason := layer_reason(self) or self._vectors_reason(vectors):
            return reason, None
        device = vectors[0].device.type
        if reason := base_reason(self):
            alone = alone_reason(self) if self._scales_any_base else "its class casts around the base layer"
            return (f"{reason}; {alone}" if alone else kernel_reason("ia3_scale", device)), reason
        return kernel_reason("ia3_linear", device), None

    def _vectors_reason(self, vectors: list[Optional[Tensor]]) -> Optional[str]:
        if not vectors:
            return "no active adapter on this layer"
        if _has_any_global_hook():
            return "global hooks of torch.nn would not run"
        like = vectors[0]
        for vector in vectors:
            if reason := tensor_reason("ia3_l", vector):
                return reason
            if vector.dtype not in DTYPES:
                return f"ia3_l is {short(vector.dtype)}, wanted float32, bfloat16 or float16"
            if vector.dtype is not like.dtype or vector.device != like.device:
                there = f"{short(vector.dtype)} on {vector.device}"
                return f"several active adapters: {short(like.dtype)} on {like.device}, {there}"
        return None

    def _dtypes(self, x: Tensor, vector: Tensor) -> tuple[torch.dtype, Optional[torch.dtype]]:
        """In which dtype PEFT hands x to the base layer, and what it returns; None: what the base layer does."""
        return x.dtype, None

    def _fused(self, x: Tensor) -> Optional[Tensor]:
        reason, alone = self._how()
        if reason is not None or not takes(x):
            return None
        vector, *others = self._vectors()
        for other in others:
            vector = vector * other
        base = self._modules["base_layer"]
        if alone is not None or sums_wider(base, x):
            if self.is_feedforward:
                return base(ops.ia3_scale(x, vector.flatten()))
            result = base(x)
            return ops.ia3_scale(result, vector.flatten()) if takes(result) else (result * vector.flatten()).to(result)
        seen, dtype = self._dtypes(x, vector)
        if (entered := enter(base, x, seen)) is None:
            return None
        x, weight, bias, base_dtype = entered
        dtype = dtype or base_dtype
        y = ops.ia3_linear(x, weight, vector, bias, feedforward=self.is_feedforward)
        return y if y.dtype is dtype else y.to(dtype)


if IA3Linear is not None:

    @fuses(IA3Linear)
    class FusedIA3Linear(_IA3, MergesNF4, IA3Linear):
        """``peft.tuners.ia3.Linear`` over nn.Linear, Conv1D, NF4Linear or Linear4bit."""

        _scales_any_base = True

        def _merged(
            self, name: str, weight: Tensor, bias: Optional[Tensor], unmerged: Tensor
        ) -> tuple[Tensor, Optional[Tensor]]:
            vector = self.ia3_l[name].float()
            if bias is not None and not self.is_feedforward:
                bias = bias * vector.flatten()
            return weight * vector, bias


if IA3Linear4bit is not None:

    @fuses(IA3Linear4bit)
    class FusedIA3Linear4bit(_IA3, IA3Linear4bit):
        """``peft.tuners.ia3.bnb.Linear4bit``, which works and returns in float32 outside CUDA's autocast."""

        def _dtypes(self, x: Tensor, vector: Tensor) -> tuple[torch.dtype, Optional[torch.dtype]]:
            if not torch.is_autocast_enabled():  # PEFT asks for CUDA's autocast, whatever the device
                return torch.float32, torch.float32
            wide = torch.promote_types(x.dtype, vector.dtype)
            return (wide if self.is_feedforward else x.dtype), wide
