"""ExportError, the class of the errors of an export to llama.cpp's adapter file, and helpers that raise it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NoReturn

from ..sources.json_file import raised_as


class ExportError(ValueError):
    """Raised where an adapter can't be exported to llama.cpp's adapter file. The message is one line, which usually
    names the given value and the wanted value."""


def fail(text: str) -> NoReturn:
    raise ExportError(f"write_gguf_adapter: {text}")


def as_export_error(*kinds: type[Exception], about: str = "") -> AbstractContextManager[None]:
    """Within the context, errors of the classes ``kinds`` are raised as ExportError, with ``about`` and the first line
    of the original error as message."""
    return raised_as(ExportError, f"write_gguf_adapter: {about}", *kinds)
