"""What a trial of a class could miss: a dropout, a bound, an activation's numbers, forwards that others replace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import peft_ext
from peft_ext.integrations.adapter_layers.experts import _known_gate
from peft_ext.integrations.model_blocks import mlp

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
IDS = torch.arange(3, 37).view(2, 17)


class Swish(nn.Module):
    def __init__(self, beta: float, *, held: bool = False) -> None:
        super().__init__()
        self.beta = beta
        if held:
            self.register_buffer("factor", torch.tensor(beta))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(getattr(self, "factor", self.beta) * x)


class Gated(nn.Module):
    """An MLP as transformers' are, with what a subclass does beside."""

    def __init__(self, act: Any = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48), nn.Linear(32, 48)
        self.down_proj, self.act_fn = nn.Linear(48, 32), act or nn.SiLU()
        self.p, self.limit = 0.5, 10.0

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Dropping(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), self.p, self.training)


class Clamped(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=self.limit)) * self.up_proj(x))


class ByClass(Gated):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


class Around(nn.Module):
    def __init__(self, *mlps: nn.Module) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(mlps)

    def forward(self, x: Tensor) -> Tensor:
        for inner in self.mlps:
            x = x + inner(x)
        return x


def adapted(*mlps: nn.Module, targets: Any = ("gate_proj", "up_proj", "down_proj")) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Around(*mlps), LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False))


def result(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(model: nn.Module, x: Tensor, change: Callable[[nn.Module], None] = lambda _: None) -> None:
    """Accelerated, and then changed, it gives what it would without."""
    stock, ours = copy.deepcopy(model), peft_ext.accelerate(copy.deepcopy(model))
    for either in (stock, ours):
        change(either)
    for found, wanted in zip(result(ours, x), result(stock, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5 * wanted.abs().max().item())


def mlp_rows(model: nn.Module) -> list[bool]:
    return [row.fused for row in peft_ext.explain(model).blocks if row.kind == "MLP"]


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 5, 32)


def test_a_plain_one_is_fused(x: Tensor) -> None:
    model = adapted(Gated(), Gated())
    assert_same(model, x)
    assert mlp_rows(peft_ext.accelerate(model)) == [True, True]


@pytest.mark.parametrize("first", ["eval", "train"])
def test_a_dropout_within_the_forward_is_not_lost(first: str, x: Tensor) -> None:
    """A model comes in eval mode from its file, and trains later."""
    model = adapted(Dropping()).train(first == "train")
    assert mlp_rows(peft_ext.accelerate(copy.deepcopy(model))) in ([], [False])
    assert_same(model, x, lambda either: either.train())


def test_a_dropout_that_is_set_later_is_not_lost(x: Tensor) -> None:
    inner = Dropping()
    inner.p = 0.0

    def change(model: nn.Module) -> None:
        for module in model.train().modules():
            if isinstance(module, Dropping):
                module.p = 0.5

    model = adapted(inner)
    assert mlp_rows(peft_ext.accelerate(copy.deepcopy(model))) == [True]
    assert_same(model, x, change)


def test_a_number_of_the_class_that_an_mlp_hides_later_is_seen(x: Tensor) -> None:
    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, ByClass):
                module.scale = 2.0

    model = adapted(ByClass())
    assert mlp_rows(peft_ext.accelerate(copy.deepcopy(model))) == [True]
    assert_same(model, x, change)


def test_marks_that_a_library_leaves_on_modules_change_no_path(x: Tensor) -> None:
    """FSDP's are set on every module of what it shards."""
    model = peft_ext.accelerate(adapted(Gated()))
    for module in model.modules():
        module._is_marked, module._mark = True, "one"
    assert mlp_rows(model) == [True]


@pytest.mark.parametrize("limit", [1.0, 10.0, 100.0, 3000.0])
def test_a_bound_is_seen_wherever_it_is(limit: float, x: Tensor) -> None:
    inner = Clamped()
    inner.limit = limit
    assert_same(adapted(inner), 1e4 * x)


@pytest.mark.parametrize("name", ["gelu_10", "gelu", "silu"])
def test_activations_are_tried_far_out(name: str, x: Tensor) -> None:
    act = hf.activations.ACT2FN[name]
    assert mlp.activation_name(act) == (None if name == "gelu_10" else name)
    assert_same(adapted(Gated(act)), 100 * x)


def test_an_activations_numbers_are_a_part_of_it(x: Tensor) -> None:
    for acts in ((Swish(1.0), Swish(1.7)), (Swish(1.0, held=True), Swish(1.7, held=True))):
        assert_same(adapted(*(Gated(act) for act in acts)), x)

    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, Swish):
                module.beta = 1.7

    model = adapted(Gated(Swish(1.0)))
    assert mlp_rows(peft_ext.accelerate(copy.deepcopy(model))) == [True]
    assert_same(model, x, change)


def test_a_stack_of_experts_with_a_bound_is_not_taken_for_a_plain_one() -> None:
    class Experts:
        act_fn, has_gate, limit = nn.SiLU(), True, 10.0

        def _apply_gate(self, rows: Tensor) -> Tensor:
            gate, up = rows.chunk(2, -1)
            return self.act_fn(gate.clamp(max=self.limit)) * up

    bounded, plain = Experts(), Experts()
    bounded.limit, plain.limit = 10.0, float("inf")
    assert _known_gate(bounded) is None
    assert _known_gate(plain) == "silu"


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[type], None]]:
    """Replaces a class's forward by one that gives twice as much."""

    def replace(kind: type) -> None:
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: 2 * forward(self, *args, **kwargs))

    yield replace


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)), config).eval()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [hf.models.llama.modeling_llama.LlamaMLP, hf.models.llama.modeling_llama.LlamaRMSNorm,
                                  peft.tuners.lora.Linear])  # fmt: skip
def test_a_classs_forward_that_others_replace_runs(kind: type, when: str, replaced: Callable[[type], None]) -> None:
    peft_ext.accelerate(llama())  # its trial is remembered
    stock, model = llama(), llama()
    if when == "after":
        peft_ext.accelerate(model)
    replaced(kind)
    if when == "before":
        peft_ext.accelerate(model)
    torch.testing.assert_close(model(IDS).logits, stock(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["prune", "parametrize"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_norms_whose_weight_is_made_of_others_are_their_own(how: str, when: str, x: Tensor) -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.rms, self.proj = nn.LayerNorm(32), RMS(32, eps=1e-6), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.rms(self.norm(x)))

    def change(model: nn.Module) -> None:
        for module in [m for m in model.modules() if isinstance(m, (nn.LayerNorm, RMS))]:
            if how == "prune":
                prune.l1_unstructured(module, "weight", amount=0.4)
            else:
                parametrize.register_parametrization(module, "weight", Twice())

    RMS = hf.models.llama.modeling_llama.LlamaRMSNorm
    torch.manual_seed(0)
    model = get_peft_model(Normed(), LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False))
    if how == "parametrize" or when == "after":  # a parametrized class can't be copied
        assert_same(model, x, change)
    else:
        change(model)
        wanted = result(model, x)
        for found, value in zip(result(peft_ext.accelerate(model), x), wanted, strict=True):
            torch.testing.assert_close(found, value)


def test_global_hooks_see_the_activation(x: Tensor) -> None:
    stock = adapted(Gated())
    ours, counts = peft_ext.accelerate(copy.deepcopy(stock)), []
    for model in (stock, ours):
        calls: list[nn.Module] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_, calls=calls: calls.append(module) if isinstance(module, nn.SiLU) else None
        )
        model(x)
        handle.remove()
        counts.append(len(calls))
    assert counts == [1, 1]


@pytest.mark.parametrize("blocks", [False, True])
def test_what_was_saved_and_then_changed_in_place_is_refused(blocks: bool, x: Tensor) -> None:
    """As autograd does, which does not look where there are hooks on what is saved."""
    model = peft_ext.accelerate(adapted(Gated(), targets=["down_proj"]), blocks=blocks)
    x.requires_grad_()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first, second = model(x).square().mean(), model(x).square().mean()
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_no_gpu_s_generator_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed would: all dropout of a run on GPUs would be drawn from 0, in each of its processes."""
    new = type("New", (Gated,), {"forward": lambda self, x: Gated.forward(self, x)})  # tried, as nobody has seen it
    model, seeded = adapted(new()), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    peft_ext.accelerate(model)
    assert not seeded
