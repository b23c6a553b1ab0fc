"""Tests the callbacks for transformers' Trainer without a training run."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from peft_ext.integrations.trainer import AdaLoraCallback, PeftExtCallback


def test_adaloras_callback_hands_on_the_step() -> None:
    steps: list[int] = []
    tuner = SimpleNamespace(rankallocator=None, update_and_allocate=steps.append)
    for step in (0, 1, 7):
        state = SimpleNamespace(global_step=step)
        AdaLoraCallback().on_optimizer_step(None, state, None, model=SimpleNamespace(base_model=tuner))
    assert steps == [0, 1, 7]


def test_adaloras_callback_leaves_out_the_steps_that_a_scaler_skips() -> None:
    steps: list[int] = []
    config = {"default": SimpleNamespace(total_step=10, tfinal=2)}
    tuner = SimpleNamespace(rankallocator=None, update_and_allocate=steps.append, trainable_adapter_name="default",
                            peft_config=config)  # fmt: skip
    for step in range(10):
        state, optimizer = SimpleNamespace(global_step=step), SimpleNamespace(step_was_skipped=step in (0, 5, 8, 9))
        AdaLoraCallback().on_optimizer_step(
            None, state, None, model=SimpleNamespace(base_model=tuner), optimizer=optimizer
        )
    assert steps == [1, 2, 3, 4, 6, 7, 8, 9]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


def test_only_the_tokens_of_steps_are_counted() -> None:
    model, ids = Tokens(), torch.zeros(2, 5, dtype=torch.int64)
    args = SimpleNamespace(device=torch.device("cpu"), include_num_input_tokens_seen="no")
    state, callback = SimpleNamespace(num_input_tokens_seen=0), PeftExtCallback(accelerate=False)
    callback.on_train_begin(args, state, None, model=model)
    model.embedding(ids)  # the call of an evaluation before the first step
    for _ in range(2):
        callback.on_step_begin(args, state, None)
        model.embedding(ids)
        with torch.no_grad():  # the call of a reference model
            model.embedding(ids)
        callback.on_step_end(args, state, None, model=model)
        model.embedding(ids)
    assert callback.step_tokens == [10, 10]
