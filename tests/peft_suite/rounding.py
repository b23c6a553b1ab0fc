"""A pytest plugin that finds out whether a test fails only by rounding: ``-p plugin -p rounding``.

Use the plugin for tests of PEFT that pass with PEFT's own layers and fail with accelerated layers. A failed comparison
of float32 tensors (torch.allclose, torch.testing.assert_close) counts as passed where the largest difference is at most
LARGEST times the largest value, because another order of sums may cause this difference. The plugin records each
comparison that it lets pass. A test that passes with at least one recorded comparison differs by rounding.
"""

from __future__ import annotations

import functools
import json
import os
from collections import defaultdict
from typing import Any

import pytest
import torch

LARGEST = 2e-6
_allclose, _assert_close = torch.allclose, torch.testing.assert_close
_test = ""
TAKEN: dict[str, list[float]] = defaultdict(list)


def _rounding(one: Any, other: Any) -> bool:
    if not all(isinstance(t, torch.Tensor) and t.dtype == torch.float32 for t in (one, other)):
        return False
    if one.shape != other.shape or not one.numel():
        return False
    apart = ((one - other).abs().max() / torch.maximum(one.abs().max(), other.abs().max())).item()
    if not apart <= LARGEST:  # also true for NaN, so that a NaN difference does not count as rounding
        return False
    TAKEN[_test].append(apart)
    return True


@functools.wraps(_allclose)
def allclose(input: Any, other: Any, *args: Any, **kwargs: Any) -> bool:
    return _allclose(input, other, *args, **kwargs) or _rounding(input, other)


@functools.wraps(_assert_close)
def assert_close(actual: Any, expected: Any, *args: Any, **kwargs: Any) -> None:
    try:
        _assert_close(actual, expected, *args, **kwargs)
    except AssertionError:
        if not _rounding(actual, expected):
            raise


def pytest_configure() -> None:
    torch.allclose = torch.Tensor.allclose = allclose
    torch.testing.assert_close = assert_close


def pytest_runtest_setup(item: pytest.Item) -> None:
    global _test
    _test = item.nodeid


def pytest_sessionfinish() -> None:
    if path := os.environ.get("PEFT_EXT_SUITE_ROUNDING"):
        with open(path, "w") as file:
            json.dump(TAKEN, file)
