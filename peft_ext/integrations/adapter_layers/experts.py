"""PEFT's LoRA on the experts of a mixture (``target_parameters``) on :func:`peft_ext.ops.lora_experts`, and DoRA there.

PEFT adds W + s B A of all experts on each forward, and lets the experts' own forward run over the sums. Here the rows
of each expert meet its own weight, dense or NF4, and adapter, and no sum is made:

    sort tokens by expert → gate and up (adapted) → the model's own gate → down (adapted) → times the routing weights
    → back in order, summed over a token's experts

as transformers' "grouped_mm" experts compute it, whichever implementation the model is set to. The router is untouched.
Llama 4 gives every token to every expert, times a routing weight that may be 0: there the rows come in order. Several
active adapters are one of the sum of their ranks; of several with a DoRA among them each adds to the base's rows what
it alone would change, as in PEFT.

PEFT nests a wrapper for each parameter around the experts' module: the outermost computes, those within it run where it
leaves the call to PEFT.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from ... import ops
from ..._imports import optional, version
from ...nn.experts import (
    NF4Experts,
    computing,
    expert_parameters,
    gate,
    is_computing,
    is_stored_transposed,
    route,
    routes,
)
from ...ops.checks import autocast_dtype
from ...reference.dora import output_scale
from ...weight import NF4Weight
from ..forms import row_of
from ..forms.activations import activation_name
from .base import DTYPES, KEPT, Fused, active_in, class_name, fuses, is_fully_sharded
from .dora import cached_norm
from .dora_experts import DoraParamWrapper, factors, is_dora, magnitude_of
from .merging import MERGE_LOSES, check_adapters_to_merge
from .reasons import (
    accepts_input,
    any_global_hook,
    hooked,
    kernel_reason,
    layer_reason,
    magnitude_reason,
    tensor_reason,
)
from .recompute import computed_again

ParamWrapper = None
with optional("peft", "LoRA on the experts of a mixture is not fused"):
    from peft.tuners.lora.layer import ParamWrapper

# accelerate's experts_dropout: the attribute of a wrapper that has one, which PEFT's configuration can't say.
EXPERTS_DROPOUT = "_peft_ext_experts_dropout"

# By the function of a class of experts: whether its form is a known gate, as it was when it was first asked.
_GATES: dict[Any, bool] = {}


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
        if not any(map(_names, wrappers)):
            return "no active adapter on this layer", None
        for wrapper in wrappers:
            if reason := layer_reason(wrapper) or _adapter_reason(wrapper):
                return reason, None
            if wrapper is not self and hooked(wrapper) and not _calls_hooks(experts, wrapper):
                return "hooks on a wrapper within would not run", None
        if any_global_hook() and not _calls_hooks(experts):
            return "global hooks of torch.nn would not run", None
        device = experts._parameters[expert_parameters(experts)[0]].device.type
        return kernel_reason("lora_experts", device), None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, Experts):  # see Fused.forward
            return type(self).forward(self, x, *args, **kwargs)
        if is_computing(self.get_base_layer()):  # with this wrapper's adapters
            return self._modules["base_layer"](x, *args, **kwargs)
        y = self._routed(x, *args, **kwargs)
        return self._stock(x, *args, **kwargs) if y is None else y

    def _stock(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapted = _names(self) and not (self._disable_adapters or self.merged_adapters or "adapter_names" in kwargs)
        if adapted and isinstance(self.get_base_layer(), NF4Experts):
            reason = self.stock_reason() or "what came is not plain tokens, their experts and weights"
            raise RuntimeError(
                f"peft_ext: PEFT can't add an adapter to NF4 experts, and this one is not fused: {reason}"
            )
        return super(Fused, self).forward(x, *args, **kwargs)

    def _routed(self, x: Tensor, *args: Any, **kwargs: Any) -> Optional[Tensor]:
        """Returns what the op computes of tokens [T, H], their experts [T, k] and their weights [T, k]; or None."""
        if not accepts_input(x) or self._reasons()[0] is not None:
            return None
        wrappers = self._wrappers()
        experts = wrappers[-1]._modules["base_layer"]
        given = (*args, *kwargs.values())  # by position, or in the order of the forward's own names
        if not routes(experts, x, given):
            return None
        adapters = {wrapper.parameter_name: wrapper for wrapper in wrappers if _names(wrapper)}
        first, second = expert_parameters(experts)

        def run(rows: Tensor, offsets: Tensor) -> Tensor:
            rows = _linear(experts, adapters, first, rows, offsets)
            return _down(experts, adapters, second, rows, offsets)

        if _calls_hooks(experts) and (any_global_hook() or any(map(hooked, (*wrappers[1:], experts)))):
            return self._called(experts, run, x, *args, **kwargs)
        return route(experts, x, given, run)

    def _called(self, experts: NF4Experts, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, *args: Any,
                **kwargs: Any) -> Tensor:  # fmt: skip
        """Returns what calling what this wraps gives, with ``run`` in the experts' own forward."""
        ran = False

        def noted(rows: Tensor, offsets: Tensor) -> Tensor:
            nonlocal ran
            ran = True
            return run(rows, offsets)

        with computing(experts, noted):
            y = self._modules["base_layer"](x, *args, **kwargs)
        if not ran:
            raise RuntimeError(
                "peft_ext: PEFT can't add an adapter to NF4 experts, and this one, with hooks around them, was left "
                "out: their own forward did not run, or under torch.compile"
            )
        return y


def _calls_hooks(experts: Any, *on_the_way: Any) -> bool:
    """Returns whether the experts' forward is ours to compute in, so that hooks run as it is called; not where one of
    them gathers shards, which the op would have to have before."""
    if not isinstance(experts, NF4Experts) or torch.compiler.is_compiling() or "forward" in experts.__dict__:
        return False
    return not any(is_fully_sharded(type(module)) for module in (experts, *on_the_way))


def _experts_reason(experts: Any, names: list[str]) -> Optional[str]:
    """Returns why the experts' own forward has to run."""
    if not (held := expert_parameters(experts)):
        return f"it is over a {class_name(type(experts))}, wanted a mixture's experts, as transformers keeps them"
    if getattr(experts, "_is_expert_parallel", False):
        return "its experts are distributed"
    if hooked(experts) and not _calls_hooks(experts):
        return "hooks on the experts would not run"
    if len(set(names)) < len(names) or not set(names) <= set(held):
        return f"the parameters {', '.join(names)} are adapted, wanted {' or '.join(held)}"
    for name in held:
        weight, quantized = experts._parameters.get(name), isinstance(experts, NF4Experts)
        if weight is None:  # parametrized, where PEFT's own forward is under way
            return f"its {name} is no parameter of its own"
        if reason := tensor_reason(f"its {name}", weight, dim=2 if quantized else 3):
            return reason
        if weight.requires_grad:
            return f"its {name} requires grad"
        if not quantized and weight.dtype not in DTYPES:
            return f"its {name} is {str(weight.dtype).removeprefix('torch.')}, wanted float32, bfloat16 or float16"
    return None


def _names(wrapper: Any) -> list[str]:
    """Returns the active adapters that a wrapper has."""
    return active_in(wrapper, wrapper._modules["lora_A"])


def _adapter_reason(wrapper: Any) -> Optional[str]:
    """Returns why a wrapper's adapters are not fused; one that has no active one has nothing against it."""
    for name in _names(wrapper):
        for kind in ("lora_A", "lora_B"):
            weight = wrapper._modules[kind]._modules[name]._parameters["weight"]  # all that PEFT takes of it
            if reason := tensor_reason(kind, weight):
                return reason
            if weight.dtype not in DTYPES:
                return f"{kind} is {str(weight.dtype).removeprefix('torch.')}, wanted float32, bfloat16 or float16"
        if not isinstance(wrapper.scaling[name], (int, float)):
            return "its scaling is a tensor"
        module = wrapper._modules["lora_magnitude_vector"]._modules.get(name)
        if module is not None and (reason := magnitude_reason(module, dim=2)):
            return reason
    return None


def _adapter(wrapper: Any, names: list[str]) -> tuple[Tensor, Tensor, float]:
    """Returns lora_A [E, R, K], lora_B [E, N, R] and the scaling of a wrapper's adapters together."""
    found = [(*factors(wrapper, name), float(wrapper.scaling[name])) for name in names]
    if len(found) == 1:
        return found[0]
    with torch.autocast(found[0][0].device.type, enabled=False):  # a CPU's in bfloat16 refuses float16
        return torch.cat([a for a, _, _ in found], 1), torch.cat([b * scale for _, b, scale in found], 2), 1.0


def _linear(experts: Any, adapters: dict[str, Any], name: str, rows: Tensor, offsets: Tensor) -> Tensor:
    """Returns a parameter's product with the rows, its adapter and its bias."""
    transposed = is_stored_transposed(experts)
    weight: Union[Tensor, NF4Weight]
    if isinstance(experts, NF4Experts):
        weight, bias = experts.nf4(name), experts.bias_of(name, rows)
    else:
        weight = experts._parameters[name]
        weight = weight.transpose(1, 2) if transposed else weight
        bias = experts._parameters[f"{name}_bias"] if getattr(experts, "has_bias", False) else None
        if rows.dtype is not weight.dtype and not torch.is_autocast_enabled(rows.device.type):
            rows = rows.to(weight.dtype)
    if (wrapper := adapters.get(name)) is None:
        return ops.experts_linear(rows, weight, offsets, bias)
    names = _names(wrapper)
    if len(names) == 1 or not is_dora(wrapper, names):
        return _adapted(wrapper, names, rows, weight, offsets, bias)
    base, (first, *others) = ops.experts_linear(rows, weight, offsets), names
    total = _adapted(wrapper, [first], rows, weight, offsets, bias).float()
    for name in others:
        total = total + (_adapted(wrapper, [name], rows, weight, offsets, None).float() - base.float())
    return total.to(base.dtype)


def _adapted(
    wrapper: Any, names: list[str], rows: Tensor, weight: Union[Tensor, NF4Weight], offsets: Tensor,
    bias: Optional[Tensor],
) -> Tensor:  # fmt: skip
    """Returns a parameter's product with the rows under one DoRA, or under LoRAs together."""
    lora_A, lora_B, scaling = _adapter(wrapper, names)
    dropout = {"dropout_p": wrapper.__dict__.get(EXPERTS_DROPOUT, 0.0), "training": wrapper.training}
    if (magnitude := magnitude_of(wrapper, names[0])) is None:
        return ops.lora_experts(rows, weight, offsets, lora_A, lora_B, bias, scaling=scaling, **dropout)
    module, dtype = wrapper._modules["lora_magnitude_vector"]._modules[names[0]], autocast_dtype(rows) or rows.dtype
    norm = cached_norm(module, names[0], dtype, weight, lora_A, lora_B, scaling)
    return ops.dora_experts(rows, weight, offsets, lora_A, lora_B, magnitude, bias, scaling=scaling, weight_norm=norm,
                            **dropout)  # fmt: skip


def _known_gate(experts: Any, dtype: torch.dtype) -> Optional[str]:
    """Returns the activation of experts that compute act(rows), or act(first half) times the second; None: others."""
    gated, act_fn = getattr(experts, "has_gate", True), getattr(experts, "act_fn", None)
    act = None if act_fn is None or _has_hooks(act_fn) else activation_name(act_fn, dtype)
    return act if act is None or not gated or _is_plain_gate(experts) else None


def prepare_experts(model: nn.Module, dropout: float) -> None:
    """Leaves on the wrappers of a model's experts what :func:`peft_ext.accelerate` was told, and has the experts'
    gates looked up again."""
    clear_experts(model)
    _GATES.clear()
    for module in model.modules():
        if isinstance(module, Experts) and dropout:
            module.__dict__[EXPERTS_DROPOUT] = dropout


def clear_experts(model: nn.Module) -> None:
    """Undoes :func:`prepare_experts`."""
    for module in model.modules():
        module.__dict__.pop(EXPERTS_DROPOUT, None)


def _down(experts: Any, adapters: dict[str, Any], name: str, rows: Tensor, offsets: Tensor) -> Tensor:
    """Returns the second layer's output of the first one's; a gate that is known is computed again in the backward."""
    if torch.compiler.is_compiling() or (act := _known_gate(experts, rows.dtype)) is None:
        return _linear(experts, adapters, name, gate(experts, rows), offsets)
    gated = getattr(experts, "has_gate", True)
    operator = ops.gated_activation if gated else ops.activation
    args = (rows, None, act) if gated else (rows, act)
    h = operator(*args)
    with computed_again(h, operator, *args):
        return _linear(experts, adapters, name, h, offsets)


def _is_plain_gate(experts: Any) -> bool:
    """Returns whether the experts' gate is act(first half) times the second: the form of their class's function."""
    kind = type(experts)
    own = getattr(kind, "_apply_gate", None)
    if own is None or "_apply_gate" in experts.__dict__:
        return own is None  # then nn.experts.gate computes it
    if own not in _GATES:
        found = row_of(kind, "_apply_gate")
        _GATES[own] = not isinstance(found, str) and found[0].kind == "gate"
    return _GATES[own]


def _has_hooks(act: Any) -> bool:
    return isinstance(act, nn.Module) and hooked(act)


class MergesExperts:
    """merge and unmerge of a wrapper over :class:`NF4Experts`; over dense experts the stock class's own."""

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """As :class:`.merging.MergesNF4` does it, expert by expert: always from the weight that was kept."""
        experts, parameter = self.get_base_layer(), self.parameter_name
        if not isinstance(experts, NF4Experts):
            return super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if check_adapters_to_merge is None:
            raise RuntimeError(f"merge: {version('peft')} has no peft.tuners.tuners_utils.check_adapters_to_merge")
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        kept = self.__dict__.get(KEPT, experts.nf4(parameter))
        weight, together = kept.to(experts.nf4(parameter).device), [*self.merged_adapters, *names]
        if len(together) > 1 and is_dora(self, together):
            raise ValueError(
                f"merge: the adapters {', '.join(together)}, one of them DoRA, into NF4 experts: merge one alone, or "
                "call peft_ext.dequantize_nf4(model) before it"
            )
        with torch.no_grad():
            lora_A, lora_B, scaling = _adapter(self, together)
            scales: Any = [None] * weight.shape[0]
            if (magnitude := magnitude_of(self, together[0])) is not None:
                scales = output_scale(magnitude, ops.dora_experts_weight_norm(weight, lora_A, lora_B, scaling))
            merged = [
                ops.nf4_merge(weight.expert(e), lora_A[e].contiguous(), (lora_B[e] * scaling).contiguous(),
                              row_scale=scales[e])
                for e in range(weight.shape[0])
            ]  # fmt: skip
        if safe_merge and not all(math.isfinite(error) for _, error in merged):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(together)} seems to be "
                             "broken")  # fmt: skip
        experts.set_nf4(parameter, replace(NF4Weight.stack([one for one, _ in merged]), dtype=weight.dtype))
        self.__dict__[KEPT] = kept
        self.merged_adapters.extend(names)
        warnings.warn(MERGE_LOSES, stacklevel=2)

    def unmerge(self) -> None:
        experts = self.get_base_layer()
        if not self.merged or not isinstance(experts, NF4Experts):
            return super().unmerge()
        if KEPT not in self.__dict__:
            raise RuntimeError("the NF4 weight from before the merge is not here: it was merged elsewhere")
        kept = self.__dict__.pop(KEPT)
        experts.set_nf4(self.parameter_name, kept.to(experts.nf4(self.parameter_name).device))
        self.merged_adapters.clear()


if ParamWrapper is not None:

    @fuses(ParamWrapper)
    class FusedExperts(MergesExperts, Experts, ParamWrapper):
        """LoRA on one parameter of a mixture's experts."""

        def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
            if not (config.use_dora and expert_parameters(self.get_base_layer())):
                return super().update_layer(adapter_name, *args, config=config, **kwargs)
            self.__class__ = FusedDoraExperts  # which can take it
            self.update_layer(adapter_name, *args, config=config, **kwargs)


if DoraParamWrapper is not None:

    @fuses(DoraParamWrapper)
    class FusedDoraExperts(MergesExperts, Experts, DoraParamWrapper):
        """LoRA or DoRA on one parameter of a mixture's experts."""
