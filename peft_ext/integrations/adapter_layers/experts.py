"""LoRA and DoRA on the experts of a mixture (PEFT's ``target_parameters``).

The fused forward runs the operators :func:`peft_ext.ops.lora_experts` and :func:`peft_ext.ops.dora_experts`. PEFT
computes the sum of weight and adapter, W + s B A with the scaling s, of all experts on each forward, and the experts'
own forward uses these sums. The fused forward multiplies the tokens that are routed to an expert with the expert's
weight (dense or packed) and the expert's adapter, and does not compute W + s B A:

    sort tokens by expert → gate and up (adapted) → the model's own gate → down (adapted) → times the routing weights
    → back in order, summed over a token's experts

The fused forward takes its steps in the order of transformers' experts implementation "grouped_mm", also if the model
is set to another experts implementation. The router's code runs unchanged. In Llama 4 every expert gets a copy of every
token, scaled by a routing weight that may be 0, so the rows need no sorting.

Several active LoRA adapters run as one adapter whose rank is the sum of their ranks. If one of several active adapters
is DoRA, each adapter adds the change that this adapter alone makes to the base output, as in PEFT's linear layers.

PEFT nests one wrapper per parameter around the experts' module. The outermost wrapper computes a fused call with the
adapters of all nested wrappers. The inner wrappers compute with their own adapters only if the outermost wrapper takes
the stock path.
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
    FrozenExperts,
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
from ...weights.nf4 import NF4Weight
from ...weights.packed import PackedWeight
from ..forms import row_of
from ..forms.activations import activation_name
from .base import DTYPES, KEPT, Fused, active_in, class_name, fuses, is_fully_sharded
from .dora import cached_norm
from .dora_experts import DoraParamWrapper, check_merged_together, factors, is_dora, magnitude_of
from .merging import MERGE_LOSES, check_adapters_to_merge
from .reasons import (
    accepts_input,
    any_global_hook,
    hooked,
    is_partitioned,
    kernel_reason,
    layer_reason,
    magnitude_reason,
    tensor_reason,
)
from .recompute import computed_again

ParamWrapper = None
with optional("peft", "LoRA on the experts of a mixture is not fused"):
    from peft.tuners.lora.layer import ParamWrapper

# Name of the attribute that holds the experts_dropout of peft_ext.accelerate on a wrapper. PEFT's configuration has no
# field for a dropout on experts.
EXPERTS_DROPOUT = "_peft_ext_experts_dropout"

# Maps the `_apply_gate` function of a class of experts to whether the function's form is a known gate.
# `prepare_experts` clears `_GATES`.
_GATES: dict[Any, bool] = {}


class Experts(Fused):
    """Base class of the fused wrappers of one parameter of an experts' module."""

    reads = (*Fused.reads, "parameter_name", "num_experts", "lora_A", "lora_B", "scaling",
             "_did_swap_in_out_features")  # fmt: skip

    def _wrappers(self) -> list[Any]:
        """Returns this wrapper and the wrappers nested in it around the same experts' module, outermost first."""
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
        if not isinstance(self, Experts):  # `restore` gave self its stock class, but a caller kept this method
            return type(self).forward(self, x, *args, **kwargs)
        if is_computing(self.get_base_layer()):  # the outermost wrapper computes with this wrapper's adapters too
            return self._modules["base_layer"](x, *args, **kwargs)
        y = self._routed(x, *args, **kwargs)
        return self._stock(x, *args, **kwargs) if y is None else y

    def _stock(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapted = _names(self) and not (self._disable_adapters or self.merged_adapters or "adapter_names" in kwargs)
        if adapted and isinstance(self.get_base_layer(), FrozenExperts):
            reason = self.stock_reason() or "what came is not plain tokens, their experts and weights"
            raise RuntimeError(
                f"peft_ext: PEFT can't add an adapter to packed experts, and this one is not fused: {reason}"
            )
        return super(Fused, self).forward(x, *args, **kwargs)

    def _routed(self, x: Tensor, *args: Any, **kwargs: Any) -> Optional[Tensor]:
        """Returns the fused output for T tokens ``x [T, hidden size]``, the k experts ``[T, k]`` of each token and
        their routing weights ``[T, k]``; None if the call takes the stock path."""
        if not accepts_input(x) or self._reasons()[0] is not None:
            return None
        wrappers = self._wrappers()
        experts = wrappers[-1]._modules["base_layer"]
        given = (*args, *kwargs.values())  # assumes keywords in the order of the forward's parameters
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

    def _called(self, experts: FrozenExperts, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, *args: Any,
                **kwargs: Any) -> Tensor:  # fmt: skip
        """Calls the wrapped layer, so that hooks run, and makes the forward of the packed experts call ``run``.

        Returns the wrapped layer's output. Raises RuntimeError if the forward of the packed experts did not call
        ``run``.
        """
        ran = False

        def noted(rows: Tensor, offsets: Tensor) -> Tensor:
            nonlocal ran
            ran = True
            return run(rows, offsets)

        with computing(experts, noted):
            y = self._modules["base_layer"](x, *args, **kwargs)
        if not ran:
            raise RuntimeError(
                "peft_ext: PEFT can't add an adapter to packed experts, and this one, with hooks around them, was left "
                "out: their own forward did not run, or under torch.compile"
            )
        return y


def _calls_hooks(experts: Any, *on_the_way: Any) -> bool:
    """Returns whether the fused output may be computed inside the forward of ``experts``, so that the hooks on the
    experts run.

    Returns False for dense experts, under torch.compile, and for experts with a ``forward`` that is stored on the
    instance. Returns False also if ``fully_shard`` was called on the experts or on a module of ``on_the_way``, because
    the hook that gathers the shards would run too late for the operator.
    """
    if not isinstance(experts, FrozenExperts) or torch.compiler.is_compiling() or "forward" in experts.__dict__:
        return False
    return not any(is_fully_sharded(type(module)) for module in (experts, *on_the_way))


def _experts_reason(experts: Any, names: list[str]) -> Optional[str]:
    """Returns why the experts' own forward has to run; None if an operator can replace it. ``names``: the names of the
    adapted parameters."""
    if not (held := expert_parameters(experts)):
        return f"it is over a {class_name(type(experts))}, wanted a mixture's experts, as transformers keeps them"
    if getattr(experts, "_is_expert_parallel", False):
        return "its experts are distributed"
    if hooked(experts) and not _calls_hooks(experts):
        return "hooks on the experts would not run"
    if len(set(names)) < len(names) or not set(names) <= set(held):
        return f"the parameters {', '.join(names)} are adapted, wanted {' or '.join(held)}"
    for name in held:
        weight, quantized = experts._parameters.get(name), isinstance(experts, FrozenExperts)
        if weight is None:  # the parameter is parametrized, because PEFT's own forward is running
            return f"its {name} is no parameter of its own"
        if reason := tensor_reason(f"its {name}", weight, dim=weight.dim() if quantized else 3):
            return reason
        if is_partitioned(experts._parameters.get(f"{name}_bias")):
            return f"its {name}_bias is a shard (FSDP, ZeRO-3 or tensor parallelism)"
        if weight.requires_grad:
            return f"its {name} requires grad"
        if not quantized and weight.dtype not in DTYPES:
            return f"its {name} is {str(weight.dtype).removeprefix('torch.')}, wanted float32, bfloat16 or float16"
    return None


def _names(wrapper: Any) -> list[str]:
    """Returns the names of the active adapters that have a lora_A in this wrapper."""
    return active_in(wrapper, wrapper._modules["lora_A"])


def _adapter_reason(wrapper: Any) -> Optional[str]:
    """Returns why the active adapters of a wrapper can't be fused; None if they can, or if no adapter is active."""
    for name in _names(wrapper):
        for kind in ("lora_A", "lora_B"):
            # PEFT reads only the weight of lora_A and of lora_B, and does not call the two modules.
            weight = wrapper._modules[kind]._modules[name]._parameters["weight"]
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
    """Returns lora_A ``[experts, R, K]``, lora_B ``[experts, N, R]`` and the scaling of the adapters ``names``.

    Several adapters are concatenated along the rank R, their scalings are multiplied into lora_B, and the returned
    scaling is 1.
    """
    found = [(*factors(wrapper, name), float(wrapper.scaling[name])) for name in names]
    if len(found) == 1:
        return found[0]
    # A CPU's bfloat16 autocast raises an error for float16 tensors in torch.cat.
    with torch.autocast(found[0][0].device.type, enabled=False):
        return torch.cat([a for a, _, _ in found], 1), torch.cat([b * scale for _, b, scale in found], 2), 1.0


def _linear(experts: Any, adapters: dict[str, Any], name: str, rows: Tensor, offsets: Tensor) -> Tensor:
    """Returns the product of ``rows``, the inputs of the experts, with the parameter ``name``, including the
    parameter's adapters and bias."""
    transposed = is_stored_transposed(experts)
    weight: Union[Tensor, PackedWeight]
    if isinstance(experts, FrozenExperts):
        weight, bias = experts.frozen(name), experts.bias_of(name, rows)
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
    wrapper: Any, names: list[str], rows: Tensor, weight: Union[Tensor, PackedWeight], offsets: Tensor,
    bias: Optional[Tensor],
) -> Tensor:  # fmt: skip
    """Returns the product of ``rows``, the inputs of the experts, with a weight that has one DoRA adapter, or one or
    several LoRA adapters."""
    lora_A, lora_B, scaling = _adapter(wrapper, names)
    dropout = {"dropout_p": wrapper.__dict__.get(EXPERTS_DROPOUT, 0.0), "training": wrapper.training}
    if (magnitude := magnitude_of(wrapper, names[0])) is None:
        return ops.lora_experts(rows, weight, offsets, lora_A, lora_B, bias, scaling=scaling, **dropout)
    module, dtype = wrapper._modules["lora_magnitude_vector"]._modules[names[0]], autocast_dtype(rows) or rows.dtype
    norm = cached_norm(module, names[0], dtype, weight, lora_A, lora_B, scaling)
    return ops.dora_experts(rows, weight, offsets, lora_A, lora_B, magnitude, bias, scaling=scaling, weight_norm=norm,
                            **dropout)  # fmt: skip


def _known_gate(experts: Any, dtype: torch.dtype) -> Optional[str]:
    """Returns the name of the activation act if the experts compute act(row), or act(first half) times the second half
    of each row; None if the experts compute another function, or if the activation is not known."""
    gated, act_fn = getattr(experts, "has_gate", True), getattr(experts, "act_fn", None)
    act = None if act_fn is None or isinstance(act_fn, nn.Module) and hooked(act_fn) else activation_name(act_fn, dtype)
    return act if act is None or not gated or _is_plain_gate(experts) else None


def prepare_experts(model: nn.Module, dropout: Optional[float]) -> None:
    """Clears the cache ``_GATES`` of known gates. Unless ``dropout`` is None, also sets the experts_dropout of
    :func:`peft_ext.accelerate` on the wrappers of the model's experts; for 0.0, a stored value is removed."""
    _GATES.clear()
    if dropout is None:
        return
    clear_experts(model)
    for module in model.modules():
        if isinstance(module, Experts) and dropout:
            module.__dict__[EXPERTS_DROPOUT] = float(dropout)


def clear_experts(model: nn.Module) -> None:
    """Removes the experts_dropout that :func:`prepare_experts` stored."""
    for module in model.modules():
        module.__dict__.pop(EXPERTS_DROPOUT, None)


def _down(experts: Any, adapters: dict[str, Any], name: str, rows: Tensor, offsets: Tensor) -> Tensor:
    """Applies the experts' gate to the first layer's output ``rows``, and returns the second layer's output.

    Except under torch.compile, the backward computes a known gate again instead of saving the gate's result.
    """
    if torch.compiler.is_compiling() or (act := _known_gate(experts, rows.dtype)) is None:
        return _linear(experts, adapters, name, gate(experts, rows), offsets)
    gated = getattr(experts, "has_gate", True)
    operator = ops.gated_activation if gated else ops.activation
    args = (rows, None, act) if gated else (rows, act)
    h = operator(*args)
    with computed_again(h, operator, *args):
        return _linear(experts, adapters, name, h, offsets)


def _is_plain_gate(experts: Any) -> bool:
    """Returns whether the experts' gate is act(first half) times the second half, by the form of ``_apply_gate``."""
    kind = type(experts)
    own = getattr(kind, "_apply_gate", None)
    if own is None or "_apply_gate" in experts.__dict__:
        return own is None  # without an `_apply_gate`, nn.experts.gate computes act(first half) times the second half
    if own not in _GATES:
        found = row_of(kind, "_apply_gate")
        _GATES[own] = not isinstance(found, str) and found[0].kind == "gate"
    return _GATES[own]


class MergesExperts:
    """Defines ``merge`` and ``unmerge`` of a wrapper over :class:`NF4Experts`. Over dense experts the stock class's
    methods run; over experts in another packed format ``merge`` raises RuntimeError."""

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Merges adapters into each expert's NF4 weight, starting from the NF4 weight before the first merge."""
        experts, parameter = self.get_base_layer(), self.parameter_name
        if isinstance(experts, FrozenExperts) and not isinstance(experts, NF4Experts):
            raise RuntimeError(
                f"merge: {parameter} is packed ({experts.frozen(parameter).format.name}) and keeps the bytes of the "
                "checkpoint; wanted dense or NF4 experts. Save the adapter, and merge it into a dense model"
            )
        if not isinstance(experts, NF4Experts):
            return super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if check_adapters_to_merge is None:
            raise RuntimeError(f"merge: {version('peft')} has no peft.tuners.tuners_utils.check_adapters_to_merge")
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        kept = self.__dict__.get(KEPT, experts.nf4(parameter))
        weight, together = kept.to(experts.nf4(parameter).device), [*self.merged_adapters, *names]
        check_merged_together(self, together)
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
        """Fused wrapper with LoRA on one parameter of a mixture's experts."""

        def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
            if not (config.use_dora and expert_parameters(self.get_base_layer())):
                return super().update_layer(adapter_name, *args, config=config, **kwargs)
            self.__class__ = FusedDoraExperts  # PEFT's ParamWrapper refuses use_dora, DoraParamWrapper accepts it
            self.update_layer(adapter_name, *args, config=config, **kwargs)


if DoraParamWrapper is not None:

    @fuses(DoraParamWrapper)
    class FusedDoraExperts(MergesExperts, Experts, DoraParamWrapper):
        """Fused wrapper with LoRA or DoRA on one parameter of a mixture's experts."""
