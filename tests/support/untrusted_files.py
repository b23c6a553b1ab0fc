"""Helpers for tests that read broken, absurd or malicious folders of models and adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

# A regular expression that takes exponential time (by backtracking) on the name of a layer.
EVIL = "([a-z_.0-9]+)+!"


@contextmanager
def one_line(start: str, within: str = "", kind: type[Exception] = ValueError, most: int = 10**6) -> Iterator[None]:
    """Asserts that the block raises a one-line error that begins with ``start`` and contains ``within``."""
    with pytest.raises(kind) as caught:
        yield
    text = str(caught.value)
    assert text.startswith(start) and within in text and "\n" not in text and len(text) < most, text


def edited(folder: Path, out: Path, name: str = "adapter_config.json", **changes: Any) -> Path:
    """Copies ``folder`` to ``out`` and changes fields of a JSON file there. Returns ``out``."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    (out / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))
    return out


def rewritten(folder: Path, out: Path, name: str, data: bytes) -> Path:
    shutil.copytree(folder, out, dirs_exist_ok=True)
    (out / name).write_bytes(data)
    return out


def changed_tensors(adapter: Path, out: Path, change: Callable[[dict[str, torch.Tensor], str], Any]) -> Path:
    shutil.copytree(adapter, out, dirs_exist_ok=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors, min(tensors))
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    return out
