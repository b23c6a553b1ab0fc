"""``peft-ext explain``: what of a model would run fused, how many parameters train, what that takes on disk and in use.

From configuration files alone. The model is built on the meta device and adapted; then each parameter becomes one
element that is seen as the whole: to the checks of the fused layers, which ask for shapes, dtypes and types, it is a
model in memory, and no weight is read or drawn. What is not known before a model is live (hooks, shards, offloading,
autocast, a merged or disabled adapter) is not seen here; :func:`peft_ext.explain` on that model tells it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from .._imports import MISSING
from . import CliError
from ._common import (
    console,
    dense_config,
    first_line,
    memory_document,
    mendable,
    model_config,
    need,
    print_json,
    quiet,
    status,
)

__all__ = ["explain", "methods"]

_LOW_RANK = ("lora", "rslora", "dora", "adalora")
_DISK = ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"))
_MEMORY = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def methods() -> tuple[str, ...]:
    """What ``--method`` takes."""
    from ..memory import METHODS

    return tuple(method for method in METHODS if method != "full")


@dataclass(frozen=True)
class _Base:
    """The base model on the meta device, and how it is to be held."""

    name: str
    model: Any
    dtype: Any
    quant: str
    blocksize: int
    about_quant: str


@dataclass(frozen=True)
class _Found:
    """What came out for one method or adapter. ``memory`` is None where ``no_memory`` says why."""

    method: str
    rows: list[Any]
    trainable: int
    file_bytes: int
    memory: Any
    no_memory: Optional[str]

    @property
    def fused(self) -> int:
        return sum(row.fused for row in self.rows)


def explain(
    what: str,
    *,
    model: Optional[str],
    method: Optional[Sequence[str]],
    rank: Optional[int],
    quant: Optional[str],
    blocksize: Optional[int],
    dtype: str,
    batch_size: int,
    sequence_length: Optional[int],
    as_json: bool,
) -> None:
    """Print it for a model or for an adapter's folder. Raises CliError for what the user can mend."""
    need("explain", "transformers", "peft")
    quiet()
    import torch

    adapter = _adapter_folder(what)
    chosen = _check(adapter, model, method, rank, quant, blocksize, dtype, batch_size, sequence_length)
    base, configs = (_of_model if adapter is None else _of_adapter)(what, model, chosen, rank, quant, blocksize, dtype)
    length = _length(base.model.config, sequence_length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, refused = [], {}
    for name, config in configs:
        try:
            with status(name):
                found.append(_explained(name, base, config, adapter, batch_size, length, device))
        except CliError as error:
            if len(configs) == 1:
                raise
            refused[name] = str(error).removeprefix(f"{name}: ")
    step = {"device": device.type, "batch_size": batch_size, "sequence_length": length, "optimizer": "adamw"}
    if as_json:
        print_json(_document(base, step, found, refused))
    else:
        _show(base, step, found, refused)


# --- what is asked for ------------------------------------------------------------------------------------------------


def _adapter_folder(what: str) -> Optional[Path]:
    try:
        folder = Path(what).expanduser()
        return folder if (folder / "adapter_config.json").is_file() else None
    except (OSError, RuntimeError):  # a name too long, the ~ of nobody: not of a model either
        return None


def _check(
    adapter: Optional[Path], model: Optional[str], method: Optional[Sequence[str]], rank: Optional[int],
    quant: Optional[str], blocksize: Optional[int], dtype: str, batch_size: int, sequence_length: Optional[int],
) -> list[str]:  # fmt: skip
    """The methods, each once. Raises CliError."""
    from ..merge import DTYPES
    from ..weight import BLOCKSIZES

    chosen = list(dict.fromkeys(method or ["lora"]))
    if wrong := [name for name in chosen if name not in methods()]:
        raise CliError(f"--method {wrong[0]}: wanted one of {', '.join(methods())}")
    if adapter is not None:
        for option, given in (("method", method), ("rank", rank)):
            if given:
                raise CliError(f"--{option}: {adapter} is an adapter, which has its own")
    elif model is not None:
        raise CliError("--model: the base of an adapter; what is explained is a model already")
    if rank is not None and (rank < 1 or not set(chosen) & set(_LOW_RANK)):
        wanted = "at least 1" if rank < 1 else f"with --method {', '.join(_LOW_RANK)}"
        raise CliError(f"--rank {rank}: wanted {wanted}")
    if quant not in (None, "nf4", "none"):
        raise CliError(f"--quant {quant}: wanted nf4 or none")
    if blocksize is not None and blocksize not in BLOCKSIZES:
        raise CliError(f"--blocksize {blocksize}: wanted one of {', '.join(map(str, BLOCKSIZES))}")
    if dtype not in DTYPES:
        raise CliError(f"--dtype {dtype}: wanted one of {', '.join(DTYPES)}")
    for option, size in (("batch-size", batch_size), ("sequence-length", sequence_length)):
        if size is not None and size < 1:
            raise CliError(f"--{option} {size}: wanted at least 1")
    return chosen


def _length(config: Any, asked: Optional[int]) -> int:
    room = getattr(config, "max_position_embeddings", None)
    if asked is not None and room and asked > room:
        raise CliError(f"--sequence-length {asked}: the model takes at most {room} tokens")
    return asked or min(room or 1024, 1024)


# --- the base, without a weight ---------------------------------------------------------------------------------------

_Configs = list[tuple[str, Any]]


def _of_model(
    what: str, _model: Optional[str], chosen: list[str], rank: Optional[int], quant: Optional[str],
    blocksize: Optional[int], dtype: str,
) -> tuple[_Base, _Configs]:  # fmt: skip
    from ..memory.configs import make_config, method_config
    from ..memory.stand_ins import build_model
    from ..sources.model import task_of

    folder, config = model_config(what)
    quant, blocksize, about = _quantization(folder, config, quant, blocksize, {})
    try:
        model, own = build_model(config)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError, RuntimeError) as error:
        raise CliError(f"{what}: {first_line(error)}") from None
    configs = []
    for method in chosen:
        path, fields = method_config(method, task_of(model))
        if rank is not None and method in _LOW_RANK:
            fields |= {"init_r": rank + rank // 2, "target_r": rank} if method == "adalora" else {"r": rank}
        configs.append((method, make_config(path, fields)))
    return _base(what, model, own, dtype, quant, blocksize, about), configs


def _of_adapter(
    what: str, model: Optional[str], _chosen: list[str], _rank: Optional[int], quant: Optional[str],
    blocksize: Optional[int], dtype: str,
) -> tuple[_Base, _Configs]:  # fmt: skip
    import torch

    from ..sources.adapter import checked_config, training_options
    from ..sources.expressions import check_expressions
    from ..sources.model import head_labels, model_class
    from ..sources.weight_files import weight_shapes
    from .merge import _model

    folder = Path(what).expanduser()
    try:
        adapter = checked_config(folder)
    except (OSError, ValueError) as error:
        raise CliError(first_line(error)) from None
    name = _model(model, folder) or adapter.base_model_name_or_path
    if not name:
        raise CliError(f"{folder / 'adapter_config.json'} names no base model: --model")
    base_folder, config = model_config(name)
    with mendable():
        trained = training_options(folder)
    quant, blocksize, about = _quantization(base_folder, config, quant, blocksize, trained)
    if labels := head_labels(config, adapter, weight_shapes(folder / "adapter_model.safetensors")):
        config.num_labels = labels
    own = torch.bfloat16 if trained else config.dtype or torch.float32
    try:
        kind = model_class(config, adapter)
        with torch.device("meta"):
            built = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError, RuntimeError) as error:
        raise CliError(f"{name}: {first_line(error)}") from None
    try:
        check_expressions(adapter, built)
    except ValueError as error:
        raise CliError(f"{folder / 'adapter_config.json'}: {first_line(error)}") from None
    method = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    return _base(name, built, own, dtype, quant, blocksize, about), [(method, adapter)]


def _quantization(
    folder: Path, config: Any, quant: Optional[str], blocksize: Optional[int], trained: dict[str, Any]
) -> tuple[str, int, str]:
    """How the base is held: quantization, block size, and what decided it."""
    from ..sources.model import is_nf4

    with mendable():
        held = is_nf4(folder, config)
    dense_config(config)
    if held and quant == "none":
        raise CliError(f"--quant none: {folder} is itself quantized to NF4")
    by = "as asked for"
    if quant is None:
        by = "as its files are" if held or not trained else "as its run.json has it"
        quant = "nf4" if held else trained.get("quant", "none")
    blocksize = blocksize or int(trained.get("blocksize", 64))
    return quant, blocksize, f"{quant}, double quantization, blocks of {blocksize}, {by}" if quant == "nf4" else quant


def _base(name: str, model: Any, own: Any, dtype: str, quant: str, blocksize: int, about: str) -> _Base:
    import torch

    from ..merge import DTYPES

    wanted = DTYPES[dtype] or own
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise CliError(f"{name}: its config has the dtype {wanted!s:.60}, wanted a float: --dtype")
    if not any(parameter.numel() for parameter in model.parameters()):
        raise CliError(f"{name}: a {type(model).__name__} without parameters")
    return _Base(name, model.to(wanted), wanted, quant, blocksize, about)


# --- one method -------------------------------------------------------------------------------------------------------


def _explained(
    name: str, base: _Base, config: Any, adapter: Optional[Path], batch_size: int, length: int, device: Any
) -> _Found:
    import torch

    from ..integrations.peft import accelerate
    from ..integrations.peft import explain as explain_model
    from ..memory import adapt_on_meta, estimate_memory
    from ..memory.stand_ins import quantize_stand_ins, replace_tensors, stand_in

    try:
        model = adapt_on_meta(copy.deepcopy(base.model), config, None, None, False).train()
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise CliError(f"{name}: {first_line(error)}") from None
    if adapter is None:
        size = _file_bytes(_saved(model))
    else:
        size = (adapter / "adapter_model.safetensors").stat().st_size
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    replace_tensors(model, stand_in)
    if base.quant == "nf4":
        quantize_stand_ins(model, "nf4", base.blocksize, True, True)
    if device.type != "cpu":
        replace_tensors(model, lambda t: torch.empty((), dtype=t.dtype, device=device).expand(t.shape))
    rows = explain_model(accelerate(model)).rows
    memory = why = None
    try:
        memory = estimate_memory(
            base.model, config, batch_size=batch_size, sequence_length=length, dtype=base.dtype, device=device,
            quantization="nf4" if base.quant == "nf4" else None, blocksize=base.blocksize,
        )  # fmt: skip
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:  # a forward that can't be traced
        why = first_line(error).removeprefix("estimate_memory: ")
    return _Found(name, rows, trainable, size, memory, why)


def _saved(model: Any) -> dict[str, Any]:
    """What PEFT would save, on the meta device; of prompt methods, whose tokens it reads, the one tensor that it is."""
    from peft.utils import get_peft_model_state_dict

    if model.active_peft_config.is_prompt_learning:
        return {"prompt_embeddings": model.prompt_encoder[model.active_adapter].embedding.weight}
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _file_bytes(state: dict[str, Any]) -> int:
    """The size of the safetensors file of ``state``: 8 bytes, a header of JSON padded to 8, the data.

    The library's header is without spaces, tensors of wide dtypes first, then by name.
    """
    from ..sources.weight_files import safetensors_header

    names = sorted(state, key=lambda name: (-state[name].element_size(), name))
    return len(safetensors_header({name: state[name] for name in names})) + sum(t.nbytes for t in state.values())


# --- the screen -------------------------------------------------------------------------------------------------------


def _grouped(rows: list[Any]) -> list[tuple[str, bool, str, list[str], int]]:
    """Like rows as one: kind, fused, reason, the layers' own names, and how many."""
    groups: dict[tuple[str, bool, str], list[str]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.fused, row.reason), []).append(row.name.rpartition(".")[2])
    return [(*key, list(dict.fromkeys(names)), len(names)) for key, names in groups.items()]


def _document(base: _Base, step: dict[str, Any], found: list[_Found], refused: dict[str, str]) -> dict[str, Any]:
    return {
        "model": base.name, "model_class": type(base.model).__name__, "parameters": _parameters(base),
        "dtype": str(base.dtype).removeprefix("torch."), "quantization": base.quant,
        "blocksize": base.blocksize if base.quant == "nf4" else None, "step": step,
        "finetune": {"dtype": "float32" if _why_float32(step) else "bfloat16", "reason": _why_float32(step)},
        "methods": [
            {
                "method": one.method, "layers": len(one.rows), "fused": one.fused, "trainable": one.trainable,
                "adapter_bytes": one.file_bytes, "memory": memory_document(one.memory),
                "memory_error": one.no_memory, "rows": [vars(row) for row in one.rows],
            }
            for one in found
        ],
        "refused": refused, "missing": list(MISSING),
    }  # fmt: skip


def _why_float32(step: dict[str, Any]) -> str:
    """Why a run on this machine computes in float32; "" where it does not."""
    from .._cpu import why_float32

    return why_float32() if step["device"] == "cpu" else ""


def _parameters(base: _Base) -> int:
    return sum(p.numel() for p in base.model.parameters())


def _bytes(size: int, units: Sequence[tuple[float, str]]) -> str:
    unit, name = next((pair for pair in units if size >= pair[0]), (1, "bytes"))
    return f"{size / unit:.4g} {name}"


def _show(base: _Base, step: dict[str, Any], found: list[_Found], refused: dict[str, str]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from ..memory import KINDS

    def table(*columns: str, right: Sequence[str] = ()) -> Table:
        made = Table(box=SIMPLE, pad_edge=False)
        for column in columns:
            made.add_column(column, justify="right" if column in right else "left", overflow="fold")
        return made

    screen, parameters = console(), _parameters(base)
    dtype = str(base.dtype).removeprefix("torch.")
    print(f"model: {base.name}, {type(base.model).__name__}, {parameters:,} parameters, {dtype}")
    print(f"quantization: {base.about_quant}")
    print("from configuration files: no weight was read")
    if why := _why_float32(step):
        print(f"finetune computes in float32 on this machine: {why}")
    numbers = ("trainable", "of all", "adapter file", "step's memory")
    summary = table("method", "layers fused", *numbers, right=numbers)
    for one in found:
        memory = "?" if one.memory is None else _bytes(one.memory.total, _MEMORY)
        layers = f"{one.fused} of {len(one.rows)}" if one.rows else "adds no layers"
        share = f"{one.trainable / parameters:.3%}"
        summary.add_row(one.method, layers, f"{one.trainable:,}", share, _bytes(one.file_bytes, _DISK), memory)
    if found:
        screen.print(summary)
    layers = table("method", "layers", "kind", "fused", "names", "reason", right=("layers",))
    for one in found:
        for kind, fused, reason, names, count in _grouped(one.rows):
            layers.add_row(one.method, str(count), kind, "yes" if fused else "no", ", ".join(names), reason)
    if layers.row_count:
        screen.print(layers)
    estimated = [one for one in found if one.memory is not None]
    if estimated:
        tokens = f"{step['batch_size']} x {step['sequence_length']} tokens"
        print(f"memory of a training step, {tokens}, {step['optimizer']}, on {step['device']}:")
        methods = [one.method for one in estimated]
        memory = table("MiB at the peak", *methods, right=methods)
        for kind in KINDS:
            memory.add_row(kind, *(f"{one.memory.peak[kind] / 2**20:,.1f}" for one in estimated))
        memory.add_row("total", *(f"{one.memory.total / 2**20:,.1f}" for one in estimated))
        screen.print(memory)
    for name, reason in refused.items():
        print(f"{name}: can't adapt this model: {reason}")
    for one in found:
        if one.no_memory is not None:
            print(f"{one.method}: memory could not be estimated: {one.no_memory}")
    for text in MISSING:
        print(text)
