"""Tests that operators on many threads, also on more threads than cores, end and give the bits of one thread.

For each number of threads a process runs ``threads.py``, which prints the name of each call before the call runs. The
test ends a process that hangs and names the call. ``make threads`` runs all numbers of threads and all calls
(PEFT_EXT_TEST_THREADS=all); a usual test run has a part of them.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "threads.py"
ALL = os.environ.get("PEFT_EXT_TEST_THREADS") == "all"
COUNTS = (3, 5, 7, 12, 16, 24, 48, 96) if ALL else (3, 7, 16, 96)
SECONDS = 180  # time limit of a call, which takes about 0.01 s, or 1 s for 96 threads on two busy cores
MOST_HANGS = 3

pytestmark = [pytest.mark.slow, pytest.mark.cpu_only("it is about CPU threads")]


def lines(process: subprocess.Popen[str], seconds: float) -> Iterator[str]:
    """Yields the lines that the process prints, until the process ends or prints nothing for ``seconds``."""
    printed: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            printed.put(line.rstrip("\n"))
        printed.put("")

    threading.Thread(target=read, daemon=True).start()
    try:
        while line := printed.get(timeout=seconds):
            yield line
        process.wait(timeout=seconds)
    except (queue.Empty, subprocess.TimeoutExpired):
        return


def outcome(threads: int, *options: str, seconds: float = SECONDS) -> tuple[list[str], str]:
    """Returns the errors on ``threads`` threads, and the last line that the process printed."""
    # With the policy "active", waiting threads would spin and keep cores from working threads.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_DYNAMIC": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    wrong, after = [], 0
    while len(wrong) < MOST_HANGS:
        command = [sys.executable, str(SCRIPT), str(threads), "--after", str(after), *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        last = ""
        try:
            for line in lines(process, seconds):
                number, _, call = line.partition(" ")
                last = line
                if number.isdigit() and "calls on" not in line:
                    after, running = int(number) + 1, call
                elif line.startswith("differs"):
                    wrong.append(line)
            if process.poll() is not None:
                wrong += [f"exit status {process.returncode}: {last}"] if process.returncode and not wrong else []
                return wrong, last
            wrong.append(f"hangs on {threads} threads: {running}")
        finally:
            process.kill()
            process.wait()
    return wrong, last


@pytest.mark.parametrize("threads", COUNTS)
def test_any_count_of_threads_has_the_bits_of_one(threads: int) -> None:
    wrong, last = outcome(threads, *([] if ALL else ["--few"]))
    assert not wrong, "\n".join(wrong)
    assert f" calls on {threads} threads, " in last and last.endswith(": 0 differ")


def test_a_call_that_hangs_and_one_that_differs_are_named(tmp_path: Path) -> None:
    """The faults are planted in the calls of the script, so that no faulty build is needed."""
    planted = (
        "import sys, time; sys.path.insert(0, {folder!r}); import threads\n"
        "class Planted:\n"
        "    def __init__(self, name): self.name = name\n"
        "    def __str__(self): return self.name\n"
        "    def differing(self, threads):\n"
        "        if self.name == 'slow': time.sleep(10**6)\n"
        "        return ['y by 1'] if self.name == 'wrong' else []\n"
        "threads.calls = lambda few: map(Planted, ('good', 'wrong', 'slow', 'good too'))\n"
        "sys.exit(threads.main())\n"
    )
    script = tmp_path / "planted.py"
    script.write_text(planted.format(folder=str(SCRIPT.parent)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "SCRIPT", script)
        patch.setenv("PYTHONPATH", str(SCRIPT.parents[2]))
        wrong, last = outcome(2, seconds=20)
    assert wrong == ["differs on 2 threads from 1: wrong: y by 1", "hangs on 2 threads: slow"], wrong
    assert last.startswith("1 calls on 2 threads")
