"""The class of the errors of an export, and helpers that raise these errors."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NoReturn

from ..sources.json_file import raised_as


class ExportError(ValueError):
    """Raised where an export is impossible. The message is one line that names the given value and mostly the wanted
    value."""


def fail(text: str) -> NoReturn:
    raise ExportError(f"write_gguf_adapter: {text}")


def as_export_error(*kinds: type[Exception], about: str = "") -> AbstractContextManager[None]:
    """Raises errors of the classes ``kinds`` as ExportError, with ``about`` and the first line of the error."""
    return raised_as(ExportError, f"write_gguf_adapter: {about}", *kinds)
