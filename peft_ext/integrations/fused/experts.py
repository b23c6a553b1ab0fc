"""PEFT's LoRA on the experts of a mixture (``target_parameters``) on :func:`peft_ext.ops.lora_experts`.

PEFT adds W + s B A of all experts on each forward, and lets the experts' own forward run over the sums. Here the rows of
each expert meet its own weight and adapter, and no sum is made:

    sort tokens by expert → gate and up (adapted) → the model's own gate → down (adapted) → times the routing weights
    → back in order, summed over a token's experts

as transformers' "grouped_mm" experts compute it, whichever implementation the model is set to. The router is untouched.

Llama 4 gives every token to every expert, times a routing weight that may be 0: there the rows come in order.

PEFT nests a wrapper for each parameter around the experts' module: the outermost computes, those within it run where it
leaves the call to PEFT.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from ... import ops
from ..._imports import optional
from .base import DTYPES, Fused, class_name, fuses
from .blocks import activation_name, computed_again
from .reasons import accepts_input, hooked, kernel_reason, layer_reason, tensor_reason

ParamWrapper = apply_gate = Llama4TextExperts = None
with optional("peft", "LoRA on the experts of a mixture is not fused"):
    from peft.tuners.lora.layer import ParamWrapper
with optional("transformers", "the gate of a mixture's experts is not fused"):
    from transformers.integrations.moe import _default_apply_gate as apply_gate
with optional("transformers", "LoRA on the experts of Llama 4 is not fused"):
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

# What transformers' decorator for experts leaves on their module.
_DECLARED = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel")


class _Gather(torch.autograd.Function):
    """Rows of x [T, K] in the order of experts, each as often as it has experts; dX sums them in the tokens' order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.tokens = x.shape[0]
        return x.index_select(0, order // (order.shape[0] // max(1, x.shape[0])))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).view(ctx.tokens, -1, grad.shape[1]).sum(1), None, None


class _Order(torch.autograd.Function):
    """Rows [S, N] in another order: ``order`` and ``inverse`` undo one another."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return y.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class Experts(Fused):
    """A wrapper of one parameter of an experts' module."""

    reads = (*Fused.reads, "parameter_name", "num_experts", "lora_A", "lora_B", "scaling",
             "_did_swap_in_out_features")  # fmt: skip

    def _wrappers(self) -> list[Any]:
        """Returns this wrapper and those within it, of the same module."""
        found: list[Any] = [self]
        while isinstance(inner := found[-1]._modules["base_layer"], Experts):
            found.append(inner)
        return found

    def _reasons(self) -> tuple[Optional[str], Optional[str]]:
        wrappers = self._wrappers()
        experts = wrappers[-1]._modules["base_layer"]
        if reason := _experts_reason(experts, [wrapper.parameter_name for wrapper in wrappers]):
            return reason, None
        for wrapper in wrappers:
            if reason := layer_reason(wrapper) or _adapter_reason(wrapper):
                return reason, None
            if wrapper is not self and hooked(wrapper):
                return "hooks on a wrapper within would not run", None
        return kernel_reason("lora_experts", _weights(experts)[0].device.type), None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self._routed(x, *args, **kwargs)
        return super(Fused, self).forward(x, *args, **kwargs) if y is None else y

    def _routed(self, x: Tensor, *args: Any, **kwargs: Any) -> Optional[Tensor]:
        """Returns what the op computes of tokens [T, H], their experts [T, k] and their weights [T, k]; or None."""
        if torch.compiler.is_compiling() or not accepts_input(x) or x.dim() != 2 or self._reasons()[0] is not None:
            return None
        wrappers = self._wrappers()
        experts = wrappers[-1]._modules["base_layer"]
        adapters = {wrapper.parameter_name: wrapper for wrapper in wrappers}
        given = (*args, *kwargs.values())  # by position, or in the order of the forward's own names
        if type(experts) is Llama4TextExperts:
            return _all_tokens(experts, adapters, x) if not given and x.numel() > 0 else None
        if len(given) != 2 or not _routes(x, *given):
            return None
        index, weights = given
        chosen = index.reshape(-1)
        order = chosen.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0], device=order.device)
        offsets = torch.bincount(chosen, minlength=experts.num_experts + 1)[: experts.num_experts].cumsum(0)
        rows = _linear(experts, adapters, _first(experts), _Gather.apply(x, order, inverse), offsets)
        rows = _down(experts, adapters, rows, offsets)
        if experts.has_post_expert_norm:
            rows = experts.post_expert_norm(rows)
        rows = _Order.apply(rows * _Order.apply(weights.reshape(-1, 1), order, inverse), inverse, order)
        return rows.view(x.shape[0], -1, rows.shape[1]).sum(1).to(x.dtype)


def _all_tokens(experts: Any, adapters: dict[str, Any], x: Tensor) -> Tensor:
    """Returns Llama 4's experts' outputs of x [E T, H], T rows for each."""
    count = experts.num_experts
    offsets = torch.arange(1, count + 1, device=x.device) * (x.shape[0] // count)
    return _down(experts, adapters, _linear(experts, adapters, "gate_up_proj", x, offsets), offsets)


def _first(experts: Any) -> str:
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"


def _weights(experts: Any) -> list[Tensor]:
    return [experts._parameters.get(name) for name in (_first(experts), "down_proj")]


def _experts_reason(experts: Any, names: list[str]) -> Optional[str]:
    """Returns why the experts' own forward has to run."""
    known = type(experts) is Llama4TextExperts
    if not known and not all(name in experts.__dict__ for name in _DECLARED):
        return f"its experts are a {class_name(type(experts))}, wanted a module of transformers' experts interface"
    if not known and experts._is_expert_parallel:
        return "its experts are distributed"
    if hooked(experts):
        return "hooks on the experts would not run"
    held = [_first(experts), "down_proj"]
    if len(set(names)) < len(names) or not set(names) <= set(held):
        return f"the parameters {', '.join(names)} are adapted, wanted {' or '.join(held)}"
    for name, weight in zip(held, _weights(experts), strict=True):
        if weight is None:  # parametrized, where PEFT's own forward is under way
            return f"its {name} is no parameter of its own"
        if reason := tensor_reason(f"its {name}", weight, dim=3):
            return reason
        if weight.requires_grad:
            return f"its {name} requires grad"
        if weight.dtype not in DTYPES:
            return f"its {name} is {str(weight.dtype).removeprefix('torch.')}, wanted float32, bfloat16 or float16"
    return None


def _adapter_reason(wrapper: Any) -> Optional[str]:
    """Returns why a wrapper's adapter is not fused."""
    names = [name for name in wrapper.active_adapters if name in wrapper._modules["lora_A"]]
    if len(names) != 1:
        return "no active adapter on this layer" if not names else "several active adapters on experts"
    for kind in ("lora_A", "lora_B"):
        linear = wrapper._modules[kind]._modules[names[0]]
        if hooked(linear):
            return "hooks on lora_A or lora_B would not run"
        if reason := tensor_reason(kind, linear._parameters["weight"]):
            return reason
        if linear._parameters["weight"].dtype not in DTYPES:
            return f"{kind} is {str(linear.weight.dtype).removeprefix('torch.')}"
    if not isinstance(wrapper.scaling[names[0]], (int, float)):
        return "its scaling is a tensor"
    return None


def _routes(x: Tensor, index: Any, weights: Any) -> bool:
    return (
        isinstance(index, Tensor) and isinstance(weights, Tensor) and index.dim() == 2
        and index.shape == weights.shape and index.shape[0] == x.shape[0] and index.numel() > 0
        and not index.is_floating_point() and weights.is_floating_point()
    )  # fmt: skip


def _linear(experts: Any, adapters: dict[str, Any], name: str, rows: Tensor, offsets: Tensor) -> Tensor:
    """Returns a parameter's product with the rows, its adapter and its bias."""
    weight = experts._parameters[name]
    transposed = getattr(experts, "is_transposed", True)  # Llama 4's are
    weight = weight.transpose(1, 2) if transposed else weight
    bias = experts._parameters[f"{name}_bias"] if getattr(experts, "has_bias", False) else None
    if rows.dtype is not weight.dtype and not torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(weight.dtype)
    if (wrapper := adapters.get(name)) is None:
        return ops.experts_linear(rows, weight, offsets, bias)
    (adapter,) = (a for a in wrapper.active_adapters if a in wrapper._modules["lora_A"])
    a, b = (wrapper._modules[kind]._modules[adapter]._parameters["weight"] for kind in ("lora_A", "lora_B"))
    count = weight.shape[0]
    a, b = a.view(count, -1, a.shape[1]), b.view(b.shape[0], -1, count).permute(2, 0, 1)
    if transposed is wrapper._did_swap_in_out_features:
        # PEFT takes the parameter, as it is stored, for [E, out, in]; here it is the other way round, and so are A and B.
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return ops.lora_experts(rows, weight, offsets, a, b, bias, scaling=float(wrapper.scaling[adapter]))


def _down(experts: Any, adapters: dict[str, Any], rows: Tensor, offsets: Tensor) -> Tensor:
    """Returns the second layer's output of the first one's; a gate that is known is computed again in the backward."""
    gated = getattr(experts, "has_gate", True)
    own = gated and getattr(type(experts), "_apply_gate", apply_gate) is not apply_gate  # gpt-oss has one
    act = None if own or _has_hooks(experts.act_fn) else activation_name(experts.act_fn)
    if own or act is None:
        if not gated:
            h = experts.act_fn(rows)
        elif own:
            h = experts._apply_gate(rows)
        else:
            gate, up = rows.chunk(2, dim=-1)
            h = experts.act_fn(gate) * up
        return _linear(experts, adapters, "down_proj", h, offsets)
    operator = ops.gated_activation if gated else ops.activation
    args = (rows, None, act) if gated else (rows, act)
    h = operator(*args)
    with computed_again(h, operator, *args):
        return _linear(experts, adapters, "down_proj", h, offsets)


def _has_hooks(act: Any) -> bool:
    return isinstance(act, nn.Module) and hooked(act)


if ParamWrapper is not None:

    @fuses(ParamWrapper)
    class FusedExperts(Experts, ParamWrapper):
        """LoRA on one parameter of a mixture's experts."""
