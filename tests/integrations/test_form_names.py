"""Tests the names of wrappers, which are a part of the digest of a form, on Python 3.10."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from transformers.utils import generic
from transformers.utils.generic import can_return_tuple

from peft_ext.integrations.forms import Unknown
from peft_ext.integrations.forms.digest import _codes, _qualname_of_source


def test_python_3_10_finds_the_names_of_wrappers_in_their_source() -> None:
    """Code objects have ``co_qualname`` since Python 3.11. Python 3.10 must find the same names, because the names are
    a part of the digest."""
    module = compile(Path(generic.__file__).read_text(), generic.__file__, "exec", dont_inherit=True)
    # Python 3.14 and newer compile annotations into functions of their own, which are no wrappers.
    codes = [code for code in _codes(module) if code is not module and code.co_name != "__annotate__"]
    found = {code: _qualname_of_source(code) for code in codes}
    assert "can_return_tuple.<locals>.wrapper" in found.values()
    assert _qualname_of_source(can_return_tuple(lambda: None).__code__) == "can_return_tuple.<locals>.wrapper"
    if sys.version_info >= (3, 11):
        assert found == {code: code.co_qualname for code in codes}
    other = compile("def f():\n    return 1\n", generic.__file__, "exec").co_consts[0]
    with pytest.raises(Unknown, match="not the code that runs"):
        _qualname_of_source(other)
