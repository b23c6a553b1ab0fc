"""Tests activations at the ends of their range, and gate and up as halves of one tensor."""

from __future__ import annotations

import pytest
import torch
from op_db import DTYPES
from op_params import names

from peft_ext import ops, reference

ACTIVATIONS = reference.activations.ACTIVATIONS


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_every_value_of_a_16_bit_type(activation: str, dtype: torch.dtype, device: torch.device) -> None:
    """Compares value and slope at every 16-bit value from -100 to 100; float32 gets the values of float16."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = x.view(torch.float16 if dtype == torch.float32 else dtype).to(dtype)
    x = x[x.abs() <= 100]
    wide, moved = x.double().requires_grad_(), x.to(device).requires_grad_()
    y, exact = ops.activation(moved, activation), reference.activation(wide, activation)
    y.sum().backward()
    exact.sum().backward()
    eps = torch.finfo(dtype).eps
    # For a large negative x, GELU's factor 1 + erf(x / √2) loses all digits, in PyTorch and in the CUDA kernels.
    near = {"rtol": eps if dtype != torch.float32 else 8 * eps, "atol": max(1e-6, 1e-3 * eps)}
    torch.testing.assert_close(y.detach().cpu().double(), exact.detach(), **near)
    torch.testing.assert_close(moved.grad.cpu().double(), wide.grad, **near)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_one_and_large_values_are_finite(activation: str, device: torch.device) -> None:
    x = torch.tensor([float("nan"), -1e4, 1e4, 0.0, -0.0]).repeat(7)[:33].to(device)
    y = ops.gated_activation(x, torch.ones_like(x), activation).cpu()
    assert torch.equal(y.isnan(), x.isnan().cpu())
    assert y[~y.isnan()].isfinite().all()


@pytest.mark.parametrize("size", [64, 67])
def test_halves_of_one_tensor_have_the_bits_of_two(size: int, device: torch.device) -> None:
    gate_up = torch.randn(3, 5, 2 * size).to(device).requires_grad_()
    grad = torch.randn(3, 5, size).to(device)
    gate, up = gate_up.chunk(2, -1)
    assert not gate.is_contiguous()
    results = [
        ops.gated_activation(gate, up, "silu"),
        ops.gated_activation(gate.contiguous(), up.contiguous(), "silu"),
        ops.gated_activation(gate_up, None, "silu"),
    ]
    grads = [torch.autograd.grad(y, gate_up, grad)[0] for y in results]
    assert all(torch.equal(y, results[0]) for y in results)
    assert all(torch.equal(g, grads[0]) for g in grads)
