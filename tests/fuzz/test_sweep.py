"""Runs 2,000 cases of the shape sweep with fixed seeds, on this machine's CPU paths in turn; see ``sweep.py``."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sweep

CHUNKS, CHUNK = 20, 100
SMALL_CHUNK = 50  # number of cases of a test under the emulator or a sanitizer


@pytest.fixture(autouse=True)
def _a_case_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> Iterator[None]:
    """Lets the sweep name a hanging case on pytest's own standard error, because captured output would be lost."""
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        stderr = os.dup(2)
    monkeypatch.setattr(sweep, "STDERR", stderr)
    yield
    os.close(stderr)


@pytest.mark.parametrize("chunk", [0, *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in range(1, CHUNKS))])
def test_random_calls_agree_with_float64(chunk: int, pytestconfig: pytest.Config) -> None:
    device = pytestconfig.getoption("--device")
    if device == "cuda":
        pytest.skip("the sweep draws for the CPU and for the emulator")
    small = device == "emulated" or bool(os.environ.get("PEFT_EXT_SANITIZER"))
    count = SMALL_CHUNK if small else CHUNK
    isa = sweep.EMULATED if device == "emulated" else None
    counts, failures = sweep.sweep(range(chunk * CHUNK, chunk * CHUNK + count), isa=isa, small=small)
    assert counts["cases"] == count
    assert not failures, "\n".join(failures)


def test_the_sweep_draws_every_operator_and_path() -> None:
    drawn = [sweep.draw(seed) for seed in range(CHUNKS * CHUNK)]
    apart = {"dropout", "scaled_dot_product_attention"}  # operators whose cases come from other seeds
    assert {case.case.public for case in drawn} == {*sweep.makers(random.Random(0)), *apart}
    assert {case.isa for case in drawn} == set(sweep._native.STATE.module.isas())
    threads = {case.threads for case in drawn}
    assert {1, 2, 3, 4, 5, 7} <= threads and 100 < max(threads) <= sweep.MANY and len(threads) > 50
    assert 12 <= max(sweep.draw(seed, small=True).threads for seed in range(CHUNKS * CHUNK)) <= 16
    sizes = [size for case in drawn for size in (*case.shape[0], *case.shape[1:])]
    assert min(sizes) == 0 and max(sizes) > 50_000
    assert {layout for case in drawn for layout in case.layouts} == set(sweep.LAYOUTS)


def test_a_failure_is_reported_with_the_line_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "check", lambda drawn: (_ for _ in ()).throw(AssertionError("wrong")))
    counts, failures = sweep.sweep(range(3, 4))
    assert len(failures) == 1 and failures[0].endswith(f"python tests/fuzz/sweep.py --seed 3 --isa {sweep.draw(3).isa}")
    assert sweep.main(["--seed", "3"]) == 1
    assert "1 failed" in capsys.readouterr().out


HANGS = """
import ctypes, sweep, test_sweep
def test_hangs(monkeypatch, pytestconfig):
    monkeypatch.setattr(sweep, "SLOW", 1.0)
    monkeypatch.setattr(sweep, "check", lambda drawn: ctypes.CDLL(None).pause())
    sweep.sweep(range(3, 4))
from test_sweep import _a_case_that_hangs_is_named
"""


@pytest.mark.slow
def test_a_case_that_hangs_is_named_and_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(HANGS)
    here = Path(__file__).parent
    paths = " ".join(map(str, (here, here.parent, here.parent / "support", here.parents[1])))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", str(here.parents[1] / "pyproject.toml"),
               f"--rootdir={tmp_path}", "-o", "faulthandler_timeout=4", "-o", f"pythonpath={paths}",
               "-p", "conftest", str(tmp_path / "test_it.py")]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == 1 and "Timeout" in done.stdout, done.stdout
    assert f"still running after 1 s: {sweep.draw(3)}\n  {sweep.draw(3).reproducer()}\n" in done.stdout, done.stdout
