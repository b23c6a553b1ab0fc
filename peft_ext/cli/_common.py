"""Functions that several commands share: models and their quantization, checks of options, tables and JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import torch
import typer

from .. import _cpu, quantize
from ..run.demo_model import demo_model
from ..run.errors import RunError
from ..run.options import DEMO_MODEL, quant_name
from ..sources.json_file import raised_as
from ..sources.model import model_folder, read_model_config, widen
from ..weights.nf4 import BLOCKSIZES
from ..weights.quantizers import PACKED_FORMATS, QUANTIZATIONS

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_WIDTH = 120

# Declarations of options that several commands have.
AdapterFolder = Annotated[Path, typer.Option(help="Folder that a run, or save_pretrained, wrote.")]
BaseModel = Annotated[
    Optional[str], typer.Option(help='Base: folder, GGUF file, hub name, or "smollm2". Default: the adapter\'s own.')
]
BaseBlocksize = Annotated[Optional[int], typer.Option(help="Blocksize of nf4. Default: the run.json's, or 64.")]
QUANT_HELP = f"{', '.join(QUANTIZATIONS)}. Default: the run's, or none."
Threads = Annotated[Optional[int], typer.Option(help="CPU threads. Default: PyTorch's.")]


# --- models and packages ----------------------------------------------------------------------------------------------


def model_config(model: str, revision: Optional[str] = None) -> tuple[Path, Any]:
    """Returns the folder and the transformers configuration of ``model``: a folder, a hub name, or "smollm2".

    ``model`` may also be a GGUF file, which is then returned in place of the folder. From the hub, ``model_config``
    downloads only the JSON files of ``revision`` (None: of the default branch). Raises
    :class:`peft_ext.sources.model.SourceError` where there is no such model, or where its configuration is damaged or
    not known to transformers.
    """
    if model == DEMO_MODEL:
        model = str(demo_model())
    folder = model_folder(model, ["*.json"], revision)
    return folder, read_model_config(folder)


def base_of(adapter: Path, model: Optional[str]) -> Optional[str]:
    """Returns the folder or name of the adapter's base; None for the base that the adapter's configuration names.

    ``model`` is the base that the user named; None if the user named no base. ``base_of`` returns the folder of the
    default model if ``model`` is "smollm2", and also if ``model`` is None, the adapter was trained over the default
    model, and the folder that the adapter's configuration names does not exist.
    """
    if model is None:
        trained, named = named_bases(adapter)
        if trained != DEMO_MODEL or named is None or Path(named).is_dir():
            return None
    elif model != DEMO_MODEL:
        return model
    return str(demo_model())


def named_bases(adapter: Path) -> tuple[Optional[str], Optional[str]]:
    """Returns the base that the run.json of an adapter names, and the base that the adapter's adapter_config.json
    names.

    None stands for the name of a base that is missing or can't be read.
    """
    found: list[Optional[str]] = []
    for file, keys in (("run.json", ("options", "model")), ("adapter_config.json", ("base_model_name_or_path",))):
        try:
            value = json.loads((adapter / file).read_text())
            for key in keys:
                value = value[key]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            value = None
        found.append(value if isinstance(value, str) else None)
    return found[0], found[1]


def check_base(option: str, quant: Optional[str], blocksize: Optional[int]) -> None:
    """Raises RunError for an unknown quantization or block size.

    ``option`` is the name of the command line option whose value is ``quant``, for the error message.
    """
    if quant not in (None, *QUANTIZATIONS):
        raise RunError(f"{option} {quant}: wanted one of {', '.join(QUANTIZATIONS)}")
    if blocksize is not None and blocksize not in BLOCKSIZES:
        raise RunError(f"--blocksize {blocksize}: wanted one of {', '.join(map(str, BLOCKSIZES))}")


def chosen_quant(option: str, folder: Path, stored: str, asked: Optional[str], trained: Mapping[str, Any]) -> str:
    """Returns the quantization of a base: that of the files if the files are quantized, else ``asked``, else that of
    the adapter's training, else "none".

    Args:
        option: name of the command line option whose value is ``asked``, for the error message.
        stored: how the files in ``folder`` store the weights, see :func:`peft_ext.sources.model.stored_quant`.
        trained: options of the adapter's training, as :func:`peft_ext.sources.adapter.training_options` returns them.

    Raises RunError where ``asked``, or the quantization of the adapter's training, does not fit the files.
    """
    quant = asked or trained.get("quant", "none")
    if stored != "none":
        if asked not in (None, stored):
            held = "NF4" if stored == "nf4" else "packed"
            raise RunError(f"{option} {asked}: the files in {folder} are {held}")
        return stored
    if quant == "checkpoint":
        by = "" if asked else "the adapter's run.json has "
        raise RunError(f"{by}{option} checkpoint: the files in {folder} are dense, wanted another {option}")
    return quant


def quant_text(quant: str, blocksize: int) -> str:
    """Returns a quantization, with NF4's block size, in words for the user."""
    if quant == "checkpoint":
        return "packed as in the checkpoint"
    return f"nf4, double quantization, blocks of {blocksize}" if quant == "nf4" else quant


def held_model(
    loaded: Any, config: Any, device: Any, quant: str, blocksize: Optional[int] = None, dtype: Any = None
) -> Any:
    """Returns the frozen base of :func:`peft_ext.sources.model.load_model` on the device, ready for an adapter.

    A base whose files have bitsandbytes' 4-bit weights is neither moved nor cast. A base without such weights is cast
    to ``dtype`` (None: no cast), is quantized as ``quant`` says if its files are dense, and is widened from bfloat16 to
    float32 on a CPU if ``_cpu.why_float32`` says that no bfloat16 instructions can be used. Raises RunError where the
    files lack a weight and ``config`` has no ``modules_to_save``, or where the packed format ``quant`` does not fit the
    model.
    """
    if loaded.absent and not getattr(config, "modules_to_save", None):
        raise RunError(f"the base's files lack {loaded.absent[0]}, which would be random")
    model = loaded.model.requires_grad_(False)
    if getattr(model, "is_loaded_in_4bit", False):
        return model
    model = model.to(device, dtype)
    if quant == "nf4" or quant in PACKED_FORMATS:
        with raised_as(RunError, f"{quant_name(quant)}: ", ValueError):
            if quant == "nf4":
                quantize.quantize_nf4(model, blocksize=blocksize or 64, progress=False)
            else:
                quantize.quantize_packed(model, quant, progress=False)
    if device.type == "cpu" and model.dtype is torch.bfloat16 and _cpu.why_float32():
        widen(model)
    return model


def check_range(least: int, most: int = 2**31 - 1, **options: Optional[int]) -> None:
    """Raises RunError for an option whose value is less than ``least`` or more than ``most``."""
    for name, value in options.items():
        if value is not None and not least <= value <= most:
            raise RunError(f"--{name.replace('_', '-')} {value}: wanted {least} to {most}")


def dense_config(config: Any) -> Any:
    """Removes ``quantization_config`` from the transformers configuration ``config``, and returns ``config``.

    A model that is built from the returned configuration has dense layers; the caller packs or quantizes the layers.
    """
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


# --- the screen -------------------------------------------------------------------------------------------------------


def drop_output() -> None:
    """Redirects standard output to the null device. If the reader of a pipe has ended, Python's last flush would
    otherwise raise BrokenPipeError."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console() -> Console:
    """Returns a rich Console on standard output that interprets no markup.

    The console is as wide as the terminal or as COLUMNS says, else 120 columns wide.
    """
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else _PLAIN_WIDTH, markup=False, emoji=False, highlight=False)


def new_table(
    *columns: str, right: tuple[str, ...] = (), unfolded: tuple[str, ...] = (), expand: bool = False, **kwargs: Any
) -> Any:
    """Returns an empty rich Table.

    Args:
        columns: names of the table's columns, from left to right.
        right: names of the columns that are aligned to the right.
        unfolded: names of the columns whose cells stay on one line.
        expand: whether the columns share the console's whole width evenly.
        kwargs: more arguments for the constructor of rich's Table.
    """
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(box=SIMPLE, pad_edge=False, expand=expand, **kwargs)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold",
                        no_wrap=column in unfolded, ratio=1 if expand else None)  # fmt: skip
    return made


def layers_table(methods: dict[Any, list[Any]]) -> Any:
    """Returns a table of the rows of :func:`peft_ext.explain` of each method.

    One row of the table shows all layers of a method that have the same kind, the same reason, and are all fused or all
    not fused. If ``methods`` has the key None in place of a method's name, the table has no column of methods.
    """
    from ..integrations.peft import alike

    named = None not in methods
    table = new_table(*["method"] * named, "layers", "kind", "fused", "names", "reason", right=("layers",))
    for method, rows in methods.items():
        for (kind, fused, reason), names in alike(rows).items():
            leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            table.add_row(*[method] * named, str(len(names)), kind, "yes" if fused else "no", leaves, reason)
    return table


def mib(size: int) -> str:
    """Returns a number of bytes as text: the number of MiB with one decimal, without the unit."""
    return f"{size / 2**20:,.1f}"


def print_json(value: Any) -> None:
    """Prints ``value`` as one JSON document on standard output; a dataclass becomes an object of its fields."""
    print(json.dumps(value, indent=2, default=lambda o: dict(o) if isinstance(o, Mapping) else vars(o)))
