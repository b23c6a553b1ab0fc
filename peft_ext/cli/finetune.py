"""``peft-ext finetune``: options from a file and from flags, a run or its plan, and the run's log on the screen."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Optional

import typer

from .. import run
from ..methods import METHODS
from ..run.config import Config, merged, read_config
from . import CliError
from ._common import drop_output

_D = run.Options()  # the defaults, written once
_model, _adapter, _data, _training = (
    functools.partial(typer.Option, rich_help_panel=panel) for panel in ("Model", "Adapter", "Data", "Training")
)


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
    target_parameters: Annotated[
        Optional[str], _adapter(help='Names, with commas, or "experts", of a mixture.')
    ] = _D.target_parameters,
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
) -> int:
    """Train an adapter and check it. Without arguments: SmolLM2-135M, NF4, LoRA, Python's reference."""
    # The exit code is 1 where the re-read adapter differs, 128 + n where signal n stopped it.
    values = {name: value for name, value in locals().items() if name in run.Options.__dataclass_fields__}
    for name, off in (("stock", no_stock), ("gradient_checkpointing", no_gradient_checkpointing)):
        if off and values[name]:
            raise CliError(f"--{name.replace('_', '-')} and --no-{name.replace('_', '-')} exclude each other")
    flags = {name: value for name, value in values.items() if _given(ctx, name) or _given(ctx, f"no_{name}")}
    given = Config(Path()) if config is None else read_config(config, run.Options)
    options = merged(run.Options(), given, flags)
    with given.named(flags), _shown_log():
        if dry_run:
            from .plan import show_plan

            show_plan(run.dry_run(options))
            return 0
        result = run.finetune(options)
    if result.stopped_by:
        return 128 + result.stopped_by
    return 0 if result.check is not None and result.check.ok else 1


def _given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


class _Screen(logging.Handler):
    """Puts lines on standard output, warnings and errors on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr, flush=True)
            return
        try:
            print(record.getMessage(), flush=True)
        except BrokenPipeError:  # nobody may read it any more, which is no reason to end a run
            drop_output()


@contextlib.contextmanager
def _shown_log() -> Iterator[None]:
    """Shows what a run tells, as long as the block runs."""
    log, handler = logging.getLogger("peft_ext.run"), _Screen()
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before
