"""Appends the keys and values of few tokens to transformers' dynamic cache without a copy of the earlier tokens.

transformers' ``DynamicLayer.update`` concatenates, so that each step copies the whole cache. This module puts a layer's
keys and values into memory with room for later tokens, and makes ``keys`` and ``values`` of the layer views of the
filled part. New tokens are written behind the filled part only while the layer still holds the view that this module
made, so a tensor that was taken from the layer before keeps its values.

The layer of a sliding window, ``DynamicSlidingWindowLayer``, holds the last ``sliding_window - 1`` tokens. Its view
moves on in the memory by the number of new tokens. When the memory has no more room behind the view, the tokens of the
view are copied to new memory.

transformers' update runs for a cache or a layer whose ``update`` is no known form, for a cache that offloads, for a
layer of a sliding window that keeps all past tokens (``record_past``), for a layer that holds no tokens yet, and for
tensors that do not fit, need a gradient or are not on the CPU.
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
    """The memory for the keys and for the values of a cache layer, and the views that the layer holds, which begin at
    the token ``first`` of the memory."""

    __slots__ = ("first", "keys", "key_view", "values", "value_view")

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.first = keys, values, 0
        self.key_view: Optional[Tensor] = None
        self.value_view: Optional[Tensor] = None


# Maps a layer of a cache to the memory that this module made for the layer. A cache has no attribute with the memory,
# so that a copied or saved cache has only the attributes of a stock cache.
_HELD: WeakKeyDictionary[Any, _Held] = WeakKeyDictionary()
# Maps the class of a cache or of a cache's layer to its method ``update``, and to the kind of the known form of this
# method, "" for none.
_KNOWN: dict[type, tuple[Any, str]] = {}


def forget_caches() -> None:
    """Forgets the memory that this module made for caches, and which classes of caches have a known form."""
    _HELD.clear()
    _KNOWN.clear()


class Room(NamedTuple):
    """Room in a layer of a cache: ``keys`` and ``values``, in which the first ``past`` tokens are filled, are the
    memory of ``held`` from its token ``held.first`` on. ``window``: the most tokens that the layer holds, or None."""

    held: _Held
    layer: Any
    past: int
    window: Optional[int]

    @property
    def keys(self) -> Tensor:
        return _from(self.held.keys, self.held.first)

    @property
    def values(self) -> Tensor:
        return _from(self.held.values, self.held.first)

    def fill(self, count: int) -> None:
        """Makes the layer hold ``count`` more tokens, whose keys and values the caller has written into ``keys`` and
        ``values`` behind the first ``past`` tokens."""
        held, layer, tokens = self.held, self.layer, self.past + count
        if held.key_view is None:
            _HELD[layer] = held
        if self.window is not None:
            layer.cumulative_length += count
            if tokens > self.window:
                held.first, tokens = held.first + tokens - self.window, self.window
        held.key_view = layer.keys = held.keys.narrow(2, held.first, tokens)
        held.value_view = layer.values = held.values.narrow(2, held.first, tokens)


def _from(memory: Tensor, first: int) -> Tensor:
    """Returns the memory from its token ``first`` on."""
    return memory if first == 0 else memory.narrow(2, first, memory.shape[2] - first)


def room_for(cache: Any, index: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Optional[Room]:
    """Returns room for new keys and values of the shape ``[batch, heads, tokens, size of a head]`` in the layer
    ``index`` of the cache; None where transformers' update has to run."""
    if _form_of(type(cache)) != "cache" or cache.offloading:
        return None
    layers = cache.layers
    if type(layers) is not list or index >= len(layers):
        return None
    layer, window = layers[index], None
    form = _form_of(type(layer))
    if form == "sliding_cache_layer":
        # For a window of one token, transformers' layer keeps all tokens.
        if layer.record_past is not False or type(layer.sliding_window) is not int or layer.sliding_window < 2:
            return None
        window = layer.sliding_window - 1
    elif form != "cache_layer":
        return None
    if not layer.is_initialized:
        return None
    keys, values = layer.keys, layer.values
    held = _HELD.get(layer)
    if held is not None and held.key_view is keys and held.value_view is values:
        memory, past = held.keys, keys.shape[2]
        has_room = held.first + past + shape[2] <= memory.shape[2]
        fits = keys.dtype is dtype and keys.shape[1] == shape[1] and keys.shape[0] == shape[0]
        if fits and has_room and memory.is_inference() == torch.is_inference_mode_enabled():
            return Room(held, layer, past, window) if keys.shape[3] == shape[3] else None
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
    return Room(_Held(*memories), layer, past, window)


def appended(cache: Any, index: int, k: Tensor, v: Tensor) -> Optional[tuple[Tensor, Tensor]]:
    """Appends k and v ``[batch, heads, tokens, size of a head]`` to the layer ``index`` of the cache, and returns the
    earlier keys and values that the layer held with k and v behind them; returns None, without a change, where
    transformers' update has to run."""
    if k.shape != v.shape or k.dtype is not v.dtype or k.dim() != 4:
        return None
    if (room := room_for(cache, index, tuple(k.shape), k.dtype)) is None:
        return None
    count = k.shape[2]
    seen = [memory.narrow(2, 0, room.past + count) for memory in (room.keys, room.values)]
    for memory, new in zip(seen, (k, v), strict=True):
        memory.narrow(2, room.past, count).copy_(new)
    room.fill(count)
    if room.window is None:
        return room.layer.keys, room.layer.values
    return seen[0], seen[1]


def _form_of(cls: type) -> str:
    """Returns the kind of the known form of the method ``update`` of a class; "" if the method has no known form."""
    update, known = cls.update, _KNOWN.get(cls)
    if known is None or known[0] is not update:
        row = row_of(cls, "update")
        known = _KNOWN[cls] = update, "" if isinstance(row, str) else row[0].kind
    return known[1]
