"""Tests that scratch memory, which threads keep from call to call, is bounded and can be released."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import peft_ext
from peft_ext import _native, ops

native = pytest.importorskip("peft_ext._C")
pytestmark = pytest.mark.cpu_only("the scratch is of CPU threads")

LARGEST = 32 << 20  # bytes of the largest block that outlives its call
USES = 6


def nf4_layer() -> Callable[[], Tensor]:
    """Returns a call whose scratch is a panel, scales and, for 16-bit tokens, strips."""
    torch.manual_seed(0)
    x, nf4 = torch.randn(96, 512).bfloat16(), ops.nf4_quantize(torch.randn(768, 512), double_quant=True)
    lora_A, lora_B = torch.randn(8, 512), torch.randn(768, 8)
    return lambda: ops.lora_linear(x, nf4, lora_A, lora_B)


def norm_of_rows() -> Callable[[], Tensor]:
    """Returns a call whose scratch is in use on every CPU path."""
    torch.manual_seed(0)
    nf4, lora_A, lora_B = ops.nf4_quantize(torch.randn(768, 512)), torch.randn(8, 512), torch.randn(768, 8)
    return lambda: ops.dora_weight_norm(nf4, lora_A, lora_B)


def settled(wanted: int) -> bool:
    """Returns whether, within ten seconds, the threads keep ``wanted`` bytes: a thread that Python has joined may not
    have freed its scratch memory yet.
    """
    end = time.monotonic() + 10
    while native.kept_scratch() != wanted and time.monotonic() < end:
        time.sleep(0.01)
    return native.kept_scratch() == wanted


@pytest.fixture(params=[nf4_layer, norm_of_rows])
def call(request: pytest.FixtureRequest) -> Callable[[], Tensor]:
    return request.param()


def test_what_is_kept_is_released(call: Callable[[], Tensor]) -> None:
    _native.release_scratch()
    assert native.kept_scratch() == 0
    wanted = call()
    kept = native.kept_scratch()
    assert kept > 0
    call()
    assert native.kept_scratch() == kept, "a second call takes more"
    assert _native.release_scratch() == kept and native.kept_scratch() == 0
    assert torch.equal(call(), wanted)


def test_no_library_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "STATE", _native.NativeState())
    assert _native.release_scratch() == 0


def test_restore_releases_scratch() -> None:
    pytest.importorskip("peft")
    norm_of_rows()()
    assert native.kept_scratch() > 0
    peft_ext.restore(torch.nn.Linear(4, 4))
    assert native.kept_scratch() == 0


def test_a_thread_that_ends_keeps_nothing() -> None:
    call = norm_of_rows()
    _native.release_scratch()
    threads, before = torch.get_num_threads(), native.kept_scratch()
    thread = threading.Thread(target=lambda: (torch.set_num_threads(1), call()))
    thread.start()
    thread.join()
    torch.set_num_threads(threads)
    assert settled(before)


def test_release_leaves_running_calls_alone(call: Callable[[], Tensor]) -> None:
    wanted, stop, wrong, calls = call(), threading.Event(), [], [0, 0]

    def run(caller: int) -> None:
        while not stop.is_set():
            wrong.extend([caller] * (not torch.equal(call(), wanted)))
            calls[caller] += 1

    callers = [threading.Thread(target=run, args=(caller,)) for caller in range(2)]
    for thread in callers:
        thread.start()
    released = 0
    while min(calls) < 100:
        released += _native.release_scratch()
    stop.set()
    for thread in callers:
        thread.join()
    assert not wrong and released > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_releases_the_scratch_of_threads_that_it_has_not() -> None:
    call = norm_of_rows()
    assert _native.release_scratch() >= 0 and settled(0), "threads of earlier tests are there"
    call()
    kept = native.kept_scratch()
    if (child := os.fork()) == 0:
        os._exit(0 if _native.release_scratch() == kept and native.kept_scratch() == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert native.kept_scratch() == kept > 0


def test_a_long_batch_keeps_no_more_than_the_bound() -> None:
    threads = torch.get_num_threads()
    x, weight = torch.randn(1 << 14, 2048).bfloat16(), torch.randn(64, 2048).bfloat16()
    lora_A, lora_B = torch.randn(8, 2048), torch.randn(64, 8)
    ops.lora_linear(x, weight, lora_A, lora_B)  # 64 MiB of strips where the tiles multiply
    assert native.kept_scratch() <= (USES + 2 * (threads - 1)) * LARGEST
    if native.isa() in _native.TILE_PATHS:
        assert native.kept_scratch() < x.nbytes
