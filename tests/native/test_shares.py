"""Tests tests/conftest.py: the tests that --share and --products select, how workers order files, seeds of fixtures."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiers import first

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.cpu_only("the options are the same for every device")

TESTS = """
import pytest

@pytest.mark.parametrize("case", range(40))
def test_of_many_cases(case): pass

@pytest.mark.parametrize("case", range(5))
def test_of_few_cases(case): pass

def test_alone(): pass
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tests") / "test_it.py"
    file.write_text(TESTS)
    return file


def collected(file: Path, *options: str) -> str:
    """Returns what pytest prints when it collects tests with tests/conftest.py and the options."""
    paths = " ".join(str(ROOT / name) for name in ("tests", "tests/support", "tests/fuzz"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"),
               f"--rootdir={file.parent}", "-o", f"pythonpath={paths}", "-p", "conftest", "--collect-only", "-q",
               *options, str(file)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def selected(file: Path, *options: str) -> list[str]:
    """Returns the names of the tests that pytest collects with tests/conftest.py and the options."""
    return [line.partition("::")[2] for line in collected(file, *options).splitlines() if "::" in line]


@pytest.mark.slow
def test_products_divides_the_cases_of_large_tests_alone(file: Path) -> None:
    every, parts = selected(file), [selected(file, "--products", f"{k}/2") for k in (1, 2)]
    small = {name for name in every if "many_cases" not in name}
    assert len(small) == 6 and all(small <= set(part) for part in parts)
    assert sorted([*parts[0], *parts[1]]) == sorted([*every, *small])
    assert all(10 <= len(part) - 6 <= 30 for part in parts)


@pytest.fixture
def share_of(pytestconfig: pytest.Config) -> Callable[[str], tuple[int, int]]:
    return pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests/conftest.py")).share_of


@pytest.mark.parametrize(("commit", "number"), [("6", 7), ("7", 1), ("f" * 40, 2), ("", 1)])
def test_the_commit_chooses_the_share(share_of, commit: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command[-2:])
        return subprocess.CompletedProcess(command, 0, commit + "\n", "")

    monkeypatch.setattr(subprocess, "run", answer)
    assert share_of("7") == (number, 7) and asked == [["rev-parse", "HEAD"]]
    assert share_of("3/7") == (3, 7) and len(asked) == 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "0"])
def test_a_share_that_is_none_is_refused(share_of, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=rf"--share is {text}, wanted K/N"):
        share_of(text)


@pytest.mark.slow
def test_the_share_is_printed(file: Path) -> None:
    assert "share 2 of 3; --share 2/3 repeats it" in collected(file, "--share", "2/3")


def test_the_values_that_are_not_of_the_first_tier_are_slow() -> None:
    fast, slow = first(["a", "b"], ["a"])
    assert fast == "a" and slow.values == ("b",) and [mark.name for mark in slow.marks] == ["slow"]
    with pytest.raises(ValueError, match=r"\['c'\] are not among \['a', 'b'\]"):
        first(["a", "b"], ["c"])


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    return torch.rand(4)


def test_a_fixture_of_a_module_is_seeded_and_the_random_state_stays(
    request: pytest.FixtureRequest,
) -> None:
    torch.rand(3)
    before = torch.get_rng_state()
    found = request.getfixturevalue("drawn")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found, torch.rand(4, generator=torch.Generator().manual_seed(0)))
