"""Tests PeftExtCallback with transformers' Trainer, and every script of docs/examples on its tiny model.

The scripts run in this process, which has imported their packages; one script runs as a user starts it.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

import transformers as hf
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, BATCH
from torch import nn

import peft_ext
from peft_ext.integrations.adapter_layers.base import STOCK
from peft_ext.integrations.transformers import PeftExtCallback
from peft_ext.ops import prove

pytestmark = [
    pytest.mark.cpu_only("trainers choose their device themselves"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers warns about names that TRL and PEFT use
]

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
NEEDS = {
    "trainer": "transformers", "trl_sft": "trl", "trl_dpo": "trl", "lightning_module": "lightning",
    "accelerate_loop": "accelerate", "plain_torch": "torch", "distributed": "torch",
}  # fmt: skip
STEPS = 3


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hides GPUs, and clears the state of the library accelerate, which keeps the precision and device of a process's
    first run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# --- the callback -----------------------------------------------------------------------------------------------------

LLAMA = ARCHITECTURES["Llama"]
LAYERS = 14  # linear layers that LoRA adapts in the model
LENGTH = LLAMA.inputs()["input_ids"].shape[1]


def adapted(**config: Any) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(LLAMA.build(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **config))


def trainer_of(
    model: nn.Module, folder: Path, *callbacks: hf.TrainerCallback, batch: Any = None, **arguments: Any
) -> hf.Trainer:
    """Returns a Trainer over the rows of the tiny batch or another batch, with two rows in a batch and two batches in a
    step. Every step is logged.
    """
    batch = LLAMA.batch() if batch is None else batch
    rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    arguments = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        **arguments,
    }  # fmt: skip
    return hf.Trainer(
        model, hf.TrainingArguments(str(folder), **arguments), train_dataset=rows, eval_dataset=rows[:4],
        callbacks=list(callbacks),
    )  # fmt: skip


def losses(trainer: hf.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def fused(model: nn.Module) -> int:
    """Returns how many layers with an adapter are fused."""
    return sum(type(module) in STOCK and isinstance(module, BaseTunerLayer) for module in model.modules())


class Reporter(hf.TrainerCallback):
    """Keeps the logs, as callbacks that write to TensorBoard do."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


class Generator(hf.TrainerCallback):
    """Generates an answer after each evaluation."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, ...]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ids = LLAMA.inputs()["input_ids"][:1]
        self.answers.append(tuple(kwargs["model"].eval().generate(input_ids=ids, max_new_tokens=4).shape))


FIGURES = {"tokens_per_s", "fused_share", "peak_mib"}


def test_the_figures_reach_the_logs_the_history_and_the_metrics(tmp_path: Path) -> None:
    reporter, meter = Reporter(), PeftExtCallback(warmup_steps=1)
    trainer = trainer_of(adapted(), tmp_path, reporter)
    assert meter.attach(trainer) is meter and meter.attach(trainer) is meter
    assert trainer.callback_handler.callbacks.count(meter) == 1
    metrics = trainer.train().metrics
    in_training = [entry for entry in reporter.logs if "loss" in entry]
    assert len(in_training) == STEPS and all(entry.keys() >= FIGURES for entry in in_training)
    assert all(entry.keys() >= FIGURES for entry in trainer.state.log_history)
    assert metrics.keys() >= FIGURES and metrics["fused_share"] == meter.fused_share == 1
    assert metrics["tokens_per_s"] == round(meter.tokens_per_s, 1)
    assert meter.tokens_per_s == pytest.approx(sum(meter.step_tokens[1:]) / sum(meter.step_seconds[1:]))
    assert len(meter.explanation.rows) == LAYERS and "14 of 14 layers fused" in str(meter.explanation)
    assert meter.peak_mib > 0.9 * psutil.Process().memory_info().rss / 2**20


def test_as_an_argument_of_trainer_it_comes_after_the_reporters(tmp_path: Path) -> None:
    reporter = Reporter()
    trainer = trainer_of(adapted(), tmp_path, reporter, PeftExtCallback())
    trainer.train()
    assert not any(FIGURES & entry.keys() for entry in reporter.logs[:1])
    assert all(entry.keys() >= FIGURES for entry in trainer.state.log_history)


@pytest.mark.parametrize("counted", ["no", "all"])
def test_the_tokens_are_those_of_the_steps(tmp_path: Path, counted: str) -> None:
    """Evaluation, generation and the second forward of gradient checkpointing add nothing to the counted tokens."""
    meter, generator = PeftExtCallback(), Generator()
    trainer = trainer_of(
        adapted(), tmp_path, meter, generator, eval_strategy="steps", eval_steps=1, gradient_checkpointing=True,
        include_num_input_tokens_seen=counted,
    )  # fmt: skip
    trainer.train()
    assert meter.step_tokens == [2 * 2 * LENGTH] * STEPS
    assert generator.answers == [(1, LENGTH + 4)] * STEPS
    assert meter.fused_share == 1 and all(map(math.isfinite, losses(trainer)))
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == STEPS
    assert not any(FIGURES & entry.keys() for entry in trainer.state.log_history if "eval_loss" in entry)


def test_a_forward_without_gradients_is_no_training(tmp_path: Path) -> None:
    """A forward without gradients within a step, such as of a reference model, adds no tokens."""

    class Refers(hf.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad(), model.disable_adapter():
                model(**inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    meter = PeftExtCallback()
    trainer = trainer_of(adapted(), tmp_path, meter)
    trainer.__class__ = Refers
    trainer.train()
    assert meter.step_tokens == [2 * 2 * LENGTH] * STEPS and meter.fused_share == 1


def test_padding_is_left_out_where_trainer_leaves_it_out(tmp_path: Path) -> None:
    meter = PeftExtCallback()
    trainer = trainer_of(adapted(), tmp_path, meter, include_num_input_tokens_seen="non_padding", max_steps=2)
    trainer.train()
    assert sum(meter.step_tokens) == int(LLAMA.inputs()["attention_mask"].sum()) < BATCH * LENGTH


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_it_trains_what_the_stock_classes_train(tmp_path: Path, checkpointing: bool) -> None:
    curves, weights = [], []
    for accelerated in (True, False):
        model, meter = adapted(), PeftExtCallback(accelerate=accelerated)
        trainer = trainer_of(model, tmp_path, meter, gradient_checkpointing=checkpointing)
        trainer.train()
        curves.append(losses(trainer))
        weights.append(trained_weights(model))
        assert fused(model) == (LAYERS if accelerated else 0) and meter.fused_share == accelerated
    assert curves[0] == pytest.approx(curves[1], rel=1e-5) and curves[0][-1] < curves[0][0]
    # Adam divides by the size of a gradient, so the rounding of a tiny gradient may change a weight by a part of a
    # step.
    assert (weights[0] - weights[1]).abs().max() < 0.01 * (weights[0] - trained_weights(adapted())).abs().max()


def trained_weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def test_restore_leaves_the_stock_classes_and_no_hook(tmp_path: Path) -> None:
    model = adapted()
    classes = [type(module) for module in model.modules()]
    meter = PeftExtCallback(restore=True)
    trainer_of(model, tmp_path, meter).train()
    assert [type(module) for module in model.modules()] == classes and meter.fused_share == 1
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
def test_a_run_after_one_that_failed_counts_once(tmp_path: Path) -> None:
    class Fails(hf.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("stop")

    model, meter = adapted(), PeftExtCallback()
    with pytest.raises(RuntimeError, match="stop"):
        trainer_of(model, tmp_path, meter, Fails()).train()
    assert fused(model) == LAYERS
    trainer_of(model, tmp_path, meter).train()
    assert meter.step_tokens == [2 * 2 * LENGTH] * STEPS
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_it_explains_under_the_autocast_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    explain = peft_ext.explain
    prove.settle("CPU")  # accelerate calls explain while kernels are unproved

    def watched(model: nn.Module) -> Any:
        seen.append((model.training, torch.is_autocast_enabled("cpu")))
        return explain(model)

    monkeypatch.setattr("peft_ext.integrations.peft.explain", watched)
    meter = PeftExtCallback()
    trainer = trainer_of(adapted(), tmp_path, meter, bf16=True)
    trainer.train()
    assert seen == [(True, True)] and meter.fused_share == 1 and all(map(math.isfinite, losses(trainer)))


class Regression(nn.Module):
    """A model that has no embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.mse_loss(self.linear(x), labels)}


@pytest.mark.parametrize("kind", ["images", "numbers"])
def test_a_model_without_tokens_has_no_speed_and_a_share(tmp_path: Path, kind: str) -> None:
    if kind == "images":
        model, batch = ARCHITECTURES["ViT"].adapt("LoRA"), ARCHITECTURES["ViT"].batch()
    else:
        model = get_peft_model(Regression(), LoraConfig(r=4, target_modules=["linear"]))
        batch = {"x": torch.randn(BATCH, 64), "labels": torch.randn(BATCH, 8)}
    meter = PeftExtCallback()
    trainer = trainer_of(
        model, tmp_path, meter, batch=batch, max_steps=1, per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1, remove_unused_columns=False,
    )  # fmt: skip
    metrics = trainer.train().metrics
    assert meter.tokens_per_s is None and "tokens_per_s" not in metrics
    assert metrics["fused_share"] == 1 and meter.median_step_s > 0


def test_the_dropout_of_dora_is_passed_on(tmp_path: Path) -> None:
    meter = PeftExtCallback(dora_dropout="lora")
    trainer_of(adapted(use_dora=True, lora_dropout=0.1), tmp_path, meter, max_steps=1).train()
    assert {row.kind for row in meter.explanation.rows} == {"DoRA (dropout on the low-rank path) over Linear"}


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PeftExtCallback: warmup_steps is -1, wanted at least 0"):
        PeftExtCallback(warmup_steps=-1)
    with pytest.raises(TypeError, match="PeftExtCallback.attach: trainer is PeftModelForCausalLM, wanted a Trainer"):
        PeftExtCallback().attach(adapted())
    with pytest.raises(ValueError, match="dora_dropout is 'none'"):
        trainer_of(adapted(), tmp_path, PeftExtCallback(dora_dropout="none")).train()


# --- the examples -----------------------------------------------------------------------------------------------------

MARK = re.compile(r"\s*# peft_ext, line (\d) of [34].*")


def marked(name: str) -> list[tuple[int, str]]:
    """Returns the number and the code of each line that an example adds for peft_ext."""
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    return [(int(MARK.search(line)[1]), MARK.sub("", line)) for line in lines if MARK.search(line)]


def run_example(script: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    if importlib.util.find_spec(needed := NEEDS.get(script.stem, "torch")) is None:
        pytest.skip(f"needs {needed}, of peft_ext[examples]")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [str(script), "--tiny", *options])
    runpy.run_path(str(script), run_name="__main__")


def loss_of(out: str) -> tuple[float, float, int]:
    """Returns the first loss, the last loss and the number of losses that an example prints."""
    first, last, count = re.search(r"^loss: (\S+) -> (\S+) in (\d+) steps$", out, re.MULTILINE).groups()
    return float(first), float(last), int(count)


def test_every_script_is_listed() -> None:
    assert {path.stem for path in EXAMPLES.glob("[!_]*.py")} == {*NEEDS, "mixture"}


@pytest.mark.parametrize("name", NEEDS)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run_example(EXAMPLES / f"{name}.py", monkeypatch, "--max-steps", str(STEPS), "--output", str(tmp_path))
    out = capsys.readouterr().out
    first, last, count = loss_of(out)
    assert math.isfinite(first) and math.isfinite(last) and count == STEPS
    assert "14 of 14 layers fused (100%)" in out
    if PeftExtCallback.__name__ in marked(name)[0][1]:
        assert re.search(r"^tokens_per_s \S+, fused_share 1, peak_mib ", out, re.MULTILINE)
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    moved = [bool(tensor.any()) for key, tensor in adapter.items() if "lora_B" in key]  # lora_B starts at 0
    assert len(moved) == LAYERS and all(moved)


def test_the_example_of_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_example(EXAMPLES / "mixture.py", monkeypatch, "--max-steps", str(STEPS), "--output", str(tmp_path))
    out = capsys.readouterr().out
    assert loss_of(out)[2] == STEPS and "12 of 12 layers fused (100%)" in out
    assert "LoRA with dropout 0.05 over Qwen3MoeExperts.down_proj" in out
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert all(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)


@pytest.mark.parametrize("name", NEEDS)
def test_three_lines_or_four_and_no_more_are_for_peft_ext(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Without these lines, the script is stock PEFT's and trains too; the documentation shows the same lines."""
    assert [number for number, _ in marked(name)] == [1, 2, 3, 4][: 4 if NEEDS[name] == "trl" else 3]
    document = (ROOT / "docs" / "trainers.md").read_text().splitlines()
    for _, code in marked(name):
        assert f"+{code.strip()}" in [re.sub(r"^\+\s*", "+", line) for line in document]
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    stock = "\n".join(line for line in lines if not MARK.search(line)) + "\n"
    assert "peft_ext" not in stock
    script = tmp_path / f"{name}.py"
    script.write_text(stock)
    run_example(script, monkeypatch, "--max-steps", "1", "--output", str(tmp_path / "out"))
    out = capsys.readouterr().out
    assert loss_of(out)[2] == 1 and "fused" not in out


@pytest.mark.slow
def test_a_script_runs_as_its_reader_starts_it(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "docs/examples/plain_torch.py", "--tiny", "--max-steps", "2", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert loss_of(done.stdout)[2] == 2 and "14 of 14 layers fused (100%)" in done.stdout


def history(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--gradient-checkpointing",)], ids=["", "gradient checkpointing"])
def test_resumed_trainer_goes_where_the_unbroken_one_goes(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Compares a resumed training with an unbroken one; both have dropout, accumulation, evaluation and generation."""
    run = (EXAMPLES / "trainer.py", monkeypatch, *options, "--save-steps", "2", "--max-steps", "4", "--output")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_example(*run, str(whole))
    shutil.copytree(whole / "checkpoint-2", broken / "checkpoint-2")
    out = capsys.readouterr().out
    assert re.findall(r"^step (\d): 'The if statement is' -> '.+'$", out, re.MULTILINE) == ["2", "4"]
    run_example(*run, str(broken), "--resume")
    out = capsys.readouterr().out
    assert re.findall(r"^step (\d): ", out, re.MULTILINE) == ["4"] and "14 of 14 layers fused (100%)" in out
    curves = []
    for folder in (whole, broken):
        curves.append([
            (entry["step"], key, entry[key])
            for entry in history(folder / "checkpoint-4") for key in ("loss", "eval_loss") if key in entry
        ])  # fmt: skip
    assert curves[0] == curves[1] and len(curves[0]) == 6
    for name in ("adapter_model.safetensors", "checkpoint-4/adapter_model.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


def test_packed_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Loss and gradients of texts in one row, without padding, equal those of the separate texts, and those of
    stock.
    """
    options = ("--packed", "--max-steps", str(STEPS), "--output", str(tmp_path))
    run_example(EXAMPLES / "trainer.py", monkeypatch, *options)
    first, last, count = loss_of(capsys.readouterr().out)
    assert math.isfinite(first) and math.isfinite(last) and count == STEPS

    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 99, (length,), generator=generator).tolist() for length in (17, 9, 22)]
    packed = hf.DataCollatorWithFlattening()([{"input_ids": text} for text in texts])
    stock = adapted()
    fused = peft_ext.accelerate(copy.deepcopy(stock))
    alone = [{"input_ids": torch.tensor([text]), "labels": torch.tensor([text])} for text in texts]
    weights = torch.tensor([len(text) - 1.0 for text in texts])
    found = []
    for model, batches, shares in ((fused, [packed], [1.0]), (stock, [packed], [1.0]),
                                   (fused, alone, weights / weights.sum())):  # fmt: skip
        model.train().zero_grad()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        loss = sum(share * model(**batch, use_cache=False).loss for batch, share in zip(batches, shares, strict=True))
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-6)


def test_tensorboard_gets_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard, of peft_ext[examples]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_example(EXAMPLES / "trainer.py", monkeypatch, "--max-steps", str(STEPS), "--output", str(tmp_path))
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for name in ("loss", *FIGURES):
        scalars = events.Scalars(f"train/{name}")
        assert {scalar.step for scalar in scalars} == set(range(1, STEPS + 1)), name
        assert all(math.isfinite(scalar.value) and scalar.value > 0 for scalar in scalars)
    assert events.Scalars("eval/loss")
