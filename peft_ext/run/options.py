"""The options of a run, and the checks of the options that need neither data nor model."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ..methods import METHODS
from ..weights.nf4 import BLOCKSIZES
from ..weights.quantizers import QUANTIZATIONS
from .data import PYTHON_DOCS
from .errors import RunError

DEMO_MODEL = "smollm2"
DEFAULT_STEPS = 60
DTYPES = ("auto", "bf16", "fp32")
SHARDS = ("ddp", "fsdp2", "hsdp")
EXPORTED_METHODS = ("lora", "rslora", "qlora", "adalora")  # methods whose adapters llama.cpp reads
_MOST = 2**31 - 1  # largest value of an option that is a count


def _option(default: Any, text: str, panel: Optional[str] = None, least: Optional[int] = None) -> Any:
    """Returns a dataclass field for an option.

    ``text`` is the option's help on the command line, ``panel`` the section of the help that lists the option, and
    ``least`` the smallest value that is accepted, for an option that is a count.
    """
    return dataclasses.field(default=default, metadata={"help": text, "panel": panel, "least": least})


@dataclass(frozen=True)
class Options:
    """The options of a run, named as on the command line. ``Options()`` has the options of ``peft-ext finetune``
    without flags.

    The value None stands for the default that the option's description names. ``target_modules`` and
    ``target_parameters`` may be lists of names. If the run adapts ``target_parameters``, ``dropout`` acts on the
    experts only, because PEFT accepts no ``lora_dropout`` together with ``target_parameters``.
    """

    model: str = _option(DEMO_MODEL, f'Folder in Hugging Face format, GGUF file, hub name, or "{DEMO_MODEL}".', "Model")
    data: str = _option(PYTHON_DOCS, f'File, folder of files, hub name, or "{PYTHON_DOCS}".', "Data")
    output: Path = _option(Path("outputs/finetune"), "Folder for adapter, report and checkpoints.")
    tokenizer: Optional[str] = _option(None, "Folder with a tokenizer. Default: the model's.", "Model")
    method: str = _option("lora", f"One of {' '.join(METHODS)}.", "Adapter")
    rank: int = _option(16, "Rank of a low-rank method.", "Adapter", 1)
    alpha: float = _option(32.0, "Scaling of a low-rank method, times the rank.", "Adapter")
    dropout: float = _option(0.05, "Dropout on the low-rank path.", "Adapter")
    target_modules: Optional[str] = _option(
        None, 'Layers: names with commas, or "all-linear". Default: the method\'s.', "Adapter"
    )
    target_parameters: Optional[str] = _option(
        None, 'Parameters for LoRA or DoRA: names with commas, or "experts" of a mixture. '
        "Default: experts, without --target-modules.", "Adapter",
    )  # fmt: skip
    virtual_tokens: int = _option(20, "Virtual tokens of prefix or prompt tuning.", "Adapter", 1)
    quant: Optional[str] = _option(
        None, f"{', '.join(QUANTIZATIONS)}. Default: checkpoint if packed, or nf4.", "Model",
    )  # fmt: skip
    dtype: str = _option("auto", "Computation: bf16, fp32, auto: fp32 where the CPU lacks bf16.", "Model")
    blocksize: int = _option(64, "Weights that share an NF4 scale.", "Model")
    text_column: Optional[str] = _option(None, "Column of texts. Default: text.", "Data")
    prompt_column: Optional[str] = _option(None, "Default: prompt, instruction or question.", "Data")
    completion_column: Optional[str] = _option(None, "Default: completion, output or answer.", "Data")
    eval_fraction: float = _option(0.1, "Share of the data held out of training.", "Data")
    block_size: int = _option(256, "Most tokens of a training example.", "Data", 8)
    max_steps: Optional[int] = _option(None, f"Training steps. Default: {DEFAULT_STEPS}.", "Training", 1)
    epochs: Optional[float] = _option(None, "Epochs, instead of --max-steps.", "Training")
    batch_size: int = _option(4, "Examples of a process's batch.", "Training", 1)
    grad_accum: int = _option(1, "Batches of a step.", "Training", 1)
    lr: Optional[float] = _option(None, "Largest learning rate. Default: the method's; lora 2e-4.", "Training")
    warmup: float = _option(0.05, "Steps, or a fraction of the steps.", "Training")
    seed: int = _option(0, "Seed of split, adapter and order.", "Training")
    save_steps: int = _option(0, "Steps between checkpoints; 0: only on Ctrl-C.", None, 0)
    gradient_checkpointing: bool = _option(False, "Less memory, more time.", "Training")
    shard: str = _option("ddp", "Engine of several processes: ddp, fsdp2 or hsdp.", "Training")
    threads: Optional[int] = _option(None, "CPU threads. Default: PyTorch's.", None, 1)
    resume: bool = _option(False, "Continue from the last checkpoint in --output.")
    overwrite: bool = _option(False, "Replace the run in --output.")
    stock: bool = _option(False, "Train with PEFT and bitsandbytes alone, to compare.")
    export: Optional[str] = _option(None, "gguf: write adapter.gguf, too, for llama.cpp and Ollama.")
    prompt: Optional[str] = _option(None, "Prompt to ask before and after training. Default: one of the data's.")

    @property
    def learning_rate(self) -> float:
        """Largest learning rate of the run, which is ``lr``, or the method's default where ``lr`` is None."""
        return METHODS[self.method].learning_rate if self.lr is None else self.lr

    def resolved(self) -> Options:
        """Returns the options with the method's default quantization where ``quant`` is None, and with converted types.

        ``output`` becomes a Path; ``model``, ``data`` and ``tokenizer`` become texts; and lists of names become texts
        with commas.
        """
        quant = METHODS[self.method].quant if self.quant is None else self.quant
        lists: dict[str, Any] = {name: ",".join(value) for name in LISTS
                                 if isinstance(value := getattr(self, name), (list, tuple))}  # fmt: skip
        words = None if self.tokenizer is None else str(self.tokenizer)
        return dataclasses.replace(self, quant=quant, output=Path(self.output), model=str(self.model),
                                   data=str(self.data), tokenizer=words, **lists)  # fmt: skip

    def changed(self) -> list[str]:
        """Returns the names of the options whose values differ from the defaults of a run with the same method.

        "method" itself is the first name if the method is not the default method.
        """
        defaults = Options(method=self.method).resolved()
        names = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(defaults, f.name)]
        return names if self.method == Options.method else ["method", *names]


# _FREE_ON_RESUME: options that may differ in a resumed run. SAME_ON_RESUME: options that a resumed run may not change.
# batch_size and grad_accum may differ if the number of examples of a step over all processes stays equal.
_FREE_ON_RESUME = ("output", "max_steps", "epochs", "batch_size", "grad_accum", "save_steps", "gradient_checkpointing",
                   "threads", "resume", "overwrite", "export", "prompt")  # fmt: skip
SAME_ON_RESUME = tuple(f.name for f in dataclasses.fields(Options) if f.name not in _FREE_ON_RESUME)

Options.__doc__ = f"{Options.__doc__}\n    Attributes:\n" + "".join(
    f"        {f.name}: {f.metadata['help']}\n" for f in dataclasses.fields(Options)
)

# Options that only the methods of one kind use, with this kind.
_OF_KIND = {"rank": "low-rank", "alpha": "low-rank", "dropout": "low-rank", "virtual_tokens": "prompt"}

LISTS = ("target_modules", "target_parameters")  # options that take names separated by commas, or a list of names

# The Python types of values that an option accepts, by the option's annotation. An option in LISTS also accepts a list
# of texts.
_TYPES = {"int": numbers.Integral, "float": numbers.Real, "bool": bool, "str": (str, Path), "Path": (str, Path)}


# For each option with a range: a function that tells whether a value is in the range, and the range in words.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "dropout": (lambda p: 0 <= p < 1, "0 <= p < 1"),
    "eval_fraction": (lambda part: 0 < part < 1, "more than 0 and less than 1"),
    "alpha": (math.isfinite, "a finite number"),
    "lr": (lambda lr: 0 < lr < math.inf, "a positive number"),
    "epochs": (lambda epochs: 0 < epochs < math.inf, "a positive number"),
    "warmup": (lambda w: 0 <= w < 1 or (w < math.inf and w == int(w) >= 1), "steps, or a fraction of them less than 1"),
    "seed": (lambda seed: 0 <= seed < 2**32, f"0 to {2**32 - 1}"),
}


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
    """Raises RunError for a value of a wrong type or out of its range, and for options that exclude each other or do
    not fit the method."""
    _check_types(o)
    if o.prompt is not None and not o.prompt.strip():
        raise RunError("--prompt: it is empty")
    if o.method not in METHODS:
        raise RunError(f"--method {o.method}: unknown method, wanted one of {', '.join(METHODS)}")
    method = METHODS[o.method]
    for name, choices in (("quant", QUANTIZATIONS), ("dtype", DTYPES), ("blocksize", BLOCKSIZES), ("shard", SHARDS)):
        if (value := getattr(o, name)) is not None and value not in choices:
            raise RunError(f"--{name} {value}: wanted one of {', '.join(map(str, choices))}")
    if o.max_steps is not None and o.epochs is not None:
        raise RunError("--max-steps and --epochs exclude each other")
    for option in dataclasses.fields(o):
        value, least = getattr(o, option.name), option.metadata["least"]
        if option.name in _RANGES:
            good, wanted = _RANGES[option.name]
        elif least is not None:
            # B023 does not matter: the lambda is called before the loop changes ``least``.
            good, wanted = (lambda v: least <= v <= _MOST), f"{least} to {_MOST}"  # noqa: B023
        else:
            continue
        if value is not None and not good(value):
            raise RunError(f"--{option.name.replace('_', '-')} {value}: wanted {wanted}")
    if o.resume and o.overwrite:
        raise RunError("--resume and --overwrite exclude each other")
    if o.resume and not method.can_resume:
        raise RunError(f"--resume with --method {o.method}: PEFT saves its tensors without pruned ranks")
    if o.gradient_checkpointing and not method.can_checkpoint:
        raise RunError(
            f"--gradient-checkpointing with --method {o.method}: prefixes need the cache, which it turns off"
        )
    if o.target_modules is not None and method.kind == "prompt":
        raise RunError(f"--target-modules with --method {o.method}: the method adapts no layers")
    if o.target_parameters is not None and o.method not in ("lora", "rslora", "qlora", "dora"):
        raise RunError(f"--target-parameters with --method {o.method}: only LoRA and DoRA adapt parameters")
    if o.export not in (None, "gguf"):
        raise RunError(f"--export {o.export}: wanted gguf")
    if o.export is not None and o.method not in EXPORTED_METHODS:
        wanted = ", ".join(EXPORTED_METHODS)
        raise RunError(f"--export gguf with --method {o.method}: llama.cpp reads low-rank adapters only, wanted one of "
                       f"{wanted}; peft-ext merge --gguf merges other methods")  # fmt: skip
    if o.method == "qlora" and o.quant == "none":
        raise RunError("--quant none with --method qlora: use --method lora instead")
    check_quant(o)
    for name, kind in _OF_KIND.items():
        if getattr(o, name) != getattr(Options, name) and method.kind != kind:
            wanted = ", ".join(other for other, entry in METHODS.items() if entry.kind == kind)
            came = f"--{name.replace('_', '-')} {getattr(o, name)} with --method {o.method}"
            raise RunError(f"{came}, which does not use it: wanted one of {wanted}")


def quant_name(quant: str) -> str:
    """Returns the name of a quantization for messages and for the report, such as "MXFP4"."""
    return "a packed checkpoint" if quant == "checkpoint" else quant.upper()


def check_quant(o: Options) -> None:
    """Raises RunError where the method, or a stock run, can't use the quantization ``o.quant``."""
    if o.quant not in (None, "nf4") and o.blocksize != Options.blocksize:
        raise RunError(f"--blocksize {o.blocksize} with --quant {o.quant}: only --quant nf4 uses it")
    if o.quant in (None, "none"):
        return
    name = quant_name(o.quant)
    if not METHODS[o.method].can_quantize:
        raise RunError(f"--quant {o.quant} with --method {o.method}: it trains the weights themselves, which {name} "
                       "freezes")  # fmt: skip
    if o.stock and o.quant != "nf4":
        raise RunError(f"--stock with --quant {o.quant}: PEFT and bitsandbytes have no layers over {name}, wanted nf4 "
                       "or none")  # fmt: skip
