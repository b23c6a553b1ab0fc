"""Tests of the cases in which a model computes the stock loss: other calls, ``restore``, threads, errors and other
heads."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from test_loss import (
    MODELS,
    batch,
    build,
    reason,
    step,
    waits,
    with_use,
)
from torch import Tensor

import peft_ext
from peft_ext.integrations.model_blocks import loss as between


def test_other_calls_are_stock() -> None:
    model = peft_ext.accelerate(build())
    inputs = batch()
    assert type(model(inputs["input_ids"])) is type(model.eval()(**inputs)) is type(build()(**inputs))
    assert model.generate(inputs["input_ids"], max_new_tokens=3).shape == (3, 20)
    with torch.no_grad():
        assert not waits(model.train()(**inputs))
    base = model.get_base_model()
    assert not waits(base(inputs["input_ids"])) and waits(base(inputs["input_ids"], None, None, None, None,
                                                              inputs["labels"]))  # fmt: skip


def test_what_takes_it_back() -> None:
    stock, model = (build("Llama", ["lm_head", "q_proj"]) for _ in range(2))
    peft_ext.accelerate(peft_ext.accelerate(model))
    base, signature = model.get_base_model(), inspect.signature(stock.get_base_model().forward)
    assert inspect.signature(base.forward) == signature and type(base).__name__ == "LlamaForCausalLM"
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert waits(again(**batch())) and isinstance(again.get_base_model(), between.LanguageModel)
        assert inspect.signature(type(again.get_base_model()).forward) == inspect.signature(hf.LlamaForCausalLM.forward)
    step(model)
    peft_ext.accelerate(model, blocks=False)
    assert not waits(model(**batch())) and "was not called" in reason(model)
    peft_ext.restore(peft_ext.accelerate(model))
    for ours, theirs in zip(model.modules(), stock.modules(), strict=True):
        assert type(ours) is type(theirs) and ours.__dict__.keys() == theirs.__dict__.keys()
    torch.testing.assert_close(step(model)[0], step(stock)[0], rtol=0, atol=0)


def test_another_thread_gets_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[type] = []

    def use(logits: Any, labels: Tensor) -> None:
        head = model.get_base_model().lm_head
        thread = threading.Thread(target=lambda: found.append(type(head(torch.randn(2, 5, 32).requires_grad_()))))
        thread.start()
        thread.join()

    _, model = with_use(use, monkeypatch)
    assert waits(step(model)[2]) and found == [Tensor]


def test_a_class_that_was_made_of_ours_is_not_made_again() -> None:
    """If fully_shard wraps the model itself, fully_shard makes a subclass of the fused class."""
    model = peft_ext.accelerate(build())
    base = model.get_base_model()
    made = base.__class__ = type("Sharded", (type(base),), {})
    peft_ext.accelerate(model)
    assert type(base) is made and waits(model(**batch())) and reason(model) == "logits in chunks"


def test_an_error_within_a_forward_ends_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = with_use(lambda z, y: 1 // 0, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        step(model)
    assert type(model.get_base_model().lm_head(torch.randn(2, 5, 32).requires_grad_())) is Tensor


def test_heads_and_forwards_that_have_whole_logits() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft_ext.accelerate(get_peft_model(MODELS["Llama"](), config)).train()
    assert not waits(model(**batch())) and "its head is a ModulesToSaveWrapper" in reason(model)
    model = peft_ext.accelerate(build())
    base, forward = model.get_base_model(), model.get_base_model().forward
    base.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert reason(model).startswith("the model's forward was replaced")
    base._original_forward = forward  # accelerate's mixed precision sets and calls this attribute
    assert reason(model) == "logits in chunks" and waits(step(model)[2])
