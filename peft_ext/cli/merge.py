"""``peft-ext merge``: merges an adapter and its base into one dense model, and prints a summary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..run.errors import need
from ..text import format_bytes
from . import CliError
from ._common import QUANT_HELP, AdapterFolder, BaseBlocksize, BaseModel, base_of


def merge(
    adapter: AdapterFolder,
    output: Annotated[Path, typer.Option(help="Folder for the dense model.")],
    model: BaseModel = None,
    base_quant: Annotated[Optional[str], typer.Option(help=QUANT_HELP)] = None,
    blocksize: BaseBlocksize = None,
    double_quant: Annotated[bool, typer.Option(help="Double quantization of nf4.")] = True,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, or keep: the base's.")] = "keep",
    max_shard_size: Annotated[str, typer.Option(help="Most bytes of a weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Merge an adapter and its base into one dense model, in safetensors, with one layer in memory at a time."""
    need("merge", "transformers", "peft", "safetensors")
    from ..merge import MergeError, merge_to_dense

    try:
        done = merge_to_dense(
            base_of(adapter, model), adapter, output, base_quant=base_quant, blocksize=blocksize,
            double_quant=double_quant, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite,
        )  # fmt: skip
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
        print(f"no longer tied, since the adapter changed one of the tied weights: {', '.join(done.untied)}")
    print(f"written: {done.parameters:,} parameters, {done.tensors} tensors, {size}, {files}, {dtype}")
    print(f"saved: {done.output} in {done.seconds:.1f} s")
