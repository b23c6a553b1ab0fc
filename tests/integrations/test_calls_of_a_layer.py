"""What a call of a fused layer takes of Python, and which calls are known without asking their reasons again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

import peft_ext
from peft_ext.nn import NF4Linear

SIZE = 64
MOST_CALLS = 40

TARGET: dict[str, Any] = {"target_modules": ["layer"]}
LORA = {"r": 8, "init_lora_weights": False, **TARGET}
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lambda: LoraConfig(**LORA),
    "LoRA, dropout": lambda: LoraConfig(**LORA, lora_dropout=0.25),
    "DoRA": lambda: LoraConfig(**LORA, use_dora=True),
    "AdaLoRA": lambda: AdaLoraConfig(init_r=8, target_r=4, total_step=100, **TARGET),
    "IA3": lambda: IA3Config(feedforward_modules=[], **TARGET),
    "IA3, feedforward": lambda: IA3Config(feedforward_modules=["layer"], **TARGET),
}


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def fused_layer(method: str, base: str = "dense") -> Any:
    """Returns a fused layer in training."""
    layer: nn.Module = nn.Linear(SIZE, SIZE)
    model = get_peft_model(Model(layer if base == "dense" else NF4Linear.from_linear(layer)), CONFIGS[method]())
    return peft_ext.accelerate(model).train().base_model.model.layer


def python_calls(call: Callable[[], Any]) -> list[str]:
    """Returns the names of the Python functions that a call runs, its own excepted."""
    names: list[str] = []

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call":
            names.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return names[1:]


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_call_takes_few_calls_of_python(method: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (method, base) == ("DoRA", "nf4"):
        pytest.skip("the weight is decoded for its norm, in calls of its own")
    layer, x = fused_layer(method, base), torch.randn(16, SIZE, requires_grad=True)
    monkeypatch.undo()  # the fixture that asks for the reasons of each known call
    layer(x)
    calls = python_calls(lambda: layer(x))
    assert len(calls) <= MOST_CALLS, calls
    assert sum(name.endswith("checks.py:check_float") for name in calls) == 0
