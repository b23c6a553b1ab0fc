"""Tests the records of parallel loops and the tables of docs/performance.md that tools/many_cores.py computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import first

import peft_ext

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import many_cores  # noqa: E402
import native_build  # noqa: E402
import recorded_loops  # noqa: E402

needs_tools = pytest.mark.skipif(
    sys.platform != "linux" or native_build.missing_tools() is not None, reason="no Linux, g++ or ninja"
)
pytestmark = pytest.mark.cpu_only("the records are of the CPU")

PLANTED = """
import ctypes, sys, torch
torch.set_num_threads(16)
recorder, planted = ctypes.CDLL(sys.argv[1]), ctypes.CDLL(sys.argv[2])
data = torch.zeros(1 << 16)
assert data.data_ptr() % 64 == 0
planted.planted(ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(16))
recorder.record_start(16, 8, ctypes.c_int64(1 << 20), 1)
planted.planted(ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(16))
recorder.record_stop(sys.argv[3].encode())
"""


@pytest.fixture(scope="module")
def records() -> many_cores.Records:
    return many_cores.Records(json.loads(many_cores.RECORDS.read_text()))


def test_the_tables_show_the_records(records: many_cores.Records) -> None:
    assert many_cores.drawn(many_cores.DOCUMENT.read_text()).strip() == many_cores.table(records)


@pytest.mark.slow
@needs_tools
@pytest.mark.parametrize("operator", first([
    "LoRA, dropout 0.05, 576 x 576", "attention, causal, 1024 tokens, 32 heads", "RMS norm, 4096", "SiLU gate, 14336",
], ["RMS norm, 4096"]))  # fmt: skip
def test_the_records_are_of_these_kernels(records: many_cores.Records, operator: str) -> None:
    """Compares loops and numbers of parts, and no times, with a new record on 64 threads."""
    kept = {direction: records.rows[operator, direction, 64] for direction in many_cores.DIRECTIONS}
    if peft_ext._native.STATE.isa != kept["forward"]["isa"]:
        pytest.skip("the records are of another CPU path")
    for row in recorded_loops.child("record_here", names=[operator], threads=[64], repeats=1):
        found = [(loop["name"], len(loop["parts"])) for loop in row["loops"]]
        assert found == [(loop["name"], loop["parts"]) for loop in kept[row["direction"]]["loops"]], (
            "the kernels divide their work otherwise: run tools/many_cores.py"
        )
        assert row["teams"] == len(found)


@needs_tools
def test_planted_accesses_are_counted(tmp_path: Path) -> None:
    library, out = tmp_path / "planted.so", tmp_path / "record.json"
    source = ROOT / "tests/native/recorded_planted.cpp"
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        "-fsanitize=thread",
        "--param",
        "tsan-instrument-func-entry-exit=0",
    ]
    subprocess.run(["g++", *flags, "-c", source, "-o", tmp_path / "planted.o"], check=True)
    subprocess.run(["g++", "-shared", tmp_path / "planted.o", "-o", library], check=True)
    recorder = str(recorded_loops.build_recorder())
    subprocess.run([sys.executable, "-c", PLANTED, recorder, str(library), str(out)], check=True,
                   env={**os.environ, "LD_PRELOAD": recorder, "OMP_WAIT_POLICY": "passive"})  # fmt: skip
    one, page, twice = json.loads(out.read_text())["loops"]
    taken, dram = recorded_loops.TAKEN, recorded_loops.FROM_DRAM
    assert [len(loop["parts"]) for loop in (one, page, twice)] == [16, 16, 16]
    assert (one["shared"], sum(part[taken] for part in one["parts"])) == (1, 15)
    assert page["shared"] == 0
    lines = 256 * 1024 // 64
    for part in twice["parts"]:
        # Nearly all lines come from L2: only the last lines of the first reading are in the L1 at the start of the
        # second reading.
        assert 2 * lines - 512 <= part[recorded_loops.FROM_L2] <= 2 * lines + 8
        assert lines - 64 <= part[recorded_loops.FROM_L3] <= lines + 8
    groups = [sum(part[dram] for part in twice["parts"][first : first + 8]) for first in (0, 8)]
    assert all(lines - 64 <= group <= lines + 32 for group in groups)
