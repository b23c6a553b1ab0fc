"""Functions that run the command line in this process and return its output or its one-line error."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import pytest

from peft_ext.cli.main import main


def _run(capsys: pytest.CaptureFixture, arguments: tuple[object, ...]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def said(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """Returns the output of a command that succeeds and prints nothing to standard error."""
    code, out, err = _run(capsys, arguments)
    assert code == 0 and err == "", err
    return out


def refused(capsys: pytest.CaptureFixture, *arguments: object, unchanged: Optional[Path] = None) -> str:
    """Returns the one-line error of a command that fails. Asserts that the command added no file to ``unchanged`` and
    removed none."""
    before = sorted(unchanged.rglob("*")) if unchanged else []
    code, out, err = _run(capsys, arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, (arguments, code, out, err)
    assert (sorted(unchanged.rglob("*")) if unchanged else []) == before
    return err[len("error: ") : -1]
