"""Fixtures of the tests of whole runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def short_answers() -> Iterator[None]:
    """Lets a run generate two tokens of its answer to a prompt, and no answers to held-out examples."""
    from peft_ext.run import evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "NEW_TOKENS", 2)
        patch.setattr(evaluate, "SAMPLES", 0)
        yield
