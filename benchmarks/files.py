"""Reads and writes result files: ``benchmarks/results/<kind>-<subject>-<CPU path or GPU>-<date>.json``.

The kind of a result file is ``layer`` (operators and single layers), ``step`` (whole training steps) or ``run`` (whole
training runs). A committed result file comes from one run of one command, and has only the rows that a table or a
picture of the documents shows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Optional

from peft_ext.files import atomic_file

RESULTS = Path(__file__).parent / "results"

Result = dict[str, Any]


def result_path(subject: str, machine: dict[str, Any], out: Optional[Path] = None) -> Path:
    """Returns the path of a result file: ``out`` itself, or a file in the folder ``out`` (default: ``results/``).

    Args:
        subject: kind and subject, such as "layer-nf4".
        machine: the result of :func:`.harness.machine`.
    """
    if out is not None and not out.is_dir():
        return out
    place = slug(machine["gpu"]["name"]) if "gpu" in machine else machine["isa"]
    return (out or RESULTS) / f"{subject}-{place}-{machine['date']}.json"


def write(path: Path, result: Result) -> None:
    """Writes a result file with one line for each field and each row. If the write is interrupted, the old file
    remains."""

    def text(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n  ".join(map(json.dumps, value))
            return f"[\n  {rows}\n ]"
        return json.dumps(value)

    fields = ",\n ".join(f"{json.dumps(name)}: {text(value)}" for name, value in result.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(f"{{\n {fields}\n}}\n")


def record(subject: str, result: Result, out: Optional[Path]) -> None:
    """Writes ``result`` to the file of :func:`result_path`, and prints the file's path."""
    path = result_path(subject, result["machine"], out)
    write(path, result)
    print(f"written: {path}")


def newest(name: str) -> Optional[Result]:
    """Returns the content of the newest result file ``<name>-<date>.json``; None if no such file exists."""
    found = sorted(RESULTS.glob(f"{name}-????-??-??.json"))
    return json.loads(found[-1].read_text()) if found else None


def newest_by_gpu() -> list[Result]:
    """Returns a list with, for each GPU, the content of the newest result file of ``python -m benchmarks --device
    cuda`` with all benchmarks."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("layer-all-*.json"))]
    return list({result["machine"]["gpu"]["name"]: result for result in found if is_of_a_gpu(result)}.values())


def is_of_a_gpu(result: Result) -> bool:
    return "gpu" in result["machine"]


def slug(name: str) -> str:
    """Returns a GPU's name as a file name contains it, such as "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
