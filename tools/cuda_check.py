"""Compile gate for the CUDA kernels; needs nvcc and torch's headers (a CPU build's will do), no GPU.

Every csrc/**/*.cu is compiled. Fails where one does not compile without a warning, a kernel spills registers, or an
object needs a symbol outside torch's stable ABI. Prints registers, shared memory and spills of each kernel.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import stable_abi

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("80", "90")
ALL_ARCHS = ("80", "86", "89", "90", "100", "120")


def find(tool: str) -> str | None:
    """A tool of the CUDA toolkit, on PATH or under CUDA_HOME."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(tool) or shutil.which(tool, path=os.path.join(home, "bin"))


def compile_command(nvcc: str, source: Path, output: Path, include: Path, archs: tuple[str, ...]) -> list[str]:
    target = stable_abi.TARGET[0] << 56 | stable_abi.TARGET[1] << 48
    return [
        nvcc, "-c", str(source), "-o", str(output), "-O3", "-std=c++17",
        f"-I{ROOT / 'csrc'}", "-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include"),
        "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION=0x{target:016x}",
        "-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills", "-Xcompiler", "-Wall,-fvisibility=hidden",
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs),
    ]  # fmt: skip


def kernel_rows(log: str) -> list[dict[str, object]]:
    """What ptxas -v says of each kernel."""
    rows: list[dict[str, object]] = []
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            rows.append({"kernel": entry[1], "arch": entry[2], "registers": 0, "shared": 0, "spilled": 0})
        elif rows and (spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            rows[-1]["spilled"] = int(spills[1]) + int(spills[2])
        elif rows and (used := re.search(r"Used (\d+) registers", line)):
            rows[-1]["registers"] = int(used[1])
            shared = re.search(r"(\d+) bytes smem", line)
            rows[-1]["shared"] = int(shared[1]) if shared else 0
    return rows


def demangle(names: list[str]) -> list[str]:
    tool = find("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    text = subprocess.run([tool], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    # Without return type, namespace and arguments: the kernel and what it is instantiated with.
    return [re.sub(r"^void |\bpeft_ext::|\(.*", "", line) for line in text.splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help=f"every architecture a wheel has: {', '.join(ALL_ARCHS)}")
    parser.add_argument("--require", action="store_true", help="without nvcc or torch, fail rather than skip")
    options = parser.parse_args()

    nvcc, include = find("nvcc"), stable_abi.torch_include()
    if nvcc is None or include is None:
        print(f"cuda-check: skipped: {'nvcc' if nvcc is None else 'torch'} not found")
        return 1 if options.require else 0

    failures, rows = [], []
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=2) as pool:

        def check(source: Path) -> tuple[str, str, list[str]]:
            output = Path(folder, f"{source.stem}.o")
            command = compile_command(nvcc, source, output, include, ALL_ARCHS if options.all else ARCHS)
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            name = str(source.relative_to(ROOT))
            if done.returncode != 0:
                return name, "", [f"{name}: does not compile\n{done.stdout}"]
            found = stable_abi.violations(stable_abi.undefined_symbols(output), include)
            return name, done.stdout, [f"{name}: {line}" for line in found]

        for name, log, found in pool.map(check, sources):
            failures += found
            rows += [{"file": name} | row for row in kernel_rows(log)]

    for row, kernel in zip(rows, demangle([str(row["kernel"]) for row in rows]), strict=True):
        row["kernel"] = kernel
        if row["spilled"]:
            failures.append(f"{row['file']}: {kernel} spills {row['spilled']} bytes on sm_{row['arch']}")
    width = max((len(str(row["kernel"])) for row in rows), default=6)
    print(f"{'kernel':{width}}  arch    registers  shared bytes  spilled bytes")
    for row in sorted(rows, key=lambda row: (row["file"], row["kernel"], int(str(row["arch"])))):
        counts = f"{row['registers']:>9}{row['shared']:>14}{row['spilled']:>15}"
        print(f"{row['kernel']:{width}}  sm_{row['arch']:<5}{counts}")
    for failure in failures:
        print(f"cuda-check: {failure}", file=sys.stderr)
    print(f"cuda-check: {len(sources)} files, {len(rows)} kernels, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
