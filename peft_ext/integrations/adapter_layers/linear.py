"""Frozen linear layers outside of adapter layers, for CPUs where PyTorch has no fast product of the layer's dtype, or
no fast product of few tokens."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

from ... import ops
from ..._native import STATE
from ...ops.checks import autocast_dtype
from . import reasons
from .base import fuses, operands

# Fewest tokens for which the module `siblings` computes sibling layers together; a call of fewer tokens counts as a
# call of few tokens, see the module `few_tokens`. With fewer tokens, the kernels of some CPU paths compute each layer
# separately and share no work.
MANY_TOKENS = 24

# The CPU paths and dtypes in which frozen_linear was measured to be faster than PyTorch's product, for few tokens and a
# dense weight.
_AHEAD = {("avx512_bf16", torch.bfloat16)}

# Fewest elements of a weight with which a layer becomes a FusedLinear only for the sake of calls of few tokens. For
# smaller weights, the checks of a call take as long as frozen_linear saves.
LEAST_ELEMENTS = 1 << 20


@fuses(nn.Linear)
class FusedLinear(nn.Linear):
    """A frozen ``nn.Linear`` that runs :func:`peft_ext.ops.frozen_linear`, for example the head of a language model.

    frozen_linear runs for calls that compute in a dtype of ``reasons.WIDENED`` (PyTorch has no fast product in these
    dtypes on this CPU), except for a single token without a gradient: PyTorch multiplies a single token without
    widening W. In a dtype for which :func:`is_ahead` is true, frozen_linear also runs for few tokens without a
    gradient. PyTorch's product runs for every call for which frozen_linear does not run.
    """

    reads: tuple[str, ...] = ()

    def stock_reason(self) -> Optional[str]:
        return reasons.linear_reason(self, linear_dtype(self))

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, FusedLinear):  # `restore` gave self its stock class, but a caller kept this method
            return type(self).forward(self, input)
        x = input  # nn.Linear names the argument `input`
        if not torch.is_grad_enabled() and self._takes_few(x):
            return ops.frozen_linear(x, self._parameters["weight"], self._parameters["bias"])
        stock = not reasons.accepts_input(x) or reasons.linear_reason(self, autocast_dtype(x) or x.dtype) is not None
        if not stock and operands(self, x) is not None:
            if x.numel() != self.in_features or (torch.is_grad_enabled() and x.requires_grad):
                return ops.frozen_linear(x, self._parameters["weight"], self._parameters["bias"])
        return super().forward(x)

    def _takes_few(self, x: Tensor) -> bool:
        """Returns whether frozen_linear is faster than PyTorch's product for the few tokens of x, and computes what the
        stock forward computes."""
        return (
            not torch.compiler.is_compiling()
            and reasons.accepts_input(x)
            and 0 < x.numel() < MANY_TOKENS * self.in_features
            and is_ahead(x.dtype)
            and autocast_dtype(x) is None
            and reasons.product_reason(self) is None
            and operands(self, x) is not None
        )


def is_ahead(dtype: torch.dtype) -> bool:
    """Returns whether frozen_linear is faster than PyTorch's product in ``dtype`` on this CPU, for few tokens and a
    dense weight."""
    return (STATE.isa, dtype) in _AHEAD


def linear_dtype(layer: nn.Linear) -> torch.dtype:
    """Returns the dtype in which the layer multiplies an x of the weight's dtype."""
    weight = layer.weight  # prune and weight_norm make `weight` an attribute that is no parameter
    return autocast_dtype(weight) or weight.dtype


def would_widen(layer: nn.Module) -> bool:
    """Returns whether ``layer`` is a frozen nn.Linear on a CPU that is faster as a FusedLinear, in some dtype or for
    few tokens.

    For a float32 layer the result is also True if bfloat16 is in ``reasons.WIDENED``, because autocast multiplies in
    bfloat16.
    """
    if type(layer) is not nn.Linear:
        return False
    weight = layer._parameters.get("weight")
    if weight is None or weight.requires_grad or weight.device.type != "cpu":
        return False
    if is_ahead(weight.dtype) and weight.numel() >= LEAST_ELEMENTS:
        return True
    return weight.dtype in reasons.WIDENED or (weight.dtype is torch.float32 and torch.bfloat16 in reasons.WIDENED)
