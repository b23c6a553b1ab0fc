"""What a forward finds beside its module and its input, which no trial sees; and classes, bound methods and copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import accelerate as hf_accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma import modeling_gemma

import peft_ext

WIDE, IDS = 64, torch.arange(2, 68).view(2, 33)
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99,
         "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
DOUBLES, SEEN = False, []


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDE, 48), nn.Linear(WIDE, 48)
        self.down_proj, self.act_fn = nn.Linear(48, WIDE), nn.SiLU()

    def inner(self, x: Tensor) -> Tensor:
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Helped(Gated):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.down_proj(self.inner(x))


class Flagged(Gated):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 2 * y if DOUBLES else y


class Long(Gated):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if x.shape[-2] <= 16 else -y


class Counting(Gated):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        SEEN.append(y.shape)
        return y


class Swish(nn.Module):
    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDE, WIDE) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Within(Attention):
    def forward(self, x: Tensor) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            q, k, v = self.q(x), self.k(x), self.v(x)
            return F.scaled_dot_product_attention(q, k, v)

        return self.o(checkpoint(attend, x, use_reentrant=False))


class Parted(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q = checkpoint(lambda x: self.q(x) * self.k(x), x, use_reentrant=False)
        return self.o(q + self.q(x) + self.k(x) * self.v(x))


class Behind(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        x.data.mul_(2)
        return self.o(q * self.k(x) * self.v(x))


class OnASphere(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        with torch.no_grad():
            self.k.weight.div_(self.k.weight.norm(dim=1, keepdim=True))
        return self.o(q * self.k(x) * self.v(x))


class AskingItsType(Attention):
    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x) * self.k(x)
        return self.o(y) if type(self) is AskingItsType else self.o(2 * y)


class Rebuilt(Gated):
    def __init__(self, wide: int = 48) -> None:
        super().__init__()

    def __reduce__(self) -> tuple:
        return Rebuilt, (), {"_parameters": {}, "_buffers": {}, "_modules": self._modules, "training": self.training}


class Registry:
    names: list[str] = []

    def __init_subclass__(cls, tag: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        assert cls.__name__ not in Registry.names
        cls.tag = tag
        Registry.names.append(cls.__name__)


class Listed(Gated, Registry, tag="a"):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.tag == "a" else x


class Lone(type):
    def __new__(cls, name: str, bases: tuple, names: dict) -> type:
        if any(isinstance(base, Lone) for base in bases):
            raise TypeError("it has no subclasses")
        return super().__new__(cls, name, bases, names)


class Last(Gated, metaclass=Lone):
    pass


def adapted(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=r".*(_proj|\.[qkvo])", lora_dropout=0.0, init_lora_weights=False)
    return get_peft_model(nn.Sequential(module), config)


def result(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x * 1)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(ours: nn.Module, stock: nn.Module, x: Tensor) -> None:
    for found, wanted in zip(result(ours, x), result(stock, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5 * wanted.abs().max().item())


def both(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    model = adapted(module)
    return peft_ext.accelerate(copy.deepcopy(model)), model


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 33, WIDE)


def patched(kind: type, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(kind, name, value)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (Helped, patched(Helped, "scale", 3.0)),
        (Helped, patched(Gated, "inner", lambda self, x: self.up_proj(x))),
        (Flagged, lambda monkeypatch: monkeypatch.setitem(globals(), "DOUBLES", True)),
        (Long, lambda _: None),
    ],
)
def test_a_name_that_stands_for_something_else(
    make: type, change: Callable, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, stock = both(make())
    assert_same(ours, stock, x)
    change(monkeypatch)
    assert_same(ours, stock, x)
    assert_same(peft_ext.accelerate(copy.deepcopy(stock)), stock, x)  # its class was tried as it was before
    monkeypatch.undo()
    assert_same(ours, stock, x)


def test_an_activation_s_own_helper(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Gated()
    module.act_fn = Swish()
    ours, stock = both(module)
    assert [row.fused for row in peft_ext.explain(ours).blocks if row.kind == "MLP"] == [True]
    assert_same(ours, stock, x)
    monkeypatch.setattr(Swish, "gate", lambda self, x: torch.tanh(x))
    assert_same(ours, stock, x)


def test_a_forward_that_keeps_count_goes_on_counting(x: Tensor) -> None:
    ours, _ = both(Counting())
    SEEN.clear()
    ours(x)
    assert SEEN == [x.shape]


def test_a_helper_of_transformers_own_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = get_peft_model(hf.GemmaForCausalLM(hf.GemmaConfig(**SMALL)), LoraConfig(target_modules=["q_proj"]))
    ours = peft_ext.accelerate(copy.deepcopy(model)).eval()
    assert any(row.fused for row in peft_ext.explain(ours).blocks if row.kind == "RMSNorm")
    monkeypatch.setattr(modeling_gemma.GemmaRMSNorm, "_norm", lambda self, x: x * 0.5)
    wanted = model.eval()(IDS).logits
    for found in (ours(IDS).logits, peft_ext.accelerate(copy.deepcopy(model)).eval()(IDS).logits):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    rows = [row for row in peft_ext.explain(ours).blocks if row.kind == "RMSNorm"]
    assert {row.reason for row in rows} == {"a name that its forward asks for stands for something else"}


def test_pytorchs_attention_under_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)), LoraConfig(target_modules=["q_proj"]))
    ours, own = peft_ext.accelerate(copy.deepcopy(model)), F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: own(*a, **k) * 0.5)
    torch.testing.assert_close(ours(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    rows = [row for row in peft_ext.explain(ours).blocks if row.kind == "attention"]
    assert rows and not any(row.fused for row in rows)


@pytest.mark.parametrize("make", [Within, Parted, Behind, OnASphere, AskingItsType])
def test_projections_that_are_not_of_one_moment(make: type, x: Tensor) -> None:
    ours, stock = both(make())
    assert_same(ours, stock, x)


def test_layers_that_are_checkpointed_beside_their_own_cache() -> None:
    """The recomputation adds to the cache again, and has to save what was saved before."""
    torch.manual_seed(0)
    model = get_peft_model(hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)), LoraConfig(target_modules="all-linear"))
    wanted = result_of(model)
    ours = peft_ext.accelerate(copy.deepcopy(model))
    layers = list(ours.get_base_model().model.layers)
    apply_activation_checkpointing(ours, check_fn=lambda module: module in layers)
    for found, want in zip(result_of(ours), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=2e-5 * want.abs().max().item())


def result_of(model: nn.Module) -> list[Tensor]:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("make", [Gated, Attention, lambda: nn.LayerNorm(WIDE), lambda: nn.Dropout(0.5)])
def test_who_holds_a_bound_forward_goes_on_after_restore(make: Callable[[], nn.Module], x: Tensor) -> None:
    model = peft_ext.accelerate(adapted(nn.Sequential(make(), Gated())))
    for module in list(model.modules()):
        if isinstance(module, (Gated, Attention, nn.LayerNorm, nn.Dropout)) or hasattr(module, "lora_A"):
            module.forward = lambda *args, own=module.forward: own(*args)
    torch.manual_seed(0)
    before = model(x)
    peft_ext.restore(model)
    torch.manual_seed(0)
    if not isinstance(make(), nn.Dropout):  # whose mask is PyTorch's then
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    model(x)


def test_what_hooks_leave_behind_is_no_other_forward() -> None:
    model = get_peft_model(hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)), LoraConfig(target_modules="all-linear"))
    model = hf_accelerate.dispatch_model(peft_ext.accelerate(model), {"": "cpu"}, force_hooks=True)
    assert peft_ext.explain(model).fused_share == 0.0
    hf_accelerate.hooks.remove_hook_from_submodules(model)
    assert peft_ext.explain(model).fused_share == 1.0


@pytest.mark.parametrize("make", [Listed, Last])
def test_a_fused_class_is_no_new_one_of_the_model_s(make: type, x: Tensor) -> None:
    names = list(Registry.names)
    ours, stock = both(make())
    assert Registry.names == names
    assert_same(ours, stock, x)


def test_a_module_with_copies_of_its_own(x: Tensor) -> None:
    ours, stock = both(Rebuilt())
    assert_same(ours, stock, x)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(again(x), ours(x))


def test_layers_alone_of_a_parametrized_norm() -> None:
    model = get_peft_model(hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)), LoraConfig(target_modules=["q_proj"]))
    wanted = model(IDS).logits
    peft_ext.accelerate(model)
    parametrize.register_parametrization(model.get_base_model().model.norm, "weight", nn.Identity())
    peft_ext.accelerate(model, blocks=False)
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-5)


def test_dora_of_one_token_has_peft_s_shape() -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)
    wanted = model(torch.ones(8))
    torch.testing.assert_close(peft_ext.accelerate(model)(torch.ones(8)), wanted)
