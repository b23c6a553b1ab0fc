"""What several commands share: where a model is, what is wanted to run, tables and JSON on the screen."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, TypeVar

from . import CliError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "DEMO_MODEL",
    "bar",
    "console",
    "dense_config",
    "drop_output",
    "first_line",
    "memory_document",
    "mendable",
    "model_config",
    "need",
    "out_of_memory",
    "print_json",
    "quiet",
    "status",
]

_Item = TypeVar("_Item")

DEMO_MODEL = "smollm2"
_PLAIN_WIDTH = 120


def first_line(error: BaseException) -> str:
    """What an error says, on one line; its class's name where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def drop_output() -> None:
    """Standard output to nowhere: what read it has ended, and the interpreter's own last flush is not to fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, of Python's or of PyTorch's."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def need(command: str, *packages: str) -> None:
    """Raises CliError where a package is missing."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise CliError(f"{command} needs {', '.join(missing)}: pip install 'peft_ext[hf]'")


def quiet() -> None:
    """No bars and remarks of the libraries, before they are first imported; none on PEFT's way to hand on prefixes."""
    from .finetune import _quiet

    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
    _quiet()


@contextlib.contextmanager
def mendable() -> Iterator[None]:
    """What :mod:`peft_ext.sources` raises for a folder that can't be used, as a CliError."""
    from ..sources.model import SourceError

    try:
        yield
    except SourceError as error:
        raise CliError(str(error)) from None


def model_config(model: str) -> tuple[Path, Any]:
    """The folder and the transformers configuration of ``model``: a folder, a hub name, or "smollm2".

    Of a hub name the JSON files alone are fetched. Raises CliError.
    """
    from ..sources.model import model_folder, read_model_config

    if model == DEMO_MODEL:
        from .demo_model import demo_model

        model = str(demo_model())
    with mendable():
        folder = model_folder(model, ["*.json"])
        return folder, read_model_config(folder)


def dense_config(config: Any) -> Any:
    """``config`` without its quantization, in place: to trace the model, which then is quantized as it is asked for."""
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def memory_document(estimate: Any) -> Optional[dict[str, Any]]:
    """A :class:`peft_ext.memory.MemoryEstimate` as JSON has it."""
    return None if estimate is None else {**vars(estimate), "peak": dict(estimate.peak)}


def console() -> Console:
    """Standard output for tables: as wide as the terminal, or 120 columns; texts are shown as they are."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else _PLAIN_WIDTH, markup=False, emoji=False, highlight=False)


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """What goes on, on a terminal alone, as long as it does."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True, markup=False).status(text):
        yield


def bar(
    items: Sequence[_Item], text: str, unit: str, each: Callable[[_Item], str] = lambda item: ""
) -> Iterable[_Item]:
    """``items``, with a bar on a terminal alone; ``each`` names the one in work, after ``text``.

    Drawn between items: no thread beside them takes time from what is measured.
    """
    if not sys.stderr.isatty():
        return items
    return _shown(items, text, unit, each)


def _shown(items: Sequence[_Item], text: str, unit: str, each: Callable[[_Item], str]) -> Iterator[_Item]:
    from tqdm import tqdm

    # Closed, and its line cleared, where the loop ends early as well.
    with tqdm(total=len(items), desc=text, unit=unit, leave=False, dynamic_ncols=True) as shown:
        for item in items:
            if name := each(item):
                shown.set_description(f"{text} {name}")
            yield item
            shown.update()


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2))
