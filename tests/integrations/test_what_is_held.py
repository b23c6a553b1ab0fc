"""What a block's forward may depend on and a trial can't see: what modules hold, what is set on them later, hooks that
write past versions, the caller's generator, tools of PyTorch's around a fused module."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune

import peft_ext

hf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
IDS = torch.arange(3, 51).view(2, 24)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48), nn.Linear(32, 48)
        self.down_proj, self.act_fn = nn.Linear(48, 32), nn.SiLU()
        self.set_up()

    def set_up(self) -> None:
        """What a subclass has beside."""

    def inner(self, x: Tensor) -> Tensor:
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.inner(x))


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-5
        self.set_up()

    def set_up(self) -> None:
        """What a subclass has beside."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Around(nn.Module):
    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.last = a, b, nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        for module in (self.a, self.b):
            x = x + module(x).reshape(x.shape)
        return self.last(x)


def adapted(kind: type, change: Callable[[Any], Any] = lambda module: None) -> nn.Module:
    """Two of a class, of which the second is changed."""
    torch.manual_seed(0)
    model = Around(kind(), kind())
    change(model.b)
    targets = ["last", *(["gate_proj", "up_proj", "down_proj"] if issubclass(kind, Gated) else [])]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def result(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    y = model(x)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def inner_of(model: nn.Module) -> Any:
    return model.base_model.model


def fused_blocks(model: nn.Module) -> list[bool]:
    return [row.fused for row in peft_ext.explain(model).blocks if row.kind in ("MLP", "RMSNorm")]


def assert_same(model: nn.Module, x: Tensor, later: Callable[[Any], Any] = lambda module: None) -> nn.Module:
    """Accelerated, and its second module then changed, it gives what it would without."""
    stock, ours = copy.deepcopy(model), peft_ext.accelerate(copy.deepcopy(model))
    for either in (stock, ours):
        later(inner_of(either).b)
    bound = 2e-2 if x.dtype is torch.bfloat16 else 1e-4
    for found, wanted in zip(result(ours, x), result(stock, x), strict=True):
        assert found.dtype is wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=bound, atol=bound / 5 * wanted.abs().max().item())
    return ours


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 24, 32)


# --- what a module holds ----------------------------------------------------------------------------------------------


class Bounded(Gated):
    def set_up(self) -> None:
        self.bounds: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.down_proj(h if self.bounds is None else h.clamp(*self.bounds))


class Scaled(Gated):
    def set_up(self) -> None:
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.inner(x)) * self.scale


class Behind(Norm):
    def set_up(self) -> None:
        self.behind: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.behind is None else self.behind(y)


CHANGES = {
    "bounds": (Bounded, lambda module: setattr(module, "bounds", (-0.05, 0.05))),
    "a list": (Bounded, lambda module: setattr(module, "bounds", [-0.05, 0.05])),
    "a buffer": (Scaled, lambda module: module.scale.fill_(3.0)),
    "a function": (Behind, lambda module: setattr(module, "behind", torch.tanh)),
    "a child": (Behind, lambda module: setattr(module, "behind", nn.Tanh())),
    "eps": (Norm, lambda module: setattr(module, "eps", 0.5)),
    "eps as a tensor": (Norm, lambda module: setattr(module, "eps", torch.tensor(0.5))),
    "eps of numpy": (Norm, lambda module: setattr(module, "eps", np.float32(0.5))),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_module_holds_is_seen(name: str, when: str, x: Tensor) -> None:
    kind, change = CHANGES[name]
    if when == "before":
        assert_same(adapted(kind, change), x)
    else:
        assert_same(adapted(kind), x, change)


@pytest.mark.parametrize("kind", [Gated, Norm, Bounded, Behind])
def test_as_they_are_they_are_fused(kind: type, x: Tensor) -> None:
    assert fused_blocks(assert_same(adapted(kind), x)) == [True, True]


def test_what_a_module_holds_is_not_kept_by_its_trial() -> None:
    class Thing:
        """Whatever it is, it may be large."""

    things = [Thing()]
    seen = weakref.ref(things[0])
    for kind in (Bounded, Behind):
        model = adapted(kind, lambda module: setattr(module, "other", [*things]))
        assert fused_blocks(peft_ext.accelerate(model)) == [True, True]
        del model
    things.clear()
    gc.collect()
    assert seen() is None


# --- what a forward does beside, and when -----------------------------------------------------------------------------


class Keeps(Gated):
    def set_up(self) -> None:
        self.log: list[tuple] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(tuple(x.shape))
        return super().forward(x)


class Counts(Norm):
    def set_up(self) -> None:
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Largest(Gated):
    def set_up(self) -> None:
        self.register_buffer("most", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.most.copy_(torch.maximum(self.most, x.detach().abs().max()))
        return super().forward(x)


@pytest.mark.parametrize("kind", [Keeps, Counts, Largest])
def test_a_forward_that_keeps_something_goes_on_and_is_not_called_by_trials(kind: type, x: Tensor) -> None:
    model = adapted(kind)
    before = {name: copy.deepcopy(value) for name, value in vars(inner_of(model).a).items() if name in ("log", "calls")}
    state = copy.deepcopy(model.state_dict())
    peft_ext.accelerate(model)
    assert all(getattr(inner_of(model).a, name) == value for name, value in before.items())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model(x)
    a = inner_of(model).a
    assert (a.log if kind is Keeps else a.calls if kind is Counts else a.most.item()) not in ([], 0)


class Widens(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class ClampsNarrow(Gated):
    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.down_proj(h.clamp(-0.01, 0.01) if h.dtype is torch.bfloat16 else h)


class Flattens(Gated):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.flatten(0, -2) if y.dim() == 4 else y


class Records(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if torch.is_grad_enabled() else 2)


class Trains(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.2 if self.training else 1.0)


def test_a_forward_that_asks_for_the_dtype(x: Tensor) -> None:
    model = peft_ext.accelerate(adapted(Widens).bfloat16())
    assert inner_of(model).a(x.bfloat16()).dtype is torch.float32
    stock = adapted(ClampsNarrow).bfloat16()
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    wanted = inner_of(stock).a(x.bfloat16())
    assert (inner_of(ours).a(x.bfloat16()) - wanted).abs().max() <= 0.02 * wanted.abs().max()


def test_a_forward_that_asks_for_the_rank(x: Tensor) -> None:
    assert inner_of(assert_same(adapted(Flattens), x)).a(x.view(2, 4, 6, 32)).shape == (48, 32)


@pytest.mark.parametrize("kind", [Records, Trains])
def test_a_forward_that_asks_for_the_mode(kind: type, x: Tensor) -> None:
    stock = adapted(kind).eval()
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    for model in (stock, ours):
        model.train(kind is Trains)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-4)


def test_no_draw_of_the_callers_generator() -> None:
    class Fresh(Gated):
        """A class that nobody has tried."""

    class FreshNorm(Norm):
        """Likewise."""

    for kind in (Fresh, FreshNorm):
        for look in (peft_ext.explain, peft_ext.accelerate):
            model = adapted(kind)
            torch.manual_seed(7)
            look(model)
            found = torch.rand(3)
            torch.manual_seed(7)
            assert torch.equal(found, torch.rand(3))


# --- transformers' models, and PyTorch's tools around them ------------------------------------------------------------


def llama(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    made = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2))
    return peft.get_peft_model(
        made, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **config)
    )


def gpt2(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    made = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, resid_pdrop=0.0,
                                            embd_pdrop=0.0, attn_pdrop=0.0))  # fmt: skip
    return peft.get_peft_model(made, peft.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False))


def assert_alike(stock: nn.Module, ours: nn.Module) -> None:
    for model in (stock, ours):
        model.zero_grad()
    wanted, found = (model(input_ids=IDS, labels=IDS) for model in (stock, ours))
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    wanted.loss.backward()
    found.loss.backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["down_proj", "q_proj"])
def test_hooks_that_write_past_versions(name: str) -> None:
    """As those who take neurons out do it."""

    def erase(module: nn.Module, args: tuple) -> None:
        args[0].data[..., :20].zero_()

    def scale(module: nn.Module, args: tuple, output: Tensor) -> None:
        args[0].data.mul_(0.5)

    stock = llama()
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    for model in (stock, ours):
        layer = model.get_base_model().model.layers[0]
        if name == "down_proj":
            layer.mlp.down_proj.register_forward_pre_hook(erase)
        else:
            layer.self_attn.q_proj.register_forward_hook(scale)
    assert_alike(stock, ours)


def test_layers_are_called_by_the_names_of_their_arguments() -> None:
    stock = llama()
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    h = torch.randn(2, 3, 32)
    for mode in (True, False):
        head = ours.train(mode).get_base_model().lm_head
        torch.testing.assert_close(head(input=h) + 0, stock.get_base_model().lm_head(input=h))


@pytest.mark.parametrize("how", ["prune", "parametrize"])
@pytest.mark.parametrize("where", ["norm", "layer"])
def test_a_bias_that_is_made_of_others(how: str, where: str) -> None:
    stock = gpt2()
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    for model in (stock, ours):
        block = model.get_base_model().transformer.h[0]
        module = block.ln_1 if where == "norm" else block.attn.c_attn.base_layer
        if how == "prune":
            prune.l1_unstructured(module, "bias", amount=0.3)
        else:
            parametrize.register_parametrization(module, "bias", nn.Tanh())
    assert_alike(stock, ours)


def test_saved_tensors_hooks_that_are_forbidden() -> None:
    stock = llama()
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert_alike(stock, ours)


def test_a_norm_keeps_the_strides_of_its_input(x: Tensor) -> None:
    stock = llama().get_base_model().model.norm
    ours = peft_ext.accelerate(llama()).get_base_model().model.norm
    for value in (x.transpose(0, 1), x.view(2, 4, 6, 32).permute(2, 0, 1, 3), x[:, ::2]):
        found, wanted = ours(value), stock(value)
        assert found.stride() == wanted.stride()
        torch.testing.assert_close(found, wanted)


def test_forward_mode_goes_past_blocks_and_layers() -> None:
    stock = llama()
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    h, tangent = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    found = []
    for model in (stock, ours):
        layer = model.get_base_model().model.layers[0]
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(h, tangent)
            y = layer.mlp(layer.input_layernorm(dual)) + layer.self_attn.o_proj(dual)
            found.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(found[1], found[0])


def test_restore_reaches_parametrized_modules() -> None:
    model = peft_ext.accelerate(llama())
    norm, head = model.get_base_model().model.norm, model.get_base_model().lm_head
    for module in (norm, head):
        parametrize.register_parametrization(module, "weight", nn.Identity())
    peft_ext.restore(model)
    for module in (norm, head):
        parametrize.remove_parametrizations(module, "weight")
    assert type(head) is nn.Linear and type(norm) is hf.models.llama.modeling_llama.LlamaRMSNorm
    assert not any(row.fused for row in peft_ext.explain(model).blocks)


def test_a_model_is_pickled_after_its_rotary_function_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_ext.accelerate(llama())
    module = hf.models.llama.modeling_llama
    function = module.apply_rotary_pos_emb
    monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda *args, **kwargs: function(*args, **kwargs))
    again = pickle.loads(pickle.dumps(model))
    assert_alike(model, again)


def test_explain_knows_that_pytorchs_formula_is_asked_for() -> None:
    model = peft_ext.accelerate(llama())
    rows = [row for row in peft_ext.explain(model).blocks if row.kind == "attention"]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        inside = [row for row in peft_ext.explain(model).blocks if row.kind == "attention"]
    assert rows and not any(row.fused for row in inside)
