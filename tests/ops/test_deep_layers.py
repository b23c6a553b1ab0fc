"""Tests layers of many inputs or outputs, whose products the tiles compute in several parts of the depth.

The forward sums over K, and the backward to x sums over N. The parts of the depth must give the sum of all products,
and the same bits on every number of threads.
"""

from __future__ import annotations

import pytest
import torch
from battery import assert_close, output_grad, run, to_wide
from linear_cases import dora_case, ia3_case, lora_case
from op_case import Case
from op_params import TILES

# (shape of the tokens, K, N, R). The summed dimension, K in the forward and N in the backward, ends within a tile and
# within a part of the sum. There are more panels of 64 rows or columns than are decoded together, the last panel is not
# full, and the number of strips of 16 tokens is odd.
WIDE_IN, WIDE_OUT, BOTH = ((2, 35), 5217, 330, 5), ((2, 35), 590, 5217, 5), ((41,), 4129, 4131, 3)
DENSE = (lora_case("dense", with_bias=True, dropout_p=0.3), dora_case("dense", dropout_p=0.3), ia3_case("dense"))
CASES = [
    *((case, shape) for case in (*DENSE, lora_case("nf4", dropout_p=0.3)) for shape in (WIDE_IN, WIDE_OUT)),
    (lora_case("nested:256"), BOTH),
    *((lora_case("Q4_K"), ((2, 35), k, n, 5)) for k, n in ((5376, 330), (512, 5217))),
]  # fmt: skip
names = [f"{case.name}-{shape[1]}-{shape[2]}" for case, shape in CASES]


@pytest.mark.parametrize(("case", "shape"), CASES, ids=names)
def test_values_and_gradients(case: Case, shape: tuple, device: torch.device) -> None:
    torch.manual_seed(0)
    sample = case.make(torch.bfloat16, shape)
    grad = output_grad(case, torch.bfloat16, shape)
    exact = run(case.oracle, to_wide(sample), grad)
    found, plain = run(case.call, sample.to(device), grad), run(case.plain, sample, grad)
    assert_close(found, plain, exact, max(shape[1], shape[2]), case.from_product, torch.bfloat16)


@pytest.mark.cpu_only("it is about CPU threads")
@pytest.mark.skipif(not TILES, reason="the products are PyTorch's, whose bits may depend on its threads")
@pytest.mark.parametrize(("case", "shape"), CASES, ids=names)
def test_any_count_of_threads_has_the_bits_of_one(case: Case, shape: tuple) -> None:
    torch.manual_seed(0)
    sample, grad, found = case.make(torch.bfloat16, shape), output_grad(case, torch.bfloat16, shape), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 16):
            torch.set_num_threads(threads)
            found.append(run(case.call, sample, grad))
    finally:
        torch.set_num_threads(before)
    one, *others = found
    for other in others:
        for name, value in one.items():
            assert torch.equal(other[name], value), name
