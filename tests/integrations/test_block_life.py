"""Tests changes to a model with fused blocks: replaced code, hooks, PyTorch's tools around a module, copies, restore.

Most results are compared with those of an equal model without peft_ext.
"""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.utils import parametrize, prune

import peft_ext

hf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
hf_accelerate = pytest.importorskip("accelerate")

from transformers.integrations import sdpa_attention  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.models.gemma import modeling_gemma  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
             num_key_value_heads=2)  # fmt: skip
IDS = torch.arange(3, 51).view(2, 24)
PADDED = torch.ones_like(IDS)
PADDED[0, :7] = 0


def adapted(model: nn.Module, **config: Any) -> nn.Module:
    given = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **config}
    return peft.get_peft_model(model, peft.LoraConfig(**given))


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return adapted(hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)).to(dtype))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return adapted(hf.GPT2LMHeadModel(config), target_modules=["c_attn"])


def gated(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns an adapted nn.Sequential of Llama's RMSNorm and MLP, an nn.LayerNorm and an nn.Linear."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SMALL)
    parts = modeling_llama.LlamaRMSNorm(32), modeling_llama.LlamaMLP(config), nn.LayerNorm(32), nn.Linear(32, 32)
    return adapted(nn.Sequential(*parts).to(dtype), target_modules=["gate_proj", "up_proj", "down_proj", "3"])


def result(model: nn.Module, *args: Any) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    y = model(*args) if args else model(input_ids=IDS, labels=IDS, attention_mask=PADDED).loss
    (y.float().square().mean() if args else y).backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_alike(stock: nn.Module, ours: nn.Module, *args: Any) -> None:
    for found, wanted in zip(result(ours, *args), result(stock, *args), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-5 * max(1.0, wanted.abs().max().item()))


def fused(model: nn.Module, *kinds: str) -> set[bool]:
    return {row.fused for row in peft_ext.explain(model).blocks if not kinds or row.kind in kinds}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(5))


# --- replaced before accelerate: stock, and explain says so -----------------------------------------------------------


def doubled(function: Callable) -> Callable:
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


def rotated_otherwise(x: Tensor) -> Tensor:
    return torch.cat((x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def clamped(limit: float) -> Callable:
    forward = modeling_llama.LlamaRMSNorm.forward
    return lambda self, x: forward(self, x.clamp(-limit, limit))


def variance_capped(self: Any, x: Tensor) -> Tensor:
    variance = x.float().pow(2).mean(-1, keepdim=True).clamp(max=1e-6)
    return self.weight * (x.float() * torch.rsqrt(variance + self.variance_epsilon)).to(x.dtype)


def repeated_otherwise(states: Tensor, count: int) -> Tensor:
    return states.repeat(1, count, 1, 1)


def with_a_temperature(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, temperature: float = 3.0, **rest: Any):
    return sdpa_attention.sdpa_attention_forward(module, q / temperature, k, v, mask, **rest)


REPLACED = {
    "rotate_half": (modeling_llama, "rotate_half", rotated_otherwise, "rotary positions"),
    "apply_rotary_pos_emb": (modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k), "rotary positions"),
    "repeat_kv": (sdpa_attention, "repeat_kv", repeated_otherwise, "attention"),
    "a norm that clamps": (modeling_llama.LlamaRMSNorm, "forward", clamped(0.02), "RMSNorm"),
    "a norm that caps": (modeling_llama.LlamaRMSNorm, "forward", variance_capped, "RMSNorm"),
    "an MLP that clamps": (modeling_llama.LlamaMLP, "forward",
                           lambda self, x: self.down_proj(self.up_proj(x).clamp(-0.01, 0.01)), "MLP"),
    "PyTorch's rsqrt": (torch, "rsqrt", lambda x: torch.sqrt(x), "RMSNorm"),
    "PyTorch's silu": (F, "silu", lambda x, inplace=False: torch.tanh(x), "MLP"),
    "PyTorch's attention": (F, "scaled_dot_product_attention", doubled(F.scaled_dot_product_attention), "attention"),
    "the registry": (ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", with_a_temperature, "attention"),
    "the registry, of one module": (ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", with_a_temperature, "attention"),
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", REPLACED)
def test_what_is_replaced_runs(name: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a model's code is replaced before accelerate, or after a first call and before a second call of
    accelerate. Values are then those of the stock model, and explain reports the block as not fused.
    """
    owner, attribute, value, kind = REPLACED[name]
    stock = llama()
    ours = copy.deepcopy(stock)
    plain = result(stock)
    if when == "after":
        peft_ext.accelerate(ours)
    if isinstance(owner, dict):
        monkeypatch.setitem(owner, attribute, value)
    else:
        monkeypatch.setattr(owner, attribute, value)
    said = [row for row in peft_ext.explain(ours).blocks if row.kind == kind and row.fused]
    assert all("call accelerate(model) again" in row.reason for row in said)
    peft_ext.accelerate(ours)
    assert_alike(stock, ours)
    assert (result(stock)[0] - plain[0]).abs() > 1e-4  # the replacement computes something else
    assert True not in fused(ours, kind)
    monkeypatch.undo()
    assert_alike(stock, peft_ext.accelerate(ours))
    assert fused(ours, kind) == {True}


@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "a norm that clamps", "an MLP that clamps", "the registry",
                                  "PyTorch's attention", "the registry, of one module"])  # fmt: skip
def test_what_a_call_can_see_is_seen_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, value, kind = REPLACED[name]
    stock = llama()
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    if isinstance(owner, dict):
        monkeypatch.setitem(owner, attribute, value)
    else:
        monkeypatch.setattr(owner, attribute, value)
    assert_alike(stock, ours)
    assert True not in fused(ours, kind)


def test_a_helper_of_a_class_is_seen_by_explain_and_the_next_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stock = adapted(hf.GemmaForCausalLM(hf.GemmaConfig(**SMALL, head_dim=8)))
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    assert fused(ours, "RMSNorm") == {True}
    monkeypatch.setattr(modeling_gemma.GemmaRMSNorm, "_norm", lambda self, x: x * 0.5)
    (reason,) = {row.reason for row in peft_ext.explain(ours).blocks if row.kind == "RMSNorm"}
    assert reason == "its code is no longer the known form: call accelerate(model) again"
    assert_alike(stock, peft_ext.accelerate(ours))
    assert (
        "none of the known forms" in {row.reason for row in peft_ext.explain(ours).blocks if row.kind == "norm"}.pop()
    )


CHANGED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a forward on the instance": (lambda m: setattr(m[1], "forward", lambda x: 2 * x), "MLP"),
    "another activation": (lambda m: setattr(m[1], "act_fn", nn.Tanh()), "MLP"),
    "an activation of theirs": (lambda m: (delattr(m[1], "act_fn"), setattr(m[1], "act_fn", torch.sin)), "MLP"),
    "a forward of the activation": (lambda m: setattr(m[1].act_fn, "forward", torch.tanh), "MLP"),
    "a hook on the activation": (lambda m: m[1].act_fn.register_forward_hook(lambda *a: a[2] * 2), "MLP"),
    "a hook before the activation": (lambda m: m[1].act_fn.register_forward_pre_hook(lambda *a: (a[1][0] * 2,)), "MLP"),
    "an eps that is a tensor": (lambda m: setattr(m[0], "variance_epsilon", torch.tensor(0.5)), "RMSNorm"),
    "a weight of two dimensions": (lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(24, 32))), "RMSNorm"),
    "a weight that is a buffer": (
        lambda m: (delattr(m[0], "weight"), m[0].register_buffer("weight", torch.ones(32))), "RMSNorm"),
    "no weight": (lambda m: m[2].register_parameter("weight", None), "LayerNorm"),
}  # fmt: skip
STAYS: dict[str, Callable[[Any], Any]] = {
    "another eps": lambda m: setattr(m[0], "variance_epsilon", 0.7),
    "a hook": lambda m: m[1].register_forward_hook(lambda *args: args[2] * 2),
    "a hook before": lambda m: m[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "a backward hook": lambda m: m[1].register_full_backward_hook(lambda module, grads, out: (grads[0],)),
    "a backward hook before": lambda m: m[1].register_full_backward_pre_hook(lambda module, out: (out[0] * 2,)),
    "a hook on a layer": lambda m: m[1].up_proj.register_forward_hook(lambda *args: args[2] * 2),
    "a hook on the last layer": lambda m: m[1].down_proj.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "marks of a library": lambda m: [setattr(module, "_mark", "one") for module in m.modules()],
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", [*CHANGED, *STAYS])
def test_what_changes_on_a_module(name: str, when: str, x: Tensor) -> None:
    change, kind = CHANGED.get(name) or (STAYS.get(name), "")
    stock = gated()
    ours = copy.deepcopy(stock) if when == "before" else peft_ext.accelerate(copy.deepcopy(stock))
    for model in (stock, ours):
        change(model.get_base_model())
    assert_alike(stock, peft_ext.accelerate(ours) if when == "before" else ours, x)
    assert fused(ours, kind or "MLP") == ({False} if kind else {True})


@pytest.mark.parametrize("kind", ["q_norm", "act", "row", "out", "inner", "known"])
def test_a_child_of_any_name_is_the_models(kind: str, x: Tensor) -> None:
    """The attributes of a fused class hide no child of the module."""
    stock = gated()
    stock.get_base_model()[1].add_module(kind, nn.Identity())
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    assert isinstance(getattr(ours.get_base_model()[1], kind), nn.Identity)
    assert_alike(stock, ours, x)


# --- tools around a module --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["down_proj", "q_proj"])
def test_hooks_that_write_past_versions(name: str) -> None:
    """Tests hooks that write into tensors without changing a tensor's version, for example to switch off neurons."""

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


@pytest.mark.parametrize("how", ["prune", "parametrize"])
@pytest.mark.parametrize(("name", "index"), [("weight", 0), ("weight", 2), ("bias", 2)])
def test_what_is_made_of_others(how: str, name: str, index: int, x: Tensor) -> None:
    stock = gated()
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    for model in (stock, ours):
        module = model.get_base_model()[index]
        if how == "prune":
            prune.l1_unstructured(module, name, amount=0.3)
        else:
            parametrize.register_parametrization(module, name, nn.Tanh())
    assert_alike(stock, ours, x)


@pytest.mark.parametrize("how", ["prune", "parametrize"])
def test_a_bias_of_a_base_layer_that_is_made_of_others(how: str) -> None:
    stock = gpt2()
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    for model in (stock, ours):
        module = model.get_base_model().transformer.h[0].attn.c_attn.base_layer
        if how == "prune":
            prune.l1_unstructured(module, "bias", amount=0.3)
        else:
            parametrize.register_parametrization(module, "bias", nn.Tanh())
    assert_alike(stock, ours)


def test_restore_reaches_parametrized_modules() -> None:
    model = peft_ext.accelerate(llama())
    norm, head = model.get_base_model().model.norm, model.get_base_model().lm_head
    for module in (norm, head):
        parametrize.register_parametrization(module, "weight", nn.Identity())
    peft_ext.restore(model)
    for module in (norm, head):
        parametrize.remove_parametrizations(module, "weight")
    assert type(head) is nn.Linear and type(norm) is modeling_llama.LlamaRMSNorm
    assert True not in fused(model)


def test_saved_tensors_hooks_that_are_forbidden() -> None:
    stock = llama()
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert_alike(stock, ours)


def test_forward_mode_goes_past_blocks_and_layers() -> None:
    stock = llama()
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    h, tangent, found = torch.randn(2, 5, 32), torch.randn(2, 5, 32), []
    for model in (stock, ours):
        layer = model.get_base_model().model.layers[0]
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(h, tangent)
            y = layer.mlp(layer.input_layernorm(dual)) + layer.self_attn.o_proj(dual)
            found.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(found[1], found[0])


def test_layers_that_are_checkpointed_beside_their_own_cache() -> None:
    """The recomputation of checkpointing adds to the layer's cache again, and must save equal tensors."""
    stock = llama()
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    layers = list(ours.get_base_model().model.layers)
    apply_activation_checkpointing(ours, check_fn=lambda module: module in layers)
    for model in (stock, ours):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for one, other in zip(ours.parameters(), stock.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_global_hooks_see_the_activation(x: Tensor) -> None:
    stock = gated()
    counts = []
    for model in (stock, peft_ext.accelerate(copy.deepcopy(stock))):
        calls: list[nn.Module] = []
        kind = type(stock.get_base_model()[1].act_fn)
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_, calls=calls, kind=kind: calls.append(module) if isinstance(module, kind) else None
        )
        model(x)
        handle.remove()
        counts.append(len(calls))
    assert counts == [1, 1]


@pytest.mark.parametrize("blocks", [False, True])
def test_what_was_saved_and_then_changed_in_place_is_refused(blocks: bool, x: Tensor) -> None:
    """autograd refuses an in-place change of a saved tensor, but does not check tensors that pass through saved-tensor
    hooks."""
    model = peft_ext.accelerate(gated(), blocks=blocks)
    x.requires_grad_()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first, second = model(x).square().mean(), model(x).square().mean()
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


# --- strides, copies, restore -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_keeps_the_strides_of_its_input(dtype: torch.dtype, x: Tensor) -> None:
    stock = gated(dtype).get_base_model()[0]
    ours = peft_ext.accelerate(gated(dtype)).get_base_model()[0]
    x = x.to(dtype)
    for value in (x.transpose(0, 1), x.view(2, 4, 6, 32).permute(2, 0, 1, 3), x[:, ::2], x[:, :1].expand(2, 5, 32),
                  x[0, 0].expand(3, 4, 32), x[..., ::2].repeat(1, 1, 2), x[:0]):  # fmt: skip
        found, wanted = ours(value), stock(value)
        assert found.stride() == wanted.stride()
        torch.testing.assert_close(found, wanted)


def test_a_layer_without_dropout_or_gradient_is_called_by_names() -> None:
    ours, stock = peft_ext.accelerate(llama()), llama()
    h = torch.randn(2, 3, 32)
    for mode in (True, False):
        head = ours.train(mode).get_base_model().lm_head
        torch.testing.assert_close(head(input=h) + 0, stock.get_base_model().lm_head(input=h))


def test_copies_and_pickles_share_what_the_model_shares() -> None:
    model = peft_ext.accelerate(llama())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_alike(model, again)
        base = again.get_base_model()
        attention = base.model.layers[0].self_attn
        assert isinstance(attention.config, hf.LlamaConfig) and attention.config.hidden_size == 32
        assert base.config._attn_implementation == "sdpa" != attention.config._attn_implementation
        base.set_attn_implementation("eager")
        assert attention.config._attn_implementation == "eager" and fused(again, "attention") == {False}
        assert fused(model, "attention") == {True}
        base.config.one_more = 7
        assert attention.config.one_more == 7 and not hasattr(model.config, "one_more")


def test_restore_leaves_nothing_behind() -> None:
    def told(model: nn.Module) -> list[Any]:
        return [
            (type(module), sorted(module.__dict__), id(module.__dict__.get("config"))) for module in model.modules()
        ]

    model = llama()
    before = told(model)
    peft_ext.accelerate(model)
    assert told(model) != before
    assert told(peft_ext.restore(model)) == before


def test_a_class_that_is_another_where_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps(peft_ext.accelerate(gated()))
    from peft_ext.integrations.model_blocks import block

    monkeypatch.setattr(block, "_CLASSES", {})
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: self.up_proj(x))
    model = pickle.loads(data)
    assert type(model.get_base_model()[1]) is modeling_llama.LlamaMLP
    assert type(model.get_base_model()[0]) is not modeling_llama.LlamaRMSNorm


def test_who_holds_a_bound_forward_goes_on_after_restore(x: Tensor) -> None:
    model = peft_ext.accelerate(gated())
    for module in list(model.modules()):
        if type(module).__mro__[1].__module__.startswith("peft_ext."):
            module.forward = lambda *args, own=module.forward: own(*args)
    before = model(x)
    peft_ext.restore(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_what_hooks_leave_behind_is_no_other_forward() -> None:
    model = hf_accelerate.dispatch_model(peft_ext.accelerate(llama()), {"": "cpu"}, force_hooks=True)
    assert peft_ext.explain(model).fused_share == 0.0
    hf_accelerate.hooks.remove_hook_from_submodules(model)
    assert peft_ext.explain(model).fused_share == 1.0


def test_two_models_of_one_configuration_are_accelerated_apart() -> None:
    config = hf.LlamaConfig(**SMALL)
    one, other = (adapted(hf.LlamaForCausalLM(config)) for _ in range(2))
    peft_ext.accelerate(one)
    attention = other.get_base_model().model.layers[0].self_attn
    assert type(attention) is modeling_llama.LlamaAttention and attention.config is config
    assert config._attn_implementation == "sdpa"


def test_accelerate_draws_nothing_from_the_callers_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[Any] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model = llama()
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    peft_ext.explain(peft_ext.accelerate(model))
    seeded.clear()
    assert torch.equal(torch.rand(3), wanted) and not seeded


class Registry:
    names: list[str] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registry.names.append(cls.__name__)


class Listed(Registry, modeling_llama.LlamaMLP):
    pass


def test_a_class_of_somebodys_own_with_a_known_body_is_known_and_no_new_one_of_theirs(x: Tensor) -> None:
    stock = adapted(nn.Sequential(Listed(hf.LlamaConfig(**SMALL)), nn.Linear(32, 32)), target_modules=["1"])
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    assert Registry.names == ["Listed"] and fused(ours, "MLP") == {True}
    assert_alike(stock, ours, x)


class RebuiltMLP(modeling_llama.LlamaMLP):
    def __reduce__(self) -> tuple:
        return RebuiltMLP, (hf.LlamaConfig(**SMALL),)


def test_a_class_with_copies_of_its_own_is_left_alone(x: Tensor) -> None:
    model = peft_ext.accelerate(adapted(nn.Sequential(RebuiltMLP(hf.LlamaConfig(**SMALL)), nn.Linear(32, 32)),
                                        target_modules=["1"]))  # fmt: skip
    assert type(model.get_base_model()[0]) is RebuiltMLP and fused(model, "MLP") == {False}


def test_an_attribute_that_hides_what_the_class_has(x: Tensor) -> None:
    torch.manual_seed(0)
    stock = adapted(nn.Sequential(modeling_gemma.GemmaRMSNorm(32), nn.Linear(32, 32)), target_modules=["1"])
    for when in ("before", "after"):
        ours = copy.deepcopy(stock)
        if when == "after":
            peft_ext.accelerate(ours)
        for model in (stock, ours):
            norm = model.get_base_model()[0]
            norm._norm = types.MethodType(lambda self, x: x * 3, norm)
        assert_alike(stock, peft_ext.accelerate(ours) if when == "before" else ours, x)
        assert True not in fused(ours, "RMSNorm", "norm")
        del stock.get_base_model()[0]._norm


def test_layers_that_get_adapters_later_are_joined_then() -> None:
    torch.manual_seed(0)
    config = hf.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    model = adapted(hf.BertModel(config), target_modules=["query"])
    peft_ext.accelerate(model)
    model.add_adapter("more", peft.LoraConfig(r=4, target_modules=["query", "key", "value"]))
    model.set_adapter("more")
    assert fused(peft_ext.accelerate(model), "projections of one input") == {True}


def test_dora_of_one_token_has_pefts_shape() -> None:
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Linear(8, 6)), target_modules=["0"], use_dora=True)
    wanted = model(torch.ones(8))
    torch.testing.assert_close(peft_ext.accelerate(model)(torch.ones(8)), wanted)


@pytest.mark.cpu_only("the process group is of one CPU process")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")
def test_a_decoder_layer_that_fully_shard_wrapped_stays_wrapped() -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.LlamaConfig(**sizes, vocab_size=64)
    adapted = peft.get_peft_model(hf.LlamaForCausalLM(config), peft.LoraConfig(target_modules="all-linear"))
    model, ids = peft_ext.accelerate(adapted), torch.randint(0, 64, (2, 30))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        (layer,) = model.base_model.model.model.layers
        fully_shard(layer)
        fully_shard(model)
        peft_ext.accelerate(model)  # as PeftExtCallback does when training begins
        assert isinstance(layer, FSDPModule) and peft_ext.explain(model).fused_share == 1
        loss = model(input_ids=ids, labels=ids).loss
        peft_ext.restore(model)
        assert isinstance(layer, FSDPModule)
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, loss)
    finally:
        torch.distributed.destroy_process_group()
