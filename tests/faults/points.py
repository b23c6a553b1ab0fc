"""Forks the test's process and kills the fork at a chosen moment of its writing.

A moment is before or after a call that changes the disk, or in the middle of writing a file. With ``killed_at(0)``,
``killed_at(1)`` and so on, each in a fork of its own, a process is killed at every moment once.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

SECONDS = 600  # A forked test process is killed after this time.
NOBODY = 65534  # The number of a user who owns no files.


def forked(work: Callable[[], int], stdout: int = -1) -> tuple[int, str]:
    """Runs ``work`` in a fork.

    Returns the fork's exit code, or minus the signal that ended it, and its standard error.
    """
    child, stream = start(work, stdout)
    with stream:
        text = stream.read()
    return ended(child), text


@contextlib.contextmanager
def folder_of_nobody() -> Iterator[Path]:
    """Yields an empty folder that every user can read and write. pytest's folders are closed to other users."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def without_rights(work: Callable[[], object]) -> None:
    """Runs ``work`` in a fork that, as root, first becomes the user nobody: root may read and write every file."""

    def as_nobody() -> int:
        if os.geteuid() == 0:
            os.setuid(NOBODY)
        work()
        return 0

    assert forked(as_nobody) == (0, "")


def start(work: Callable[[], int], stdout: int = -1) -> tuple[int, io.TextIOWrapper]:
    """Forks; returns the process id and the fork's standard error.

    ``stdout`` is the fork's standard output: a descriptor, -1 for /dev/null, -2 for standard error.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            signal.alarm(SECONDS)
            os.dup2(write, 2)
            os.dup2({-1: os.open(os.devnull, os.O_WRONLY), -2: write}.get(stdout, stdout), 1)
            # pytest captures sys.stdout and sys.stderr; the fork writes to its own descriptors 1 and 2 instead.
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
            torch.set_num_threads(1)  # a fork lacks the threads of PyTorch's pool
            code = work()
        except SystemExit as end:
            code = end.code
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    return child, os.fdopen(read)


def ended(child: int) -> int:
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def killed_at(at: int, below: Path) -> None:
    """Makes this process kill itself at its ``at``-th moment (from 0) that concerns a file under ``below``."""
    import peft.peft_model
    import safetensors.torch

    from peft_ext import files
    from peft_ext.merge import writer

    calls = 0

    def moment(what: str, before: Callable[[], None] = lambda: None) -> None:
        nonlocal calls
        if calls == at:
            before()
            os.write(2, f"{what}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1

    def around(where: Any, name: str, half: bool = False) -> None:
        function = getattr(where, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            moment(f"before {name} {args[0] if args else ''}")
            result = function(*args, **kwargs)
            if half:
                path = next(a for a in (*args, *kwargs.values()) if isinstance(a, (str, os.PathLike)))
                moment(f"in {path}", lambda: os.truncate(path, os.path.getsize(path) // 2))
            moment(f"after {name} {args[-1] if args else ''}")
            return result

        setattr(where, name, call)

    for name in ("rename", "replace", "fsync", "mkdir", "link", "unlink", "remove", "rmdir"):
        around(os, name)
    for name in ("copy2", "copy", "copyfile"):
        around(files.shutil, name)
    around(files, "_exchange")
    around(torch, "save", half=True)
    around(peft.peft_model, "safe_save_file", half=True)
    around(safetensors.torch, "save_file", half=True)

    class Half(io.TextIOWrapper):
        """A text file that writes and flushes the first half of each text before the second half."""

        def write(self, text: str) -> int:
            super().write(text[: len(text) // 2])
            self.flush()
            moment(f"in {self.name}")
            super().write(text[len(text) // 2 :])
            return len(text)

    opened, write = builtins.open, writer.write_safetensors

    def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode not in ("w", "x") or not str(file).startswith(str(below)):
            return opened(file, mode, *args, **kwargs)
        moment(f"before open {file}")
        return Half(opened(file, f"{mode}b"), encoding=kwargs.get("encoding") or "utf-8")

    def write_(stream: Any, planned: Any, take: Callable[[str], Any], advance: Callable[[int], None]) -> None:
        def flushed(name: str) -> Any:
            stream.flush()
            moment(f"before {name} in {stream.name}")
            return take(name)

        write(stream, planned, flushed, advance)

    builtins.open, writer.write_safetensors = open_, write_
