"""Compiles the CUDA kernels with NVRTC and compares their resources with the committed tables; needs no GPU.

The kernels are those that the native library lists, compiled as on a user's machine (peft_ext/device_code.py), for
sm_80, 90, 100 and 120; kernels with a hot loop also for sm_86 and 89. The check fails in these cases: a kernel does not
compile without a warning; a kernel spills registers; a parameter has another offset or size in the machine code than on
the host, where g++ lays out the parameters of a launch; the registers or the shared memory of a kernel differ from
docs/ptxas.tsv; the row of a hot loop differs from docs/slots.tsv (see slots.py); a table or the kernel of a hot loop is
missing. A table that another release of NVRTC wrote is not compared. ``--write`` writes the new values into the tables.
``--archs`` compiles for some architectures alone, and compares only these architectures' parts of the tables.
``--only`` compiles only the kernels whose names contain one of the given texts, and compares, or writes, only the rows
of these kernels. Of the kernels of packed weights, whose first template argument is the number of a format, the tables
have those that decode to bfloat16, those for one token in bfloat16, and those with a hot loop. The other kernels of
packed weights are compiled only with ``--formats``.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import parameters
import sass
import slots

from peft_ext import device_code

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs/ptxas.tsv"
ARCHS = ("80", "90", "100", "120")


def kernel_rows(log: str) -> list[dict[str, object]]:
    """Returns a row for each kernel and architecture in the log of ``ptxas -v``, with the number of registers and the
    bytes of shared memory, of spilled registers and of the stack."""
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


def hot_rows(
    image: device_code.Image, name: str, arch: str, nvdisasm: str, row: dict[str, object]
) -> list[dict[str, str]]:
    """Returns a row of docs/slots.tsv for each hot loop of the kernel ``name``, from the kernel's machine code in
    ``image``. ``row`` is the kernel's row of :func:`kernel_rows`."""
    loops = [hot for hot in slots.HOT if hot.kernel == name]
    if not loops:
        return []
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image.code)
        file.flush()
        code = sass.disassemble(Path(file.name), nvdisasm)[image.symbol.decode()]
    held = {name: int(str(row[name])) for name in ("registers", "stack", "shared")}
    return [slots.measure(hot, arch, code, held) for hot in loops]


def ptxas_table(rows: list[dict[str, object]]) -> str:
    """Returns the text of docs/ptxas.tsv without its first line. The table has, for each kernel, the bytes of shared
    memory and the number of registers on each architecture."""
    archs = sorted({str(row["arch"]) for row in rows}, key=int)
    found: dict[tuple[str, str], dict[str, dict[str, object]]] = {}
    for row in rows:
        found.setdefault((str(row["file"]), str(row["kernel"])), {})[str(row["arch"])] = row
    lines = ["file\tkernel\tshared bytes\t" + "\t".join(f"sm_{arch}" for arch in archs)]
    for key, by_arch in sorted(found.items()):
        shared = "/".join(sorted({str(row["shared"]) for row in by_arch.values()}))
        lines.append("\t".join([*key, shared, *(str(by_arch[arch]["registers"]) for arch in archs)]))
    return "\n".join(lines) + "\n"


def in_tables(name: str) -> bool:
    """Returns whether docs/ptxas.tsv has a row for a kernel. Of the kernels of packed weights, the table has those that
    decode to bfloat16, those for one token in bfloat16, and those with a hot loop."""
    loops = {entry.kernel for entry in slots.HOT}
    return not name.startswith("packed_") or name in loops or re.search(r"<\d+, bf16(, 1)?>", name) is not None


def of_archs(table: str, archs: list[str]) -> str:
    """Returns the part of a table about some architectures: columns of ptxas.tsv, or rows of slots.tsv."""
    header, *rows = [line.split("\t") for line in table.splitlines()]
    if "arch" in header:
        rows = [row for row in rows if row[header.index("arch")] in archs]
    columns = [i for i, name in enumerate(header) if not name.startswith("sm_") or name[3:] in archs]
    return "".join("\t".join(row[i] for i in columns) + "\n" for row in [header, *rows])


def split(table: str, only: set[str]) -> tuple[list[str], list[str]]:
    """Returns two lists without the header: the rows of a table for the kernels whose names contain one of the texts
    ``only`` (all kernels if ``only`` is empty), and the remaining rows.
    """
    loops = {entry.name: entry.kernel for entry in slots.HOT}

    def asked(row: str) -> bool:
        cells = row.split("\t")
        name = loops.get(cells[0], cells[1])
        return not only or any(text in name for text in only)

    rows = table.splitlines()[1:]
    return [row for row in rows if asked(row)], [row for row in rows if not asked(row)]


def compare(path: Path, table: str, nvrtc: str, write: bool, archs: list[str], only: set[str]) -> list[str]:
    """Returns the differences between ``table`` and the committed table at ``path``. A table whose first line names
    another release of NVRTC is not compared. With ``write``, writes ``table`` to ``path`` (with ``only``, in place of
    the rows of the same kernels) and returns no difference.
    """
    note = f". {slots.NOTE}" if path == slots.TABLE else ""
    wanted = f"# NVRTC {nvrtc}{note}\n{table}"
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
        print(f"cuda-check: {path.name} is of {held.splitlines()[0][2:]}, this is NVRTC {nvrtc}: not compared")
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
    parser.add_argument("--only", default="", help="comma-separated parts of kernels' names; default: all kernels")
    parser.add_argument("--formats", action="store_true", help="also all kernels of every format of packed weights")
    options = parser.parse_args()
    archs, only = options.archs.split(","), set(options.only.split(",")) - {""}
    if unknown := set(archs) - set(slots.ARCHS):
        parser.error(f"no architecture {', '.join(sorted(unknown))}; there are {', '.join(slots.ARCHS)}")
    if options.write and set(archs) != set(slots.ARCHS):
        parser.error("--write takes the tables over as a whole, not for some architectures")
    nvdisasm = sass.find_nvdisasm()
    if why := device_code.missing() or (nvdisasm is None and "nvdisasm not found (pip install nvidia-cuda-nvdisasm)"):
        sys.exit(f"cuda-check: {why}")
    kernels = [(slots.kernel_name(name), name, file) for name, file in device_code.kernels()]
    kernels = [kernel for kernel in kernels if not only or any(text in kernel[0] for text in only)]
    kernels = [kernel for kernel in kernels if options.formats or in_tables(kernel[0])]
    if not kernels:
        parser.error(f"no kernel's name contains {' or '.join(sorted(only))}")

    with_hot = {entry.kernel for entry in slots.HOT}
    work = [(*kernel, arch) for kernel in kernels for arch in archs if arch in ARCHS or kernel[0] in with_hot]
    layouts = parameters.on_host([(expression, file) for _, expression, file in kernels])
    failures: list[str] = []
    rows: list[dict[str, object]] = []
    hot: list[dict[str, str]] = []

    def check(name: str, expression: str, file: str, arch: str) -> None:
        try:
            image, log = device_code.compile_kernel(expression, file, f"sm_{arch}", "--ptxas-options=-v")
        except RuntimeError as error:
            failures.append(str(error))
            return
        # NVRTC also compiles the kernels of the same file that are no templates, so that the log has these kernels too.
        (row,) = [row for row in kernel_rows(log) if row["kernel"] == image.symbol.decode()]
        failures.extend(parameters.differences(name, image.code, image.symbol.decode(), layouts[expression]))
        if "warning" in log.lower():
            failures.append(f"{name} on sm_{arch}: {log}")
        if row["spilled"]:
            failures.append(f"{name} spills {row['spilled']} bytes on sm_{arch}")
        hot.extend(hot_rows(image, name, arch, nvdisasm, row))
        if arch in ARCHS and in_tables(name):
            rows.append(row | {"file": file.rpartition("csrc/")[2], "kernel": name})

    with ThreadPoolExecutor(max_workers=int(os.environ.get("MAX_JOBS", os.cpu_count() or 2))) as pool:
        for done in pool.map(lambda item: check(*item), work):
            assert done is None  # pool.map raises an exception that check() raised
    if not failures:
        failures += compare(TABLE, ptxas_table(rows), device_code.version(), options.write, archs, only)
        wanted = {entry.name for entry in slots.HOT if not only or any(text in entry.kernel for text in only)}
        missing = wanted - {row["loop"] for row in hot}
        failures += [f"{name}: no such kernel, see slots.py" for name in sorted(missing)]
        if not missing:
            failures += compare(slots.TABLE, slots.table(hot), device_code.version(), options.write, archs, only)
    for failure in failures:
        print(f"cuda-check: {failure}", file=sys.stderr)
    print(f"cuda-check: {len(kernels)} kernels, {len(work)} compiled, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
