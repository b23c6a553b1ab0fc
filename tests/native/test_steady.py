"""tools/steady.py names tests that exist; the runs themselves belong to `make steady`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
steady = pytest.importorskip("steady", reason="tools/ is not here: not a checkout")


@pytest.mark.parametrize("name", [*steady.SHORT, *steady.LONG])
def test_the_named_test_exists(name: str) -> None:
    file, _, test = name.partition("::")
    text = (ROOT / file).read_text()
    assert not test or f"\ndef {test.partition('[')[0]}(" in text
