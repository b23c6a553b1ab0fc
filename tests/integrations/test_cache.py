"""Tests of the memory with room for later tokens, in which calls of few tokens without a gradient hold keys and values
of transformers' dynamic cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from few_token_models import SIZES
from transformers.cache_utils import DynamicSlidingWindowLayer

from peft_ext.integrations.model_blocks.cache import appended, room_for


def test_a_cache_grows_in_place() -> None:
    torch.manual_seed(0)
    cache = hf.DynamicCache()
    k, v = torch.randn(2, 2, 3, 5, 8)
    assert appended(cache, 0, k, v) is None  # the cache has no layer yet; the next line makes the first layer
    cache.update(k, v, 0)
    layer, wanted = cache.layers[0], [k, v]
    places = set()
    for count in (1, 1, 3, 80, 1, 1):
        new = torch.randn(2, 2, 3, count, 8)
        wanted = [torch.cat(pair, 2) for pair in zip(wanted, new, strict=True)]
        found = appended(cache, 0, *new)
        assert found[0] is layer.keys and found[1] is layer.values
        assert all(map(torch.equal, found, wanted)) and cache.get_seq_length() == wanted[0].shape[2]
        places.add(layer.keys.data_ptr())
    assert len(places) == 2  # memory is allocated in the first step, and in the step of 80 tokens
    cache.update(*new, 0)
    assert torch.equal(layer.keys, torch.cat([wanted[0], new[0]], 2))


@pytest.mark.parametrize("way", ["crop", "copy", "deepcopy", "set", "reorder", "reset"])
def test_tensors_of_a_cache_keep_their_values(way: str) -> None:
    torch.manual_seed(0)
    cache = hf.DynamicCache()
    cache.update(*torch.randn(2, 2, 3, 5, 8), 0)
    first = appended(cache, 0, *torch.randn(2, 2, 3, 1, 8))[0]
    second = appended(cache, 0, *torch.randn(2, 2, 3, 1, 8))[0]
    kept = [(view, view.clone()) for view in (first, second)]
    layer = cache.layers[0]
    if way == "crop":
        cache.crop(-1)
    elif way == "copy":
        layer = copy.copy(layer)
        cache.layers = [layer]
    elif way == "deepcopy":
        cache = copy.deepcopy(cache)
    elif way == "set":
        layer.keys, layer.values = first, layer.values[:, :, :-1]
    elif way == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
    else:
        cache.reset()
        assert appended(cache, 0, *torch.randn(2, 2, 3, 1, 8)) is None
        cache.update(*torch.randn(2, 2, 3, 5, 8), 0)
    length = cache.get_seq_length()
    before, new = cache.layers[0].keys.clone(), torch.randn(2, 2, 3, 1, 8)
    assert torch.equal(appended(cache, 0, *new)[0], torch.cat([before, new[0]], 2))
    assert cache.get_seq_length() == length + 1
    assert all(torch.equal(view, value) for view, value in kept)


@pytest.mark.parametrize("why", ["dtype", "batch", "static", "subclass", "gradient"])
def test_stock_s_update_runs_for_a_cache_that_does_not_fit(why: str) -> None:
    k = torch.randn(2, 3, 5, 8, requires_grad=why == "gradient")
    cache = hf.StaticCache(hf.LlamaConfig(**SIZES), 64) if why == "static" else hf.DynamicCache()
    cache.update(k, k, 0)
    if why == "subclass":

        class Layer(type(cache.layers[0])):
            def update(self, *args: Any, **given: Any) -> Any:
                return super().update(*args, **given)

        cache.layers[0].__class__ = Layer
    new = torch.randn(2 if why != "batch" else 1, 3, 1, 8, dtype=torch.float64 if why == "dtype" else None)
    assert appended(cache, 0, new, new) is None


@pytest.mark.parametrize("window", [2, 5, 90])
def test_a_cache_with_a_sliding_window_holds_what_stock_holds(window: int) -> None:
    torch.manual_seed(0)
    cache, stock = hf.DynamicCache(), DynamicSlidingWindowLayer(sliding_window=window)
    layer = DynamicSlidingWindowLayer(sliding_window=window)
    cache.layers = [layer]
    first = torch.randn(2, 2, 3, 7, 8)
    cache.update(*first, 0)
    stock.update(*first)
    views, places = [], set()
    for step in range(200):
        new = torch.randn(2, 2, 3, (1, 3, 8, 1)[step % 4], 8)
        wanted = stock.update(*new)
        found = appended(cache, 0, *new)
        assert all(map(torch.equal, found, wanted))
        assert torch.equal(layer.keys, stock.keys) and torch.equal(layer.values, stock.values)
        assert layer.cumulative_length == stock.cumulative_length and layer.get_mask_sizes(3) == stock.get_mask_sizes(3)
        views += [(view, view.clone()) for view in (*found, layer.keys, layer.values)]
        places.add(layer.keys.untyped_storage().data_ptr())
    assert len(places) < 20  # few steps copy the tokens of the window to new memory
    assert all(torch.equal(view, value) for view, value in views)
    new = torch.randn(2, 2, 3, 1, 8)  # transformers' own update goes on with the layer
    assert all(map(torch.equal, cache.update(*new, 0), stock.update(*new)))


@pytest.mark.parametrize("way", ["crop", "reorder", "copy", "reset"])
def test_a_layer_with_a_sliding_window_is_changed_by_its_own_methods(way: str) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 2, 3, 4, 8), torch.randn(2, 2, 3, 1, 8)
    found = []
    for fused in (True, False):
        cache = hf.DynamicCache()
        cache.layers = [DynamicSlidingWindowLayer(sliding_window=9)]
        cache.update(*first, 0)
        for _ in range(2):
            appended(cache, 0, *second) if fused else cache.update(*second, 0)
        if way == "crop":
            cache.layers[0].crop(-2)
        elif way == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
        elif way == "copy":
            cache = copy.deepcopy(cache)
        else:
            cache.reset()
            cache.update(*first, 0)
        for _ in range(9):
            last = appended(cache, 0, *second) if fused else cache.update(*second, 0)
        found.append((*last, cache.layers[0].keys, cache.layers[0].values))
        assert cache.get_seq_length() == {"crop": 13, "reset": 13}.get(way, 15)
    assert all(map(torch.equal, *found))


def test_a_layer_that_keeps_more_than_its_window_runs_stock_s_update() -> None:
    new = torch.randn(2, 3, 4, 8)
    for window, records in ((3, True), (1, False)):
        cache, layer = hf.DynamicCache(), DynamicSlidingWindowLayer(sliding_window=window)
        cache.layers = [layer]
        cache.update(new, new, 0)
        assert (appended(cache, 0, new, new) is None) == (window == 1)
        if records:
            layer.activate_past_recording()
        assert room_for(cache, 0, tuple(new.shape), new.dtype) is None
        assert layer.cumulative_length == (4 if window == 1 else 8)
