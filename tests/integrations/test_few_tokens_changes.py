"""Tests of calls with few tokens without a gradient: a change of the model takes effect although a plan was made
before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from few_token_models import assert_close, build, inner, layer_by_layer, logits
from peft import LoraConfig
from tiers import first
from torch import Tensor, nn

import peft_ext


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
    norm = inner(model).self_attn.q_norm
    setattr(norm, "eps" if "eps" in vars(norm) else "variance_epsilon", 0.5)


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


def _values_behind(model: Any) -> None:
    weight = inner(model).post_attention_layernorm.weight
    weight.data.copy_(torch.linspace(0, 2, len(weight)))


def _no_norm_behind(model: Any) -> None:
    inner(model).post_attention_layernorm = nn.Identity()


CHANGES_OF_NORMS: dict[str, Callable[[Any], Any]] = {
    "hook on q_norm": hook("self_attn.q_norm"), "hook before k_norm": _reversed_before_k,
    "forward of q_norm": replaced("self_attn.q_norm"), "eps of q_norm": _eps_of_q, "values of k_norm": _values_of_k,
    "weight of k_norm": _another_k, "another module": _no_norm_of_q, "class of q_norm": _class_of_q,
    "hook on the norm behind": hook("post_attention_layernorm"), "values of the norm behind": _values_behind,
    "forward of the norm behind": replaced("post_attention_layernorm"), "no norm behind": _no_norm_behind,
}  # fmt: skip


@pytest.mark.parametrize("name", ["Qwen 3", "OLMo 2", "Gemma 3, window"])
@pytest.mark.parametrize("change", CHANGES_OF_NORMS)
def test_a_change_of_a_norm_takes_effect(change: str, name: str) -> None:
    model, stock = peft_ext.accelerate(build(name)), build(name)
    before = logits(model)
    for one in (model, stock):
        CHANGES_OF_NORMS[change](one)
    after = logits(model)
    assert_close(after, logits(stock))
    assert (after - before).abs().max() > 1e-3


def test_an_adapter_that_is_merged_into_a_dense_weight_is_not_added_again() -> None:
    model = peft_ext.accelerate(build(method="LoRA"))
    before = logits(model)
    model.merge_adapter()
    assert_close(logits(model), before)
    model.unmerge_adapter()
    assert_close(logits(model), before)


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
