"""Rows of logits as long as vocabularies are: several vectors, blocks of sums and turns of a thread; and odd values."""

from __future__ import annotations

import pytest
import torch
from op_db import DTYPES
from op_params import names
from torch import Tensor

from peft_ext import ops, reference


def rows(
    logits: Tensor, labels: Tensor, weight: Tensor | None, *loss: float, grad: bool = True
) -> tuple[Tensor, Tensor]:
    """The losses, and what the logits became."""
    logits = logits.clone()
    return torch.ops.peft_ext.cross_entropy_rows(logits, labels, weight, *loss, -100, grad).cpu(), logits.cpu()


@pytest.mark.parametrize("columns", [2049, 4104, 10_007, 16_384])
@pytest.mark.parametrize("loss", [(1.0, 0.0, 0.0), (0.5, 4.0, 0.1)], ids=["plain", "capped, smoothed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_long_rows(dtype: torch.dtype, loss: tuple, columns: int, device: torch.device) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(5, columns) * 3).to(dtype)
    logits[0] = torch.linspace(-20, 20, columns)  # each reading finds a larger one
    logits[1] = torch.linspace(20, -20, columns)
    labels = torch.tensor([columns - 1, 3, -100, columns // 2, 0])
    weight = torch.tensor([1.0, 0.25, 2.0, -1.5, 3.0])
    exact = logits.double()
    want = reference.cross_entropy.cross_entropy_rows(exact, labels, weight.double(), *loss, -100, True)
    losses, grad = rows(logits.to(device), labels.to(device), weight.to(device), *loss)
    assert losses.dtype is torch.float32 and losses[2] == 0 and not grad[2].any()
    torch.testing.assert_close(losses.double(), want, rtol=2e-6, atol=2e-6)
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal * info.eps / 2 * columns**0.5  # float16's least step, half of it at each element
    for got, wanted in zip(grad.double(), exact, strict=True):
        assert (got - wanted).norm() <= max(info.eps / 2, 4e-6) * wanted.norm() + subnormal


def test_without_gradient_the_logits_stay(device: torch.device) -> None:
    logits = torch.randn(3, 700)
    losses, after = rows(logits.to(device), torch.tensor([1, 2, 3]).to(device), None, 1.0, 0.0, 0.0, grad=False)
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2, 3]),
                                                                         reduction="none"))  # fmt: skip
    assert torch.equal(after, logits)


def test_values_that_are_not_finite_stay_in_their_row(device: torch.device) -> None:
    logits = torch.randn(5, 4500)
    logits[0, 7], logits[1, 4400], logits[2, ::2], logits[3] = torch.nan, torch.inf, -torch.inf, -torch.inf
    labels = torch.tensor([1, 1, 1, 1, 1])
    want = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    losses, grad = rows(logits.to(device), labels.to(device), None, 1.0, 0.0, 0.0)
    torch.testing.assert_close(losses, want, equal_nan=True)
    assert [bool(row.isfinite().all()) for row in grad] == [False, False, True, False, True]
    assert grad[2, ::2].abs().max() < 1e-37


def test_large_logits_keep_the_logarithm(device: torch.device) -> None:
    """Of lse = 1000 + log Σ itself, float32 would keep four digits of the logarithm."""
    logits = 1000 + torch.rand(2, 5000)
    labels = torch.tensor([0, 4999])
    want = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    losses, _ = rows(logits.to(device), labels.to(device), None, 1.0, 0.0, 0.0)
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=0)


def test_a_label_out_of_range(device: torch.device) -> None:
    hidden, weight = torch.randn(3, 8, device=device), torch.randn(20, 8, device=device)
    labels = torch.tensor([0, 20, 1], device=device)
    try:
        loss = ops.linear_cross_entropy(hidden, weight, labels, reduction="none").cpu()
    except RuntimeError as error:  # on a CPU
        assert "labels has 20, wanted 0 to 19 or -100" in str(error)
    else:
        assert loss.isnan().tolist() == [False, True, False]
