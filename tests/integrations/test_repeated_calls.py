"""Tests what calls of few tokens remember of earlier calls: the comparison of the objects that checks read, the
arguments that the layers of a model share, and the lists that the operator decoder_layer keeps."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def test_the_facts_are_checked() -> None:
    make = _native.STATE.module.Facts
    same: dict[str, Any] = {"places": ({},), "names": ("a",), "values": (None,), "empty": ({},), "lists": ([],),
                            "items": ([],), "objects": (1,), "kinds": (int,)}  # fmt: skip
    assert make(**same).hold()
    for name in ("places", "names", "values", "lists", "items", "objects", "kinds"):
        with pytest.raises(ValueError, match="different lengths"):
            make(**{**same, name: ()})
    for name, wanted in (("places", "dict"), ("empty", "dict"), ("lists", "list"), ("items", "list")):
        with pytest.raises(TypeError, match=f"no {wanted}"):
            make(**{**same, name: (1,)})
    with pytest.raises(TypeError, match="unhashable"):
        make(**{**same, "names": ([],)}).hold()


def _register(held: dict, one: Any) -> None:
    one.register_forward_pre_hook(lambda *_: None)


def _set_often(held: dict, one: Any) -> None:
    for _ in range(100):  # Python replaces the instruction of a statement that has run some times by a faster one
        one.a = held


# Changes of a module or of its __dict__, each with whether the facts hold after it.
CHANGES: dict[str, tuple[Callable[[dict, Any], Any], bool]] = {
    "none": (lambda held, one: None, True),
    "another name": (lambda held, one: held.__setitem__("c", 1), True),
    "another object": (lambda held, one: held.__setitem__("a", object()), False),
    "the same object": (lambda held, one: held.update(a=held["a"]), True),
    "update": (lambda held, one: held.update(a=1), False),
    "or": (lambda held, one: held.__ior__({"a": 1}), False),
    "pop": (lambda held, one: held.pop("a"), False),
    "popitem": (lambda held, one: held.popitem(), False),
    "clear": (lambda held, one: held.clear(), False),
    "a missing name": (lambda held, one: held.setdefault("missing", 1), False),
    "None of a missing name": (lambda held, one: held.setdefault("missing"), True),
    "a deleted name": (lambda held, one: held.__delitem__("a"), False),
    "a deleted None": (lambda held, one: held.__delitem__("b"), True),
    "set": (lambda held, one: setattr(one, "a", 1), False),
    "set often": (_set_often, False),
    "add": (lambda held, one: setattr(one, "missing", 1), False),
    "delete": (lambda held, one: delattr(one, "a"), False),
    "an item in a dict": (lambda held, one: held["empty"].update(a=1), False),
    "an item in a list": (lambda held, one: held["items"].append(1), False),
    "another item": (lambda held, one: held["names"].__setitem__(0, "other"), False),
    "an equal item": (lambda held, one: held["names"].__setitem__(0, "".join(["de", "fault"])), True),
    "a hook": (_register, False),
    "a class": (lambda held, one: setattr(one, "__class__", nn.Bilinear), False),
    "a forward": (lambda held, one: setattr(one, "forward", print), False),
    "dropped kernels": (lambda held, one: few_tokens.DROPPED.update({("CPU", "lora"): "a test"}), False),
}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_facts_hold_until_they_change(change: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_tokens, "DROPPED", {})
    if not native:
        monkeypatch.setattr(_native.STATE, "module", None)
    one, facts = nn.Linear(2, 2), few_tokens.Facts()
    held, names = one.__dict__, ("a", "b", "missing", "last")
    held.update({"a": object(), "b": None, "empty": {}, "items": [], "names": ["default"], "last": 1})
    assert [facts.value(held, name) for name in names] == [held.get(name) for name in names]
    assert facts.empty(held, "empty") and facts.empty(held, "items") and facts.empty(held, "none")
    assert facts.plain(one) and facts.same(held["names"])
    assert facts.hold() and facts.hold()
    make, wanted = CHANGES[change]
    make(held, one)
    assert [facts.hold(), facts.hold()] == [wanted, wanted]


def test_the_attention_that_pytorch_is_told_to_run_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, replaced, own = [], [], decoder_layer._decoder_layer
    monkeypatch.setattr(decoder_layer, "_decoder_layer", lambda *args: calls.append(1) or own(*args))
    model, stock = generating_model(), F.scaled_dot_product_attention

    def counts() -> tuple[int, int]:
        """Returns how often a generation of two tokens called the operator, and how often the replaced function."""
        calls.clear(), replaced.clear()
        ids = torch.arange(3, 12)[None]
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        return len(calls), len(replaced)

    layers = len(model.model.layers)
    assert counts() == (layers, 0)
    with sdpa_kernel(SDPBackend.MATH):
        assert counts() == (0, 0)
    assert counts() == (layers, 0)
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: replaced.append(1) or stock(*a, **k))
        assert counts() == (0, 2 * layers)
    assert counts() == (layers, 0)


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
