"""Runs contenders in processes of their own, which take their steps in turn.

Each contender has the memory of a process to itself, so that the peak memory of the process is the contender's. All
contenders take a step before one takes its next step, so that a change of the machine's speed alters all of them alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Optional

DONE = "# done"  # the line that a process prints after it took the steps that it was asked for


class _Contender:
    """A process that runs :func:`serve`. The process is killed once it has taken ``limit`` seconds, of which the steps
    of other contenders are no part; None: never."""

    def __init__(self, command: list[str], limit: Optional[float]) -> None:
        self.command, self.limit, self.left, self.is_late = command, limit, limit, False
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _kill(self) -> None:
        self.is_late = True
        self.process.kill()

    @contextmanager
    def _limited(self) -> Iterator[None]:
        if self.left is None:
            yield
            return
        start, timer = time.monotonic(), threading.Timer(max(self.left, 0), self._kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self.left -= time.monotonic() - start

    def lines(self) -> Iterator[str]:
        assert self.process.stdout is not None
        return iter(self.process.stdout.readline, "")

    def take(self, steps: int) -> None:
        """Has the process take ``steps`` steps and waits for them. If the process ends before, :meth:`figures` finds
        its error."""
        assert self.process.stdin is not None
        with self._limited(), suppress(BrokenPipeError):
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
            for line in self.lines():
                if line.strip() == DONE:
                    return

    def figures(self) -> dict[str, Any]:
        """Ends the process and returns the figures that it prints. Raises subprocess.SubprocessError if the process
        failed or was killed."""
        assert self.process.stdin is not None
        with self._limited():
            with suppress(BrokenPipeError):
                self.process.stdin.close()
            last = "".join(list(self.lines())[-1:])
            code = self.process.wait()
        if self.is_late:
            raise subprocess.TimeoutExpired(self.command, self.limit or 0)
        if code:
            raise subprocess.CalledProcessError(code, self.command)
        return json.loads(last)


def in_turn(
    commands: dict[str, list[str]], turns: list[int], limit: Optional[float]
) -> tuple[dict[str, dict[str, Any]], dict[str, subprocess.SubprocessError]]:
    """Runs each command in a process, which takes ``turns[0]`` steps, then ``turns[1]`` steps, and so on, each time
    after the others. Each process starts with its first turn, so that the first turns of all contenders do not overlap.
    With a single turn, a process starts after the process before it has ended.

    Returns the figures of each contender, and the error of each contender that failed.
    """
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, subprocess.SubprocessError] = {}
    for group in [commands] if len(turns) > 1 else [{kind: command} for kind, command in commands.items()]:
        contenders: dict[str, _Contender] = {}
        for steps in turns:
            for kind, command in group.items():
                if kind not in contenders:
                    contenders[kind] = _Contender(command, limit)
                contenders[kind].take(steps)
        for kind, contender in contenders.items():
            try:
                found[kind] = contender.figures()
            except subprocess.SubprocessError as error:
                failed[kind] = error
    return found, failed


def serve(run: Callable[[int], None], figures: Callable[[], dict[str, Any]]) -> None:
    """Calls ``run`` with each number of steps that :func:`in_turn` asks for, and prints ``figures()`` at the end."""
    for line in sys.stdin:
        run(int(line))
        print(f"\n{DONE}", flush=True)
    print(f"\n{json.dumps(figures())}", flush=True)
