"""What a forward's code finds beside its module and its input: a trial sees what it computes of a few inputs alone.

Functions that it calls are read as well. What they find by name, in their modules and on the module's class, is
watched: functions and plain values, which others may replace. Anything else that is found there (a list that a forward
appends to), and a choice that depends on an input's sizes or values, can be told by no trial.
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import math
import textwrap
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

__all__ = ["Watched", "are_as_watched", "looks_at_its_type", "reached_by"]

_MODULES = ("torch", "math")
# Of Python's own, what gives a value of its arguments alone.
_BUILTINS = {"abs", "bool", "divmod", "enumerate", "float", "getattr", "hasattr", "int", "isinstance", "len", "list",
             "max", "min", "pow", "range", "reversed", "round", "slice", "str", "sum", "super", "tuple",
             "zip"}  # fmt: skip
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
# By which a forward asks how many tokens there are, or what is in them.
_SIZES = {"shape", "size", "numel", "nelement", "len", "__len__", "nbytes", "stride", "item", "tolist", "any", "all",
          "max", "min", "amax", "amin", "sum", "mean", "norm", "abs", "isnan", "isinf", "isfinite", "count_nonzero",
          "is_nonzero", "nonzero", "unique", "equal", "allclose"}  # fmt: skip
_CHOOSES = ("POP_JUMP", "JUMP_IF", "COMPARE_OP", "CONTAINS_OP")
# What is asked of an input in a choice that a trial does see.
_KINDS = {"dtype", "device", "ndim", "is_cuda", "training", "requires_grad"}
_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD", "STORE_ATTR")
_REFUSED = ("STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME", "DELETE_ATTR", "YIELD_VALUE")


class Watched(NamedTuple):
    """A name and what it stood for, in a module's names or on a class."""

    place: Any
    name: str
    value: Any

    def is_there(self) -> bool:
        place = self.place
        now = (place if isinstance(place, dict) else place.__dict__).get(self.name)
        return now is self.value or (isinstance(self.value, _PLAIN) and type(now) is type(self.value)
                                     and now == self.value)  # fmt: skip


def are_as_watched(watched: tuple[Watched, ...]) -> bool:
    return all(one.is_there() for one in watched)


class _Open(Exception):
    """Raised where a forward finds what nobody watches."""


_Reached = Optional[tuple[Watched, ...]]
_KNOWN: weakref.WeakKeyDictionary[type, tuple[Callable, _Reached]] = weakref.WeakKeyDictionary()
_LOOKS: weakref.WeakKeyDictionary[Callable, bool] = weakref.WeakKeyDictionary()


def reached_by(forward: Callable, stock: type) -> _Reached:
    """Returns what a forward of ``stock`` finds by name; None: what it computes can depend on more than can be told."""
    known, reached = _KNOWN.get(stock, (None, None))
    if known is not forward or not are_as_watched(reached or ()):
        found: Optional[list[Watched]] = []
        try:
            _read(forward, stock, found, set())
        except _Open:
            found = None
        reached = None if found is None else tuple(found)
        _KNOWN[stock] = forward, reached
    return reached


def looks_at_its_type(forward: Callable) -> bool:
    """Returns whether a forward, or what decorators are around, asks for its own class, but for its name."""
    if not isinstance(forward, types.FunctionType):
        return False
    if forward not in _LOOKS:
        _LOOKS[forward] = _looks_at_its_type(forward)
    return _LOOKS[forward]


def _looks_at_its_type(forward: Callable) -> bool:
    while isinstance(forward, types.FunctionType):
        steps = [step for code in _codes(forward.__code__) for step in dis.get_instructions(code)]
        for step, after in zip(steps, [*steps[1:], None], strict=True):
            named = after is not None and after.argval == "__name__"
            if step.opname in _GLOBALS and step.argval == "type" or step.argval == "__mro__":
                return True
            if step.opname in _ATTRIBUTES and step.argval == "__class__" and not named:
                return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _codes(value)


def _read(function: Any, stock: type, found: list[Watched], seen: set[Any]) -> None:
    if isinstance(function, (staticmethod, classmethod)):
        function = function.__func__
    if isinstance(function, property):
        function = function.fget
    if not isinstance(function, types.FunctionType):
        raise _Open
    if function in seen:
        return
    seen.add(function)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__":
            _take(_content(cell), stock, found, seen)
    chooses, asks = False, False
    for code in _codes(function.__code__):
        for step in dis.get_instructions(code):
            if step.opname in _REFUSED:
                raise _Open
            chooses = chooses or step.opname.startswith(_CHOOSES)
            if step.argval == "getattr":  # by names that the code has, as it has no others
                for name in filter(str.isidentifier, (word for word in code.co_consts if isinstance(word, str))):
                    _find_on_class(name, stock, found, seen)
            if step.opname in _GLOBALS:
                asks = asks or step.argval in _SIZES
                _find(function.__globals__, step.argval, stock, found, seen)
            elif step.opname in _ATTRIBUTES:
                asks = asks or step.argval in _SIZES
                _find_on_class(step.argval, stock, found, seen)
    if chooses and asks and not _chooses_by_the_module(function):
        raise _Open


def _chooses_by_the_module(function: types.FunctionType) -> bool:
    """Returns whether all that a function chooses by is the module's, or an input's dtype."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False
    for node in ast.walk(tree):
        tests = [node.test] if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)) else []
        tests += node.ifs if isinstance(node, ast.comprehension) else []
        tests += [node] if isinstance(node, (ast.Compare, ast.BoolOp)) else []
        if not all(map(_is_of_the_module, tests)):
            return False
    return True


def _is_of_the_module(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return True
    if isinstance(node, ast.Attribute):
        root = node
        while isinstance(root, ast.Attribute):
            root = root.value
        return node.attr in _KINDS or isinstance(root, ast.Name) and root.id in ("self", *_MODULES)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr")
    if isinstance(node, ast.Compare):
        inner = [node.left, *node.comparators]
        is_none = all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
        return is_none or all(map(_is_of_the_module, inner))
    if isinstance(node, (ast.BoolOp, ast.List, ast.Tuple, ast.Set)):
        return all(map(_is_of_the_module, node.values if isinstance(node, ast.BoolOp) else node.elts))
    return isinstance(node, ast.UnaryOp) and _is_of_the_module(node.operand)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        raise _Open from None


def _find(names: dict[str, Any], name: str, stock: type, found: list[Watched], seen: set[Any]) -> None:
    if name not in names:
        if name in _BUILTINS or _is_error(getattr(builtins, name, None)):
            return
        raise _Open
    value = names[name]
    if _take(value, stock, found, seen):
        found.append(Watched(names, name, value))


def _find_on_class(name: str, stock: type, found: list[Watched], seen: set[Any]) -> None:
    """Whatever it is an attribute of: all that the class, or one of its bases, has under this name."""
    for kind in stock.__mro__:
        if kind is nn.Module:
            return
        if name in vars(kind):
            value = vars(kind)[name]
            if not isinstance(value, _PLAIN):
                _read(value, stock, found, seen)
            found.append(Watched(kind, name, value))


def _take(value: Any, stock: type, found: list[Watched], seen: set[Any]) -> bool:
    """Reads what was found; returns whether it has to be watched."""
    if isinstance(value, types.ModuleType):
        if value.__name__.partition(".")[0] not in _MODULES:
            raise _Open
        return False
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, types.BuiltinFunctionType):
        of_torch = str(getattr(value, "__module__", None)).startswith("torch") or value in vars(math).values()
        if not of_torch and not hasattr(torch, value.__name__):
            raise _Open
        return True
    if isinstance(value, type):
        if not (value.__module__.startswith("torch") or _is_error(value)):
            raise _Open
        return True
    if str(getattr(value, "__module__", None)).startswith("torch"):
        return True
    _read(value, stock, found, seen)
    return True


def _is_error(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)
