"""The one timer. Verify first, then time all contenders in turn, in one process, and report medians and ratios.

Machines are shared and clocks drift, so a lone time says little: every round runs each contender once, in rotating
order, and a ratio is the median over rounds of the two times of the same round. Two ceilings are measured in the same
run: the copy bandwidth of memory and PyTorch's own matrix product.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

import torch

import peft_ext

__all__ = ["Row", "compare", "machine", "measured_ceilings", "print_table", "save"]


@dataclass
class Row:
    """One comparison: median milliseconds by contender, and each one's ratio to ``ours`` (above 1: ours is faster)."""

    op: str
    case: str
    milliseconds: dict[str, float]
    speedup: dict[str, float]
    rounds: int
    bytes_moved: Optional[int] = None
    flops: Optional[int] = None
    floor_ratio: Optional[float] = field(default=None)


def measured_ceilings(repeats: int = 7) -> dict[str, float]:
    """GB/s of a 512 MB copy, and bf16 TFLOP/s of PyTorch's product of 2048 x 2048 x 2048; the best of ``repeats``."""
    source, target = torch.ones(1 << 26), torch.empty(1 << 26)
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))

    def best(run: Callable[[], Any]) -> float:
        run()
        return min(_seconds(run) for _ in range(repeats))

    return {
        "copy_gb_s": 2 * source.numel() * 4 / best(lambda: target.copy_(source)) / 1e9,
        "matmul_bf16_tflop_s": 2 * 2048**3 / best(lambda: a @ b) / 1e12,
    }


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(
    op: str,
    case: str,
    contenders: dict[str, Callable[[], Any]],
    *,
    ceilings: dict[str, float],
    bytes_moved: Optional[int] = None,
    flops: Optional[int] = None,
    budget_s: float = 4.0,
) -> Row:
    """Time ``contenders`` (the first one is ours) in interleaved rounds that take about ``budget_s`` in all.

    ``bytes_moved`` and ``flops`` are what the op must move and compute; the floor is the longer of the two at the
    measured ceilings, and ``floor_ratio`` is ours over the floor.
    """
    names = list(contenders)
    warm = sum(_seconds(contenders[name]) + _seconds(contenders[name]) for name in names) / 2
    rounds = max(5, min(101, int(budget_s / max(warm, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(_seconds(contenders[name]))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = times[names[0]]
    ratios = {name: statistics.median(t / o for t, o in zip(times[name], ours, strict=True)) for name in names[1:]}
    floor = max(
        (bytes_moved or 0) / (ceilings["copy_gb_s"] * 1e9), (flops or 0) / (ceilings["matmul_bf16_tflop_s"] * 1e12)
    )
    return Row(
        op,
        case,
        {name: round(value * 1e3, 4) for name, value in medians.items()},
        {name: round(value, 3) for name, value in ratios.items()},
        rounds,
        bytes_moved,
        flops,
        round(medians[names[0]] / floor, 2) if floor else None,
    )


def machine() -> dict[str, Any]:
    """What a reader needs to judge a number: processor, threads, path, versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), model
        )
    versions = {}
    for name in ("peft_ext", "torch", "transformers", "peft", "bitsandbytes"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "isa": peft_ext._native.STATE.isa,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
    }


def save(path: Path, rows: list[Row], ceilings: dict[str, float]) -> None:
    """Write a result file; the tables in the documents are drawn from these."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"machine": machine(), "ceilings": ceilings, "rows": [asdict(row) for row in rows]}, indent=2) + "\n"
    )


def print_table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("op", "case", "ours ms", "ours is faster than", "ours / floor")
    for row in rows:
        ours = next(iter(row.milliseconds.values()))
        ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row.speedup.items())
        floor = "" if row.floor_ratio is None else f"{row.floor_ratio:.2f}"
        table.add_row(row.op, row.case, f"{ours:.3f}", ratios, floor)
    Console(width=140).print(table)
