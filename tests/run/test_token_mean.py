"""Tests that a step of several batches is the step of one batch with the same examples, for each kind of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers as hf
from peft import CPTConfig, PromptTuningConfig
from safetensors.torch import load_file
from tiers import first
from tiny_run import used

import peft_ext
from peft_ext import recipes
from peft_ext.run import Options, finetune

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.cpu_only("a run chooses the device itself"),
    pytest.mark.usefixtures("short_answers"),
]
WEIGHTS = "adapter_model.safetensors"
RUNS = [(data, accepts, method) for data in ("pairs.jsonl", "docs.txt") for accepts in (True, False)
        for method in ("lora", "adalora", "prompt", "prefix")]  # fmt: skip
FIRST = [("pairs.jsonl", False, "lora")]


def assert_same(folders: list[Path], losses: list[list[float]]) -> None:
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    whole, parts = (load_file(folder / WEIGHTS) for folder in folders)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", first(RUNS, FIRST), ids=str)
def test_a_run_of_more_and_smaller_batches(
    case: tuple[str, bool, str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' Trainer takes the mean of the batches' means for a class with ``accepts_loss_kwargs = False``.

    AdaLoRA's regularization counts once in a step.
    """
    data, accepts, method = case
    monkeypatch.setattr(hf.LlamaForCausalLM, "accepts_loss_kwargs", accepts, raising=False)
    folders, losses = [tmp_path / "whole", tmp_path / "parts"], []
    for folder, size in zip(folders, (4, 1), strict=True):
        options = used({"method": method, "rank": 4, "dropout": 0.0})
        result = finetune(Options(
            model=str(tiny / "model"), data=str(tiny / data), output=folder, **options, quant="none", dtype="fp32",
            batch_size=size, grad_accum=4 // size, block_size=64, max_steps=3, lr=1e-2, warmup=0,
        ))  # fmt: skip
        losses.append(result.losses)
    assert_same(folders, losses)


class IgnoresItemsForCausalLM(hf.LlamaForCausalLM):
    """A causal language model whose forward accepts ``num_items_in_batch`` and does not pass it to the loss."""

    def forward(self, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


KINDS = {"takes": hf.LlamaForCausalLM, "ignores": IgnoresItemsForCausalLM, "refuses": hf.LlamaForCausalLM,
         "prompt": hf.LlamaForCausalLM, "cpt": hf.LlamaForCausalLM}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", first(KINDS, ["refuses"]))
def test_a_recipe_of_more_and_smaller_batches(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows have unequal numbers of labels, and one row has none."""
    monkeypatch.setattr(hf.LlamaForCausalLM, "accepts_loss_kwargs", name != "refuses", raising=False)
    rows = [{"input_ids": list(range(3, 3 + length))} for length in (3, 30, 5, 12)]
    rows[2]["labels"] = [-100] * 5
    folders, losses = [tmp_path / "whole", tmp_path / "parts"], []
    for folder, size in zip(folders, (4, 1), strict=True):
        torch.manual_seed(0)
        model = KINDS[name].from_pretrained(tiny / "model", dtype=torch.float32)
        if name == "prompt":  # the last virtual token predicts a text's first label, which counts
            config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
            model = peft_ext.get_peft_model(model, config)
        elif name == "cpt":  # labels of two virtual tokens count too, and each type of token has a weight
            config = CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[9, 8, 7, 6, 5], cpt_mask=[1] * 5,
                               cpt_tokens_type_mask=[1, 2, 3, 4, 4], opt_weighted_loss_type="decay",
                               opt_loss_decay_factor=0.5)  # fmt: skip
            model = peft_ext.get_peft_model(model, config)
        else:
            model = recipes.apply_lora_to_model(model, rank=4)
        tokenizer = hf.AutoTokenizer.from_pretrained(tiny / "model", pad_token="</s>")
        done = recipes.train_with_peft(
            model, tokenizer, rows, output_dir=tmp_path / "out", adapter_dir=folder, max_steps=3, warmup_steps=0,
            learning_rate=1e-2, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
            save_strategy="no", use_cpu=True,
        )  # fmt: skip
        losses.append([done.training_loss])
    assert_same(folders, losses)
