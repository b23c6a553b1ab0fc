"""TRL's trainers with the loss on linear_cross_entropy: the losses, gradients and metrics of TRL's own, in less memory."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import torch

for package in ("transformers", "peft", "accelerate", "datasets"):
    pytest.importorskip(package)
pytest.importorskip("trl", reason="needs trl, of peft_ext[examples]")

import transformers as hf
import trl
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

import peft_ext
from peft_ext.integrations import trl as ours
from peft_ext.integrations.transformers import PeftExtCallback

pytestmark = [
    pytest.mark.cpu_only("trainers choose their device themselves"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's, of its own options
]

ROOT = Path(__file__).parents[2]
STEPS = 2
WORDS = ("<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()))
# ‖ours - TRL's‖ / ‖TRL's‖ of a step's gradients: rounding, of 8 and of 24 bits.
WITHIN = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time", "total_flos"}
SFT, DPO, GRPO = "SFTTrainer", "DPOTrainer", "GRPOTrainer"


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps the first run's precision and device for the process, and takes a GPU where it sees one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Tokens are bytes."""
    bytewise = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(WORDS)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=bytewise, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )  # fmt: skip


def llama(kind: str = "Llama", vocab: int = len(WORDS), **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(hf, f"{kind}Config")(**{
        "vocab_size": vocab, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1, **sizes,
    })  # fmt: skip
    return getattr(hf, f"{kind}ForCausalLM")(config)


def rows(trainer: str, count: int = 8) -> Dataset:
    texts = ["the if statement", "a for loop over lists", "try", "classes and their methods are objects"]
    found = []
    for number in range(count):
        prompt, answer = f"{number} of {texts[number % 4]}: ", texts[(number + 1) % 4] * (1 + number % 3)
        if trainer == SFT:
            found.append({"prompt": prompt, "completion": answer})
        elif trainer == DPO:
            found.append({"prompt": prompt, "chosen": answer, "rejected": texts[(number + 2) % 4]})
        else:
            found.append({"prompt": prompt})
    return Dataset.from_list(found)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


class Gradients(hf.TrainerCallback):
    """Keeps each step's."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = [p.grad.flatten() for p in kwargs["model"].parameters() if p.requires_grad and p.grad is not None]
        self.steps.append(torch.cat(found).double())


def trainer_of(
    kind: type, folder: Path, model: Optional[nn.Module] = None, adapter: Any = None, *callbacks: Any,
    data: Optional[Dataset] = None, more: Any = None, **options: Any,
) -> Any:  # fmt: skip
    _forget()
    name = kind.__name__
    given = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 1, "bf16": False,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    if name == GRPO:
        given |= {"num_generations": 2, "max_completion_length": 8, "beta": 0.1, "temperature": 0.7}
        more = {"reward_funcs": reward, **(more or {})}
    if adapter is None:
        adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    config = getattr(trl, name.replace("Trainer", "Config"))(str(folder), **{**given, **options})
    return kind(
        model=llama() if model is None else model, args=config, train_dataset=rows(name) if data is None else data,
        processing_class=tokenizer(), peft_config=adapter or None, callbacks=list(callbacks), **(more or {}),
    )  # fmt: skip


def run(kind: type, folder: Path, model: Any = None, adapter: Any = None, **options: Any) -> tuple[Any, Gradients]:
    gradients = Gradients()
    trainer = trainer_of(kind, folder, model, adapter, gradients, PeftExtCallback(), **options)
    trainer.train()
    return trainer, gradients


def history(trainer: Any) -> list[dict[str, float]]:
    drop = TIMES | {"tokens_per_s", "fused_share", "peak_mib"}
    return [{key: value for key, value in entry.items() if key not in drop} for entry in trainer.state.log_history]


def assert_alike(name: str, folder: Path, model: Any = None, within: float = WITHIN[torch.float32], **options: Any) -> Any:
    """Trains with TRL's own trainer and with ours; every figure that is logged, and all gradients, are alike."""
    model = llama() if model is None else model
    stock, wanted = run(getattr(trl, name), folder, copy.deepcopy(model), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*TRL's own.*")
        fused, found = run(getattr(ours, name), folder, copy.deepcopy(model), **options)
    assert fused.loss_reason is None and len(found.steps) == len(wanted.steps) == STEPS
    for ours_, trls in zip(found.steps, wanted.steps, strict=True):
        assert trls.norm() > 0 and (ours_ - trls).norm() <= within * trls.norm()
    compare(history(fused), history(stock), within)
    return fused


def compare(found: list[dict[str, float]], wanted: list[dict[str, float]], within: float) -> None:
    assert len(found) == len(wanted)
    for ours_, trls in zip(found, wanted, strict=True):
        assert ours_.keys() == trls.keys()
        for key, value in trls.items():
            # Of a margin or a ratio of two runs of the same model, which are 0 and 1, the rounding alone is left.
            assert ours_[key] == pytest.approx(value, rel=10 * within, abs=10 * within), key


METRICS = {
    SFT: {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"},
    DPO: {"loss", "entropy", "mean_token_accuracy", "num_tokens", "logits/chosen", "logits/rejected", "logps/chosen",
          "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"},
    GRPO: {"loss", "entropy", "kl", "num_tokens", "reward", "clip_ratio/region_mean"},
}  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("dtype", WITHIN, ids=str)
def test_it_trains_what_trl_trains(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    within = WITHIN[dtype]
    trainer = assert_alike(name, tmp_path, llama().to(dtype), within, bf16=dtype is torch.bfloat16)
    assert trainer.state.log_history[0].keys() >= METRICS[name]


@pytest.mark.parametrize("name", METRICS)
def test_under_autocast(name: str, tmp_path: Path) -> None:
    assert_alike(name, tmp_path, within=WITHIN[torch.bfloat16], bf16=True)
