"""Tests of calls with few tokens without a gradient: the plans of blocks compute what the layers compute."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional

import pytest
import torch
import transformers as hf
from few_token_models import (
    METHODS,
    MODELS,
    STEPS,
    TOLERANCE,
    assert_close,
    batch,
    build,
    inner,
    layer_by_layer,
    logits,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_ext
from peft_ext.integrations.adapter_layers import few_tokens, linear
from peft_ext.integrations.model_blocks import attention, block, decoder_layer
from peft_ext.ops import prove
from peft_ext.ops.library import OPERATORS, PROOFS
from peft_ext.ops.proof_inputs import ProofInputs


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns a list, to which each plan that runs appends its block's class name and its plan."""
    found: list[Any] = []

    def noting(block: Any, x: Tensor, make: Callable) -> Any:
        made = few_tokens.plan_of(block, x, make)
        found.append((type(block).__name__, made))
        return made

    for module in (attention, block, decoder_layer):
        monkeypatch.setattr(module, "plan_of", noting)
    return found


@pytest.fixture
def layer_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list, to which each call of the operator decoder_layer appends an item."""
    calls: list[int] = []
    own = decoder_layer._decoder_layer
    monkeypatch.setattr(decoder_layer, "_decoder_layer", lambda *args: calls.append(1) or own(*args))
    return calls


class Called(TorchDispatchMode):
    """Counts the calls of the operator of a linear layer without an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.peft_ext.nf4_linear.default
        return func(*args, **(kwargs or {}))


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("name", "method"), [*((name, method) for name in MODELS for method in METHODS), ("Llama", "MXFP4, LoRA")]
)
def test_logits_are_those_of_the_layers(
    name: str, method: str, size: int, cache: Optional[str], dtype: torch.dtype, planned: list, monkeypatch: Any
) -> None:
    model = peft_ext.accelerate(build(name, method, dtype))
    more = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    found = logits(model, size, **more)
    ran = {kind for kind, made in planned if made is not None}
    assert all(any(part in kind for kind in ran) for part in ("RMSNorm", "DecoderLayer"))
    count = len([made for _, made in planned if made is not None])
    with layer_by_layer(monkeypatch):
        wanted = logits(model, size, **more)
    assert len([made for _, made in planned if made is not None]) == count >= STEPS * 3
    tolerance = TOLERANCE[dtype] * wanted.float().abs().max()
    assert (found.float() - wanted.float()).abs().max() <= tolerance


@pytest.mark.parametrize("size", [1, 3])
def test_beam_search(size: int, planned: list, monkeypatch: Any) -> None:
    model = peft_ext.accelerate(build())
    how = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    found = model.generate(**batch(size), **how)
    assert any(made is not None for _, made in planned)
    with layer_by_layer(monkeypatch):
        assert torch.equal(found, model.generate(**batch(size), **how))


def test_layers_of_a_plan_are_kernels(planned: list) -> None:
    model = peft_ext.accelerate(build())
    logits(model)
    last = dict(planned)
    plan = last["LlamaDecoderLayer"].attention
    assert plan.attends and plan.are_direct
    assert type(plan.o) is few_tokens.Kernel


@pytest.mark.parametrize("name", MODELS)
def test_one_operator_computes_a_layer(name: str, layer_calls: list[int]) -> None:
    model = peft_ext.accelerate(build(name))
    logits(model)
    out = model(**batch(2), use_cache=True)
    mask = torch.nn.functional.pad(batch(2)["attention_mask"], (0, 2), value=1)
    del layer_calls[:]
    ids = torch.tensor([[5], [6]])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask[:, :-1], past_key_values=out.past_key_values)
    assert len(layer_calls) == 2
    model(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values)  # autograd is on
    assert len(layer_calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_operator_computes_its_formula(dtype: torch.dtype) -> None:
    shape = prove.SMALL["CPU"]
    both = [list(PROOFS["decoder_layer"](ProofInputs(torch.device("cpu"), dtype, shape))) for _ in range(2)]
    reference = OPERATORS["decoder_layer"].reference
    for (name, given), (_, exact) in zip(*both, strict=True):
        x, cos, sin, mask, keys, values, past, tensors, *rest = exact
        wide = [value.double() for value in (x, cos, sin, keys, values)]
        with prove._References():
            wanted = reference(*wide[:3], mask, *wide[3:], past, [value.double() for value in tensors], *rest)
        found = getattr(torch.ops.peft_ext, name).default(*given)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
        for ours, theirs in ((found, wanted), (given[4], wide[3]), (given[5], wide[4])):
            assert ours.dtype is dtype
            assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_gradient_checkpointing_computes_layers_again() -> None:
    model = peft_ext.accelerate(build()).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    layer, ids = inner(model), torch.arange(3, 12)[None]
    own, calls = layer._gradient_checkpointing_func, []
    layer._gradient_checkpointing_func = lambda *args, **given: calls.append(1) or own(*args, **given)
    model(input_ids=ids, labels=ids).loss.backward()
    assert calls == [1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["positions", "cache", "the cache's old name"])
def test_a_layer_is_called_with_few_arguments(name: str, how: str, planned: list) -> None:
    """Arguments that a caller leaves out have the defaults of the layer's forward."""
    found = []
    for model in (peft_ext.accelerate(build(name)), build(name)):
        layer, cache = inner(model), hf.DynamicCache()
        x, angles = torch.linspace(-1, 1, 128).sin().view(1, 1, 128), torch.linspace(0, 1, layer.self_attn.head_dim)
        given: dict[str, Any] = {"position_embeddings": (angles.cos()[None, None], angles.sin()[None, None])}
        if how != "positions":
            given["cache" if how == "cache" else "past_key_values"] = cache
        with torch.no_grad():
            found.append([layer(x, **given) for _ in range(3)])
        assert cache.get_seq_length() == (0 if how == "positions" else 3)
    assert_close(torch.cat(found[0]), torch.cat(found[1]))
    assert any(made and kind.endswith("DecoderLayer") for kind, made in planned)


def test_an_operator_of_a_layer_has_one_kind_of_norms(layer_calls: list[int]) -> None:
    """A norm of q with another offset than the norms of the hidden states has no place in the operator's lists."""
    model = build("Qwen 3", method="NF4")
    for layer in model.model.layers:
        norm = hf.models.gemma.modeling_gemma.GemmaRMSNorm(48)
        nn.init.normal_(norm.weight, std=0.1)
        layer.self_attn.q_norm = norm
    stock = copy.deepcopy(model)
    assert_close(logits(peft_ext.accelerate(model)), logits(stock))
    assert not layer_calls


@pytest.mark.parametrize("tokens", [2, 5, 8, 9, 23])
def test_a_short_prompt_is_causal(tokens: int) -> None:
    model, stock = peft_ext.accelerate(build()), build()
    ids = torch.arange(3, 3 + tokens)[None]
    with torch.no_grad():
        found = [[one(ids, use_cache=cached).logits for cached in (False, True, False)] for one in (model, stock)]
    for ours, wanted in zip(*found, strict=True):
        assert_close(ours, wanted)


def test_a_frozen_head_runs_the_operator(monkeypatch: Any) -> None:
    monkeypatch.setattr(linear, "is_ahead", lambda dtype: dtype is torch.bfloat16)
    monkeypatch.setattr(linear, "LEAST_ELEMENTS", 199 * 128)
    model = peft_ext.accelerate(build(dtype=torch.bfloat16))
    head, x = model.base_model.model.lm_head, torch.randn(1, 3, 128, dtype=torch.bfloat16)
    with torch.no_grad(), Called() as called:
        y = head(x)
        head(torch.randn(30, 128, dtype=torch.bfloat16))
    assert called.count == 1
    torch.testing.assert_close(y, torch.nn.functional.linear(x, head.weight), atol=0.05, rtol=0.02)
    with Called() as called:
        head(x)
    assert called.count == 0


def test_several_threads_call_one_model() -> None:
    wanted, interval = logits(build()), sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        for _ in range(4):
            model = peft_ext.accelerate(build())
            with ThreadPoolExecutor(8) as pool:
                for found in pool.map(lambda _, model=model: logits(model), range(8)):
                    assert_close(found, wanted)
    finally:
        sys.setswitchinterval(interval)


def test_a_global_hook_runs(planned: list) -> None:
    model = peft_ext.accelerate(build())
    logits(model)
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        del planned[:]
        logits(model, steps=1)
    finally:
        handle.remove()
    assert not planned and "Dropout" in seen


@pytest.mark.parametrize("mode", ["gradient", "autocast", "training"])
def test_other_modes_have_no_plan(mode: str, planned: list) -> None:
    model, stock = peft_ext.accelerate(build()), build()
    logits(model)
    del planned[:]
    ids = torch.arange(3, 8)[None]
    found = []
    for one in (model, stock):
        one.train(mode == "training")
        torch.manual_seed(0)
        with torch.set_grad_enabled(mode == "gradient"), torch.autocast("cpu", enabled=mode == "autocast"):
            found.append(one(ids).logits.detach())
    if mode != "training":  # in training, the two models draw different masks of dropout
        assert not planned
        assert (found[0] - found[1]).abs().max() < (0.1 if mode == "autocast" else 1e-3)
    assert not any(made for kind, made in planned if kind in ("LlamaAttention", "LlamaDecoderLayer"))


def test_hidden_states_and_attentions_are_given() -> None:
    model, stock = peft_ext.accelerate(build()), build()
    logits(model)
    for how in ({"output_hidden_states": True}, {"output_attentions": True, "_eager": True}):
        eager = how.pop("_eager", False)
        found = []
        for one in (model, stock):
            if eager:
                one.set_attn_implementation("eager")
            with torch.no_grad():
                found.append(one(torch.arange(3, 8)[None], **how))
        for name in ("hidden_states", "attentions"):
            ours, wanted = getattr(found[0], name, None), getattr(found[1], name, None)
            assert (ours is None) == (wanted is None)
            for a, b in zip(ours or (), wanted or (), strict=True):
                assert_close(a, b)


def test_copies_and_restored_models_have_plans_of_their_own(planned: list) -> None:
    model = peft_ext.accelerate(build())
    before = logits(model)
    copied = copy.deepcopy(model)
    inner(copied).mlp.down_proj.scaling["default"] = 7.5
    assert (logits(copied) - before).abs().max() > 1e-3
    assert torch.equal(logits(model), before)
    peft_ext.restore(model)
    del planned[:]
    assert_close(logits(model), before)
    assert not planned


def test_plans_do_not_hold_a_model() -> None:
    import gc
    import weakref

    model = peft_ext.accelerate(build())
    logits(model)
    held = weakref.ref(inner(model).self_attn)
    del model
    gc.collect()
    assert held() is None
