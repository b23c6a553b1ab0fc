"""What can't be merged, as one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NoReturn, Optional

from ..sources.model import SourceError

__all__ = ["MergeError", "as_merge_error", "fail"]


class MergeError(ValueError):
    """What can't be merged, and why: one line that names what came and what was wanted."""


def fail(text: str, cause: Optional[BaseException] = None) -> NoReturn:
    raise MergeError(f"merge_to_dense: {text}") from cause


@contextlib.contextmanager
def as_merge_error() -> Iterator[None]:
    """Raises MergeError for a SourceError."""
    try:
        yield
    except SourceError as error:
        fail(str(error), error)
