"""``peft-ext explain``: prints fused layers, trainable parameters, file size and memory of an adapter on a model.

Without ``--verify`` the command builds the model on the meta device from configuration files, and reads no weight; see
:func:`peft_ext.run.plan.preview`. The command does not see the state of a live model (hooks, shards, offloading,
autocast, a merged or disabled adapter); the function :func:`peft_ext.explain` sees this state. With ``--verify`` the
command also reads the weights, and compares a fused training step with a stock one.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer

from .. import _cpu
from .._imports import MISSING
from ..methods import METHODS, make_config, method_config
from ..run.data import IGNORED, PYTHON_DOCS, read_corpus, tokenize
from ..run.errors import REFUSALS, RunError, need
from ..run.options import quant_name
from ..run.plan import Preview, preview
from ..run.progress import quiet, status
from ..sources.json_file import first_line, raised_as
from ..sources.model import (
    head_labels,
    hushed,
    load_model,
    load_tokenizer,
    model_class,
    most_tokens,
    named_base,
    pack_as_stored,
    quant_method,
    stored_quant,
    task_of,
    text_targets,
    tokenizer_folder,
)
from ..text import dtype_name, format_bytes
from ._common import (
    QUANT_HELP,
    base_of,
    check_base,
    check_range,
    chosen_quant,
    console,
    dense_config,
    held_model,
    layers_table,
    mib,
    model_config,
    new_table,
    print_json,
    quant_text,
)

_LOW_RANK = tuple(name for name, method in METHODS.items() if method.kind == "low-rank")


@dataclass(frozen=True)
class _Base:
    """A base model on the meta device, with the dtype and the quantization that ``explain`` assumes for it.

    ``given`` is the name of the base that the user gave; None where the adapter's configuration names the base.
    """

    name: str
    given: Optional[str]
    model: Any
    dtype: Any
    quant: str
    blocksize: int
    about_quant: str
    parameters: int


def explain(
    what: Annotated[str, typer.Argument(metavar="MODEL_OR_ADAPTER", help='Folder, GGUF file, hub name, or "smollm2".')],
    model: Annotated[Optional[str], typer.Option(help="Base of an adapter. Default: its own.")] = None,
    method: Annotated[Optional[list[str]], typer.Option(help="Of a model; repeatable. Default: lora.")] = None,
    rank: Annotated[Optional[int], typer.Option(help="Low-rank methods' rank. Default: 16, adalora 8.")] = None,
    quant: Annotated[Optional[str], typer.Option(help=QUANT_HELP)] = None,
    blocksize: Annotated[Optional[int], typer.Option(help="Blocksize of nf4. Default: 64.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, or keep: the model's.")] = "keep",
    batch_size: Annotated[int, typer.Option(help="Sequences of a step.")] = 4,
    sequence_length: Annotated[Optional[int], typer.Option(help="Tokens of a sequence. Default: up to 1024.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare a step with the stock model's.")] = False,
    data: Annotated[Optional[str], typer.Option(help="Data of --verify. Default: python-docs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> Optional[int]:
    """Show the fused layers, trainable parameters, file size and memory of an adapter on a model, without weights.
    Only --verify reads weights; its exit code is 1 where a number is wrong."""
    need("explain", "transformers", "peft")
    quiet()
    adapter = _adapter_folder(what)
    check_range(1, rank=rank, batch_size=batch_size, sequence_length=sequence_length)
    chosen = _check(adapter, model, method, rank, quant, blocksize, dtype)
    if data is not None and not verify:
        raise RunError("--data: wanted with --verify, which uses the data")
    if adapter is None:
        base, configs = _of_model(what, chosen, rank, quant, blocksize, dtype)
    else:
        base, configs = _of_adapter(adapter, model, quant, blocksize, dtype)
    length = _length(base.model.config, sequence_length, 128 if verify else 1024)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Preview] = {}
    refused: dict[str, str] = {}
    for name, config in configs:
        try:
            with status(name):
                quant_of = _quant(name, base)
                if quant_of != "none" and name in METHODS and not METHODS[name].can_quantize:
                    raise RunError(f"{name}: it trains the weights themselves, which {quant_name(quant_of)} freezes")
                with raised_as(RunError, f"{name}: ", *REFUSALS):
                    found[name] = preview(
                        base.model, config, dtype=base.dtype, device=device, quant=quant_of, blocksize=base.blocksize,
                        batch_size=batch_size, sequence_length=length,
                    )  # fmt: skip
                if adapter is not None:
                    size = (adapter / "adapter_model.safetensors").stat().st_size
                    found[name] = replace(found[name], adapter_bytes=size)
        except RunError as error:
            if len(configs) == 1:
                raise
            refused[name] = str(error).removeprefix(f"{name}: ")
    step = {"device": device.type, "batch_size": batch_size, "sequence_length": length, "optimizer": "adamw"}
    checks = {}
    for name, config in configs if verify else ():
        if name in found:
            checks[name] = _verified(base, config, adapter, _quant(name, base), data or PYTHON_DOCS, batch_size, length)
    if as_json:
        verifications = {name: {**vars(one), "ok": one.ok} for name, one in checks.items()}
        print_json(_document(base, step, found, refused) | ({"verified": verifications} if verify else {}))
    else:
        _show(base, step, found, refused)
        for name, one in checks.items():
            print(f"{name} verified: {one}")
    return 0 if all(one.ok for one in checks.values()) else 1


# --- the options ---------------------------------------------------------------------------------------------------


def _adapter_folder(what: str) -> Optional[Path]:
    folder = Path(os.path.expanduser(what))  # Path.expanduser would raise for an unknown user
    return folder if os.path.isfile(folder / "adapter_config.json") else None


def _check(
    adapter: Optional[Path], model: Optional[str], method: Optional[Sequence[str]], rank: Optional[int],
    quant: Optional[str], blocksize: Optional[int], dtype: str,
) -> list[str]:  # fmt: skip
    """Checks the options and returns the methods without repetition. Raises RunError for an option with a wrong
    value."""
    from ..merge import DTYPES

    chosen = list(dict.fromkeys(method or ["lora"]))
    if wrong := [name for name in chosen if name not in METHODS]:
        raise RunError(f"--method {wrong[0]}: wanted one of {', '.join(METHODS)}")
    if adapter is not None:
        for option, given in (("method", method), ("rank", rank)):
            if given:
                raise RunError(f"--{option}: {adapter} is an adapter, which has its own {option}")
    elif model is not None:
        raise RunError("--model: wanted with an adapter alone, whose base it names")
    if rank is not None and not set(chosen) & set(_LOW_RANK):
        raise RunError(f"--rank {rank}: wanted with --method {', '.join(_LOW_RANK)}")
    check_base("--quant", quant, blocksize)
    if dtype not in DTYPES:
        raise RunError(f"--dtype {dtype}: wanted one of {', '.join(DTYPES)}")
    return chosen


def _length(config: Any, asked: Optional[int], most: int) -> int:
    room = most_tokens(config)
    if asked is not None and asked > room:
        raise RunError(f"--sequence-length {asked}: the model takes at most {room} tokens")
    return asked or int(min(room, most))


# --- the base, without a weight ---------------------------------------------------------------------------------------

_Configs = list[tuple[str, Any]]


def _of_model(
    what: str, chosen: list[str], rank: Optional[int], quant: Optional[str], blocksize: Optional[int], dtype: str
) -> tuple[_Base, _Configs]:
    from ..memory.stand_ins import build_model

    folder, config = model_config(what)
    quant, blocksize, about = _quantization(folder, config, quant, blocksize, {})
    with raised_as(RunError, f"{what}: ", *REFUSALS):
        model, own = build_model(dense_config(copy.copy(config)))
    configs = []
    for method in chosen:
        path, fields = method_config(method, task_of(model))
        fields |= text_targets(model, method, fields.get("exclude_modules"))
        if rank is not None and method in _LOW_RANK:
            fields |= {"init_r": rank + rank // 2, "target_r": rank} if method == "adalora" else {"r": rank}
        configs.append((method, make_config(path, fields)))
    return _base(what, what, model, own, dtype, quant, blocksize, about, folder, config), configs


def _of_adapter(
    folder: Path, model: Optional[str], quant: Optional[str], blocksize: Optional[int], dtype: str
) -> tuple[_Base, _Configs]:
    from ..sources.adapter import checked_config, training_options
    from ..sources.expressions import check_expressions
    from ..sources.weight_files import weight_shapes

    with raised_as(RunError, "", OSError, ValueError):
        adapter = checked_config(folder)
    given = base_of(folder, model) or None
    name, revision = (given, None) if given is not None else named_base(adapter)
    if name is None:
        raise RunError(f"{folder / 'adapter_config.json'} names no base model: give --model")
    base_folder, config = model_config(name, revision)
    trained = training_options(folder)
    quant, blocksize, about = _quantization(base_folder, config, quant, blocksize, trained)
    if labels := head_labels(config, adapter, weight_shapes(folder / "adapter_model.safetensors")):
        config.num_labels = labels
    own = torch.bfloat16 if trained else config.dtype or torch.float32
    with raised_as(RunError, f"{name}: ", *REFUSALS):
        kind = model_class(config, adapter)
        dense = dense_config(copy.copy(config))
        with torch.device("meta"):
            built = kind.from_config(dense) if hasattr(kind, "from_config") else kind(dense)
    with raised_as(RunError, f"{folder / 'adapter_config.json'}: ", ValueError):
        check_expressions(adapter, dict(built.named_modules()))
    method = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    return _base(name, given, built, own, dtype, quant, blocksize, about, base_folder, config), [(method, adapter)]


def _quantization(
    folder: Path, config: Any, quant: Optional[str], blocksize: Optional[int], trained: dict[str, Any]
) -> tuple[str, int, str]:
    """Returns the quantization of the base, its block size, and both in words, with the reason of the choice."""
    stored = stored_quant(folder, config)
    chosen = chosen_quant("--quant", folder, stored, quant, trained)
    by = "as asked for"
    if quant is None:
        by = "as its files are" if stored != "none" or not trained else "as its run.json has it"
    blocksize = blocksize or int(trained.get("blocksize", 64))
    if chosen == "checkpoint":
        return chosen, blocksize, f"packed as in its files ({quant_method(config)})"
    about = quant_text(chosen, blocksize)
    return chosen, blocksize, about if chosen == "none" else f"{about}, {by}"


def _base(
    name: str, given: Optional[str], model: Any, own: Any, dtype: str, quant: str, blocksize: int, about: str,
    folder: Path, config: Any,
) -> _Base:  # fmt: skip
    from ..merge import DTYPES

    wanted = DTYPES[dtype] or own
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise RunError(f"{name}: its config has the dtype {wanted!s:.60}, wanted a floating-point dtype: give --dtype")
    if not (parameters := sum(parameter.numel() for parameter in model.parameters())):
        raise RunError(f"{name}: a {type(model).__name__} without parameters")
    model = model.to(wanted)
    if quant == "checkpoint":
        pack_as_stored(model, folder, config, wanted)
    return _Base(name, given, model, wanted, quant, blocksize, about, parameters)


def _quant(name: str, base: _Base) -> str:
    return "nf4" if name == "qlora" and base.quant == "none" else base.quant


# --- verification -----------------------------------------------------------------------------------------------------


def _verified(
    base: _Base, config: Any, adapter: Optional[Path], quant: str, data: str, batch_size: int, length: int
) -> Any:
    """Returns the :class:`peft_ext.verification.Verification` of a training step of an adapter on a model.

    Args:
        base: the model, whose weights are loaded. The loaded model is cast to the dtype of ``base``, except if the
            weights are in bitsandbytes' 4 bits.
        config: PEFT configuration of the adapter.
        adapter: folder of a saved adapter; None: a new adapter. Tensors of a new adapter that are zero get small random
            numbers, because a gradient through a zero tensor is zero.
        quant: quantization of the base.
        data: name of the training data, as the option ``--data`` of ``peft-ext finetune`` takes it.
        batch_size, length: number of examples of the batch, and most tokens of an example.

    Raises RunError where a weight of the base is missing, where the packed format ``quant`` does not fit the model,
    where the adapter does not fit the model, where the model has no tokenizer, where the data can't be read, or where
    :func:`peft_ext.verification.verify` refuses the model; SourceError where the model can't be read.
    """
    from ..model import get_peft_model, load_adapter
    from ..verification import verify

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with status("loading"), hushed():
        loaded = load_model(base.given, config, adapter or Path(base.name), {}, {})
        made = held_model(loaded, config, device, quant, base.blocksize, base.dtype)
        with raised_as(RunError, "--verify: the adapter does not fit: ", *REFUSALS):
            if adapter is not None:
                model = load_adapter(made, adapter, is_trainable=True, accelerate=False)
            else:
                torch.manual_seed(0)
                model = get_peft_model(made, config, accelerate=False)
                for parameter in model.parameters():
                    if parameter.requires_grad and not parameter.any():
                        torch.nn.init.normal_(parameter, std=0.02)
    with status("verifying"):
        batch = _batch(made, tokenizer_folder(adapter, loaded.folder), data, batch_size, length)
        try:
            return verify(model.train(), {key: value.to(device) for key, value in batch.items()})
        except REFUSALS as error:
            raise RunError(f"--verify: {first_line(error).removeprefix('verify: ')}") from error


def _batch(base: Any, folder: Path, data: str, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Returns a batch of the first training examples. The labels are removed for a model that can't generate text."""
    from transformers import DataCollatorForSeq2Seq

    with raised_as(RunError, f"--verify: {folder} has no tokenizer (", Exception, after=")"):
        tokenizer = load_tokenizer(str(folder))
    examples = tokenize(read_corpus(data), tokenizer, length).train[:batch_size]
    batch = dict(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)([dict(one) for one in examples]))
    if not base.can_generate():
        del batch["labels"]
    return batch


# --- the screen -------------------------------------------------------------------------------------------------------


def _document(base: _Base, step: dict[str, Any], found: dict[str, Preview], refused: dict[str, str]) -> dict[str, Any]:
    return {
        "model": base.name, "model_class": type(base.model).__name__, "parameters": base.parameters,
        "dtype": dtype_name(base.dtype), "quantization": base.quant,
        "blocksize": base.blocksize if base.quant == "nf4" else None, "step": step,
        "finetune": {"dtype": "float32" if _why_float32(step) else "bfloat16", "reason": _why_float32(step)},
        "methods": [
            {
                "method": name, "layers": len(one.rows), "fused": one.fused, "trainable": one.trainable,
                "adapter_bytes": one.adapter_bytes, "memory": one.memory,
                "memory_error": one.no_memory, "rows": one.rows,
            }
            for name, one in found.items()
        ],
        "refused": refused, "missing": list(MISSING),
    }  # fmt: skip


def _why_float32(step: dict[str, Any]) -> str:
    """Returns why ``peft-ext finetune`` computes in float32 on this machine; "" where it computes in bfloat16."""
    return _cpu.why_float32() if step["device"] == "cpu" else ""


def _show(base: _Base, step: dict[str, Any], found: dict[str, Preview], refused: dict[str, str]) -> None:
    from ..memory import KINDS

    screen = console()
    dtype = dtype_name(base.dtype)
    print(f"model: {base.name}, {type(base.model).__name__}, {base.parameters:,} parameters, {dtype}")
    print(f"quantization: {base.about_quant}")
    print("the tables are from configuration files: no weight was read for them")
    if why := _why_float32(step):
        print(f"finetune computes in float32 on this machine: {why}")
    numbers = ("trainable", "of all", "adapter file", "step's memory")
    summary = new_table("method", "layers fused", *numbers, right=numbers)
    for method, one in found.items():
        memory = "?" if one.memory is None else format_bytes(one.memory.total)
        fused = f"{one.fused} of {len(one.rows)}" if one.rows else "adds no layers"
        size = format_bytes(one.adapter_bytes, binary=False)
        summary.add_row(method, fused, f"{one.trainable:,}", f"{one.trainable / base.parameters:.3%}", size, memory)
    for table in (summary, layers_table({method: one.rows for method, one in found.items()})):
        if table.row_count:
            screen.print(table)
    estimated = {method: one.memory for method, one in found.items() if one.memory is not None}
    if estimated:
        tokens = f"{step['batch_size']} x {step['sequence_length']} tokens"
        print(f"memory of a training step, {tokens}, {step['optimizer']}, on {step['device']}:")
        memory = new_table("MiB at the peak", *estimated, right=tuple(estimated))
        for kind in KINDS:
            memory.add_row(kind, *(mib(one.peak[kind]) for one in estimated.values()))
        memory.add_row("total", *(mib(one.total) for one in estimated.values()))
        screen.print(memory)
    for method, reason in refused.items():
        print(f"{method}: can't adapt this model: {reason}")
    for method, one in found.items():
        if one.no_memory is not None:
            print(f"{method}: memory could not be estimated: {one.no_memory}")
    for text in MISSING:
        print(text)
