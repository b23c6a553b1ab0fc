"""Tests the plan that decides which experts all threads compute together, by enumeration in C++: see
tests/native/run_plan.cpp.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from plan_program import compiled, of_plans

pytestmark = of_plans


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("run_plan", tmp_path_factory.mktemp("plan"))


def test_no_other_plan_is_much_faster(program: Path) -> None:
    """Covers 1 to 512 threads, 1 to 256 experts and up to 16,384 rows, divided evenly and unevenly."""
    found = subprocess.run([program, "check"], capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout
    plans, _, broken, *_, worst = found.stdout.replace(" of the best", "").split()
    assert (int(plans), int(broken)) == (3600, 0)
    assert float(worst) < 1.2


# Rows of 64 experts of which each token chooses 4 at random, 512 tokens.
USUAL = [24 + i % 17 for i in range(64)]


@pytest.mark.parametrize(
    ("threads", "k", "n", "rows", "together"),
    [
        (1, 4096, 4096, [4096, 1], 0),  # a single thread computes all runs
        (64, 256, 512, USUAL, 0),  # each thread computes about one expert
        (2, 256, 512, USUAL, 0),
        (64, 256, 512, [4096, *USUAL], 1),  # one thread would compute the long expert for as long as 128 others
        (64, 4096, 14336, [64] * 8, 8),  # fewer experts than threads, with much work
        (96, 256, 512, [2] * 8, 0),  # to wake all threads takes longer than to compute an expert
    ],
)
def test_long_runs_are_computed_together(
    program: Path, threads: int, k: int, n: int, rows: list[int], together: int
) -> None:
    args = map(str, ["count", threads, k * n, n, *rows])
    found = subprocess.run([program, *args], capture_output=True, text=True, timeout=60, check=True)
    assert int(found.stdout) == together
