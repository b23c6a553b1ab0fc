"""Appends the keys and values of few tokens to transformers' dynamic cache without a copy of the earlier tokens.

transformers' ``DynamicLayer.update`` concatenates, so that each step copies the whole cache. This module puts a layer's
keys and values into memory with room for later tokens, and makes ``keys`` and ``values`` of the layer views of the
filled part. New tokens are written behind the filled part only while the layer still holds the view that this module
made, so a tensor that was taken from the layer before keeps its values.

transformers' update runs for a cache or a layer whose ``update`` is no known form, for a cache that offloads, for a
layer that holds no tokens yet, and for tensors that do not fit, need a gradient or are not on the CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..forms import row_of

__all__ = ["Room", "appended", "forget_caches", "room_for"]

_LEAST_ROOM = 64  # new memory of a cache's layer has room for at least this many later tokens


class _Held:
    """The memory for the keys and for the values of a cache layer, and the views of the filled parts, which the layer
    holds."""

    __slots__ = ("keys", "key_view", "values", "value_view")

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.key_view: Optional[Tensor] = None
        self.value_view: Optional[Tensor] = None


# Maps a layer of a cache to the memory that this module made for the layer. A cache has no attribute with the memory,
# so that a copied or saved cache has only the attributes of a stock cache.
_HELD: WeakKeyDictionary[Any, _Held] = WeakKeyDictionary()
# Maps the class of a cache or of a cache's layer to its method ``update``, and to whether this method has a known form.
_KNOWN: dict[type, tuple[Any, bool]] = {}


def forget_caches() -> None:
    """Forgets the memory that this module made for caches, and which classes of caches have a known form."""
    _HELD.clear()
    _KNOWN.clear()


class Room(NamedTuple):
    """Room in a layer of a cache: ``held`` has memory for keys and for values ``[batch, heads, tokens, size of a
    head]``, in which the first ``past`` tokens are filled."""

    held: _Held
    layer: Any
    past: int

    def fill(self, count: int) -> tuple[Tensor, Tensor]:
        """Makes the layer hold ``count`` more tokens, whose keys and values the caller has written into the memory of
        ``held``, and returns all keys and values."""
        held, layer, tokens = self.held, self.layer, self.past + count
        if held.key_view is None:
            _HELD[layer] = held
        held.key_view = layer.keys = held.keys.narrow(2, 0, tokens)
        held.value_view = layer.values = held.values.narrow(2, 0, tokens)
        return layer.keys, layer.values


def room_for(cache: Any, index: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Optional[Room]:
    """Returns room for new keys and values of the shape ``[batch, heads, tokens, size of a head]`` in the layer
    ``index`` of the cache; None where transformers' update has to run."""
    if not _is_known(type(cache), "cache") or cache.offloading:
        return None
    layers = cache.layers
    if type(layers) is not list or index >= len(layers):
        return None
    layer = layers[index]
    if not _is_known(type(layer), "cache_layer") or not layer.is_initialized:
        return None
    keys, values = layer.keys, layer.values
    held = _HELD.get(layer)
    if held is not None and held.key_view is keys and held.value_view is values:
        memory = held.keys
        past, fits = keys.shape[2], keys.dtype is dtype and keys.shape[1] == shape[1] and keys.shape[0] == shape[0]
        if fits and past + shape[2] <= memory.shape[2] and memory.is_inference() == torch.is_inference_mode_enabled():
            return Room(held, layer, past) if keys.shape[3] == shape[3] else None
    if type(keys) is not Tensor or type(values) is not Tensor or keys.dim() != 4 or keys.shape != values.shape:
        return None
    batch, heads, past, size = keys.shape
    if (batch, heads, size) != (shape[0], shape[1], shape[3]) or not keys.dtype is values.dtype is dtype:
        return None
    if keys.device.type != "cpu" or values.device.type != "cpu" or keys.requires_grad or values.requires_grad:
        return None
    capacity = past + shape[2] + max(_LEAST_ROOM, past // 4)
    memories = []
    for tensor in (keys, values):
        memories.append(tensor.new_empty((batch, heads, capacity, size)))
        memories[-1].narrow(2, 0, past).copy_(tensor)
    return Room(_Held(*memories), layer, past)


def appended(cache: Any, index: int, k: Tensor, v: Tensor) -> Optional[tuple[Tensor, Tensor]]:
    """Appends k and v ``[batch, heads, tokens, size of a head]`` to the layer ``index`` of the cache, and returns all
    keys and values; returns None, without a change, where transformers' update has to run."""
    if k.shape != v.shape or k.dtype is not v.dtype or k.dim() != 4:
        return None
    if (room := room_for(cache, index, tuple(k.shape), k.dtype)) is None:
        return None
    count = k.shape[2]
    room.held.keys.narrow(2, room.past, count).copy_(k)
    room.held.values.narrow(2, room.past, count).copy_(v)
    return room.fill(count)


def _is_known(kind: type, wanted: str) -> bool:
    """Returns whether the method ``update`` of the class ``kind`` is a known form of the kind ``wanted``."""
    update, known = kind.update, _KNOWN.get(kind)
    if known is None or known[0] is not update:
        row = row_of(kind, "update")
        known = _KNOWN[kind] = update, not isinstance(row, str) and row[0].kind == wanted
    return known[1]
