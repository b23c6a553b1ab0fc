"""``peft-ext merge``: an adapter and its base made one dense model, with what was done said line by line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..run.errors import need
from ..text import format_bytes
from . import CliError
from ._common import AdapterFolder, BaseBlocksize, BaseModel, base_of


def merge(
    adapter: AdapterFolder,
    output: Annotated[Path, typer.Option(help="The dense model's folder.")],
    model: BaseModel = None,
    base_quant: Annotated[
        Optional[str], typer.Option(help="Add to the base as nf4 or as none. Default: as the run.json has it, or none.")
    ] = None,
    blocksize: BaseBlocksize = None,
    double_quant: Annotated[bool, typer.Option(help="Of nf4.")] = True,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, or keep: the base's.")] = "keep",
    max_shard_size: Annotated[str, typer.Option(help="Of a weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder that is there.")] = False,
) -> None:
    """Make an adapter and its base one dense model, in safetensors, one layer in memory at a time."""
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
        print(f"no longer tied, as the adapter changed one of them: {', '.join(done.untied)}")
    print(f"written: {done.parameters:,} parameters, {done.tensors} tensors, {size}, {files}, {dtype}")
    print(f"saved: {done.output} in {done.seconds:.1f} s")
