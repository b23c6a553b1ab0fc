"""Measures the time of each kernel of a layer by torch.profiler, and compares it with the time of cuda_model.py.

    python tools/kernel_times.py [--tokens 8192,2048] [--out benchmarks/results]

A step is a forward and a backward, by peft_ext's operators, of a layer of 4096 x 4096 with a float32 adapter (LoRA or
DoRA of rank 16, or IA3). For 1 and 16 tokens over NF4, a step is a forward without adapter. Successive calls use
different copies of the weight, as in ``python -m benchmarks``. The result file kernel-layers-<GPU>-<date>.json has a
row for each part of a layer, and is written anew after each layer. The profiler's time of a kernel does not include the
launch of the kernel.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

os.environ.setdefault("PEFT_EXT_REQUIRE", "1")  # a missing kernel is an error, so that no reference is profiled
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cuda_measured
import slots
import torch

from benchmarks import cuda, files, harness
from benchmarks.peers import Problem

CALLS = 10  # Number of profiled steps of each layer.
FEW_TOKENS = (1, 16)  # Numbers of tokens of a forward over NF4.
SIZE = 4096
Times = dict[str, tuple[int, float]]  # for each kernel: number of launches, and microseconds of all launches together


def ours(op: str, case: str, tokens: int, device: str = "cuda", size: int = SIZE) -> harness.Contender:
    """Returns the contender "ours" (peft_ext) of the benchmark of the operator ``op``, in the variant ``case``."""
    stem = {"nf4_linear": "nf4"}.get(op, op.removesuffix("_linear"))
    variants = importlib.import_module(f"benchmarks.bench_{stem}").VARIANTS
    (found,) = [variant for variant in variants if (variant.op, variant.case) == (op, case)]
    return found.build(Problem(tokens, size, size, rotating=device == "cuda", device=device), False).contenders["ours"]


def profiled(contender: harness.Contender, calls: int = CALLS) -> Times:
    """Returns a dict from each kernel to its number of launches and its microseconds in ``calls`` calls of the
    contender, after three calls that warm up."""

    def several(count: int) -> None:
        for _ in range(count):
            contender.take()
            contender.run()
        torch.cuda.synchronize()

    several(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        several(calls)
    return by_kernel(profile.key_averages())


def by_kernel(events: Iterable[Any]) -> Times:
    """Returns a dict from the name of each kernel in the profiler's events, as slots.kernel_name shortens the name, to
    the number of launches and the microseconds of all launches together."""
    found: Times = {}
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = slots.kernel_name(torch._C._demangle(event.key) if event.key.startswith("_Z") else event.key)
            count, total = found.get(name, (0, 0.0))
            found[name] = count + event.count, total + event.self_device_time_total
    return found


def rows_of(times: Times, computed: dict[str, tuple[str, float]], calls: int = CALLS) -> list[dict[str, Any]]:
    """Returns a row for each part of a layer, with the launches and the measured and computed microseconds of a step.

    ``computed``: for each part, a regular expression for the names of the part's kernels, and the computed seconds of a
    step. A kernel whose name no expression matches gets a row of its own, without a computed time.
    """
    left, rows = dict(times), []

    def row(part: str, names: Iterable[str], seconds: Optional[float]) -> None:
        taken = {name: left.pop(name) for name in names}
        measured = sum(total for _, total in taken.values()) / calls
        rows.append({
            "part": part, "kernels": sorted(taken), "launches": sum(count for count, _ in taken.values()) / calls,
            "microseconds": round(measured, 2),
            "computed": None if seconds is None else round(1e6 * seconds, 2),
            "measured_over_computed": round(measured / seconds / 1e6, 2) if seconds and taken else None,
        })  # fmt: skip

    for part, (kernel, seconds) in computed.items():
        row(part, [name for name in left if re.search(kernel, name)], seconds)
    for name in sorted(left, key=lambda name: -left[name][1]):
        row("other", [name], None)
    return rows


def layers(tokens: Iterable[int]) -> Iterable[tuple[str, int, str, str]]:
    """Yields, for each measured layer, the method, the number of tokens, the operator, and the case of the operator's
    benchmark."""
    for count in tokens:
        for method, (op, case) in cuda_measured.MEASURED.items():
            yield method, count, op, case
    for count in FEW_TOKENS:
        yield f"NF4, T <= {8 if count <= 8 else 16}", count, "nf4_linear", "forward"


def main(argv: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="8192,2048", help="comma-separated; default: 8192,2048")
    parser.add_argument("--out", type=Path, help="result file, or the folder for it; default: benchmarks/results")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("kernel_times: torch sees no GPU")
    about = {**harness.machine(), "gpu": cuda.about_gpu()}
    card = cuda_measured.card_of(about["gpu"]["name"])
    out = files.result_path("kernel-layers", about, args.out)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    with cuda.Meter(cuda.uuid()) as meter:
        for method, tokens, op, case in layers(int(text) for text in args.tokens.split(",")):
            try:
                times = profiled(ours(op, case, tokens))
                if not times:
                    raise RuntimeError("torch.profiler recorded no kernel")
            except Exception as error:
                failed.append(f"{method}, T={tokens}: {type(error).__name__}: {error}")
                print(f"failed: {failed[-1]}", flush=True)
            else:
                computed = cuda_measured.kernel_seconds(card, method, tokens) if card else {}
                found = rows_of(times, computed)
                rows += [{"method": method, "tokens": tokens, **row, "meter": meter.lap()} for row in found]
                print(table(method, tokens, found), flush=True)
            files.write(out, {"machine": about, "failed": failed, "rows": rows})
    print(f"written: {out}")
    return 1 if failed else 0


def table(method: str, tokens: int, rows: Iterable[dict[str, Any]]) -> str:
    lines = [f"{method}, T = {tokens}: part, launches, microseconds measured, computed, measured / computed"]
    for row in rows:
        name = row["part"] if row["part"] != "other" else f"other: {row['kernels'][0]}"
        lines.append(f"  {name[:60]:<60} {row['launches']:5.1f} {row['microseconds']:8.1f} {row['computed'] or '-':>8} "
                     f"{row['measured_over_computed'] or '-':>5}")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
