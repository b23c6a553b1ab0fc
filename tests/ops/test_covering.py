"""Tests operators in the first tier, by calls that cover each pair of dtype, shape, layout, CPU path and thread count.

``tests/support/covering.py`` draws the calls. Values and gradients are compared with the float64 oracle. On a GPU the
CPU path and the thread count of a call have no influence.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import covering
import pytest
import sweep
import torch
from op_db import CASES, SAVED_OUTPUT, Case
from op_params import ids

from peft_ext import _native


@pytest.mark.parametrize("case", [*CASES, *SAVED_OUTPUT], ids=ids)
def test_calls_of_the_covering_array(case: Case, device: torch.device, pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--device") == "emulated":
        pytest.skip("the emulator is too slow for all of these calls; the sweep draws small calls for the emulator")
    module, before, failures = _native.STATE.module, (torch.get_num_threads(), _native.STATE.isa), []
    try:
        for call in (call for call in covering.array() if call.case is case):
            module.set_isa(call.isa)
            torch.set_num_threads(call.threads)
            try:
                sweep.check(call, device)
            except Exception:
                failures.append(f"{call}\n{traceback.format_exc(limit=-2)}")
    finally:
        torch.set_num_threads(before[0])
        module.set_isa(before[1])
    assert not failures, "\n".join(failures)


def test_every_pair_is_in_the_array() -> None:
    covered, wanted = covering.pairs()
    assert not wanted - covered, sorted(map(str, wanted - covered))[:20]


def test_the_page_for_contributors_has_the_numbers_of_the_array() -> None:
    page = Path(__file__).parents[2] / "CONTRIBUTING.md"
    paths = ["scalar", "avx2", "avx512", "avx512_bf16"]
    if not page.is_file() or [path for path in _native.STATE.module.isas() if "amx" not in path] != paths:
        pytest.skip("the page has the numbers of a checkout on a CPU with AVX512-BF16")
    calls, cases, pairs = len(covering.array()), len((*CASES, *SAVED_OUTPUT)), len(covering.pairs()[1])
    wanted = f"{calls:,} calls of {cases} cases contain each of the {pairs:,} pairs"
    assert wanted in " ".join(page.read_text().split()), f"wanted: {wanted}"
