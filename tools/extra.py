"""Prints the requirements of extras of peft_ext, so that pip installs these packages without building peft_ext.

python -m pip install $(python tools/extra.py docs examples)

If peft_ext is not installed, the program reads the requirements that ``setup.py sdist`` wrote into the checkout.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

PACKAGE = "peft_ext"
ROOT = Path(__file__).resolve().parents[1]


def declared() -> list[str]:
    """Returns all requirements of peft_ext with their markers."""
    try:
        return requires(PACKAGE) or []
    except PackageNotFoundError:
        for found in distributions(name=PACKAGE, path=[str(ROOT)]):
            return found.requires or []
        raise


def requirements(extra: str) -> Iterator[str]:
    """Yields the requirements of ``extra`` and of the extras that ``extra`` includes."""
    for requirement in map(Requirement, declared()):
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name.replace("-", "_") == PACKAGE:
            for other in requirement.extras:
                yield from requirements(other)
        else:
            yield f"{requirement.name}{requirement.specifier}"


if __name__ == "__main__":
    print(*sorted({text for extra in sys.argv[1:] for text in requirements(extra)}))
