"""Tests the modules with PyTorch's tools: export, transforms, in-place loading of states, merges over one base."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from peft_ext import ops, quantize_nf4
from peft_ext.nn import AdaLoRALinear, BottleneckAdapter, DoRALinear, IA3Linear, LoRALinear, NF4Linear
from peft_ext.reference import experts as reference

MAKES = {
    "LoRA": lambda: LoRALinear(64, 32, r=4),
    "LoRA over NF4": lambda: LoRALinear.from_linear(NF4Linear.from_linear(nn.Linear(64, 32)), r=4),
    "NF4": lambda: NF4Linear.from_linear(nn.Linear(64, 32)),
    "IA3": lambda: IA3Linear(64, 32),
    "bottleneck": lambda: BottleneckAdapter(64, 8),
}


@pytest.fixture(params=MAKES)
def module(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    module = MAKES[request.param]()
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return module


def jacobian(module: nn.Module, x: Tensor) -> Tensor:
    """Returns the Jacobian of ``module`` at x, computed row by row with plain backward calls."""
    x = x.clone().requires_grad_()
    return torch.stack([torch.autograd.grad(value, x, retain_graph=True)[0] for value in module(x).flatten()])


def test_forward_mode_gives_the_tangent(module: nn.Module) -> None:
    x, tangent = torch.randn(3, 64), torch.randn(3, 64)
    wanted = (jacobian(module, x) * tangent).sum((1, 2))
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), forward_ad.dual_level():
            found = forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent))).tangent
        torch.testing.assert_close(found.flatten(), wanted, rtol=1e-4, atol=1e-4)


def test_transforms_of_torch_func(module: nn.Module) -> None:
    x = torch.randn(3, 64)
    wanted = jacobian(module, x)
    found = torch.func.jacrev(lambda x: module(x).flatten())(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    per_row = torch.func.vmap(torch.func.grad(lambda row: module(row).sum()))(x)
    torch.testing.assert_close(per_row, wanted.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_a_module_over_nf4_is_exported(strict: bool) -> None:
    x = torch.randn(3, 64)
    for name in ("NF4", "LoRA over NF4"):
        module = MAKES[name]().eval()
        with torch.no_grad():
            found = torch.export.export(module, (x,), strict=strict).module()(x)
            assert torch.equal(found, module(x))


# --- a state that is loaded -------------------------------------------------------------------------------------------


def test_a_state_is_copied_into_what_is_held() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    quantize_nf4(model, progress=False).share_memory()
    before, weight = copy.deepcopy(model.state_dict()), model["a"].weight
    other = {name: value.flip(0) if name.endswith(".weight") else value for name, value in before.items()}
    with torch.inference_mode():
        model.load_state_dict(other)
    assert model["a"].weight is model["b"].weight is weight and weight.is_shared()
    assert torch.equal(weight, before["a.weight"].flip(0))
    x = torch.randn(2, 64, requires_grad=True)
    model["a"](x).sum().backward()


def test_a_state_of_bitsandbytes_wider_storage() -> None:
    module = NF4Linear.from_linear(nn.Linear(64, 32))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float32):
        fresh = NF4Linear(64, 32)
        fresh.load_state_dict({**state, "weight": state["weight"].view(-1).view(dtype).view(-1, 1)})
        assert torch.equal(fresh.weight, module.weight)


def test_a_state_that_is_made_under_a_device() -> None:
    module = NF4Linear.from_linear(nn.Linear(64, 32))
    with torch.device("meta"):
        state = module.state_dict()
    NF4Linear(64, 32).load_state_dict({**module.state_dict(), **{k: v for k, v in state.items() if not v.is_meta}})
    assert not state["weight.quant_state.bitsandbytes__nf4"].is_meta


# --- merges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True])
def test_two_layers_over_one_base_unmerge_in_reverse(quantized: bool) -> None:
    base: Any = nn.Linear(64, 32)
    base = NF4Linear.from_linear(base) if quantized else base
    first, second = (LoRALinear.from_linear(base, r=4) for _ in range(2))
    for layer in (first, second):
        nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 64)
    wanted = base(x), first(x)
    first.merge()
    second.merge()
    with pytest.raises(RuntimeError, match="another layer over the same base was merged after this one"):
        first.unmerge()
    assert first.merged
    second.unmerge()
    first.unmerge()
    assert torch.equal(base(x), wanted[0]) and torch.equal(first(x), wanted[1])
    first.merge()
    copy.deepcopy(first).unmerge()
    first.unmerge()


def test_a_base_that_is_parametrized_is_not_merged_into() -> None:
    layer = LoRALinear.from_linear(nn.utils.parametrizations.weight_norm(nn.Linear(64, 32)), r=4)
    with pytest.raises(RuntimeError, match="merge: base_layer.weight is computed from other tensors"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("kind", ["LoRA", "LoRA over NF4", "IA3"])
def test_a_merged_layer_neither_gives_nor_takes_a_state(kind: str) -> None:
    """A state dict of the merged weight and the adapter would count the adapter twice when it is loaded."""
    layer = MAKES[kind]()
    state = layer.state_dict()
    layer.merge()
    with pytest.raises(RuntimeError, match="state_dict: the adapter is merged, .*twice.* wanted unmerge"):
        nn.Sequential(layer).state_dict()
    with pytest.raises(RuntimeError, match="load_state_dict: the adapter is merged, .* wanted unmerge"):
        layer.load_state_dict(state)
    assert layer.base_layer.state_dict()
    layer.unmerge()
    layer.load_state_dict(layer.state_dict())


# --- layers that from_linear accepts ---------------------------------------------------------------------------------


class Doubles(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear, AdaLoRALinear, IA3Linear, NF4Linear])
def test_from_linear_refuses_what_it_would_not_run(cls: Any) -> None:
    with pytest.raises(TypeError, match=f"{cls.__name__}: linear is Doubles, a subclass of nn.Linear with a forward"):
        cls.from_linear(Doubles(64, 32))
    replaced = nn.Linear(64, 32)
    replaced.forward = lambda x: x
    before, after, backward = (nn.Linear(64, 32) for _ in range(3))
    before.register_forward_pre_hook(lambda *_: None)
    after.register_forward_hook(lambda *_: None)
    backward.register_full_backward_hook(lambda *_: None)
    for linear, name in ((replaced, "forward"), (before, "_forward_pre_hooks"), (after, "_forward_hooks"),
                         (backward, "_backward_hooks")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{cls.__name__}: linear has its own {name}, which"):
            cls.from_linear(linear)
        assert all(parameter.requires_grad for parameter in linear.parameters())
    inherited = nn.modules.linear.NonDynamicallyQuantizableLinear(64, 32)
    assert cls.from_linear(inherited)(torch.randn(2, 64)).shape == (2, 32)


# --- experts, loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_offsets_that_do_not_ascend_are_refused(dtype: torch.dtype) -> None:
    x, weight = torch.randn(10, 32, dtype=dtype), torch.randn(4, 12, 32, dtype=dtype)
    for offsets in ([3, 2, 8, 10], [-1, 3, 8, 10]):
        with pytest.raises((RuntimeError, ValueError), match="offsets has"):
            ops.experts_linear(x, weight, torch.tensor(offsets))
    with pytest.raises(ValueError, match="offsets has 2 after 3"):
        list(reference.runs(torch.tensor([3, 2])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_of_no_loss_is_pytorchs(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(0, 16, dtype=dtype), torch.randn(20, 16, dtype=dtype)
    labels = torch.zeros(0, dtype=torch.int64)
    assert ops.linear_cross_entropy(hidden, weight, labels).isnan()
    assert ops.linear_cross_entropy(hidden, weight, labels, reduction="sum") == 0
