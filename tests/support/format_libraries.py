"""Imports the libraries of the formats of packed weights, with whose values tests compare."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def format_library(name: str) -> ModuleType:
    """Returns a module of a library; skips the test where the module is missing.

    PEFT_EXT_TEST_LIBRARIES has the names of the libraries that must be here, separated by spaces: with such a library,
    a missing module fails the test. `make format-libraries` sets the variable.
    """
    if name.partition(".")[0] in os.environ.get("PEFT_EXT_TEST_LIBRARIES", "").split():
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"needs {name.partition('.')[0]}: make format-libraries")
