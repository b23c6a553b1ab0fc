"""Tests that operators read no byte beyond a packed weight: a tensor of a file may end at the last page of the file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("guarded.py")
SECONDS = 500  # time limit of the program, which takes about 30 s

pytestmark = [
    pytest.mark.cpu_only("it is about CPU kernels"),
    pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called as on Linux"),
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), *sys.path])}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)


@pytest.mark.slow
def test_no_read_beyond_a_part_of_a_weight() -> None:
    done = run()
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stdout[-200:]}{done.stderr}"
    assert done.stdout.endswith(" calls, 0 differ\n")


def test_a_layout_that_does_not_fit_is_refused_or_reads_within_the_parts() -> None:
    done = run("layouts")
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stdout[-2000:]}{done.stderr}"
    refused, computed, wrong = map(int, re.findall(r"(\d+) \w+", done.stdout.splitlines()[-1]))
    assert refused > computed > 0 == wrong


def test_a_read_beyond_a_part_ends_the_process() -> None:
    done = run("beyond")
    assert done.returncode == -signal.SIGSEGV, done.stderr
