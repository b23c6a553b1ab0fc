"""Tests the costs of attention on AMX that tools/attention_costs.py computes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from plan_program import ROOT, compiled, of_plans

from peft_ext import _native

sys.path.insert(0, str(ROOT / "tools"))
import attention_costs

MODULE = _native.STATE.module
pytestmark = of_plans


def test_the_table_in_the_document_is_what_is_computed() -> None:
    text = attention_costs.DOCUMENT.read_text().split(attention_costs.BEGIN)[1].split(attention_costs.END)[0]
    assert text.strip() == attention_costs.table()


def test_the_blocks_are_those_of_the_kernels() -> None:
    def constant(file: str, name: str) -> str:
        return re.search(rf"constexpr \w+ {name} = (.+?);", (ROOT / "csrc/attention" / file).read_text()).group(1)

    assert constant("forward.h", "kForwardKeys") == str(attention_costs.FORWARD_KEYS)
    assert constant("backward.h", "kBackwardKeys") == "kLeastStep * kPlanBlock"
    assert int(constant("kernels.h", "kLeastStep")) * attention_costs.BLOCK == attention_costs.BACKWARD_KEYS
    assert constant("kernels.h", "kPlanBlock") == str(attention_costs.BLOCK)


@pytest.mark.slow
@pytest.mark.skipif(MODULE is None or "amx_emulated" not in MODULE.isas(), reason="no AVX512-BF16")
@pytest.mark.parametrize("flags", [(), ("-DVECTORS",)], ids=["tiles", "vectors"])
def test_the_kernels_make_as_many_products(flags: tuple[str, ...], tmp_path: Path) -> None:
    program = compiled("attention_counts", tmp_path, *flags)
    for tokens, size in ((64, 64), (448, 64), (320, 128)):
        done = subprocess.run([program, str(tokens), str(size)], capture_output=True, text=True, check=True)
        for line, count in zip(
            done.stdout.splitlines(), (attention_costs.forward, attention_costs.backward), strict=True
        ):
            cost = count(tokens, size, not flags)
            dots = 0 if cost.amx else cost.products * attention_costs.RATE
            assert [*map(int, line.split())] == [*cost.tiles.values(), dots]
