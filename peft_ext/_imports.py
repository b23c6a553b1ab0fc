"""Imports names of PEFT, bitsandbytes and transformers that another release may have renamed, and reports missing ones.

    with optional("peft", "DoRA layers are not fused"):         warns, naming the name and what it costs; goes on
        from peft.tuners.lora.variants import DoraLinearVariant
    with required("peft", "peft_ext.get_peft_model"):           raises, naming the name and who needs it
        from peft import PeftModel

``optional`` does not warn where the package itself is not installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec

# One sentence for each missing name, in the order in which the names were found missing. ``explain`` lists them.
MISSING: list[str] = []


def version(package: str) -> str:
    """Returns the package's name and installed version, or the name alone where the package is not installed."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


def say_missing(package: str, what: str, cost: str) -> None:
    """Warns once that an installed package differs from the releases known here: ``what`` differs, at the ``cost``."""
    text = f"{version(package)} is not as peft_ext knows it: {what}; {cost}"
    if text not in MISSING:
        MISSING.append(text)
        warnings.warn(f"peft_ext: {text}", stacklevel=3)


def has(kind: type, *names: str) -> None:
    """Raises ImportError, for ``optional`` and ``required`` to handle, where ``kind`` lacks one of ``names``."""
    for name in names:
        if not hasattr(kind, name):
            raise ImportError(f"{kind.__module__}.{kind.__qualname__} has no {name}")


def _is_absent(package: str) -> bool:
    """Returns whether the package is not installed; then a failed import is not about a name in the package."""
    return find_spec(package) is None


@contextmanager
def optional(package: str, cost: str) -> Iterator[None]:
    """Continues after a failed import and warns. The names need values from before. ``cost`` completes the warning."""
    try:
        yield
    except ImportError as error:
        if not _is_absent(package):
            say_missing(package, str(error), cost)


@contextmanager
def required(package: str, user: str) -> Iterator[None]:
    """Raises the ImportError of a failed import again, with the package's version and the ``user`` of the name.

    Raises: ImportError; where the package is not installed, the original error.
    """
    try:
        yield
    except ImportError as error:
        if _is_absent(package):
            raise
        raise ImportError(f"{user} can't be used: {version(package)} is not as peft_ext knows it: {error}",
                          name=error.name, path=error.path) from error  # fmt: skip
