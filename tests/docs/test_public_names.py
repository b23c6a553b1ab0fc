"""Tests that every public name stays where it is: public_names.txt lists the names by import path.

A release adds the names of its new operators and references (``python tests/docs/test_public_names.py``). A change adds
all its other new names. A name is removed from the list in a release whose CHANGELOG.md says so.
"""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("peft")
pytest.importorskip("aenum")

LIST = Path(__file__).with_name("public_names.txt")
NAMES = LIST.read_text().split()


def exported(*modules: ModuleType) -> set[str]:
    return {f"{module.__name__}.{name}" for module in modules for name in module.__all__}


def test_no_public_name_is_lost():
    lost = []
    for path in NAMES:
        module, _, name = path.rpartition(".")
        if not hasattr(importlib.import_module(module), name):
            lost.append(path)
    assert lost == []


def test_what_the_package_exports_is_on_the_list():
    import peft_ext

    assert exported(peft_ext, peft_ext.nn) <= set(NAMES)


if __name__ == "__main__":
    import peft_ext

    LIST.write_text("\n".join(sorted({*NAMES, *exported(peft_ext.ops, peft_ext.reference)})) + "\n")
