"""``python -m benchmarks [nf4 lora ...] [--out FILE]``: run the benchmarks, print a table, write the result file."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from pathlib import Path

os.environ.setdefault("PEFT_EXT_REQUIRE", "1")  # the reference must not be timed as if it were a kernel

import torch

import benchmarks

from .harness import machine, measured_ceilings, print_table, save


def main() -> None:
    found = [
        name.removeprefix("bench_") for _, name, _ in pkgutil.iter_modules(benchmarks.__path__) if "bench_" in name
    ]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("ops", nargs="*", default=found, help=f"which ({', '.join(found)}); default: all")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/<isa>-<date>.json")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    args = parser.parse_args()
    if unknown := set(args.ops) - set(found):
        sys.exit(f"error: no benchmark of {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    about = machine()
    ceilings = measured_ceilings()
    print(f"{about['cpu']}, {about['threads']} threads, path {about['isa']}: copy {ceilings['copy_gb_s']:.1f} GB/s, "
          f"bf16 product {ceilings['matmul_bf16_tflop_s'] * 1e3:.0f} GFLOP/s")  # fmt: skip
    rows = []
    for name in args.ops:
        rows += importlib.import_module(f"benchmarks.bench_{name}").run(ceilings)
    print_table(rows)
    out = args.out or Path(__file__).parent / "results" / f"{about['isa']}-{about['date']}.json"
    save(out, rows, ceilings)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
