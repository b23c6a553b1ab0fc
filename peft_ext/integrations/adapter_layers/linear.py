"""Frozen linear layers that no adapter's op takes, where PyTorch has no fast product of their dtype."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

from ... import ops
from ...ops.checks import autocast_dtype
from . import reasons
from .base import fuses, operands


@fuses(nn.Linear)
class FusedLinear(nn.Linear):
    """A frozen ``nn.Linear`` that no adapter's op takes, the head among them, on :func:`peft_ext.ops.frozen_linear`.

    For calls in a dtype of ``reasons.WIDENED``; in another one PyTorch's own product runs, and for one token without a
    gradient, which PyTorch multiplies as a vector, without widening W.
    """

    reads: tuple[str, ...] = ()

    def stock_reason(self) -> Optional[str]:
        return reasons.linear_reason(self, linear_dtype(self))

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, FusedLinear):  # see Fused.forward
            return type(self).forward(self, input)
        x = input  # nn.Linear's name
        stock = not reasons.accepts_input(x) or reasons.linear_reason(self, autocast_dtype(x) or x.dtype) is not None
        if not stock and operands(self, x) is not None:
            if x.numel() != self.in_features or (torch.is_grad_enabled() and x.requires_grad):
                return ops.frozen_linear(x, self._parameters["weight"], self._parameters["bias"])
        return super().forward(x)


def linear_dtype(layer: nn.Linear) -> torch.dtype:
    """Returns the dtype that the layer computes in, for an x of its weight's dtype."""
    weight = layer.weight  # of prune's and weight_norm's it is no parameter
    return autocast_dtype(weight) or weight.dtype


def would_widen(layer: nn.Module) -> bool:
    """Returns whether accelerate is to make ``layer``, a frozen nn.Linear, a FusedLinear: some call is faster then.

    One of float32 computes in 16 bits under autocast.
    """
    if type(layer) is not nn.Linear:
        return False
    weight = layer._parameters.get("weight")
    if weight is None or weight.requires_grad or weight.device.type != "cpu":
        return False
    return weight.dtype in reasons.WIDENED or (weight.dtype is torch.float32 and torch.bfloat16 in reasons.WIDENED)
