"""Copies of a model's modules over the model's own weights, which :mod:`.verify` runs in the model's place.

p, the model's parameter  →  a Parameter over the same storage: its own .grad, its own .data, no hooks
a buffer                  →  a copy, since a forward may write to it; codes of 4 bits are shared
"""

from __future__ import annotations

import copy
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..integrations.adapter_layers.base import FOUR_BIT, quant_state_of
from ..nn import NF4Experts, NF4Linear
from ..nn.experts import dense_experts
from ..weight import NF4Weight

__all__ = ["Dequantized", "dequantizing", "twin", "without_dropout"]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Product(torch.autograd.Function):
    """``x Wᵀ`` with a W that is dequantized again in the backward, so that no layer's dense weight is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Dequantized) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.dense(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad @ ctx.layer.dense(grad.dtype)).to(ctx.dtype), None


class Dequantized(nn.Module):
    """A linear layer over a frozen NF4 weight as plain PyTorch computes it.

    Args:
        seen: the dtype that the weight is rounded to before it is multiplied; None: that of x.
    """

    def __init__(self, nf4: NF4Weight, bias: Optional[nn.Parameter], seen: Optional[torch.dtype] = None) -> None:
        super().__init__()
        self.nf4, self.bias, self.seen = nf4, bias, seen
        self.out_features, self.in_features = nf4.shape

    def __deepcopy__(self, memo: dict[int, Any]) -> Dequantized:
        return Dequantized(self.nf4, copy.deepcopy(self.bias, memo), self.seen).train(self.training)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.nf4.dequantize(self.seen or dtype).to(dtype)

    @property
    def weight(self) -> nn.Parameter:
        """The dense weight, made anew: PEFT's DoRA asks for its norm."""
        return nn.Parameter(self.dense(self.nf4.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def twin(model: nn.Module, wide: Optional[torch.dtype] = None, seen: Optional[torch.dtype] = None) -> nn.Module:
    """Returns a copy of ``model``'s modules, of the same classes, over the same weights.

    Args:
        wide: the dtype that weights and buffers are cast to; 4-bit layers compute in that of their input.
        seen: with ``wide``, the dtype that 4-bit weights are rounded to before.

    Raises: ValueError where a part of the model can't be copied, or with ``wide`` a 4-bit weight is not NF4.
    """
    memo: dict[int, Any] = {}
    for name, module in model.named_modules():
        writes = getattr(module, "max_norm", None) is not None  # an embedding's forward shortens its rows in place
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = _alias(parameter, memo, wide, writes)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                value = buffer.data if buffer.dtype is torch.uint8 else buffer.data.clone()
                memo[id(buffer)] = value.to(wide) if wide is not None and value.dtype in _FLOATS else value
        for value in vars(module).values():  # what a forward left on its module, of a graph of its own
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
        if wide is not None and (base := _dequantized(name, module, seen, memo)) is not None:
            memo[id(module)] = base
    try:
        made = copy.deepcopy(model, memo)
    except Exception as error:  # whatever an object that a module holds raises
        raise ValueError(f"verify: model can't be copied: {str(error).partition(chr(10))[0]}") from error
    for module in made.modules():
        if is_parametrized(module):  # whose class is the instance's own, and is changed where the module is restored
            kind = type(module)
            own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind)(kind.__name__, kind.__bases__, own)
        if "support_avx512bf16_for_cpu" in vars(module):  # bitsandbytes repacks the weight in evaluation, for good
            module.support_avx512bf16_for_cpu = False
    return made


def _alias(parameter: nn.Parameter, memo: dict[int, Any], wide: Optional[torch.dtype], writes: bool) -> Any:
    """Returns a parameter over the storage of another one, or over what ``wide`` makes of it."""
    if (state := getattr(parameter, "quant_state", None)) is not None:  # bitsandbytes' class, which copies the rest
        memo[id(state)] = state
        return copy.copy(parameter)
    if type(parameter) is not nn.Parameter:
        return copy.deepcopy(parameter, memo)
    value = parameter.data.clone() if writes else parameter.data  # .data: with a version of its own
    if wide is not None and value.dtype in _FLOATS:
        value = value.to(wide)
    made = nn.Parameter(value, requires_grad=parameter.requires_grad)
    made.__dict__.update(vars(parameter))
    return made


def _dequantized(name: str, module: nn.Module, seen: Optional[torch.dtype], memo: dict[int, Any]) -> Any:
    if isinstance(module, Dequantized):
        return Dequantized(module.nf4, copy.deepcopy(module.bias, memo), seen).train(module.training)
    if type(module) in FOUR_BIT:
        nf4 = NF4Weight.from_bitsandbytes(module.weight, quant_state_of(module))
        bias = copy.deepcopy(module.bias, memo)
        return Dequantized(nf4, bias, module.compute_dtype or seen).train(module.training)
    if type(module).__module__.startswith("bitsandbytes."):
        raise ValueError(f"{name} is a {type(module).__name__}")
    return None


def dequantizing(model: nn.Module) -> nn.Module:
    """Puts plain PyTorch's product in the place of this package's own NF4 modules, in place: their stock form."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, NF4Linear):
                module._modules[name] = Dequantized(child.nf4, child.bias).train(child.training)
        if isinstance(module, NF4Experts):
            dense_experts(module)
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    """Sets to 0, in place, every probability to drop and every jitter, and keeps no cache of keys and values: of
    modules, of their attributes and of their configurations."""
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
