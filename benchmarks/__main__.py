"""``python -m benchmarks [nf4 lora ...]``: run the benchmarks, print a table, write the result file.

A full run takes at most 20 minutes on two cores, ``--quick`` at most 3; rows that do not fit are named in the file. To
see a path that the CPU has besides its best one, force ours and PyTorch's:

    PEFT_EXT_CPU_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m benchmarks
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from pathlib import Path
from typing import Optional

os.environ.setdefault("PEFT_EXT_REQUIRE", "1")  # the reference must not be timed as if it were a kernel

import torch

import benchmarks

from .grid import SHAPES, Options, cases
from .harness import Row, machine, measured_ceilings, print_table, run, save

# tokens, hot_tokens, shape_tokens, shapes, weights, compile_tokens; then the run's limit and a row's timing in seconds.
# The limits leave room for the row that is running when they are reached.
FULL = ((512, 2048, 1, 16, 4, 64), (512, 1), (512,), ("smollm2", "1b", "8b"), ("rotating", "hot"), (512,), 1050.0, 4.0)
QUICK = ((512, 1), (), (512,), (), ("rotating",), (), 140.0, 2.0)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def main(argv: Optional[list[str]] = None) -> None:
    found = [
        name.removeprefix("bench_") for _, name, _ in pkgutil.iter_modules(benchmarks.__path__) if "bench_" in name
    ]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", default=found, help=f"which ({', '.join(found)}); default: all")
    parser.add_argument("--quick", action="store_true", help="4096x4096 at T=512 and 1, rotating weights, no compile")
    parser.add_argument(
        "--tokens", type=_numbers, help="T, comma-separated; default: 1 to 2048 at 4096x4096, 512 elsewhere"
    )
    parser.add_argument("--shapes", type=_names, help=f"beside 4096x4096 ({', '.join(SHAPES)}), comma-separated")
    parser.add_argument("--weights", type=_names, help="rotating,hot: through 1 GB of weights, or the same one again")
    parser.add_argument("--compile-tokens", type=_numbers, help="T at which torch.compile takes part; '' for none")
    parser.add_argument("--limit", type=float, help="seconds, after which no row is begun")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/<isa>-<date>.json")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    args = parser.parse_args(argv)
    for what, asked, known in (("benchmark", args.ops, found), ("shape", args.shapes or (), SHAPES),
                               ("kind of weights", args.weights or (), ("rotating", "hot"))):  # fmt: skip
        if unknown := set(asked) - set(known):
            sys.exit(f"error: no {what} {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    *defaults, limit_s, row_s = QUICK if args.quick else FULL
    asked = (args.tokens, args.tokens, args.tokens, args.shapes, args.weights, args.compile_tokens)
    options = Options(*(d if a is None else a for a, d in zip(asked, defaults, strict=True)))
    variants = [v for name in args.ops for v in importlib.import_module(f"benchmarks.bench_{name}").VARIANTS]

    about = machine()
    ceilings = measured_ceilings()
    print(f"{about['cpu']}, {about['threads']} threads, path {about['isa']}: copy {ceilings['copy_gb_s']:.1f} GB/s, "
          f"bf16 product {ceilings['matmul_bf16_tflop_s'] * 1e3:.0f} GFLOP/s, "
          f"float32 {ceilings['matmul_f32_tflop_s'] * 1e3:.0f}")  # fmt: skip
    rows, left_out = run(cases(variants, options), ceilings, limit_s=args.limit or limit_s, row_s=row_s, report=_report)
    print_table(rows)
    for name in left_out:
        print(f"left out, no time: {name}")
    out = args.out or Path(__file__).parent / "results" / f"{about['isa']}-{about['date']}.json"
    save(out, rows, ceilings, left_out)
    print(f"written: {out}")


def _report(turn: int, of: int, row: Row, seconds: float) -> None:
    ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row.speedup.items())
    print(f"[{turn + 1}/{of}] {row.op}: {row.case}, {row.weights}: {ratios} ({seconds:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
