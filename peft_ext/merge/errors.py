"""The error of a merge, and helpers that raise the error."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NoReturn

from ..sources.json_file import raised_as


class MergeError(ValueError):
    """Raised if a merge is impossible. The message is one line that says what came and mostly what was wanted."""


def fail(text: str) -> NoReturn:
    raise MergeError(f"merge_to_dense: {text}")


def as_merge_error(*kinds: type[Exception], about: str = "") -> AbstractContextManager[None]:
    """Within the context, errors of the classes ``kinds`` are raised as MergeError, whose message has ``about`` and the
    first line of the original error."""
    return raised_as(MergeError, f"merge_to_dense: {about}", *kinds)
