"""Tests of nn.BottleneckAdapter: initializations, placements, and the state of the module."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

from peft_ext import nn, ops


def adapted(adapter: nn.BottleneckAdapter, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return residual + adapter.scale * adapter.up(F.gelu(adapter.down(x)))


@pytest.mark.parametrize("init", ["normal", "bert", "mam"])
def test_starts_near_the_identity(init):
    adapter, x = nn.BottleneckAdapter(64, init=init), torch.randn(7, 64)
    assert adapter.bottleneck == 4 and not adapter.down.bias.any() and not adapter.up.bias.any()
    distance = (adapter(x) - x).norm() / x.norm()
    assert distance == 0 if init == "mam" else 0 < distance < {"normal": 1e-4, "bert": 0.02}[init]
    stds = {"normal": 1e-3, "bert": 0.02}
    if init in stds:
        assert nn.BottleneckAdapter(512, init=init).down.weight.std().item() == pytest.approx(stds[init], rel=0.05)


@pytest.mark.parametrize("parallel", [False, True], ids=["after", "parallel"])
def test_values_and_gradients_of_both_placements(parallel):
    adapter = nn.BottleneckAdapter(48, 12, scale=2.0, init="bert")
    x, other = torch.randn(2, 5, 48, requires_grad=True), torch.randn(2, 5, 48, requires_grad=True)
    inputs = (x, other) if parallel else (x,)
    grad = torch.randn(2, 5, 48)
    leaves = [*inputs, *adapter.parameters()]
    want = adapted(adapter, x, other if parallel else x)
    wanted = torch.autograd.grad(want, leaves, grad)
    got = adapter(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for one, two in zip(torch.autograd.grad(got, leaves, grad), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_float32_parameters_over_bfloat16_activations():
    adapter, x = nn.BottleneckAdapter(32, 8, init="bert"), torch.randn(3, 32, dtype=torch.bfloat16)
    y = adapter(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and {p.grad.dtype for p in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("parallel", [False, True], ids=["after", "parallel"])
def test_autocast_does_not_round_a_float32_residual(parallel):
    adapter = nn.BottleneckAdapter(48, 12, scale=0.5, init="bert")
    x, other = (torch.randn(2, 5, 48, requires_grad=True) for _ in range(2))
    inputs = (x, other) if parallel else (x,)
    leaves, grad = [*inputs, *adapter.parameters()], torch.randn(2, 5, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = adapter(*inputs), adapted(adapter, x, other if parallel else x)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3)  # the residual rounded to bfloat16 would differ by 1e-2
    wanted = torch.autograd.grad(want, leaves, grad)
    for one, two in zip(torch.autograd.grad(got, leaves, grad), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapter(x.bfloat16()).dtype == torch.bfloat16


def test_state_goes_round():
    adapter, x = nn.BottleneckAdapter(32, 8, init="bert", activation="relu"), torch.randn(3, 32)
    keys = {"down.weight", "down.bias", "up.weight", "up.bias"}
    assert set(adapter.state_dict()) == keys
    other = nn.BottleneckAdapter(32, 8, activation="relu")
    other.load_state_dict(adapter.state_dict())
    unpickled = pickle.load(io.BytesIO(pickle.dumps(adapter)))
    for copied in (other, copy.deepcopy(adapter), unpickled):
        assert torch.equal(copied(x), adapter(x))
    on_meta = nn.BottleneckAdapter(32, 8, device="meta")
    assert sum(p.numel() for p in on_meta.parameters()) == 2 * 32 * 8 + 8 + 32
    moved = on_meta.to_empty(device="cpu").to(torch.bfloat16)
    moved.reset_parameters()
    assert moved(x.bfloat16()).dtype == torch.bfloat16
    assert "bottleneck=8, activation='relu', scale=1" in repr(adapter)
    without = nn.BottleneckAdapter(32, 8, bias=False)
    assert [name for name, _ in without.named_parameters()] == ["down.weight", "up.weight"]
    assert without(x).shape == x.shape


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bottleneck": 0}, "bottleneck is 0, wanted at least 1"),
        ({"reduction_factor": 0}, "reduction_factor is 0, wanted more than 0"),
        ({"activation": "tanh"}, "activation is 'tanh', wanted one of"),
        ({"init": "xavier"}, "init is 'xavier', wanted one of"),
    ],
)
def test_errors(wrong, message):
    with pytest.raises(ValueError, match=f"BottleneckAdapter: {message}"):
        nn.BottleneckAdapter(32, **wrong)


def test_the_bias_gradient_of_many_tokens_loses_no_bit() -> None:
    """A plain float32 sum of a hundred thousand equal numbers would be wrong by a thousandth."""
    tokens, width = 2**17, 8
    down, up = torch.full((2, width), 0.1), torch.full((width, 2), 0.1)
    down_bias, up_bias = torch.zeros(2, requires_grad=True), torch.zeros(width)
    y = ops.bottleneck_adapter(torch.ones(tokens, width), down, down_bias, up, up_bias, activation="relu")
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(down_bias.grad, torch.full((2,), tokens * width * 0.1), rtol=1e-6, atol=0)
