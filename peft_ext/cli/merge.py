"""``peft-ext merge``: an adapter and its base made one dense model, with what was done said line by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from ..text import format_bytes
from . import CliError
from ._common import base_of, need

__all__ = ["merge"]


def merge(adapter: Path, output: Path, *, model: Optional[str] = None, **options: Any) -> None:
    """Runs :func:`peft_ext.merge_to_dense` and prints its report. Raises CliError for what the user can mend."""
    need("merge", "transformers", "peft", "safetensors")
    from ..merge import MergeError, merge_to_dense

    try:
        done = merge_to_dense(base_of(adapter, model), adapter, output, **options)
    except MergeError as error:
        raise CliError(str(error).removeprefix("merge_to_dense: ")) from None
    except OSError as error:
        raise CliError(f"{error.filename or output}: {error.strerror or error}") from None
    size = format_bytes(done.nbytes, binary=False)
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
