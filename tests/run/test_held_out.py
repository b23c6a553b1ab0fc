"""Tests the losses of the held-out examples, with a model whose logits are known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from peft_ext.run import evaluate
from peft_ext.run.errors import Stop
from peft_ext.run.ranks import Ranks

pytestmark = pytest.mark.cpu_only("a run chooses the device itself")


class Counts(nn.Module):
    """A model that gives the next number of a sequence the logit 5, and all other tokens the logit 0."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=5.0 * nn.functional.one_hot(input_ids + 1, 16))


def test_the_held_out_loss_is_that_of_the_next_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def collate(_run: Any, examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        batch = {name: torch.tensor([row[name] for row in examples]) for name in examples[0]}
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    monkeypatch.setattr(evaluate, "collate", collate)
    ids = [3, 4, 5, 9]
    rows = [{"input_ids": ids, "labels": labels} for labels in (ids, [3, 4, -100, -100], [-100, -100, -100, 9])]
    run = SimpleNamespace(examples=SimpleNamespace(held_out=rows), ranks=Ranks(), sharded=False, stop=Stop())
    wrong = math.log(math.exp(5.0) + 15)  # the loss of a token whose logit is 0
    right = wrong - 5.0
    found = evaluate.held_out_losses(run, Counts())
    assert [count for _, count in found] == [3, 1, 1]
    assert [total for total, _ in found] == pytest.approx([2 * right + wrong, right, wrong], rel=1e-5)
    assert evaluate.held_out_losses(run, Counts(), [2]) == found[2:]
    assert evaluate.mean_loss(found) == pytest.approx((3 * right + 2 * wrong) / 5, rel=1e-5)
