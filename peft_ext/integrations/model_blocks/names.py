"""A forward's own code with some names looked up elsewhere.

An attention of transformers finds functions of its module by name. What runs instead of such a forward is its own code
with those names bound to others; every other name is found in the module, as it is there at that time. Nothing of
transformers is changed.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable
from typing import Any, Optional

__all__ = ["ModuleNames", "inner_function", "named", "only_reads_globals", "remade", "with_names"]


def inner_function(forward: Any) -> Optional[types.FunctionType]:
    """Returns the function that decorators are around; None: it can't be seen."""
    while (wrapped := getattr(forward, "__wrapped__", None)) is not None:
        forward = wrapped
    return forward if isinstance(forward, types.FunctionType) else None


def named(forward: Callable, name: str) -> Any:
    """Returns what a forward's code finds under a global name now; None: it asks for none, or it can't be seen."""
    inner = inner_function(forward)
    return None if inner is None or name not in inner.__code__.co_names else inner.__globals__.get(name)


@functools.cache
def with_names(forward: Callable, others: tuple[tuple[str, Any], ...]) -> Optional[Callable]:
    """Returns a forward of the same code that finds ``others``, by name, instead of what its module has.

    None: it can't be made, as its code uses its globals in other ways, or a decorator holds it where it is not seen.
    """

    def make(inner: types.FunctionType) -> Optional[types.FunctionType]:
        if not only_reads_globals(inner):
            return None
        return _copy(inner, ModuleNames(inner.__globals__, others), inner.__closure__)

    return remade(forward, make)


def only_reads_globals(function: types.FunctionType) -> bool:
    """Returns whether a function asks for its globals by name alone."""
    writes = any(step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for step in dis.get_instructions(function))
    return not writes and not {"globals", "exec", "eval"} & set(function.__code__.co_names)


def remade(
    forward: Any, make: Callable[[types.FunctionType], Optional[types.FunctionType]]
) -> Optional[types.FunctionType]:
    """Returns a forward whose function within its decorators is what ``make`` makes of it; None: it makes none, or a
    decorator holds it where it is not seen."""
    wrapped = getattr(forward, "__wrapped__", None)
    if not isinstance(forward, types.FunctionType):
        return None
    if wrapped is None:
        return make(forward)
    # A decorator's function has the decorated one in a cell.
    if (made := remade(wrapped, make)) is None:
        return None
    cells = [types.CellType(made) if _content(cell) is wrapped else cell for cell in forward.__closure__ or ()]
    if sum(new is not old for new, old in zip(cells, forward.__closure__ or (), strict=True)) != 1:
        return None
    copied = _copy(forward, forward.__globals__, tuple(cells))
    copied.__wrapped__ = made
    return copied


class ModuleNames(dict):
    """A module's names, as they are when they are asked for, but for some."""

    def __init__(self, module: dict[str, Any], others: tuple[tuple[str, Any], ...]) -> None:
        super().__init__(others)
        self._module = module

    def __missing__(self, name: str) -> Any:
        return self._module[name]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _copy(function: types.FunctionType, names: dict[str, Any], closure: Optional[tuple]) -> types.FunctionType:
    copied = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(copied, function) if hasattr(function, "__wrapped__") else copied
