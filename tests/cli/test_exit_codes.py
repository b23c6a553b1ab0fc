"""Tests the exit code of finetune for each end of a run."""

from types import SimpleNamespace

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from peft_ext import run as library
from peft_ext.cli.main import main


@pytest.mark.parametrize(
    ("signal", "ok", "code"), [(0, True, 0), (0, False, 1), (0, None, 1), (2, None, 130), (15, None, 143)]
)
def test_the_exit_code_of_a_run(signal, ok, code, monkeypatch):
    check = None if ok is None else SimpleNamespace(ok=ok)
    monkeypatch.setattr(library, "finetune", lambda options: SimpleNamespace(stopped_by=signal, check=check))
    assert main(["finetune"]) == code
