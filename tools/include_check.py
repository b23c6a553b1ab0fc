"""Checks #include in csrc/: a file includes only files of its own folder and of lower levels, and no circle exists.

    python tools/include_check.py [--graph]

The levels, from the lowest: common; emulator; cpu and cuda; weight; nf4; packed; linear; the folders of the operators,
none of which includes another; and decoder_layer and gated_lora, which call functions of other operators. Files for
the CPU include no files for CUDA, and files for CUDA include no files for the CPU, except that files of the emulator
may. The program prints each wrong include, and fails if it finds one. ``--graph`` only prints the number of includes
between each two folders.
"""

from __future__ import annotations

import argparse
import collections
import graphlib
import re
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FLOORS = (("common",), ("emulator",), ("cpu", "cuda"), ("weight",), ("nf4",), ("packed",), ("linear",))
FLOOR = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
FLOOR["decoder_layer"] = FLOOR["gated_lora"] = len(FLOORS) + 1
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


def includes(csrc: Path) -> dict[str, list[str]]:
    """Returns a dict from each file of csrc/ to the list of the files that it includes in quotes."""
    sources = [path for path in sorted(csrc.rglob("*")) if path.suffix in (".h", ".cpp", ".cuh", ".cu")]
    return {str(path.relative_to(csrc)): INCLUDE.findall(path.read_text()) for path in sources}


def device(file: str) -> str:
    """Returns "cpu" or "cuda" if a file is only for the CPU or only for CUDA, and otherwise an empty string."""
    if file.endswith((".cu", ".cuh", "_cuda.cpp")) or "cuda" in Path(file).parts:
        return "cuda"
    return "cpu" if "cpu" in Path(file).parts or file.endswith("_cpu.cpp") else ""


def faults(graph: dict[str, list[str]]) -> list[str]:
    """Returns a line for each wrong include, and a line if the includes form a circle. ``graph``: for each file, the
    files that it includes."""
    found = []
    for file, included in graph.items():
        folder = Path(file).parts[0]
        for other in included:
            below = Path(other).parts[0]
            if other not in graph:
                found.append(f"{file} includes {other}, which is not in csrc/")
            elif folder != below and FLOOR.get(below, len(FLOORS)) >= FLOOR.get(folder, len(FLOORS)):
                found.append(f"{file} includes {other}, which is not below it")
            elif {device(file), device(other)} == {"cpu", "cuda"} and folder != "emulator":
                found.append(f"{file} includes {other}, which is for the other device")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"a circle: {' -> '.join(error.args[1])}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", action="store_true")
    graph = includes(CSRC)
    if parser.parse_args().graph:
        edges = collections.Counter((str(Path(file).parent), str(Path(other).parent)) for file in graph
                                    for other in graph[file])  # fmt: skip
        for (folder, below), count in sorted(edges.items()):
            print(f"{folder} -> {below}  {count}")
        return 0
    wrong = faults(graph)
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
