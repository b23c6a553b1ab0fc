"""Tests that contenders in processes of their own take their steps in turn."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
pytest.importorskip("benchmarks", reason="benchmarks/ is not here: not a checkout")
turns = importlib.import_module("benchmarks.turns")

SERVE = """
import sys
sys.path.insert(0, {root!r})
from benchmarks.turns import serve
def run(steps):
    print("a line of a library", flush=True)
    open({log!r}, "a").write({name!r} * steps)
serve(run, lambda: {{"name": {name!r}}})
"""


def command(script):
    return [sys.executable, "-c", script]


def test_contenders_take_their_steps_in_turn(tmp_path):
    log = tmp_path / "log"
    commands = {name: command(SERVE.format(root=str(ROOT), log=str(log), name=name)) for name in "abc"}
    found, failed = turns.in_turn(commands, [1, 1, 3], None)
    assert found == {name: {"name": name} for name in "abc"} and failed == {}
    assert log.read_text() == "abcabcaaabbbccc"


def test_with_a_single_turn_one_contender_runs_at_a_time(tmp_path):
    log = tmp_path / "log"
    script = f"open({str(log)!r}, 'a').write('+'); {{}}; open({str(log)!r}, 'a').write('-')"
    serves = "exec({!r})"
    commands = {name: command(script.format(serves.format(SERVE.format(root=str(ROOT), log=str(log), name=name))))
                for name in "ab"}  # fmt: skip
    found, failed = turns.in_turn(commands, [2], None)
    assert list(found) == ["a", "b"] and failed == {} and log.read_text() == "+aa-+bb-"


@pytest.mark.slow
def test_a_contender_that_fails_or_is_late_leaves_the_others(tmp_path):
    serves = SERVE.format(root=str(ROOT), log=str(tmp_path / "log"), name="a")
    dies, sleeps = "raise SystemExit(3)", "import time; time.sleep(600)"
    commands = {"a": command(serves), "dies": command(dies), "sleeps": command(sleeps)}
    found, failed = turns.in_turn(commands, [1, 1], 5)
    assert found == {"a": {"name": "a"}} and (tmp_path / "log").read_text() == "aa"
    assert isinstance(failed["dies"], subprocess.CalledProcessError) and failed["dies"].returncode == 3
    assert isinstance(failed["sleeps"], subprocess.TimeoutExpired)
