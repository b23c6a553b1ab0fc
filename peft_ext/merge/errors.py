"""What can't be merged, as one line."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NoReturn

from ..sources.json_file import raised_as


class MergeError(ValueError):
    """What can't be merged, and why: one line that names what came and what was wanted."""


def fail(text: str) -> NoReturn:
    raise MergeError(f"merge_to_dense: {text}")


def as_merge_error(*kinds: type[Exception], about: str = "") -> AbstractContextManager[None]:
    """Raises MergeError for errors of these kinds: ``about``, and what they say."""
    return raised_as(MergeError, f"merge_to_dense: {about}", *kinds, chained=True)
