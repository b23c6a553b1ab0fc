"""Tests the callbacks for transformers' Trainer without a training run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import peft_ext
from peft_ext.integrations.trainer import AdaLoraCallback, PeftExtCallback


def test_adaloras_callback_hands_on_the_step() -> None:
    steps: list[int] = []
    tuner = SimpleNamespace(rankallocator=None, update_and_allocate=steps.append)
    for step in (0, 1, 7):
        state = SimpleNamespace(global_step=step)
        AdaLoraCallback().on_optimizer_step(None, state, None, model=SimpleNamespace(base_model=tuner, parameters=list))
    assert steps == [0, 1, 7]


def test_adaloras_callback_leaves_out_gradients_that_are_not_finite() -> None:
    """A scaler for float16 skips a step with such gradients, but Trainer calls the callback in this step too."""
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(init_r=4, target_r=2, tinit=0, tfinal=2, deltaT=1, total_step=6, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    nn.init.ones_(model.base_model.model[0].lora_E["default"])
    allocator, x = model.base_model.rankallocator, torch.randn(3, 8)
    for step in range(6):
        model.zero_grad()
        (model(x).square().sum() * (torch.inf if step in (0, 2, 4) else 1.0)).backward()
        before = {name: value.clone() for name, value in allocator.exp_avg_ipt.items()}
        AdaLoraCallback().on_optimizer_step(None, SimpleNamespace(global_step=step), None, model=model)
        assert all(value.isfinite().all() for value in allocator.exp_avg_ipt.values())
        if step in (0, 2):
            assert all(torch.equal(allocator.exp_avg_ipt[name], value) for name, value in before.items())
        elif step in (1, 3):
            assert allocator.exp_avg_ipt.keys() > before.keys() or any(
                not torch.equal(allocator.exp_avg_ipt[name], value) for name, value in before.items()
            )
    (kept,) = model.peft_config["default"].rank_pattern.values()
    assert sum(kept) == 2  # the last pruning took place, although its step's gradients are not finite


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
    model.embedding(ids)  # as in an evaluation before the first step
    for _ in range(2):
        callback.on_step_begin(args, state, None)
        model.embedding(ids)
        with torch.no_grad():  # as a reference model is called
            model.embedding(ids)
        callback.on_step_end(args, state, None, model=model)
        model.embedding(ids)
    assert callback.step_tokens == [10, 10]


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "vocab_size": 32}  # fmt: skip
CHOICES = {"blocks": False, "dora_dropout": "lora", "experts_dropout": 0.25}


def chosen(model: nn.Module) -> dict[str, Any]:
    """Returns the arguments of the last ``accelerate(model)``, as ``explain`` shows their effects."""
    found = peft_ext.explain(model)
    kinds = {row.kind.partition(" over ")[0] for row in found.rows}
    return {
        "blocks": any(row.fused for row in found.blocks),
        "dora_dropout": "lora" if any("dropout on the low-rank path" in kind for kind in kinds) else "peft",
        "experts_dropout": max([float(kind.partition(" with dropout ")[2] or 0.0) for kind in kinds]),
    }


@pytest.mark.parametrize("given", [{}, *({name: value} for name, value in CHOICES.items())], ids=str)
def test_the_callback_leaves_what_accelerate_chose(given: dict[str, Any]) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    args = SimpleNamespace(device=torch.device("cpu"), torch_compile=False)
    defaults = {"blocks": True, "dora_dropout": "peft", "experts_dropout": 0.0}
    configs = (
        peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
        peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]),
    )
    sizes = transformers.MixtralConfig(**SIZES, num_local_experts=2)
    models = (peft.get_peft_model(transformers.MixtralForCausalLM(sizes), config) for config in configs)
    model = nn.ModuleList(models)
    PeftExtCallback().on_train_begin(args, None, None, model=model)
    assert chosen(model) == defaults  # no call of accelerate has chosen anything
    peft_ext.accelerate(model, **given)
    assert chosen(model) == {**defaults, **given}
    PeftExtCallback().on_train_begin(args, None, None, model=model)
    assert chosen(model) == {**defaults, **given}
    PeftExtCallback(**defaults).on_train_begin(args, None, None, model=model)
    assert chosen(model) == defaults
