"""What several commands share: where a model is, what is wanted to run, tables and JSON on the screen."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import torch
import typer

from .. import _cpu, quantize
from ..run.demo_model import demo_model
from ..run.options import DEMO_MODEL, QUANTIZATIONS
from ..sources.model import model_folder, read_model_config, widen
from ..weight import BLOCKSIZES
from . import CliError

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_WIDTH = 120

# Options of several commands.
AdapterFolder = Annotated[Path, typer.Option(help="A folder that a run, or save_pretrained, wrote.")]
BaseModel = Annotated[
    Optional[str], typer.Option(help='The base: a folder, a hub name, or "smollm2". Default: the adapter\'s own.')
]
BaseBlocksize = Annotated[Optional[int], typer.Option(help="Of nf4. Default: the run.json's, or 64.")]
Threads = Annotated[Optional[int], typer.Option(help="Default: PyTorch's.")]


# --- models and packages ----------------------------------------------------------------------------------------------


def model_config(model: str) -> tuple[Path, Any]:
    """Returns the folder and the transformers configuration of ``model``: a folder, a hub name, or "smollm2".

    Of a hub name the JSON files alone are fetched. Raises :class:`peft_ext.sources.model.SourceError`.
    """
    if model == DEMO_MODEL:
        model = str(demo_model())
    folder = model_folder(model, ["*.json"])
    return folder, read_model_config(folder)


def base_of(adapter: Path, model: Optional[str]) -> Optional[str]:
    """Returns the base to give: ``model``, or None for the one that the adapter names.

    It is the default model's folder where that is meant, or where the adapter's run was on it and it has moved.
    """
    if model is None:
        try:
            trained = json.loads((adapter / "run.json").read_text())["options"]["model"]
            named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None
        if trained != DEMO_MODEL or not isinstance(named, str) or Path(named).is_dir():
            return None
    elif model != DEMO_MODEL:
        return model
    return str(demo_model())


def check_base(option: str, quant: Optional[str], blocksize: Optional[int]) -> None:
    """Raises CliError for a quantization of a base, the value of ``option``, that there is not."""
    if quant not in (None, *QUANTIZATIONS):
        raise CliError(f"{option} {quant}: wanted one of {', '.join(QUANTIZATIONS)}")
    if blocksize is not None and blocksize not in BLOCKSIZES:
        raise CliError(f"--blocksize {blocksize}: wanted one of {', '.join(map(str, BLOCKSIZES))}")


def held_model(loaded: Any, config: Any, device: Any, blocksize: Optional[int], dtype: Any = None) -> Any:
    """Returns the frozen base of :func:`peft_ext.sources.model.load_model` on the device, as it is to be adapted.

    A base that is not in 4 bits yet is cast to ``dtype`` (None: it keeps its own), quantized to NF4 where there is a
    ``blocksize``, and widened to float32 on a CPU without bfloat16. Raises CliError where a weight is missing.
    """
    if loaded.absent and not getattr(config, "modules_to_save", None):
        raise CliError(f"{loaded.absent[0]} is not in the base's files, so it would be random")
    model = loaded.model.requires_grad_(False)
    if getattr(model, "is_loaded_in_4bit", False):
        return model
    model = model.to(device, dtype)
    if blocksize is not None:
        quantize.quantize_nf4(model, blocksize=blocksize, progress=False)
    if device.type == "cpu" and model.dtype is torch.bfloat16 and _cpu.why_float32():
        widen(model)
    return model


def check_range(least: int, most: int = 2**31 - 1, **options: Optional[int]) -> None:
    """Raises CliError for an option's value that is not ``least`` to ``most``."""
    for name, value in options.items():
        if value is not None and not least <= value <= most:
            raise CliError(f"--{name.replace('_', '-')} {value}: wanted {least} to {most}")


def dense_config(config: Any) -> Any:
    """Takes its quantization off ``config``: to trace the model, which then is quantized as it is asked for."""
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


# --- the screen -------------------------------------------------------------------------------------------------------


def drop_output() -> None:
    """Sends standard output nowhere: what read it has ended, and the interpreter's own last flush is not to fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console() -> Console:
    """Returns standard output for tables: as wide as the terminal, or 120 columns; texts are shown as they are."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else _PLAIN_WIDTH, markup=False, emoji=False, highlight=False)


def new_table(
    *columns: str, right: tuple[str, ...] = (), unfolded: tuple[str, ...] = (), expand: bool = False, **kwargs: Any
) -> Any:
    """Returns an empty table; the columns of ``right`` are set to the right, those of ``unfolded`` stay on a line.

    ``expand``: the columns share the screen's width evenly.
    """
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(box=SIMPLE, pad_edge=False, expand=expand, **kwargs)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold",
                        no_wrap=column in unfolded, ratio=1 if expand else None)  # fmt: skip
    return made


def grouped_rows(rows: list[Any]) -> list[tuple[str, bool, str, list[str], int]]:
    """Returns rows of :func:`peft_ext.explain` that are alike as one: kind, fused, reason, layers' names, how many."""
    from ..integrations.peft import alike

    leaves = {key: [name.rpartition(".")[2] for name in names] for key, names in alike(rows).items()}
    return [(*key, list(dict.fromkeys(names)), len(names)) for key, names in leaves.items()]


def mib(size: int) -> str:
    """Returns bytes as a number of MiB, for a column of them."""
    return f"{size / 2**20:,.1f}"


def memory_document(estimate: Any) -> Optional[dict[str, Any]]:
    """Returns a :class:`peft_ext.memory.MemoryEstimate` as JSON has it."""
    return None if estimate is None else {**vars(estimate), "peak": dict(estimate.peak)}


def print_json(value: Any) -> None:
    """Prints one JSON document on standard output."""
    print(json.dumps(value, indent=2))
