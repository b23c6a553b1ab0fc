"""What the tests of faults look at: a run's folder, an adapter, what is left of writing, the line of an error."""

import json
import os
import sys
from pathlib import Path
from typing import Optional

import pytest

if not hasattr(os, "fork") or not sys.platform.startswith("linux"):
    pytest.skip("forks processes, mounts and limits them", allow_module_level=True)
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file  # noqa: E402
from tiny_models import ARCHITECTURES  # noqa: E402

from peft_ext.run import checkpoints  # noqa: E402

WEIGHTS = "adapter_model.safetensors"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def hidden(folder: Path) -> list[str]:
    """What atomic writing has left, anywhere."""
    return sorted(str(p) for p in folder.rglob(".*") if p.suffix in (".part", ".old") or p.name == ".lock")


def adapter(folder: Path):
    """The adapter's bytes, None where there is none; one that can't be read is an error."""
    if not ((folder / WEIGHTS).exists() and (folder / "adapter_config.json").exists()):
        return None
    json.loads((folder / "adapter_config.json").read_text())
    load_file(folder / WEIGHTS)
    return (folder / WEIGHTS).read_bytes()


def assert_readable(out: Path, *whole: Path) -> None:
    """Of the adapters of ``whole`` one is there, and what tells of a run is not half a file."""
    found = {bits for folder in (out, out / checkpoints.PREVIOUS) if (bits := adapter(folder)) is not None}
    assert found and found <= {adapter(folder) for folder in whole}
    if (out / "run.json").exists():
        assert json.loads((out / "run.json").read_text())["options"]
    if (out / "report.html").exists():
        assert (out / "report.html").read_text().endswith("</html>\n")


def assert_same_run(out: Path, unbroken: Path) -> None:
    found, wanted = (json.loads((folder / "run.json").read_text()) for folder in (out, unbroken))
    assert found["finished"] and found["losses"] == wanted["losses"] and len(found["losses"]) == 4
    assert found["perplexity"] == wanted["perplexity"] and adapter(out) == adapter(unbroken)
    assert not hidden(out.parent) and not (out / checkpoints.PREVIOUS).exists()


def refused(code_and_text) -> str:
    """The one line of an error; a warning that a report could not be drawn may come before it."""
    code, text = code_and_text
    lines = [line for line in text.splitlines() if not line.startswith("warning: ")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, text)
    return lines[0]


def merge_command(dense: Path, output: Path, *options: str, base: Optional[Path] = None) -> list[str]:
    """The command line that merges adapter ``two`` of ``dense`` into its base, or into another one."""
    return ["merge", "--model", str(base or dense / "base"), "--adapter", str(dense / "two"), "--output", str(output),
            *options]  # fmt: skip


def second_adapter(dense: Path) -> peft.PeftModel:
    """The base of ``dense`` with adapter ``two``."""
    return peft.PeftModel.from_pretrained(ARCHITECTURES["Llama"].model.from_pretrained(dense / "base"), dense / "two")
