"""Runs each fuzz target on a few dozen seeded inputs; ``python -m tests.fuzz --minutes 60`` runs longer."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

for package in ("peft", "transformers", "safetensors", "yaml"):
    pytest.importorskip(package)

from . import TARGETS, Finding, Target, mutated, run  # noqa: E402

INPUTS = 60

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("files are read on the CPU")]


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_refusals(name: str, tmp_path: Path) -> None:
    target, outcomes = TARGETS[name], Counter[str]()
    for number in range(INPUTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        data = mutated(target, random.Random(f"0:{number}"))
        try:
            outcomes[run(target, data, folder)] += 1
        except Finding as finding:
            pytest.fail(f"{finding}; input {number}: {data[:200]!r}")
    taken = outcomes.pop("taken")
    assert taken and sum(outcomes.values()), "it takes all, or refuses all: nothing is tried"


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_are_taken(name: str, tmp_path: Path) -> None:
    for number, data in enumerate(TARGETS[name].seeds()):
        (tmp_path / str(number)).mkdir()
        assert run(TARGETS[name], data, tmp_path / str(number)) == "taken"


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    def broken(data: bytes, folder: Path) -> None:
        raise IndexError("not a refusal")

    def silent(data: bytes, folder: Path) -> None:
        raise ValueError

    for function, message in ((broken, "IndexError: not a refusal"), (silent, "ValueError without a message")):
        with pytest.raises(Finding, match=message):
            run(Target("x", "bytes", lambda: [b""], function, (ValueError,)), b"", tmp_path)
