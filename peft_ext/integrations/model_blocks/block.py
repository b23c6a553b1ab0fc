"""A fused block of a model: a module whose forward is a known form, under a class that runs fused operators.

The fused class is a subclass of the module's class, made once for each row of the table of forms; it adds no state. The
model's own code runs where the fused forward does not take a call, or the module is no longer as its row says.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any, Optional

from torch import Tensor, nn

from ..adapter_layers.base import STOCK
from ..adapter_layers.reasons import accepts_input, forward_is_replaced, replaced_on_instance
from ..forms import Form, Row, row_of

__all__ = ["Block", "class_of"]


class Known(types.SimpleNamespace):
    """The facts that a fused class holds of its row: ``row``, ``needs``, ``of_class``, and those of its mixin."""


class Block:
    """A module on fused operators. A subclass gives ``block_reason`` and ``_fused``, or its own ``parts``, ``forward``.

    What a class knows of its row is in one attribute, whose name no module's child is to have: an attribute
    of the class hides a child.
    """

    stock_class: type
    stock_forward: Callable[..., Any]
    peft_ext_known: Known
    block_kind = ""

    def __init_subclass__(cls, **_: Any) -> None:
        """Does nothing: a model's class may list its subclasses here, and a fused class is not to be listed."""

    @classmethod
    def settled(cls, stock: type, row: Row) -> dict[str, Any]:
        """Returns the facts of the row that the class holds, by name. They are read once, as the class is made."""
        return {"row": row, "needs": tuple(tuple(need.split(":", 1)) for need in row.names("needs"))}

    def block_reason(self) -> Optional[str]:
        """Returns why the module's own forward runs."""
        raise NotImplementedError

    def replaced_reason(self) -> Optional[str]:
        """Returns why the module's forward is not the one that its row tells of."""
        held, known = self.__dict__, self.peft_ext_known
        if replaced_on_instance(self):
            return "its forward was replaced on the instance"
        if forward_is_replaced(type(self)):
            return "its class's forward was replaced"
        for name in known.of_class:
            if name in held:
                return f"it has a {name} of its own, which its class's code would find"
        for name, value in known.needs:
            if repr(getattr(self, name, None)) != value:
                return f"its {name} is {getattr(self, name, None)!r}, wanted {value}"
        return None

    def block_parts(self) -> Iterator[tuple[str, Optional[str]]]:
        """Yields each part of the module that can be fused, and the reason why the part is not fused now, or None."""
        yield self.block_kind, self.block_reason()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Block):  # restored, and called by who held the bound method
            return type(self).forward(self, *args, **kwargs)
        alone = len(args) == 1 and not kwargs and accepts_input(args[0])
        return self._fused(*args) if alone and self.block_reason() is None else super().forward(*args, **kwargs)

    def _fused(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class was made at run time: it is made again from the model's.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (type(self).__mro__[1], self.stock_class, self.peft_ext_known.row), *state


# By mixin, stock class and row: the class made of them.
_CLASSES: dict[tuple[type, type, Row], type] = {}


def _new(mixin: type, stock: type, row: Row) -> nn.Module:
    """Returns an instance without attributes: a stock one where the class is another here than where it was saved."""
    kind = _CLASSES.get((mixin, stock, row))
    if kind is None:
        found = row_of(stock)
        kind = stock if isinstance(found, str) or found[0].digest != row.digest else class_of(mixin, stock, *found)
    return kind.__new__(kind)


def class_of(mixin: type, stock: type, row: Row, form: Form) -> type:
    """Returns the class of ``stock`` on fused operators by ``row``, made once."""
    if (made := _CLASSES.get((mixin, stock, row))) is None:
        known = Known(**mixin.settled(stock, row))
        held = {"stock_class": stock, "peft_ext_known": known, "__doc__": stock.__doc__, "__module__": stock.__module__}
        made = type.__new__(type(stock), stock.__name__, (mixin, stock), held)  # past a metaclass of the model's, too
        STOCK[made] = stock
        _CLASSES[mixin, stock, row] = made
    made.stock_forward, made.peft_ext_known.of_class = stock.forward, form.of_class
    return made


def strides_of(x: Tensor) -> Optional[list[int]]:
    """Returns the order of dimensions in which x lies in memory without gaps, the last dimension last; None: it has
    gaps, or elements that are seen several times."""
    order = sorted(range(x.dim()), key=lambda dim: (dim == x.dim() - 1, -x.stride(dim)))
    expected = itertools.accumulate((x.shape[dim] for dim in reversed(order)), lambda a, b: a * b, initial=1)
    lies = all(x.shape[dim] == 1 or x.stride(dim) == wanted
               for dim, wanted in zip(reversed(order), expected, strict=False))  # fmt: skip
    return order if lies else None


def device_of(module: nn.Module) -> str:
    """Returns the type of the device of a module's parameters; a CPU's where it has none."""
    return next((parameter.device.type for parameter in module.parameters()), "cpu")
