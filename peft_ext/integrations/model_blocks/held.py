"""What a module holds beside its parameters and children, on which its forward may depend.

It is told apart before a trial counts for another module, and looked at again before a fused forward runs.
"""

from __future__ import annotations

import functools
import numbers
import types
from collections.abc import Hashable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

__all__ = ["HELD", "OF_TORCH", "held_by", "holds_others", "lasts"]

# An attribute of modules: what a module held as it was tried.
HELD = "_peft_ext_held"
# What torch holds in a module; the rest is what its forward may read.
OF_TORCH = frozenset(vars(nn.Module()))
# A configuration is told by its values where a class is tried, and not looked at again.
_OURS = frozenset({HELD, "config"})
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class _Same(NamedTuple):
    """An object that is equal to itself alone, and lives as long as this."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class _Unknown(Exception):
    """Raised for what can't be told apart by value: tensors."""


def held_by(module: nn.Module) -> Optional[dict[str, Hashable]]:
    """Returns the names of what a module holds, with values or objects; the children's names under ""; None: it holds a
    tensor, whose values nobody watches."""
    try:
        found = {name: _known(value) for name, value in vars(module).items()
                 if name not in OF_TORCH and name not in _OURS}  # fmt: skip
    except _Unknown:
        return None
    inner = vars(module)
    if any(value is not None for value in inner.get("_buffers", {}).values()):
        return None
    found[""] = tuple(name for name, child in inner.get("_modules", {}).items() if child is not None)
    return found


def holds_others(module: nn.Module, stock: type, but: Optional[str] = None) -> bool:
    """Returns whether a module holds other things than as it was tried, ``but`` for one name.

    A new name is another library's mark, as FSDP's, unless the class has it, too.
    """
    tried, now = module.__dict__.get(HELD), held_by(module)
    if tried is None or now is None:
        return True
    if tried == now:
        return False
    changed = {name for name in tried if name not in now or now[name] != tried[name]}
    changed |= {name for name in now.keys() - tried.keys() if hasattr(stock, name)}
    return bool(changed - {but})


def lasts(held: Hashable) -> bool:
    """Returns whether what a module holds may be a key for good: no object that would live as long as the key does."""
    if isinstance(held, _Same):
        value = held.value
        if isinstance(value, types.FunctionType):
            return not value.__closure__
        return isinstance(value, (types.BuiltinFunctionType, type))
    return all(map(lasts, held)) if isinstance(held, (tuple, frozenset)) else True


def _known(value: Any) -> Hashable:
    if isinstance(value, _PLAIN) or isinstance(value, numbers.Number):
        return value
    if isinstance(value, Tensor):
        raise _Unknown
    if isinstance(value, (tuple, list)):
        return type(value).__name__, *map(_known, value)
    if isinstance(value, dict):
        return "dict", *((_known(key), _known(of)) for key, of in value.items())
    if isinstance(value, (set, frozenset)):
        return "set", frozenset(map(_known, value))
    if isinstance(value, functools.partial):  # which a copy of the module has one of its own of
        return "partial", _Same(value.func), _known(value.args), _known(value.keywords)
    return _Same(value)
