"""Tests operands that the kernels read or compute in parts: packed weights with strides, products of many rows of W in
16 bits, and the sum of the base product and the low-rank term for few tokens."""

from __future__ import annotations

import pytest
import torch
from op_case import DTYPES
from op_params import names, strided

from peft_ext import ops


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_tensors_of_an_nf4_weight_may_have_strides(double_quant: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    x, dense = torch.randn(9, 128, device=device), torch.randn(260, 128, device=device)
    weight = ops.nf4_quantize(dense, 64, double_quant)
    spread = weight.map(strided)
    assert not spread.absmax.is_contiguous()
    assert torch.equal(ops.nf4_linear(x, spread), ops.nf4_linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_all_rows_of_a_long_weight_are_multiplied(dtype: torch.dtype, device: torch.device) -> None:
    """Without products in a 16-bit dtype, the CPU converts 1,024 rows of W at a time to float32."""
    torch.manual_seed(0)
    weight, lora_A, lora_B = (
        (torch.randn(n, k) * scale).to(dtype) for n, k, scale in ((2100, 48, 1), (16, 48, 0.2), (2100, 16, 0.1))
    )
    for tokens in (2, 40):  # with 2 tokens, and a rank of whole vectors in float32, kernels of their own run
        x = torch.randn(tokens, 48).to(dtype)
        y = ops.lora_linear(*(value.to(device) for value in (x, weight, lora_A, lora_B)), scaling=0.5).cpu().double()
        wide = x.double()
        wanted = wide @ weight.double().T + 0.5 * (wide @ lora_A.double().T) @ lora_B.double().T
        assert (y - wanted).norm() <= max(torch.finfo(dtype).eps, 1e-6) * wanted.norm()
