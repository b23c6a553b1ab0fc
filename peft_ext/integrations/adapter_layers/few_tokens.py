"""In a call of few tokens without a gradient, as in generation, a block calls the kernels of its layers directly.

The checks of a fused layer take longer than the layer's kernel if a call has few tokens. A block such as an MLP or an
attention therefore makes a plan: functions that call the kernels of its layers, and :class:`Facts`, the objects that
the checks read. The next call of the block runs the plan if each object that the checks read is still the same object;
otherwise the block makes a new plan. A layer that :func:`direct` does not know is called as a module, with its own
checks.

:func:`few_reason` returns why a call may not run a plan.

:func:`plan_of` returns the plan of a block, and makes a new plan if an object that the checks read has changed.

:func:`direct` returns a function that computes a linear layer, with or without LoRA.

:func:`together` returns a function that computes several linear layers of one input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._native import STATE
from ..._ops import NAMESPACE
from ...nn import NF4Linear, PackedLinear
from ...ops.checks import under_a_transform, weight_args
from ...ops.library import below_autograd
from ...ops.prove import DROPPED
from . import reasons
from .base import runs_as_made
from .known import KNOWN
from .linear import MANY_TOKENS, FusedLinear, is_ahead
from .reasons import any_global_hook, kernel_reason

__all__ = ["Facts", "Kernel", "clear_plans", "direct", "few_reason", "kernel_of", "listed", "plan_of", "together"]

# The attributes of a module with the hooks that can run in a call without a gradient; hooks on the backward can't run
# in such a call.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_look = operator.attrgetter("dtype", "shape", "device")
_is_tracing = torch._C._is_tracing
_PLANS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_MOST_TRIALS = 3


def kernel_of(name: str) -> Callable[..., Any]:
    """Returns a function that calls the kernel of the operator ``peft_ext::<name>`` without autograd."""
    return below_autograd(getattr(getattr(torch.ops, NAMESPACE), name).default)


_linear, _lora, _several = kernel_of("nf4_linear"), kernel_of("lora_linear"), kernel_of("lora_linears")


def few_reason(x: Any) -> Optional[str]:
    """Returns why a call on x ``[batch, tokens, columns]`` may not run a plan, which calls kernels without the checks
    of the layers; else None.

    A call may run a plan if x is contiguous, on a CPU and in a dtype of the operators, with fewer tokens than
    MANY_TOKENS, and if the call is eager and runs without a gradient, autocast, global hooks and transforms of
    torch.func.
    """
    if torch.is_grad_enabled():
        return "the call records gradients"
    if type(x) not in reasons.plain_types() or x.dtype not in reasons.DTYPES or x.layout is not torch.strided:
        return "its input is no plain tensor in float32, bfloat16 or float16"
    if not x.is_cpu:
        return f"it is on {x.device.type}, wanted a CPU"
    if x.dim() != 3 or not 0 < x.numel() < MANY_TOKENS * x.shape[-1] or not x.is_contiguous():
        return "the call has many tokens"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if any_global_hook():
        return "global hooks of torch.nn would not run"
    if torch.compiler.is_compiling() or under_a_transform() or _is_tracing():
        return "the call is traced or transformed"
    return None


class Facts:
    """The objects that the checks of a block and its layers read, with the dicts and names by which the checks read
    them."""

    def __init__(self) -> None:
        self._places: list[dict] = []
        self._names: list[Any] = []
        self._values: list[Any] = []
        self._empty: list[dict] = [DROPPED]
        self._lists: list[list] = []
        self._items: list[list] = []
        self._modules: list[nn.Module] = []
        self._kinds: list[type] = []
        self._forwards: dict[type, Any] = {}
        self._tensors: list[Tensor] = []
        self._looks: list[tuple] = []
        self._compared: Any = None
        self.is_final = True

    def value(self, place: dict, name: Any) -> Any:
        """Returns ``place.get(name)``. Later, ``hold`` returns False if ``place.get(name)`` returns another object."""
        value = place.get(name)
        self._places.append(place)
        self._names.append(name)
        self._values.append(value)
        return value

    def empty(self, place: dict, name: Any) -> bool:
        """Returns whether the dict or the list ``place[name]`` is empty. Later, ``hold`` returns False if the dict or
        the list is not empty."""
        held = self.value(place, name)
        if isinstance(held, dict):
            self._empty.append(held)
        elif held is not None:
            self.same(held)
        return not held

    def tensor(self, place: dict, name: Any) -> Optional[Tensor]:
        """Returns the tensor ``place.get(name)``. Later, ``hold`` returns False if the tensor is another object, or has
        another dtype, shape or device."""
        if (tensor := self.value(place, name)) is not None:
            self._tensors.append(tensor)
            self._looks.append(_look(tensor))
        return tensor

    def plain(self, module: nn.Module) -> bool:
        """Returns whether ``module`` has no forward hooks and no forward of its own, and the forward of its stock class
        was not replaced. Later, ``hold`` returns False if the module has got a forward hook, a forward of its own or
        another class, or if its class has got another forward."""
        self._modules.append(module)
        self._kinds.append(type(module))
        return self.plain_block(module)

    def plain_block(self, module: nn.Module) -> bool:
        """Returns for the block to which these facts belong what :meth:`plain` returns for another module.
        :func:`plan_of` compares the block's class. The facts of a block must not hold the block itself, so that the
        block can be freed."""
        held, kind = module.__dict__, type(module)
        self._forwards[kind] = kind.forward
        if (stock := getattr(kind, "stock_class", None)) is not None:
            if stock.forward is not kind.stock_forward or not runs_as_made(module):
                return False
            self._forwards[stock] = stock.forward
        own = self.value(held, "forward") or self.value(held, "_compiled_call_impl")
        return own is None and all([self.empty(held, name) for name in _HOOKS])

    def child(self, module: nn.Module, name: str) -> Optional[nn.Module]:
        return self.value(module.__dict__["_modules"], name)

    def same(self, held: list) -> list:
        """Returns the list ``held``. Later, ``hold`` returns False if the list has other items."""
        self._lists.append(held)
        self._items.append(list(held))
        return held

    def add(self, other: Facts) -> None:
        for mine, its in zip(vars(self).values(), vars(other).values(), strict=True):
            if isinstance(mine, list):
                mine.extend(its)
        self._forwards.update(other._forwards)
        self.is_final = self.is_final and other.is_final

    def hold(self) -> bool:
        """Returns whether all facts still hold.

        The module ``_C`` has a class that compares the facts of dicts, lists and classes as ``_are_same`` does, and
        faster.
        """
        if self._compared is None and STATE.module is not None:
            self._compared = STATE.module.Facts(*map(tuple, self._of_objects()))
        if not (self._are_same() if self._compared is None else self._compared.hold()):
            return False
        for kind, forward in self._forwards.items():
            if kind.forward is not forward:
                return False
        return list(map(_look, self._tensors)) == self._looks

    def _of_objects(self) -> tuple[list, ...]:
        places, lists = (self._places, self._names, self._values, self._empty), (self._lists, self._items)
        return (*places, *lists, self._modules, self._kinds)

    def _are_same(self) -> bool:
        """Returns whether each dict in ``_places`` has, under its name in ``_names``, its object in ``_values`` (None
        also stands for a missing name), each dict in ``_empty`` is empty, each list in ``_lists`` equals its list in
        ``_items``, and each module has its class in ``_kinds``."""
        same = all(map(operator.is_, map(dict.get, self._places, self._names), self._values))
        same = same and not any(self._empty) and self._lists == self._items
        return same and all(map(operator.is_, map(type, self._modules), self._kinds))


class _Plan(NamedTuple):
    kind: type
    dtype: torch.dtype
    trials: int  # number of plans made so far, one after the other, for the block with this class and dtype
    facts: Facts
    made: Any


def plan_of(block: nn.Module, x: Tensor, make: Callable[[Facts, Tensor], Any]) -> Any:
    """Returns the plan that ``make(facts, x)`` made for this block and x's dtype, and calls ``make`` again once an
    object that the plan depends on (see :class:`Facts`) has changed. As long as the checks of some layer have accepted
    no call (the facts are then not final), each call makes a new plan, until ``_MOST_TRIALS`` plans were made.

    If the block can have no plan, ``make`` returns the reason, and ``plan_of`` returns None. Several threads may call
    ``plan_of`` for one block at the same time.
    """
    plan, trials = _PLANS.get(block), 0
    if plan is not None and plan.dtype is x.dtype and plan.kind is type(block):
        trials = plan.trials
        if (plan.facts.is_final or trials >= _MOST_TRIALS) and plan.facts.hold():
            return plan.made
    facts = Facts()
    made = make(facts, x)
    made = None if isinstance(made, str) else made
    _PLANS[block] = _Plan(type(block), x.dtype, trials + 1, facts, made)
    return made


def clear_plans() -> None:
    """Drops all plans, because a plan keeps the weights of its layers in memory."""
    _PLANS.clear()


class Kernel:
    """Calls the kernel of a linear layer, with the layer's weight, bias and adapter as arguments."""

    __slots__ = ("_args", "_has_adapter", "_kernel", "layer", "weight")

    def __init__(self, kernel: Callable[..., Any], weight: tuple, rest: tuple, layer: tuple) -> None:
        self._kernel, self._args, self._has_adapter = kernel, (*weight, *rest), len(rest) > 1
        self.weight, self.layer = weight, layer

    def __call__(self, x: Tensor) -> Tensor:
        y = self._kernel(x, *self._args)
        return y[0] if self._has_adapter else y


def together(calls: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Sequence[Tensor]]:
    """Returns a function that computes several layers of one input: by one call of ``lora_linears`` if each of
    ``calls`` is a :class:`Kernel`, else by a call of each layer."""
    if not all(type(call) is Kernel for call in calls) or kernel_reason("lora_linears", "cpu") is not None:
        return lambda x: [call(x) for call in calls]
    layers, count = listed(calls), len(calls)
    return lambda x: _several(x, *layers)[:count]


def listed(calls: Sequence[Kernel]) -> tuple[list[Tensor], list[int], list[float]]:
    """Returns the lists of tensors, sizes and numbers that the operator ``lora_linears`` takes for the layers of
    ``calls``."""
    tensors: list[Tensor] = []
    sizes: list[int] = []
    numbers: list[float] = []
    for call in calls:
        bias, lora_A, lora_B, scaling = call.layer
        *held, layout, shape = call.weight
        held += (bias, lora_A, lora_B)
        tensors += [value for value in held if value is not None]
        sizes += [sum(1 << bit for bit, value in enumerate(held) if value is not None), layout, *shape]
        numbers += (scaling, 0.0)
    return tensors, sizes, numbers


def direct(facts: Facts, layer: Any, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the function that computes the linear layer ``layer`` for inputs of x's dtype.

    If :func:`_direct` knows the layer's class and tensors and the kernels may run, the function calls a kernel, or
    F.linear for a dense weight where :func:`.linear.is_ahead` is false. In all other cases, ``direct`` returns the
    layer itself.
    """
    found, own = None, Facts()
    if isinstance(layer, nn.Module):
        width = getattr(layer, "in_features", None)
        if type(width) is int:
            found = _direct(own, layer, x if x.shape[-1] == width else x.new_empty((*x.shape[:-1], width)))
    facts.is_final = facts.is_final and own.is_final
    if found is None:
        return layer
    facts.add(own)
    return found


def _direct(facts: Facts, layer: Any, x: Tensor) -> Optional[Callable[[Tensor], Tensor]]:
    if not facts.plain(layer):
        return None
    if "base_layer" in layer._modules:
        return _adapted(facts, layer, x)
    if kernel_reason("frozen_linear", "cpu") is not None or (found := _operands(facts, layer, x.dtype)) is None:
        return None
    weight, bias = found
    if weight[5] == 0 and not is_ahead(x.dtype):
        dense = weight[0]
        return lambda x: F.linear(x, dense, bias)
    return Kernel(_linear, weight, (bias,), (bias, None, None, 1.0))


def _operands(facts: Facts, layer: Any, dtype: torch.dtype) -> Optional[tuple[tuple, Optional[Tensor]]]:
    """Returns the weight of a linear layer without adapters, as arguments of an operator, and the bias; None if the
    layer's class or its tensors are not known, if the layer would cast its bias, or if the weight is dense and
    ``dtype`` is in ``reasons.WIDENED``."""
    kind, parameters, buffers = type(layer), layer.__dict__["_parameters"], layer.__dict__["_buffers"]
    if kind is not FusedLinear and kind.forward is not reasons.own_forward(kind):
        return None
    held = [facts.value(place, name) for place in (parameters, buffers) for name in list(place)]
    if any(tensor is not None and (type(tensor) not in reasons.plain_types() or hasattr(tensor, "ds_id"))
           for tensor in held):  # fmt: skip
        return None
    bias = facts.value(parameters, "bias")
    if bias is not None and bias.dtype is not dtype:
        return None
    if kind is NF4Linear:
        facts.value(layer.__dict__, "blocksize")
        return (parameters["weight"], *layer.nf4.op_args()[1:]), bias
    if kind is PackedLinear:
        facts.value(layer.__dict__, "_template")
        args = layer.packed.op_args()
        return (args, bias) if any(args[0] is tensor for tensor in held) else None
    weight = facts.tensor(parameters, "weight")
    if weight is None or weight.dtype is not dtype or weight.device.type != "cpu" or dtype in reasons.WIDENED:
        return None
    return weight_args(weight), bias


def _adapted(facts: Facts, layer: Any, x: Tensor) -> Optional[Callable[[Tensor], Tensor]]:
    """Returns the function that computes a LoRA layer with one active adapter, if the layer's checks have accepted an
    equal call before; else None."""
    if not hasattr(layer, "known_call") or (common := layer.known_call(x)) is None:
        return None
    if common[0] not in KNOWN:
        facts.is_final = False  # a later call of the layer may add its facts to KNOWN
        return None
    _, name, base, lora_A, lora_B, p = common
    held = layer.__dict__
    active, scaling = facts.value(held, "_active_adapter"), facts.value(facts.value(held, "scaling"), name)
    if type(active) is list:
        facts.same(active)
    elif type(active) is not str:
        return None
    facts.value(facts.value(held, "lora_variant"), name)
    if p > 0 or name in layer.lora_variant or not facts.empty(held, "merged_adapters"):
        return None
    for attribute in ("_disable_adapters", "cast_input_dtype_enabled", "fan_in_fan_out"):
        facts.value(held, attribute)
    facts.child(layer, "base_layer")
    modules = [base]
    for group in ("lora_A", "lora_B", "lora_dropout"):
        modules.append(facts.value(facts.child(layer, group).__dict__["_modules"], name))
    if not all([facts.plain(module) for module in modules]):
        return None
    for attribute in ("p", "training"):
        facts.value(modules[-1].__dict__, attribute)
    for module in modules[1:3]:
        facts.value(module.__dict__["_parameters"], "weight")
        if facts.value(module.__dict__["_parameters"], "bias") is not None:
            return None
    if (found := _operands(facts, base, x.dtype)) is None:
        return None
    weight, bias = found
    rest = (bias, lora_A, lora_B, None, float(scaling), 0.0, None)
    return Kernel(_lora, weight, rest, (bias, lora_A, lora_B, float(scaling)))
