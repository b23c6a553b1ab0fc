"""``peft-ext export``: writes an adapter as a file of llama.cpp, and prints a summary."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..run.errors import RunError, need
from ..text import format_bytes
from ._common import base_of


def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder that a run, or save_pretrained, wrote.")],
    gguf: Annotated[Path, typer.Option(help="File of llama.cpp to write: adapter.gguf.")],
    model: Annotated[
        Optional[str],
        typer.Option(help='Base: GGUF file, folder, hub name, or "smollm2". Default: the adapter\'s own.'),
    ] = None,
    dtype: Annotated[str, typer.Option(help="f16 or f32.")] = "f16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing GGUF file.")] = False,
) -> None:
    """Write a LoRA or AdaLoRA adapter as an adapter file of llama.cpp, for llama.cpp and Ollama."""
    need("export", "transformers", "peft", "safetensors", "gguf")
    from ..export import ExportError, write_gguf_adapter

    try:
        done = write_gguf_adapter(adapter, gguf, base=base_of(adapter, model), dtype=dtype, overwrite=overwrite)
    except ExportError as error:
        raise RunError(str(error).removeprefix("write_gguf_adapter: ")) from None
    except OSError as error:
        raise RunError(f"{error.filename or gguf}: {error.strerror or error}") from None
    checked = "names and sizes compared with the file" if done.base_is_gguf else "names and sizes of its configuration"
    print(f"base: {done.base}, architecture {done.architecture}; {checked}")
    numbers = f"{done.pairs} weights, {done.parameters:,} parameters, alpha {done.alpha:g}"
    print(f"adapter: {adapter}, {done.method}, {numbers}")
    if done.folded:
        more = f" and {len(done.folded) - 1} more" if len(done.folded) > 1 else ""
        print(f"lora_B multiplied with its own factor, since the file has one alpha: {done.folded[0]}{more}")
    size = format_bytes(done.nbytes, binary=False)
    print(f"saved: {done.file}, {done.dtype}, {size}, in {done.seconds:.1f} s")
    base = done.base if done.base_is_gguf else "model.gguf"
    print(f"llama.cpp: llama-cli -m {shlex.quote(base)} --lora {shlex.quote(str(done.file))}")
    print(f"Ollama, in a Modelfile:\nFROM {base}\nADAPTER {done.file}")
