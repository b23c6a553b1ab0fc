"""Compares the norms with transformers' layers, and tests special rows that random draws do not contain."""

from __future__ import annotations

import pytest
import torch
from op_db import DTYPES
from op_params import names
from torch import Tensor

from peft_ext import ops

K = 256


def whole_numbers(dtype: torch.dtype) -> Tensor:
    """Returns whole numbers, whose squares have exact sums in any order."""
    return torch.randint(-7, 8, (33, K)).to(dtype)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=names)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("layer", ["llama", "gemma"])
def test_rms_norm_has_the_bits_of_transformers_layer(
    layer: str, dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device
) -> None:
    pytest.importorskip("transformers")
    if layer == "llama":
        from transformers.models.llama.modeling_llama import LlamaRMSNorm as Norm
    else:
        from transformers.models.gemma.modeling_gemma import GemmaRMSNorm as Norm
    stock = Norm(K, eps=1e-5)
    stock.weight = torch.nn.Parameter(torch.randn(K).to(weight_dtype))
    x, gemma = whole_numbers(dtype), layer == "gemma"
    wanted = stock(x)
    weight = stock.weight.detach().to(device)
    found = ops.rms_norm(x.to(device), weight, 1e-5, offset=float(gemma), round_before_weight=not gemma).cpu()
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_rows_of_zeros_and_of_large_and_small_values(dtype: torch.dtype, device: torch.device) -> None:
    most, least = (2.0**13, 2.0**-10) if dtype == torch.float16 else (2.0**55, 2.0**-50)
    x = torch.stack([torch.zeros(K), torch.full((K,), most), torch.randn(K) * least, torch.ones(K)]).to(dtype)
    moved = x.to(device).requires_grad_()
    rms = ops.rms_norm(moved, None, 1e-6)
    wide = x.double()
    wanted = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(rms.cpu().double(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
    layer = ops.layer_norm(moved, None, None, 1e-5)
    wanted = torch.nn.functional.layer_norm(wide, (K,), None, None, 1e-5)
    wanted[1] = 0.0
    torch.testing.assert_close(layer.cpu().double(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    (rms + layer).sum().backward()
    assert moved.grad.isfinite().all()


def test_a_nan_stays_in_its_row(device: torch.device) -> None:
    x = torch.randn(5, 67)
    x[2, 66] = float("nan")
    for y in (ops.rms_norm(x.to(device), None, 1e-6), ops.layer_norm(x.to(device), None, None, 1e-5)):
        bad = y.isnan().cpu()
        assert bad[2].all() and not bad[[0, 1, 3, 4]].any()


def test_a_frozen_weight_gets_no_gradient_and_no_pass(device: torch.device) -> None:
    raw = torch.ops.peft_ext
    x, weight = torch.randn(7, K).to(device), torch.ones(K).to(device)
    y, rstd = raw.rms_norm(x, weight, 1e-6, 0.0, True)
    assert [g.numel() for g in raw.rms_norm_backward(y, x, weight, rstd, 0.0, True, False)] == [7 * K, 0]
    assert [g.numel() for g in raw.rms_norm_backward(y, x, weight, rstd, 0.0, False, True)] == [0, K]
