"""Prints the requirements of extras of the installed peft_ext, so that pip installs these packages without building
peft_ext.

python -m pip install $(python tools/extra.py docs examples)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import requires

from packaging.requirements import Requirement

PACKAGE = "peft_ext"


def requirements(extra: str) -> Iterator[str]:
    """Yields the requirements of ``extra`` and of the extras that it includes."""
    for requirement in map(Requirement, requires(PACKAGE) or ()):
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name.replace("-", "_") == PACKAGE:
            for other in requirement.extras:
                yield from requirements(other)
        else:
            yield f"{requirement.name}{requirement.specifier}"


if __name__ == "__main__":
    print(*sorted({text for extra in sys.argv[1:] for text in requirements(extra)}))
