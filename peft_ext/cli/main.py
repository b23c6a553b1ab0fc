"""The commands. Each imports what it needs when it runs: ``doctor`` wants torch and typer alone."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..methods import METHODS
from ..run.errors import Interrupted, RunError, out_of_memory
from ..run.options import Options
from ..sources.json_file import first_line
from . import CliError
from ._common import drop_output

__all__ = ["app", "main"]

app = typer.Typer(
    name="peft-ext", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Parameter-efficient fine-tuning, fast and small.",
)  # fmt: skip

_D = Options()  # the defaults, written once


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """One line and exit code 2 for what the user can mend; 130 for Ctrl-C, 128 + n for signal n."""
    try:
        yield
    except (CliError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except Interrupted as stopped:
        by_user = stopped.signal == signal.SIGINT
        print(f"error: {'interrupted' if by_user else f'ended by {signal.Signals(stopped.signal).name}'}",
              file=sys.stderr, flush=True)  # fmt: skip
        raise typer.Exit(128 + stopped.signal) from None
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"error: out of memory: {first_line(error)}", file=sys.stderr)
        raise typer.Exit(2) from None


def _command(declared: Callable[..., None]) -> Callable[..., None]:
    """Makes a command of a function that has its options and its help.

    The function of that name in the module of that name runs it, with the options by name. It returns the exit code,
    or None for 0.
    """
    name = declared.__name__

    @app.command()
    @functools.wraps(declared)
    def command(**options: Any) -> None:
        with _errors():
            code = getattr(importlib.import_module(f".{name}", __package__), name)(**options)
        raise typer.Exit(code or 0)

    return command


def _version(asked: bool) -> None:
    if asked:
        with _errors():
            from .._version import __version__

        print(f"peft_ext {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Parameter-efficient fine-tuning, fast and small."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it tells of a kernel that is not used here


@_command
def doctor() -> None:
    """Show versions, the native libraries, the CPU path in use and which operators have kernels."""


_model, _adapter, _data, _training = (
    functools.partial(typer.Option, rich_help_panel=panel) for panel in ("Model", "Adapter", "Data", "Training")
)


@app.command()
def finetune(
    ctx: typer.Context,
    config: Annotated[
        Optional[Path], typer.Option(help="YAML with these names; flags win; paths from the current folder.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show the plan; read no weights, write nothing.")
    ] = False,
    output: Annotated[Path, typer.Option(help="For adapter, report, checkpoints.")] = _D.output,
    save_steps: Annotated[int, typer.Option(help="Between checkpoints; 0: only on Ctrl-C.")] = _D.save_steps,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --output.")] = False,
    stock: Annotated[bool, typer.Option("--stock", help="By PEFT and bitsandbytes alone, to compare.")] = False,
    no_stock: Annotated[bool, typer.Option("--no-stock", hidden=True)] = False,
    prompt: Annotated[Optional[str], typer.Option(help="What to ask before and after.")] = None,
    threads: Annotated[Optional[int], typer.Option(help="Default: PyTorch's.")] = None,
    model: Annotated[str, _model(help='A folder, a hub name, or "smollm2".')] = _D.model,
    quant: Annotated[Optional[str], _model(help="Frozen weights: nf4 or none. Default: nf4 if the method can.")] = None,
    dtype: Annotated[str, _model(help="bf16, fp32, auto: fp32 where the CPU lacks bf16.")] = _D.dtype,
    blocksize: Annotated[int, _model(help="Weights that share a scale.")] = _D.blocksize,
    method: Annotated[str, _adapter(help=" ".join(METHODS) + ".")] = _D.method,
    rank: Annotated[int, _adapter(help="Of the low-rank methods.")] = _D.rank,
    alpha: Annotated[float, _adapter(help="Scaling times rank.")] = _D.alpha,
    dropout: Annotated[float, _adapter(help="On the low-rank path.")] = _D.dropout,
    target_modules: Annotated[
        Optional[str], _adapter(help='Names, with commas, or "all-linear". Default: the method\'s.')
    ] = _D.target_modules,
    virtual_tokens: Annotated[int, _adapter(help="Of prefix and prompt.")] = _D.virtual_tokens,
    data: Annotated[str, _data(help="A file, a folder, a hub name.")] = _D.data,
    text_column: Annotated[Optional[str], _data(help="Default: text.")] = None,
    prompt_column: Annotated[Optional[str], _data(help="Default: prompt, instruction or question.")] = None,
    completion_column: Annotated[Optional[str], _data(help="Default: completion, output or answer.")] = None,
    eval_fraction: Annotated[float, _data(help="Held out of training.")] = _D.eval_fraction,
    block_size: Annotated[int, _data(help="Tokens of a training example, at most.")] = _D.block_size,
    max_steps: Annotated[Optional[int], _training(help="Default: 60.")] = None,
    epochs: Annotated[Optional[float], _training(help="Instead of --max-steps.")] = None,
    batch_size: Annotated[int, _training(help="Examples.")] = _D.batch_size,
    grad_accum: Annotated[int, _training(help="Batches of a step.")] = _D.grad_accum,
    lr: Annotated[Optional[float], _training(help="Default: the method's; lora 2e-4.")] = None,
    warmup: Annotated[float, _training(help="Steps, or a fraction of them.")] = _D.warmup,
    seed: Annotated[int, _training()] = _D.seed,
    gradient_checkpointing: Annotated[
        bool, _training("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    no_gradient_checkpointing: Annotated[bool, typer.Option("--no-gradient-checkpointing", hidden=True)] = False,
) -> None:
    """Train an adapter and check it. Without arguments: SmolLM2-135M, NF4, LoRA, Python's reference."""
    values = {name: value for name, value in locals().items() if name in Options.__dataclass_fields__}
    with _errors():
        for name, off in (("stock", no_stock), ("gradient_checkpointing", no_gradient_checkpointing)):
            if off and values[name]:
                raise CliError(f"--{name.replace('_', '-')} and --no-{name.replace('_', '-')} exclude each other")
        flags = {name: value for name, value in values.items() if _given(ctx, name) or _given(ctx, f"no_{name}")}
        from .finetune import finetune as run

        code = run(config, flags, dry_run)
    raise typer.Exit(code)


def _given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@_command
def report(folder: Annotated[Path, typer.Argument(help="Of a run, with its run.json.")]) -> None:
    """Draw a run's report.html again, from its run.json."""


@_command
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


@_command
def recommend(
    model_size: Annotated[Optional[float], typer.Option(help="Billions of parameters.")] = None,
    model: Annotated[Optional[str], typer.Option(help='Instead: a model\'s folder, a hub name, or "smollm2".')] = None,
    memory: Annotated[Optional[float], typer.Option(help="Of the card, in GB. Default: this machine's.")] = None,
    task: Annotated[str, typer.Option(help="generation, classification, ner, qa, summarization, ...")] = "generation",
    examples: Annotated[Optional[int], typer.Option(help="To train on. Default: unknown.")] = None,
    batch_size: Annotated[int, typer.Option(help="Of one forward; it may be lowered to 1.")] = 4,
    sequence_length: Annotated[Optional[int], typer.Option(help="Default: 1024; encoders: 512.")] = None,
    prefer: Annotated[str, typer.Option(help="balanced, or quality: at a slower step.")] = "balanced",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which method, and which setting of it, for a model, a card, a task and an amount of data; and why."""


@_command
def explain(
    what: Annotated[
        str, typer.Argument(metavar="MODEL_OR_ADAPTER", help='A folder of either, a hub name, or "smollm2".')
    ],
    model: Annotated[Optional[str], typer.Option(help="An adapter's base. Default: its own.")] = None,
    method: Annotated[Optional[list[str]], typer.Option(help="Of a model; repeat it. Default: lora.")] = None,
    rank: Annotated[Optional[int], typer.Option(help="Of the low-rank methods. Default: 16, adalora 8.")] = None,
    quant: Annotated[Optional[str], typer.Option(help="nf4 or none. Default: the model's, or the run's.")] = None,
    blocksize: Annotated[Optional[int], typer.Option(help="Of nf4. Default: 64.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, or keep: the model's.")] = "keep",
    batch_size: Annotated[int, typer.Option(help="Of the step whose memory is estimated.")] = 4,
    sequence_length: Annotated[Optional[int], typer.Option(help="Likewise. Default: up to 1024.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What of a model would run fused, what trains, and what it takes on disk and in memory; reads no weights."""


@_command
def chat(
    adapter: Annotated[Path, typer.Option(help="A folder that a run, or save_pretrained, wrote.")],
    model: Annotated[
        Optional[str], typer.Option(help='The base: a folder, a hub name, or "smollm2". Default: the adapter\'s own.')
    ] = None,
    prompt: Annotated[Optional[str], typer.Option(help="Answer this and end. Default: ask, or read lines.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 64,
    base_quant: Annotated[Optional[str], typer.Option(help="nf4 or none. Default: the run.json's, or none.")] = None,
    blocksize: Annotated[Optional[int], typer.Option(help="Of nf4. Default: the run.json's, or 64.")] = None,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling; both answers start from it.")] = 0,
    threads: Annotated[Optional[int], typer.Option(help="Default: PyTorch's.")] = None,
) -> None:
    """Ask a base model and its adapted self the same, side by side."""


@_command
def bench(
    method: Annotated[
        Optional[list[str]], typer.Option(help="lora, qlora, dora, qdora, ia3; repeat it. Default: all.")
    ] = None,
    base: Annotated[Optional[list[str]], typer.Option(help="bf16 or nf4; repeat it. Default: both.")] = None,
    hidden: Annotated[int, typer.Option(help="The layer is hidden x hidden.")] = 4096,
    tokens: Annotated[int, typer.Option(help="In a step.")] = 512,
    rank: Annotated[int, typer.Option(help="Of the low-rank methods.")] = 16,
    seconds: Annotated[float, typer.Option(help="Of timing, about, in all.")] = 20.0,
    threads: Annotated[Optional[int], typer.Option(help="Default: PyTorch's.")] = None,
    chart: Annotated[Optional[Path], typer.Option(help="Draw a .svg.")] = None,
    output: Annotated[Optional[Path], typer.Option(help="A folder for bench.json and its chart.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time an adapted layer's step on this machine, ours against PEFT and bitsandbytes, verified first."""


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
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        return 1  # as rich and click have it
    return int(code) if isinstance(code, int) else 0
