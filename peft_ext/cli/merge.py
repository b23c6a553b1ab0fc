"""``peft-ext merge``: an adapter and its base made one dense model, with what was done said line by line."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

from . import CliError

__all__ = ["merge"]

DEMO_MODEL = "smollm2"


def merge(adapter: Path, output: Path, *, model: Optional[str] = None, **options: Any) -> None:
    """Run :func:`peft_ext.merge.merge_to_dense` and print its report. Raises CliError for what the user can mend."""
    if missing := [name for name in ("transformers", "peft", "safetensors") if find_spec(name) is None]:
        raise CliError(f"merge needs {', '.join(missing)}: pip install 'peft_ext[hf]'")
    from ..merge import MergeError, merge_to_dense

    try:
        done = merge_to_dense(_model(model, adapter), adapter, output, **options)
    except MergeError as error:
        raise CliError(str(error).removeprefix("merge_to_dense: ")) from None
    except OSError as error:
        raise CliError(f"{error.filename or output}: {error.strerror or error}") from None
    size = f"{done.nbytes / 1e9:.2f} GB" if done.nbytes >= 1e9 else f"{done.nbytes / 1e6:.1f} MB"
    files = "1 file" if len(done.files) == 1 else f"{len(done.files)} files"
    dtype = "each tensor's own dtype" if done.dtype is None else str(done.dtype).removeprefix("torch.")
    print(f"base: {done.base}, {done.model_class}; quantization {done.base_quant_text}")
    print(f"adapter: {adapter}, {done.method}, merged into {done.merged} modules")
    name, change = done.largest_change
    if name is not None:
        print(f"largest relative change of a weight: {change:.2g}, {name}")
    if done.untied:
        print(f"no longer tied, as the adapter changed one of them: {', '.join(done.untied)}")
    print(f"written: {done.parameters:,} parameters, {done.tensors} tensors, {size}, {files}, {dtype}")
    print(f"saved: {done.output} in {done.seconds:.1f} s")


def _model(model: Optional[str], adapter: Path) -> Optional[str]:
    """The base to give; the default model's folder where it is meant, or where the run was on it and it has moved."""
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
    from .demo_model import demo_model

    return str(demo_model())
