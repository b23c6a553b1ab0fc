"""A pytest plugin under which every PEFT model is accelerated: ``pytest -p plugin``, this folder on PYTHONPATH.

All ways to adapter layers (get_peft_model, from_pretrained, add_adapter, load_adapter, inject_adapter_in_model) meet
in ``BaseTuner.inject_adapter``; after it, :func:`peft_ext.accelerate` runs over the model. The forwards of accelerated
layers are counted, by method and by what they did: a method of which nothing was fused was not tested.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import BaseTuner

import peft_ext
from peft_ext.integrations import _peft_base
from peft_ext.integrations import peft as integration

FUSED: Counter[str] = Counter()
STOCK: Counter[str] = Counter()


def _accelerated(inject: Callable) -> Callable:
    @functools.wraps(inject)
    def inject_adapter(self: BaseTuner, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        peft_ext.accelerate(model)
        return result

    return inject_adapter


def _counted(fused: Callable) -> Callable:
    @functools.wraps(fused)
    def forward(layer: Any, x: Any) -> Any:
        y = fused(layer, x)
        if y is not None:
            method = integration._method(layer)
            FUSED[f"{method}, several adapters" if len(layer.active_adapters) > 1 else method] += 1
        else:
            STOCK[layer._stock_reason() or "x does not fit"] += 1
        return y

    return forward


def pytest_configure() -> None:
    BaseTuner.inject_adapter = _accelerated(BaseTuner.inject_adapter)
    for layer in _peft_base.STOCK:
        if issubclass(layer, _peft_base.Fused):
            layer._fused = _counted(layer._fused)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    total = FUSED.total() + STOCK.total()
    terminalreporter.write_line(f"peft_ext: {FUSED.total()} fused forwards, of {total} of accelerated layers")
    for kind, counts in (("fused", FUSED), ("stock", STOCK)):
        for name, count in counts.most_common():
            terminalreporter.write_line(f"{count:>8}  {kind}: {name}")
    if path := os.environ.get("PEFT_EXT_SUITE_COUNT"):
        with open(path, "w") as file:
            json.dump(FUSED, file)
