"""``peft-ext finetune``: options from a file and from flags, a run or its plan, and the run's log on the screen."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from .. import run
from ..run.config import Config, merged, read_config
from ._common import drop_output

__all__ = ["finetune"]


def finetune(path: Optional[Path], flags: dict[str, Any], dry_run: bool) -> int:
    """Runs it; returns the exit code: 0, 1 where the re-read adapter differs, 128 + n where signal n stopped it.

    ``path`` is of a configuration file, ``flags`` are the options that were given on the command line.
    """
    config = Config(Path()) if path is None else read_config(path, run.Options)
    options = merged(run.Options(), config, flags)
    with config.named(flags), _shown_log():
        if dry_run:
            from .plan import show_plan

            show_plan(run.dry_run(options))
            return 0
        result = run.finetune(options)
    if result.stopped_by:
        return 128 + result.stopped_by
    return 0 if result.check is not None and result.check.ok else 1


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
