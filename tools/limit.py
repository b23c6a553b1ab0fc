"""Runs a command with a time limit. At the limit, ends the command and its descendants, and prints these processes.

    python tools/limit.py SECONDS COMMAND...

The exit status is the command's, or 124 if the command was ended. A Python process receives SIGABRT first, so that a
process with faulthandler (as under pytest) writes the stack of every thread before the process ends; another process
receives SIGTERM. A process that still runs after 10 seconds, or when the command itself has ended, receives SIGKILL.
limit.py needs the package psutil.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import psutil

ENDED = 124  # The exit status if the command was ended at the limit, as timeout(1) has it.
GRACE = 10.0  # Largest number of seconds from the first signals until SIGKILL.


def run(command: Sequence[str], seconds: float, **how: Any) -> int:
    """Runs the command for at most ``seconds``. Returns the command's exit status as a shell reports it, or ENDED if
    the command was ended. ``how`` is passed to ``subprocess.Popen``."""
    process = subprocess.Popen(command, **how)
    try:
        code = process.wait(timeout=seconds)
        return code if code >= 0 else 128 - code
    except subprocess.TimeoutExpired:
        shown = " ".join(command)
        print(f"\nlimit: this did not end in {seconds:g} s and is ended: {shown}", file=sys.stderr, flush=True)
        end(process)
        print(f"limit: ended after {seconds:g} s: {shown}", file=sys.stderr, flush=True)
        return ENDED
    # After Ctrl-C, the terminal has sent SIGINT to the command as well, so that the command ends in its own way.
    except KeyboardInterrupt:
        return process.wait()


def end(process: subprocess.Popen) -> None:
    """Ends the process and its descendants, also descendants that start meanwhile."""
    parent = psutil.Process(process.pid)
    until = time.monotonic() + GRACE
    asked: set[psutil.Process] = set()
    while time.monotonic() < until and parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
        # The youngest process gets its signal first, because a launcher that ends would end its children before they
        # have written their stacks.
        found = [*reversed(parent.children(recursive=True)), parent]
        for each in (each for each in found if each not in asked):
            print(f"limit: process {_shown(each)}", file=sys.stderr, flush=True)
            _send(each, signal.SIGABRT if _is_python(each) else signal.SIGTERM)
            asked.add(each)
        psutil.wait_procs([*asked], timeout=0.5)
    for each in {*asked, *(parent.children(recursive=True) if parent.is_running() else ()), parent}:
        _send(each, signal.SIGKILL)
    process.wait()


def _is_python(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("python")
    except psutil.Error:
        return False


def _shown(process: psutil.Process) -> str:
    try:
        return (
            f"{process.pid}, {process.status()}, {process.cpu_times().user:.0f} s: {' '.join(process.cmdline())[:200]}"
        )
    except psutil.Error:
        return f"{process.pid}, gone"


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)  # psutil signals no other process that got the same id
    except psutil.NoSuchProcess:
        pass


def main() -> int:
    if len(sys.argv) < 3:
        sys.exit("usage: python tools/limit.py SECONDS COMMAND...")
    return run(sys.argv[2:], float(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
