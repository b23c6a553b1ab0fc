"""Reads mutated GGUF files. Each is refused by an error of one line, or all its tensors lie inside the file.

A failure prints the seed: ``gguf_fuzz.mutated(random.Random(seed))`` are the bytes.
"""

from __future__ import annotations

import importlib.util
import random
import time
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path

import gguf_fuzz
import pytest

pytestmark = pytest.mark.cpu_only("files are read on the CPU")

SECONDS = 2.0  # Largest processor time for one file of a few kB, in seconds.
BYTES = 1 << 20  # Largest peak of Python's memory while one file is read.


@pytest.mark.parametrize(("first", "count"), [
    (0, 1_000), pytest.param(1_000, 10_000, marks=pytest.mark.slow),
])  # fmt: skip
def test_mutated_files(first: int, count: int, tmp_path: Path) -> None:
    file, outcomes = tmp_path / "a.gguf", Counter[str]()
    has_library = importlib.util.find_spec("gguf") is not None
    gguf_fuzz.seeds()
    started = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        for number in range(first, first + count):
            seed = f"gguf:{number}"
            file.write_bytes(gguf_fuzz.mutated(random.Random(seed)))
            tracemalloc.reset_peak()
            before, begin = tracemalloc.get_traced_memory()[0], time.process_time()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    found = gguf_fuzz.outcome(file)
                seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1] - before
                assert seconds < SECONDS and peak < BYTES, f"{seconds:.1f} s, {peak} bytes"
                if found != "refused" and has_library:
                    gguf_fuzz.equal_to_library(file)
            except Exception as error:
                pytest.fail(f"seed {seed!r}: {type(error).__name__}: {error}")
            outcomes[found] += 1
    finally:
        if not started:
            tracemalloc.stop()
    print(dict(outcomes))
    assert min(outcomes[kind] for kind in ("refused", "taken", "model")) >= count // 100, outcomes


@pytest.mark.parametrize("number", range(len(gguf_fuzz.seeds())))
def test_the_seeds_are_taken(number: int, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf_fuzz.seeds()[number][0])
    assert gguf_fuzz.outcome(tmp_path / "a.gguf") == ("model" if number == 0 else "taken")
    pytest.importorskip("gguf")
    gguf_fuzz.equal_to_library(tmp_path / "a.gguf")
