"""A pytest plugin (``-p offline``) that skips and counts the tests that need the hub.

PEFT's helper ``hub_online_once`` goes online even with HF_HUB_OFFLINE=1, and waits a minute before it gives up. The
plugin replaces ``hub_online_once`` by a function that skips the test where the model is not on this machine. A test
that loads a file of the hub without the helper fails where the file is not on this machine; the plugin turns this
failure into a skip.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from tests import testing_utils  # the package of PEFT's tests

REASON = "wants the hub"
# The texts of the errors of huggingface_hub, transformers, diffusers and datasets for files that they can't reach.
_HUB = re.compile(
    "LocalEntryNotFoundError|OfflineModeIsEnabled|couldn't connect to|outgoing traffic has been disabled"
    "|Can't load the (configuration|model|tokenizer|image processor|feature extractor)|Cannot find the requested files"
    "|is not a valid model identifier listed on|Couldn't reach|Can't find '[\\w.]+' at '"
)


@contextlib.contextmanager
def _offline(model_id: str) -> Iterator[None]:
    # Models that PEFT's tests make while they run have names without "/".
    if "/" in model_id:
        try:
            found = try_to_load_from_cache(model_id, "config.json")
        except HFValidationError:  # model_id may be the names of a model and of a tokenizer together
            found = None
        if not isinstance(found, str):
            pytest.skip(REASON)
    yield


testing_utils.hub_online_once = _offline


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> pytest.TestReport:
    report = yield
    # Searches the report of all chained exceptions, because the last exception may be the test's own.
    if report.failed and call.excinfo is not None and _HUB.search(str(report.longrepr)):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"Skipped: {REASON}")
    return report
