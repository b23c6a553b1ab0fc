"""Fails if a module of peft_ext uses a private name (``_name``) of another module of peft_ext.

    python tools/private_names.py

ruff's rule PLC2701 checks only names of other packages, and import-linter checks only imports of modules.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "peft_ext"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _module(file: Path, node: ast.ImportFrom) -> Path:
    """Returns the path, without the suffix .py, of the module or package that a relative import takes names from."""
    folder = file.parent
    for _ in range(node.level - 1):
        folder = folder.parent
    return folder.joinpath(*(node.module or "").split(".")) if node.module else folder


def private_names(file: Path) -> Iterator[tuple[int, str]]:
    """Yields the line number and the name of each use of a private name of another module in ``file``."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            held = _module(file, node)
            for alias in node.names:
                is_module = (held / f"{alias.name}.py").is_file() or (held / alias.name).is_dir()
                if is_module:
                    modules.add(alias.asname or alias.name)
                elif _is_private(alias.name):
                    yield node.lineno, alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            if _is_private(node.attr):
                yield node.lineno, f"{node.value.id}.{node.attr}"


def main() -> int:
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {name} is private to its module"
        for file in sorted(PACKAGE.rglob("*.py"))
        for line, name in private_names(file)
    ]
    print("\n".join(wrong) or "no private name is taken from another module")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
