"""Finds the name of the activation that a function or a module computes, by the form of its code.

For example, torch.nn.functional.silu, nn.GELU(approximate="tanh") and transformers' GELUActivation each give a name
that :func:`peft_ext.ops.activation` accepts.
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

# Maps functions of PyTorch to the names of their activations. A function with which a library replaces a function of
# PyTorch is another object, and has no entry.
_FUNCTIONS: dict[Any, str] = {F.silu: "silu", F.relu: "relu", torch.relu: "relu", F.gelu: "gelu"}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
# Maps a class of activation modules to its forward, the row of its known form, and the names of class attributes that
# no instance may override; maps a class without a known form to None.
_KNOWN: dict[type, Optional[tuple[Any, Row, tuple[str, ...]]]] = {}


def refresh() -> None:
    """Clears the cache, so that the next :func:`activation_name` of each class reads the class's code again."""
    _KNOWN.clear()


def activation_name(act: Any, dtype: Optional[torch.dtype] = None) -> Optional[str]:
    """Returns the name of the activation that ``act`` computes in ``dtype``.

    Returns None if the code of the activation is no known form or the form does not hold in ``dtype``. Returns None
    also, among other cases, if the class got another ``forward`` after the first call for this class, or if the
    instance has a ``forward`` of its own or an attribute that hides a class attribute which the form reads.
    """
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
