"""Writes the adapter file of llama.cpp for a run with ``--export gguf``, and gives the commands that use the file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Optional

from ..sources.gguf_file import gguf_path
from .checkpoints import EXPORTED_FILE
from .errors import RunError
from .options import EXPORTED_METHODS
from .prepare import Run
from .progress import log


def about_runner(run: Run, file: Optional[Path] = None) -> Optional[dict[str, Any]]:
    """Returns the values of the report's section on llama.cpp; None where the model is no GGUF file and ``file`` is
    None.

    ``file`` is the path of the exported adapter. If ``file`` is None and the method's adapters can be exported, the
    result has the command that exports the adapter.
    """
    base, output = gguf_path(run.folder), run.options.output
    if base is None and file is None:
        return None
    model = "model.gguf" if base is None else str(base)
    about: dict[str, Any] = {"base": model, "weights": run.weights}
    if file is None:
        if run.options.method in EXPORTED_METHODS:
            about["commands"] = [shlex.join(["peft-ext", "export", str(output), "--gguf", str(output / EXPORTED_FILE)])]
        return about
    about["adapter"] = str(file)
    about["commands"] = [_command(model, file)]
    about["modelfile"] = [f"FROM {model}", f"ADAPTER {file}"]
    return about


def export_adapter(run: Run) -> Path:
    """Writes the run's saved adapter as a file of llama.cpp into the output folder, and returns the file's path.

    The saved adapter in PEFT's format stays. Raises RunError where llama.cpp's adapter files can't hold the adapter, or
    where the file can't be written.
    """
    from ..export import ExportError, write_gguf_adapter

    output = run.options.output
    try:
        done = write_gguf_adapter(output, output / EXPORTED_FILE, base=run.folder, overwrite=True)
    except (ExportError, OSError) as error:
        why = str(error).removeprefix("write_gguf_adapter: ")
        if isinstance(error, OSError):
            why = f"{error.filename or output / EXPORTED_FILE}: {error.strerror or error}"
        raise RunError(f"--export gguf: {why}; the adapter in PEFT's format is saved in {output}") from None
    log.info(f"exported: {done.file}, for llama.cpp: {_command(done.base, done.file)}")
    return done.file


def _command(model: str, file: Path) -> str:
    return shlex.join(["llama-cli", "-m", model, "--lora", str(file)])
