"""Rotary positions within a model's own forward, in one pass: :func:`peft_ext.ops.rotary_embedding`.

An attention of transformers calls ``apply_rotary_pos_emb(q, k, cos, sin)``, a function of its module, which reads q
and k several times and makes whole tensors between. The forward finds another one under this name (:mod:`.names`). The
function is tried on random numbers before it is replaced, and calls that the operator does not take go to it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from ... import ops
from ..adapter_layers.reasons import accepts_input, kernel_reason
from .names import named

__all__ = ["NAME", "fused", "rotary_function"]

NAME = "apply_rotary_pos_emb"
_OPERATOR = "rotary_embedding"
_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-6}  # of a trial, of the largest value


def rotary_function(forward: Callable) -> Optional[Callable]:
    """Returns what a forward calls by NAME, if it computes what the operator does, which is tried; else None."""
    function = named(forward, NAME)
    return function if isinstance(function, types.FunctionType) and _is_rotary(function) else None


@functools.cache
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
