"""Rotary positions within a model's own forward: known by trial, taken by the operator; everything else as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from fused_parts import assert_alike, assert_taken_back
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama import modeling_llama

import peft_ext
from peft_ext.integrations.model_blocks import names, rotary

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
# What rotates all of a head, in each model's own words: plain, with norms of q and k, in float32 whatever the dtype.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "Qwen 3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, head_dim=8)),
    "Gemma 2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, head_dim=8)),
    "Mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, num_local_experts=4)),
    "OLMo 2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**SMALL)),
}
# What rotates neighbours, and a part of a head: the one is another function, the other is called with slices.
OTHERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "Cohere": (lambda: hf.CohereForCausalLM(hf.CohereConfig(**SMALL)), 0),
    "GLM": (lambda: hf.GlmForCausalLM(hf.GlmConfig(**SMALL, head_dim=8, partial_rotary_factor=0.5)), 0),
    "Phi-3": (lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**SMALL, partial_rotary_factor=0.5)), 0),
    "StableLM": (lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**SMALL, partial_rotary_factor=0.5)), 2),
}
IDS = {"input_ids": torch.arange(3, 37).view(2, 17), "labels": torch.arange(3, 37).view(2, 17)}


def build(
    make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, dropout: float = 0.0, seed: int = 0
) -> nn.Module:
    torch.manual_seed(seed)
    model = make().to(dtype)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout)
    return get_peft_model(model, config).train()


class Calls(TorchDispatchMode):
    """Counts the operator's."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.peft_ext.rotary_embedding.default
        return func(*args, **(kwargs or {}))


def step(model: nn.Module, **more: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(**IDS, **more).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def calls(model: nn.Module) -> int:
    with Calls() as counted, torch.no_grad():
        model(IDS["input_ids"])
    return counted.count


def rows(model: nn.Module) -> list[tuple[bool, str]]:
    return [(row.fused, row.reason) for row in peft_ext.explain(model).blocks if row.kind == "rotary positions"]


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_stock_one(name: str) -> None:
    stock, model = build(MODELS[name]), peft_ext.accelerate(build(MODELS[name]))
    assert rows(model) == [(True, "")] * 2 and calls(model) == 2 and calls(stock) == 0
    assert_alike(step(model), step(stock))


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_good_as_stock(name: str) -> None:
    errors = [0.0, 0.0]
    for seed in range(6):  # one model's is luck
        exact = step(build(MODELS[name], seed=seed))
        narrow = [build(MODELS[name], torch.bfloat16, seed=seed) for _ in errors]
        for i, model in enumerate((narrow[0], peft_ext.accelerate(narrow[1]))):
            found = step(model)
            errors[i] += sum((found[key].double() - value).norm() ** 2 for key, value in exact.items()).item()
    assert errors[1] <= 1.3**2 * errors[0]


@pytest.mark.parametrize("name", OTHERS)
def test_what_rotates_in_another_way_keeps_it(name: str) -> None:
    make, operators = OTHERS[name]
    stock, model = build(make), peft_ext.accelerate(build(make))
    assert calls(model) == operators
    assert_alike(step(model), step(stock))


def test_a_function_of_others_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes transformers' function's place, before or after ``accelerate``; back again, it is fused again."""
    model, seen = peft_ext.accelerate(build(MODELS["Llama"])), []

    def other(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(q.shape)
        return q, k

    with monkeypatch.context() as patched:
        patched.setattr(modeling_llama, rotary.NAME, other)
        assert calls(model) == 0 and len(seen) == 2
        assert rows(model) == [(False, "apply_rotary_pos_emb was replaced")] * 2
        assert rows(peft_ext.accelerate(build(MODELS["Llama"]))) == []
    assert rows(model) == [(True, "")] * 2 and calls(model) == 2


def test_every_other_name_is_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are looked up as the forward runs, not as it was accelerated."""
    model, seen = peft_ext.accelerate(build(MODELS["Llama"])), []
    model.get_base_model().config._attn_implementation = "eager"
    eager = modeling_llama.eager_attention_forward

    def other(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return eager(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", other)
    assert calls(model) == 2 and len(seen) == 2


def test_a_class_whose_forward_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_ext.accelerate(build(MODELS["Llama"]))
    attention = modeling_llama.LlamaAttention
    monkeypatch.setattr(attention, "forward", lambda self, hidden_states, **kwargs: (hidden_states, None))
    assert calls(model) == 0


def test_what_takes_it_back() -> None:
    assert_taken_back(build(MODELS["Llama"]), step, calls, rows)


def test_layers_that_get_adapters_later_are_joined_then() -> None:
    """A module that is fused for its positions alone is looked at again, with each ``accelerate``."""
    torch.manual_seed(0)
    model = peft_ext.get_peft_model(MODELS["Llama"](), LoraConfig(target_modules=["q_proj"]))
    kinds = {row.kind for row in peft_ext.explain(model).blocks}
    assert "rotary positions" in kinds and "projections of one input" not in kinds
    model.add_adapter("other", LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"]))
    model.set_adapter("other")
    peft_ext.accelerate(model)
    joined = [row.fused for row in peft_ext.explain(model).blocks if row.kind == "projections of one input"]
    assert joined == [True, True] and rows(model) == [(True, "")] * 2 and calls(model) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_dropout(reentrant: bool) -> None:
    model = peft_ext.accelerate(build(MODELS["Llama"], dropout=0.2))
    wanted = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_alike(step(model, use_cache=False), wanted)


def test_packed_texts_and_generation() -> None:
    """Positions that begin anew within a row, and a cache that gives one position a call."""
    stock, model = build(MODELS["Llama"]).eval(), peft_ext.accelerate(build(MODELS["Llama"])).eval()
    positions = torch.arange(17).remainder(6).expand(2, 17)
    assert_alike(step(model, position_ids=positions), step(stock, position_ids=positions))
    ids = [m.generate(IDS["input_ids"], max_new_tokens=9, do_sample=False) for m in (stock, model)]
    assert torch.equal(*ids)


def test_autocast_and_compiled_calls_are_the_models_own() -> None:
    """Autocast gives q and k another dtype than positions have; a compiler sees the code that it knows."""
    stock, model = build(MODELS["Llama"]), peft_ext.accelerate(build(MODELS["Llama"]))
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(model) == 0
        torch.testing.assert_close(model(**IDS).loss, stock(**IDS).loss, rtol=1e-2, atol=1e-2)
    torch._dynamo.reset()
    called = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    assert_alike(step(compiled), {f"_orig_mod.{k}" if k != "loss" else k: v for k, v in step(model).items()})
    assert any("cat" in name for name in called) and not any("rotary_embedding" in name for name in called)


@pytest.mark.parametrize("what", ["k's batch", "k's dtype", "cos is trained", "positions are few", "4-D positions"])
def test_calls_that_the_operator_does_not_take_go_to_the_function(what: str) -> None:
    """They give what the function gives: its broadcasting, its gradients, its errors."""
    q, k, cos, sin = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    if what == "k's batch":
        k = k[:1]
    elif what == "k's dtype":
        k = k.double()
    elif what == "cos is trained":
        cos.requires_grad_()
    elif what == "positions are few":
        cos, sin = cos[:, :1], sin[:, :1]
    else:
        cos, sin = cos[:, None], sin[:, None]
    found = []
    for function in (modeling_llama.apply_rotary_pos_emb, rotary.fused(modeling_llama.apply_rotary_pos_emb)):
        try:
            found.append(function(q, k, cos, sin))
        except RuntimeError as error:
            found.append(str(error))
    if isinstance(found[0], str):
        assert found[0] == found[1]
        return
    for value, wanted in zip(found[1], found[0], strict=True):
        assert value.dtype is wanted.dtype and value.requires_grad == wanted.requires_grad
        assert torch.equal(value, wanted)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)


def passed_on(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def held_elsewhere(function: Callable) -> Callable:
    kept = {"function": function}

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return kept["function"](*args, **kwargs)

    return wrapper


def test_decorators_and_code_that_can_not_be_followed() -> None:
    def plain(q: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(q, *rest)

    def looks(q: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(q, *rest) if globals() else (q, q)

    found = {}
    for forward in (plain, passed_on(plain), passed_on(passed_on(plain)), held_elsewhere(plain), looks):
        function = rotary.rotary_function(forward)
        assert function is apply_rotary_pos_emb
        found[forward] = names.with_names(forward, ((rotary.NAME, rotary.fused(function)),))
    *made, hidden, looking = found.values()
    assert hidden is None and looking is None
    values = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    wanted = apply_rotary_pos_emb(*values)
    for forward in made:
        with Calls() as counted:
            torch.testing.assert_close(forward(*values), wanted)
        assert counted.count == 1
    with Calls() as counted:
        plain(*values)
    assert counted.count == 0
