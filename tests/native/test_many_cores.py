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


def test_every_operator_is_recorded_in_every_column_and_measured(records: many_cores.Records) -> None:
    assert records.operators == list(recorded_loops.steps())
    for operator in records.operators:
        directions = records.directions(operator)
        assert directions in (["forward", "backward"], ["forward"])
        for direction in directions:
            assert all((operator, direction, threads) in records.rows for threads in (1, 2, *many_cores.THREADS))
            assert all(records.times[operator, direction, threads] > 0 for threads in (1, 2))


def planted_row(operator: str, direction: str, threads: int, seconds: float) -> dict:
    """Returns a row whose loop takes ``seconds`` on one thread, and is divided evenly among the threads."""
    loop = {"name": "loop", "parts": threads, "sum": seconds, "most": seconds / threads, "accesses": 8 * threads,
            "most_accesses": 8, "l2": 0, "l3": 0, "most_l3": 0, "dram": 0, "most_dram": 0, "shared": 0,
            "most_taken": 0}  # fmt: skip
    many = threads > 1
    return {"operator": operator, "direction": direction, "threads": threads, "isa": "avx512", "teams": int(many),
            "serial": 0.0 if many else seconds, "pages": [0, 0], "huge_pages": [0, 0],
            "loops": [loop] if many else []}  # fmt: skip


def test_an_operator_without_a_gradient_has_a_forward_alone() -> None:
    counts = (1, 2, *many_cores.THREADS)
    rows = [planted_row("step", direction, threads, 3e-3) for direction in many_cores.DIRECTIONS for threads in counts]
    rows += [planted_row("token", "forward", threads, 1e-3) for threads in counts]
    found = many_cores.Records({"times": [], "rows": rows})
    assert (found.directions("step"), found.directions("token")) == (["forward", "backward"], ["forward"])
    starts = many_cores.ONE_SOCKET.start_seconds(64)
    for operator, ideal, loops in (("step", 6e-3 / 64, 2), ("token", 1e-3 / 64, 1)):
        assert found.cost(operator, 64, many_cores.ONE_SOCKET).total == pytest.approx(1 + loops * starts / ideal)
    for draw in (many_cores.counts_table, many_cores.check_table):
        drawn = [line.split(" | ")[:2] for line in draw(found).splitlines()[2:]]
        assert drawn == [["| step", "forward"], ["| step", "backward"], ["| token", "forward"]]
    assert "token, forward: ideal 16 µs" in many_cores.loops_text(found, 64)


def test_a_record_of_some_operators_keeps_the_rows_of_the_others() -> None:
    def rows(seconds: float, *operators: str) -> list[dict]:
        return [{"operator": operator, "seconds": seconds} for operator in operators]

    kept = {"times": rows(1.0, "empty loop", "a", "removed", "c"), "rows": rows(1.0, "c", "a", "a", "removed")}
    new = {"times": rows(2.0, "empty loop", "b", "c"), "rows": rows(2.0, "b", "c", "c")}
    assert many_cores.merged(kept, new, ["a", "b", "c"]) == {
        "times": rows(2.0, "empty loop") + rows(1.0, "a") + rows(2.0, "b", "c"),
        "rows": rows(1.0, "a", "a") + rows(2.0, "b", "c", "c"),
    }


def test_only_operators_without_a_kept_record_are_traced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def child(function: str, site: Path, *, names: list[str], threads: list[int], repeats: int) -> list[dict]:
        assert (function, site, threads, repeats) == ("record_here", tmp_path / "site", [16], 1)
        asked.append(names)
        return [{"operator": name, "turn": len(asked)} for name in names]

    (tmp_path / "libtraced.so").touch()
    monkeypatch.setattr(recorded_loops, "BUILD", tmp_path)
    monkeypatch.setattr(recorded_loops, "build_traced", lambda: tmp_path / "site")
    monkeypatch.setattr(recorded_loops, "child", child)
    found = [recorded_loops.traced_rows(16, names) for names in (["a"], ["a", "b"], ["b"])]
    assert asked == [["a"], ["b"]]
    a, b = {"operator": "a", "turn": 1}, {"operator": "b", "turn": 2}
    assert found == [[a], [a, b], [b]]
    kept = tmp_path / "traced16.json"
    os.utime(tmp_path / "libtraced.so", (kept.stat().st_mtime + 1,) * 2)  # the library was built again
    assert recorded_loops.traced_rows(16, ["b"]) == [{"operator": "b", "turn": 3}] and asked[2:] == [["b"]]


def test_only_known_operators_are_recorded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(many_cores, "record", lambda names: pytest.fail("something is recorded"))
    monkeypatch.setattr(sys, "argv", ["many_cores.py", "--only", "norm", "nonsense"])
    with pytest.raises(SystemExit):
        many_cores.main()
    assert "--only: 'nonsense' is in no name of LoRA, dropout 0.05, 576 x 576; " in capsys.readouterr().err


@pytest.mark.slow
@needs_tools
@pytest.mark.parametrize("operator", first([
    "LoRA, dropout 0.05, 576 x 576", "attention, causal, 1024 tokens, 32 heads", "RMS norm, 4096", "SiLU gate, 14336",
    "LoRA on 64 experts, dropout 0.05, 512 x 256, 4 a token", "decoder layer over NF4 with LoRA, 4096, one token",
    "q, k, v with LoRA, dropout 0.05, (4096, 1024, 1024) x 4096", "LoRA over MXFP4, dropout 0.05, 4096 x 4096",
], ["RMS norm, 4096"]))  # fmt: skip
def test_the_records_are_of_these_kernels(records: many_cores.Records, operator: str) -> None:
    """Compares the loops, and their numbers of parts, with a new record on 64 threads."""
    kept = {direction: records.rows[operator, direction, 64] for direction in records.directions(operator)}
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
