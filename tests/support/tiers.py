"""Chooses the cases of a parametrized test that the first tier of tests has."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def first(values: Iterable[Any], of_first: Collection[Any]) -> list[Any]:
    """Returns the values for ``pytest.mark.parametrize``: those that are not in ``of_first`` have the marker ``slow``.

    Raises ValueError if a value of ``of_first`` is not among the values: the value may have been renamed.
    """
    values = list(values)
    if unknown := [value for value in of_first if value not in values]:
        raise ValueError(f"first: {unknown} are not among {values}")
    return [value if value in of_first else pytest.param(value, marks=pytest.mark.slow) for value in values]
