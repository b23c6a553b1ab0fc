"""Tests that a fused layer runs stock code if the forward of its base layer's or a submodule's class was replaced."""

from __future__ import annotations

import pytest

pytest.importorskip("peft", reason="PEFT is not installed")

import torch
from peft import get_peft_model
from peft_models import METHODS, K, config_of, inputs, make_method, run, stock_of
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_ext
from peft_ext.nn import NF4Linear

# Method, base, and a class whose forward stock PEFT calls for this method and base.
BELOW = [
    *((method, "float32", nn.Linear) for method in METHODS),
    ("LoRA", "Conv1D", Conv1D), ("LoRA", "Conv1D", nn.Linear),
    ("LoRA", "float32", nn.Dropout), ("DoRA", "float32", nn.Dropout), ("LoRA", "float32", nn.Identity),
    ("LoRA", "nf4", NF4Linear), ("LoRA", "nf4", nn.Linear), ("IA3", "nf4", NF4Linear),
]  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after", "after a step"])
@pytest.mark.parametrize(("method", "base", "kind"), BELOW)
def test_stock_runs_where_the_forward_of_a_class_was_replaced(method, base, kind, when, monkeypatch):
    """The forward of the base layer's class, or of lora_A's, lora_B's or the dropout's class."""
    options = {"lora_dropout": 0.25} if kind is nn.Dropout else {}
    if base == "Conv1D":
        config = config_of(method, target_modules=["0"], fan_in_fan_out=True, init_lora_weights=False)
        model = get_peft_model(nn.Sequential(Conv1D(16, K)), config)
    else:
        model = make_method(method, base, **options)
    stock, x, forward = stock_of(model), inputs(base, (7,)), kind.forward

    def replace():
        monkeypatch.setattr(kind, "forward", lambda self, x, *args: 1.5 * forward(self, x, *args))

    if when == "before":
        replace()
    fused = peft_ext.accelerate(model)
    if when == "after a step":
        run(fused, x)
    if when != "before":
        replace()
    # Over a base layer that runs its own forward, the adapter's part is still fused, which rounds differently.
    torch.testing.assert_close(run(fused, x), run(stock, x), rtol=1e-4, atol=1e-5)
    rows = peft_ext.explain(fused).rows
    assert rows and all("forward" in row.reason for row in rows)
    monkeypatch.undo()
    assert peft_ext.explain(fused).fused_share == 1.0


@pytest.mark.parametrize("method", METHODS)
def test_a_replaced_forward_is_noticed_after_an_equal_call(method, monkeypatch):
    """The replaced forward runs in the call that follows an equal, fused call."""
    model = peft_ext.accelerate(make_method(method, "float32").eval())
    x, forward = inputs("float32", (7,)), nn.Linear.forward
    before = model(x)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 1.5 * forward(self, x))
    assert not torch.allclose(model(x), before)
    monkeypatch.undo()
    assert torch.equal(model(x), before)
