"""A pytest plugin for both runs: a test that wants the hub is skipped, and counted; ``-p offline``.

PEFT's helper ``hub_online_once`` goes online whatever HF_HUB_OFFLINE says, and waits a minute before it gives up. Here
it skips the test of a model of the hub that is not on this machine. What a test asks the hub for without it is looked
up on this machine, and that it is not there is the reason to skip.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from tests import testing_utils  # PEFT's

REASON = "wants the hub"
# What huggingface_hub, transformers, diffusers and datasets say of what they can't reach.
_HUB = re.compile(
    "LocalEntryNotFoundError|OfflineModeIsEnabled|couldn't connect to|outgoing traffic has been disabled"
    "|Can't load the (configuration|model|tokenizer|image processor|feature extractor)|Cannot find the requested files"
    "|is not a valid model identifier listed on|Couldn't reach|Can't find '[\\w.]+' at '"
)


@contextlib.contextmanager
def _offline(model_id: str) -> Iterator[None]:
    # The suite's own models, made as it runs, have names without a folder.
    if "/" in model_id:
        try:
            found = try_to_load_from_cache(model_id, "config.json")
        except HFValidationError:  # the names of a model and of a tokenizer, one after the other
            found = None
        if not isinstance(found, str):
            pytest.skip(REASON)
    yield


testing_utils.hub_online_once = _offline


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> pytest.TestReport:
    report = yield
    # Of the whole chain of exceptions: the last one is the test's own, where it wanted another.
    if report.failed and call.excinfo is not None and _HUB.search(str(report.longrepr)):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"Skipped: {REASON}")
    return report
