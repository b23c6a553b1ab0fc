"""The options of a run, and the checks of them that need nothing else."""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ..methods import METHODS
from ..weight import BLOCKSIZES
from .data import PYTHON_DOCS
from .errors import RunError

DEMO_MODEL = "smollm2"
DEFAULT_STEPS = 60
DTYPES = ("auto", "bf16", "fp32")
QUANTIZATIONS = ("nf4", "none")
_MOST = 2**31 - 1  # of a count


def _option(default: Any, text: str, panel: Optional[str] = None, least: Optional[int] = None) -> Any:
    """Returns a field: its default, its help on the command line, the help's panel, and the least of a count."""
    return dataclasses.field(default=default, metadata={"help": text, "panel": panel, "least": least})


@dataclass(frozen=True)
class Options:
    """What a run is asked for; the defaults are the run without arguments.

    Attributes:
        model: a folder in Hugging Face's format, a name on the hub, or "smollm2", which comes as a package.
        data: a .jsonl, .json, .csv or .txt file, a folder of those, a dataset on the hub, or "python-docs".
        output: the folder for adapter, report and checkpoints.
        method: one of :data:`peft_ext.methods.METHODS`.
        rank, alpha, dropout: of the low-rank methods.
        target_modules: names with commas between them, or "all-linear"; None: the method's own.
        target_parameters: names with commas between them of parameters that LoRA or DoRA adapts beside the layers, or
            "experts": those of a mixture's experts; None: these, where the model has some and ``target_modules`` is
            None. ``dropout`` is then theirs alone, since PEFT's configuration has none beside them.
        virtual_tokens: of prefix and prompt tuning.
        quant: the frozen weights: "nf4", double-quantized in blocks of ``blocksize``, or "none"; None: "nf4", and
            "none" for the methods that train the weights themselves.
        dtype: of activations and dense weights: "bf16", "fp32", or "auto": float32 where the CPU lacks bfloat16.
        text_column, prompt_column, completion_column: instead of the detected ones; see ``peft_ext.run.data``.
        eval_fraction: the share of the data that is held out of training.
        block_size: tokens of an example, at most.
        max_steps, epochs: one of them; neither: 60 steps.
        batch_size, grad_accum: examples of a batch, batches of a step.
        lr: the largest learning rate; None: the method's. warmup: steps, or a fraction of them.
        seed: of the split, the adapter's start and the order of examples.
        save_steps: steps between checkpoints; 0: one where a signal ends the run.
        gradient_checkpointing: less memory, more time.
        threads: PyTorch's; None: as they are.
        resume: go on from the last checkpoint in ``output``. overwrite: replace the run there.
        stock: train with PEFT and bitsandbytes alone, to compare.
        prompt: what is asked before and after training; None: the data's first held-out prompt.
    """

    model: str = _option(DEMO_MODEL, 'A folder, a hub name, or "smollm2".', "Model")
    data: str = _option(PYTHON_DOCS, "A file, a folder, a hub name.", "Data")
    output: Path = _option(Path("outputs/finetune"), "For adapter, report, checkpoints.")
    method: str = _option("lora", " ".join(METHODS) + ".", "Adapter")
    rank: int = _option(16, "Of the low-rank methods.", "Adapter", 1)
    alpha: float = _option(32.0, "Scaling times rank.", "Adapter")
    dropout: float = _option(0.05, "On the low-rank path.", "Adapter")
    target_modules: Optional[str] = _option(
        None, 'Names, with commas, or "all-linear". Default: the method\'s.', "Adapter"
    )
    target_parameters: Optional[str] = _option(None, 'Names, with commas, or "experts", of a mixture.', "Adapter")
    virtual_tokens: int = _option(20, "Of prefix and prompt.", "Adapter", 1)
    quant: Optional[str] = _option(None, "Frozen weights: nf4 or none. Default: nf4 if the method can.", "Model")
    dtype: str = _option("auto", "bf16, fp32, auto: fp32 where the CPU lacks bf16.", "Model")
    blocksize: int = _option(64, "Weights that share a scale.", "Model")
    text_column: Optional[str] = _option(None, "Default: text.", "Data")
    prompt_column: Optional[str] = _option(None, "Default: prompt, instruction or question.", "Data")
    completion_column: Optional[str] = _option(None, "Default: completion, output or answer.", "Data")
    eval_fraction: float = _option(0.1, "Held out of training.", "Data")
    block_size: int = _option(256, "Tokens of a training example, at most.", "Data", 8)
    max_steps: Optional[int] = _option(None, f"Default: {DEFAULT_STEPS}.", "Training", 1)
    epochs: Optional[float] = _option(None, "Instead of --max-steps.", "Training")
    batch_size: int = _option(4, "Examples.", "Training", 1)
    grad_accum: int = _option(1, "Batches of a step.", "Training", 1)
    lr: Optional[float] = _option(None, "Default: the method's; lora 2e-4.", "Training")
    warmup: float = _option(0.05, "Steps, or a fraction of them.", "Training")
    seed: int = _option(0, "", "Training")
    save_steps: int = _option(0, "Between checkpoints; 0: only on Ctrl-C.", None, 0)
    gradient_checkpointing: bool = _option(False, "Less memory, more time.", "Training")
    threads: Optional[int] = _option(None, "Default: PyTorch's.", None, 1)
    resume: bool = _option(False, "Go on from the last checkpoint in --output.")
    overwrite: bool = _option(False, "Replace the run in --output.")
    stock: bool = _option(False, "By PEFT and bitsandbytes alone, to compare.")
    prompt: Optional[str] = _option(None, "What to ask before and after.")

    @property
    def learning_rate(self) -> float:
        """The largest one of the run."""
        return METHODS[self.method].learning_rate if self.lr is None else self.lr

    def resolved(self) -> Options:
        """Returns the options with the method's own quantization where none was given, and paths as paths."""
        quant = METHODS[self.method].quant if self.quant is None else self.quant
        lists: dict[str, Any] = {name: ",".join(value) for name in LISTS
                                 if isinstance(value := getattr(self, name), (list, tuple))}  # fmt: skip
        return dataclasses.replace(self, quant=quant, output=Path(self.output), model=str(self.model),
                                   data=str(self.data), **lists)  # fmt: skip

    def changed(self) -> list[str]:
        """Returns the names of the options that are not the defaults."""
        defaults = Options(method=self.method).resolved()
        names = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(defaults, f.name)]
        return names if self.method == Options.method else ["method", *names]


# What a resumed run must have in common with the run that wrote the checkpoint.
SAME_ON_RESUME = (
    "model", "data", "method", "rank", "alpha", "dropout", "target_modules", "target_parameters", "virtual_tokens",
    "quant", "dtype", "blocksize", "text_column", "prompt_column", "completion_column", "eval_fraction", "block_size",
    "batch_size", "grad_accum", "lr", "warmup", "seed", "stock",
)  # fmt: skip

LISTS = ("target_modules", "target_parameters")  # names, with commas between, or a list of them

# What an option may be, by its annotation; a whole number may stand for another, a list of names for a text.
_TYPES = {"int": numbers.Integral, "float": numbers.Real, "bool": bool, "str": (str, Path), "Path": (str, Path)}


def _check_types(o: Options) -> None:
    for option in dataclasses.fields(o):
        value, wanted = getattr(o, option.name), option.type.removeprefix("Optional[").rstrip("]")
        if value is None and option.type.startswith("Optional"):
            continue
        names = option.name in LISTS and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
        good = names or (isinstance(value, _TYPES[wanted]) and (wanted == "bool" or not isinstance(value, bool)))
        if not good:
            came = f"{value!r:.60}, a {type(value).__name__}"
            raise RunError(f"--{option.name.replace('_', '-')}: it is {came}, wanted {wanted}")


def check_options(o: Options) -> None:
    """Raises RunError for a value that is out of its range, or that excludes another."""
    _check_types(o)
    if o.prompt is not None and not o.prompt.strip():
        raise RunError("--prompt: it is empty")
    if o.method not in METHODS:
        raise RunError(f"--method {o.method}: there is no such method; there are: {', '.join(METHODS)}")
    method = METHODS[o.method]
    for name, choices in (("quant", QUANTIZATIONS), ("dtype", DTYPES), ("blocksize", BLOCKSIZES)):
        value: Any = getattr(o, name)
        if value is not None and value not in choices:
            *most, last = map(str, choices)
            wanted = f"one of {', '.join(map(str, choices))}" if len(choices) > 2 else f"{most[0]} or {last}"
            raise RunError(f"--{name} {value}: wanted {wanted}")
    if not 0.0 <= o.dropout < 1.0:
        raise RunError(f"--dropout {o.dropout}: wanted 0 <= p < 1")
    if not 0.0 < o.eval_fraction < 1.0:
        raise RunError(f"--eval-fraction {o.eval_fraction}: wanted more than 0 and less than 1")
    if not math.isfinite(o.alpha):
        raise RunError(f"--alpha {o.alpha}: wanted a finite number")
    if o.lr is not None and not 0 < o.lr < math.inf:
        raise RunError(f"--lr {o.lr}: wanted a positive number")
    if not 0 <= o.warmup < math.inf or (o.warmup >= 1 and o.warmup != int(o.warmup)):
        raise RunError(f"--warmup {o.warmup}: wanted a number of steps, or a fraction of them less than 1")
    if o.max_steps is not None and o.epochs is not None:
        raise RunError("--max-steps and --epochs exclude each other")
    if o.epochs is not None and not 0 < o.epochs < math.inf:
        raise RunError(f"--epochs {o.epochs}: wanted a positive number")
    if not 0 <= o.seed < 2**32:
        raise RunError(f"--seed {o.seed}: wanted 0 to {2**32 - 1}")
    for option in dataclasses.fields(o):
        least, value = option.metadata["least"], getattr(o, option.name)
        if least is not None and value is not None and not least <= value <= _MOST:
            wanted = f"at least {least}" if value < least else f"at most {_MOST}"
            raise RunError(f"--{option.name.replace('_', '-')} {value}: wanted {wanted}")
    if o.resume and o.overwrite:
        raise RunError("--resume and --overwrite exclude each other")
    if o.resume and not method.can_resume:
        raise RunError(f"--resume with --method {o.method}: PEFT saves the ranks that are left in other shapes")
    if o.gradient_checkpointing and not method.can_checkpoint:
        raise RunError(
            f"--gradient-checkpointing with --method {o.method}: PEFT's prefixes go through the cache it turns off"
        )
    if o.target_modules is not None and method.kind == "prompt":
        raise RunError(f"--target-modules with --method {o.method}: it adapts no layers")
    if o.target_parameters is not None and o.method not in ("lora", "rslora", "qlora", "dora"):
        raise RunError(f"--target-parameters with --method {o.method}: LoRA and DoRA alone adapt parameters")
    if o.method == "qlora" and o.quant == "none":
        raise RunError("--quant none with --method qlora: that is --method lora")
    if o.quant == "nf4" and not method.can_quantize:
        raise RunError(f"--quant nf4 with --method {o.method}: it trains the weights themselves, which NF4 freezes")
