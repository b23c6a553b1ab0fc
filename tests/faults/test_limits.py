"""Tests the time limits: hanging tests (in native code, or with the GIL) and commands are ended and named."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

if os.name != "posix":
    pytest.skip("pause() is POSIX's", allow_module_level=True)

ROOT = Path(__file__).parents[2]
HANGS = {  # with the GIL held, no Python thread can interrupt the test; PyTorch's operators release the GIL
    "native": "ctypes.CDLL(None).pause()",
    "native with the GIL": "ctypes.PyDLL(None).pause()",
    "native loop": "hashlib.pbkdf2_hmac('sha256', b'a', b'b', 2**31 - 1)",
}
TESTS = """
import ctypes, hashlib
def test_before(): pass
def test_hangs(): {hang}
def test_after(): pass
"""


def ended(command: list[str], cwd: Path, seconds: float = 300) -> tuple[int, str]:
    """Returns exit status and output. Fails after ``seconds``, many times the usual duration."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=seconds)  # fmt: skip
    return done.returncode, done.stdout


def under_pytest(folder: Path, hang: str, *options: str) -> tuple[int, str]:
    """Runs pytest with the options of pyproject.toml and a shorter time limit."""
    (folder / "test_it.py").write_text(TESTS.format(hang=hang))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"),
               f"--rootdir={folder}", *options, str(folder / "test_it.py")]  # fmt: skip
    return ended(command, folder)


@pytest.mark.slow
@pytest.mark.parametrize("hang", HANGS)
def test_a_test_that_hangs_ends_the_run_with_its_stack(tmp_path: Path, hang: str) -> None:
    code, out = under_pytest(tmp_path, HANGS[hang], "-o", "faulthandler_timeout=2")
    assert code == 1 and "Timeout (0:00:02)!" in out and "in test_hangs" in out and "passed" not in out, out


@pytest.mark.slow
@pytest.mark.parametrize("hang", HANGS)
def test_a_worker_that_hangs_is_named_and_the_others_go_on(tmp_path: Path, hang: str) -> None:
    pytest.importorskip("xdist")
    code, out = under_pytest(tmp_path, HANGS[hang], "-n", "2", "-o", "faulthandler_timeout=2")
    assert code == 1 and "crashed while running 'test_it.py::test_hangs'" in out, out
    assert "1 failed, 2 passed" in out and "in test_hangs" in out, out


def test_every_test_has_a_limit(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("faulthandler_exit_on_timeout")
    assert 0 < float(pytestconfig.getini("faulthandler_timeout")) <= 900 or os.environ.get("PEFT_EXT_TEST_KILLS")


def limited(seconds: float, *command: str, cwd: Path) -> tuple[int, str]:
    return ended([sys.executable, str(ROOT / "tools/limit.py"), str(seconds), *command], cwd)


def test_a_command_that_ends_has_its_own_status(tmp_path: Path) -> None:
    assert limited(200, sys.executable, "-c", "print('said')", cwd=tmp_path) == (0, "said\n")
    assert limited(200, sys.executable, "-c", "raise SystemExit(3)", cwd=tmp_path) == (3, "")
    assert limited(200, "sh", "-c", "kill -9 $$", cwd=tmp_path) == (137, "")


def test_a_command_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """Tests a command with a grandchild in a session of its own, like torchrun's children; each process dumps its
    stack.
    """
    child = "import faulthandler, os, ctypes; faulthandler.enable(); os.setsid(); open(str(os.getpid()), 'w').close()"
    (tmp_path / "child.py").write_text(f"{child}\ndef inner(): ctypes.PyDLL(None).pause()\ninner()\n")
    parent = "import subprocess, sys, time; subprocess.Popen([sys.executable, 'child.py']); time.sleep(10**6)"
    start = time.monotonic()
    code, out = limited(5, sys.executable, "-c", parent, cwd=tmp_path)
    assert code == 124 and time.monotonic() - start >= 5, out
    assert "limit: this did not end in 5 s and is ended: " in out, out
    children = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    assert len(children) == 1 and "child.py" in out and "in inner" in out, out
    assert not any(runs(number) for number in children)


def runs(number: int) -> bool:
    """Returns whether the process runs. An ended process is a zombie until its parent reads its status."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
