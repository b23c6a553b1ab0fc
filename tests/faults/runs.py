"""Functions for the tests of faults that check a run's folder, an adapter, leftovers of writing, and errors."""

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
    """Returns the leftovers of atomic writing anywhere below ``folder``."""
    return sorted(str(p) for p in folder.rglob(".*") if p.suffix in (".part", ".old") or p.name == ".lock")


def adapter(folder: Path):
    """Returns the bytes of the adapter's weights; None without an adapter. Raises where the adapter can't be read."""
    if not ((folder / WEIGHTS).exists() and (folder / "adapter_config.json").exists()):
        return None
    json.loads((folder / "adapter_config.json").read_text())
    load_file(folder / WEIGHTS)
    return (folder / WEIGHTS).read_bytes()


def assert_readable(out: Path, *whole: Path) -> None:
    """Asserts that ``out`` has an adapter of one of the folders ``whole``, and no partial file of a run."""
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
    """Returns the line of the error from a failed command's result; a warning about the report may precede the line."""
    code, text = code_and_text
    lines = [line for line in text.splitlines() if not line.startswith("warning: ")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, text)
    return lines[0]


def merge_command(dense: Path, output: Path, *options: str, base: Optional[Path] = None) -> list[str]:
    """Returns the command line that merges adapter ``two`` of ``dense`` into its base or into ``base``."""
    return ["merge", "--model", str(base or dense / "base"), "--adapter", str(dense / "two"), "--output", str(output),
            *options]  # fmt: skip


def second_adapter(dense: Path) -> peft.PeftModel:
    """Returns the base of ``dense`` with adapter ``two``."""
    return peft.PeftModel.from_pretrained(ARCHITECTURES["Llama"].model.from_pretrained(dense / "base"), dense / "two")
