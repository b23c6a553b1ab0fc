"""Computes the digest of the native library's sources, by which an old library beside newer sources is noticed.

The build writes the digest into the library and into the module ``_C``, and the import of a checkout compares the
digests (:mod:`peft_ext._native`). The build runs this file alone, so the file imports the standard library only.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

ENDINGS = (".cpp", ".cuh", ".h", ".py")  # endings of the files whose names and contents the digest covers


def source_digest(folder: Path) -> str:
    """Returns "NAMES-CONTENTS": a digest of the names and sizes of the sources in ``folder``, and one of the sources'
    contents."""
    found = _files(str(folder))
    contents = hashlib.sha256()
    for name, entry in sorted(found.items()):
        contents.update(f"{name}\0".encode() + hashlib.sha256(Path(entry.path).read_bytes()).digest())
    return f"{_names(found)}-{contents.hexdigest()[:16]}"


def has_changed(folder: Path, digest: str, built: float) -> bool:
    """Returns whether the sources in ``folder`` are others than those with the digest ``digest``.

    ``has_changed`` first compares the names and sizes of the sources. If the names and sizes are equal, the function
    reads the sources only if a source is newer than ``built``, the time in seconds at which the library was built.
    """
    found = _files(str(folder))
    if _names(found) != digest.partition("-")[0]:
        return True
    newer = any(entry.stat().st_mtime > built for entry in found.values())
    return newer and source_digest(folder) != digest


def _files(folder: str, above: str = "") -> dict[str, os.DirEntry[str]]:
    found: dict[str, os.DirEntry[str]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                found |= _files(entry.path, f"{above}{entry.name}/")
            elif entry.name.endswith(ENDINGS):
                found[above + entry.name] = entry
    return found


def _names(found: dict[str, os.DirEntry[str]]) -> str:
    lines = "".join(f"{name} {entry.stat().st_size}\n" for name, entry in sorted(found.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
