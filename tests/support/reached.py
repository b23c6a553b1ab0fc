"""Finds the values that the code of a forward reads by name, and makes replacements of the values, for tests of
forms."""

from __future__ import annotations

import builtins
import functools
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_ext.integrations.forms import digest


class Place(NamedTuple):
    """A place from which code reads a value: the attribute ``name`` of ``owner``, or the item ``name`` of a function's
    globals."""

    owner: Any
    name: str
    value: Any

    def __str__(self) -> str:
        owner = self.owner.get("__name__") if isinstance(self.owner, dict) else self.owner.__name__
        return f"{owner}.{self.name}"


def reached(cls: type) -> list[Place]:
    """Returns the places that the forward of ``cls`` reads: helpers, functions of PyTorch, plain values, methods."""
    found: dict[tuple[int, str], Place] = {}
    seen: set[types.CodeType] = set()

    def visit(function: Any, kind: Any) -> None:
        static, function = isinstance(function, staticmethod), getattr(function, "__func__", function)
        while (inner := getattr(function, "__wrapped__", None)) is not None:
            function = inner
        if not isinstance(function, types.FunctionType) or function.__code__ in seen or digest._is_torchs(function):
            return
        seen.add(function.__code__)
        code = function.__code__
        this = code.co_varnames[0] if kind is not None and code.co_argcount and not static else None
        for path in digest._paths(digest._tree(function), code, this):
            for place in places(path, function, this):
                if digest._asks_for_the_environment(place.value, place.name, function):
                    continue  # a question about installed backends or versions, which the digest leaves out
                found[id(place.owner), place.name] = place
                visit(place.value, cls if place.owner in cls.__mro__ else None)

    def places(path: tuple[str, ...], function: Any, this: Any) -> Iterator[Place]:
        root, *names = path
        if root == this:
            for kind in cls.__mro__:
                if names and names[0] in vars(kind) and kind not in (nn.Module, object):
                    yield Place(kind, names[0], vars(kind)[names[0]])
                    return
            return
        names_of = function.__globals__
        if root in code_cells(function):
            return
        value = names_of.get(root, getattr(builtins, root, None))
        if not isinstance(value, types.ModuleType):
            yield Place(names_of, root, value)
            return
        while isinstance(value, types.ModuleType) and names:
            owner, name = value, names.pop(0)
            value = getattr(owner, name)
        yield Place(owner, name, value)

    visit(cls.forward, cls)
    return list(found.values())


def code_cells(function: types.FunctionType) -> tuple[str, ...]:
    return function.__code__.co_freevars


def another(value: Any) -> Any:
    """Returns a replacement of ``value`` that gives other results; None if this function knows no replacement."""
    if isinstance(value, (staticmethod, classmethod)):
        return type(value)(another(value.__func__))
    if isinstance(value, torch.dtype):
        return torch.float64 if value is not torch.float64 else torch.float32
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "?"
    if isinstance(value, type) and issubclass(value, nn.Module):
        return type(value.__name__, (value,), {})
    if isinstance(value, type) or not callable(value):
        return None

    @functools.wraps(value)  # keeps the name, the module and the signature of ``value``
    def otherwise(*args: Any, **kwargs: Any) -> Any:
        result = value(*args, **kwargs)
        return result * 1.25 if isinstance(result, Tensor) else result

    return otherwise
