"""Tests what calls of few tokens remember of earlier calls: the comparison of the objects that checks read, the
arguments that the layers of a model share, and the lists that the operator decoder_layer keeps."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import peft_ext
from peft_ext import _native
from peft_ext.integrations.adapter_layers import few_tokens
from peft_ext.integrations.model_blocks import decoder_layer


def generating_model() -> Any:
    """Returns an accelerated Llama in NF4 that has generated tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 199, "max_position_embeddings": 64}  # fmt: skip
    model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval()
    peft_ext.quantize_nf4(model, progress=False)
    peft_ext.accelerate(model.requires_grad_(False))
    ids = torch.arange(3, 12)[None]
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    return model


def test_the_facts_are_compared_in_one_way() -> None:
    module, kept = nn.Linear(2, 2), object()
    place: dict = {"a": kept, "b": None}
    same: dict[str, Any] = {"places": [place, place, place], "names": ["a", "b", "missing"],
                            "values": [kept, None, None], "empty": [{}, []], "modules": [module],
                            "kinds": [nn.Linear]}  # fmt: skip
    many = {name: values * 20 for name, values in same.items()}
    changes: list[tuple[dict[str, Any], bool]] = [
        ({}, True), ({"values": [object(), None, None]}, False), ({"values": [kept, None, kept]}, False),
        ({"names": ["a", "b", "a"]}, False), ({"empty": [{}, [1]]}, False), ({"empty": [{1: 2}]}, False),
        ({"kinds": [nn.Module]}, False),
    ]  # fmt: skip
    for holds in (few_tokens._holds, _native.STATE.module.holds):
        assert holds(**many) is True
        for change, wanted in changes:
            assert holds(**{**same, **change}) is wanted, change
    with pytest.raises(ValueError, match="different lengths"):
        _native.STATE.module.holds(**{**same, "names": ["a"]})
    with pytest.raises(TypeError, match="a place is no dict"):
        _native.STATE.module.holds(**{**same, "places": [place, [], place]})
    with pytest.raises(TypeError, match="unhashable"):
        _native.STATE.module.holds(**{**same, "names": ["a", [], "a"]})


@pytest.mark.parametrize("change", ["none", "mask", "positions", "one more", "a name", "tokens", "dtype"])
def test_the_arguments_of_a_call_are_checked_unless_they_repeat(change: str) -> None:
    model = generating_model()
    own = model.model.layers[0].self_attn
    x, cache, name = torch.zeros(1, 1, 128), hf.DynamicCache(), own.peft_ext_known.cache_name
    plan = own._few(few_tokens.Facts(), x)
    three = {"position_embeddings": tuple(torch.ones(2, 1, 3, plan.size)), "attention_mask": None, name: cache}
    own(hidden_states=torch.zeros(1, 3, 128), **three)
    given = {**three, "position_embeddings": tuple(torch.ones(2, 1, 1, plan.size))}
    with torch.no_grad():
        assert own.room_of_few(plan, x, given) is not None
        assert own.repeats(plan, x, given)
        if change == "mask":
            given["attention_mask"] = torch.ones(1, 1, 1, 4, dtype=torch.bool)
        elif change == "positions":
            given["position_embeddings"] = tuple(torch.ones(2, 1, 1, plan.size))
        elif change == "one more":
            given["temperature"] = 2.0
        elif change == "a name":
            given["position_bias"] = given.pop("attention_mask")
        elif change == "tokens":
            x = torch.zeros(1, 2, 128)
        elif change == "dtype":
            x = x.double()
        assert own.repeats(plan, x, given) is (change == "none")
        if change == "one more":  # a refused call does not become the last call
            assert own.room_of_few(plan, x, given) is None and not own.repeats(plan, x, given)


def test_a_plan_is_forgotten_with_its_layer() -> None:
    model = generating_model()
    layer = model.model.layers[0]
    plan = few_tokens._PLANS[layer].made.lists.plan
    del model, layer
    gc.collect()
    with pytest.raises(RuntimeError, match=f"none are kept under plan {plan}"):
        x = torch.zeros(1, 1, 128)
        keys, values = torch.zeros(2, 1, 2, 4, 32)
        decoder_layer._decoder_layer(x, x, x, None, keys, values, 0, [], [], [], plan)
