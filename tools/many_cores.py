"""Computes a layer's training step on 16, 64 and 192 cores from the division of its work. Nothing is measured.

    efficiency = time on one core / (number of cores x time on that number of cores)

The step is LoRA of rank 16 over bfloat16 on the AVX512-BF16 path. Each phase takes as long as its busiest thread:
tiles/plan.h itself divides the work of the tiles, pass_plan.h the work of the passes. Work is counted in FLOP, at the
measured rates :data:`RATES`. Barriers, shared memory bandwidth and clocks that fall under load are left out, so a real
machine is slower. ``python tools/many_cores.py --write`` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/performance.md"
BEGIN, END = "<!-- computed: python tools/many_cores.py --write -->", "<!-- /computed -->"
CORES = (16, 64, 192)
RANK = 16
LAYERS = ((576, 576), (192, 576), (2048, 2048), (4096, 4096), (14336, 4096))
TOKENS = (256, 1024, 4096)
# FLOP/s of one core in PyTorch's bf16 and float32 products, measured on two cores of an AMD EPYC (AVX512-BF16).
RATES = (0.43863003778049436e12 / 2, 0.19164653666482515e12 / 2)
DECODE = 1  # the value of decode_strips in the AVX512-BF16 tiles


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Plans:
    """Compiles and runs tests/native/tile_plan.cpp, which divides work among threads with the kernels' own headers."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "tile_plan"
        compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
        subprocess.run([compiler, "-std=c++17", "-O2", f"-I{ROOT / 'csrc'}", ROOT / "tests/native/tile_plan.cpp", "-o",
                        self.program], check=True)  # fmt: skip

    @cache  # noqa: B019  the object lives as long as the script
    def busiest(self, cores: int, tokens: int, rows: int, depth: int) -> float:
        """Returns the FLOP of the busiest thread in a product on tiles, including the decoding of the weight."""
        found = self._ask("cost", cores, tokens, rows, depth, DECODE)
        share, strips = float(found[3]), ceil_div(tokens, 16) + DECODE * int(found[1])
        return share * ceil_div(rows, 64) * strips * 2 * 64 * depth * 16 / cores

    def passes(self, cores: int, tokens: int, out: int, inner: int) -> float:
        """Returns the FLOP of the busiest threads, summed over the passes for S, for P and dB, and for dA."""
        return 2 * sum(map(int, self._ask("passes", cores, tokens, out, inner, RANK)))

    def _ask(self, *arguments: object) -> list[str]:
        command = [self.program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def seconds(plans: Plans, cores: int, tokens: int, out: int, inner: int) -> float:
    product, float32 = RATES
    base = plans.busiest(cores, tokens, out, inner) + plans.busiest(cores, tokens, inner, out)
    return base / product + plans.passes(cores, tokens, out, inner) / float32


def table() -> str:
    lines = ["| layer (N x K) | T | " + " | ".join(f"{cores} cores" for cores in CORES) + " |",
             "|---|---|" + "---|" * len(CORES)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        plans = Plans(Path(folder))
        for out, inner in LAYERS:
            for tokens in TOKENS:
                one = seconds(plans, 1, tokens, out, inner)
                cells = [one / (cores * seconds(plans, cores, tokens, out, inner)) for cores in CORES]
                shares = " | ".join(f"{cell:.2f}" for cell in cells)
                lines.append(f"| {out} x {inner} | {tokens} | {shares} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    found = table()
    if not parser.parse_args().write:
        print(found)
        return 0
    text = DOCUMENT.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"{DOCUMENT.name}: has no {BEGIN} and {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{found}\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
