"""``peft-ext report``: a run's report.html, drawn again."""

from __future__ import annotations

from pathlib import Path

from ..run import redraw

__all__ = ["report"]


def report(folder: Path) -> None:
    """Draws it from the run.json in ``folder``. Raises RunError."""
    print(f"report: {redraw(folder)}")
