"""Tests of TRL's trainers with the loss on linear_cross_entropy: losses, gradients and metrics agree with TRL's own,
and a step takes less memory.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("trl", reason="needs trl, of peft_ext[examples]")

import transformers as hf
import trl
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiers import first
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from trl.trainer.utils import add_fused_lm_head

import peft_ext
from peft_ext.integrations import trl as ours
from peft_ext.integrations.bitsandbytes import to_linear4bit
from peft_ext.integrations.transformers import PeftExtCallback

pytestmark = [
    pytest.mark.cpu_only("trainers choose their device themselves"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL warns about its own options
]

ROOT = Path(__file__).parents[2]
STEPS = 2
WORDS = ("<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()))
# Largest relative error of a step's gradients, ‖ours - TRL's‖ / ‖TRL's‖, that rounding explains, by dtype.
WITHIN = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
# Parts of the names of logged figures that do not depend on the loss: times, and counts of PeftExtCallback and Trainer.
LEFT_OUT = ("runtime", "per_second", "step_time", "tokens_per_s", "peak_mib", "fused_share", "total_flos")
SFT, DPO, KTO, GRPO, RLOO = "SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer"
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hides GPUs, and clears the state of the library accelerate after a test, which would otherwise keep the precision
    and the device of the first run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Returns a tokenizer that makes one token of each byte."""
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
        elif trainer == KTO:
            found.append({"prompt": prompt, "completion": answer, "label": number % 2 == 0})
        else:
            found.append({"prompt": prompt})
    return Dataset.from_list(found)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


class Gradients(hf.TrainerCallback):
    """Stores the gradients of each step."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = [p.grad.flatten() for p in kwargs["model"].parameters() if p.requires_grad and p.grad is not None]
        self.steps.append(torch.cat(found).double())


def trainer_of(
    kind: type, folder: Path, model: Optional[nn.Module] = None, adapter: Any = LORA, *callbacks: Any,
    data: Optional[Dataset] = None, more: Any = None, **options: Any,
) -> Any:  # fmt: skip
    _forget()
    name = next(base.__name__ for base in kind.__mro__ if base.__module__.startswith("trl."))
    given = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 1, "bf16": False,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    if name in (GRPO, RLOO):
        given |= {"num_generations": 2, "max_completion_length": 8, "beta": 0.1, "temperature": 0.7}
        more = {"reward_funcs": reward, **(more or {})}
    config = getattr(trl, name.replace("Trainer", "Config"))(str(folder), **{**given, **options})
    return kind(
        model=llama() if model is None else model, args=config, train_dataset=rows(name) if data is None else data,
        processing_class=tokenizer(), peft_config=adapter, callbacks=list(callbacks), **(more or {}),
    )  # fmt: skip


def run(kind: type, folder: Path, model: Any = None, adapter: Any = LORA, **options: Any) -> tuple[Any, Gradients]:
    gradients = Gradients()
    trainer = trainer_of(kind, folder, model, adapter, gradients, PeftExtCallback(), **options)
    trainer.train()
    return trainer, gradients


def history(trainer: Any) -> list[dict[str, float]]:
    return [
        {key: value for key, value in entry.items() if not key.endswith(LEFT_OUT)}
        for entry in trainer.state.log_history
    ]


def assert_alike(
    name: str, folder: Path, model: Any = None, within: float = WITHIN[torch.float32], **options: Any
) -> Any:
    """Asserts that TRL's own trainer and peft_ext's trainer agree in the gradients, and in the logged figures that
    LEFT_OUT does not name."""
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


# Counts, rates, and figures of the generated texts, which are equal as long as the sampled tokens are equal.
EXACT = re.compile(
    "step|epoch|learning_rate|num_tokens|completions/.*|frac_reward_zero_std|reward|reward_std|rewards/reward/.*"
)


def compare(found: list[dict[str, float]], wanted: list[dict[str, float]], within: float) -> None:
    """Compares logged figures. A margin or a loss near 0 is a difference of log-probabilities: its error is that of a
    log-probability near 1, which the absolute bound allows."""
    assert len(found) == len(wanted)
    for ours_, trls in zip(found, wanted, strict=True):
        assert ours_.keys() == trls.keys()
        for key, value in trls.items():
            if EXACT.fullmatch(key):
                assert ours_[key] == value, key
            else:
                assert ours_[key] == pytest.approx(value, rel=within, abs=within / 2), key


METRICS = {
    SFT: {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"},
    DPO: {"loss", "entropy", "mean_token_accuracy", "num_tokens", "logits/chosen", "logits/rejected", "logps/chosen",
          "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"},
    KTO: {"loss", "entropy", "kl", "logits/chosen", "logps/rejected", "rewards/chosen"},
    GRPO: {"loss", "entropy", "kl", "num_tokens", "reward", "clip_ratio/region_mean"},
    RLOO: {"loss", "entropy", "kl", "num_tokens", "reward"},
}  # fmt: skip


# --- TRL's numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("dtype", WITHIN, ids=str)
def test_it_trains_what_trl_trains(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    within = WITHIN[dtype]
    trainer = assert_alike(name, tmp_path, llama().to(dtype), within, bf16=dtype is torch.bfloat16)
    assert trainer.state.log_history[0].keys() >= METRICS[name]


@pytest.mark.parametrize("name", first(METRICS, [DPO]))
def test_under_autocast(name: str, tmp_path: Path) -> None:
    assert_alike(name, tmp_path, within=WITHIN[torch.bfloat16], bf16=True, max_steps=STEPS)


LOSSES = [(kind.__name__, loss) for kind, losses in ours._LOSSES.items() for loss in sorted(losses - {None})]
FIRST_LOSSES = [(SFT, "dft"), (DPO, "ipo"), (KTO, "apo_zero_unpaired"), (GRPO, "dr_grpo")]
assert set(FIRST_LOSSES) <= set(LOSSES)


@pytest.mark.parametrize(
    ("name", "loss"),
    [pytest.param(*each, marks=[pytest.mark.slow] * (each not in FIRST_LOSSES)) for each in LOSSES],
)
def test_every_loss(name: str, loss: str, tmp_path: Path) -> None:
    more = {"label_smoothing": 0.1} if loss == "exo_pair" else {}
    more |= {"importance_sampling_level": "sequence"} if loss == "luspo" else {}
    more |= {"num_iterations": 2} if name == GRPO else {}
    assert_alike(name, tmp_path, loss_type=[loss] if name == DPO else loss, **more)


FIRST_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    (SFT, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    (SFT, {"packing": True, "max_length": 64}),
    (DPO, {"eval_strategy": "steps", "eval_steps": 1, "more": {"eval_dataset": rows(DPO, 6)}}),
    (GRPO, {"gradient_accumulation_steps": 2, "temperature": 1.3}),
]
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    (SFT, {"gradient_checkpointing": False}),
    (SFT, {"completion_only_loss": False}),
    (SFT, {"padding_free": True, "max_length": None}),
    (SFT, {"average_tokens_across_devices": False}),
    (SFT, {"eval_strategy": "steps", "eval_steps": 1, "more": {"eval_dataset": rows(SFT, 6)}}),
    (SFT, {"eval_strategy": "steps", "eval_steps": 1,
           "more": {"eval_dataset": rows(SFT, 6), "compute_metrics": lambda p: {"mean": float(p[0].mean())}}}),
    (DPO, {"use_weighting": True}),
    (DPO, {"ld_alpha": 0.5}),
    (DPO, {"f_divergence_type": "js_divergence"}),
    (DPO, {"precompute_ref_log_probs": True}),
    (DPO, {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]}),
    (GRPO, {"beta": 0.0, "steps_per_generation": 2, "num_iterations": 2}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [*FIRST_OPTIONS, *(pytest.param(*each, marks=pytest.mark.slow) for each in OPTIONS)],
    ids=lambda value: value if isinstance(value, str) else " ".join((*value, *value.get("more", ()))),
)
def test_options(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    assert_alike(name, tmp_path, **options)


HEADS: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.3},
    "Qwen3": {},
    "Phi": {},  # the head of Phi has a bias
}


@pytest.mark.parametrize("kind", first(HEADS, ["Gemma2", "Phi"]))
@pytest.mark.parametrize("name", [SFT, GRPO])
def test_heads(name: str, kind: str, tmp_path: Path) -> None:
    assert_alike(name, tmp_path, llama(kind, **HEADS[kind]))


@pytest.mark.parametrize("kind", ["NF4Linear", "Linear4bit"])
def test_a_head_in_nf4_gives_what_trl_gives_of_its_values(kind: str, tmp_path: Path) -> None:
    """Compares with TRL's loss over the dequantized head, because TRL cannot multiply by a packed weight."""
    model = llama(vocab=320)
    packed = peft_ext.nn.NF4Linear.from_linear(model.lm_head)
    model.lm_head.weight.data = packed.dequantize()
    quantized = copy.deepcopy(model)
    quantized.lm_head = packed
    if kind == "Linear4bit":
        pytest.importorskip("bitsandbytes")
        to_linear4bit(quantized, torch.float32)
        quantized.is_loaded_in_4bit = False  # with True, TRL would train the adapter in bfloat16
    wanted = run(trl.SFTTrainer, tmp_path, model)
    found = run(ours.SFTTrainer, tmp_path, quantized)
    assert found[0].loss_reason is None
    for ours_, trls in zip(found[1].steps, wanted[1].steps, strict=True):
        assert (ours_ - trls).norm() <= 1e-4 * trls.norm()
    compare(history(found[0]), history(wanted[0]), 1e-4)


def test_without_acceleration_and_in_a_class_of_ones_own(tmp_path: Path) -> None:
    class Mine(ours.LinearLoss, trl.SFTTrainer):
        pass

    found = []
    for kind in (trl.SFTTrainer, Mine):
        trainer = trainer_of(kind, tmp_path)
        trainer.train()
        found.append(history(trainer))
    compare(found[1], found[0], 1e-5)
    assert trainer.loss_reason is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("items", [None, 7])
def test_the_loss_of_one_call_is_trls(temperature: float, items: Optional[int]) -> None:
    model = llama("Gemma2", num_hidden_layers=1, final_logit_softcapping=2.0).requires_grad_(False)
    add_fused_lm_head(model, temperature)
    ids = torch.arange(3, 35).view(2, -1)
    call = {"input_ids": ids, "labels": ids.masked_fill(ids < 8, -100), "fused_lm_head": True,
            "num_items_in_batch": None if items is None else torch.tensor(items)}  # fmt: skip
    wanted = model(**call)
    with warnings.catch_warnings(action="error"):  # a call of TRL's own forward is a warning
        found = ours._linear(model.forward)(model, **call)
    for name in ("loss", "log_probs"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)


def test_every_field_of_the_output(tmp_path: Path) -> None:
    ids = torch.arange(3, 35).view(2, -1)
    found = []
    for module in (trl, ours):
        model = trainer_of(module.DPOTrainer, tmp_path, use_weighting=True).model
        labels = ids.masked_fill(ids < 8, -100)
        found.append(model(input_ids=ids, labels=labels, fused_lm_head=True, num_items_in_batch=torch.tensor(7)))
    assert found[0].keys() == found[1].keys() and len(found[0]) == 7
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-5, atol=1e-5)


def test_labels_of_which_none_counts(tmp_path: Path) -> None:
    text = {"input_ids": list(range(3, 30)), "labels": [-100] * 27}
    model = trainer_of(ours.SFTTrainer, tmp_path).model.train()
    batch = {name: torch.tensor([value]) for name, value in text.items()}
    output = model(**batch, fused_lm_head=True)
    output.loss.backward()
    assert output.loss == 0 and not output.entropy.any()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_call_without_it_is_the_models_own(tmp_path: Path) -> None:
    model = llama()
    ids = torch.arange(3, 20).view(1, -1)
    wanted = copy.deepcopy(model)(ids, labels=ids)
    trainer = trainer_of(ours.SFTTrainer, tmp_path, model)
    with trainer.model.disable_adapter():
        found = trainer.model(input_ids=ids, labels=ids)
    torch.testing.assert_close((found.loss, found.logits), (wanted.loss, wanted.logits))


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(folder: Path, reason: str, model: Any = None, kind: type = ours.SFTTrainer, **options: Any) -> Any:
    """Constructs a trainer that uses TRL's loss, and asserts that the trainer warns once with the reason."""
    with pytest.warns(UserWarning, match=f"the loss is TRL's own: {reason}") as said:
        trainer = trainer_of(kind, folder, model, **options)
    assert sum("TRL's own" in str(warning.message) for warning in said) == 1
    assert trainer.loss_reason is not None
    return trainer


@pytest.mark.parametrize(
    ("name", "reason", "options"),
    [
        (SFT, "use_liger_kernel is True", {"use_liger_kernel": True}),
        (SFT, "torch_compile is True", {"torch_compile": True}),
        (SFT, "label_smoothing_factor is 0.1", {"label_smoothing_factor": 0.1}),
        (SFT, "compute_loss_func is given", {"more": {"compute_loss_func": lambda *_, **__: 0.0}}),
        (DPO, "ref_model is a model of its own", {"more": {"ref_model": llama()}}),
        (GRPO, "cast_lm_head_to_fp32 is True", {"cast_lm_head_to_fp32": True}),
        (GRPO, "entropy_coef is 0.1", {"entropy_coef": 0.1}),
        (GRPO, "top_entropy_quantile is 0.5", {"top_entropy_quantile": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_that_is_not_known(name: str, reason: str, options: dict[str, Any], tmp_path: Path) -> None:
    trainer = refused(tmp_path, reason, kind=getattr(ours, name), **options)
    assert trainer.model.get_base_model().forward.__func__.__code__ in add_fused_lm_head.__code__.co_consts


@pytest.mark.parametrize("option", [*ours._OPTIONS, "loss_type"])
def test_every_option_that_is_looked_at(option: str, tmp_path: Path) -> None:
    trainer = trainer_of(ours.SFTTrainer, tmp_path)
    setattr(trainer.args, option, "another")
    assert "another" in ours._trainer_reason(trainer) and option in ours._trainer_reason(trainer)


def test_a_trained_head(tmp_path: Path) -> None:
    whole = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    refused(tmp_path, "the head is a ModulesToSaveWrapper", adapter=whole)
    refused(tmp_path, "the head is trained", adapter=None)


def test_float16_experts_and_another_trainer(tmp_path: Path) -> None:
    refused(tmp_path, "the head computes in float16", llama().half())
    moe = llama("Qwen3Moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=64)
    refused(tmp_path, "router_aux_loss_coef adds the router's loss", moe)

    class Other(ours.LinearLoss, trl.RewardTrainer):
        def __init__(self) -> None:
            pass

    assert "the trainer is none of SFTTrainer" in ours._trainer_reason(Other())


def test_a_trl_that_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_FORMS", {"another"})
    trainer = refused(tmp_path, "the head of trl .* is none of the known forms")
    trainer.train()
    stock = trainer_of(trl.SFTTrainer, tmp_path)  # without fused layers, as in the first trainer
    stock.train()
    assert history(trainer) == history(stock)


def test_a_head_that_is_trained_later_on(tmp_path: Path) -> None:
    trainer = trainer_of(ours.SFTTrainer, tmp_path)
    head = trainer.model.get_output_embeddings().requires_grad_()
    ids = torch.arange(3, 20).view(1, -1)
    with pytest.warns(UserWarning, match="this call of the head is TRL's own: the head is trained"):
        trainer.model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
    assert head.weight.grad.any()


def test_a_loss_made_of_the_entropy_is_an_error(tmp_path: Path) -> None:
    trainer = trainer_of(ours.SFTTrainer, tmp_path)
    ids = torch.arange(3, 20).view(1, -1)
    output = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
    with pytest.raises(RuntimeError, match="the entropy has no gradient"):
        output.entropy.sum().backward()


def test_lora_on_the_head_is_refused_by_trl(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trainer_of(ours.SFTTrainer, tmp_path, adapter=LoraConfig(r=4, target_modules=["lm_head"]))


# --- memory, and two processes ----------------------------------------------------------------------------------------


def started(*arguments: str, processes: int = 0) -> dict[str, Any]:
    """Runs this file as a script and returns the JSON that the script prints."""
    paths = [str(Path(peft_ext.__file__).parents[1]), *sys.path]
    environment = {
        **os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    done = subprocess.run([sys.executable, *launcher, __file__, *arguments], env=environment, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


VOCAB, TEXTS, LENGTH = 32_000, 8, 256


@pytest.mark.slow
def test_memory_is_that_of_transformers_trainer(tmp_path: Path) -> None:
    plain = started("memory", "Trainer", str(tmp_path))
    for name in (SFT, DPO, GRPO):
        found = started("memory", name, str(tmp_path))
        assert found["peak"] <= 1.1 * plain["peak"], (name, found, plain)


@pytest.mark.slow
def test_two_processes_under_ddp(tmp_path: Path) -> None:
    for run_ in started("ddp", str(tmp_path), processes=2).values():
        wanted, found = run_["trl"], run_["ours"]
        assert found["kind"] == wanted["kind"] == "DistributedDataParallel"
        compare(found["history"], wanted["history"], 1e-5)
        assert found["weights"] == pytest.approx(wanted["weights"], rel=1e-4)


def _memory(name: str, folder: str) -> dict[str, Any]:
    """Runs STEPS steps of accelerated LoRA with the trainer ``name`` in ``folder``, and returns the measured values.

    All trainers get equally many tokens. For DPO, half of the rows are chosen answers.
    """
    model, meter = llama(vocab=VOCAB), PeftExtCallback()
    generator = torch.Generator().manual_seed(0)
    given = {"gradient_checkpointing": False, "per_device_train_batch_size": TEXTS}
    if name == "Trainer":
        ids = torch.randint(3, VOCAB, (TEXTS, LENGTH), generator=generator).tolist()
        arguments = hf.TrainingArguments(
            folder, max_steps=STEPS, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", **given
        )  # fmt: skip
        data = [{"input_ids": text, "labels": text, "attention_mask": [1] * LENGTH} for text in ids]
        trainer = hf.Trainer(get_peft_model(model, LORA), arguments, train_dataset=data, callbacks=[meter])
    else:
        texts = [chr(97 + number) * (LENGTH - 9) for number in range(TEXTS + 1)]
        data = {
            SFT: [{"text": "a" * (LENGTH - 1)} for text in texts[1:]],
            DPO: [{"prompt": "p" * 8, "chosen": a, "rejected": b} for a, b in zip(texts, texts[1:], strict=False)],
            GRPO: [{"prompt": "p" * 8}] * TEXTS,
        }[name]
        if name == DPO:
            given["per_device_train_batch_size"] //= 2
        if name == GRPO:
            given |= {"num_generations": TEXTS, "max_completion_length": LENGTH - 8}
        else:
            given["max_length"] = LENGTH
        trainer = trainer_of(getattr(ours, name), folder, model, LORA, meter, data=Dataset.from_list(data), **given)
        assert trainer.loss_reason is None
    trainer.train()
    return {"peak": meter.peak_mib}


def _ddp(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (SFT, DPO):
        for of, module in (("trl", trl), ("ours", ours)):
            trainer = trainer_of(getattr(module, name), folder, llama(), LORA, per_device_train_batch_size=2)
            trainer.train()
            weights = sum(p.double().abs().sum() for p in trainer.model.parameters() if p.requires_grad).item()
            kind = type(trainer.model_wrapped).__name__
            found.setdefault(name, {})[of] = {"history": history(trainer), "weights": weights, "kind": kind}
    return found


if __name__ == "__main__":
    found = {"memory": _memory, "ddp": _ddp}[sys.argv[1]](*sys.argv[2:])
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found), flush=True)
