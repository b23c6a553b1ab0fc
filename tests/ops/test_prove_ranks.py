"""Tests the proof of kernels in two processes: which rank waits for which, and that all ranks drop the same kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import first

from peft_ext.ops.prove import families

pytestmark = [
    pytest.mark.cpu_only("the kernels are the CPU's"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo"),
]

SCRIPT = Path(__file__).with_name("prove_ranks.py")


def ranks(folder: Path, what: str) -> list[dict[str, Any]]:
    """Returns what each of two processes found in the scenario ``what`` of prove_ranks.py."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    runs = [
        subprocess.Popen([sys.executable, str(SCRIPT), what, str(folder), str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    first(["accelerated before the group", "accelerated in the group", "own loop"], ["accelerated in the group"]),
)
def test_all_ranks_drop_what_fails_on_one_and_give_equal_bits(tmp_path: Path, what: str) -> None:
    first, second = ranks(tmp_path, what)
    assert first["dropped"] == second["dropped"] == families("CPU")["ia3"]
    assert first["bits"] == second["bits"] and first["fused"] == second["fused"] == [False] * 2
    assert "dropped on rank 1, and so on all ranks" in first["warned"] and "is off" in second["warned"]


@pytest.mark.slow
def test_one_rank_accelerates_alone_and_a_rank_that_trains_alone_is_an_error(tmp_path: Path) -> None:
    first, second = ranks(tmp_path, "alone")
    assert first["dropped"] == [] and second["dropped"] == families("CPU")["ia3"]
    assert "on rank 1; the other ranks may use the kernels" in second["warned"]
    assert "rank 1 has not begun to train within 3 s" in first["error"]
