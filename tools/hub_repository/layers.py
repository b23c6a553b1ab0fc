"""Layers of which ``kernels.kernelize`` puts the forward in place of the forward of a model's layers.

``kernels`` reads the flags ``has_backward`` and ``can_torch_compile`` of a class in this file. The forward reads the
attributes of the model's layer. In a call that the operators do not compute, LoRALinear and NF4Linear run the model
layer's own forward, and MLP calls act_fn; RMSNorm always calls its operator.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as any_global_hook  # a function without a public name

from . import ops
from .ops.checks import autocast_dtype
from .weights.nf4 import NF4Weight, nf4_from_params4bit, why_not_nf4

__all__ = ["MLP", "LoRALinear", "NF4Linear", "RMSNorm"]

_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- layers -----------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """``y = weight * (x / √(mean x² + eps)).to(x.dtype)``, the RMSNorm of transformers' Llama."""

    weight: Tensor
    variance_epsilon: float
    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class MLP(nn.Module):
    """``y = down_proj(act_fn(gate_proj(x)) ∘ up_proj(x))``, the MLP of transformers' Llama.

    If gate_proj and up_proj both have the forward of :class:`LoRALinear` and the operator can compute both, one call of
    ``lora_linears`` computes the two layers. If :func:`_activation_name` names act_fn (SiLU, GELU or ReLU without
    hooks), one operator usually computes act_fn and the product with up_proj(x); another act_fn is called as a module.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module
    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        gate, up = _together(self.gate_proj, self.up_proj, x) or (self.gate_proj(x), self.up_proj(x))
        name = _activation_name(self.act_fn)
        if name is None or not _is_operand(gate) or not _is_operand(up) or gate.dtype is not up.dtype:
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(ops.gated_activation(gate, up, name))


class LoRALinear(nn.Module):
    """``y = x Wᵀ + b + scaling · (dropout(x) Aᵀ) Bᵀ``, for PEFT's ``lora.Linear`` and ``lora.Linear4bit``.

    One operator computes the layer if the base layer has no hooks and is bitsandbytes' NF4 that computes in x's dtype,
    or torch.nn.Linear with a frozen weight in x's dtype (under autocast, in any dtype). Over any other base layer, the
    base layer's own forward runs, and one operator adds the low-rank term to the base layer's result. PEFT's own
    forward runs, among other cases, if adapters are disabled, merged or chosen per sample, if no adapter or several are
    active, and for variants such as DoRA.
    """

    base_layer: nn.Module
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    scaling: dict
    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs or not _is_operand(x) else _only_adapter(self)
        if adapter is None:
            return type(self).forward(self, x, *args, **kwargs)
        numbers = {"scaling": adapter.scaling, "dropout_p": adapter.dropout_p, "training": True}
        if (frozen := _frozen(self.base_layer, x)) is not None:
            return ops.lora_linear(x, frozen.weight, adapter.lora_A, adapter.lora_B, frozen.bias, **numbers)
        result = self.base_layer(x)
        wide = torch.promote_types(x.dtype, result.dtype)
        # Under autocast, lora_residual would cast both operands and the result to autocast's dtype.
        with torch.autocast(x.device.type, enabled=False):
            y = ops.lora_residual(x.to(wide), result.to(wide), adapter.lora_A, adapter.lora_B, **numbers)
        return y.to(result.dtype)


class NF4Linear(nn.Module):
    """``y = x Wᵀ + b`` over an NF4 weight, for bitsandbytes' ``Linear4bit``.

    bitsandbytes' own forward runs, among other cases, for an FP4 weight and for a weight that bitsandbytes repacked for
    its CPU inference.
    """

    weight: Tensor
    bias: Optional[Tensor]
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        held = _nf4(self, x) if _is_operand(x) else None
        if held is None:
            return type(self).forward(self, x)
        compute = self.compute_dtype or x.dtype
        return ops.nf4_linear(x.to(compute), held.weight, held.bias).to(x.dtype)


# --- what the layers read ---------------------------------------------------------------------------------------------


class _Adapter(NamedTuple):
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float


class _Frozen(NamedTuple):
    weight: Union[Tensor, NF4Weight]
    bias: Optional[Tensor]


def _is_operand(x: Any) -> bool:
    """Returns whether the operators take ``x``: a plain dense tensor of float32, bfloat16 or float16."""
    return type(x) in _PLAIN and x.dtype in _DTYPES and x.layout is torch.strided and not x.is_nested


def _is_hooked(module: nn.Module) -> bool:
    """Returns whether a call of the module runs more than its class's forward or a forward of this file: a hook, or
    another forward that was set on the instance."""
    own = getattr(module.__dict__.get("forward"), "__func__", module.__dict__.get("forward"))
    if own is not None and own not in (type(module).forward, LoRALinear.forward, NF4Linear.forward):
        return True
    return (
        bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        or any_global_hook()
    )


def _activation_name(act: Any) -> Optional[str]:
    """Returns the name by which ``gated_activation`` knows the activation module ``act``; None for an activation that
    has hooks or that the operator does not compute."""
    if not isinstance(act, nn.Module) or _is_hooked(act):
        return None
    if type(act) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
    if type(act).__module__ == "transformers.activations":
        function = getattr(act, "act", None)
        if isinstance(function, partial) and function.func is F.gelu and function.keywords == {"approximate": "tanh"}:
            return "gelu_tanh" if type(act).__name__ == "GELUTanh" else None
        return "silu" if type(act).__name__ == "SiLUActivation" else None
    return {nn.SiLU: "silu", nn.ReLU: "relu"}.get(type(act))


def _only_adapter(layer: Any) -> Optional[_Adapter]:
    """Returns the only active adapter of a LoRA layer; None if PEFT's own forward has to run, for example with several
    active adapters."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if (
        len(names) != 1
        or layer.disable_adapters
        or layer.merged
        or not getattr(layer, "cast_input_dtype_enabled", True)
    ):
        return None
    name = names[0]
    lora_A, lora_B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    scaling = layer.scaling[name]
    if name in layer.lora_variant or type(scaling) not in (float, int):
        return None
    for part in (lora_A, lora_B):
        if type(part) is not nn.Linear or part.bias is not None or not _is_operand(part.weight):
            return None
    if any(map(_is_hooked, (lora_A, lora_B, dropout))):
        return None
    p = 0.0
    if type(dropout) is nn.Dropout:
        p = float(dropout.p) if dropout.training else 0.0
    elif type(dropout) is not nn.Identity:
        return None
    return _Adapter(lora_A.weight, lora_B.weight, float(scaling), p) if p < 1.0 else None


def _frozen(base: nn.Module, x: Tensor) -> Optional[_Frozen]:
    """Returns the weight and bias of a base layer that the operators multiply with x; None if the base layer's own
    forward has to run."""
    if _is_hooked(base):
        return None
    if getattr(base, "quant_state", None) is not None:
        held = _nf4(base, x)
        return held if held is not None and (base.compute_dtype or x.dtype) is x.dtype else None
    if type(base) is not nn.Linear:
        return None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if not _is_operand(weight) or weight.requires_grad or "bias" not in base._parameters:
        return None
    if autocast_dtype(x) is None and (weight.dtype is not x.dtype or (bias is not None and bias.dtype is not x.dtype)):
        return None
    return _Frozen(weight, bias)


def _nf4(layer: Any, x: Tensor) -> Optional[_Frozen]:
    """Returns the weight and bias of bitsandbytes' ``Linear4bit``; None if the layer's own forward has to run."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None) or layer.quant_state
    if why_not_nf4(state) is not None or state.absmax.is_meta:
        return None
    # In the layer's first call, bitsandbytes' own forward sets the compute dtype in the same way.
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    compute = layer.compute_dtype or x.dtype
    if compute not in _DTYPES or autocast_dtype(x) not in (None, compute):
        return None
    bias = layer.bias
    return _Frozen(nf4_from_params4bit(weight, state), None if bias is None else bias.to(compute))


def _together(gate: nn.Module, up: nn.Module, x: Any) -> Optional[tuple[Tensor, ...]]:
    """Returns the results of two layers with the forward of LoRALinear, from one operator; None if each layer's own
    forward has to run."""
    if not _is_operand(x):
        return None
    adapters, held = [], []
    for layer in (gate, up):
        if getattr(layer.__dict__.get("forward"), "__func__", None) is not LoRALinear.forward or _is_hooked(layer):
            return None
        adapter = _only_adapter(layer)
        frozen = None if adapter is None else _frozen(layer.base_layer, x)
        if frozen is None:
            return None
        adapters.append(adapter)
        held.append(frozen)
    return ops.lora_linears(
        x, [one.weight for one in held], [one.lora_A for one in adapters], [one.lora_B for one in adapters],
        [one.bias for one in held], scalings=[one.scaling for one in adapters],
        dropout_ps=[one.dropout_p for one in adapters], training=True,
    )  # fmt: skip
