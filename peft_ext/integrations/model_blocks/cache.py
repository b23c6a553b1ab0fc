"""Appends the keys and values of few tokens to transformers' dynamic cache without a copy of the earlier tokens.

Stock's ``DynamicLayer.update`` concatenates, so that each step copies the whole cache. :func:`appended` keeps the keys
and values of a layer in memory with room for later tokens, and sets ``keys`` and ``values`` of the layer to views of the
filled part. Tensors that the layer held before keep their values: a view is appended to only while the layer holds it,
and only behind its end.

Stock's update runs for a cache or a layer whose ``update`` is no known form, and for tensors that do not fit.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..forms import row_of

__all__ = ["appended", "forget_caches"]

_LEAST_ROOM = 64  # number of later tokens for which there is room, at least


class _Room(NamedTuple):
    """Memory of one tensor of a layer, and the view that the layer holds."""

    memory: Tensor
    view: Tensor


_ROOMS: WeakKeyDictionary[Any, tuple[_Room, _Room]] = WeakKeyDictionary()
# Maps a class to whether its ``update``, the function in the second place, is a known form.
_KNOWN: dict[type, tuple[Any, bool]] = {}


def forget_caches() -> None:
    """Drops the memory beside the caches, and what is known about their classes."""
    _ROOMS.clear()
    _KNOWN.clear()


def appended(cache: Any, index: int, k: Tensor, v: Tensor) -> Optional[tuple[Tensor, Tensor]]:
    """Appends k and v ``[B, H, T, D]`` to the layer ``index`` of the cache, and returns all keys and values; returns
    None, without a change, where stock's update has to run."""
    if not _is_known(type(cache), "cache") or cache.offloading:
        return None
    layers = cache.layers
    if type(layers) is not list or index >= len(layers):
        return None
    layer = layers[index]
    if not _is_known(type(layer), "cache_layer") or not layer.is_initialized:
        return None
    held = _ROOMS.get(layer)
    first, second = held if held is not None else (None, None)
    keys, values = _joined(first, layer.keys, k), _joined(second, layer.values, v)
    if keys is None or values is None:
        return None
    layer.keys, layer.values = keys.view, values.view
    _ROOMS[layer] = keys, values
    return keys.view, values.view


def _joined(room: Optional[_Room], held: Any, new: Tensor) -> Optional[_Room]:
    """Returns the room with ``new`` behind ``held``, the tensor of the layer."""
    past, count = held.shape[2] if held.dim() == 4 else 0, new.shape[2]
    if room is None or room.view is not held or past + count > room.memory.shape[2]:
        if (
            type(held) is not Tensor or type(new) is not Tensor or held.dim() != 4 or held.requires_grad
            or held.dtype is not new.dtype or held.device != new.device
            or (held.shape[:2], held.shape[3]) != (new.shape[:2], new.shape[3])
        ):  # fmt: skip
            return None
        batch, heads, _, size = held.shape
        memory = held.new_empty((batch, heads, past + count + max(_LEAST_ROOM, past // 4), size))
        memory.narrow(2, 0, past).copy_(held)
    elif (memory := room.memory).is_inference() and not torch.is_inference_mode_enabled():
        return None
    memory.narrow(2, past, count).copy_(new)
    return _Room(memory, memory.narrow(2, 0, past + count))


def _is_known(kind: type, wanted: str) -> bool:
    """Returns whether the ``update`` of a class is a known form of the kind ``wanted``."""
    update = kind.update
    known = _KNOWN.get(kind)
    if known is None or known[0] is not update:
        row = row_of(kind, "update")
        known = _KNOWN[kind] = update, not isinstance(row, str) and row[0].kind == wanted
    return known[1]
