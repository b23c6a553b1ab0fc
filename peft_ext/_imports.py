"""Context managers for imports from PEFT, bitsandbytes and transformers, which report names that a release lacks.

    with optional("peft", "DoRA layers are not fused"):         warns of a missing name and goes on
        from peft.tuners.lora.variants import DoraLinearVariant
    with required("peft", "peft_ext.get_peft_model"):           raises for a missing name
        from peft import PeftModel

``optional`` does not warn if the package itself is not installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec

# One sentence for each missing name, in the order in which the names were found missing. ``explain`` lists the
# sentences.
MISSING: list[str] = []


def version(package: str) -> str:
    """Returns, as one text, the name and the installed version of ``package``; the name alone if it is not
    installed."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


def say_missing(package: str, what: str, cost: str) -> None:
    """Warns once that an installed package differs from the releases that peft_ext knows. ``what`` is the difference,
    and ``cost`` its effect, as texts of the warning."""
    text = f"{version(package)} is not as peft_ext knows it: {what}; {cost}"
    if text not in MISSING:
        MISSING.append(text)
        warnings.warn(f"peft_ext: {text}", stacklevel=3)


def has(kind: type, *names: str) -> None:
    """Raises ImportError if the class ``kind`` lacks one of ``names``.

    Call ``has`` inside ``with optional(...)`` or ``with required(...)``, which handle the ImportError.
    """
    for name in names:
        if not hasattr(kind, name):
            raise ImportError(f"{kind.__module__}.{kind.__qualname__} has no {name}")


@contextmanager
def optional(package: str, cost: str) -> Iterator[None]:
    """Continues after a failed import, and warns once, with ``cost`` in the warning, unless the package is not
    installed. Callers give the imported names a default value before the import."""
    try:
        yield
    except ImportError as error:
        if find_spec(package) is not None:
            say_missing(package, str(error), cost)


@contextmanager
def required(package: str, user: str) -> Iterator[None]:
    """If an import fails within the context, raises an ImportError that names the installed release and ``user``, the
    function that needs the import. If the package is not installed, the original error is raised.
    """
    try:
        yield
    except ImportError as error:
        if find_spec(package) is None:
            raise
        raise ImportError(f"{user} can't be used: {version(package)} is not as peft_ext knows it: {error}",
                          name=error.name, path=error.path) from error  # fmt: skip
