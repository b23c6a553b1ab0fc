"""What a layer's training step is on 16, 64 and 192 cores, computed from how its work is cut; nothing here is measured.

    efficiency = time of one core / (cores x time of so many)

LoRA of rank 16 over bfloat16 on the AVX512-BF16 path. Each phase of the step takes as long as its busiest thread: the
tiles' by tiles/plan.h itself, the passes' by the chunks of passes.cpp and chunk_sums.h. Work is in FLOP,
at the rates of one core in the committed result file; a barrier, memory that all cores share and a clock that falls
under load are not in it, so that a machine does worse. ``python tools/many_cores.py --write`` puts the table into
docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import re
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
DECODE = 1  # what the AVX512-BF16 tiles give as decode_strips


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@cache
def constants() -> dict[str, int]:
    """The numbers by which the passes cut tokens."""
    source = "".join((ROOT / "csrc/linear/cpu" / name).read_text() for name in ("passes.cpp", "chunk_sums.h"))
    names = ("kTokenGrain", "kMinChunkTokens", "kMaxChunks")
    return {name: int(re.search(rf"{name} = (\d+)", source)[1]) for name in names}


def busiest_of_passes(tokens: int, cores: int) -> int:
    """Tokens of the busiest thread where a pass is cut by tokens alone, as PyTorch's parallel_for does."""
    threads = min(cores, ceil_div(tokens, constants()["kTokenGrain"]))
    return ceil_div(tokens, threads)


def busiest_of_sums(tokens: int, cores: int) -> int:
    """Tokens of the busiest thread where chunks of them have sums of their own, added in order."""
    chunk = ceil_div(max(constants()["kMinChunkTokens"], ceil_div(tokens, constants()["kMaxChunks"])), 8) * 8
    chunks = ceil_div(tokens, chunk)
    return min(tokens, chunk * ceil_div(chunks, min(cores, chunks)))


class Tiles:
    """The compiled plan."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "tile_plan"
        compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
        subprocess.run([compiler, "-std=c++17", "-O2", f"-I{ROOT / 'csrc'}", ROOT / "tests/native/tile_plan.cpp", "-o",
                        self.program], check=True)  # fmt: skip

    @cache  # noqa: B019  it lives as long as the script
    def busiest(self, cores: int, tokens: int, rows: int, depth: int) -> float:
        """FLOP of the busiest thread; decoding is in it."""
        args = [str(value) for value in (cores, tokens, rows, depth, DECODE)]
        found = subprocess.run([self.program, "cost", *args], capture_output=True, text=True, check=True).stdout.split()
        share, strips = float(found[3]), ceil_div(tokens, 16) + DECODE * int(found[1])
        return share * ceil_div(rows, 64) * strips * 2 * 64 * depth * 16 / cores


def seconds(tiles: Tiles, cores: int, tokens: int, out: int, inner: int, rates: tuple[float, float]) -> float:
    product, float32 = rates
    passed, summed = busiest_of_passes(tokens, cores), busiest_of_sums(tokens, cores)
    low_rank = 2 * RANK * (passed * inner + summed * (2 * out + inner))  # S; P and dB; dA
    base = tiles.busiest(cores, tokens, out, inner) + tiles.busiest(cores, tokens, inner, out)
    return base / product + low_rank / float32


def table() -> str:
    results = sorted(path for path in (ROOT / "benchmarks/results").glob("avx512_bf16-*.json"))[-1]
    found = json.loads(results.read_text())
    names, threads = ("matmul_bf16_tflop_s", "matmul_f32_tflop_s"), found["machine"]["threads"]
    rates = tuple(1e12 * found["ceilings"][name] / threads for name in names)
    lines = ["| layer (N x K) | T | " + " | ".join(f"{cores} cores" for cores in CORES) + " |",
             "|---|---|" + "---|" * len(CORES)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        tiles = Tiles(Path(folder))
        for out, inner in LAYERS:
            for tokens in TOKENS:
                one = seconds(tiles, 1, tokens, out, inner, rates)
                cells = [one / (cores * seconds(tiles, cores, tokens, out, inner, rates)) for cores in CORES]
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
