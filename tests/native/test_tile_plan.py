"""Tests the plan that divides the tile kernels' work among threads, by enumeration in C++: see
tests/native/tile_plan.cpp.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from plan_program import compiled, of_plans

pytestmark = of_plans


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("tile_plan", tmp_path_factory.mktemp("plan"))


@pytest.mark.slow
def test_every_plan_ends_covers_each_tile_once_and_is_balanced(program: Path) -> None:
    """Covers a choice from 1 to 512 threads, 1 to 16,384 tokens and the layers of ten model families; `make threads`
    runs all.
    """
    found = subprocess.run([program, "check", "512", "some"], capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout
    assert " 0 broken" in found.stdout


@pytest.mark.parametrize(("threads", "tokens", "rows", "depth"), [(16, 2048, 192, 576), (7, 777, 576, 1536)])
def test_what_once_had_no_end(program: Path, threads: int, tokens: int, rows: int, depth: int) -> None:
    args = ["cost", str(threads), str(tokens), str(rows), str(depth), "1"]
    found = subprocess.run([program, *args], capture_output=True, text=True, timeout=60, check=True)
    parts, _blocks, _whole, share, _decoded = map(float, found.stdout.split())
    assert parts == threads
    assert share < 1.1


@pytest.mark.parametrize("threads", [1, 2, 7, 16, 64, 96, 192])
@pytest.mark.parametrize(("tokens", "columns"), [(512, 4096), (1024, 4096), (2048, 8192), (1024, 576), (64, 1536)])
def test_parts_with_dropout_use_all_draws(program: Path, threads: int, tokens: int, columns: int) -> None:
    """A part has whole groups of 128 draws. Wide layers have enough parts of 512 columns: a cache line of the mask."""
    args = ["columns", str(threads), str(tokens), str(columns), "8"]
    found = subprocess.run([program, *args], capture_output=True, text=True, timeout=60, check=True)
    width = int(found.stdout)
    assert width in (128, 256, 512)
    if threads <= 64 and tokens >= 512 and columns >= 4096:
        assert width == 512
