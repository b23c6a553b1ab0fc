"""RMSNorm and LayerNorm computed by fused operators. The backward needs x, the weight and one or two numbers per row,
and no float32 copy of x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from ... import ops
from ...ops.checks import autocast_dtype
from ...text import dtype_name
from ..adapter_layers.few_tokens import Facts, kernel_of
from ..adapter_layers.reasons import kernel_reason, plain_types, tensor_reason
from .block import Fused, Planned

__all__ = ["LEAST", "FloatLayerNorm", "LayerNorm", "RMSNorm"]

_rms_norm = kernel_of("rms_norm")
# Fewest elements of x for which an nn.LayerNorm on a CPU runs the operator, by dtype. For fewer elements PyTorch's
# layer_norm is faster, because its call has less overhead.
LEAST = {torch.bfloat16: 1 << 17, torch.float16: 1 << 17, torch.float32: 1 << 20}


class Norm(Fused):
    """The base class of fused norms over the last dimension."""

    def _of_two_dtypes(self, x: Tensor, weight: Tensor) -> Optional[str]:
        same = x.dtype is weight.dtype
        return None if same else f"its input is {dtype_name(x.dtype)}, its weight {dtype_name(weight.dtype)}"

    def _norm_reason(self, operator: str, eps: Any, *names: str) -> Optional[str]:
        if reason := self.replaced_reason():
            return reason
        for name in names:
            if name not in self._parameters:
                return f"its {name} is no parameter of its own (torch.nn.utils.prune and parametrize make it of others)"
            value = self._parameters[name]
            if value is not None and (reason := tensor_reason(f"its {name}", value, 1)):
                return reason
        if type(eps) not in (int, float):
            return f"its eps is a {type(eps).__name__}, wanted a number"
        weight = self._parameters[names[0]]
        return "it has no weight" if weight is None else kernel_reason(operator, weight.device.type)


class NormCall(NamedTuple):
    """The plan of an RMSNorm for calls of few tokens: calls the operator's kernel for a contiguous x."""

    weight: Tensor
    eps: float
    offset: float
    rounds: bool

    def __call__(self, x: Tensor) -> Tensor:
        return _rms_norm(x, *self)[0]


class RMSNorm(Planned, Norm):
    """A fused RMSNorm: ``x / sqrt(mean x² + eps) ∘ (weight + offset)``, computed in float32. If the row of the table of
    forms says ``rounds=yes``, the normalized x is rounded to x's dtype before the multiplication by the weight."""

    block_kind = "RMSNorm"

    def block_reason(self) -> Optional[str]:
        known = self.peft_ext_known
        return self._norm_reason("rms_norm", getattr(self, known.eps), known.weight)

    def call_reason(self, x: Tensor) -> Optional[str]:
        known = self.peft_ext_known
        return None if known.mixed else self._of_two_dtypes(x, self._parameters[known.weight])

    def _few(self, facts: Facts, x: Tensor) -> Union[NormCall, str]:
        known = self.peft_ext_known
        weight, eps = facts.tensor(self._parameters, known.weight), facts.value(self.__dict__, known.eps)
        if reason := self.held_reason(facts) or self.block_reason() or self._of_two_dtypes(x, weight):
            return reason
        if type(weight) not in plain_types() or x.shape[-1] != weight.shape[0]:
            return f"its weight is a {type(weight).__name__} of {list(weight.shape)}, its input {list(x.shape)}"
        return NormCall(weight, float(eps), float(known.offset or 0), known.rounds)

    def _fused(self, x: Tensor) -> Tensor:
        known = self.peft_ext_known
        weight, eps, offset = self._parameters[known.weight], getattr(self, known.eps), float(known.offset or 0)
        if x.dim() == 0 or x.shape[-1] != weight.shape[0] or self.call_reason(x) is not None:
            return self.stock_class.forward(self, x)
        y = _with_strides_of(x, lambda x: ops.rms_norm(x, weight, eps, offset=offset, round_before_weight=known.rounds))
        return self.stock_class.forward(self, x) if y is None else y


def _with_strides_of(x: Tensor, norm: Callable[[Tensor], Tensor]) -> Optional[Tensor]:
    """Returns ``norm(x)`` with the strides of x, which the results of a stock class's elementwise operations have; None
    if x has gaps or overlapping elements, or if the elements of its last dimension are not adjacent."""
    if x.is_contiguous():
        return norm(x)
    # The permutation keeps the last dimension of x last. The permuted x is contiguous if x has neither gaps nor
    # overlapping elements, and the elements of its last dimension are adjacent.
    order = sorted(range(x.dim()), key=lambda dim: (dim == x.dim() - 1, -x.stride(dim)))
    permuted = x.permute(order)
    if not permuted.is_contiguous():
        return None
    return norm(permuted).permute([order.index(dim) for dim in range(x.dim())])


class FloatLayerNorm(Norm):
    """A LayerNorm whose class converts x to float32, computes in float32 and rounds the result once to x's dtype.

    Values of a FloatLayerNorm's row in the table of forms: ``weight``, the name of the weight, "" for none; ``eps``,
    the name of the attribute eps, or, without a weight, the value of eps; ``shape``, without a weight, the name of the
    attribute that holds the normalized shape.
    """

    block_kind = "LayerNorm"

    def block_reason(self) -> Optional[str]:
        known = self.peft_ext_known
        if known.weight:
            return self._norm_reason("layer_norm", getattr(self, known.eps), known.weight)
        if reason := self.replaced_reason():
            return reason
        shape = getattr(self, known.shape)
        return None if type(shape) is tuple and len(shape) == 1 else f"its {known.shape} is {shape}, wanted one number"

    def call_reason(self, x: Tensor) -> Optional[str]:
        return kernel_reason("layer_norm", x.device.type)

    def _fused(self, x: Tensor) -> Tensor:
        known = self.peft_ext_known
        weight = self._parameters[known.weight] if known.weight else None
        shape = getattr(self, known.shape) if weight is None else tuple(weight.shape)
        y = None
        if x.shape[-1:] == shape and self.call_reason(x) is None:
            if weight is None:  # F.layer_norm, which the class calls, returns a contiguous result
                return ops.layer_norm(x, None, None, float(known.eps))
            y = _with_strides_of(x, lambda x: ops.layer_norm(x, weight, None, getattr(self, known.eps)))
        return self.stock_class.forward(self, x) if y is None else y


class LayerNorm(Norm):
    """A fused nn.LayerNorm over the last dimension.

    PyTorch's own layer_norm runs, among other cases, under autocast, which computes layer_norm in float32, for few
    elements on a CPU (see LEAST), where the dtype or the last size of x differs from the weight's, and for a LayerNorm
    without a weight or over several dimensions.
    """

    block_kind = "LayerNorm"

    def block_reason(self) -> Optional[str]:
        weight = self._parameters.get("weight")
        if weight is None or len(self.normalized_shape) != 1:
            return "it has no weight of its own, or is over several dimensions"
        if autocast_dtype(weight):
            return "autocast takes it in float32"
        return self._norm_reason("layer_norm", self.eps, "weight", "bias")

    def call_reason(self, x: Tensor) -> Optional[str]:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if bias is not None and bias.dtype is not weight.dtype:
            return f"its weight is {dtype_name(weight.dtype)}, its bias {dtype_name(bias.dtype)}"
        return self._of_two_dtypes(x, weight)

    def _fused(self, x: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        few = x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() < LEAST.get(x.dtype, 0)
        # If the dtype or the shape of x does not fit the weight, PyTorch's layer_norm raises its own error, or computes
        # with two dtypes.
        if few or x.shape[-1:] != self.normalized_shape or self.call_reason(x) is not None:
            return nn.LayerNorm.forward(self, x)
        return ops.layer_norm(x, weight, self._parameters["bias"], self.eps)
