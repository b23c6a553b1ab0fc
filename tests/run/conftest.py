"""Fixtures of the tests of whole runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def short_answers() -> Iterator[None]:
    """A run generates two tokens of an answer to a prompt, and none to held-out examples."""
    from peft_ext.run import evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "NEW_TOKENS", 2)
        patch.setattr(evaluate, "SAMPLES", 0)
        yield
