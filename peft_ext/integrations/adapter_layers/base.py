"""The base class of the fused adapter layers, the tables of fused classes, and functions that read the frozen weight.

A fused class is a subclass of a layer class of PEFT, bitsandbytes or PyTorch. The method ``stock_reason`` of a fused
class returns why the next call takes the stock path (see :mod:`.reasons`). The method ``_fused`` of an adapter layer
computes a call by an operator. :func:`peft_ext.accelerate` replaces the class of a layer. Beside the class,
``accelerate`` changes few attributes of an adapter layer: it stores a chosen dora_dropout or experts_dropout, and
replaces PEFT's variant of DoRA over an NF4Linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..._imports import optional
from ...nn import NF4Linear, PackedLinear
from ...ops.checks import autocast_dtype
from ...weights.fp4 import held_by_params4bit
from ...weights.nf4 import nf4_from_params4bit
from ...weights.packed import PackedWeight
from .foreign import foreign_operands, foreign_weight, is_foreign

Linear4bit = Linear8bitLt = Params4bit = Conv1D = None
with optional("bitsandbytes", "no layer over a Linear8bitLt is fused"):
    from bitsandbytes.nn import Linear8bitLt
with optional("bitsandbytes", "Linear4bit, and an adapter's layer over one, is not fused"):
    from bitsandbytes.nn import Linear4bit, Params4bit
with optional("transformers", "no layer over a Conv1D (GPT-2) is fused"):
    from transformers.pytorch_utils import Conv1D

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Name of the attribute in which an adapter layer keeps the packed weight from before a merge of its adapter, for a
# linear layer together with the bias. The kept tensors are no part of the state dict.
KEPT = "_peft_ext_unmerged"

# FUSED maps each stock class to its fused class. STOCK maps each fused class to its stock class.
FUSED: dict[type, type] = {}
STOCK: dict[type, type] = {}

# Exact types of the linear layers over a dense weight (LINEAR) and over a 4-bit weight of bitsandbytes (FOUR_BIT). The
# decorator `fuses` appends the fused class of a listed type to the same list.
LINEAR: list[type] = [nn.Linear]
FOUR_BIT: list[type] = [] if Linear4bit is None or Params4bit is None else [Linear4bit]

# Exact types of peft_ext's linear layers over a packed weight. NF4Linear and PackedLinear compute in x's dtype.
PACKED: list[type] = [NF4Linear, PackedLinear]

# bitsandbytes' layer classes whose layers `explain` lists also without an adapter.
QUANTIZED = tuple(kind for kind in (Linear4bit, Linear8bitLt) if kind is not None)


def fuses(stock: type) -> Callable[[type], type]:
    """Returns a decorator that registers a class as the fused subclass of ``stock``, under the same ``__name__``.

    The fused class needs the stock ``__name__`` because PEFT, the accelerate library and ``repr`` read ``__name__``
    (for example "Linear4bit"). The ``__qualname__`` stays the fused class's own, because pickle finds the class by
    ``__qualname__``.
    """

    def register(fused: type) -> type:
        fused.__name__, fused.stock_class, fused.stock_forward = stock.__name__, stock, stock.forward
        # The forward in the class's own __dict__, or None; runs_as_made compares it.
        fused.made_forward = fused.__dict__.get("forward")
        FUSED[stock], STOCK[fused] = fused, stock
        for alike in (LINEAR, FOUR_BIT):
            if stock in alike:
                alike.append(fused)
        return fused

    return register


def fused_class(name: str, base: type, stock: Optional[type]) -> Optional[type]:
    """Makes, registers and returns the fused class ``name``, which derives from ``base`` and ``stock``; returns None if
    ``stock`` is None, because the installed package has no such class. The caller must assign the class to the module's
    variable ``name``, by which pickle finds the class."""
    if stock is None:
        return None
    held = {"__module__": base.__module__, "__doc__": f"Fused ``{stock.__module__}.{stock.__name__}``."}
    return fuses(stock)(type(name, (base, stock), held))


class Fused:
    """Base class of the fused adapter layers. The forward runs an operator if the operator computes the stock class's
    result for the call, else the stock class's forward.

    ``reads`` names the attributes that the fused class reads of an instance. ``accelerate`` does not fuse an instance
    that lacks an attribute of ``reads``, and ``explain`` names the missing attribute.
    """

    reads: tuple[str, ...] = ("base_layer", "_active_adapter", "_disable_adapters", "merged_adapters")

    def stock_reason(self) -> Optional[str]:
        """Returns why the next call takes the stock path; None if the call is fused."""
        return self._reasons()[0]

    def part_reason(self, like: Tensor) -> Optional[str]:
        """Returns why, for inputs with the dtype and the device of ``like``, only the adapter's part is fused and the
        base layer's own forward runs; else None."""
        reason, alone = self._reasons()
        if reason is None and alone is None and sums_wider(self._modules["base_layer"], like):
            return "PEFT adds in float32, its base layer multiplies in 16 bits"
        return alone if reason is None else None

    def _reasons(self) -> tuple[Optional[str], Optional[str]]:
        """Returns two values, each a reason or None: why PEFT's own forward has to run, and why the base layer's own
        forward has to run below a fused adapter."""
        raise NotImplementedError

    def _fused(self, x: Tensor) -> Optional[Tensor]:
        """Returns the fused result for x; None if the stock class's forward has to run."""
        raise NotImplementedError

    def _fused_with(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Optional[Tensor]:
        """Returns the fused result of a call with more arguments than x; None if the stock forward has to run."""
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # A caller may have stored the bound method `forward` before `restore`, and call it after `restore` set the
        # stock class.
        if not isinstance(self, Fused):
            return type(self).forward(self, x, *args, **kwargs)
        y = self._fused_with(x, args, kwargs) if args or kwargs else self._fused(x)
        return super().forward(x, *args, **kwargs) if y is None else y


def runs_as_made(module: nn.Module) -> bool:
    """Returns whether a call of ``module`` runs the forward of a fused class as this package made it: the module's
    class is no subclass of the fused class, nobody has replaced the fused class's forward, and ``module.compile()`` was
    not called. The forward of the stock class and hooks are checked elsewhere (see :mod:`.reasons`)."""
    held = type(module).__dict__
    if type(module) not in STOCK or held.get("forward") is not held.get("made_forward", held.get("forward")):
        return False
    return module.__dict__.get("_compiled_call_impl") is None


def active_in(layer: Any, held: Any) -> list[str]:
    """Returns the names of those active adapters of a layer that have an entry in ``held`` (such as ``lora_A``), in the
    order in which PEFT adds up the adapters' results."""
    active = layer._active_adapter
    held = held._modules if type(held) is nn.ModuleDict else held
    if type(active) is not str:
        if len(active) != 1:
            return [name for name in active if name in held]
        (active,) = active
    return [active] if active in held else []


def give_back(module: nn.Module) -> None:
    """Undoes the change of class of a fused module: sets the stock class, or for a parametrized module the stock base
    class."""
    if (stock := STOCK.get(type(module))) is not None:
        module.__class__ = stock
    elif is_parametrized(module):  # register_parametrization gave the module a subclass of the fused class
        type(module).__bases__ = tuple(STOCK.get(base, base) for base in type(module).__bases__)


def class_name(kind: type) -> str:
    return STOCK.get(kind, kind).__name__


def is_fully_sharded(kind: type) -> bool:
    """Returns whether ``kind`` is a class that ``fully_shard`` made for a module. ``is_fully_sharded`` does not import
    torch.distributed."""
    return hasattr(kind, "_get_fsdp_state")


def without_adapters(model: nn.Module, seen: Optional[set[int]] = None) -> Iterator[nn.Module]:
    """Yields the modules of ``model``, also adapter layers and their base layers, but not the other children of adapter
    layers, such as lora_A, and not the children of a ScriptModule."""
    seen = set() if seen is None else seen
    if id(model) in seen:
        return
    seen.add(id(model))
    yield model
    if isinstance(model, torch.jit.ScriptModule):  # the children of a ScriptModule are compiled, and can't be replaced
        return
    base = model._modules.get("base_layer")
    for child in model._modules.values() if base is None else [base]:
        if child is not None:
            yield from without_adapters(child, seen)


# --- the frozen weight ------------------------------------------------------------------------------------------------


def weight_of(base: nn.Module) -> Union[Tensor, PackedWeight]:
    """Returns the frozen weight of an adapter's base layer, ``[N, K]``: a dense tensor, or a PackedWeight that shares
    the layer's memory. Call ``weight_of`` only for a layer for which :func:`.reasons.weight_reason` returns None."""
    kind = type(base)
    if kind in PACKED:
        return base.nf4 if kind is NF4Linear else base.packed
    if is_foreign(kind):
        return foreign_weight(base)
    weight = base._parameters["weight"]
    if kind in FOUR_BIT:
        return _weight_4bit(weight, quant_state_of(base))
    return weight.t() if kind is Conv1D else weight


def _weight_4bit(weight: Tensor, state: Any) -> PackedWeight:
    return held_by_params4bit(weight, state) if state.quant_type == "fp4" else nf4_from_params4bit(weight, state)


def operands(
    base: nn.Module, x: Tensor, seen: Optional[torch.dtype] = None
) -> Optional[tuple[Tensor, Union[Tensor, PackedWeight], Optional[Tensor], torch.dtype]]:
    """Returns x, weight and bias as the base layer's forward passes them to its product, before a cast by autocast, and
    the dtype of that forward's result.

    Returns None if the stock forward has to run, for example because the stock forward raises an error for the dtype of
    x, or because PEFT's sum of the base layer's result and the adapter's result has another dtype. ``seen`` is the
    dtype in which PEFT passes x to the base layer; the default is x's dtype.
    """
    kind, cast = type(base), autocast_dtype(x)
    if is_foreign(kind):
        found = foreign_operands(base, x) if cast is None else None
        return None if found is None else (x, *found, x.dtype)
    bias = base._parameters["bias"]
    if kind not in PACKED and kind not in FOUR_BIT:
        weight = weight_of(base)
        if cast is None and not (weight.dtype is x.dtype and (bias is None or bias.dtype is x.dtype)):
            return None  # the stock forward raises F.linear's error for a mix of dtypes
        return x, weight, bias, cast or x.dtype
    if kind in PACKED:
        return x, weight_of(base), bias if bias is None else bias.to(x.dtype), cast or x.dtype
    seen = seen or x.dtype
    if cast not in (None, seen) and seen is not torch.float32:
        return None  # PEFT's sum of a float16 and a bfloat16 tensor under autocast is float32
    found = operands_4bit(base, x, seen)
    return None if found is None else (*found, seen)


def operands_4bit(
    base: nn.Module, x: Tensor, seen: torch.dtype
) -> Optional[tuple[Tensor, PackedWeight, Optional[Tensor]]]:
    """Returns x, weight and bias as ``Linear4bit.forward`` multiplies them for an x of dtype ``seen``.

    Returns None if ``Linear4bit.forward`` has to run. The returned bias is cast for this call only, whereas
    bitsandbytes casts the parameter itself.
    """
    if not base.compute_type_is_set:
        base.set_compute_type(x.to(seen))
        base.compute_type_is_set = True
    compute = base.compute_dtype or seen
    if compute not in DTYPES or autocast_dtype(x) not in (None, compute):
        return None
    bias = base._parameters["bias"]
    bias = bias if bias is None else bias.to(compute)
    return x.to(compute), weight_of(base), bias


def sums_wider(base: nn.Module, x: Tensor) -> bool:
    """Returns whether a 4-bit layer ``base`` multiplies in a 16-bit dtype while PEFT adds the adapter in float32.

    Returns True outside of autocast if x is float32 (as after the norms of ``prepare_model_for_kbit_training``) and the
    layer's compute_dtype is a 16-bit dtype. If the function returns True, the base layer's own forward runs, as in
    PEFT.
    """
    if type(base) not in FOUR_BIT or x.dtype is not torch.float32 or autocast_dtype(x) is not None:
        return False
    # A Linear4bit that has not chosen its compute_dtype yet will choose x's dtype.
    return base.compute_type_is_set and base.compute_dtype not in (None, torch.float32)


def quant_state_of(base: nn.Module) -> Any:
    """Returns the quant_state of a ``Linear4bit``: the quant_state of its weight or, if fully_shard replaced the weight
    by a plain parameter, the quant_state of the layer."""
    state = getattr(base._parameters.get("weight"), "quant_state", None)
    return base.__dict__.get("quant_state") if state is None else state
