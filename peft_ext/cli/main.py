"""Declares the commands of ``peft-ext``. Each command is a function in the module of ``peft_ext.cli`` that has the
command's name."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NoReturn, Optional

import typer

from .._version import __version__
from ..run.errors import Elsewhere, RunError, out_of_memory
from ..sources.json_file import first_line
from ..sources.model import SourceError
from ._common import drop_output

app = typer.Typer(
    name="peft-ext", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Parameter-efficient fine-tuning, fast and small.",
)  # fmt: skip


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Ends the command with one printed line and an exit code where the block raises an error that the user can fix.

    If another process of the run prints the error, this process prints no line. The exit code is 2, or 128 + n after
    signal n: Ctrl-C gives 130.
    """
    try:
        yield
    except Elsewhere:  # another process of the run failed and prints the error
        raise typer.Exit(2) from None
    except (RunError, SourceError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stopped:
        number = getattr(stopped, "signal", signal.SIGINT)  # the exception Interrupted has the signal's number
        by = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        if not getattr(stopped, "silent", False):
            print(f"error: {by}", file=sys.stderr, flush=True)
        raise typer.Exit(128 + number) from None
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"error: out of memory: {first_line(error)}", file=sys.stderr)
        raise typer.Exit(2) from None


def _version(asked: bool) -> None:
    if asked:
        print(f"peft_ext {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Parameter-efficient fine-tuning, fast and small."""
    # bitsandbytes warns at import where it can't load a kernel that peft_ext does not use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _register(name: str) -> None:
    """Makes a command of ``peft-ext`` from the function ``name`` in the module of ``peft_ext.cli`` with the same name.

    The exit code of the command is the number that the function ``name`` returns, or 0 if this function returns None.
    """

    def declared() -> Callable[..., Optional[int]]:
        return getattr(importlib.import_module(f".{name}", __package__), name)

    @app.command()
    @functools.wraps(declared())
    def command(**options: Any) -> None:
        with _errors():
            code = declared()(**options)
        raise typer.Exit(code or 0)


for _name in ("doctor", "finetune", "report", "merge", "export", "recommend", "explain", "chat", "bench"):
    _register(_name)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs the command line ``argv`` (None: the arguments in ``sys.argv``) and returns the exit code.

    After wrong usage, ``main`` prints one line on standard error, unless typer has shown the help.
    """
    command = typer.main.get_command(app)
    try:
        code = command.main(args=None if argv is None else list(argv), prog_name="peft-ext", standalone_mode=False)
    except Exception as error:
        # The error's class is typer's or click's, depending on the version of typer; both classes have format_message.
        if not hasattr(error, "format_message"):
            raise
        if message := error.format_message():  # typer's message is "" where typer has shown the help
            print(f"error: {message}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        return 1  # rich and click also end with 1 after a BrokenPipeError
    return int(code) if isinstance(code, int) else 0


def run() -> NoReturn:
    """Runs the command line in ``sys.argv`` and ends the process with the exit code.

    A process that was in a process group ends without Python's finalization. After DDP used a process group of gloo,
    gloo's threads outlive the group, and a thread that frees a tensor of Python during the finalization would abort the
    process.
    """
    code = main()
    ranks = sys.modules.get("peft_ext.run.ranks")
    if ranks is not None and ranks.had_group():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
