"""Tests sums over more tokens or rows than a kernel sums at once, so that partial sums are added."""

from __future__ import annotations

import pytest
import torch
from op_db import DTYPES
from op_params import names

from peft_ext import ops


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_the_gradient_of_an_input_scale_is_of_all_tokens(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    x, weight, grad = (torch.randn(*shape).to(dtype) for shape in ((1100, 96), (64, 96), (1100, 64)))
    ia3_l = torch.rand(96).add_(0.5).to(device).requires_grad_()
    y = ops.ia3_linear(x.to(device), weight.to(device), ia3_l, feedforward=True)
    y.backward(grad.to(device))
    wanted = (x.double() * (grad.double() @ weight.double())).sum(0)
    error = (ia3_l.grad.cpu().double() - wanted).norm() / wanted.norm()
    assert error <= max(torch.finfo(dtype).eps, 1e-6)


def test_the_gradient_of_a_norm_over_a_wide_weight_is_of_all_rows(device: torch.device) -> None:
    """The weight is so wide that the kernel computes the partial sums of its rows in several turns."""
    torch.manual_seed(0)
    weight, lora_A, lora_B = torch.randn(2112, 8208), torch.randn(32, 8208) / 90, torch.randn(2112, 32)
    trained = [value.to(device).requires_grad_() for value in (lora_A, lora_B)]
    exact = [value.detach().double().requires_grad_() for value in (lora_A, lora_B)]
    grad = torch.randn(2112)
    ops.dora_weight_norm(weight.to(device), *trained).backward(grad.to(device))
    (weight.double() + exact[1] @ exact[0]).norm(dim=1).backward(grad.double())
    for found, wanted in zip(trained, exact, strict=True):
        assert (found.grad.cpu().double() - wanted.grad).norm() <= 1e-5 * wanted.grad.norm()
