"""Names of PEFT, bitsandbytes and transformers, which another release may have renamed: what is missing is said.

    with optional("peft", "DoRA layers are not fused"):         warns, naming the name and what it costs; goes on
        from peft.tuners.lora.variants import DoraLinearVariant
    with required("peft", "peft_ext.get_peft_model"):           raises, naming the name and who needs it
        from peft import PeftModel

A package that is not installed is no fault of its release, and ``optional`` says nothing of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec

# What was missing so far, a sentence for each name, in the order in which it was found; explain lists them.
MISSING: list[str] = []


def version(package: str) -> str:
    """Returns the package's name and its installed version, or its name alone where it has none."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


def say_missing(package: str, what: str, cost: str) -> None:
    """Warns, once, that ``what`` of an installed package is not as this one knows it, and what that costs."""
    text = f"{version(package)} is not as peft_ext knows it: {what}; {cost}"
    if text not in MISSING:
        MISSING.append(text)
        warnings.warn(f"peft_ext: {text}", stacklevel=3)


def has(kind: type, *names: str) -> None:
    """Raises ImportError, which ``optional`` and ``required`` know, where the class lacks an attribute of these."""
    for name in names:
        if not hasattr(kind, name):
            raise ImportError(f"{kind.__module__}.{kind.__qualname__} has no {name}")


def _is_absent(package: str) -> bool:
    """Returns whether the package itself is not installed, and it is not a name in it, or a package that it needs."""
    return find_spec(package) is None


@contextmanager
def optional(package: str, cost: str) -> Iterator[None]:
    """Goes on after an import that fails; the names must have been given a value before. ``cost`` is a sentence."""
    try:
        yield
    except ImportError as error:
        if not _is_absent(package):
            say_missing(package, str(error), cost)


@contextmanager
def required(package: str, user: str) -> Iterator[None]:
    """Says, of an import that fails, which release lacks the name and what can't be used without it.

    Raises: ImportError; where the package is not installed, Python's own.
    """
    try:
        yield
    except ImportError as error:
        if _is_absent(package):
            raise
        raise ImportError(f"{user} can't be used: {version(package)} is not as peft_ext knows it: {error}",
                          name=error.name, path=error.path) from error  # fmt: skip
