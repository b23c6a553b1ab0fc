"""Fast path: fuses a common call without the checks of :mod:`.reasons`, which have accepted an equal call before.

:func:`facts_of` returns one tuple with everything that the checks of a common call read: types, dtypes, shapes,
devices, flags and numbers. After the checks accepted a call, a later call for which :func:`facts_of` returns an equal
tuple is fused without the checks. An accepted tuple never becomes stale: each call makes a tuple of its own from the
present state, and a tuple holds no module and no tensor. For a call under autocast or torch.compile, and for a call of
a layer whose base layer or adapter has hooks, among others, :func:`facts_of` returns None, and the checks run each
time.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn

from ...nn import PackedLinear
from ...ops.checks import under_a_transform
from ...ops.library import PUBLIC
from ...ops.prove import proved_eagerly
from . import reasons
from .base import LINEAR, PACKED

KNOWN: set[tuple] = set()

_is_tracing = torch._C._is_tracing

# KNOWN is cleared when it has _MOST tuples, because a schedule of scaling or dropout makes new tuples at each step.
_MOST = 4096


def remember(facts: tuple) -> None:
    """Stores ``facts``, the result of :func:`facts_of` for an accepted call, so that the next call with equal facts
    skips the checks of :mod:`.reasons` and of the operator."""
    if len(KNOWN) >= _MOST:
        KNOWN.clear()
    KNOWN.add(facts)


def single_name(layer: Any) -> Optional[str]:
    """Returns the name of the active adapter of a layer, or None if not exactly one adapter is active."""
    active = layer._active_adapter
    if type(active) is str:
        return active
    return active[0] if len(active) == 1 else None


def facts_of(
    layer: Any, x: Any, op: str, modules: tuple[nn.Module, ...], tensors: tuple, numbers: tuple
) -> Optional[tuple]:
    """Returns the facts of a call on the operator ``op``: a tuple of everything that the checks read of x, the layer,
    the base layer, and the adapter's ``modules``, ``tensors`` and ``numbers``.

    Returns None for a call that the fast path does not cover, for example with hooks or under autocast; the checks then
    have to run.
    """
    plain = reasons.plain_types()
    if type(x) not in plain or torch.compiler.is_compiling() or under_a_transform() or _is_tracing():
        return None
    # A module's dictionary is read faster than its attributes.
    held, kind, device = layer.__dict__, type(layer), x.device
    if x.is_nested or reasons.any_global_hook():
        return None
    # Tests whether the kernels may run, as reasons.kernel_reason does, with fewer Python calls.
    if not reasons.KERNELS[op].get(device.type) or proved_eagerly(device.type, *PUBLIC[op]) is not None:
        return None
    if torch.is_autocast_enabled(device.type):
        return None
    if held["_disable_adapters"] or held["merged_adapters"] or kind.stock_class.forward is not kind.stock_forward:
        return None
    base = held["_modules"]["base_layer"]
    if "forward" in held or held.get("fan_in_fan_out") or (type(base) not in LINEAR and type(base) not in PACKED):
        return None
    found = [kind, x.dtype, device, x.layout, x.shape[-1:], *numbers]
    for module in (base, *modules):
        held = module.__dict__
        if (
            held["_forward_hooks"] or held["_forward_pre_hooks"] or held["_backward_hooks"]
            or held["_backward_pre_hooks"] or "forward" in held
        ):  # fmt: skip
            return None
        found += (type(module), type(module).forward)
    of_base = base.__dict__["_parameters"]
    if "bias" not in of_base:
        return None
    weight = of_base.get("weight")
    if isinstance(base, PackedLinear):
        if any(hasattr(parameter, "ds_id") for parameter in of_base.values()):
            return None
        # The tensors of a PackedWeight are checked when the PackedWeight is made, and their dtypes and sizes follow
        # from its layout and shape.
        packed = base.packed
        weight = packed.parts[0]
        found += (packed.layout, packed.shape)
        if any(type(part) not in plain or part.device != device for part in packed.parts if part is not None):
            return None
    for tensor in (weight, of_base["bias"], *tensors):
        if tensor is None:
            found.append(None)
        elif type(tensor) not in plain or hasattr(tensor, "ds_id"):
            return None
        else:
            found += (tensor.dtype, tensor.device, tensor.shape, tensor.layout, tensor.requires_grad)
    if type(base) in PACKED:
        found += (base.in_features, base.out_features)
    return tuple(found)
