"""Tests the cross entropy of logits in rows as long as a vocabulary, and of unusual values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_db import DTYPES
from op_params import names
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from peft_ext import ops, reference
from peft_ext.ops import cross_entropy


def rows(
    logits: Tensor, labels: Tensor, weight: Tensor | None, *loss: float, grad: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns the losses, and the logits after the in-place operator, which holds the gradients with ``grad``."""
    logits = logits.clone()
    return torch.ops.peft_ext.cross_entropy_rows(logits, labels, weight, *loss, -100, grad).cpu(), logits.cpu()


@pytest.mark.parametrize("columns", [2049, 4104, 10_007, 16_384, 33_000, 60_001])
@pytest.mark.parametrize("loss", [(1.0, 0.0, 0.0), (0.5, 4.0, 0.1)], ids=["plain", "capped, smoothed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_long_rows(dtype: torch.dtype, loss: tuple, columns: int, device: torch.device) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(5, columns) * 3).to(dtype)
    logits[0] = torch.linspace(-20, 20, columns)  # ascending: each logit is a new maximum
    logits[1] = torch.linspace(20, -20, columns)
    labels = torch.tensor([columns - 1, 3, -100, columns // 2, 0])
    weight = torch.tensor([1.0, 0.25, 2.0, -1.5, 3.0])
    exact = logits.double()
    want = reference.cross_entropy.cross_entropy_rows(exact, labels, weight.double(), *loss, -100, True)
    losses, grad = rows(logits.to(device), labels.to(device), weight.to(device), *loss)
    assert losses.dtype is torch.float32 and losses[2] == 0 and not grad[2].any()
    torch.testing.assert_close(losses.double(), want, rtol=2e-6, atol=2e-6)
    info = torch.finfo(dtype)
    # The norm of an error of half the smallest subnormal number in each element.
    subnormal = info.smallest_normal * info.eps / 2 * columns**0.5
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
    """In float32 the sum 1000 + log Σ would keep only four digits of log Σ after the decimal point."""
    logits = 1000 + torch.rand(2, 5000)
    labels = torch.tensor([0, 4999])
    want = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    losses, _ = rows(logits.to(device), labels.to(device), None, 1.0, 0.0, 0.0)
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("label", [20, -1, 2**40])
def test_a_label_out_of_range_is_an_error(label: int, device: torch.device, request: pytest.FixtureRequest) -> None:
    if device.type == "cuda":
        pytest.skip("the error would leave the GPU unusable for the tests after this test")
    hidden, weight, labels = torch.randn(3, 8), torch.randn(20, 8), torch.tensor([0, label, 1])
    emulated = request.config.getoption("--device") == "emulated"
    says = "cross_entropy_kernel.*block .1, 0, 0.*trap" if emulated else f"labels has {label}, wanted 0 to 19 or -100"
    for reduction in ("none", "mean"):
        with pytest.raises(RuntimeError, match=says):
            ops.linear_cross_entropy(hidden, weight, labels, reduction=reduction)


@pytest.mark.parametrize("ignored", [-100, 3, 20])
def test_the_ignored_label_may_be_in_or_out_of_range(ignored: int, device: torch.device) -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(4, 8), torch.randn(20, 8), torch.tensor([0, ignored, 3, 19])
    want = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none", ignore_index=ignored)
    found = ops.linear_cross_entropy(hidden.to(device), weight.to(device), labels.to(device), ignore_index=ignored,
                                     reduction="none")  # fmt: skip
    torch.testing.assert_close(found.cpu(), want)


@pytest.mark.parametrize("given", [{"num_items_in_batch": 0}, {"num_items_in_batch": 0, "summed": True}, {}], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_no_label_counts(dtype: torch.dtype, given: dict, device: torch.device) -> None:
    """Without a label that counts, the loss is 0 / 0 = NaN like PyTorch's, and every gradient is 0."""
    given = dict(given)
    divided = given.pop("num_items_in_batch") if given.pop("summed", False) else None
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(7, 16), torch.randn(33, 16), torch.randn(33)
    lora_A, lora_B = torch.randn(4, 16), torch.randn(33, 4)
    hidden, weight, bias, lora_A, lora_B = (x.to(device, dtype) for x in (hidden, weight, bias, lora_A, lora_B))
    trained = [x.requires_grad_() for x in (hidden, bias, lora_A, lora_B)]
    reduction = "mean" if divided is None else "sum"
    loss = ops.linear_cross_entropy(hidden, weight, torch.full((7,), -100, device=device), bias, lora_A=lora_A,
                                    lora_B=lora_B, reduction=reduction, **given)  # fmt: skip
    loss = loss if divided is None else loss / divided
    loss.backward()
    assert loss.isnan()
    assert [int(x.grad.count_nonzero()) for x in trained] == [0, 0, 0, 0]


def test_a_head_with_lora_in_float16_sums_beyond_its_range(device: torch.device) -> None:
    """The gradients of the mean fit into float16, although the sums over tokens before the division do not."""
    torch.manual_seed(0)
    tokens, k, v, r = 8192, 32, 64, 8
    hidden, weight = torch.randn(tokens, k).add_(4).half(), (torch.randn(v, k) / 8).half()
    lora_A, lora_B, bias = torch.randn(r, k).half(), torch.randn(v, r).mul_(4).half(), torch.zeros(v).half()
    labels = torch.randint(0, 2, (tokens,))
    found = []
    for x in (lora_A, lora_B, bias):
        x.requires_grad_()
    for call, of in ((ops, device), (reference, torch.device("cpu"))):
        args = [x.detach().to(of) if x.is_floating_point() else x.to(of) for x in (hidden, weight, labels)]
        trained = [x.detach().to(of).requires_grad_() for x in (lora_A, lora_B, bias)]
        if call is reference:
            args[:2] = (x.double() for x in args[:2])
            trained = [x.detach().double().requires_grad_() for x in trained]
        loss = call.linear_cross_entropy(*args, trained[2], lora_A=trained[0], lora_B=trained[1])
        found.append([grad.cpu().double() for grad in torch.autograd.grad(loss, trained)])
    assert all(wanted.abs().max() * tokens > torch.finfo(torch.float16).max for wanted in found[1][:2])
    for got, wanted in zip(*found, strict=True):
        assert (got - wanted).norm() <= 0.03 * wanted.norm()


def test_float16_divides_by_the_count_in_the_backward(device: torch.device) -> None:
    """A division by a large count in the forward would make the logits' gradients too small for float16."""
    torch.manual_seed(0)
    items, labels = 2**20, torch.randint(0, 512, (64,))
    hidden, weight = torch.randn(64, 32).half(), (torch.randn(512, 32) / 4).half()
    x, exact = hidden.clone().to(device).requires_grad_(), hidden.double().requires_grad_()
    loss = ops.linear_cross_entropy(x, weight.to(device), labels.to(device), num_items_in_batch=items)
    (loss * items).backward()
    torch.nn.functional.cross_entropy(exact @ weight.double().T, labels, reduction="sum").backward()
    assert (x.grad.cpu().double() - exact.grad).norm() <= 2e-3 * exact.grad.norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_lengths_share_a_compiled_graph(reduction: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator chooses its chunk as it runs, so that a traced chunk does not bind a graph to one length."""
    # A chunk of logits has 7 tokens.
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), 7 * 4 * 19))
    torch.manual_seed(0)
    weight, factor = torch.randn(19, 8, device=device), torch.rand(64, device=device)

    def loss_of(hidden: Tensor, labels: Tensor) -> Tensor:
        return ops.linear_cross_entropy(hidden, weight, labels, reduction=reduction)

    def step(call: Any, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden.clone().requires_grad_()
        loss = call(hidden, labels)
        (loss * factor[: len(labels)] if loss.dim() else loss).sum().backward()
        return loss.detach(), hidden.grad

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (5, 7, 8, 14, 31, 64):
        given = torch.randn(tokens, 8, device=device), torch.randint(0, 19, (tokens,), device=device)
        for found, wanted in zip(step(compiled, *given), step(loss_of, *given), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch._dynamo.reset()
    assert sum("linear_cross_entropy" in graph.code for graph in counter.graphs) == 1


@pytest.mark.parametrize(
    ("tokens", "room", "wanted"),
    [(12, 12, [12]), (13, 12, [7, 6]), (25, 12, [9, 9, 7]), (3, 0.5, [1, 1, 1]), (5, 2.9, [3, 2])],
)
def test_the_default_chunks_are_few_and_equal(
    tokens: int, room: float, wanted: list[int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``room`` is the number of tokens whose logits fit the bytes of a chunk."""
    seen: list[int] = []

    class Seen:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch.ops.peft_ext, name)

        def cross_entropy_rows(self, logits: Tensor, *args: Any) -> Tensor:
            seen.append(len(logits))
            return torch.ops.peft_ext.cross_entropy_rows(logits, *args)

    monkeypatch.setattr(cross_entropy, "_ops", Seen())
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), int(room * 4 * 19)))
    hidden, weight = torch.randn(tokens, 8, device=device), torch.randn(19, 8, device=device)
    labels = torch.zeros(tokens, dtype=torch.int64, device=device)
    ops.linear_cross_entropy(hidden, weight, labels)
    assert seen == wanted
    ops.linear_cross_entropy(hidden, weight, labels, chunk=2)
    assert seen[len(wanted) :] == [2] * (tokens // 2) + [1] * (tokens % 2)
