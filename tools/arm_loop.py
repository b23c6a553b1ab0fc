"""Computes the time of the inner loop of tiles_bf16_neon.cpp on Arm cores.

    python tools/arm_loop.py [--cores neoverse-v1,neoverse-v2,neoverse-n2,apple-m2]

aarch64-linux-gnu-g++ compiles the loop. llvm-mca (19 or newer), LLVM's model of a core, computes the cycles of one
iteration if all loads hit L1, and the least cycles that the busiest execution unit needs. A product (the instruction
BFMMLA) multiplies 2 x 4 by 4 x 2 elements, which is 32 FLOP. No time was measured on an Arm core.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "csrc/linear/cpu/tiles/tiles_bf16_neon.cpp"
CORES = "neoverse-v1,neoverse-v2,neoverse-n2,apple-m2"
DEBIAN = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "llvm-mca": "llvm-19"}
PASSES = 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", default=CORES)
    cores = parser.parse_args().cores.split(",")
    mca = next((found for n in range(40, 18, -1) if (found := shutil.which(f"llvm-mca-{n}"))), shutil.which("llvm-mca"))
    for tool, found in (("aarch64-linux-gnu-g++", shutil.which("aarch64-linux-gnu-g++")), ("llvm-mca", mca)):
        if found is None:
            sys.exit(f"arm_loop: {tool} not found: apt-get install {DEBIAN[tool]}")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "tiles.o")
        compiler = ["aarch64-linux-gnu-g++", "-O3", "-std=c++17", "-ffp-contract=off", "-fPIC", f"-I{ROOT / 'csrc'}"]
        subprocess.run([*compiler, "-c", str(SOURCE), "-o", str(made)], check=True)
        command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(made)]
        loop = inner_loop(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        text = Path(folder, "loop.s")
        text.write_text("\n".join(loop) + "\n")
        products = sum(line.startswith("bfmmla") for line in loop)
        print(f"{len(loop)} instructions, {products} products a pass")
        print("| core | cycles | bound of its units | FLOP a cycle, of the bound's |\n|---|---:|---:|---:|")
        for core in cores:
            run = [mca, "-mtriple=aarch64", f"-mcpu={core}", "-mattr=+bf16", f"-iterations={PASSES}", str(text)]
            told = subprocess.run(run, check=True, capture_output=True, text=True).stdout
            cycles = int(re.search(r"Total Cycles: +(\d+)", told)[1]) / PASSES
            bound = float(re.search(r"Block RThroughput: +([\d.]+)", told)[1])
            print(f"| {core} | {cycles:.1f} | {bound:.1f} | {32 * products / cycles:.0f}, {bound / cycles:.0%} |")
    return 0


def inner_loop(listing: str) -> list[str]:
    """Returns the instructions of the shortest loop that contains a BFMMLA: from the target of a backward branch to the
    instruction before the branch.
    """
    lines = [(int(found[1], 16), found[2]) for found in re.finditer(r"^ +([0-9a-f]+):\t(.+)$", listing, re.MULTILINE)]
    loops = []
    for at, (address, text) in enumerate(lines):
        branch = re.match(r"b\.\w+\t([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            inside = [line.split(" <")[0] for from_, line in lines[:at] if from_ >= int(branch[1], 16)]
            if any(line.startswith("bfmmla") for line in inside):
                loops.append(inside)
    return min(loops, key=len)


if __name__ == "__main__":
    sys.exit(main())
