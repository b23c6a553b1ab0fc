"""The base classes of fused blocks. A fused block is a module whose forward is a known form, and whose class was
replaced by a class that runs fused operators.

The fused class is a subclass of the module's class, is made once per stock class and row of the table of forms, and
adds no state to an instance. The model's own code runs if the fused forward does not accept a call, or if the module's
forward is no longer the code of its known form.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any, Optional, Union

from torch import Tensor, nn

from ...text import dtype_name
from ..adapter_layers.base import STOCK
from ..adapter_layers.few_tokens import Facts, few_reason, plan_of
from ..adapter_layers.reasons import accepts_input, replaced_on_instance
from ..forms import KINDS, Form, Row, row_of

__all__ = ["Block", "Fused", "class_of", "input_reason"]


def input_reason(x: Tensor) -> Optional[str]:
    """Returns why the operators do not accept x; None if they accept x, see :func:`accepts_input`."""
    if accepts_input(x):
        return None
    return f"its input is a {type(x).__name__} in {dtype_name(x.dtype)}, or the call is traced or transformed"


class Block:
    """The base class of the fused classes of model blocks (decoder layers, norms, MLPs, attentions, dropouts).

    A subclass defines ``block_reason`` or its own ``block_parts``. The attribute ``peft_ext_known`` of a fused class
    holds ``of_class`` of the class's form (see ``Form``), and the values that ``settled`` returns. No child module may
    be named ``peft_ext_known``, because a class attribute hides a child module of the same name.
    """

    stock_class: type
    stock_forward: Callable[..., Any]
    peft_ext_known: types.SimpleNamespace
    block_kind = fused_remark = ""

    def __init_subclass__(cls, **_: Any) -> None:
        """Does nothing: a model's class may register its subclasses in ``__init_subclass__``, and a fused class must
        not be registered."""

    @classmethod
    def settled(cls, stock: type, row: Row) -> dict[str, Any]:
        """Returns what the fused class keeps about its form, as a dict from name to value: the values of the formula in
        the row of the table of forms (a bool for yes and no), the row itself, and ``needs`` of the row. ``class_of``
        calls ``settled`` when it makes the fused class."""
        formula = {name: {"yes": True, "no": False}.get(row.get(name), row.get(name)) for name in KINDS[row.kind]}
        return {**formula, "row": row, "needs": tuple(tuple(need.split(":", 1)) for need in row.names("needs"))}

    def block_reason(self) -> Optional[str]:
        """Returns why the module's own forward runs for every input; None if the fused forward may run."""
        raise NotImplementedError

    def replaced_reason(self) -> Optional[str]:
        """Returns why the module's forward is not, or no longer, the code of the known form for which the class was
        made; else None."""
        held, known = self.__dict__, self.peft_ext_known
        if replaced_on_instance(self):
            return "its forward was replaced on the instance"
        if type(self).stock_class.forward is not type(self).stock_forward:
            return "its class's forward was replaced"
        for name in known.of_class:
            if name in held:
                return f"it has a {name} of its own, which its class's code would find"
        for name, value in known.needs:
            if repr(getattr(self, name, None)) != value:
                return f"its {name} is {getattr(self, name, None)!r}, wanted {value}"
        return None

    def call_reason(self, x: Tensor) -> Optional[str]:
        """Returns why the module's own forward runs for inputs of x's dtype and device; None if the fused forward may
        run. Conditions that depend on more of a call than the dtype and the device, such as on sizes, are checked in
        the forward only."""
        return None

    def held_reason(self, facts: Facts) -> Optional[str]:
        """Returns why the module has no plan (see :mod:`..adapter_layers.few_tokens`), for example because the module
        has forward hooks, or because its forward is not the code of its known form. Returns None otherwise. Adds to
        ``facts`` the objects on which the return value depends."""
        known, held = self.peft_ext_known, self.__dict__
        for name in known.of_class:
            facts.value(held, name)
        for name, _ in known.needs:
            if type(facts.value(held, name)) not in (type(None), bool, int, float, str):
                return f"its {name} is neither a number nor a string"
        is_plain = facts.plain_block(self)
        return self.replaced_reason() or (None if is_plain else "hooks on it would not run")

    def block_parts(self, like: Tensor) -> Iterator[tuple[str, Optional[str]]]:
        """Yields the name of each part of the module that can be fused, with the reason why the part is not fused now
        (None for a fused part). ``like`` has the dtype and the device that the module's input is expected to have."""
        yield self.block_kind, self.block_reason() or input_reason(like) or self.call_reason(like)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # Pickle can't find a class that was made at run time, so unpickling makes the class again from the stock class.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (type(self).__mro__[1], self.stock_class, self.peft_ext_known.row), *state


class Fused(Block):
    """The base class of fused blocks whose forward takes one tensor. A subclass defines ``_fused``, which computes the
    block if ``block_reason`` returns None."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Block):  # `restore` gave self its stock class, but a caller kept this method
            return type(self).forward(self, *args, **kwargs)
        alone = len(args) == 1 and not kwargs and accepts_input(args[0])
        return self._fused(*args) if alone and self.block_reason() is None else super().forward(*args, **kwargs)

    def _fused(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Planned(Fused):
    """The base class of fused blocks that make a plan for calls of few tokens (see
    :mod:`..adapter_layers.few_tokens`). A subclass defines ``_few``, which makes the plan."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and few_reason(args[0]) is None and isinstance(self, Planned):
            if (run := plan_of(self, args[0], self._few)) is not None:
                return run(args[0])
        return Fused.forward(self, *args, **kwargs)

    def _few(self, facts: Facts, x: Tensor) -> Union[Callable[[Tensor], Tensor], str]:
        """Returns the plan, a function that computes the block for inputs like x; or the reason why the block has no
        plan."""
        raise NotImplementedError


# Maps a mixin, a stock class and a row to the fused class made of the three.
_CLASSES: dict[tuple[type, type, Row], type] = {}


def _new(mixin: type, stock: type, row: Row) -> nn.Module:
    """Returns an instance without attributes, for unpickling: of the fused class, or of the stock class if the form of
    the stock class is not the form of ``row``."""
    kind = _CLASSES.get((mixin, stock, row))
    if kind is None:
        found = row_of(stock)
        kind = stock if isinstance(found, str) or found[0].digest != row.digest else class_of(mixin, stock, *found)
    return kind.__new__(kind)


def class_of(mixin: type, stock: type, row: Row, form: Form) -> type:
    """Returns the fused class of the class ``stock``, whose form has the row ``row``; the first call makes the
    class."""
    if (made := _CLASSES.get((mixin, stock, row))) is None:
        known = types.SimpleNamespace(**mixin.settled(stock, row))
        held = {"stock_class": stock, "peft_ext_known": known, "made_forward": None, "__doc__": stock.__doc__,
                "__module__": stock.__module__}  # fmt: skip
        # type.__new__ skips the __new__ of the stock class's metaclass.
        made = type.__new__(type(stock), stock.__name__, (mixin, stock), held)
        STOCK[made] = stock
        _CLASSES[mixin, stock, row] = made
    made.stock_forward, made.peft_ext_known.of_class = stock.forward, form.of_class
    return made


def device_of(module: nn.Module) -> str:
    """Returns the device type of a module's first parameter; "cpu" if the module has no parameter."""
    return next((parameter.device.type for parameter in module.parameters()), "cpu")
