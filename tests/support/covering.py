"""The covering array of the operators' calls: each possible pair of values of two factors is in at least one call.

Factors: case of an operator (``op_db``), dtype, shape, layout of the tensors in memory, CPU path, number of threads.
Each case has as many calls as the longest other factor has values. Each call takes the next value of every factor.
A factor's first value differs from case to case, so that most pairs of values of the other factors occur in some case.
More calls are added for the pairs that are left out.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import sweep
from op_db import CASES, DTYPES, SAVED_OUTPUT, Case

from peft_ext import _native

LAYOUTS = ("contiguous", "transposed", "every other", "offset", "rows apart")
THREADS = (1, 2, 7)
NAMES = ("case", "dtype", "shape", "layout", "path", "threads")


def _calls_of(case: Case) -> list[sweep.Drawn]:
    """Returns the calls of one case. The seed of a call is 1000 times the number of the case plus the number of the
    call."""
    number = (*CASES, *SAVED_OUTPUT).index(case)
    paths = _native.STATE.module.isas()
    shapes = sorted(set(case.shapes), key=case.shapes.index)
    factors = (DTYPES, shapes, LAYOUTS, paths, THREADS)
    count = max(map(len, factors))
    calls = []
    for i in range(count):
        # Each factor divides the number of the case by another stride, so that the starts of two factors do not move
        # together.
        starts = (number // stride for stride in (1, 3, 2, 5, 4))
        dtype, shape, layout, path, threads = (
            values[(i + start) % len(values)] for values, start in zip(factors, starts, strict=True)
        )
        calls.append(sweep.Drawn(1000 * number + i, case, dtype, shape, (layout,), path, threads, False))
    return calls


@functools.cache
def array() -> tuple[sweep.Drawn, ...]:
    """Returns all calls: the calls of each case, and calls for the pairs that the calls of the cases leave out."""
    calls = [call for case in (*CASES, *SAVED_OUTPUT) for call in _calls_of(case)]
    fields = ("dtype", "shape", "layout", "path", "threads")
    covered = {pair for call in calls for pair in _pairs_of(row(call))}
    for pair in sorted(_wanted() - covered, key=str):
        if pair in covered:  # a call that was added for another pair covers this pair
            continue
        held = dict(pair)
        near = next(call for call in calls if held.get("shape", call.shape) in call.case.shapes)
        values = {**dict(zip(NAMES, row(near), strict=True)), **held}
        dtype, shape, layout, path, threads = (values[name] for name in fields)
        calls.append(sweep.Drawn(1000 * len(calls), near.case, dtype, shape, (layout,), path, threads, False))
        covered.update(_pairs_of(row(calls[-1])))
    return tuple(calls)


def row(call: sweep.Drawn) -> tuple[Any, ...]:
    """Returns the values of a call's factors, in the order of NAMES."""
    return call.case.name, call.dtype, call.shape, call.layouts[0], call.isa, call.threads


def _wanted() -> set:
    """Returns every pair of two factors' values that is possible. A case is called only with shapes of its own list."""
    paths = _native.STATE.module.isas()
    return {pair for case in (*CASES, *SAVED_OUTPUT) for shape in case.shapes
            for rest in itertools.product(DTYPES, [shape], LAYOUTS, paths, THREADS)
            for pair in _pairs_of((case.name, *rest))}  # fmt: skip


def pairs() -> tuple[set, set]:
    """Returns the pairs of two factors' values that are in the array, and all pairs that are possible."""
    return {pair for call in array() for pair in _pairs_of(row(call))}, _wanted()


def _pairs_of(values: tuple[Any, ...]) -> Iterator[tuple]:
    yield from itertools.combinations(zip(NAMES, values, strict=True), 2)
