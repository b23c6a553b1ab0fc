"""Tests of calls with few tokens without a gradient: the plans of blocks compute what the layers compute, and a change
of the model takes effect although a plan was made before."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from tiers import first
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_ext
from peft_ext.integrations.adapter_layers import few_tokens, linear
from peft_ext.integrations.model_blocks import attention, block, decoder_layer
from peft_ext.integrations.model_blocks.cache import appended
from peft_ext.ops import prove
from peft_ext.ops.library import OPERATORS, PROOFS
from peft_ext.ops.proof_inputs import ProofInputs

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 199, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "max_position_embeddings": 64}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "Qwen 2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "Qwen 3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=48)),
    "OLMo 2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**SIZES)),
    "Mistral, window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=5)),
    "Qwen 3, window": lambda: hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**SIZES, head_dim=48, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
}
METHODS = ("LoRA", "NF4", "NF4, LoRA", "DoRA", "NF4, two adapters", "two adapters")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03}
PROMPT, STEPS = 9, 4


def build(name: str = "Llama", method: str = "NF4, LoRA", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model: Any = MODELS[name]().to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, parameter.shape[1] ** -0.5)
    if "NF4" in method:
        peft_ext.quantize_nf4(model, progress=False)
    if "MXFP4" in method:
        peft_ext.quantize_packed(model, "mxfp4")
    if method != "NF4":
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora="DoRA" in method,
                            lora_dropout=0.1)  # fmt: skip
        model = get_peft_model(model, config)
        if "two" in method:
            model.add_adapter("other", config)
            model.base_model.set_adapter(["default", "other"])
    return model.requires_grad_(False).eval()


def batch(size: int) -> dict[str, Tensor]:
    ids = torch.arange(3, 3 + size * PROMPT).view(size, PROMPT)
    mask = torch.ones_like(ids)
    for row in range(size - 1):
        mask[row, : 2 * row + 1] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: nn.Module, size: int = 1, steps: int = STEPS, **more: Any) -> Tensor:
    """Returns the logits of ``steps`` tokens behind a prompt; the tokens do not depend on the model."""
    out = model.generate(**batch(size), max_new_tokens=steps + 1, min_new_tokens=steps + 1, do_sample=False,
                         output_logits=True, return_dict_in_generate=True, prefix_allowed_tokens_fn=_token,
                         **more)  # fmt: skip
    return torch.stack(out.logits)


def _token(row: int, ids: Tensor) -> list[int]:
    return [(7 * len(ids) + row) % 190 + 3]


@contextlib.contextmanager
def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        for module in (attention, block, decoder_layer):
            patch.setattr(module, "few_reason", lambda x: "off")
        yield


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


def assert_close(found: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype] if found.dtype in TOLERANCE else 2e-5
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max(), (found - wanted).abs().max()


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
    # The decoder layer of OLMo 2 has no known form. Mistral's attention runs its own code, in which only the layers of
    # one input are computed together.
    blocks = {"OLMo 2": ("RMSNorm", "MLP", "Attention"), "Mistral, window": ("RMSNorm", "MLP")}
    blocks = blocks.get(name, ("RMSNorm", "DecoderLayer"))
    assert all(any(part in kind for kind in ran) for part in blocks)
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
    # The decoder layer of OLMo 2 has no known form. Mistral's attention runs stock code, and so does a cache of a
    # sliding window, which one of two layers has.
    count = {"OLMo 2": 0, "Mistral, window": 0, "Qwen 3, window": 1}.get(name, 2)
    assert len(layer_calls) == count
    model(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values)  # autograd is on
    assert len(layer_calls) == count


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


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_cache_grows_in_place() -> None:
    torch.manual_seed(0)
    cache = hf.DynamicCache()
    k, v = torch.randn(2, 2, 3, 5, 8)
    assert appended(cache, 0, k, v) is None  # the cache has no layer yet; the next line makes the first layer
    cache.update(k, v, 0)
    layer, wanted = cache.layers[0], [k, v]
    places = set()
    for count in (1, 1, 3, 80, 1, 1):
        new = torch.randn(2, 2, 3, count, 8)
        wanted = [torch.cat(pair, 2) for pair in zip(wanted, new, strict=True)]
        found = appended(cache, 0, *new)
        assert found[0] is layer.keys and found[1] is layer.values
        assert all(map(torch.equal, found, wanted)) and cache.get_seq_length() == wanted[0].shape[2]
        places.add(layer.keys.data_ptr())
    assert len(places) == 2  # memory is allocated in the first step, and in the step of 80 tokens
    cache.update(*new, 0)
    assert torch.equal(layer.keys, torch.cat([wanted[0], new[0]], 2))


@pytest.mark.parametrize("way", ["crop", "copy", "deepcopy", "set", "reorder", "reset"])
def test_tensors_of_a_cache_keep_their_values(way: str) -> None:
    torch.manual_seed(0)
    cache = hf.DynamicCache()
    cache.update(*torch.randn(2, 2, 3, 5, 8), 0)
    first = appended(cache, 0, *torch.randn(2, 2, 3, 1, 8))[0]
    second = appended(cache, 0, *torch.randn(2, 2, 3, 1, 8))[0]
    kept = [(view, view.clone()) for view in (first, second)]
    layer = cache.layers[0]
    if way == "crop":
        cache.crop(-1)
    elif way == "copy":
        layer = copy.copy(layer)
        cache.layers = [layer]
    elif way == "deepcopy":
        cache = copy.deepcopy(cache)
    elif way == "set":
        layer.keys, layer.values = first, layer.values[:, :, :-1]
    elif way == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
    else:
        cache.reset()
        assert appended(cache, 0, *torch.randn(2, 2, 3, 1, 8)) is None
        cache.update(*torch.randn(2, 2, 3, 5, 8), 0)
    length = cache.get_seq_length()
    before, new = cache.layers[0].keys.clone(), torch.randn(2, 2, 3, 1, 8)
    assert torch.equal(appended(cache, 0, *new)[0], torch.cat([before, new[0]], 2))
    assert cache.get_seq_length() == length + 1
    assert all(torch.equal(view, value) for view, value in kept)


@pytest.mark.parametrize("why", ["dtype", "batch", "static", "subclass", "gradient"])
def test_stock_s_update_runs_for_a_cache_that_does_not_fit(why: str) -> None:
    k = torch.randn(2, 3, 5, 8, requires_grad=why == "gradient")
    cache = hf.StaticCache(hf.LlamaConfig(**SIZES), 64) if why == "static" else hf.DynamicCache()
    cache.update(k, k, 0)
    if why == "subclass":

        class Layer(type(cache.layers[0])):
            def update(self, *args: Any, **given: Any) -> Any:
                return super().update(*args, **given)

        cache.layers[0].__class__ = Layer
    new = torch.randn(2 if why != "batch" else 1, 3, 1, 8, dtype=torch.float64 if why == "dtype" else None)
    assert appended(cache, 0, new, new) is None


# --- a change takes effect --------------------------------------------------------------------------------------------


def inner(model: Any) -> Any:
    return model.base_model.model.model.layers[0]


def _doubled(module: nn.Module, args: Any, output: Any) -> Any:
    return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2


def _halved(module: nn.Module, args: tuple) -> Any:
    return (args[0] / 2, *args[1:]) if args else None


def hook(path: str, before: bool = False) -> Callable[[Any], Any]:
    def change(model: Any) -> None:
        module = inner(model).get_submodule(path)
        module.register_forward_pre_hook(_halved) if before else module.register_forward_hook(_doubled)

    return change


def replaced(path: str) -> Callable[[Any], Any]:
    def change(model: Any) -> None:
        module = inner(model).get_submodule(path)
        own = module.forward
        module.forward = lambda *args, **kwargs: _doubled(module, args, own(*args, **kwargs))

    return change


def _scaling(model: Any) -> None:
    inner(model).mlp.down_proj.scaling["default"] = 7.5


def _parameter(model: Any) -> None:
    layer = inner(model).self_attn.q_proj.lora_B["default"]
    layer.weight = nn.Parameter(layer.weight.detach() * 3, requires_grad=False)


def _data(model: Any) -> None:
    parameter = inner(model).self_attn.q_proj.lora_B["default"].weight
    parameter.data = parameter.data * 3


def _wide(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double().float().half()


def _eps(model: Any) -> None:
    inner(model).input_layernorm.variance_epsilon = 0.5


def _norm(model: Any) -> None:
    inner(model).post_attention_layernorm.weight = nn.Parameter(torch.linspace(0, 2, 128))


def _codes(model: Any) -> None:
    base = inner(model).self_attn.v_proj.base_layer
    base.weight.data = base.weight.data.flip(0)


def _scales(model: Any) -> None:
    base = inner(model).self_attn.v_proj.base_layer
    base.absmax = base.absmax.flip(0)


def _off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def _merged(model: Any) -> None:
    model.merge_adapter()


def _other(model: Any) -> None:
    torch.manual_seed(3)
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("other")


def _in_place(model: Any) -> None:
    torch.manual_seed(3)
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    inner(model).mlp.gate_proj._active_adapter[:] = ["other"]


def _heads(model: Any) -> None:
    inner(model).self_attn.scaling = 0.5


def _activation(model: Any) -> None:
    inner(model).mlp.act_fn = nn.Tanh()


def _linear(model: Any) -> None:
    inner(model).self_attn.k_proj = nn.Linear(128, 64)
    nn.init.constant_(inner(model).self_attn.k_proj.weight, 0.01)
    nn.init.zeros_(inner(model).self_attn.k_proj.bias)


def _eager(model: Any) -> None:
    model.set_attn_implementation("eager")


LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
PARTS = ("", ".base_layer", ".lora_A.default", ".lora_B.default", ".lora_dropout.default")
PATHS = ("self_attn", "mlp", "mlp.act_fn", "input_layernorm", *(layer + part for layer in LAYERS for part in PARTS))
CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook on the layer": hook(""), "hook before the layer": hook("", True), "forward of the layer": replaced(""),
    **{f"hook on {path}": hook(path) for path in PATHS},
    **{f"hook before {path}": hook(path, True) for path in PATHS if path != "self_attn"},
    **{f"forward of {path}": replaced(path) for path in PATHS},
    "scaling": _scaling, "parameter": _parameter, "data": _data, "dtype": _wide, "eps": _eps, "norm": _norm,
    "codes": _codes, "scales": _scales, "off": _off, "merged": _merged, "other adapter": _other,
    "name in place": _in_place, "scaling of attention": _heads, "activation": _activation, "another layer": _linear,
    "eager attention": _eager,
}  # fmt: skip


def _of_first_tier() -> set[str]:
    """Returns the changes that the first tier has: one kind of change for each path, and all other changes."""
    kinds = ("hook on", "hook before", "forward of")
    chosen = [(kinds[number % len(kinds)], path) for number, path in enumerate(PATHS)]
    of_paths = {f"{kind} {path}" if f"{kind} {path}" in CHANGES else f"{kinds[0]} {path}" for kind, path in chosen}
    return of_paths | {change for change in CHANGES if not change.startswith(kinds)}


@pytest.mark.parametrize("change", first(CHANGES, _of_first_tier()))
def test_a_change_takes_effect(change: str, monkeypatch: Any) -> None:
    model, stock = peft_ext.accelerate(build()), build()
    before = logits(model)
    if change in ("dtype", "merged"):  # stock PEFT rounds x to float16, and can't merge into an NF4Linear
        CHANGES[change](model)
        with layer_by_layer(monkeypatch):
            wanted = logits(model)
    else:
        for one in (model, stock):
            CHANGES[change](one)
        wanted = logits(stock)
    after = logits(model)
    assert_close(after, wanted)
    if "lora_dropout" not in change and change not in ("eager attention", "dtype"):
        assert (after - before).abs().max() > 1e-3


def _eps_of_q(model: Any) -> None:
    inner(model).self_attn.q_norm.variance_epsilon = 0.5


def _values_of_k(model: Any) -> None:
    weight = inner(model).self_attn.k_norm.weight
    weight.data.copy_(torch.linspace(0, 2, len(weight)))


def _another_k(model: Any) -> None:
    norm = inner(model).self_attn.k_norm
    norm.weight = nn.Parameter(torch.linspace(0, 2, len(norm.weight)))


def _no_norm_of_q(model: Any) -> None:
    inner(model).self_attn.q_norm = nn.Identity()


def _reversed_before_k(model: Any) -> None:
    norm = inner(model).self_attn.k_norm
    norm.register_forward_pre_hook(lambda module, args: (args[0].flip(-1), *args[1:]))


class Halving(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def _class_of_q(model: Any) -> None:
    inner(model).self_attn.q_norm.__class__ = Halving


CHANGES_OF_NORMS: dict[str, Callable[[Any], Any]] = {
    "hook on q_norm": hook("self_attn.q_norm"), "hook before k_norm": _reversed_before_k,
    "forward of q_norm": replaced("self_attn.q_norm"), "eps of q_norm": _eps_of_q, "values of k_norm": _values_of_k,
    "weight of k_norm": _another_k, "another module": _no_norm_of_q, "class of q_norm": _class_of_q,
}  # fmt: skip


@pytest.mark.parametrize("name", ["Qwen 3", "OLMo 2"])
@pytest.mark.parametrize("change", CHANGES_OF_NORMS)
def test_a_change_of_the_norms_of_q_and_k_takes_effect(change: str, name: str) -> None:
    model, stock = peft_ext.accelerate(build(name)), build(name)
    before = logits(model)
    for one in (model, stock):
        CHANGES_OF_NORMS[change](one)
    after = logits(model)
    assert_close(after, logits(stock))
    assert (after - before).abs().max() > 1e-3


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


def test_an_adapter_that_is_merged_into_a_dense_weight_is_not_added_again() -> None:
    model = peft_ext.accelerate(build(method="LoRA"))
    before = logits(model)
    model.merge_adapter()
    assert_close(logits(model), before)
    model.unmerge_adapter()
    assert_close(logits(model), before)


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


@pytest.mark.parametrize("kind", ["norm", "mlp", "attention", "layer", "lora", "rotary", "cache", "layer of a cache"])
def test_a_patched_class_takes_effect(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft.tuners.lora as peft_lora
    from transformers.cache_utils import Cache, DynamicLayer
    from transformers.models.llama import modeling_llama

    model, stock = peft_ext.accelerate(build()), build()
    before = logits(model)
    if kind == "rotary":
        own = modeling_llama.apply_rotary_pos_emb
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb",
                            lambda q, k, cos, sin: own(q * 2, k, cos, sin))  # fmt: skip
    elif "cache" in kind:
        update = Cache.update if kind == "cache" else DynamicLayer.update
        monkeypatch.setattr(Cache if kind == "cache" else DynamicLayer, "update",
                            lambda self, k, v, *args, **given: update(self, k * 2, v, *args, **given))  # fmt: skip
    else:
        cls = {"norm": modeling_llama.LlamaRMSNorm, "mlp": modeling_llama.LlamaMLP,
               "attention": modeling_llama.LlamaAttention, "lora": peft_lora.Linear,
               "layer": modeling_llama.LlamaDecoderLayer}[kind]  # fmt: skip
        own = cls.forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _doubled(self, args, own(self, *args, **kwargs))

        monkeypatch.setattr(cls, "forward", forward)
    after, wanted = logits(model), logits(stock)
    assert_close(after, wanted)
    assert (after - before).abs().max() > 1e-3


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
    _scaling(copied)
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
