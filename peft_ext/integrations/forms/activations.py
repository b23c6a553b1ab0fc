"""Which activation a function or a module is, by its form.

torch.nn.functional.silu, nn.GELU(approximate="tanh"), transformers' GELUActivation, ...   ->   a name of
:func:`peft_ext.ops.activation`
"""

from __future__ import annotations

import functools
import types
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from . import Row, holds_for, row_of

__all__ = ["activation_name", "refresh"]

# Functions, which are what they are: a name that stands for another one is another object.
_FUNCTIONS: dict[Any, str] = {F.silu: "silu", F.relu: "relu", torch.relu: "relu", F.gelu: "gelu"}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
# By class: its forward, its row, and what no instance may hide.
_KNOWN: dict[type, Optional[tuple[Any, Row, tuple[str, ...]]]] = {}


def refresh() -> None:
    """Has each class of activations read again when it is next asked for."""
    _KNOWN.clear()


def activation_name(act: Any, dtype: Optional[torch.dtype] = None) -> Optional[str]:
    """Returns the name of the activation that ``act`` computes, in ``dtype``; None: one that is not known, or not any
    more."""
    if not isinstance(act, nn.Module):
        return (
            (_FUNCTIONS.get(act) or None) if isinstance(act, (types.FunctionType, types.BuiltinFunctionType)) else None
        )
    kind = type(act)
    if kind not in _KNOWN:
        _KNOWN[kind] = _read(kind)
    if (known := _KNOWN[kind]) is None:
        return None
    forward, row, of_class = known
    held = act.__dict__
    if kind.forward is not forward or "forward" in held or any(name in held for name in of_class):
        return None
    if any(repr(held.get(name)) != value for name, value in (need.split(":") for need in row.names("needs"))):
        return None
    if dtype is not None and not holds_for(row, dtype):
        return None
    if inner := row.get("inner"):
        return _function_name(held.get(inner))
    if approximate := row.get("approximate"):
        return _GELUS.get(held.get(approximate))
    return row.get("function")


def _function_name(act: Any) -> Optional[str]:
    if isinstance(act, functools.partial) and act.func is F.gelu and not act.args:
        return _GELUS.get(act.keywords.get("approximate")) if len(act.keywords) == 1 else None
    return _FUNCTIONS.get(act) if isinstance(act, (types.FunctionType, types.BuiltinFunctionType)) else None


def _read(kind: type) -> Optional[tuple[Any, Row, tuple[str, ...]]]:
    found = row_of(kind)
    if isinstance(found, str) or found[0].kind != "activation":
        return None
    row, form = found
    return kind.forward, row, form.of_class
