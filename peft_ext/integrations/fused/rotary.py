"""Rotary positions within a model's own forward, in one pass: :func:`peft_ext.ops.rotary_embedding`.

An attention of transformers calls ``apply_rotary_pos_emb(q, k, cos, sin)``, a function of its module, which reads q
and k several times and makes whole tensors between. What runs instead is that forward's own code with this one name
looked up elsewhere; every other name is found in the module, as it is there at that time. Nothing of transformers is
changed. The function is tried on random numbers before it is replaced, and calls that the operator does not take go to
it.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from ... import ops
from .reasons import accepts_input, kernel_reason

__all__ = ["NAME", "fused", "named", "rotary_function", "with_fused_rotary"]

NAME = "apply_rotary_pos_emb"
_OPERATOR = "rotary_embedding"
_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-6}  # of a trial, of the largest value


def named(forward: Callable) -> Optional[Callable]:
    """Returns the function that a forward's code finds under NAME now; None: it asks for none, or it can't be seen."""
    inner = _inner(forward)
    if inner is None or NAME not in inner.__code__.co_names:
        return None
    function = inner.__globals__.get(NAME)
    return function if isinstance(function, types.FunctionType) else None


def rotary_function(forward: Callable) -> Optional[Callable]:
    """Returns what a forward calls by NAME, if it computes what the operator does, which is tried; else None."""
    function = named(forward)
    return function if function is not None and _is_rotary(function) else None


@functools.cache
def with_fused_rotary(forward: Callable, function: Callable) -> Optional[Callable]:
    """Returns a forward of the same code that rotates by the operator wherever the given one calls ``function``.

    None: it can't be made, as its code uses its globals in other ways, or a decorator holds it where it is not seen.
    """
    wrapped = getattr(forward, "__wrapped__", None)
    if not isinstance(forward, types.FunctionType):
        return None
    if wrapped is None:
        writes = any(step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for step in dis.get_instructions(forward))
        if writes or {"globals", "exec", "eval"} & set(forward.__code__.co_names):
            return None
        return _copy(forward, _Names(forward.__globals__, fused(function)), forward.__closure__)
    # A decorator's function has the decorated one in a cell.
    if (made := with_fused_rotary(wrapped, function)) is None:
        return None
    cells = [types.CellType(made) if _content(cell) is wrapped else cell for cell in forward.__closure__ or ()]
    if sum(new is not old for new, old in zip(cells, forward.__closure__ or (), strict=True)) != 1:
        return None
    copied = _copy(forward, forward.__globals__, tuple(cells))
    copied.__wrapped__ = made
    return copied


class _Names(dict):
    """A module's names, as they are when they are asked for, but for one."""

    def __init__(self, module: dict[str, Any], function: Callable) -> None:
        super().__init__({NAME: function})
        self._module = module

    def __missing__(self, name: str) -> Any:
        return self._module[name]


def _inner(forward: Any) -> Optional[types.FunctionType]:
    while (wrapped := getattr(forward, "__wrapped__", None)) is not None:
        forward = wrapped
    return forward if isinstance(forward, types.FunctionType) else None


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _copy(function: types.FunctionType, names: dict[str, Any], closure: Optional[tuple]) -> types.FunctionType:
    copied = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(copied, function) if hasattr(function, "__wrapped__") else copied


def fused(function: Callable) -> Callable:
    """Returns ``function`` with the calls that the operator takes going to it."""

    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _fits(q, k, cos, sin):
            return function(q, k, cos, sin, *args, **kwargs)
        return ops.rotary_embedding(q, k, cos, sin)

    return apply_rotary_pos_emb


def _fits(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    """Returns whether the operator takes a call."""
    if not all(map(accepts_input, (q, k, cos, sin))) or (q.dim(), k.dim(), cos.dim()) != (4, 4, 3):
        return False
    if not q.dtype is k.dtype is cos.dtype is sin.dtype or not q.device == k.device == cos.device == sin.device:
        return False
    batch, _, tokens, size = q.shape
    if size % 2 or cos.shape != sin.shape or cos.shape[1:] != (tokens, size) or cos.shape[0] not in (1, batch):
        return False
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return False
    return k.shape[0] == batch and k.shape[2:] == (tokens, size) and not kernel_reason(_OPERATOR, q.device.type)


@functools.cache
def _is_rotary(function: Callable) -> bool:
    """Returns whether the function's values and gradients are the operator's, by trial."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        # Halves of cos and sin that differ, and no circle's: the formula alone can give the same.
        drawn = [torch.randn(*shape, generator=generator, dtype=torch.float32)
                 for shape in ((2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 8), (2, 5, 8))]  # fmt: skip
        for dtype, tolerance in _TOLERANCE.items():
            try:
                wanted = _with_gradients(function, [value.to(dtype) for value in drawn])
            except Exception:  # whatever another function raises
                return False
            found = _with_gradients(ops.rotary_embedding, [value.to(dtype) for value in drawn])
            if len(found) != len(wanted) or not all(
                a.shape == b.shape and a.dtype is b.dtype and a.stride() == b.stride()
                and (a - b).abs().max() <= tolerance * b.abs().max()
                for a, b in zip(found, wanted, strict=True)
            ):  # fmt: skip
                return False
    return True


def _with_gradients(function: Callable, values: list[Tensor]) -> list[Tensor]:
    q, k, cos, sin = values
    with torch.enable_grad():
        q, k = (value.detach().requires_grad_() for value in (q, k))
        found = function(q, k, cos, sin)
        if not isinstance(found, tuple) or len(found) != 2:
            return []
        loss = sum(
            (y.float() * torch.linspace(-1, 1, y.numel(), dtype=torch.float32).view(y.shape)).sum() for y in found
        )
        return [*(y.detach() for y in found), *torch.autograd.grad(loss, (q, k))]
