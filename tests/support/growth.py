"""Measures leaks: the growth of memory per step in several windows of steps, and the lower quartile of the windows.

A process without a leak still allocates at times: a buffer of stdio, a block in malloc's cache of a thread, a string
that Python interns. The growth of a process without a leak is in some windows, and ends when the caches are full. The
last windows are judged; more windows are measured until the last windows are flat or MOST_WINDOWS are measured. A leak
is in every window, and therefore in the lower quartile of any windows.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest
import torch

WINDOWS, MOST_WINDOWS = 12, 60


class Mallinfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                 "keepcost")]  # fmt: skip


@dataclass(frozen=True)
class Held:
    """Memory that this process holds: bytes allocated by malloc, resident bytes, the number of tensors, and the number
    of Python's memory blocks."""

    malloc: float
    resident: float
    tensors: float
    objects: float

    @classmethod
    def now(cls) -> Held:
        """Returns the memory that the process holds now. Skips the test if the C library has no ``mallinfo2``."""
        libc = ctypes.CDLL(None)
        if not hasattr(libc, "mallinfo2"):
            pytest.skip("the C library does not tell what it has given out")
        libc.mallinfo2.restype = Mallinfo2
        gc.collect()
        tensors = sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())
        objects = sys.getallocatedblocks()
        libc.malloc_trim(0)
        given = libc.mallinfo2()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return cls(given.uordblks + given.hblkhd, resident, tensors, objects)


# A step must leave less memory than MOST. A step of an operator or a training without a leak leaves under one byte of
# malloc, no resident page and no tensor. Such a step leaves one Python block at first, and none after the interpreter's
# caches are full.
MOST = Held(malloc=8, resident=1024, tensors=0.5, objects=0.75)


def assert_flat(step: Callable[[int], object], window: int, warm: int) -> None:
    """Asserts that a step leaves less than MOST, in the lower quartile of WINDOWS windows, after ``warm`` steps."""
    for index in range(warm):
        step(index)
    gc.collect()
    gc.freeze()  # later collections skip the existing objects, which would take most of the time
    try:
        _assert_flat(step, window, warm)
    finally:
        gc.unfreeze()


def _assert_flat(step: Callable[[int], object], window: int, first: int) -> None:
    grown, before = [], astuple(Held.now())
    for start in range(first, first + MOST_WINDOWS * window, window):
        for index in range(start, start + window):
            step(index)
        after = astuple(Held.now())
        grown.append([(new - old) / window for new, old in zip(after, before, strict=True)])
        before = after
        if len(grown) < WINDOWS:
            continue
        left = Held(*(sorted(column)[WINDOWS // 4 - 1] for column in zip(*grown[-WINDOWS:], strict=True)))
        too_much = [name for name in vars(MOST) if getattr(left, name) >= getattr(MOST, name)]
        if not too_much:
            return
    print("growth per step in each window:", *grown, sep="\n", file=sys.stderr)
    raise AssertionError(f"a step leaves {left}, wanted less than {MOST}: {', '.join(too_much)}")
