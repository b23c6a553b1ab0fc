"""Tests the plans that divide attention's work among threads, by enumeration in C++: see
tests/native/attention_plan.cpp.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from plan_program import ROOT, compiled, of_plans

DOCUMENT = ROOT / "docs" / "performance.md"

pytestmark = of_plans


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("attention_plan", tmp_path_factory.mktemp("plan"))


def share(program: Path, threads: int, tokens: int, kv_heads: int, size: int = 64, causal: bool = True) -> list[float]:
    """Returns the numbers that ``attention_plan share`` prints for B = 1 and H = 32."""
    # As in attention_cpu.cpp, each query head is a stream of its own until there are 32 streams, or until the sums of
    # dK and dV have 2^25 floats.
    heads = 32 // kv_heads
    streams = 32
    while streams > kv_heads and streams * tokens * 2 * size > 2**25:
        streams //= 2
    numbers = (threads, streams, kv_heads * heads // streams, tokens, tokens, size, int(causal))
    command = [program, "share", *map(str, numbers)]
    return [
        float(found) for found in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    ]


def test_every_plan_has_each_unit_once_and_keeps_the_order_of_sums(program: Path) -> None:
    """Covers all of 1 to 512 threads."""
    found = subprocess.run([program, "check", "512"], capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout
    assert " 0 broken" in found.stdout


@pytest.mark.parametrize("tokens", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("threads", [64, 96])
def test_many_threads_are_busy(program: Path, threads: int, tokens: int) -> None:
    for kv_heads in (32, 8):
        for size in (64, 128):
            forward, backward, *_ = share(program, threads, tokens, kv_heads, size)
            assert forward >= 0.97
            assert backward >= 0.85


def test_few_threads_start_once(program: Path) -> None:
    """On few threads each head is one cell, so that the threads start once, and no head is converted twice."""
    for threads in (1, 2, 4, 8, 16, 32):
        forward, backward, step, regions, _useful = share(program, threads, 2048, 32)
        assert (forward, backward, step, regions) == (1, 1, 32, 1)


def test_the_shares_in_the_document_are_what_is_computed(program: Path) -> None:
    text = DOCUMENT.read_text().split("<!-- computed: tests/native/attention_plan.cpp -->")[1].split("<!--")[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", text, re.M)
    assert len(rows) == 12
    for threads, tokens, *written in rows:
        forward, backward, _step, regions, useful = share(program, int(threads), int(tokens), 32)
        assert written == [f"{forward:.2f}", f"{backward:.2f}", f"{useful:.2f}", f"{regions:.0f}"]
