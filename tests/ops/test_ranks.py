"""Tests the products of the rank on every CPU path: ranks beside the number of ranks that registers hold together, and
numbers of tokens and columns beside those of a block, a panel and a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from battery import assert_close, output_grad, run, to_wide
from linear_cases import lora_case, lora_linears_case
from op_case import Case

from peft_ext import _native, ops

RANKS = (1, 3, 7, 8, 9, 15, 16, 17, 24, 40)
SHAPES = (((37,), 515, 65), ((2, 97), 33, 261), ((145,), 1031, 70), ((64,), 576, 192))  # (shape of the tokens, K, N)
FLOAT, BF16 = torch.float32, torch.bfloat16
KINDS = (
    lora_case("dense", dropout_p=0.05, adapter_dtype=FLOAT),
    lora_case("dense"),
    lora_case("nested", dropout_p=0.5, rank_scale=True),
    lora_linears_case("dense", dropout_p=0.1, adapter_dtype=FLOAT),
)

pytestmark = pytest.mark.cpu_only("it is about CPU paths")
PATHS = _native.STATE.module.isas() if _native.STATE.module is not None else []


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.STATE.isa
    _native.STATE.module.set_isa(request.param)
    yield request.param
    _native.STATE.module.set_isa(before)


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_ranks(case: Case, path: str) -> None:
    for i, rank in enumerate(RANKS):
        (tokens, k, n), dtype = SHAPES[i % len(SHAPES)], (BF16, BF16, FLOAT)[i % 3]
        shape = (tokens, k, n, rank)
        sample, grad = case.make(dtype, shape), output_grad(case, dtype, shape)
        exact, plain = run(case.oracle, to_wide(sample), grad), run(case.plain, sample, grad)
        assert_close(run(case.call, sample, grad), plain, exact, max(k, n), case.from_product, dtype)


def test_a_value_that_is_not_finite_stays_in_its_rank(path: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 37).to(BF16), torch.randn(33, 37).to(BF16)
    lora_A, lora_B = torch.randn(9, 37), torch.randn(33, 9)
    lora_A[3, 36] = float("inf")  # in the last column: a kernel that reads past the end of a row would mix two ranks
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.lora_linear(x, weight, lora_A.requires_grad_(), lora_B)
    (s,) = (t for t in saved if t.shape == (40, 9))
    finite = s.isfinite().all(0)
    assert not finite[3] and finite.sum() == 8
