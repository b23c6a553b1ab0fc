"""Compares training steps under torch.compile with eager training steps, for peft_ext and for PEFT.

``python -m benchmarks.e2e compiled`` times, for each method, a step of four contenders: peft_ext and PEFT, eager and
compiled. The four models are in one process and train in turn, so that a change of the machine's speed alters the four
times alike. A ratio is the median, over the turns, of a compiled step's time divided by the time of the eager step of
the same turn. The timed steps do not contain the compilation. The peak memory of each contender is measured in a
process of its own, and contains the memory of the compilation. What the compiler takes of it is measured as well: the
memory that steps of a model of one layer on a few tokens add to the process if they are compiled, minus the memory that
the same steps add if they are eager.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from .command import markdown, run_alone

NAME = "step-compiled-avx512_bf16"
CONTENDERS = [("ours", False), ("ours", True), ("stock", False), ("stock", True)]
# Number of steps before the timed steps. The first of these steps compiles the model, and the second may compile again.
WARMING = 2


def sizes_of(layers: int) -> dict[str, Any]:
    from . import e2e

    return {**e2e.SMOLLM2, "num_hidden_layers": layers}


def peak(method: str, kind: str, compiles: bool, layers: int, batch: int, length: int) -> dict[str, Any]:
    """Returns the figures of a short run of one contender, as :func:`benchmarks.e2e.train` returns them."""
    from . import e2e

    return e2e.train(e2e.METHODS[method], kind, WARMING, batch, length, sizes_of(layers), compiles=compiles)


def compiler_mib(runs: dict[bool, dict[str, Any]]) -> int:
    """Returns the memory of the compiler in MiB, from the figures of runs of a small model, compiled (True) and eager
    (False)."""
    grown = {compiles: run["peak_mib"] - run["peak_before_training_mib"] for compiles, run in runs.items()}
    return grown[True] - grown[False]


def times(method: str, layers: int, steps: int, batch: int, length: int) -> dict[str, list[float]]:
    """Returns a dict from each contender to the list of the seconds of its timed steps. The contenders run their steps
    in turn."""
    from . import e2e

    sizes = sizes_of(layers)
    torch.manual_seed(1)
    contenders = {
        named(kind, compiles): e2e.stepper(e2e.METHODS[method], kind, WARMING + steps, sizes, compiles=compiles)
        for kind, compiles in CONTENDERS
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(WARMING + steps):
        tokens = torch.randint(0, sizes["vocab_size"], (batch, length))
        for name, step in contenders.items():
            start = time.perf_counter()
            step(tokens, turn)
            seconds[name].append(time.perf_counter() - start)
    return {name: found[WARMING:] for name, found in seconds.items()}


def named(kind: str, compiles: bool) -> str:
    return f"{kind}, {'compiled' if compiles else 'eager'}"


def row(
    method: str, seconds: dict[str, list[float]], peaks: dict[str, float], compilers: dict[str, int]
) -> dict[str, Any]:
    """Returns a method's row of the result file: the median times and the peak memories of the contenders, and for each
    of peft_ext and PEFT the memory of the compiler, and the compiled step's time and memory divided by those of the
    eager step."""
    over = {}
    for kind in ("ours", "stock"):
        pairs = zip(seconds[named(kind, True)], seconds[named(kind, False)], strict=True)
        over[kind] = statistics.median(compiled / eager for compiled, eager in pairs)
    return {
        "method": method,
        "milliseconds": {name: round(1e3 * statistics.median(found), 1) for name, found in seconds.items()},
        "peak_mib": peaks,
        "compiler_mib": compilers,
        "time_over_eager": {kind: round(ratio, 3) for kind, ratio in over.items()},
        "memory_over_eager": {
            kind: round(peaks[named(kind, True)] / peaks[named(kind, False)], 3) for kind in ("ours", "stock")
        },
    }


def run_of(method: str, kind: str, compiles: bool, layers: int, batch: int, length: int) -> dict[str, Any]:
    """Returns the figures of :func:`peak`, called in a process of its own."""
    sizes = ("--layers", layers, "--batch", batch, "--length", length)
    return run_alone("e2e", "compiled-peak", method, kind, *sizes, *["--compile"] * compiles)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    from . import e2e

    rows = []
    for method in args.methods:
        peaks, compilers = {}, {}
        for kind, compiles in CONTENDERS:
            peaks[named(kind, compiles)] = run_of(method, kind, compiles, args.layers, args.batch, args.length)[
                "peak_mib"
            ]
            print(f"{method}, {named(kind, compiles)}: peak {peaks[named(kind, compiles)]} MiB", flush=True)
        for kind in ("ours", "stock"):
            compilers[kind] = compiler_mib(
                {compiles: run_of(method, kind, compiles, 1, 1, 8) for compiles in (False, True)}
            )
        seconds = times(method, args.layers, args.steps, args.batch, args.length)
        rows.append(row(method, seconds, peaks, compilers))
        print(json.dumps(rows[-1]), flush=True)
    what = (f"a Llama of {e2e.SHAPES['smollm2'][1]} with {args.layers} layers and random weights, rank 16 on all "
            f"linears, {args.batch} x {args.length} tokens, {args.steps} steps")  # fmt: skip
    return {"what": what, "rows": rows}


def table(result: dict[str, Any]) -> str:
    titles = (
        "| method | | eager, ms | compiled, ms | compiled over eager "
        "| eager, MiB | compiled, MiB | of it the compiler, MiB |"
    )
    rows = []
    for found in result["rows"]:
        for kind, label in (("ours", "peft_ext"), ("stock", "PEFT")):
            eager, compiled = named(kind, False), named(kind, True)
            milliseconds, peaks = found["milliseconds"], found["peak_mib"]
            rows.append((found["method"], label, f"{milliseconds[eager]:.0f}", f"{milliseconds[compiled]:.0f}",
                         f"**{found['time_over_eager'][kind]:.2f}**", f"{peaks[eager]:.0f}",
                         f"{peaks[compiled]:.0f}", f"{found['compiler_mib'][kind]}"))  # fmt: skip
    return f"**A training step under torch.compile**: {result['what']}.\n\n{markdown(titles, rows)}"
