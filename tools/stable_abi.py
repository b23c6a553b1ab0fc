"""Checks that a native library needs only symbols that the oldest supported torch has.

The module imports only the standard library. torch's shim headers state from which release on a function exists, by
``#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_12_0``.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

TARGET = (2, 11)

_SHIMS = ("stable/c/*.h", "inductor/aoti_torch/c/*.h", "inductor/aoti_torch/generated/*.h")
_GUARD = re.compile(r"TORCH_FEATURE_VERSION\s*>=\s*TORCH_VERSION_(\d+)_(\d+)_\d+")
_DECLARATION = re.compile(r"\b((?:aoti_torch|torch)_\w+)\s*\(")
_SHIM_SYMBOL = re.compile(r"\b(?:aoti_torch|torch)_\w+")


def torch_include() -> Path | None:
    """Returns the folder of the headers of the installed torch, without importing torch; None if torch is not
    installed."""
    spec = importlib.util.find_spec("torch")
    return None if spec is None else Path(spec.submodule_search_locations[0], "include")


def declared_since(text: str) -> dict[str, tuple[int, int]]:
    """Returns a dict from each function that the text of a shim header declares to the torch release that the ``#if``
    around the declaration names, or to (0, 0) for a declaration outside of such an ``#if``."""
    since: dict[str, tuple[int, int]] = {}
    guards: list[tuple[int, int]] = []
    for line in text.splitlines():
        directive = line.lstrip()
        if directive.startswith("#if"):
            guard = _GUARD.search(directive)
            guards.append((int(guard[1]), int(guard[2])) if guard else (0, 0))
        elif directive.startswith(("#else", "#elif")):
            guards[-1] = (0, 0)
        elif directive.startswith("#endif"):
            guards.pop()
        elif not directive.startswith("//"):
            for name in _DECLARATION.findall(line):
                since[name] = min(max(guards, default=(0, 0)), since.get(name, (99, 0)))
    return since


def undefined_symbols(library: Path) -> list[str]:
    """Returns the symbols that a shared library needs from other files, with C++ names demangled."""
    listing = subprocess.run(["nm", "-uCD", str(library)], check=True, capture_output=True, text=True).stdout
    return [line.strip().split(maxsplit=1)[1] for line in listing.splitlines() if line.strip().startswith(("U ", "w "))]


def violations(symbols: list[str], include: Path) -> list[str]:
    """Returns a line for each symbol of torch in ``symbols`` that is not in the stable ABI of the torch release TARGET.
    ``include``: the folder of torch's headers."""
    since: dict[str, tuple[int, int]] = {}
    for header in (path for pattern in _SHIMS for path in sorted((include / "torch/csrc").glob(pattern))):
        for name, version in declared_since(header.read_text()).items():
            since[name] = min(version, since.get(name, version))
    found = []
    for symbol in symbols:
        if re.search(r"\b(?:at|c10)::", symbol):
            found.append(f"{symbol}: not of the stable ABI")
        elif _SHIM_SYMBOL.match(symbol):
            name = symbol.split("@")[0]
            if name not in since:
                found.append(f"{symbol}: in none of torch's shim headers")
            elif since[name] > TARGET:
                found.append(f"{symbol}: since torch {'.'.join(map(str, since[name]))}, target {TARGET[0]}.{TARGET[1]}")
    return found
