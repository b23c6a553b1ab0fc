"""Tests what tools/mutations.py reads and prints; ``make mutations`` runs the mutations themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
mutations = pytest.importorskip("mutations", reason="tools/ is not here: not a checkout")

FOUND = """
[a sum]
part = one
file = a.py
old = x = y + 1
new = x = y - 1
likely = tests/test_a.py::test_a tests/test_b.py

[a product]
part = two
file = csrc/b.cpp
old = z * 2
new = z * 3
likely = tests/test_b.py
"""

TWO_TIERS = """
import pytest

@pytest.mark.slow
def test_a():
    pass

def test_b():
    pass
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in {"a.py": "x = y + 1\n", "csrc/b.cpp": "z * 2;\n", "tests/test_a.py": "", "tests/test_b.py": "",
                       "tests/mutations.ini": FOUND}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_mutations_are_read_those_of_python_first(root: Path) -> None:
    found = mutations.read_mutations(root / "tests/mutations.ini")
    assert [(each.name, each.part, each.native) for each in found] == [
        ("a sum", "one", False),
        ("a product", "two", True),
    ]
    assert (found[0].old, found[0].new) == ("x = y + 1", "x = y - 1")
    assert found[0].likely == ("tests/test_a.py::test_a", "tests/test_b.py")
    assert mutations.problems(found, root) == []


def test_a_text_that_is_not_there_once_is_a_problem(root: Path) -> None:
    found = mutations.read_mutations(root / "tests/mutations.ini")
    (root / "a.py").write_text("x = y + 1\nx = y + 1\n")
    (root / "csrc/b.cpp").unlink()
    (root / "tests/test_a.py").unlink()
    twice, missing, gone = mutations.problems(found, root)
    assert "a.py holds the old text 2 times, wanted once" in twice and "a product" in gone
    assert "the likely test tests/test_a.py::test_a is not there" in missing


def test_results_outlive_other_results_and_mutations_that_are_gone(root: Path) -> None:
    first, second = mutations.read_mutations(root / "tests/mutations.ini")
    table = root / "tests/mutations.tsv"
    results = {first.name: {"all": "tests/test_a.py::test_a", "all_seconds": "3"}, "gone": {"all": "survived"}}
    mutations.write_results(results, [first, second], table)
    found = mutations.read_results(table)
    assert found.keys() == {first.name, second.name} and found[first.name]["digest"] == first.digest
    assert mutations.summary(found, [first, second]) == (
        "fast 0 of 2 killed (2 not run), all 1 of 2 killed (1 not run)"
    )
    found[first.name]["digest"] = "of another text"
    assert mutations.summary(found, [first, second]) == (
        "fast 0 of 2 killed (2 not run), all 0 of 2 killed (2 not run)"
    )


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("FAILED tests/a.py::test_b[a - b] - assert x[1]\n", "tests/a.py::test_b[a - b]"),
        ("FAILED tests/a.py::test_b[1]\n", "tests/a.py::test_b[1]"),
        ("ERROR tests/a.py\n", "tests/a.py"),
        ("tests/a.py::test_a PASSED [ 50%]\ntests/a.py::test_b Fatal Python error: Aborted\n", "tests/a.py::test_b"),
        ("ImportError while loading conftest '/x/tests/conftest.py'.\n", "tests/conftest.py"),
        ("1 passed\n", None),
    ],
)
def test_the_first_failing_test_is_named(said: str, found: str | None) -> None:
    assert mutations.failed_test(said) == found


@pytest.mark.slow
def test_a_killer_that_is_no_longer_in_its_tier_is_named(root: Path) -> None:
    (root / "tests/test_a.py").write_text(TWO_TIERS)
    (root / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    first, second = mutations.read_mutations(root / "tests/mutations.ini")
    row = {"fast": "tests/test_a.py::test_a", "all": "tests/test_a.py::test_a", "digest": first.digest}
    of_another = {"fast": "tests/test_a.py::test_gone", "digest": "of another text"}
    results = {first.name: row, second.name: of_another}
    found = mutations.killers_that_left(results, [first, second], root)
    assert found == ["a sum: tests/test_a.py::test_a is not in the tier fast"]
    row["fast"] = "tests/test_a.py::test_b"
    assert mutations.killers_that_left(results, [first, second], root) == []


class Ran:
    """A copy of the checkout in which every test that runs on the emulator fails."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def mutate(self, mutation: mutations.Mutation) -> None:
        self.commands.append([mutation.name])

    def restore(self) -> None:
        pass

    def build(self, is_whole: bool = False) -> bool:
        return True

    def test(self, arguments: list[str], seconds: float) -> str | None:
        self.commands.append(arguments)
        return "tests/test_b.py::test_b" if "emulated" in arguments else None


def test_mutations_of_cuda_kernels_are_tested_on_the_emulator(root: Path) -> None:
    path = root / "tests/mutations.ini"
    path.write_text(f"{FOUND}device = emulated\n")
    _, kernel = mutations.read_mutations(path)
    assert mutations.killer(copy := Ran(), kernel, "fast", True) == mutations.SURVIVED and copy.commands == []
    assert mutations.killer(copy, kernel, "all", True) == "on the emulator: tests/test_b.py::test_b"
    assert copy.commands[-1][:2] == ["--device", "emulated"] and copy.commands[-1][-1] == "tests/test_b.py"
    failing = mutations.control(copy, {"on the emulator: tests/test_b.py::test_b", "tests/test_a.py::test_a"}, False)
    assert failing == {"on the emulator: tests/test_b.py::test_b"}  # it fails without the mutation as well
