"""The base class of the fused layers of every method, the tables of their classes, and how they read the frozen weight.

A fused class is a subclass of PEFT's or bitsandbytes' that adds no state: ``stock_reason`` says why the next call has
to take the stock path, see :mod:`.reasons`, and ``_fused`` computes it on the op. :mod:`peft_ext.integrations.peft`
swaps the classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..._imports import optional
from ...nn import NF4Linear
from ...ops.checks import autocast_dtype
from ...weight import NF4Weight, nf4_from_params4bit

Linear4bit = Linear8bitLt = Params4bit = Conv1D = None
with optional("bitsandbytes", "no layer over a Linear8bitLt is fused"):
    from bitsandbytes.nn import Linear8bitLt
with optional("bitsandbytes", "Linear4bit, and an adapter's layer over one, is not fused"):
    from bitsandbytes.nn import Linear4bit, Params4bit
with optional("transformers", "no layer over a Conv1D (GPT-2) is fused"):
    from transformers.pytorch_utils import Conv1D

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Where a layer merged into an NF4 weight keeps what unmerge puts back: an attribute, no part of the state dict.
KEPT = "_peft_ext_unmerged"

# Fused class by stock class, and the way back.
FUSED: dict[type, type] = {}
STOCK: dict[type, type] = {}

# Linear layers over a dense and over a 4-bit weight, by exact type; the fused class of one is one of them.
LINEAR: list[type] = [nn.Linear]
FOUR_BIT: list[type] = [] if Linear4bit is None or Params4bit is None else [Linear4bit]

# bitsandbytes' classes whose layers are listed by explain, whether or not an adapter is over them.
QUANTIZED = tuple(kind for kind in (Linear4bit, Linear8bitLt) if kind is not None)


def fuses(stock: type) -> Callable[[type], type]:
    """Returns a decorator that registers a class as the fused subclass of ``stock``, under the same ``__name__``.

    PEFT, accelerate and ``repr`` look at the class's ``__name__`` ("Linear4bit"); pickle at ``__qualname__``.
    """

    def register(fused: type) -> type:
        fused.__name__, fused.stock_class, fused.stock_forward = stock.__name__, stock, stock.forward
        FUSED[stock], STOCK[fused] = fused, stock
        for alike in (LINEAR, FOUR_BIT):
            if stock in alike:
                alike.append(fused)
        return fused

    return register


class Fused:
    """The forward of a fused layer: runs the op where the op computes the stock class's result, else the stock forward.

    ``reads`` names the attributes that the fused class reads of an instance. ``accelerate`` does not fuse an instance
    that lacks one of them, and ``explain`` names the missing attribute.
    """

    reads: tuple[str, ...] = ("base_layer", "_active_adapter", "_disable_adapters", "merged_adapters")

    def stock_reason(self) -> Optional[str]:
        """Returns why the next call takes the stock path; None: it is fused."""
        return self._reasons()[0]

    def part_reason(self) -> Optional[str]:
        """Returns why the adapter's part alone is fused, over the base layer's own forward, where that is so."""
        reason, alone = self._reasons()
        return alone if reason is None else None

    def _reasons(self) -> tuple[Optional[str], Optional[str]]:
        """Returns why PEFT's own forward has to run; and else why the base layer has to run on its own."""
        raise NotImplementedError

    def _fused(self, x: Tensor) -> Optional[Tensor]:
        """Returns the op's result; None: the stock class's own forward has to run."""
        raise NotImplementedError

    def _fused_with(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Optional[Tensor]:
        """Returns the op's result of a call with more arguments than x; None: the stock forward has to run."""
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, Fused):  # restored, and called by who held the bound method
            return type(self).forward(self, x, *args, **kwargs)
        y = self._fused_with(x, args, kwargs) if args or kwargs else self._fused(x)
        return super().forward(x, *args, **kwargs) if y is None else y


def active_in(layer: Any, held: Any) -> list[str]:
    """Returns the active adapters of a layer that are among ``held``, in the order in which PEFT adds them."""
    active = layer._active_adapter
    held = held._modules if type(held) is nn.ModuleDict else held
    if type(active) is not str:
        if len(active) != 1:
            return [name for name in active if name in held]
        (active,) = active
    return [active] if active in held else []


def give_back(module: nn.Module) -> None:
    """Gives a module the class that it had before it was fused."""
    if (stock := STOCK.get(type(module))) is not None:
        module.__class__ = stock
    elif is_parametrized(module):  # of a class of its own, made of the fused one
        type(module).__bases__ = tuple(STOCK.get(base, base) for base in type(module).__bases__)


def class_name(kind: type) -> str:
    return STOCK.get(kind, kind).__name__


def is_fully_sharded(kind: type) -> bool:
    """Returns whether fully_shard wrapped modules of this class themselves; torch.distributed is not imported."""
    return hasattr(kind, "_get_fsdp_state")


def without_adapters(model: nn.Module, seen: Optional[set[int]] = None) -> Iterator[nn.Module]:
    """Yields the modules of ``model`` without those of adapters: an adapter layer and its base layer, not lora_A."""
    seen = set() if seen is None else seen
    if id(model) in seen:
        return
    seen.add(id(model))
    yield model
    if isinstance(model, torch.jit.ScriptModule):  # whose children are its own business
        return
    base = model._modules.get("base_layer")
    for child in model._modules.values() if base is None else [base]:
        if child is not None:
            yield from without_adapters(child, seen)


# --- the frozen weight ------------------------------------------------------------------------------------------------


def operands(
    base: nn.Module, x: Tensor, seen: Optional[torch.dtype] = None
) -> Optional[tuple[Tensor, Union[Tensor, NF4Weight], Optional[Tensor], torch.dtype]]:
    """Returns x, weight and bias as the base layer's forward hands them on, and the dtype that this forward returns.

    None where its own forward has to run, which raises PyTorch's error or gives a sum a dtype of its own. ``seen`` is
    the dtype in which PEFT hands x to the base layer, x's own by default.
    """
    kind, bias, cast = type(base), base._parameters["bias"], autocast_dtype(x)
    if kind is not NF4Linear and kind not in FOUR_BIT:
        weight = base._parameters["weight"]
        weight = weight.t() if kind is Conv1D else weight
        if cast is None and not (weight.dtype is x.dtype and (bias is None or bias.dtype is x.dtype)):
            return None  # as in F.linear, an error
        return x, weight, bias, cast or x.dtype
    if kind is NF4Linear:
        return x, base.nf4, bias if bias is None else bias.to(x.dtype), cast or x.dtype
    seen = seen or x.dtype
    if cast not in (None, seen) and seen is not torch.float32:
        return None  # float16 plus bfloat16 under autocast: PEFT's sum has a dtype of its own
    found = operands_4bit(base, x, seen)
    return None if found is None else (*found, seen)


def operands_4bit(
    base: nn.Module, x: Tensor, seen: torch.dtype
) -> Optional[tuple[Tensor, NF4Weight, Optional[Tensor]]]:
    """Returns x, weight and bias as ``Linear4bit.forward`` hands them on for an x of dtype ``seen``.

    None where its own forward has to run. The bias is cast for the call, where bitsandbytes casts the parameter for
    good.
    """
    if not base.compute_type_is_set:
        base.set_compute_type(x.to(seen))
        base.compute_type_is_set = True
    compute = base.compute_dtype or seen
    if compute not in DTYPES or autocast_dtype(x) not in (None, compute):
        return None
    bias = base._parameters["bias"]
    bias = bias if bias is None else bias.to(compute)
    return x.to(compute), nf4_from_params4bit(base._parameters["weight"], quant_state_of(base)), bias


def sums_wider(base: nn.Module, x: Tensor) -> bool:
    """Returns whether ``base``, a 4-bit layer, multiplies in fewer bits than PEFT adds the adapter in.

    So it is with float32 activations, as behind ``prepare_model_for_kbit_training``'s norms, over a 16-bit
    compute_dtype. Then the base layer runs on its own, as in PEFT.
    """
    if type(base) not in FOUR_BIT or x.dtype is not torch.float32 or autocast_dtype(x) is not None:
        return False
    # Where the layer has not chosen its type yet, it will take x's.
    return base.compute_type_is_set and base.compute_dtype not in (None, torch.float32)


def quant_state_of(base: nn.Module) -> Any:
    """Returns a ``Linear4bit``'s state: the parameter's or, where fully_shard made that a plain one, the layer's."""
    state = getattr(base._parameters.get("weight"), "quant_state", None)
    return base.__dict__.get("quant_state") if state is None else state


def is_repacked(base: nn.Module) -> bool:
    """Returns whether bitsandbytes has repacked the weight of a ``Linear4bit``, in an evaluation on this CPU."""
    return bool(getattr(quant_state_of(base), "packing_format_for_cpu", False))
