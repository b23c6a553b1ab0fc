"""Tests how many parallel loops a step of a layer with LoRA runs: each loop wakes all threads."""

from __future__ import annotations

import pytest
import torch
from op_case import SEED

from peft_ext import _native, ops
from peft_ext._native import TILE_PATHS

MODULE = _native.STATE.module
pytestmark = [pytest.mark.cpu_only("it is about CPU threads"),
              pytest.mark.skipif(MODULE is None, reason="no native library")]  # fmt: skip
MOST_LOOPS = 8
SHAPES = ((512, 1536, 576, 8), (1024, 576, 1536, 16), (300, 4096, 512, 40))  # (T, K, N, R)


def loops_of_step(tokens: int, k: int, n: int, rank: int, dtype: torch.dtype, adapters: torch.dtype, p: float) -> int:
    torch.manual_seed(0)
    x = torch.randn(tokens, k, dtype=dtype, requires_grad=True)
    weight, grad = torch.randn(n, k, dtype=dtype), torch.randn(tokens, n, dtype=dtype)
    lora_A = torch.randn(rank, k, dtype=adapters, requires_grad=True)
    lora_B = torch.randn(n, rank, dtype=adapters, requires_grad=True)
    found = 0
    for _ in range(2):  # in its first call, an operator may prove the kernels first
        before = MODULE.parallel_loops()
        ops.lora_linear(x, weight, lora_A, lora_B, dropout_p=p, training=True, seed=SEED).backward(grad)
        found = MODULE.parallel_loops() - before
    return found


@pytest.mark.skipif(_native.STATE.isa not in TILE_PATHS, reason="without tiles PyTorch computes the base product")
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("threads", [2, 24])
def test_a_step_has_few_loops(threads: int, p: float, adapters: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [loops_of_step(*shape, torch.bfloat16, adapters, p) for shape in SHAPES]
    finally:
        torch.set_num_threads(before)
    assert min(found) >= 4 and max(found) <= MOST_LOOPS, found


def test_a_tiny_layer_wakes_no_thread(two_threads: None) -> None:
    assert loops_of_step(20, 64, 64, 8, torch.bfloat16, torch.float32, 0.05) == 0


@pytest.mark.skipif(_native.STATE.isa not in TILE_PATHS, reason="without tiles PyTorch computes the base product")
def test_layers_of_one_input_share_loops(two_threads: None) -> None:
    torch.manual_seed(0)
    tokens, k, sizes, rank = 512, 1536, (1536, 512, 512), 8
    x = torch.randn(tokens, k, dtype=torch.bfloat16, requires_grad=True)
    weights = [torch.randn(n, k, dtype=torch.bfloat16) for n in sizes]
    As, Bs = ([torch.randn(*s, requires_grad=True) for s in shapes]
              for shapes in ([(rank, k)] * 3, [(n, rank) for n in sizes]))  # fmt: skip
    found = 0
    for _ in range(2):
        before = MODULE.parallel_loops()
        ys = ops.lora_linears(x, weights, As, Bs, dropout_ps=0.05, training=True, seeds=[SEED, SEED + 1, SEED + 2])
        torch.autograd.backward(list(ys), [torch.ones_like(y) for y in ys])
        found = MODULE.parallel_loops() - before
    assert 4 <= found <= 10


def loops_of_experts(counts: list[int], out: int, k: int) -> int:
    """Returns the number of parallel loops of a forward and a backward of lora_experts on 64 threads, for experts with
    ``counts`` rows."""
    torch.manual_seed(0)
    experts, rows, rank, before = len(counts), sum(counts), 8, torch.get_num_threads()
    x = torch.randn(rows, k, dtype=torch.bfloat16, requires_grad=True)
    weight, grad = torch.randn(experts, out, k, dtype=torch.bfloat16), torch.randn(rows, out, dtype=torch.bfloat16)
    lora_A, lora_B = torch.randn(experts, rank, k, requires_grad=True), torch.randn(experts, out, rank)
    offsets, found = torch.tensor(counts).cumsum(0), 0
    torch.set_num_threads(64)
    try:
        for _ in range(2):
            start = MODULE.parallel_loops()
            y = ops.lora_experts(x, weight, offsets, lora_A, lora_B.requires_grad_(), dropout_p=0.05, training=True,
                                 seed=SEED)  # fmt: skip
            y.backward(grad)
            found = MODULE.parallel_loops() - start
    finally:
        torch.set_num_threads(before)
    return found


def test_experts_of_few_rows_have_a_thread_each() -> None:
    """All threads together would compute a few rows of one expert after the other, and wake for each expert."""
    draws = torch.randint(0, 64, (2048,), generator=torch.Generator().manual_seed(0))
    assert loops_of_experts(draws.bincount(minlength=64).tolist(), 512, 256) == 2


def test_all_threads_compute_a_long_expert_together() -> None:
    assert loops_of_experts([4096] + [16] * 63, 512, 256) >= 2 + 4


def test_norms_of_few_experts_wake_the_threads_once() -> None:
    before, found = torch.get_num_threads(), 0
    weight, lora_A, lora_B = torch.randn(16, 512, 256), torch.randn(16, 8, 256), torch.randn(16, 512, 8)
    torch.set_num_threads(24)
    try:
        for _ in range(2):
            start = MODULE.parallel_loops()
            ops.dora_experts_weight_norm(weight, lora_A, lora_B, 2.0)
            found = MODULE.parallel_loops() - start
    finally:
        torch.set_num_threads(before)
    assert found == 1
