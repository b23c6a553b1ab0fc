"""Tests that every public name stays where it is: public_names.txt lists the names by import path.

New names may be added to the list. A name is removed from the list in a release whose CHANGELOG.md says so.
"""

import importlib
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("aenum")

NAMES = Path(__file__).with_name("public_names.txt").read_text().split()


def test_no_public_name_is_lost():
    lost = []
    for path in NAMES:
        module, _, name = path.rpartition(".")
        if not hasattr(importlib.import_module(module), name):
            lost.append(path)
    assert lost == []


def test_what_the_package_exports_is_on_the_list():
    import peft_ext

    for module in (peft_ext, peft_ext.ops, peft_ext.nn, peft_ext.reference):
        assert {f"{module.__name__}.{name}" for name in module.__all__} <= set(NAMES), module
