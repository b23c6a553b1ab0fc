"""Compares contenders with the timer of :mod:`peft_ext.bench`: verifies each result, then times all contenders in turn.

A run also measures the ceilings of the machine: the bandwidth of a copy and of reading, and the rates of PyTorch's
matrix products. A :data:`Clock` measures the times: ``host_clock`` of :mod:`peft_ext.bench` on a CPU, and the clocks of
:mod:`.cuda` on a GPU.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import torch

import peft_ext
from peft_ext.bench import timer
from peft_ext.bench.timer import (
    Clock,
    Contender,
    error_text,
    host_clock,
    interleave,
    median_ratios,
    quartile_ratios,
    seconds_of,
)
from peft_ext.machine import cpu_name, versions
from peft_ext.ops.library import OPERATORS, has_kernel

from . import files

MIN_ROUNDS, MAX_ROUNDS = 5, 101
# Environment variables that choose the instructions and the number of threads of peft_ext and PyTorch. A result file
# records the variables in this tuple that are set.
ENVIRONMENT = ("PEFT_EXT_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS",
               "OMP_NUM_THREADS")  # fmt: skip


@dataclass
class Comparison:
    """The contenders, "ours" (peft_ext) first, and the bytes and operations of the lower bound of the operator's time.

    Attributes:
        bytes_moved, flops: bytes that the operator must move at least, and operations that the operator must compute at
            least.
        reads: whether nearly all of the bytes are read, so that the bandwidth of reading bounds the time.
        tolerance: largest relative error that "ours" may have; with 0 "ours" must have the bits of the exact result.
        absent: a dict from each peer that cannot run to the reason.
    """

    contenders: dict[str, Contender]
    bytes_moved: int
    flops: int = 0
    tolerance: float = 1e-2
    reads: bool = False
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A comparison at one shape, kind of weights and number of tokens (None if the operator has no tokens). ``build``
    makes the Comparison with its contenders."""

    op: str
    case: str
    tokens: Optional[int]
    k: int
    n: int
    weights: str
    build: Callable[[], Comparison]


@dataclass
class Row:
    """The result of a comparison.

    Attributes:
        milliseconds: for each contender, the median over the rounds of the time of a call.
        speedup: for each peer, the median over the rounds of the peer's time divided by peft_ext's time. A value above
            1 says that peft_ext is faster.
        quartiles: for each peer, the first and the third quartile, over the rounds, of the ratios of ``speedup``.
        errors: for each contender, the relative error (Frobenius norm) of each output against the float64 result, or
            the reason why the contender is not verified.
        absent: a dict from each peer that could not run to the reason.
        bytes_moved, flops, reads: the fields of the :class:`Comparison` with these names.
        roofline: for each contender, the lower bound of the time (see :func:`floor_ms`) in percent of its time.
        meter: the GPU's power, clock and temperature during the row; empty on a CPU.
    """

    op: str
    case: str
    tokens: Optional[int]
    k: int
    n: int
    weights: str
    milliseconds: dict[str, float]
    speedup: dict[str, float]
    quartiles: dict[str, tuple[float, float]]
    errors: dict[str, Union[dict[str, float], str]]
    absent: dict[str, str]
    rounds: int
    bytes_moved: int
    flops: int
    reads: bool
    roofline: dict[str, float]
    meter: dict[str, float] = field(default_factory=dict)


# --- ceilings and floors ----------------------------------------------------------------------------------------------


def measured_ceilings(repeats: int = 7, size: int = 2048) -> dict[str, float]:
    """Measures GB/s of a 256 MB copy and of reading, and TFLOP/s of PyTorch's products in bf16 and float32.

    Each figure is the best of ``repeats`` measurements. The rate of a product is the better of the rates of ``a @ b``
    and ``a @ b.t()``.
    """
    source, target = torch.ones(size << 15), torch.empty(size << 15)

    def best(run: Callable[[], Any]) -> float:
        run()
        return min(seconds_of(run) for _ in range(repeats))

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
        return 2 * size**3 / min(best(lambda: a @ b), best(lambda: a @ b.t())) / 1e12

    return {
        "copy_gb_s": 2 * source.numel() * 4 / best(lambda: target.copy_(source)) / 1e9,
        "read_gb_s": source.numel() * 4 / best(source.sum) / 1e9,
        "matmul_bf16_tflop_s": product(torch.bfloat16),
        "matmul_f32_tflop_s": product(torch.float32),
    }


def floor_ms(
    bytes_moved: Optional[int], flops: Optional[int], ceilings: dict[str, float], reads: bool = False
) -> float:
    """Returns the lower bound of an operator's time in milliseconds: the larger of the time to move ``bytes_moved``
    bytes and the time of ``flops`` operations.

    The rate of operations is the faster of the two measured rates of PyTorch's products, in bf16 and in float32. On a
    CPU without bf16 instructions the float32 rate is the faster one.
    """
    peak = max(value for name, value in ceilings.items() if name.startswith("matmul_"))
    bandwidth = ceilings["copy_gb_s"]
    if reads:  # the ceilings of a GPU do not have read_gb_s
        bandwidth = max(bandwidth, ceilings.get("read_gb_s", 0.0))
    return 1e3 * max((bytes_moved or 0) / (bandwidth * 1e9), (flops or 0) / (peak * 1e12))


def rate(bytes_moved: int, flops: int, milliseconds: float, ceilings: dict[str, float], reads: bool = False) -> str:
    """Returns the reached bandwidth ("812 GB/s") or rate ("0.41 TFLOP/s"), whichever sets the lower bound of the
    time."""
    if floor_ms(bytes_moved, 0, ceilings, reads) >= floor_ms(0, flops, ceilings):
        return f"{bytes_moved / milliseconds / 1e6:.3g} GB/s"
    return f"{flops / milliseconds / 1e9:.3g} TFLOP/s"


# --- one comparison ---------------------------------------------------------------------------------------------------


def verify(op: str, comparison: Comparison) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns a dict with each contender's errors, and a dict with the reason for each contender that is absent.

    Raises AssertionError if the error of "ours" is larger than the tolerance. A peer that cannot run, such as
    torch.compile without a compiler, is absent; the reason is the first line of the peer's error.
    """
    errors, absent = timer.verify(op, comparison.contenders, comparison.tolerance)
    return errors, {**comparison.absent, **absent}


def compare(
    case: Case, comparison: Comparison, ceilings: dict[str, float], budget_s: float = 4.0, clock: Clock = host_clock
) -> Row:
    """Verifies the contenders, and then times them in turn, in at least five rounds and for about ``budget_s`` seconds.

    If ``clock`` cannot time a peer, for example because the peer's call cannot be captured in a CUDA graph, the row
    names the peer and the reason in ``absent``. A peer that takes longer than ``timer.LONGEST_CALL_S``, such as
    bfloat16 on a CPU without bfloat16 instructions, is timed once.
    """
    errors, absent = verify(case.op, comparison)
    samples: dict[str, Callable[[], float]] = {}
    for name, contender in comparison.contenders.items():
        if name in absent:
            continue
        try:
            samples[name] = clock(contender)
        except Exception as error:
            if not samples:
                raise
            absent[name] = error_text(error)
    times = interleave(samples, budget_s, least=MIN_ROUNDS, most=MAX_ROUNDS)
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    ratios = median_ratios(times)
    floor = floor_ms(comparison.bytes_moved, comparison.flops, ceilings, comparison.reads)
    return Row(
        **{name: value for name, value in vars(case).items() if name != "build"},
        milliseconds={name: round(value, 4) for name, value in medians.items()},
        speedup={name: round(value, 3) for name, value in ratios.items()},
        quartiles={name: (round(low, 3), round(high, 3)) for name, (low, high) in quartile_ratios(times).items()},
        errors=errors,
        absent=absent,
        rounds=len(next(iter(times.values()))),
        bytes_moved=comparison.bytes_moved,
        flops=comparison.flops,
        reads=comparison.reads,
        roofline={name: round(100 * floor / value, 1) for name, value in medians.items()},
    )


# --- a whole run ------------------------------------------------------------------------------------------------------


def run(
    cases: Iterable[Case],
    ceilings: dict[str, float],
    *,
    limit_s: float,
    row_s: float,
    report: Any = None,
    clock_of: Callable[[Case], Clock] = lambda case: host_clock,
    device: str = "cpu",
    failed: Optional[list[str]] = None,
) -> tuple[list[Row], list[str]]:
    """Returns the rows, and the names of the cases that were left out.

    A row is timed for about ``row_s`` seconds, or for less if little time is left. The run takes about ``limit_s``
    seconds, with set-up, verification and compilation. A case is left out if the limit has passed, or if the remaining
    time is less than twice the lower bound of the time of 25 calls (five rounds of five contenders), where a call
    counts as at least 20 ms. An error of "ours" ends the run if ``failed`` is None; otherwise the error is added to the
    list ``failed``, and the run continues with the next case.
    """
    cases = list(cases)
    check_kernels({case.op for case in cases}, device)
    rows: list[Row] = []
    left_out: list[str] = []
    end = time.perf_counter() + limit_s
    for turn, case in enumerate(cases):
        name = f"{case.op}: {case.case}, {case.weights}"
        start = time.perf_counter()
        if start >= end:
            left_out.append(name)
            continue
        try:
            comparison = case.build()
            least_ms = max(floor_ms(comparison.bytes_moved, comparison.flops, ceilings), 1e3 * timer.SHORT_CALLS_S)
            least = 2 * MIN_ROUNDS * 5 * least_ms / 1e3
            if time.perf_counter() + least > end:
                left_out.append(name)
                continue
            share = (end - start) / (len(cases) - turn)
            rows.append(compare(case, comparison, ceilings, min(row_s, share), clock_of(case)))
        except Exception as error:
            if failed is None:
                raise
            failed.append(f"{name}: {error_text(error)}")
            print(f"failed: {failed[-1]}", flush=True)
            continue
        if report is not None:
            report(turn, len(cases), rows[-1], time.perf_counter() - start)
    return rows, left_out


def check_kernels(ops: set[str], device: str = "cpu") -> None:
    """Exits if an operator or its backward has no kernel, so that no reference is timed as if it were a kernel.

    An operator that is composed of other operators needs no kernel of its own. With PEFT_EXT_REQUIRE=0 or unset,
    check_kernels does nothing, and the reference of an operator without a kernel is timed. ``python -m benchmarks``
    sets PEFT_EXT_REQUIRE=1 by default.
    """
    if os.environ.get("PEFT_EXT_REQUIRE", "") in ("", "0"):
        return
    key = device.upper()
    composed = {op.name for op in OPERATORS.values() if op.composed}
    wanted = (ops - composed) | {f"{op}_backward" for op in ops} & set(OPERATORS)
    if missing := sorted(op for op in wanted if not has_kernel(op, key)):
        sys.exit(f"error: no native {key} kernel of {', '.join(missing)}; name the benchmarks of other operators, or "
                 "set PEFT_EXT_REQUIRE=0 to time the reference")  # fmt: skip


def machine() -> dict[str, Any]:
    """Returns a dict with the processor, the number of threads, the CPU paths, the environment variables, the date and
    the versions of this run."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": peft_ext._native.STATE.isa,
        "torch_isa": torch.backends.cpu.get_cpu_capability().lower(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "date": time.strftime("%Y-%m-%d"),
        # If the package kernels is installed, bitsandbytes runs another CPU kernel for few tokens.
        "versions": {
            "peft_ext": peft_ext.__version__,
            **versions("torch", "transformers", "peft", "bitsandbytes", "kernels"),
        },
    }


def save(
    path: Path,
    about: dict[str, Any],
    rows: list[Row],
    ceilings: dict[str, float],
    left_out: Iterable[str] = (),
    **more: Any,
) -> None:
    """Writes the result file ``path``."""
    result = {"machine": about, "ceilings": ceilings, "left_out": list(left_out), **more}
    files.write(path, {**result, "rows": [asdict(row) for row in rows]})


def ratio_text(speedup: Mapping[str, float], quartiles: Mapping[str, Sequence[float]]) -> str:
    """Returns, as text, each peer's ratio (the peer's time divided by peft_ext's time) and the ratio's quartiles."""
    return ", ".join(f"{name} {ratio:.2f}x{spread_text(quartiles.get(name))}" for name, ratio in speedup.items())


def spread_text(quartiles: Optional[Sequence[float]]) -> str:
    """Returns two quartiles as text, such as " (1.02 to 1.10)"; "" if ``quartiles`` is None or if both have equal
    texts."""
    low, high = (f"{value:.2f}" for value in quartiles or (0.0, 0.0))
    return "" if low == high else f" ({low} to {high})"


def print_table(rows: list[Row], ceilings: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("op", "case", "weights", "ours ms", "ours is faster than", "rate", "% of roofline", "error")
    for row in rows:
        ours = next(iter(row.milliseconds))
        ratios = ratio_text(row.speedup, row.quartiles)
        error = max(row.errors[ours].values())
        reached = rate(row.bytes_moved, row.flops, row.milliseconds[ours], ceilings, row.reads)
        table.add_row(row.op, row.case, row.weights, f"{row.milliseconds[ours]:.3f}", ratios, reached,
                      f"{row.roofline[ours]:.0f}", f"{error:.1e}")  # fmt: skip
    Console(width=180).print(table)
    for name, reason in sorted({(name, reason) for row in rows for name, reason in row.absent.items()}):
        print(f"absent: {name}: {reason}")
