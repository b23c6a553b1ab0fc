"""A pytest plugin under which every PEFT model is accelerated: ``pytest -p plugin``, this folder on PYTHONPATH.

All ways to adapter layers (get_peft_model, from_pretrained, add_adapter, load_adapter, inject_adapter_in_model) meet
in ``BaseTuner.inject_adapter``; after it, :func:`peft_ext.accelerate` runs over the model. The forwards of accelerated
layers are counted, by what they did: a run in which nothing was fused would prove nothing.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import BaseTuner

import peft_ext
from peft_ext.integrations import peft as integration

CALLS: Counter[str] = Counter()


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
        reason = integration._stock_reason(layer)
        y = fused(layer, x)
        CALLS["fused" if y is not None else f"stock: {reason or 'x does not fit'}"] += 1
        return y

    return forward


def pytest_configure() -> None:
    BaseTuner.inject_adapter = _accelerated(BaseTuner.inject_adapter)
    integration._fused_lora = _counted(integration._fused_lora)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"peft_ext: {CALLS['fused']} fused forwards, of {CALLS.total()} of accelerated layers")
    for name, count in CALLS.most_common():
        terminalreporter.write_line(f"{count:>8}  {name}")
    if path := os.environ.get("PEFT_EXT_SUITE_COUNT"):
        with open(path, "w") as file:
            file.write(str(CALLS["fused"]))
