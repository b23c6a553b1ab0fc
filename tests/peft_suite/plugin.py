"""A pytest plugin that accelerates every PEFT model: ``pytest -p plugin``, with this folder on PYTHONPATH.

All functions that make adapter layers (get_peft_model, from_pretrained, add_adapter, load_adapter,
inject_adapter_in_model) call ``BaseTuner.inject_adapter``; the plugin then calls :func:`peft_ext.accelerate` on the
model. The plugin counts the fused forwards by method, the stock forwards by reason, and the layers that ran fused by
kind, because a method without a fused layer was not tested.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch
from weakref import WeakSet

import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner

import peft_ext
from peft_ext.integrations import peft as integration
from peft_ext.integrations.adapter_layers.base import STOCK as STOCK_OF
from peft_ext.integrations.adapter_layers.base import Fused, class_name

FUSED: Counter[str] = Counter()
STOCK: Counter[str] = Counter()
# Counts each fused layer once. A copy of a layer is another layer. Ids can't identify layers, because a new layer may
# get the id of a deleted layer.
LAYERS: Counter[str] = Counter()
_seen: WeakSet[Any] = WeakSet()


def _accelerated(inject: Callable) -> Callable:
    @functools.wraps(inject)
    def inject_adapter(self: BaseTuner, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        peft_ext.accelerate(model, blocks=False)
        return result

    return inject_adapter


def _method(layer: Any) -> str:
    method = integration._method(layer)
    return f"{method}, several adapters" if len(layer.active_adapters) > 1 else method


def _kind(layer: Any) -> str:
    """Returns the kind of an accelerated layer, such as "LoRA: lora.Linear over Linear"."""
    stock = STOCK_OF[type(layer)]
    package = stock.__module__.removeprefix("peft.tuners.").split(".")[0]
    base = class_name(type(layer.get_base_layer()))
    return f"{_method(layer)}: {package}.{stock.__name__} over {base}"


def _counted(fused: Callable) -> Callable:
    @functools.wraps(fused)
    def forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
        y = fused(layer, *args, **kwargs)
        if y is None:
            STOCK[layer.stock_reason() or "x does not fit"] += 1
            return y
        FUSED[_method(layer)] += 1
        if layer not in _seen:
            _seen.add(layer)
            LAYERS[_kind(layer)] += 1
        return y

    return forward


def count_fused() -> None:
    """Counts the forwards of accelerated layers from now on."""
    for layer in STOCK_OF:
        if issubclass(layer, Fused):
            layer._fused = _counted(layer._fused)


def counts() -> dict[str, dict[str, int]]:
    """Returns the number of fused forwards by method, and of layers that ran fused by kind."""
    return {"forwards": dict(FUSED), "layers": dict(LAYERS)}


def pytest_configure() -> None:
    BaseTuner.inject_adapter = _accelerated(BaseTuner.inject_adapter)
    count_fused()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Runs a test; where the test wraps a model in FSDP, allclose gets an absolute tolerance of 1e-6.

    The tests of FSDP compare a model under FSDP, which runs stock code, with a fused model, which rounds differently.
    The outputs are log-probabilities; small log-probabilities are differences of numbers near 10, and precise to 1e-6
    only. The default tolerance 1e-8 of allclose suits two runs of the same code.
    """
    with ExitStack() as stack:
        if "fsdp_wrapped" in item.name:
            stack.enter_context(patch.object(torch, "allclose", functools.partial(torch.allclose, atol=1e-6)))
        return (yield)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    total = FUSED.total() + STOCK.total()
    terminalreporter.write_line(f"peft_ext: {FUSED.total()} fused forwards, of {total} of accelerated layers")
    terminalreporter.write_line(f"peft_ext: {LAYERS.total()} layers ran fused")
    for kind, counter in (("fused", FUSED), ("stock", STOCK), ("layers", LAYERS)):
        for name, count in counter.most_common():
            terminalreporter.write_line(f"{count:>8}  {kind}: {name}")
    if path := os.environ.get("PEFT_EXT_SUITE_COUNT"):
        with open(path, "w") as file:
            json.dump(counts(), file)
