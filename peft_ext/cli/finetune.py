"""``peft-ext finetune``: transformers' Trainer and PEFT, accelerated, measured and checked.

Everything that can be refused is refused before a weight is loaded. The order of the work: check; load the model and
quantize it; evaluate and ask; adapt, accelerate, train; evaluate and ask again; save; let stock PEFT re-read the
adapter and compare its logits with the trained model's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from ..files import atomic_file, save_adapter
from . import CliError
from .data import PYTHON_DOCS, Corpus, Examples, read_corpus, tokenize

if TYPE_CHECKING:
    import torch

__all__ = ["METHODS", "Options", "finetune"]

DEMO_MODEL = "smollm2"
DEMO_PROMPT = "In Python, what is the difference between the `is` operator and `==`?"
DEFAULT_STEPS = 60
NEW_TOKENS = 48

# By method: the learning rate where none is given. Few parameters want a larger one (PEFT's own examples).
METHODS = {
    "lora": 2e-4,
    "rslora": 2e-4,
    "dora": 2e-4,
    "adalora": 1e-3,
    "ia3": 8e-3,
    "prefix": 1e-2,
    "prompt": 3e-2,
}
_LOW_RANK = ("lora", "rslora", "dora", "adalora")
_PROMPTS = ("prefix", "prompt")


@dataclass(frozen=True)
class Options:
    """What the command line sets; the defaults are the run without arguments."""

    model: str = DEMO_MODEL
    data: str = PYTHON_DOCS
    output: Path = Path("outputs/finetune")
    method: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: Optional[str] = None
    virtual_tokens: int = 20
    quant: str = "nf4"
    blocksize: int = 64
    text_column: Optional[str] = None
    prompt_column: Optional[str] = None
    completion_column: Optional[str] = None
    eval_fraction: float = 0.1
    block_size: int = 256
    max_steps: Optional[int] = None
    epochs: Optional[float] = None
    batch_size: int = 4
    grad_accum: int = 1
    lr: Optional[float] = None
    warmup: float = 0.05
    seed: int = 0
    save_steps: int = 0
    gradient_checkpointing: bool = False
    threads: Optional[int] = None
    resume: bool = False
    overwrite: bool = False
    stock: bool = False
    prompt: Optional[str] = None


# What a resumed run must have in common with the run that wrote the checkpoint.
_SAME_ON_RESUME = (
    "model", "data", "method", "rank", "alpha", "dropout", "target_modules", "virtual_tokens", "quant", "blocksize",
    "text_column", "prompt_column", "completion_column", "eval_fraction", "block_size", "batch_size", "grad_accum",
    "lr", "warmup", "seed", "stock",
)  # fmt: skip


def finetune(options: Options) -> int:
    """The whole run; the exit code: 0, 1 where the re-read adapter differs, 130 where Ctrl-C stopped it.

    Raises CliError, before any work, for what the user can mend.
    """
    _check_options(options)
    _check_packages(options)
    checkpoint = _check_output(options)
    corpus = read_corpus(
        options.data, text_column=options.text_column, prompt_column=options.prompt_column,
        completion_column=options.completion_column, eval_fraction=options.eval_fraction, seed=options.seed,
    )  # fmt: skip
    _quiet()
    return _Run(options, corpus, checkpoint).run()


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_options(o: Options) -> None:
    from ..weight import BLOCKSIZES

    if o.method not in METHODS:
        raise CliError(f"--method {o.method}: not yet; there are: {', '.join(METHODS)}")
    if o.quant not in ("nf4", "none"):
        raise CliError(f"--quant {o.quant}: wanted nf4 or none")
    if o.blocksize not in BLOCKSIZES:
        raise CliError(f"--blocksize {o.blocksize}: wanted one of {', '.join(map(str, BLOCKSIZES))}")
    if not 0.0 <= o.dropout < 1.0:
        raise CliError(f"--dropout {o.dropout}: wanted 0 <= p < 1")
    if not 0.0 < o.eval_fraction < 1.0:
        raise CliError(f"--eval-fraction {o.eval_fraction}: wanted more than 0 and less than 1")
    if not math.isfinite(o.alpha):
        raise CliError(f"--alpha {o.alpha}: wanted a finite number")
    if o.lr is not None and not 0 < o.lr < math.inf:
        raise CliError(f"--lr {o.lr}: wanted a positive number")
    if o.warmup < 0 or (o.warmup >= 1 and o.warmup != int(o.warmup)):
        raise CliError(f"--warmup {o.warmup}: wanted a number of steps, or a fraction of them less than 1")
    if o.max_steps is not None and o.epochs is not None:
        raise CliError("--max-steps and --epochs exclude each other")
    if o.epochs is not None and not 0 < o.epochs < math.inf:
        raise CliError(f"--epochs {o.epochs}: wanted a positive number")
    if o.save_steps < 0:
        raise CliError(f"--save-steps {o.save_steps}: wanted 0 (no checkpoints) or more")
    minimum = {"rank": 1, "virtual_tokens": 1, "block_size": 8, "batch_size": 1, "grad_accum": 1, "max_steps": 1}
    for name, least in {**minimum, "threads": 1}.items():
        if (value := getattr(o, name)) is not None and value < least:
            raise CliError(f"--{name.replace('_', '-')} {value}: wanted at least {least}")
    if o.resume and o.overwrite:
        raise CliError("--resume and --overwrite exclude each other")
    if o.resume and o.method == "adalora":
        raise CliError("--resume with --method adalora: not yet, PEFT saves the ranks that are left in other shapes")
    if o.gradient_checkpointing and o.method == "prefix":
        raise CliError(
            "--gradient-checkpointing with --method prefix: PEFT's prefixes go through the cache it turns off"
        )
    if o.target_modules is not None and o.method in _PROMPTS:
        raise CliError(f"--target-modules with --method {o.method}: it adapts no layers")


def _check_packages(o: Options) -> None:
    from importlib.util import find_spec

    wanted = ["transformers", "peft", "accelerate"]
    if o.quant == "nf4" and _needs_bitsandbytes(o):
        wanted.append("bitsandbytes")
    if missing := [name for name in wanted if find_spec(name) is None]:
        raise CliError(f"finetune needs {', '.join(missing)}: pip install 'peft_ext[hf]'")
    if o.model == DEMO_MODEL:
        from .demo_model import check_demo_model

        check_demo_model()
    elif o.model.startswith((".", "/", "~")) and not Path(o.model).expanduser().is_dir():
        raise CliError(f"--model {o.model}: no such folder")
    elif (folder := Path(o.model).expanduser()).is_dir() and not (folder / "config.json").exists():
        raise CliError(f"--model {o.model}: no config.json in this folder, wanted a model in Hugging Face's format")


def _needs_bitsandbytes(o: Options) -> bool:
    # PEFT's DoRA dequantizes its base by its own means, which know bitsandbytes' layers.
    return o.stock or o.method == "dora"


def _checkpoints(o: Options) -> Path:
    return o.output / "checkpoints"


def _check_output(o: Options) -> Optional[Path]:
    """The checkpoint to go on from, if --resume."""
    existing = o.output
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise CliError(f"--output {o.output}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CliError(f"--output {o.output}: {existing} can't be written to")
    if not o.resume:
        if o.output.is_dir() and any(o.output.iterdir()) and not o.overwrite:
            raise CliError(f"--output {o.output}: not empty; --resume goes on with it, --overwrite starts over")
        return None
    found = [p for p in _checkpoints(o).glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    if not found:
        raise CliError(f"--resume: no checkpoint in {o.output} (they are written with --save-steps, and on Ctrl-C)")
    before = _read_run(o).get("options", {})
    for name in _SAME_ON_RESUME:
        now = getattr(o, name)
        if name in before and before[name] != now:
            raise CliError(f"--resume: --{name.replace('_', '-')} is {now}, the run in {o.output} has {before[name]}")
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]))


def _read_run(o: Options) -> dict[str, Any]:
    try:
        return json.loads((o.output / "run.json").read_text())
    except (OSError, ValueError):
        return {}


def _quiet() -> None:
    """No bars for loading a small model, no remarks about what this command chose on purpose."""
    import logging

    warnings.filterwarnings("ignore", module=r"(peft|transformers|bitsandbytes|accelerate|torch\.utils\.checkpoint)\b")
    for name in ("bitsandbytes", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


# --- the run ----------------------------------------------------------------------------------------------------------


def _say(text: str = "") -> None:
    print(text, flush=True)


@dataclass
class _Stop:
    """Set by Ctrl-C; training ends after the step in progress, with a checkpoint."""

    asked: bool = False


def greedy(model: Any, input_ids: Any, count: int) -> Any:
    """``input_ids [1, T]`` and up to ``count`` tokens more, each the likeliest of the model's own forward; no cache.

    For PEFT's prompt methods, whose ``generate`` loses the virtual tokens with transformers 5.
    """
    import torch

    stop = model.generation_config.eos_token_id
    stop = stop if isinstance(stop, list) else [stop]
    for _ in range(count):
        logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
        token = logits[:, -1:].argmax(-1)
        input_ids = torch.cat([input_ids, token], dim=1)
        if token.item() in stop:
            break
    return input_ids


class _Run:
    def __init__(self, options: Options, corpus: Corpus, checkpoint: Optional[Path]) -> None:
        import torch
        from transformers import AutoTokenizer

        from ..integrations.transformers import keep_freed_memory

        self.o, self.corpus, self.checkpoint = options, corpus, checkpoint
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            keep_freed_memory()
        self.seconds: dict[str, float] = {}
        self.folder = self._model_folder()
        config = self._config()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)
        room = getattr(config, "max_position_embeddings", None)
        if room is not None and options.block_size > room:
            raise CliError(f"--block-size {options.block_size}: the model takes at most {room} tokens")
        self.examples: Examples = tokenize(corpus, self.tokenizer, options.block_size)
        self.steps = self._steps()
        self._check_adapter(config)

    # - before the weights are loaded -

    def _model_folder(self) -> str:
        if self.o.model != DEMO_MODEL:
            path = Path(self.o.model).expanduser()
            return str(path) if path.is_dir() else self.o.model
        from .demo_model import cached_model, demo_model

        if cached_model() is None:
            _say("model: unpacking SmolLM2-135M-Instruct to bfloat16, once")
        with self._phase("unpack"):
            return str(demo_model())

    def _config(self) -> Any:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        try:
            config = AutoConfig.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CliError(
                f"--model {self.o.model}: no such folder, and not a model the hub gives ({reason})"
            ) from None
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise CliError(f"--model {self.o.model}: {config.model_type} is not a causal language model")
        return config

    def _steps(self) -> int:
        if self.o.epochs is None:
            return self.o.max_steps or DEFAULT_STEPS
        batches = math.ceil(len(self.examples.train) / self.o.batch_size)
        return max(1, math.ceil(self.o.epochs * math.ceil(batches / self.o.grad_accum)))

    def _check_adapter(self, config: Any) -> None:
        """Let PEFT object to the adapter on a model without storage."""
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        try:
            model = get_peft_model(model, self._peft_config(config))
        except (ValueError, TypeError, KeyError) as error:
            raise CliError(f"--method {self.o.method}: {str(error).strip().splitlines()[0]}") from None
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def _peft_config(self, config: Any) -> Any:
        import peft
        from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD

        o = self.o
        targets: Any = o.target_modules
        if targets is not None and targets != "all-linear":
            targets = [name.strip() for name in targets.split(",") if name.strip()]
        common = {"task_type": "CAUSAL_LM"}
        if o.method in _PROMPTS:
            kind = peft.PrefixTuningConfig if o.method == "prefix" else peft.PromptTuningConfig
            return kind(num_virtual_tokens=o.virtual_tokens, **common)
        if o.method == "ia3":
            feedforward = None
            if isinstance(targets, list):
                feedforward = [name for name in targets if name in FEEDFORWARD.get(config.model_type, [])]
            return peft.IA3Config(target_modules=targets, feedforward_modules=feedforward, **common)
        low_rank = dict(lora_alpha=o.alpha, lora_dropout=o.dropout, target_modules=targets or "all-linear", **common)
        if o.method == "adalora":
            # The budget shrinks from 1.5 times the rank to the rank between a tenth and two thirds of the run.
            schedule = {"tinit": self.steps // 10, "tfinal": self.steps // 3, "total_step": self.steps}
            return peft.AdaLoraConfig(init_r=math.ceil(1.5 * o.rank), target_r=o.rank, **schedule, **low_rank)
        variant = {"use_rslora": o.method == "rslora", "use_dora": o.method == "dora"}
        return peft.LoraConfig(r=o.rank, **variant, **low_rank)

    # - the work -

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)

    def run(self) -> int:
        o = self.o
        self._describe()
        with self._phase("load"):
            model = self._base()
        with self._phase("evaluate before"):
            before = self._perplexity(model)
            answer_before = self._ask(model)
        _say(f"before: held-out perplexity {before:.3f}")

        self._prepare_output()
        with self._phase("adapt"):
            model = self._adapt(model)
        fused = self._fused(model)
        self._write({"finished": False})
        trainer, meter, stop = self._trainer(model)
        _say(f"training: {self.steps} steps, {fused['fused']} of {fused['layers']} layers fused")
        with self._phase("train"), _on_interrupt(stop):
            trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        done = trainer.state.global_step
        speed = {
            "tokens_per_s": meter.tokens_per_s, "median_step_s": meter.median_step_s, "peak_mib": meter.peak_mib,
            "peak_cuda_mib": meter.peak_cuda_mib, "fused": fused, "losses": losses, "steps": done,
        }  # fmt: skip
        del trainer
        gc.collect()
        if stop.asked and done < self.steps:
            self._write({"finished": False, **speed})
            _say(f"stopped after step {done}; the same command with --resume goes on")
            return 130
        if meter.tokens_per_s:
            _say(f"speed: {meter.tokens_per_s:.0f} tokens/s in the steps, median step {meter.median_step_s:.2f} s")
        if meter.peak_mib:
            _say(f"memory: peak {meter.peak_mib:.0f} MiB, the whole process until the end of training")

        with self._phase("evaluate after"):
            after = self._perplexity(model)
            answer_after = self._ask(model)
        with self._phase("save"):
            save_adapter(model, o.output, overwrite=True)
        with self._phase("re-read"):
            check = self._check(model)
        prompt = self._prompt()
        self._write({
            "finished": True, **speed, "perplexity": {"before": before, "after": after}, "check": check,
            "answers": {"prompt": prompt, "before": answer_before, "after": answer_after},
        })  # fmt: skip
        _say(f"held-out perplexity: {before:.3f} before, {after:.3f} after")
        _say(f"prompt: {prompt}\n  before: {_one_line(answer_before)}\n  after:  {_one_line(answer_after)}")
        _say("time: " + ", ".join(f"{name} {spent:.1f} s" for name, spent in self.seconds.items()))
        _say(f"saved: {o.output}")
        if check["accelerated_difference"] is not None:
            _say(f"accelerated against stock path: max |logit difference| = {check['accelerated_difference']:g}")
        if not check["ok"]:
            _error(f"stock PEFT re-reads the adapter, max |logit difference| = {check['max_difference']:g}, "
                   f"more than rounding ({check['bound']:g})")  # fmt: skip
            return 1
        _say(f"checked: stock PEFT re-reads the adapter, max |logit difference| = {check['max_difference']:g}")
        return 0

    def _describe(self) -> None:
        o, train, held_out = self.o, self.examples.train, self.examples.held_out
        quant = f"NF4, double quantization, blocks of {o.blocksize}" if o.quant == "nf4" else "bfloat16"
        _say(f"model: {o.model}, {quant}{', stock PEFT and bitsandbytes' if o.stock else ''}")
        unit = f"blocks of {o.block_size} tokens" if self.corpus.kind == "text" else "examples"
        _say(f"data: {self.corpus.where}, {len(train)} {unit} to train on, {len(held_out)} held out")
        if self.examples.truncated:
            _say(f"data: {self.examples.truncated} longer than --block-size {o.block_size} were cut")
        _say(f"method: {o.method}, {self.trainable:,} trainable parameters")

    def _base(self) -> Any:
        """The frozen base: bfloat16, quantized as asked; its layers are bitsandbytes' where stock code needs them."""
        import torch
        from transformers import AutoModelForCausalLM

        from ..quantize import quantize_nf4

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16, attn_implementation="sdpa")
        model = model.to(self.device).eval().requires_grad_(False)
        model.config.use_cache = False  # in training it would only hold memory; generation asks for it
        if self.o.quant == "nf4":
            quantize_nf4(model, blocksize=self.o.blocksize)
            if _needs_bitsandbytes(self.o):
                _to_bitsandbytes(model)
        return model

    def _adapt(self, model: Any) -> Any:
        from peft import get_peft_model
        from peft.tuners.lora import LoraLayer
        from transformers import set_seed

        set_seed(self.o.seed)
        model = get_peft_model(model, self._peft_config(model.config))
        # PEFT's layer over a bitsandbytes base draws other random numbers on the way: start every base alike, so that
        # a run and its --stock twin differ in arithmetic alone.
        set_seed(self.o.seed)
        for module in model.modules():
            if isinstance(module, LoraLayer) and self.o.method in ("lora", "rslora"):
                module.reset_lora_parameters("default", True)
        if not self.o.stock:
            from ..integrations.peft import accelerate

            accelerate(model)
        return model

    def _fused(self, model: Any) -> dict[str, Any]:
        if self.o.stock:
            return {"layers": 0, "fused": 0, "reasons": []}
        from ..integrations.peft import explain

        rows = list(explain(model).rows)
        reasons = sorted({str(row.reason) for row in rows if not row.fused})
        return {"layers": len(rows), "fused": sum(bool(row.fused) for row in rows), "reasons": reasons}

    def _trainer(self, model: Any) -> tuple[Any, Any, _Stop]:
        from transformers import DataCollatorForSeq2Seq, PrinterCallback, ProgressCallback, Trainer, TrainingArguments

        from ..integrations.transformers import AdaLoraCallback, PeftExtCallback

        o = self.o
        lr = o.lr if o.lr is not None else METHODS[o.method]
        args = TrainingArguments(
            output_dir=str(_checkpoints(o)), max_steps=self.steps, per_device_train_batch_size=o.batch_size,
            gradient_accumulation_steps=o.grad_accum, learning_rate=lr, lr_scheduler_type="cosine",
            warmup_steps=o.warmup, seed=o.seed, logging_steps=1, logging_nan_inf_filter=False, report_to="none",
            save_strategy="steps" if o.save_steps else "no", save_steps=o.save_steps or 500, save_total_limit=2,
            use_cpu=self.device.type == "cpu", dataloader_num_workers=0, dataloader_pin_memory=False,
            include_num_input_tokens_seen="non_padding", prediction_loss_only=True, remove_unused_columns=False,
            gradient_checkpointing=o.gradient_checkpointing, disable_tqdm=not sys.stderr.isatty(),
        )  # fmt: skip
        collator = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=-100)
        meter, stop = PeftExtCallback(accelerate=False), _Stop()
        callbacks = [meter, _progress(meter, self.steps), _stopper(stop)]
        if o.method == "adalora":
            callbacks.insert(0, AdaLoraCallback())
        if o.gradient_checkpointing:
            model.enable_input_require_grads()
        trainer = Trainer(model, args, collator, self.examples.train, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        return trainer, meter, stop

    # - measuring -

    def _batch(self, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        from transformers import DataCollatorForSeq2Seq

        batch = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=-100)([dict(e) for e in examples])
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _logits(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits of the given tokens; those of virtual tokens, which prompt methods put first, are left out."""
        import torch

        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits[:, -batch["input_ids"].shape[1] :]

    def _perplexity(self, model: Any) -> float:
        """``exp`` of the mean loss over the held-out tokens that have a label, each weighing the same."""
        from torch.nn.functional import cross_entropy

        model.eval()
        total, count = 0.0, 0
        for start in range(0, len(self.examples.held_out), 2):  # small batches: logits [2, T, V] are the peak
            batch = self._batch(self.examples.held_out[start : start + 2])
            for logits, labels in zip(self._logits(model, batch), batch["labels"], strict=True):
                total += cross_entropy(logits[:-1].float(), labels[1:], reduction="sum", ignore_index=-100).item()
                count += int((labels[1:] != -100).sum())
        return math.exp(min(total / count, 700.0))

    def _prompt(self) -> str:
        if self.o.prompt is not None:
            return self.o.prompt
        return DEMO_PROMPT if self.corpus.where == PYTHON_DOCS else self.corpus.sample_prompt()

    def _ask(self, model: Any) -> str:
        """The greedy answer to the prompt."""
        import torch

        prompt, chat = self._prompt(), bool(getattr(self.tokenizer, "chat_template", None))
        if chat:
            turn = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        inputs = self.tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt", return_token_type_ids=False)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        model.eval()
        with torch.no_grad():
            if self.o.method in _PROMPTS:
                out = greedy(model, inputs["input_ids"], NEW_TOKENS)
            else:
                out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True,
                                     pad_token_id=self.tokenizer.pad_token_id)  # fmt: skip
        return self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def _check(self, model: Any) -> dict[str, Any]:
        """Compare the trained model on its stock path with a fresh base and the adapter as stock PEFT re-reads it."""
        import torch
        from peft import PeftModel

        batch = self._batch(self.examples.held_out[:2])
        keep = batch["attention_mask"].bool()  # what is computed at padding is nobody's business
        model.eval()
        accelerated = None
        if not self.o.stock:
            from ..integrations.peft import restore

            accelerated = self._logits(model, batch)[keep].float()
            restore(model)
        live = self._logits(model, batch)[keep].float()
        fresh = PeftModel.from_pretrained(self._base(), str(self.o.output), torch_device=str(self.device)).eval()
        read = self._logits(fresh, batch)[keep].float()
        difference = (live - read).abs().max().item()
        bound = 4 * torch.finfo(torch.bfloat16).eps * live.abs().max().item()
        return {
            "max_difference": difference, "bound": bound, "ok": difference <= bound,
            "accelerated_difference": None if accelerated is None else (accelerated - live).abs().max().item(),
        }  # fmt: skip

    # - files -

    def _prepare_output(self) -> None:
        o = self.o
        if o.overwrite:  # what such a run writes, and nothing else
            shutil.rmtree(_checkpoints(o), ignore_errors=True)
            for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "run.json"):
                (o.output / name).unlink(missing_ok=True)
        o.output.mkdir(parents=True, exist_ok=True)

    def _write(self, results: dict[str, Any]) -> None:
        """run.json, whole or not at all."""
        import torch

        from .. import __version__, _native

        options = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(self.o).items()}
        document = {
            "options": options,
            "trainable_parameters": self.trainable,
            "versions": {"peft_ext": __version__, "python": platform.python_version(), **_versions()},
            "machine": {
                "cpu": _cpu_name(), "threads": torch.get_num_threads(), "isa": _native.STATE.isa,
                "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            },
            "examples": {"train": len(self.examples.train), "held_out": len(self.examples.held_out)},
            "seconds": self.seconds,
            **results,
        }  # fmt: skip
        with atomic_file(self.o.output / "run.json") as file:
            file.write(json.dumps(document, indent=2) + "\n")


# --- helpers ----------------------------------------------------------------------------------------------------------


def _error(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _to_bitsandbytes(model: Any) -> None:
    """Hand every NF4Linear's bits to a bitsandbytes ``Linear4bit``, so that both run on the same weights."""
    import torch
    from bitsandbytes.nn import Linear4bit

    from ..nn import NF4Linear

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, NF4Linear):
                continue
            layer = Linear4bit(
                child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16,
                compress_statistics=child.nested_absmax is not None, quant_type="nf4", device="meta",
            )  # fmt: skip
            layer.weight = child.nf4.to_bitsandbytes()
            layer.weight.module, layer.quant_state, layer.bias = layer, layer.weight.quant_state, child.bias
            # In evaluation bitsandbytes repacks the weight in place for its inference, and can't train on that again.
            layer.support_avx512bf16_for_cpu = False
            setattr(parent, name, layer.train(child.training))
    model.is_loaded_in_4bit = True  # what PEFT asks before it takes its own 4-bit layers


def _progress(meter: Any, steps: int) -> Any:
    """The Trainer's bar on a terminal, else about 20 lines."""
    from transformers import ProgressCallback, TrainerCallback

    every = max(1, steps // 20)

    class Bar(ProgressCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.training_bar is not None and "loss" in (logs or {}):
                self.training_bar.set_postfix_str(_status(logs))

    class Lines(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            step = state.global_step
            if "loss" in (logs or {}) and (step == 1 or step % every == 0 or step == steps):
                _say(f"step {step:>{len(str(steps))}}/{steps}  {_status(logs)}")

    return Bar() if sys.stderr.isatty() else Lines()


def _status(logs: dict[str, Any]) -> str:
    speed = f"  {logs['tokens_per_s']:.0f} tokens/s" if "tokens_per_s" in logs else ""
    return f"loss {logs['loss']:.4f}  lr {logs.get('learning_rate', 0):.1e}{speed}"


def _stopper(stop: _Stop) -> Any:
    from transformers import TrainerCallback

    class Stopper(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if stop.asked:
                control.should_save = control.should_training_stop = True

    return Stopper()


@contextlib.contextmanager
def _on_interrupt(stop: _Stop) -> Iterator[None]:
    """The first Ctrl-C ends training after the step in progress, a second one at once."""

    def handle(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        print("\nstopping after this step, with a checkpoint; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
