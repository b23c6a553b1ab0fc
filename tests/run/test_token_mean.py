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
from peft import CPTConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiers import first
from tiny_run import used

import peft_ext
from peft_ext import recipes
from peft_ext.run import Options, finetune
from peft_ext.run.token_mean import TokenMeanTrainer

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


# --- one step, without a run ------------------------------------------------------------------------------------------


def trainer_of(folder: Path, config: Any = None, **arguments: Any) -> TokenMeanTrainer:
    """Returns a trainer of a Llama of one layer, with an adapter if ``config`` is given."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5}  # fmt: skip
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval()
    given = hf.TrainingArguments(str(folder), use_cpu=True, report_to="none", **arguments)
    return TokenMeanTrainer(model if config is None else get_peft_model(model, config), given)


def batch_of(*labels: int) -> dict[str, torch.Tensor]:
    """Returns a batch of one text with the tokens 3, 4, 5 and so on, and the given labels."""
    return {"input_ids": torch.arange(3, 3 + len(labels))[None], "labels": torch.tensor([labels])}


def test_the_loss_of_a_step_is_the_mean_over_the_labels_of_its_batches(tmp_path: Path) -> None:
    """The batches have 5, 1 and no labels that count."""
    trainer = trainer_of(tmp_path)
    batches = [batch_of(3, 4, 5, 6, 7, 8), batch_of(-100, 9, -100), batch_of(3, -100, -100)]
    whole = {"input_ids": torch.zeros(3, 6, dtype=torch.int64), "labels": torch.full((3, 6), -100)}
    for row, batch in enumerate(batches):
        for name, value in batch.items():
            whole[name][row, : value.shape[1]] = value[0]
    taken, items = trainer.get_batch_samples(iter(batches), 3, torch.device("cpu"))
    assert len(taken) == 3 and items == 6
    trainer.current_gradient_accumulation_steps = 3
    with torch.no_grad():
        losses = [trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items) for batch in taken]
        wanted = trainer.model(**whole).loss
    assert losses[2] == 0
    torch.testing.assert_close(sum(losses) / 3, wanted)  # Trainer divides the sum of the losses by 3


def test_the_loss_of_a_step_without_labels_is_0(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    taken, items = trainer.get_batch_samples(iter([batch_of(3, -100)]), 1, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, dict(taken[0]), num_items_in_batch=items)
    loss.backward()
    assert items == 0 and loss == 0
    assert not any(p.grad.isnan().any() for p in trainer.model.parameters() if p.grad is not None)


COMMON = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
COUNTED = {  # the configuration of an adapter, and the number of labels of a text of 3 tokens that its loss counts
    "LoRA": (LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), 2),
    "prefix": (PrefixTuningConfig(**COMMON), 2),
    "prompt": (PromptTuningConfig(**COMMON), 3),  # the last virtual token predicts the text's first label
    "CPT": (CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[9, 8, 7, 6, 5], cpt_mask=[1] * 5,
                      cpt_tokens_type_mask=[1, 2, 3, 4, 4]), 2 + 3),  # virtual tokens of type 4 have labels, too
}  # fmt: skip


@pytest.mark.parametrize("method", COUNTED)
def test_the_labels_that_count(method: str, tmp_path: Path) -> None:
    config, wanted = COUNTED[method]
    trainer = trainer_of(tmp_path, config)
    assert trainer.get_batch_samples(iter([batch_of(3, 4, 5)]), 1, torch.device("cpu"))[1] == wanted


@pytest.mark.parametrize("across", [True, False])
def test_the_labels_of_a_step_are_counted_in_all_processes(
    across: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two processes has a batch: this process a batch with 2 labels, the other process a batch with 5."""
    trainer = trainer_of(tmp_path, average_tokens_across_devices=across)
    monkeypatch.setattr(hf.TrainingArguments, "world_size", 2)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda count: torch.stack([count, torch.tensor(5)]))
    taken, items = trainer.get_batch_samples(iter([batch_of(3, 4, 5)]), 1, torch.device("cpu"))
    assert items == (2 + 5 if across else 2)
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(taken[0]), num_items_in_batch=items)
        mean = trainer.model(**taken[0]).loss
    torch.testing.assert_close(loss, mean * 2 * 2 / 7 if across else mean)  # DDP divides the gradients by 2
