"""The commands. Each imports what it needs when it runs: ``doctor`` wants torch and typer alone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from . import CliError
from .finetune import METHODS, Options

__all__ = ["app", "main"]

app = typer.Typer(
    name="peft-ext", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Parameter-efficient fine-tuning, fast and small.",
)  # fmt: skip

_D = Options()  # the defaults, written once


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """One line and exit code 2 for what the user can mend; 130 for Ctrl-C."""
    try:
        yield
    except CliError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


def _version(asked: bool) -> None:
    if asked:
        from .._version import __version__

        print(f"peft_ext {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Parameter-efficient fine-tuning, fast and small."""


@app.command()
def doctor() -> None:
    """Show versions, the native libraries, the CPU path in use and which operators have kernels."""
    from .doctor import doctor as report

    raise typer.Exit(report())


_MODEL, _ADAPTER, _DATA, _TRAINING, _RUN = "Model", "Adapter", "Data", "Training", "Run"


@app.command()
def finetune(
    model: Annotated[str, typer.Option(help='A folder, a hub name, or "smollm2".', rich_help_panel=_MODEL)] = _D.model,
    quant: Annotated[
        str, typer.Option(help="The frozen weights: nf4 (double quantization) or none.", rich_help_panel=_MODEL)
    ] = _D.quant,
    blocksize: Annotated[int, typer.Option(help="Weights that share a scale.", rich_help_panel=_MODEL)] = _D.blocksize,
    method: Annotated[str, typer.Option(help=", ".join(METHODS) + ".", rich_help_panel=_ADAPTER)] = _D.method,
    rank: Annotated[int, typer.Option(help="Of the low-rank methods.", rich_help_panel=_ADAPTER)] = _D.rank,
    alpha: Annotated[float, typer.Option(help="Scaling times rank.", rich_help_panel=_ADAPTER)] = _D.alpha,
    dropout: Annotated[float, typer.Option(help="On the low-rank path.", rich_help_panel=_ADAPTER)] = _D.dropout,
    target_modules: Annotated[
        Optional[str],
        typer.Option(help='Names, with commas, or "all-linear" (the default but for ia3).', rich_help_panel=_ADAPTER),
    ] = _D.target_modules,
    virtual_tokens: Annotated[
        int, typer.Option(help="Of prefix and prompt.", rich_help_panel=_ADAPTER)
    ] = _D.virtual_tokens,
    data: Annotated[
        str,
        typer.Option(
            help='A .jsonl, .json, .csv or .txt file, a folder of them, a hub dataset, or "python-docs".',
            rich_help_panel=_DATA,
        ),
    ] = _D.data,
    text_column: Annotated[Optional[str], typer.Option(help="Default: text.", rich_help_panel=_DATA)] = None,
    prompt_column: Annotated[
        Optional[str], typer.Option(help="Default: prompt, instruction or question.", rich_help_panel=_DATA)
    ] = None,
    completion_column: Annotated[
        Optional[str], typer.Option(help="Default: completion, output or answer.", rich_help_panel=_DATA)
    ] = None,
    eval_fraction: Annotated[
        float, typer.Option(help="Held out of training.", rich_help_panel=_DATA)
    ] = _D.eval_fraction,
    block_size: Annotated[
        int, typer.Option(help="Tokens of a training example, at most.", rich_help_panel=_DATA)
    ] = _D.block_size,
    max_steps: Annotated[Optional[int], typer.Option(help="Default: 60.", rich_help_panel=_TRAINING)] = None,
    epochs: Annotated[Optional[float], typer.Option(help="Instead of --max-steps.", rich_help_panel=_TRAINING)] = None,
    batch_size: Annotated[int, typer.Option(help="Examples.", rich_help_panel=_TRAINING)] = _D.batch_size,
    grad_accum: Annotated[int, typer.Option(help="Batches of a step.", rich_help_panel=_TRAINING)] = _D.grad_accum,
    lr: Annotated[
        Optional[float], typer.Option(help="Default: the method's; lora 2e-4.", rich_help_panel=_TRAINING)
    ] = None,
    warmup: Annotated[float, typer.Option(help="Steps, or a fraction of them.", rich_help_panel=_TRAINING)] = _D.warmup,
    seed: Annotated[int, typer.Option(rich_help_panel=_TRAINING)] = _D.seed,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=_TRAINING)
    ] = False,
    threads: Annotated[Optional[int], typer.Option(help="Default: PyTorch's.", rich_help_panel=_TRAINING)] = None,
    stock: Annotated[
        bool,
        typer.Option("--stock", help="The same run by PEFT and bitsandbytes alone, to compare.", rich_help_panel=_RUN),
    ] = False,
    prompt: Annotated[Optional[str], typer.Option(help="What to ask before and after.", rich_help_panel=_RUN)] = None,
    output: Annotated[Path, typer.Option(help="Adapter, run.json, checkpoints.", rich_help_panel=_RUN)] = _D.output,
    save_steps: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0: only on Ctrl-C.", rich_help_panel=_RUN)
    ] = _D.save_steps,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.", rich_help_panel=_RUN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --output.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Train an adapter and check it. Without arguments: SmolLM2-135M, NF4, LoRA, on Python's own reference."""
    from .finetune import finetune as run

    options = Options(**{name: value for name, value in locals().items() if name in Options.__dataclass_fields__})
    with _errors():
        code = run(options)
    raise typer.Exit(code)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Option(help="A folder that a run, or save_pretrained, wrote.")],
    output: Annotated[Path, typer.Option(help="The dense model's folder.")],
    model: Annotated[
        Optional[str], typer.Option(help='The base: a folder, a hub name, or "smollm2". Default: the adapter\'s own.')
    ] = None,
    base_quant: Annotated[
        Optional[str], typer.Option(help="Add to the base as nf4 or as none. Default: as the run.json has it, or none.")
    ] = None,
    blocksize: Annotated[Optional[int], typer.Option(help="Of nf4. Default: the run.json's, or 64.")] = None,
    double_quant: Annotated[bool, typer.Option(help="Of nf4.")] = True,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, or keep: the base's.")] = "keep",
    max_shard_size: Annotated[str, typer.Option(help="Of a weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder that is there.")] = False,
) -> None:
    """Make an adapter and its base one dense model, in safetensors, one layer in memory at a time."""
    from .merge import merge as run

    with _errors():
        run(
            adapter, output, model=model, base_quant=base_quant, blocksize=blocksize, double_quant=double_quant,
            dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite,
        )  # fmt: skip


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line (default: ``sys.argv``); returns the exit code, and prints no traceback for wrong usage."""
    command = typer.main.get_command(app)
    try:
        code = command.main(args=None if argv is None else list(argv), prog_name="peft-ext", standalone_mode=False)
    except Exception as error:
        # typer's and click's own errors, whichever of the two a version of typer raises.
        if not hasattr(error, "format_message"):
            raise
        if message := error.format_message():  # none where the help was shown instead
            print(f"error: {message}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    return int(code) if isinstance(code, int) else 0
