"""Makes copies of a model's modules that share the model's weights. :mod:`.compare` runs the copies, not the model.

In a copy, a parameter of the model becomes, except in the cases of the next paragraph, a Parameter on the same storage,
with its own .grad and .data and without hooks. A buffer of the model becomes a copy, because a forward may write to a
buffer; uint8 buffers (4-bit codes) are shared.

A parameter gets a storage of its own if it is the weight of an nn.Embedding with ``max_norm``, whose forward writes to
the weight, if it is cast to a wider dtype, or if its class is neither nn.Parameter nor a 4-bit class of bitsandbytes.
"""

from __future__ import annotations

import copy
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..integrations.adapter_layers.base import FOUR_BIT, quant_state_of
from ..nn import Float8Linear, NF4Linear, PackedLinear
from ..nn.experts import FrozenExperts, dense_experts
from ..nn.requantize import frozen_weight
from ..reference.float8 import quantized_input
from ..weights.nf4 import NF4Weight
from ..weights.packed import PackedWeight

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Product(torch.autograd.Function):
    """Computes ``x Wᵀ`` with a packed W. The backward dequantizes W again, so that no dense W is kept between forward
    and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Dequantized) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.dense(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad @ ctx.layer.dense(grad.dtype)).to(ctx.dtype), None


class Dequantized(nn.Module):
    """A linear layer over a frozen packed weight, computed in plain PyTorch.

    Args:
        seen: dtype to which the dequantized weight is rounded before the product; None: the dtype of x.
        quantizes: whether the layer quantizes its input, as a Float8Linear does.
    """

    def __init__(
        self,
        packed: PackedWeight,
        bias: Optional[nn.Parameter],
        seen: Optional[torch.dtype] = None,
        quantizes: bool = False,
    ) -> None:
        super().__init__()
        self.packed, self.bias, self.seen, self.quantizes = packed, bias, seen, quantizes
        self.out_features, self.in_features = packed.shape

    def __deepcopy__(self, memo: dict[int, Any]) -> Dequantized:
        bias = copy.deepcopy(self.bias, memo)
        return Dequantized(self.packed, bias, self.seen, self.quantizes).train(self.training)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.packed.dequantize(self.seen or dtype).to(dtype)

    @property
    def weight(self) -> nn.Parameter:
        """Returns a newly dequantized weight, whose norm PEFT's DoRA computes."""
        return nn.Parameter(self.dense(self.packed.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(quantized_input(x, self.packed.group) if self.quantizes else x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def twin(model: nn.Module, wide: Optional[torch.dtype] = None, seen: Optional[torch.dtype] = None) -> nn.Module:
    """Returns a copy of ``model``'s modules, of the same classes, that shares the model's weights.

    Args:
        wide: dtype to which weights and buffers are cast; None: no cast. With ``wide``, packed layers compute in their
            input's dtype.
        seen: with ``wide``, the dtype to which dequantized weights are rounded before the cast to ``wide``.

    Raises: ValueError if a part of the model can't be copied, or with ``wide``, if a layer of bitsandbytes is not NF4.
    """
    memo: dict[int, Any] = {}
    for name, module in model.named_modules():
        # The forward of an nn.Embedding with max_norm writes to the weight.
        writes = getattr(module, "max_norm", None) is not None
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = _alias(parameter, memo, wide, writes)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                value = buffer.data if buffer.dtype is torch.uint8 else buffer.data.clone()
                memo[id(buffer)] = value.to(wide) if wide is not None and value.dtype in _FLOATS else value
        # deepcopy refuses a tensor that a forward stored together with its autograd graph, so the copy gets a detached
        # tensor.
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
        if wide is not None and (base := _dequantized(name, module, seen, memo)) is not None:
            memo[id(module)] = base
    try:
        made = copy.deepcopy(model, memo)
    except Exception as error:  # a module may hold an object whose copy raises any error
        raise ValueError(f"verify: model can't be copied: {str(error).partition(chr(10))[0]}") from error
    for module in made.modules():
        if is_parametrized(module):
            # The copy gets a class of its own, because undoing a parametrization changes the class.
            kind = type(module)
            own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind)(kind.__name__, kind.__bases__, own)
        # If support_avx512bf16_for_cpu stayed True, bitsandbytes would repack the weight, which the copy shares with
        # the model, in evaluation mode.
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False
    return made


def _alias(parameter: nn.Parameter, memo: dict[int, Any], wide: Optional[torch.dtype], writes: bool) -> Any:
    """Returns a new Parameter on the storage of ``parameter``, or on a copy of the storage if ``writes``, or if
    ``wide`` casts the parameter. A quantized parameter of bitsandbytes' 4-bit class is copied with the same storage; a
    parameter of any other class than nn.Parameter gets its own storage."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        # The copy of a parameter of bitsandbytes shares the parameter's quant_state.
        memo[id(state)] = state
        return copy.copy(parameter)
    if type(parameter) is not nn.Parameter:
        return copy.deepcopy(parameter, memo)
    value = parameter.data.clone() if writes else parameter.data  # parameter.data has its own version counter
    if wide is not None and value.dtype in _FLOATS:
        value = value.to(wide)
    made = nn.Parameter(value, requires_grad=parameter.requires_grad)
    made.__dict__.update(vars(parameter))
    return made


def _dequantized(name: str, module: nn.Module, seen: Optional[torch.dtype], memo: dict[int, Any]) -> Any:
    if isinstance(module, Dequantized):
        bias = copy.deepcopy(module.bias, memo)
        return Dequantized(module.packed, bias, seen, module.quantizes).train(module.training)
    if type(module) in FOUR_BIT:
        nf4 = NF4Weight.from_bitsandbytes(module.weight, quant_state_of(module))
        bias = copy.deepcopy(module.bias, memo)
        return Dequantized(nf4, bias, module.compute_dtype or seen).train(module.training)
    if type(module).__module__.startswith("bitsandbytes."):
        raise ValueError(f"{name} is a {type(module).__name__}")
    return None


def dequantizing(model: nn.Module) -> nn.Module:
    """Replaces peft_ext's packed linear layers and experts in ``model`` by plain PyTorch, in place; packed embeddings
    stay. Returns ``model``."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, (NF4Linear, PackedLinear)):
                quantizes = isinstance(child, Float8Linear)
                module._modules[name] = Dequantized(frozen_weight(child), child.bias, None, quantizes)
                module._modules[name].train(child.training)
        if isinstance(module, FrozenExperts):
            dense_experts(module)
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    """Sets the dropout and jitter probabilities in ``model`` to 0, and ``use_cache`` to False, in place.

    Apart from the probabilities of PyTorch's dropout modules, the function finds the probabilities and ``use_cache`` by
    name, among the attributes of modules and of the modules' configurations. Returns ``model``.
    """
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        held = [module]
        while held:
            values = vars(held.pop())
            for name, value in list(values.items()):
                if type(value) is float and 0.0 < value <= 1.0 and ("drop" in name or "jitter" in name):
                    values[name] = 0.0
                elif type(value).__name__.endswith("Config") and id(value) not in seen and hasattr(value, "__dict__"):
                    seen.add(id(value))
                    held.append(value)
            if values.get("use_cache"):
                values["use_cache"] = False
    return model
