"""Frozen linear layers outside of adapter layers, for CPUs where PyTorch has no fast product of the layer's dtype."""

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
    """A frozen ``nn.Linear`` on :func:`peft_ext.ops.frozen_linear`, for example the head of a language model.

    frozen_linear runs for calls that compute in a dtype of ``reasons.WIDENED``, except for a single token without a
    gradient. PyTorch's product runs in other dtypes, and for a single token without a gradient: PyTorch multiplies a
    single token without widening W.
    """

    reads: tuple[str, ...] = ()

    def stock_reason(self) -> Optional[str]:
        return reasons.linear_reason(self, linear_dtype(self))

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, FusedLinear):  # see Fused.forward
            return type(self).forward(self, input)
        x = input  # nn.Linear names the argument `input`
        stock = not reasons.accepts_input(x) or reasons.linear_reason(self, autocast_dtype(x) or x.dtype) is not None
        if not stock and operands(self, x) is not None:
            if x.numel() != self.in_features or (torch.is_grad_enabled() and x.requires_grad):
                return ops.frozen_linear(x, self._parameters["weight"], self._parameters["bias"])
        return super().forward(x)


def linear_dtype(layer: nn.Linear) -> torch.dtype:
    """Returns the dtype in which the layer multiplies an x of the weight's dtype."""
    weight = layer.weight  # prune and weight_norm make `weight` an attribute that is no parameter
    return autocast_dtype(weight) or weight.dtype


def would_widen(layer: nn.Module) -> bool:
    """Returns whether ``layer`` is a frozen nn.Linear on a CPU that is faster as a FusedLinear in some dtype.

    A float32 layer counts if bfloat16 is in ``reasons.WIDENED``, because autocast multiplies in bfloat16.
    """
    if type(layer) is not nn.Linear:
        return False
    weight = layer._parameters.get("weight")
    if weight is None or weight.requires_grad or weight.device.type != "cpu":
        return False
    return weight.dtype in reasons.WIDENED or (weight.dtype is torch.float32 and torch.bfloat16 in reasons.WIDENED)
