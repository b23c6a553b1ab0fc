"""Compile gate for the CUDA kernels; needs nvcc and torch's headers (a CPU build's will do), no GPU.

Every csrc/**/*_cuda.cu is compiled for sm_80, 90, 100 and 120. Fails where one does not compile without a warning, a
kernel spills registers, an object needs a symbol outside torch's stable ABI, or a kernel's registers or shared memory
are not those of the committed table (docs/ptxas.tsv): what a change costs is part of its review. --write takes it over.
"""

from __future__ import annotations

import argparse
import difflib
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
TABLE = ROOT / "docs/ptxas.tsv"
ARCHS = ("80", "90", "100", "120")


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


def ptxas_table(rows: list[dict[str, object]]) -> str:
    """One line a kernel, with its registers on each architecture and its shared memory."""
    archs = sorted({str(row["arch"]) for row in rows}, key=int)
    found: dict[tuple[str, str], dict[str, dict[str, object]]] = {}
    for row in rows:
        found.setdefault((str(row["file"]), str(row["kernel"])), {})[str(row["arch"])] = row
    lines = ["file\tkernel\tshared bytes\t" + "\t".join(f"sm_{arch}" for arch in archs)]
    for key, by_arch in sorted(found.items()):
        shared = "/".join(sorted({str(row["shared"]) for row in by_arch.values()}))
        lines.append("\t".join([*key, shared, *(str(by_arch[arch]["registers"]) for arch in archs)]))
    return "\n".join(lines) + "\n"


def release(nvcc: str) -> str:
    """ "13.0", of "Cuda compilation tools, release 13.0, V13.0.88"."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else "unknown"


def compare(table: str, nvcc: str, write: bool) -> list[str]:
    """What differs from the committed table, which says what compiler it was made with; another's is not compared."""
    wanted = f"# nvcc {release(nvcc)}\n{table}"
    if write:
        TABLE.write_text(wanted)
        return []
    if not TABLE.exists():
        return [f"{TABLE.relative_to(ROOT)} is missing; --write makes it"]
    held = TABLE.read_text()
    if held.splitlines()[:1] != wanted.splitlines()[:1]:
        print(f"cuda-check: {TABLE.name} is of {held.splitlines()[0][2:]}, this is nvcc {release(nvcc)}: not compared")
        return []
    changed = difflib.unified_diff(held.splitlines(), wanted.splitlines(), "committed", "compiled", lineterm="", n=0)
    lines = [line for line in changed if line[0] in "+-" and line[:3] not in ("+++", "---")]
    return [f"{TABLE.relative_to(ROOT)}: {line}" for line in lines] + (["--write takes them over"] if lines else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)} instead of comparing")
    parser.add_argument("--require", action="store_true", help="without nvcc or torch, fail rather than skip")
    options = parser.parse_args()

    nvcc, include = find("nvcc"), stable_abi.torch_include()
    if nvcc is None or include is None:
        print(f"cuda-check: skipped: {'nvcc' if nvcc is None else 'torch'} not found")
        return 1 if options.require else 0

    failures, rows = [], []
    sources = sorted((ROOT / "csrc").rglob("*_cuda.cu"), key=lambda path: -path.stat().st_size)
    asked: dict[str, list[str]] = {}  # what each object needs from elsewhere
    offered: set[str] = set()
    jobs = os.cpu_count() or 2
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=jobs) as pool:

        def check(work: tuple[Path, str]) -> tuple[str, str, Path, bool]:
            source, arch = work
            output = Path(folder, f"{source.stem}.{arch}.o")
            command = compile_command(nvcc, source, output, include, (arch,))
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            return str(source.relative_to(ROOT)), done.stdout, output, done.returncode == 0

        # One architecture at a time, so that all cores have work however long the longest file is.
        for name, log, output, compiles in pool.map(check, [(source, arch) for source in sources for arch in ARCHS]):
            rows += [{"file": name} | row for row in kernel_rows(log)]
            if not compiles:
                failures.append(f"{name}: does not compile\n{log if 'spilled' not in log else 'registers spill'}")
                continue
            asked[name] = stable_abi.undefined_symbols(output)
            offered |= stable_abi.defined_symbols(output)
    for name, symbols in asked.items():
        found = stable_abi.violations([symbol for symbol in symbols if symbol not in offered], include)
        failures += [f"{name}: {line}" for line in found]

    for row, kernel in zip(rows, demangle([str(row["kernel"]) for row in rows]), strict=True):
        row["kernel"] = kernel
        if row["spilled"]:
            failures.append(f"{row['file']}: {kernel} spills {row['spilled']} bytes on sm_{row['arch']}")
    if not failures:
        failures += compare(ptxas_table(rows), nvcc, options.write)
    for failure in failures:
        print(f"cuda-check: {failure}", file=sys.stderr)
    print(f"cuda-check: {len(sources)} files, {len(rows)} kernels, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
