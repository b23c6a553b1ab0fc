"""``python -m benchmarks [nf4 lora ...]``: runs the named benchmarks or all, prints a table and writes a result file.

A full run takes at most 20 minutes on two cores, ``--quick`` at most 3 minutes; the result file names the rows that
were left out for lack of time. To measure another CPU path than the best path, force the path in peft_ext and in
PyTorch:

    PEFT_EXT_CPU_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        python -m benchmarks

With ``--device cuda`` the benchmarks run on a GPU, and the result file is written anew after each row. If a row fails
on a GPU, the program prints the row's name, runs the remaining rows, and ends with the exit status 1.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from pathlib import Path
from typing import Optional

os.environ.setdefault("PEFT_EXT_REQUIRE", "1")  # a missing kernel is an error, so that no reference is timed

import torch

import benchmarks

from . import cuda
from .command import command_parser
from .files import result_path
from .grid import SHAPES, Options, cases
from .harness import Case, Clock, Row, machine, measured_ceilings, print_table, run, save

# FULL and QUICK have the first six fields of Options, the time limit of a run in seconds, and the seconds for which a
# row is timed. A row that has begun when the limit is reached is still measured.
FULL = ((512, 2048, 1, 16, 4, 64), (512, 1), (512,), ("smollm2", "1b", "8b"), ("rotating", "hot"), (512,), 1050.0, 4.0)
QUICK = ((512, 1), (), (512,), (), ("rotating",), (), 140.0, 2.0)
# Additional numbers of tokens, for variants that have their own list of numbers of tokens. On a CPU only the benchmarks
# of a mixed batch and of packed weights list 8 tokens.
FORWARD = {"cpu": (8,), "cuda": (1, 4, 8, 16, 32, 64)}
# CUDA and CUDA_QUICK are like FULL and QUICK, for a GPU. At the shape "wide", CUDA has only operators without tokens,
# such as nf4_quantize.
CUDA = ((8192, 2048, 512), (), (None,), ("wide",), ("rotating", "graph"), (2048,), 600.0, 0.6)
CUDA_QUICK = ((8192,), (), (None,), (), ("rotating", "graph"), (), 120.0, 0.3)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def main(argv: Optional[list[str]] = None) -> None:
    found = [
        name.removeprefix("bench_") for _, name, _ in pkgutil.iter_modules(benchmarks.__path__) if "bench_" in name
    ]
    parser = command_parser("benchmarks", __doc__)
    parser.add_argument("ops", nargs="*", default=found, help=f"benchmarks to run ({', '.join(found)}); default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--quick", action="store_true", help="4096x4096 at one or two T, rotating weights, no torch.compile"
    )
    parser.add_argument(
        "--tokens", type=_numbers, help="T, comma-separated; default: 1 to 2048 (on a GPU 8192) at 4096x4096, 512 "
        "elsewhere"
    )  # fmt: skip
    parser.add_argument(
        "--shapes", type=_names, help=f"shapes besides 4096x4096 ({', '.join(SHAPES)}), comma-separated"
    )
    parser.add_argument("--weights", type=_names, help="rotating: through 1 GB of weights; hot: the same weight again; "
                        "graph: rotating weights in a CUDA graph, on a GPU alone")  # fmt: skip
    parser.add_argument("--compile-tokens", type=_numbers, help="T at which torch.compile takes part; '' for none")
    parser.add_argument("--limit", type=float, help="seconds after which no row starts")
    parser.add_argument("--out", type=Path, help="result file, or the folder for it; default: benchmarks/results, "
                        "layer-<ops>-<isa or GPU>-<date>.json")  # fmt: skip
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    args = parser.parse_args(argv)
    for what, asked, known in (("benchmark", args.ops, found), ("shape", args.shapes or (), SHAPES),
                               ("kind of weights", args.weights or (), KINDS[args.device])):  # fmt: skip
        if unknown := set(asked) - set(known):
            sys.exit(f"error: no {what} {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: torch sees no GPU")
    if args.threads:
        torch.set_num_threads(args.threads)
    *defaults, limit_s, row_s = SETTINGS[args.device, args.quick]
    asked = (args.tokens, args.tokens, args.tokens, args.shapes, args.weights, args.compile_tokens)
    forward_tokens = FORWARD[args.device] if args.tokens is None else ()
    options = Options(*(d if a is None else a for a, d in zip(asked, defaults, strict=True)), args.device,
                      forward_tokens)  # fmt: skip
    variants = [v for name in args.ops for v in importlib.import_module(f"benchmarks.bench_{name}").VARIANTS]
    limits = {"limit_s": args.limit or limit_s, "row_s": row_s}
    subject = "layer-all" if set(args.ops) == set(found) else f"layer-{'_'.join(args.ops)}"
    (_on_a_gpu if args.device == "cuda" else _on_the_cpu)(list(cases(variants, options)), limits, subject, args.out)


SETTINGS = {("cpu", False): FULL, ("cpu", True): QUICK, ("cuda", False): CUDA, ("cuda", True): CUDA_QUICK}
KINDS = {"cpu": ("rotating", "hot"), "cuda": ("rotating", "hot", "graph")}


def _on_the_cpu(cases: list[Case], limits: dict[str, float], subject: str, out: Optional[Path]) -> None:
    about = machine()
    ceilings = measured_ceilings()
    print(f"{about['cpu']}, {about['threads']} threads, path {about['isa']}: copy {ceilings['copy_gb_s']:.1f} GB/s, "
          f"bf16 product {ceilings['matmul_bf16_tflop_s'] * 1e3:.0f} GFLOP/s, "
          f"float32 {ceilings['matmul_f32_tflop_s'] * 1e3:.0f}")  # fmt: skip
    rows, left_out = run(cases, ceilings, **limits, report=_report)
    print_table(rows, ceilings)
    for name in left_out:
        print(f"left out, no time: {name}")
    out = result_path(subject, about, out)
    save(out, about, rows, ceilings, left_out)
    print(f"written: {out}")


def _on_a_gpu(cases: list[Case], limits: dict[str, float], subject: str, out: Optional[Path]) -> None:
    ceilings = cuda.measured_ceilings()
    gpu = cuda.about_gpu()  # called after the ceilings, to read the clocks of a busy GPU
    about = {**machine(), "gpu": gpu}
    out = result_path(subject, about, out)
    print(f"{gpu['name']}: copy {ceilings['copy_gb_s']:.0f} GB/s, bf16 product "
          f"{ceilings['matmul_bf16_tflop_s']:.0f} TFLOP/s, float32 {ceilings['matmul_f32_tflop_s']:.1f}")  # fmt: skip
    done: list[Row] = []
    failed: list[str] = []

    def report(turn: int, of: int, row: Row, seconds: float) -> None:
        row.meter = meter.lap()
        _report(turn, of, row, seconds)
        done.append(row)
        save(out, about, done, ceilings, failed=failed)

    def clock_of(case: Case) -> Clock:
        return cuda.graph_clock if case.weights == "graph" else cuda.event_clock

    with cuda.Meter(cuda.uuid()) as meter:
        rows, left_out = run(cases, ceilings, **limits, report=report, clock_of=clock_of, device="cuda", failed=failed)
    save(out, about, rows, ceilings, left_out, failed=failed)
    print_table(rows, ceilings)
    for name in left_out:
        print(f"left out, no time: {name}")
    for name in failed:
        print(f"failed: {name}")
    print(f"written: {out}")
    if failed:
        sys.exit(1)


def _report(turn: int, of: int, row: Row, seconds: float) -> None:
    ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row.speedup.items())
    print(f"[{turn + 1}/{of}] {row.op}: {row.case}, {row.weights}: {ratios} ({seconds:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
