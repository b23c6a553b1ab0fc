"""``peft-ext finetune``: reads options from a file and from flags, and starts a run or a dry run with its log."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional, get_type_hints

import typer

from .. import run
from ..run.config import Config, merged, read_config
from ..run.errors import RunError
from ._common import drop_output


def finetune(
    ctx: typer.Context,
    config: Annotated[
        Optional[Path], typer.Option(help="YAML file of options; flags win; paths from the current folder.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show the plan; read no weights, write nothing.")
    ] = False,
    **values: Any,
) -> int:
    """Train an adapter and check it. Without arguments: SmolLM2-135M, NF4, LoRA, Python's reference."""
    # The exit code is 0 after a dry run, or if the last check of the saved adapter passes; 128 + n if signal n stopped
    # the run; 1 if the last check fails or did not run.
    flags = {name: value for name, value in values.items() if ctx.get_parameter_source(name).name == "COMMANDLINE"}
    for name in _OFF:
        if flags.pop(f"no_{name}", False):
            if name in flags:
                flag = name.replace("_", "-")
                raise RunError(f"--{flag} and --no-{flag} exclude each other")
            flags[name] = False
    given = Config(Path()) if config is None else read_config(config, run.Options)
    options = merged(run.Options(), given, flags)
    with given.named(flags), _shown_log():
        if dry_run:
            from .plan import show_plan

            plan = run.dry_run(options)
            if plan.run.ranks.speaks:
                show_plan(plan)
            return 0
        result = run.finetune(options)
    if result.stopped_by:
        return 128 + result.stopped_by
    return 0 if result.check is not None and result.check.ok else 1


_OFF = ("stock", "gradient_checkpointing")  # flags that also have a --no- form, against a true value in --config


def _signature() -> inspect.Signature:
    """Returns a signature of :func:`finetune` for typer, with a parameter for each field of Options."""
    known = inspect.signature(finetune, eval_str=True)
    parameters = [p for p in known.parameters.values() if p.name != "values"]
    hints = get_type_hints(run.Options)

    def add(name: str, default: Any, kind: Any, **about: Any) -> None:
        # A flag gets an explicit name, because typer adds a --no- form to a flag without an explicit name.
        flag = [f"--{name.replace('_', '-')}"] if kind is bool else []
        annotation = Annotated[kind, typer.Option(*flag, **about)]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default,
                                            annotation=annotation))  # fmt: skip

    for field in dataclasses.fields(run.Options):
        add(field.name, field.default, hints[field.name], help=field.metadata["help"],
            rich_help_panel=field.metadata["panel"])  # fmt: skip
    for name in _OFF:
        add(f"no_{name}", False, bool, hidden=True)
    return known.replace(parameters=parameters)


finetune.__signature__ = _signature()


class _Screen(logging.Handler):
    """Prints log lines on standard output, and warnings and errors on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr, flush=True)
            return
        try:
            print(record.getMessage(), flush=True)
        except BrokenPipeError:  # the reader of the output has ended; the run continues
            drop_output()


@contextlib.contextmanager
def _shown_log() -> Iterator[None]:
    """Prints the lines of the logger ``peft_ext.run`` until the block ends."""
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
