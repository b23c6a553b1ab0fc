"""What a step leaves behind, as a slope: the growth over each of several windows of steps, and its lower quartile.

A process that works allocates once in a while: a buffer that stdio keeps, a block in malloc's cache of a thread, a name
that Python interns. That lands in some windows and spares others, however busy the machine is, and a cache that fills
is full one day: the last windows are looked at, and more are measured until they are flat, or there are so many that
nothing but a leak is left. A leak is in every window, so it is in every lower quartile.
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
    """What this process has: bytes that malloc gave out, resident bytes, tensors, and Python's memory blocks."""

    malloc: float
    resident: float
    tensors: float
    objects: float

    @classmethod
    def now(cls) -> Held:
        """Skips the test where the C library does not tell what it has given out."""
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


# A step may leave less than this. Measured over operators and trainings it is under a byte of malloc, no resident page
# and no tensor, and at first a Python block, which becomes none as the interpreter's caches fill.
MOST = Held(malloc=8, resident=1024, tensors=0.5, objects=0.75)


def assert_flat(step: Callable[[int], object], window: int, warm: int) -> None:
    """After ``warm`` steps, a step leaves less than MOST, in the lower quartile of WINDOWS windows of so many steps."""
    for index in range(warm):
        step(index)
    gc.collect()
    gc.freeze()  # what is there already is not looked at again, which would be most of the time
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
