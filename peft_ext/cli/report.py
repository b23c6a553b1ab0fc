"""``peft-ext report``: draws a run's report.html again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..run import redraw


def report(folder: Annotated[Path, typer.Argument(help="Folder of a run, with its run.json.")]) -> None:
    """Draw a run's report.html again, from its run.json."""
    print(f"report: {redraw(folder)}")
