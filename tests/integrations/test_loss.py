"""Tests of a language model's loss without whole logits, and of code that uses the logits of a model in training."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from accelerate.utils.operations import convert_outputs_to_fp32, convert_to_fp32
from peft import LoraConfig, get_peft_model
from tiers import first
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, EagerAndRecordGraphs
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from transformers.loss import loss_utils

import peft_ext
from peft_ext.integrations.model_blocks import loss as between
from peft_ext.integrations.model_blocks.pending import Pending

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 99, "pad_token_id": 0, "eos_token_id": 2}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
T5 = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 99, "dropout_rate": 0.0,
      "decoder_start_token_id": 0}  # fmt: skip
BERT = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "Llama, tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "Gemma 2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0)),
    "Cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SMALL, logit_scale=0.25)),
    "Granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SMALL, logits_scaling=2.0)),
    "T5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "BERT": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)),
}
# Models with a loss function that peft_ext does not know; these models compute whole logits.
WHOLE = ("T5", "BERT")


def build(name: str = "Llama", targets: Any = "all-linear", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **config)).train()


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 99, (3, 17))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: nn.Module, loss_of: Callable[[Any], Tensor] = lambda out: out.loss, **more: Any) -> Any:
    torch.manual_seed(2)
    out = model(**{**batch(), **more})
    loss = loss_of(out)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), grads, out


def reason(model: nn.Module) -> str:
    (row,) = [row for row in peft_ext.explain(model).blocks if row.kind == "loss"]
    assert row.fused == (row.reason == "logits in chunks")
    return row.reason


def waits(out: Any) -> bool:
    """Returns whether the logits of an output have not been computed yet."""
    return between._PENDING in out.__dict__


def assert_same_step(ours: Any, stock: Any, rtol: float = 5e-5) -> None:
    torch.testing.assert_close(ours[0], stock[0], rtol=rtol, atol=1e-6, equal_nan=True)
    assert ours[1].keys() == stock[1].keys()
    for name, grad in stock[1].items():
        torch.testing.assert_close(ours[1][name], grad, rtol=rtol, atol=rtol * grad.abs().max().item())


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [None, 100, torch.tensor(100)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_stock_step(name: str, items: Any) -> None:
    more = {} if items is None or name in ("BERT", "T5") else {"num_items_in_batch": items}
    stock, model = build(name), peft_ext.accelerate(build(name))
    wanted, found = step(stock, **more), step(model, **more)
    assert waits(found[2]) == (name not in WHOLE) and list(found[2].keys())[0] == "loss"
    assert name in WHOLE or reason(model) == "logits in chunks"
    assert_same_step(found, wanted)
    torch.testing.assert_close(found[2].logits, wanted[2].logits, rtol=1e-4, atol=1e-4)
    assert found[2].keys() == wanted[2].keys() and type(found[2].logits) is Tensor


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora_on_the_head(dropout: float) -> None:
    """The dropout of a LoRA on the head is PEFT's own, so that equal seeds give equal masks."""
    for targets in (["lm_head"], ["lm_head", "q_proj"][: 1 if dropout else 2]):
        stock = step(build("Llama", targets, lora_dropout=dropout))
        ours = step(peft_ext.accelerate(build("Llama", targets, lora_dropout=dropout)))
        assert waits(ours[2])
        assert_same_step(ours, stock)
        torch.testing.assert_close(ours[2].logits, stock[2].logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"]], ids=str)
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)], ids=str
)
def test_16_bits_are_as_good_as_stock(dtype: torch.dtype, autocast: bool, targets: Any) -> None:
    exact, found = step(build("Llama", targets)), []
    for model in (build("Llama", targets, dtype), peft_ext.accelerate(build("Llama", targets, dtype))):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(step(model))
    assert waits(found[1][2]) and found[1][0].dtype is found[0][0].dtype
    assert found[1][2].logits.dtype is found[0][2].logits.dtype
    errors = [sum((grads[n].double() - g).norm() ** 2 for n, g in exact[1].items()) for _, grads, _ in found]
    assert errors[1] <= 1.5**2 * errors[0]


def test_accelerate_takes_them_to_float32() -> None:
    found = []
    for model in (build(), peft_ext.accelerate(build())):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(convert_to_fp32(model(**batch())))
    assert waits(found[1]) and found[1].logits.dtype is found[0].logits.dtype is torch.float32
    torch.testing.assert_close(found[1].logits, found[0].logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"]], ids=str)
@pytest.mark.parametrize("items", [None, torch.tensor(0)], ids=str)
def test_a_step_in_which_no_label_counts(dtype: torch.dtype, targets: Any, items: Optional[Tensor]) -> None:
    """Without a label that counts, the loss is NaN, as in a plain Trainer, and the adapter's gradients are zeros."""
    labels = torch.full((3, 17), -100)
    for model in (build("Llama", targets, dtype), peft_ext.accelerate(build("Llama", targets, dtype))):
        loss, grads, _ = step(model, labels=labels, num_items_in_batch=items)
        assert loss.isnan() and grads and not any(grad.any() for grad in grads.values())


def test_packed_and_shifted_labels_and_what_stock_ignores() -> None:
    labels = F.pad(batch()["labels"], (0, 1), value=-100)[..., 1:].contiguous()
    for more in (
        {"shift_labels": labels},
        {"ignore_index": 7, "labels": batch()["input_ids"]},
        {"output_attentions": False, "use_cache": False},
    ):
        stock, ours = step(build(), **more), step(peft_ext.accelerate(build()), **more)
        assert waits(ours[2])
        assert_same_step(ours, stock)
    for more in ({"num_items_in_batch": torch.tensor([9.0])}, {"unknown": 3}):
        ours = step(peft_ext.accelerate(build()), lambda out: out.loss.sum(), **more)
        assert not waits(ours[2])
        assert_same_step(ours, step(build(), lambda out: out.loss.sum(), **more))


@pytest.mark.parametrize("label", [99, -1])
def test_a_label_out_of_range_is_pytorch_s_error(label: int) -> None:
    inputs, found = batch(), []
    inputs["labels"][1, 7] = label
    for model in (build(), peft_ext.accelerate(build())):
        with pytest.raises(IndexError) as error:
            model(**inputs)
        found.append(str(error.value))
    assert found[0] == found[1]


def test_no_hidden_states_wait_for_the_garbage_collector() -> None:
    out = peft_ext.accelerate(build())(**batch())
    call = weakref.ref(out.__dict__[between._PENDING])
    gc.disable()
    try:
        del out
        assert call() is None
    finally:
        gc.enable()


# --- what uses logits -------------------------------------------------------------------------------------------------


USES: dict[str, Callable[[Any, Tensor], Any]] = {
    "softmax": lambda z, y: z.softmax(-1),
    "nested": lambda z, y: torch.cat([z, z]),
    "augmented": lambda z, y: exec("z *= 0.5", {"z": z}),
    "written": lambda z, y: z.__setitem__((..., 5), -1e4),
    "index": lambda z, y: z[:, -1],
    "rows": lambda z, y: [row.sum() for row in z],
    "length": lambda z, y: len(z),
    "bool": lambda z, y: bool(z.sum() > 0),
    "numpy": lambda z, y: z.detach().numpy(),
    "text": lambda z, y: f"{z!r} {z}",
    "without a graph": lambda z, y: torch.no_grad()(lambda: (z.argmax(-1) == y).float().mean())(),
    "in inference mode": lambda z, y: torch.inference_mode()(lambda: z.mean())(),
    "retained": lambda z, y: z.retain_grad(),
    "hook": lambda z, y: z.register_hook(lambda grad: grad * 2),
    "set": lambda z, y: setattr(z, "seen", True),
    "unhashed": lambda z, y: z in {z: 1},
}


class Uses(hf.LlamaForCausalLM):
    use: Callable[[Any, Tensor], Any] = staticmethod(lambda z, y: None)

    def forward(self, input_ids: Tensor, labels: Optional[Tensor] = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        assert (logits.shape, logits.dtype, logits.size(-1)) == ((3, 17, 99), torch.float32, 99)
        self.used = type(self).use(logits, labels)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=99, **kwargs)
        return hf.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=(logits,))


def own_model(kind: type) -> nn.Module:
    model = kind(hf.LlamaConfig(**SMALL))
    model.loss_type = "ForCausalLM"  # without loss_type, transformers logs a warning, which torch.compile can't trace
    return model


def with_use(use: Callable[[Any, Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    monkeypatch.setattr(Uses, "use", staticmethod(use))
    monkeypatch.setitem(MODELS, "own", lambda: own_model(Uses))
    return [build("own"), peft_ext.accelerate(build("own"))]


@pytest.mark.parametrize("name", USES)
def test_whatever_uses_them_gets_the_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = with_use(USES[name], monkeypatch)
    wanted, found = step(stock), step(model)
    assert_same_step(found, wanted, 1e-3)
    assert "uses the logits" in reason(model) or name == "unhashed"
    ours, theirs = model.get_base_model().used, stock.get_base_model().used
    assert type(ours) is type(theirs)
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert type(found[2].hidden_states[0]) is Tensor


def test_a_function_that_would_lose_their_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = with_use(lambda z, y: checkpoint(torch.sin, z, use_reentrant=True), monkeypatch)
    with pytest.raises(RuntimeError, match=r"autograd\.Function .* blocks=False"):
        step(model)
    assert between._NOW.forward is None


@pytest.mark.parametrize(
    ("module", "name"), [(F, "cross_entropy"), (F, "softmax"), (loss_utils, "fixed_cross_entropy")]
)
def test_a_wrapped_function_is_called_once(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, calls = getattr(module, name), []
    models = with_use(lambda z, y: F.softmax(z, -1).mean() if name == "softmax" else None, monkeypatch)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(1) or 2 * own(*args, **kwargs))
    wanted, found = step(models[0]), step(models[1])
    assert_same_step(found, wanted)
    assert len(calls) == 2


def test_another_loss_function_gets_tensors() -> None:
    def mine(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        assert type(logits) is Tensor
        return logits.float().logsumexp(-1).mean()

    model, stock = peft_ext.accelerate(build()), build()
    stock.get_base_model().loss_function = model.get_base_model().loss_function = mine
    assert model.get_base_model().loss_function is mine and reason(model).startswith("its loss function is none")
    wanted = step(stock)
    assert_same_step(step(model), wanted)
    model = build()
    model.get_base_model().loss_function = mine
    assert type(peft_ext.accelerate(model).get_base_model()) is hf.LlamaForCausalLM
    assert_same_step(step(model), wanted)


@pytest.mark.parametrize("is_global", [False, True])
def test_hooks_see_tensors(is_global: bool) -> None:
    found = []
    for model in (build(), peft_ext.accelerate(build())):
        head = model.get_base_model().lm_head
        add = nn.modules.module.register_module_forward_hook if is_global else head.register_forward_hook
        handle = add(lambda layer, args, out, head=head: torch.mul(out, 2) if layer is head else None)
        assert "hook" in reason(model) or not found
        found.append(step(model))
        handle.remove()
    assert_same_step(*found[::-1])
    assert not waits(found[1][2])


# --- what a forward returns -------------------------------------------------------------------------------------------


READS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda out: out.logits,
    "name": lambda out: out["logits"],
    "get": lambda out: out.get("logits"),
    "place": lambda out: out[1],
    "slice": lambda out: out[:2][1],
    "tuple": lambda out: out.to_tuple()[1],
    "getattr": lambda out: getattr(out, "logits", None),
    "tree": lambda out: pytree.tree_map(lambda one: one, out).logits,
    "accelerate's": lambda out: type(out)(dict(out.items())).logits,
    "copy": lambda out: copy.copy(out).logits,
    "FSDP's": lambda out: dataclasses.replace(out, loss=out.loss.bfloat16()).logits,
}


@pytest.mark.parametrize("name", READS)
def test_logits_are_computed_where_they_are_asked_for(name: str) -> None:
    stock, model = build(), peft_ext.accelerate(build())
    wanted = step(stock, lambda out: READS[name](out).square().mean())
    found = step(model, lambda out: READS[name](out).square().mean())
    assert_same_step(found, wanted)
    out = model(**batch())
    assert waits(out) and list(out) == ["loss", "cache"] and len(out) == 2 and "logits" in out
    assert out[0] is out["loss"] and pytree.tree_leaves(out)[0] is out.loss and waits(out)
    assert isinstance(out, hf.modeling_outputs.CausalLMOutputWithPast) and repr(out).startswith("CausalLMOutputWith")
    assert not waits(out) and list(out) == ["loss", "logits", "cache"] and out.to_tuple()[1] is out.logits


def test_outputs_that_are_no_model_output() -> None:
    model = peft_ext.accelerate(build())
    found = model(**batch(), return_dict=False)
    assert type(found) is tuple and type(found[1]) is Tensor and "in a tuple" in reason(model)
    out = model(**batch())
    again = pickle.loads(pickle.dumps(pytree.tree_map(lambda one: one.detach() if isinstance(one, Tensor) else one,
                                                      copy.copy(out))))  # fmt: skip
    assert type(again) is hf.modeling_outputs.CausalLMOutputWithPast
    torch.testing.assert_close(again.logits, found[1])


def other_weight(model: nn.Module) -> None:
    head = model.get_base_model().lm_head
    head.weight = nn.Parameter(2 * head.weight.detach(), requires_grad=False)


def other_adapter(model: nn.Module) -> None:
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")


@torch.no_grad()
def optimizer_step(model: nn.Module) -> None:
    next(reversed(list(model.get_base_model().lm_head.parameters()))).mul_(2.0)


AFTER = {
    "q_proj": (other_weight, optimizer_step, nn.Module.bfloat16, peft_ext.restore),
    "lm_head": (optimizer_step, other_adapter, lambda m: m.merge_adapter(), lambda m: m.disable_adapter_layers()),
}


@pytest.mark.parametrize(("target", "after"), [(target, one) for target, ones in AFTER.items() for one in ones])
def test_logits_of_a_head_that_is_another_by_now_are_refused(target: str, after: Callable[[Any], Any]) -> None:
    model = peft_ext.accelerate(build("Llama", [target]))
    out = model(**batch())
    assert waits(out)
    after(model)
    with pytest.raises(RuntimeError, match="the head's weight or adapter, were changed in place"):
        _ = out.logits


# --- a scale and a soft cap between head and loss ---------------------------------------------------------------------


LEARNED = nn.Parameter(torch.tensor(2.0))
# By name: a step between head and loss, and whether the operator computes the loss after this step.
STEPS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "scale": (lambda z: 2 * (z / 3.0) * -0.5, True),
    "cap": (lambda z: torch.tanh(z * 0.1 / 3.0) * 2, True),
    "cap of a Tensor's method, float32": (lambda z: (z.float() / 5).tanh().float() * 5, True),
    "cap of 1, unscaled": (torch.tanh, True),
    "cap, below zero": (lambda z: torch.tanh(z) * -2.0, False),
    "two caps": (lambda z: torch.tanh(torch.tanh(z)), False),
    "a scale that learns": (lambda z: z * LEARNED, False),
    "a scale for each token": (lambda z: z / torch.arange(1.0, 100.0), False),
    "a shift": (lambda z: z * 2 - 1, False),
    "two results": (lambda z: (2 * z, z + 1)[0], False),
    "in place": (lambda z: (2 * z, z.zero_())[0], False),
    "without gradients": (lambda z: torch.no_grad()(lambda: z * 2)() + z, False),
    "zero": (lambda z: z * 0, False),
}


class Scales(hf.LlamaForCausalLM):
    steps: Callable[[Any], Any] = staticmethod(lambda z: z)

    def forward(self, input_ids: Tensor, labels: Optional[Tensor] = None, **kwargs: Any) -> Any:
        logits = type(self).steps(self.lm_head(self.model(input_ids).last_hidden_state))
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=99, **kwargs)
        return hf.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize(
    ("name", "is_compiled"),
    [
        *((name, False) for name in STEPS),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("scale", "cap of 1, unscaled", "in place")),
    ],
)
def test_steps_between_head_and_loss(name: str, is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, is_fused = STEPS[name]
    monkeypatch.setattr(Scales, "steps", staticmethod(steps))
    monkeypatch.setitem(MODELS, "own", lambda: own_model(Scales))
    stock, model = build("own"), peft_ext.accelerate(build("own"))
    wanted = step(stock)
    if is_compiled:
        found = compiled_step(model)
        assert (type(found[2]["logits"]) is Pending) == is_fused
    else:
        found = step(model)
        assert waits(found[2]) == is_fused and (reason(model) == "logits in chunks") == is_fused
    assert_same_step(found, wanted)
    torch.testing.assert_close(found[2].logits + 0, wanted[2].logits, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", ["Gemma 2", "Cohere", "Granite"])
def test_steps_in_16_bits_are_as_good_as_stock(name: str) -> None:
    exact = step(build(name))
    found = [step(build(name, dtype=torch.bfloat16)), step(peft_ext.accelerate(build(name, dtype=torch.bfloat16)))]
    assert waits(found[1][2])
    errors = [sum((grads[n].double() - g).norm() ** 2 for n, g in exact[1].items()) for _, grads, _ in found]
    assert errors[1] <= 1.5**2 * errors[0]


# --- torch.compile ----------------------------------------------------------------------------------------------------


class Graphs(EagerAndRecordGraphs):
    """A backend of torch.compile that records the graphs, and compiles the graphs by ``aot_eager``."""

    def __call__(self, graph: Any, inputs: Any) -> Any:
        super().__call__(graph, inputs)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def compiled_step(model: nn.Module, graphs: Any = "aot_eager", *more: Any, **given: Any) -> Any:
    torch._dynamo.reset()
    loss, grads, out = step(torch.compile(model, backend=graphs, fullgraph=True), *more, **given)
    return loss, {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}, out


@pytest.mark.slow
@pytest.mark.parametrize("autocast", first([False, True], [False]), ids=["float32", "autocast"])
@pytest.mark.parametrize("targets", first(["all-linear", ["lm_head"]], [["lm_head"]]), ids=str)
def test_a_compiled_step_has_no_logits(targets: Any, autocast: bool) -> None:
    model, graphs, items = peft_ext.accelerate(build("Llama", targets)), Graphs(), torch.tensor(40)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager = step(model, num_items_in_batch=items)
        found = compiled_step(model, graphs, num_items_in_batch=items)
    rtol = 2e-2 if autocast else 5e-5
    assert_same_step(found, eager, rtol)
    (graph,) = graphs.graphs
    values = {node: node.meta.get("example_value") for node in graph.graph.nodes}
    shapes = {tuple(value.shape) for value in values.values() if isinstance(value, Tensor)}
    assert sum("linear_cross_entropy" in str(node.target) for node in values) == 1
    assert not any(shape[-1:] == (99,) and len(shape) > 2 for shape in shapes) and (3, 17, 32) in shapes
    logits = found[2].logits
    assert type(logits) is Pending and (logits.shape, logits.dtype) == (eager[2].logits.shape, eager[2].logits.dtype)
    torch.testing.assert_close(logits + 0, eager[2].logits, rtol=rtol, atol=rtol)


@pytest.mark.slow
def test_logits_of_a_compiled_step_have_a_gradient() -> None:
    model = peft_ext.accelerate(build())
    use = lambda out: out.loss + torch.tanh(out.logits).square().mean() + out[1].float().mean()  # noqa: E731
    assert_same_step(compiled_step(model, "aot_eager", use), step(build(), use))


@pytest.mark.slow
def test_a_compiled_forward_that_accelerate_takes_to_float32() -> None:
    model = peft_ext.accelerate(build()).to(torch.bfloat16)
    stock = build(dtype=torch.bfloat16)
    for one in (model, stock):
        one.forward = convert_outputs_to_fp32(one.forward)
    found = compiled_step(model)
    assert type(found[2].logits) is Pending and found[2].logits.dtype is torch.float32
    torch.testing.assert_close(found[2].logits + 0, step(stock)[2].logits, rtol=0.1, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "index", "without a graph"])
def test_whatever_uses_them_in_a_graph_gets_the_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = with_use(USES[name], monkeypatch)
    assert_same_step(compiled_step(model), step(stock), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "after"), [("q_proj", other_weight), ("q_proj", nn.Module.bfloat16), ("lm_head", optimizer_step)]
)
def test_logits_of_a_compiled_step_are_refused_where_the_head_is_another(target: str, after: Any) -> None:
    model = peft_ext.accelerate(build("Llama", [target]))
    _, _, out = compiled_step(model)
    assert out.logits._call._is_changed() is False
    after(model)
    with pytest.raises(RuntimeError, match="the head's weight or adapter, were changed in place"):
        out.logits.argmax(-1)


@pytest.mark.slow
def test_a_change_of_hidden_states_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace can't compare versions of tensors, so a graph keeps the hidden states with which the head was called."""
    held: list[Tensor] = []
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x, run=nn.Linear.forward: run(self, x))
    stock, model = with_use(lambda z, y: held[0].mul_(2), monkeypatch)
    for one in (stock, model):
        one.get_base_model().model.norm.register_forward_hook(lambda module, args, out: held.insert(0, out))
    wanted = step(stock, lambda out: out.loss.detach() + 0 * out.logits.sum())
    found = compiled_step(model, "aot_eager", lambda out: out.loss.detach() + 0 * out.logits.sum())
    torch.testing.assert_close(found[0], wanted[0])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["layers", "head"])
def test_a_graph_that_breaks_within_the_forward(where: str) -> None:
    model, counter = peft_ext.accelerate(build()), CompileCounter()
    wanted, module = step(model), model.get_base_model()
    module = module.lm_head if where == "head" else module.model.layers[0]

    run = type(module).forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return run(module, *args, **kwargs)

    module.forward = broken
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter)
    counts = []
    for _ in range(3):
        loss, grads, out = step(compiled)
        assert_same_step((loss, {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}), wanted)
        torch.testing.assert_close(out.logits + 0, wanted[2].logits)
        counts.append(counter.frame_count)
    assert counts[0] > 1 and counts[1] == counts[2]


# The program has no training step that is not compiled, before or after the compiled steps.
COMPILED = """
import sys
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from test_loss import build
import peft_ext

def steps():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(peft_ext.accelerate(build()), backend=counter, fullgraph=True, dynamic=True)
    for length in (17, 20, 31, 64):  # peft_ext leaves attention of fewer than 16 queries to PyTorch, in another graph
        ids = torch.randint(0, 99, (2, length))
        compiled(input_ids=ids, labels=ids).loss.backward()
    return sum("linear_cross_entropy" in graph.code for graph in counter.graphs)

print(steps())
"""


def test_each_thread_has_the_state_of_its_forward_before_its_first_forward() -> None:
    """torch.compile guards on the attributes that a thread has when its first forward is traced."""
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(dict(vars(between._NOW))))
    thread.start()
    thread.join()
    assert found == [{"forward": None}]


@pytest.mark.slow
def test_the_first_step_may_be_compiled_and_lengths_share_its_graph() -> None:
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", COMPILED], env={**os.environ, "PYTHONPATH": path}, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0 and done.stdout.split() == ["1"], done.stdout + done.stderr
