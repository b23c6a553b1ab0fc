"""Compiles the CUDA kernels and compares their resources with the committed tables; needs nvcc, and no GPU.

Torch's headers of a CPU build are enough. Every csrc/**/*_cuda.cu is compiled for sm_80, 90, 100 and 120; files with a
hot loop also for sm_86 and 89. The check fails in these cases: a file does not compile without a warning; a kernel
spills registers or keeps an array in local memory; an object needs a symbol outside of torch's stable ABI; the
registers or the shared memory of a kernel differ from docs/ptxas.tsv; the instructions of a hot loop differ from
docs/slots.tsv (see slots.py). A table that another nvcc release wrote is not compared. ``--write`` writes the new
values into the tables, so that a review sees each change. ``--archs`` compiles for some architectures alone, and
compares only their rows. ``--only`` compiles some files alone, and compares, or writes, only their rows.
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

import sass
import slots
import stable_abi

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs/ptxas.tsv"
ARCHS = ("80", "90", "100", "120")


def find(tool: str) -> str | None:
    """Returns the path of a tool of the CUDA toolkit, on PATH or under CUDA_HOME."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(tool) or shutil.which(tool, path=os.path.join(home, "bin"))


def compile_command(
    nvcc: str, source: Path, output: Path, include: Path, archs: tuple[str, ...], keep: Path | None = None
) -> list[str]:
    """Returns nvcc's command for a source. ``keep``: folder for intermediate files such as the machine code."""
    target = stable_abi.TARGET[0] << 56 | stable_abi.TARGET[1] << 48
    return [
        nvcc, "-c", str(source), "-o", str(output), "-O3", "-std=c++17",
        f"-I{ROOT / 'csrc'}", "-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include"),
        "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION=0x{target:016x}",
        "-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage",
        "-Xcompiler", "-Wall,-fvisibility=hidden",
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs),
        *([] if keep is None else ["--keep", "--keep-dir", str(keep)]),
    ]  # fmt: skip


def kernel_rows(log: str) -> list[dict[str, object]]:
    """Returns a row for each kernel and architecture: registers, shared, spilled and stack bytes, from ptxas -v."""
    rows: list[dict[str, object]] = []
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            rows.append({"kernel": entry[1], "arch": entry[2], "registers": 0, "shared": 0, "spilled": 0, "stack": 0})
        elif rows and (
            spills := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        ):
            rows[-1]["stack"] = int(spills[1])
            rows[-1]["spilled"] = int(spills[2]) + int(spills[3])
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
    return [slots.kernel_name(line) for line in text.splitlines()]


def hot_rows(cubin: Path, arch: str, nvdisasm: str, rows: list[dict[str, object]]) -> list[dict[str, str]]:
    """Returns the rows of slots.tsv for the machine code of a file. ``rows`` are the file's rows from kernel_rows."""
    code = sass.disassemble(cubin, nvdisasm)
    names = dict(zip(demangle(list(code)), code, strict=True))
    used = {str(row["kernel"]): row for row in rows}
    found = []
    for hot in slots.HOT:
        if hot.file in cubin.stem and hot.kernel in names:
            mangled = names[hot.kernel]
            held = {name: int(str(used[mangled][name])) for name in ("registers", "stack", "shared")}
            found.append(slots.measure(hot, arch, code[mangled], held))
    return found


def ptxas_table(rows: list[dict[str, object]]) -> str:
    """Returns a line for each kernel with its registers on each architecture and its shared memory."""
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
    """Returns "13.0" for "Cuda compilation tools, release 13.0, V13.0.88"."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else "unknown"


def of_archs(table: str, archs: list[str]) -> str:
    """Returns the part of a table about some architectures: columns of ptxas.tsv, or rows of slots.tsv."""
    header, *rows = [line.split("\t") for line in table.splitlines()]
    if "arch" in header:
        rows = [row for row in rows if row[header.index("arch")] in archs]
    columns = [i for i, name in enumerate(header) if not name.startswith("sm_") or name[3:] in archs]
    return "".join("\t".join(row[i] for i in columns) + "\n" for row in [header, *rows])


def split(table: str, only: set[str]) -> tuple[list[str], list[str]]:
    """Returns the rows of a table that belong to the files ``only`` (stems; empty: all files), and the other rows,
    without the header.
    """
    loops = {entry.name: entry.file for entry in slots.HOT}

    def asked(row: str) -> bool:
        first = row.split("\t")[0]
        return not only or (Path(first).stem if first.endswith(".cu") else loops.get(first)) in only

    rows = table.splitlines()[1:]
    return [row for row in rows if asked(row)], [row for row in rows if not asked(row)]


def compare(path: Path, table: str, nvcc: str, write: bool, archs: list[str], only: set[str]) -> list[str]:
    """Returns the differences between ``table`` and the committed table at ``path``. A committed table of another nvcc
    release, which its first line names, is not compared. With ``write``, writes ``table`` and returns no difference.
    """
    wanted = f"# nvcc {release(nvcc)}\n{table}"
    if write:
        header = wanted.splitlines()[:2]
        rows = wanted.splitlines()[2:]
        if only:
            rows += split(path.read_text().split("\n", 1)[1], only)[1]
            order = {entry.name: index for index, entry in enumerate(slots.HOT)}
            rows.sort(
                key=lambda row: (order.get(row.split("\t")[0], -1), row.split("\t")[0], row.split("\t")[1].zfill(4))
            )
        path.write_text("\n".join([*header, *rows]) + "\n")
        return []
    if not path.exists():
        return [f"{path.relative_to(ROOT)} is missing; --write makes it"]
    held = path.read_text()
    if held.splitlines()[:1] != wanted.splitlines()[:1]:
        print(f"cuda-check: {path.name} is of {held.splitlines()[0][2:]}, this is nvcc {release(nvcc)}: not compared")
        return []
    known = of_archs(held.split("\n", 1)[1], archs)
    known = [known.splitlines()[0], *split(known, only)[0]]
    changed = difflib.unified_diff(known, table.splitlines(), "committed", "compiled", lineterm="", n=0)
    lines = [line for line in changed if line[0] in "+-" and line[:3] not in ("+++", "---")]
    return [f"{path.relative_to(ROOT)}: {line}" for line in lines] + (["--write takes them over"] if lines else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables instead of comparing")
    parser.add_argument("--archs", default=",".join(slots.ARCHS), help="comma-separated; default: all")
    parser.add_argument("--only", default="", help="comma-separated stems of files; default: all")
    parser.add_argument("--require", action="store_true", help="without nvcc or torch, fail rather than skip")
    options = parser.parse_args()
    archs, only = options.archs.split(","), set(options.only.split(",")) - {""}
    if unknown := set(archs) - set(slots.ARCHS):
        parser.error(f"no architecture {', '.join(sorted(unknown))}; there are {', '.join(slots.ARCHS)}")
    if options.write and set(archs) != set(slots.ARCHS):
        parser.error("--write takes the tables over as a whole, not for some architectures")

    nvcc, include, nvdisasm = find("nvcc"), stable_abi.torch_include(), sass.find_nvdisasm()
    if nvcc is None or include is None:
        print(f"cuda-check: skipped: {'nvcc' if nvcc is None else 'torch'} not found")
        return 1 if options.require else 0
    if nvdisasm is None:
        print("cuda-check: nvdisasm not found (pip install nvidia-cuda-nvdisasm): hot loops are not counted")
        if options.require or options.write:
            return 1

    failures, rows, hot = [], [], []
    # The files that take longest come first: short files with many instances, then long files.
    with_hot = {entry.file for entry in slots.HOT}
    sources = sorted(
        (ROOT / "csrc").rglob("*_cuda.cu"), key=lambda path: (path.stat().st_size > 500, -path.stat().st_size)
    )
    if unknown := only - {path.stem for path in sources}:
        parser.error(f"no file {', '.join(sorted(unknown))} in csrc/")
    sources = [path for path in sources if not only or path.stem in only]
    asked: dict[str, list[str]] = {}  # the symbols that each object needs from other objects
    offered: set[str] = set()
    jobs = os.cpu_count() or 2
    work_list = [
        (source, arch)
        for source in sources
        for arch in archs
        if arch in ARCHS or (source.stem in with_hot and nvdisasm is not None)
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=jobs) as pool:

        def check(work: tuple[Path, str]) -> tuple[str, str, Path, bool, list[dict[str, str]]]:
            source, arch = work
            output = Path(folder, f"{source.stem}.{arch}.o")
            counted = source.stem in with_hot and nvdisasm is not None
            keep = Path(folder, f"{source.stem}.{arch}") if counted else None
            if keep is not None:
                keep.mkdir()
            command = compile_command(nvcc, source, output, include, (arch,), keep)
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            found = []
            if keep is not None and nvdisasm is not None:
                for cubin in keep.glob("*.cubin"):
                    found += hot_rows(cubin, arch, nvdisasm, kernel_rows(done.stdout))
                shutil.rmtree(keep)
            return str(source.relative_to(ROOT)), done.stdout, output, done.returncode == 0, found

        # Each file and architecture is a job of its own, so that all cores have work while the longest file compiles.
        for (_, arch), (name, log, output, compiles, found) in zip(work_list, pool.map(check, work_list), strict=True):
            hot += found
            rows += [{"file": name} | row for row in kernel_rows(log) if arch in ARCHS]
            if not compiles:
                failures.append(f"{name}: does not compile\n{log if 'spilled' not in log else 'registers spill'}")
                continue
            asked[name] = stable_abi.undefined_symbols(output)
            offered |= stable_abi.defined_symbols(output)
    for name, symbols in asked.items():
        found = stable_abi.violations([symbol for symbol in symbols if symbol not in offered], include)
        # With ``--only``, some of peft_ext's functions are defined in files that are not compiled.
        failures += [f"{name}: {line}" for line in found if not (only and line.startswith("peft_ext::"))]

    for row, kernel in zip(rows, demangle([str(row["kernel"]) for row in rows]), strict=True):
        row["kernel"] = kernel
        if row["spilled"]:
            failures.append(f"{row['file']}: {kernel} spills {row['spilled']} bytes on sm_{row['arch']}")
    if not failures:
        failures += compare(TABLE, ptxas_table(rows), nvcc, options.write, archs, only)
    if not failures and nvdisasm is not None:
        wanted = {entry.name for entry in slots.HOT if not only or entry.file in only}
        missing = wanted - {row["loop"] for row in hot}
        failures += [f"{name}: no such kernel, see slots.py" for name in sorted(missing)]
        failures += compare(slots.TABLE, slots.table(hot), nvcc, options.write, archs, only) if not missing else []
    for failure in failures:
        print(f"cuda-check: {failure}", file=sys.stderr)
    print(f"cuda-check: {len(sources)} files, {len(rows)} kernels, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
