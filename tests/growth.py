"""What a step leaves behind, as a slope: the growth over each of several windows of steps, and its lower quartile.

A process that works allocates once in a while: a buffer that stdio keeps, a block in malloc's cache of a thread, a name
that Python interns. That lands in some windows and spares others, however busy the machine is. A leak is in all of
them, so the lower quartile has it; it is in none of the totals that a single allocation, made once, could pass for it.
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

WINDOWS = 12


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


# A step may leave less than this, in the lower quartile of the windows. Measured over operators and trainings it is 0
# to 2 bytes of malloc, no resident page, no tensor, and a third of a Python block, as caches of the interpreter fill.
MOST = Held(malloc=8, resident=1024, tensors=0.5, objects=0.75)


def a_step_leaves(step: Callable[[int], object], window: int, warm: int) -> Held:
    """The lower quartile over WINDOWS windows of ``window`` steps each, after ``warm`` steps; per step."""
    for index in range(warm):
        step(index)
    gc.collect()
    gc.freeze()  # what is there already is not looked at again, which would be most of the time
    try:
        return _lower_quartile(step, window, warm)
    finally:
        gc.unfreeze()


def _lower_quartile(step: Callable[[int], object], window: int, warm: int) -> Held:
    grown, before = [], astuple(Held.now())
    for start in range(warm, warm + WINDOWS * window, window):
        for index in range(start, start + window):
            step(index)
        after = astuple(Held.now())
        grown.append([new - old for new, old in zip(after, before, strict=True)])
        before = after
    print("growth of each window:", *grown, file=sys.stderr)  # pytest shows it where a test fails
    return Held(*(sorted(column)[WINDOWS // 4 - 1] / window for column in zip(*grown, strict=True)))


def assert_flat(step: Callable[[int], object], window: int, warm: int) -> None:
    left = a_step_leaves(step, window, warm)
    too_much = [name for name in vars(MOST) if getattr(left, name) >= getattr(MOST, name)]
    assert not too_much, f"a step leaves {left}, wanted less than {MOST}: {', '.join(too_much)}"
