"""The preparation of a run, without the weights: checks, data, tokenizer, configuration, number of steps.

Errors in options, data, tokenizer and configurations are raised by this module, before the run loads weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch

from .. import _cpu
from .._version import __version__
from ..gguf.names import ARCHITECTURES
from ..machine import versions
from ..methods import METHODS, Method, make_config, method_config
from ..sources.gguf_file import gguf_config, gguf_path, read_gguf
from ..sources.json_file import first_line, raised_as
from ..sources.model import (
    MODEL_FILES,
    SourceError,
    beside_text,
    check_index,
    check_model_config,
    find_folder,
    most_tokens,
    pack_as_stored,
    quant_method,
    stored_quant,
    text_targets,
)
from ..text import dtype_name
from ..weights.quantizers import PACKED_FORMATS
from . import checkpoints
from .data import NEW_TOKENS, Corpus, Examples, prompt_ids, read_corpus, tokenize
from .demo_model import cached_model, check_demo_model, demo_model, packed_model
from .errors import REFUSALS, RunError, Stop, need
from .launch import check_settings
from .options import DEFAULT_STEPS, DEMO_MODEL, Options, check_options, check_quant, quant_name
from .progress import log, quiet, status
from .ranks import Ranks
from .tokenizer import check_vocabulary, read_tokenizer

_SHARDED = ("lora", "rslora", "qlora", "dora", "ia3")  # methods whose adapters can be sharded


@dataclass
class Run:
    """A run that has passed the checks, and whose weights are not loaded yet.

    Attributes:
        options: the options of the run, after :func:`_resolved`.
        corpus, examples: the data of the run as records, and the tokenized data.
        checkpoint: checkpoint to resume from; None for a new run.
        device, dtype: the device on which the run computes, and the dtype of activations and dense weights.
        why_dtype: the reason for ``dtype``; "" where --dtype is auto and ``dtype`` is bfloat16.
        folder: folder, GGUF file or hub name of the model; in a sharded run that is no dry run, the folder in the hub's
            cache for a model on the hub.
        packed: in a dry run of the default model that is not unpacked yet, the keyword arguments with which
            transformers reads configuration and tokenizer from the GGUF file; else {}.
        config, tokenizer: configuration and tokenizer of the model.
        parameters, trainable: number of the base's parameters, and of the adapter's trainable parameters.
        steps: number of steps of the whole run.
        seconds: a dict from the name of each phase of the run to the seconds that the phase took.
        stop: the requests that signals such as SIGTERM have made to the run.
        ranks: the rank of this process in the run, with methods for exchanges between the processes of the run.
    """

    options: Options
    corpus: Corpus
    checkpoint: Optional[Path]
    device: torch.device
    dtype: torch.dtype
    why_dtype: str
    folder: str = ""
    packed: dict[str, str] = field(default_factory=dict)
    config: Any = None
    tokenizer: Any = None
    examples: Examples = field(default_factory=lambda: Examples([], []))
    parameters: int = 0
    trainable: int = 0
    steps: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    stop: Stop = field(default_factory=Stop)
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def step_examples(self) -> int:
        """Number of examples of a training step, over all processes."""
        return self.options.batch_size * self.options.grad_accum * self.ranks.world

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards the base, so that the forward of each process needs all processes."""
        return self.options.shard != "ddp"

    @property
    def shards(self) -> Optional[int]:
        """Number of processes that share one copy of the base; None where each process holds the whole base."""
        if not self.sharded:
            return None
        return self.ranks.world // self.ranks.nodes if self.options.shard == "hsdp" else self.ranks.world

    @property
    def is_from_hub(self) -> bool:
        """Whether the model comes from the hub, because it is neither the default model nor an existing path."""
        return self.options.model != DEMO_MODEL and not Path(self.options.model).expanduser().exists()

    @property
    def weights(self) -> str:
        """The format of the frozen weights, in words."""
        o = self.options
        if o.quant == "nf4" and getattr(self.config, "quantization_config", None) is not None:
            return "NF4 as in the checkpoint (bitsandbytes)"
        if o.quant == "nf4":
            return f"NF4, double quantization, blocks of {o.blocksize}"
        if o.quant == "checkpoint":
            return f"packed as in the checkpoint ({quant_method(self.config)})"
        return dtype_name(self.dtype) if o.quant == "none" else quant_name(o.quant)

    @property
    def method(self) -> Method:
        return METHODS[self.options.method]

    @property
    def is_prompt_method(self) -> bool:
        return self.method.kind == "prompt"

    @property
    def room_of_prompts(self) -> float:
        """Most tokens of a prompt with its answer: the model's limit, minus the virtual tokens of a prompt method;
        infinity where the configuration has no limit."""
        return most_tokens(self.config) - (self.options.virtual_tokens if self.is_prompt_method else 0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds that the block takes to the seconds of the phase ``name``."""
        self.ranks.at(f"the begin of the phase {name!r}")
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 2)


def prepare(
    options: Options, stop: Optional[Stop] = None, ranks: Optional[Ranks] = None, *, reads_weights: bool = True
) -> Run:
    """Makes the checks that are possible before the weights are loaded, and returns the run.

    Raises RunError where a check fails. Sets the number of threads in this process if the options give it, and turns
    off transformers' progress bars and the warnings of transformers, PEFT, accelerate and bitsandbytes. Without
    ``reads_weights`` the default model is not unpacked, and no model is downloaded for a sharded run.
    """
    ranks = ranks or Ranks()
    check_options(options)
    if note := check_settings(torch.cuda.is_available()):
        log.info(note)
    options = _resolved(options)
    _check_packages(options)
    if ranks.world > 1 and options.method == "diff-pruning":
        raise RunError("--method diff-pruning in several processes: DDP can't exchange parameters that a run prunes")
    _check_shard(options, ranks)
    checkpoint = checkpoints.check_output(options, ranks)
    corpus = read_corpus(
        options.data, text_column=options.text_column, prompt_column=options.prompt_column,
        completion_column=options.completion_column, eval_fraction=options.eval_fraction, seed=options.seed,
    )  # fmt: skip
    if checkpoint is not None:
        checkpoints.check_same_data(options, corpus.digest)
    quiet()
    from ..integrations.trainer import keep_freed_memory

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda", ranks.gpu or 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        keep_freed_memory()
    run = Run(options, corpus, checkpoint, device, *compute_dtype(options, device), stop=stop or Stop(), ranks=ranks)
    run.folder = ranks.first_of_node(lambda: _model_folder(run)) if reads_weights else _packed_folder(run)
    run.config = _read_config(run)
    _check_export(run)
    run.tokenizer = read_tokenizer(options, run.folder, **run.packed)
    if options.block_size > run.room_of_prompts:
        virtual = options.virtual_tokens if run.is_prompt_method else 0
        more = f", and {virtual} virtual tokens (--virtual-tokens)" if virtual else ""
        most = most_tokens(run.config)
        raise RunError(f"--block-size {options.block_size}{more}: the model takes at most {most} tokens")
    with status("tokenizing"):
        run.examples = tokenize(corpus, run.tokenizer, options.block_size)
    check_vocabulary(options, run.config, run.tokenizer, run.examples)
    if checkpoint is not None:
        checkpoints.check_same_tokens(options, run.examples)
    if options.prompt is not None:
        _check_prompt(run)
    run.steps = options.max_steps or DEFAULT_STEPS
    if options.epochs is not None:
        run.steps = max(1, math.ceil(options.epochs * len(run.examples.train) / run.step_examples))
    if checkpoint is not None and (done := checkpoints.step_of(checkpoint)) > run.steps:
        raise RunError(f"--resume: {checkpoint.name} has {done} steps, more than the {run.steps} steps of this run; "
                       f"wanted at least {done} steps, or the folder of that checkpoint removed")  # fmt: skip
    if 1 <= options.warmup >= run.steps:
        log.warning(f"--warmup {options.warmup:g}: the run has {run.steps} steps, so that the learning rate stays "
                    f"below {options.learning_rate:g}")  # fmt: skip
    if options.method == "diff-pruning" and pruning_step(run) > run.steps:
        raise RunError(f"--method diff-pruning with one step and --warmup {options.warmup:g}: the learning rate of the "
                       "first step is 0, so pruning would keep nothing; wanted more steps, or --warmup 0")  # fmt: skip
    run.parameters, run.trainable = _count_parameters(run)
    return run


# --- packages and files -----------------------------------------------------------------------------------------------


def needs_bitsandbytes(o: Options) -> bool:
    """Returns whether NF4 layers must be bitsandbytes' ``Linear4bit``: in an unsharded run that is stock or of DoRA.

    PEFT's DoRA can dequantize no NF4 layer except bitsandbytes' ``Linear4bit``.
    """
    return o.quant == "nf4" and (o.stock or o.method == "dora") and o.shard == "ddp"


def _resolved(options: Options) -> Options:
    """Returns the resolved options; where the model's files are packed, ``quant`` is "checkpoint" by default.

    Raises RunError where ``quant`` or ``shard`` does not fit the model's files. A model without a readable
    configuration is refused later, by :func:`_read_config`.
    """
    from transformers import PretrainedConfig

    asked, o = options.quant, options.resolved()
    if o.model == DEMO_MODEL:
        stored = "none"
    elif (file := gguf_path(o.model)) is not None:
        with raised_as(RunError, "--model ", SourceError):
            stored, about = stored_quant(file, None), PretrainedConfig(name_or_path=str(file))
    else:
        try:
            about = PretrainedConfig.from_dict(PretrainedConfig.get_config_dict(str(Path(o.model).expanduser()))[0])
            with raised_as(RunError, "--model ", SourceError):
                stored = stored_quant(o.model, about)
        except RunError:
            raise
        except Exception:  # an untrusted file can make transformers raise any error
            return o
    if stored == "checkpoint":
        if asked not in (None, "checkpoint"):
            raise RunError(f"--quant {asked}: the files of --model {o.model} are packed by {quant_method(about)}, "
                           "wanted no --quant, or checkpoint")  # fmt: skip
        o = dataclasses.replace(o, quant="checkpoint")
        check_quant(o)
    elif stored == "nf4" and asked not in (None, "nf4"):
        raise RunError(f"--quant {asked}: the files of --model {o.model} are NF4, wanted no --quant, or nf4")
    elif stored == "nf4" and o.shard != "ddp":
        raise RunError(f"--shard {o.shard}: the files of --model {o.model} are bitsandbytes' NF4, wanted dense files, "
                       "which a run quantizes as it loads them; --shard ddp takes all")  # fmt: skip
    elif asked == "checkpoint":
        raise RunError(f"--quant checkpoint: the files of --model {o.model} are "
                       f"{'dense' if stored == 'none' else 'NF4'}, wanted a packed checkpoint")  # fmt: skip
    return o


def _check_packages(o: Options) -> None:
    wanted = ["transformers", "peft", "accelerate", *["bitsandbytes"] * needs_bitsandbytes(o)]
    need("finetune", *wanted)
    folder = Path(o.model).expanduser() if o.model != DEMO_MODEL else None
    if o.tokenizer is not None and not Path(o.tokenizer).expanduser().is_dir():
        raise RunError(f"--tokenizer {o.tokenizer}: no such folder")
    if folder is None:
        check_demo_model()
    elif gguf_path(o.model) is not None:
        need("finetune", "gguf")
        if o.shard != "ddp":
            raise RunError(f"--shard {o.shard} with a GGUF file: only folders of safetensors are sharded, wanted ddp")
    elif o.model.endswith(".gguf") and not folder.exists():
        raise RunError(f"--model {o.model}: no such file")
    elif o.model.startswith((".", "/", "~")) and not folder.is_dir():
        raise RunError(f"--model {o.model}: no such folder")
    elif folder.is_dir():
        if not (folder / "config.json").exists():
            raise RunError(f"--model {o.model}: no config.json in this folder, wanted a model in Hugging Face's format")
        _check_safetensors(o, folder)


def _check_safetensors(o: Options, folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise RunError(f"--model {o.model}: no .safetensors file in this folder, wanted the model's weights")


def _check_shard(o: Options, ranks: Ranks) -> None:
    """Raises RunError where the options or the number of processes do not fit --shard."""
    if o.shard == "ddp":
        return
    about = f"--shard {o.shard}"
    if o.method not in _SHARDED:
        raise RunError(f"{about} with --method {o.method}: wanted one of {', '.join(_SHARDED)}; --shard ddp takes all")
    if o.stock and o.quant == "nf4":
        raise RunError(f"{about} with --stock and NF4: accelerate does not shard bitsandbytes' weights of 4 bits")
    if o.shard == "hsdp" and not ranks.in_equal_blocks:
        raise RunError(f"{about}: {ranks.world} processes on {ranks.nodes} machines, wanted several machines with as "
                       "many processes each, at least 2, in the order of the ranks")  # fmt: skip


def facts_of(run: Run) -> dict[str, Any]:
    """Returns a dict, from descriptions to values, of what must be equal in all processes of a run: the options but
    output, threads, model, tokenizer and data; the versions of Python and of packages; the data; the model's files; the
    dtype; and the checkpoint.

    A file of weights is described by the file's size and the SHA-256 of the file's header, which has the tensors' names
    and shapes.
    """
    facts: dict[str, Any] = {"Python": platform.python_version(), "peft_ext": __version__}
    facts |= versions()
    for option in dataclasses.fields(run.options):
        # The number of threads, and the paths of equal files, may differ between machines.
        if option.name not in ("output", "threads", "model", "tokenizer", "data"):
            facts[f"--{option.name.replace('_', '-')}"] = getattr(run.options, option.name)
    facts["the data of --data, as SHA-256 of the records,"] = run.corpus.digest[:16]
    facts["the data of --data, as SHA-256 of the tokens that the tokenizer of --model makes,"] = run.examples.digest
    folder = Path(run.folder)
    files = sorted(folder.glob("*.safetensors")) + [folder / "config.json"] if folder.is_dir() else [folder]
    for file in filter(Path.is_file, files):
        length = size = file.stat().st_size
        with file.open("rb") as opened, raised_as(RunError, "--model ", SourceError):
            if file == folder:
                length = read_gguf(file, SourceError).data_start
            elif file.suffix != ".json":
                length = 8 + int.from_bytes(opened.read(8), "little")
            opened.seek(0)
            digest = hashlib.sha256(opened.read(min(length, size))).hexdigest()[:16]
        facts[f"{file.name} of --model, as bytes and SHA-256 of the header,"] = f"{size} and {digest}"
    facts["the computation's dtype"] = dtype_name(run.dtype)
    facts["the checkpoint to resume from"] = None if run.checkpoint is None else run.checkpoint.name
    return facts


def compute_dtype(o: Options, device: torch.device) -> tuple[torch.dtype, str]:
    """Returns the dtype of activations and dense weights, and the reason for this dtype; the reason is "" where --dtype
    is auto and the dtype is bfloat16."""
    if o.dtype != "auto":
        return (torch.float32 if o.dtype == "fp32" else torch.bfloat16), "as asked for"
    why = _cpu.why_float32() if device.type == "cpu" else ""
    return (torch.float32 if why else torch.bfloat16), why


def _model_folder(run: Run, downloads: bool = True) -> str:
    """Returns the model's folder or GGUF file, or the model's name on the hub.

    For a name on the hub, a sharded run gets the folder in the hub's cache, because peft_ext itself, and not
    transformers, reads the files of a sharded run. Without ``downloads``, ``_model_folder`` returns the name on the
    hub.
    """
    if run.is_from_hub:
        if not (run.sharded and downloads):
            return run.options.model
        with raised_as(RunError, "", SourceError), status("downloading the model"):
            folder = find_folder("--model", run.options.model, MODEL_FILES)
        _check_safetensors(run.options, folder)
        return str(folder)
    if run.options.model != DEMO_MODEL:
        return str(Path(run.options.model).expanduser().resolve())
    if cached_model() is None:
        log.info("model: unpacking SmolLM2-135M-Instruct to bfloat16, once")
    with run.phase("unpack"):
        return str(demo_model())


def _packed_folder(run: Run) -> str:
    """Returns the folder from which a dry run reads the model's configuration.

    If the model is the default model and is not unpacked, ``_packed_folder`` returns the folder of the default model's
    GGUF file, and sets ``run.packed``.
    """
    if run.options.model != DEMO_MODEL or cached_model() is not None or (gguf := packed_model()) is None:
        return _model_folder(run, downloads=False)
    run.packed = {"gguf_file": gguf.name}
    return str(gguf.parent)


def _read_config(run: Run) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    model = run.options.model
    if (file := gguf_path(run.folder)) is not None:
        config = gguf_config(file, RunError)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise RunError(f"--model {model}: {config.model_type} is not a causal language model")
        return config
    with raised_as(RunError, f"--model {model}: ", OSError, ValueError):
        for name, check in (("config.json", check_model_config), ("model.safetensors.index.json", check_index)):
            if (file := Path(run.folder, name)).is_file():
                check(file)
    about = "config.json" if Path(run.folder).is_dir() else "no such folder, and not a model the hub gives"
    with raised_as(RunError, f"--model {model}: {about} (", *REFUSALS, after=")"):
        config = AutoConfig.from_pretrained(run.folder, trust_remote_code=False, **run.packed)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RunError(f"--model {model}: {config.model_type} is not a causal language model")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise RunError(f"--model {model}: {config.model_type} is an encoder, each of whose positions sees those after "
                       "it (is_decoder is false in its config.json), wanted a causal language model")  # fmt: skip
    return config


def _check_export(run: Run) -> None:
    """Raises RunError where the run has ``--export gguf``, and the package gguf is missing or llama.cpp has no adapter
    files for the model's type."""
    if run.options.export is None:
        return
    need("finetune", "gguf")
    if run.config.model_type not in ARCHITECTURES:
        raise RunError(f"--export gguf: the model is a {run.config.model_type}, wanted one of "
                       f"{', '.join(ARCHITECTURES)}")  # fmt: skip


def _check_prompt(run: Run) -> None:
    messages = [{"role": "user", "content": run.options.prompt}]
    with raised_as(RunError, "--prompt: the tokenizer's chat template (", Exception, after=")"):
        count = len(prompt_ids(run.tokenizer, messages, run.corpus.kind))
    if count + NEW_TOKENS > run.room_of_prompts:
        raise RunError(f"--prompt: it has {count} tokens, which with {NEW_TOKENS} tokens of an answer is over the "
                       f"model's {run.room_of_prompts}")  # fmt: skip


# --- steps and parameters ---------------------------------------------------------------------------------------------


def pruning_step(run: Run) -> int:
    """Returns the step after which Diff Pruning prunes: half of the steps, but at least one step that trains.

    With a warmup the learning rate of the first step is 0, so the adapter is still 0 after the first step.
    """
    return max(2 if run.options.warmup else 1, round(run.steps / 2))


def _count_parameters(run: Run) -> tuple[int, int]:
    """Returns the number of parameters of the base, and the number of trainable parameters of the adapter.

    Raises RunError where transformers refuses the model's configuration, PEFT refuses the adapter's configuration, the
    packed format ``quant`` does not fit a layer, or the model's packed files are not supported.
    """
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from ..model import freeze_ranknum, register_layers

    o = run.options
    with raised_as(RunError, f"--model {o.model}: config.json (", *REFUSALS, after=")"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(run.config, dtype=run.dtype)
    parameters = sum(p.numel() for p in model.parameters())
    if o.quant in PACKED_FORMATS:
        from ..quantize import check_packable

        try:
            check_packable(model, o.quant)
        except (ValueError, TypeError) as error:
            why = first_line(error).removeprefix("quantize_packed: ").partition(" (")[0]
            raise RunError(f"--quant {o.quant}: {why}") from error
    with raised_as(RunError, f"--method {o.method}: ", ValueError, TypeError, KeyError, RuntimeError):
        config = adapter_config(run, model)
        register_layers(config, model)
        model = get_peft_model(model, config)
        if not o.stock:
            freeze_ranknum(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if o.quant == "checkpoint" and Path(run.folder).exists():
        meta_base(run)  # meta_base raises RunError for files that are not supported
    return parameters, trainable


def meta_base(run: Run) -> Any:
    """Returns the base on the meta device, with packed layers where the model's files are packed.

    Raises RunError if the files are packed (hold quantized weights) and are not supported or not on this machine.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(run.config, dtype=torch.bfloat16)
    if run.options.quant == "checkpoint":
        if not (folder := Path(run.folder)).exists():
            raise RunError(f"--model {run.options.model}: its weights are packed as the headers of its files "
                           "say, wanted a folder with the files")  # fmt: skip
        with raised_as(RunError, f"--model {run.options.model}: ", SourceError):
            pack_as_stored(model, folder, run.config, torch.bfloat16)
    return model


def _experts_fields(o: Options, model: Any, targets: Any) -> dict[str, Any]:
    """Returns the fields of the PEFT configuration for the experts of a mixture; {} without experts to adapt."""
    from ..nn.experts import adapter_fields

    if o.target_parameters is None and targets is not None:
        return {}
    fields = adapter_fields(model, o.method)
    if targets is not None:
        fields.pop("target_modules", None)
    if o.target_parameters not in (None, "experts"):
        names = [name.strip() for name in str(o.target_parameters).split(",") if name.strip()]
        fields |= {"target_parameters": names, "lora_dropout": 0.0}
    elif o.target_parameters == "experts" and "target_parameters" not in fields:
        raise RunError(f"--target-parameters experts: {type(model).__name__} has no experts that peft_ext knows")
    if "target_parameters" in fields and o.stock and o.quant == "nf4":
        raise RunError("--stock with NF4 and experts: PEFT can't add to 4-bit experts, give --quant none")
    if "target_parameters" in fields and o.stock and o.method == "dora":
        raise RunError("--stock with DoRA and experts: PEFT has no DoRA for experts, give --target-modules")
    if "target_parameters" in fields and o.stock and o.dropout:
        raise RunError(f"--stock with experts and --dropout {o.dropout:g}: PEFT has no dropout for experts, which a "
                       "run without --stock has, give --dropout 0")  # fmt: skip
    return fields


def adapter_config(run: Run, model: Any) -> Any:
    """Returns the PEFT configuration of the run's options for ``model``, which may be on the meta device."""
    o = run.options
    config_class, fields = method_config(o.method, "CAUSAL_LM")
    targets: Any = o.target_modules
    if targets is not None and targets != "all-linear":
        targets = [name.strip() for name in targets.split(",") if name.strip()]
    if targets is not None:
        fields["target_modules"] = targets
    if run.method.kind == "low-rank":
        fields |= {"lora_alpha": o.alpha, "lora_dropout": o.dropout}
    beside: tuple[str, ...] = ()
    if targets in (None, "all-linear"):
        fields |= text_targets(model, o.method)
        beside = tuple(f"{name}." for name in beside_text(model))
    fields |= _experts_fields(o, model, targets)
    match o.method:
        case "adalora":
            # Between a tenth and two thirds of the run, the layers' mean rank shrinks from 1.5 times --rank to --rank.
            fields |= {"init_r": math.ceil(1.5 * o.rank), "target_r": o.rank, "tinit": run.steps // 10,
                       "tfinal": run.steps // 3, "total_step": run.steps}  # fmt: skip
        case "lora" | "rslora" | "qlora" | "dora":
            fields["r"] = o.rank
        case "ia3" if targets is None:
            from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

            if run.config.model_type not in TARGETS:
                raise RunError(f"--method ia3: PEFT knows no layers of a {run.config.model_type} for it, name them "
                               "with --target-modules")  # fmt: skip
        case "ia3" if isinstance(targets, list):
            from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD

            there = FEEDFORWARD.get(run.config.model_type, [])
            fields["feedforward_modules"] = [name for name in targets if name in there]
        case "prefix" | "prompt":
            fields["num_virtual_tokens"] = o.virtual_tokens
        case "bitfit" if not any(name.rpartition(".")[2] == "bias" and not name.startswith(beside)
                                 for name, _ in model.named_parameters()):  # fmt: skip
            fields["add_bias"] = targets or "all-linear"  # a model such as Llama has no bias to train
        case "partial" if targets is not None:
            del fields["num_last_layers"]
    return make_config(config_class, fields)
