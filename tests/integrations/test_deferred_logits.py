"""Losses that take the hidden states and the head instead of the logits, and everything else that reads logits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import peft_ext
from peft_ext.integrations.model_blocks import deferred, head

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 99,
      "decoder_start_token_id": 0}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "Llama, tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "Gemma 2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0)),
    "Cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SMALL, logit_scale=0.25)),
    "Granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SMALL, logits_scaling=2.0)),
    "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)),
    "T5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, dropout_rate=0.0)),
    "BERT": lambda: hf.BertForMaskedLM(
        hf.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ),
}


def build(name: str, targets: Any = "all-linear", dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
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


def step(model: nn.Module, loss_of: Callable[[Any, Tensor], Tensor] = lambda out, labels: out.loss, **more: Any) -> Any:
    torch.manual_seed(2)
    inputs = batch()
    out = model(**inputs, **more)
    loss = loss_of(out, inputs["labels"])
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), grads, out


def losses(model: nn.Module) -> list[Any]:
    return [row for row in peft_ext.explain(model).blocks if row.kind == "loss"]


def is_deferred(value: Any) -> bool:
    return type(value) is deferred.DeferredLogits


def computed(value: Tensor) -> bool:
    return value._head._logits is not None


def assert_same_step(ours: Any, stock: Any, rtol: float = 5e-5) -> None:
    torch.testing.assert_close(ours[0], stock[0], rtol=rtol, atol=1e-6)
    assert ours[1].keys() == stock[1].keys()
    for name, grad in stock[1].items():
        torch.testing.assert_close(ours[1][name], grad, rtol=rtol, atol=rtol * grad.abs().max().item())


@pytest.mark.parametrize("items", [None, 100])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_without_logits_is_the_stock_step(name: str, items: Optional[int]) -> None:
    more = {} if items is None or name in ("BERT", "T5") else {"num_items_in_batch": torch.tensor(items)}
    stock = step(build(name), **more)
    model = peft_ext.accelerate(build(name))
    (row,) = losses(model)
    assert row.fused, row
    ours = step(model, **more)
    assert is_deferred(ours[2].logits) and not computed(ours[2].logits)
    assert_same_step(ours, stock)
    torch.testing.assert_close(ours[2].logits.detach(), stock[2].logits.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora_on_the_head(dropout: float) -> None:
    """The head's dropout is PEFT's own, so that the masks are the same from the same seed."""
    for targets in (["lm_head"], ["lm_head", "q_proj"]):
        if dropout and "q_proj" in targets:
            continue  # whose mask is the operator's
        stock = step(build("Llama", targets, lora_dropout=dropout))
        ours = step(peft_ext.accelerate(build("Llama", targets, lora_dropout=dropout)))
        assert is_deferred(ours[2].logits) and not computed(ours[2].logits)
        assert_same_step(ours, stock)
        torch.testing.assert_close(ours[2].logits.detach(), stock[2].logits.detach(), rtol=1e-5, atol=1e-5)


def test_autocast_and_16_bits_are_as_good_as_stock() -> None:
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        exact = step(build("Llama"))
        found = []
        for model in (build("Llama", dtype=dtype), peft_ext.accelerate(build("Llama", dtype=dtype))):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found.append(step(model))
        assert is_deferred(found[1][2].logits) and found[1][0].dtype is found[0][0].dtype
        errors = [sum((grads[n].double() - g).norm() ** 2 for n, g in exact[1].items()) for _, grads, _ in found]
        assert errors[1] <= 1.5**2 * errors[0]


LOSSES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "own shift": lambda out, y: F.cross_entropy(out.logits[..., :-1, :].contiguous().view(-1, 99),
                                                y[:, 1:].reshape(-1)),
    "module": lambda out, y: nn.CrossEntropyLoss()(out.logits[:, :-1].reshape(-1, out.logits.size(-1)),
                                                   y[:, 1:].reshape(-1)),
    "smoothing, sum": lambda out, y: F.cross_entropy(out.logits.float().view(-1, 99), y.view(-1), reduction="sum",
                                                     label_smoothing=0.1),
    "no reduction": lambda out, y: (F.cross_entropy(out.logits.view(-1, 99), y.view(-1), reduction="none")
                                    * torch.linspace(0, 1, y.numel())).sum(),
    "classes second": lambda out, y: F.cross_entropy(out.logits.transpose(1, 2), y),
    "classes second, .mT": lambda out, y: F.cross_entropy(out.logits[:, :-1].float().mT, y[:, 1:], label_smoothing=0.1),
    "classes second, permuted": lambda out, y: (F.cross_entropy(
        out.logits.permute(0, -1, 1) / 2, y, reduction="none") * torch.linspace(0, 1, y.numel()).view(y.shape)).sum(),
    "classes second of four": lambda out, y: F.cross_entropy(out.logits[None].movedim(-1, 1).contiguous(), y[None]),
    "flatten": lambda out, y: F.cross_entropy(out.logits[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    "flatten, end": lambda out, y: F.cross_entropy(out.logits.flatten(end_dim=-2), y.flatten()),
    "torch.flatten": lambda out, y: F.cross_entropy(torch.flatten(out.logits, 0, 1), y.flatten()),
    "type": lambda out, y: F.cross_entropy(out.logits.type(torch.float32).view(-1, 99), y.view(-1)),
    "mask": lambda out, y: F.cross_entropy(out.logits[:, :-1][y[:, 1:] != -100], y[:, 1:][y[:, 1:] != -100]),
    "mask, all classes": lambda out, y: F.cross_entropy(out.logits[y > 40, :], y[y > 40]),
    "no position": lambda out, y: F.cross_entropy(out.logits[y > 1000], y[y > 1000], reduction="sum"),
    "one text": lambda out, y: F.cross_entropy(out.logits[0, :-1], y[0, 1:]),
    "last position": lambda out, y: F.cross_entropy(out.logits[:, -1], y[:, -1]),
    "positions": lambda out, y: F.cross_entropy(out.logits[torch.tensor([0, 2, 2]), 7],
                                                y[torch.tensor([0, 2, 2]), 7]),
    "pairs of positions": lambda out, y: F.cross_entropy(out.logits[torch.arange(3), torch.tensor([5, 9, 16])],
                                                         y[torch.arange(3), torch.tensor([5, 9, 16])]),
    "squeeze": lambda out, y: F.cross_entropy(out.logits[:1].squeeze(0)[:-1], y[0, 1:]),
    "squeeze, unsqueeze": lambda out, y: F.cross_entropy(out.logits[:1].unsqueeze(1).squeeze(), y[0]),
    "new dimension": lambda out, y: F.cross_entropy(out.logits[:, None, ..., :].view(-1, 99), y.view(-1)),
    "narrow": lambda out, y: F.cross_entropy(out.logits.narrow(1, 0, 16).reshape(-1, 99), y[:, 1:].reshape(-1)),
    "clone": lambda out, y: F.cross_entropy(out.logits.clone().view(-1, 99), y.view(-1)),
    "cap": lambda out, y: F.cross_entropy((torch.tanh(out.logits / 5.0) * 5.0).view(-1, 99), y.view(-1)),
}  # fmt: skip
OTHERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "class weights": lambda out, y: F.cross_entropy(out.logits.view(-1, 99), y.view(-1), torch.linspace(0, 1, 99)),
    "probabilities": lambda out, y: F.cross_entropy(out.logits.view(-1, 99), torch.full((y.numel(), 99), 1 / 99)),
    "classes first": lambda out, y: F.cross_entropy(out.logits.permute(2, 0, 1).flatten(1).t(), y.flatten()),
    "positions as classes": lambda out, y: F.cross_entropy(out.logits, torch.arange(99).expand(3, 99) % 17),
    "some classes": lambda out, y: F.cross_entropy(out.logits[..., :50].flatten(0, 1), y.flatten() % 50),
    "log_softmax": lambda out, y: -F.log_softmax(out.logits, -1).gather(-1, y.clamp(min=0)[..., None]).mean(),
    "tanh alone": lambda out, y: F.cross_entropy(out.logits.tanh().view(-1, 99), y.view(-1)),
    "a view changed in place": lambda out, y: _changed_in_place(out.logits, y),
    "two losses": lambda out, y: out.loss + out.logits.logsumexp(-1).square().mean(),
    "below Python": lambda out, y: F.cross_entropy(_Doubled.apply(out.logits).view(-1, 99), y.view(-1)),
    "of a derived one, below Python": lambda out, y: F.cross_entropy(
        _Doubled.apply((out.logits.float() / 3.0).tanh()[:, 2:]).reshape(-1, 99), y[:, 2:].reshape(-1)),
}  # fmt: skip


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3  # not its gradient


def _changed_in_place(logits: Tensor, labels: Tensor) -> Tensor:
    flat = logits.view(-1, 99)
    copied = logits.float().clone() if logits.dtype is not torch.float32 else logits * 1.0
    logits.mul_(0.5)
    logits[:, 0] = 0.0
    return F.cross_entropy(flat, labels.view(-1)) + F.cross_entropy(copied.view(-1, 99), labels.view(-1))


@pytest.mark.parametrize("name", [*LOSSES, *OTHERS])
def test_a_loss_of_ones_own(name: str) -> None:
    loss_of = {**LOSSES, **OTHERS}[name]
    ours = step(peft_ext.accelerate(build("Llama")), loss_of)
    assert_same_step(ours, step(build("Llama"), loss_of))
    assert computed(ours[2].logits) == (name in OTHERS)


def test_whatever_reads_them_gets_the_logits() -> None:
    stock, model = step(build("Llama"))[2].logits.detach(), peft_ext.accelerate(build("Llama"))
    reads: list[Callable[[Tensor], Any]] = [
        lambda x: x.argmax(-1),
        lambda x: x[:, -1],
        lambda x: x[0, 1, 2],
        lambda x: x.softmax(-1),
        lambda x: x.detach(),
        lambda x: torch.cat([x, x]),
        lambda x: x.detach().numpy(),
        lambda x: x.view(3, 17, 33, 3),
        lambda x: x.tolist(),
        lambda x: x == x,
        lambda x: x.half(),
        lambda x: x.shape,
        lambda x: x.size(),
        lambda x: len(x),
        lambda x: x.dtype,
        lambda x: x.split(2, dim=0),
        lambda x: x.to("cpu", torch.float64),
        lambda x: -x,
        lambda x: 2 * x,
        lambda x: 1 - x,
        lambda x: x @ x.mT,
        lambda x: next(iter(x)),
        lambda x: bool(x.sum() > 0),
        lambda x: x.requires_grad,
        lambda x: x.is_leaf,
        lambda x: x.nelement(),
        lambda x: x.grad,
        lambda x: copy.deepcopy(x.detach()),
        lambda x: pickle.loads(pickle.dumps(x.detach())),
        lambda x: x.unsqueeze(0).shape,
        lambda x: x.mean().item(),
    ]
    wanted = stock.clone().requires_grad_() * 1.0
    for index, read in enumerate(reads):
        logits = model(**batch()).logits
        assert is_deferred(logits)
        ours, theirs = read(logits), read(wanted)
        assert type(ours) is type(theirs) or is_deferred(ours), index
        if isinstance(theirs, Tensor):
            torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-3, atol=1e-3)
        elif not isinstance(theirs, tuple) or not isinstance(theirs[0], Tensor):
            assert str(ours)[:4] == str(theirs)[:4], index
    assert "tensor(" in repr(model(**batch()).logits)


def test_evaluation_and_generation_have_logits() -> None:
    model = peft_ext.accelerate(build("Llama"))
    with torch.no_grad():
        assert type(model(**batch()).logits) is Tensor
    assert type(model.eval()(**batch()).logits) is Tensor
    assert model.generate(batch()["input_ids"], max_new_tokens=3).shape == (3, 20)


def test_gradients_of_the_logits() -> None:
    for ask in (lambda x: x.retain_grad(), lambda x: x.register_hook(lambda grad: grad * 2)):
        found = []
        for model in (build("Llama"), peft_ext.accelerate(build("Llama"))):
            kept: list[Tensor] = []

            def asks(_layer: nn.Module, _args: Any, out: Tensor, kept: list = kept, ask: Callable = ask) -> None:
                ask(out)
                kept.append(out)

            model.get_base_model().lm_head.register_forward_hook(asks)
            found.append((*step(model)[:2], None))
            if ask(kept[0]) is None:
                found[-1] = (kept[0].grad, *found[-1][1:])
        assert_same_step(found[1], found[0])
    model = peft_ext.accelerate(build("Llama"))
    out = model(**batch())
    for ask in (lambda: out.logits.retain_grad(), lambda: torch.autograd.grad(out.loss, out.logits)):
        with pytest.raises(RuntimeError, match=r"blocks=False"):
            ask()


def test_logits_that_are_no_longer_what_they_were() -> None:
    model = peft_ext.accelerate(build("Llama", ["lm_head"]))
    out = model(**batch())
    out.loss.backward()
    with torch.no_grad():
        model.get_base_model().lm_head.lora_B["default"].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="were changed in place"):
        out.logits.sum()


def test_what_takes_it_back() -> None:
    model = build("Llama", ["lm_head", "q_proj"])
    kinds = [type(module) for module in model.modules()]
    peft_ext.accelerate(model)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert is_deferred(again(**batch()).logits)
    peft_ext.accelerate(model, blocks=False)
    assert type(model(**batch()).logits) is Tensor and peft_ext.explain(model).fused_share == 1.0
    assert "was not called" in losses(model)[0].reason
    peft_ext.restore(peft_ext.accelerate(model))
    assert [type(module) for module in model.modules()] == kinds


def test_a_head_that_trains_has_logits() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft_ext.accelerate(get_peft_model(MODELS["Llama"](), config)).train()
    assert not losses(model)[0].fused
    assert type(model(**batch()).logits) is Tensor


def test_a_loss_that_differs_on_a_trial_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Llama")
    real = deferred.ops.linear_cross_entropy
    monkeypatch.setattr(deferred.ops, "linear_cross_entropy", lambda *args, **kwargs: 1.1 * real(*args, **kwargs))
    with pytest.warns(UserWarning, match="the loss stays PyTorch's: the loss is off by 0.1 on cpu"):
        peft_ext.accelerate(model)
    assert "off by" in losses(model)[0].reason
    assert type(model(**batch()).logits) is Tensor


def test_a_trial_takes_nothing_from_the_generator() -> None:
    model = build("Llama", ["lm_head"], lora_dropout=0.5)
    state = torch.get_rng_state()
    peft_ext.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_compiled_models_compute_logits() -> None:
    torch._dynamo.reset()
    model = peft_ext.accelerate(build("Llama"))
    eager = step(model)
    compiled = torch.compile(model, backend="aot_eager")
    found = step(compiled)
    torch.testing.assert_close(found[0], eager[0])
    assert not is_deferred(found[2].logits)


def test_memory_of_a_step_is_without_logits() -> None:
    """What autograd saves of the loss: hidden states and their gradient, nothing of the vocabulary."""
    largest = []
    for model in (build("Llama"), peft_ext.accelerate(build("Llama"))):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.extend(t.shape[-1:]) or t, lambda t: t
        ):
            model(**batch())
        largest.append(sizes.count(99))
    assert largest[0] > 0 == largest[1]


def test_the_model_s_own_loss_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is broken is seen by these tests: the loss does go through it."""
    model = peft_ext.accelerate(build("Llama"))
    called: list[Any] = []
    real = deferred.ops.linear_cross_entropy
    monkeypatch.setattr(deferred.ops, "linear_cross_entropy", lambda *a, **k: called.append(k) or real(*a, **k))
    step(model)
    assert len(called) == 1 and isinstance(model.get_base_model().lm_head, head.LinearHead)


# --- as any tensor of the same values ---------------------------------------------------------------------------------


def with_accuracy(out: Any, labels: Tensor) -> Tensor:
    flat = out.logits[..., :-1, :].contiguous().view(-1, 99)
    wanted = labels[:, 1:].reshape(-1)
    loss = F.cross_entropy(flat, wanted)
    return loss + 0 * (flat.argmax(-1) == wanted).float().mean()


def by_likelihood(out: Any, labels: Tensor) -> Tensor:
    flat = out.logits[..., :-1, :].contiguous().view(-1, 99)
    return F.nll_loss(F.log_softmax(flat, -1), labels[:, 1:].reshape(-1))


def tempered(out: Any, labels: Tensor) -> Tensor:
    shifted = out.logits[..., :-1, :].contiguous()
    shifted /= 2.0  # a copy's, and not the logits'
    return F.cross_entropy(shifted.view(-1, 99), labels[:, 1:].reshape(-1)) + out.logits.square().mean()


def edited_behind(out: Any, labels: Tensor) -> Tensor:
    flat = out.logits[:, :-1].reshape(-1, 99)
    half = out.logits / 2
    out.logits.detach()[..., 0] = -30.0
    return F.cross_entropy(flat, labels[:, 1:].reshape(-1)) + half.square().mean()


def masked_without_a_graph(out: Any, labels: Tensor) -> Tensor:
    with torch.no_grad():
        out.logits[..., 5] = -1e4
    return F.cross_entropy(out.logits.float().view(-1, 99), labels.view(-1))


def halved_without_a_graph(out: Any, labels: Tensor) -> Tensor:
    with torch.no_grad():
        wide = out.logits.float()  # the logits themselves, in float32
        wide /= 2.0
    return F.cross_entropy(out.logits.view(-1, 99), labels.view(-1))


def by_keywords(out: Any, labels: Tensor) -> Tensor:
    scaled = torch.div(torch.reshape(input=out.logits, shape=(-1, 99)), other=2.0).mul(other=3.0)
    return F.cross_entropy(torch.mul(scaled, other=0.5), labels.view(-1))


def a_copy_that_is_changed(out: Any, labels: Tensor) -> Tensor:
    shifted = out.logits[:, :-1].contiguous()
    flat, cloned = shifted.view(-1, 99), shifted.clone()
    shifted *= 0.5  # the view's as well, and not the copy's
    own = out.logits.clone()
    own -= 1.0
    wanted = labels[:, 1:].reshape(-1)
    return F.cross_entropy(flat, wanted) + F.cross_entropy(cloned.view(-1, 99), wanted) + own.square().mean()


def read_in_inference_mode(out: Any, labels: Tensor) -> Tensor:
    with torch.inference_mode():
        assert out.logits.argmax(-1).shape == labels.shape
    with torch.no_grad():
        mean = out.logits.mean()
    return F.cross_entropy(out.logits.view(-1, 99), labels.view(-1)) + mean


@pytest.mark.parametrize("loss_of", [with_accuracy, by_likelihood, tempered, edited_behind, masked_without_a_graph,
                                     halved_without_a_graph, by_keywords, read_in_inference_mode,
                                     a_copy_that_is_changed],
                         ids=lambda function: function.__name__)  # fmt: skip
def test_losses_and_edits_see_what_they_would(loss_of: Callable[[Any, Tensor], Tensor]) -> None:
    stock, model = build("Llama"), peft_ext.accelerate(build("Llama"))
    (wanted, grads, _), (loss, found, _) = step(stock, loss_of), step(model, loss_of)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_factors_that_are_not_finite_give_what_they_give(factor: float) -> None:
    model = peft_ext.accelerate(build("Llama"))
    loss, *_ = step(model, lambda out, labels: F.cross_entropy((out.logits * factor).view(-1, 99), labels.view(-1)))
    assert loss.isnan()


def test_their_gradient_can_be_given_with_grad_mode_off() -> None:
    """As a checkpoint of a function that returns them does."""
    found = []
    for model in (build("Llama"), peft_ext.accelerate(build("Llama"))):
        logits = model(**batch()).logits
        with torch.no_grad():
            logits.backward(torch.ones(logits.shape))
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())


def swap(model: nn.Module) -> None:
    head = model.get_base_model().lm_head
    head.weight = nn.Parameter(2 * head.weight.detach(), requires_grad=False)


def change(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(2.0)


@pytest.mark.parametrize("after", [swap, change, nn.Module.bfloat16, peft_ext.restore])
def test_logits_of_a_head_that_is_another_by_now_are_refused(after: Callable[[nn.Module], Any]) -> None:
    model = peft_ext.accelerate(build("Llama", ["q_proj"]))
    out = model(**batch())
    after(model)
    with pytest.raises(RuntimeError, match="the head's weight or adapter, were changed in place"):
        out.logits.sum()


def test_logits_of_a_head_that_was_merged_are_refused() -> None:
    model = peft_ext.accelerate(build("Llama", ["lm_head"]))
    out = model(**batch())
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="the head's weight or adapter, were changed in place"):
        F.cross_entropy(out.logits.view(-1, 99), batch()["labels"].view(-1))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("label", [99, -1])
def test_a_label_out_of_range_is_pytorch_s_error(label: int, reduction: str) -> None:
    inputs, found = batch(), []
    inputs["labels"][1, 7] = label
    for model in (build("Llama"), peft_ext.accelerate(build("Llama"))):
        with pytest.raises(IndexError) as error:
            logits = model(inputs["input_ids"]).logits
            F.cross_entropy(logits.view(-1, 99), inputs["labels"].view(-1), reduction=reduction)
        found.append(str(error.value))
    assert found[1] == f"{found[0]} cross_entropy: wanted 0 to 98, or -100, which is ignored"


def test_of_what_they_are_a_view_is_known_without_them() -> None:
    """FSDP2 asks each output of a module."""
    out = peft_ext.accelerate(build("Llama"))(**batch())
    assert out.logits._base is None and not out.logits._is_view() and not computed(out.logits)
    assert out.logits[:, 1:]._base.shape == (3, 17, 99)


@pytest.mark.parametrize("name", ["below Python", "of a derived one, below Python"])
def test_a_gradient_below_python_takes_the_logits_that_were_computed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = peft_ext.accelerate(build("Llama")), []
    real = deferred.Head.compute
    monkeypatch.setattr(deferred.Head, "compute", lambda self, *x: calls.append(x) or real(self, *x))
    step(model, OTHERS[name])
    assert len(calls) == 1


def test_a_gradient_below_python_is_of_what_was_read() -> None:
    """What is written into the logits later is none of its business."""
    found = []
    for model in (build("Llama"), peft_ext.accelerate(build("Llama"))):
        logits = model(batch()["input_ids"]).logits
        doubled = _Doubled.apply((logits / 3.0).tanh())
        with torch.no_grad():
            logits.mul_(3.0)
        doubled.square().mean().backward()
        found.append((doubled.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert_same_step(found[1], found[0])


def _edited(logits: Tensor) -> Tensor:
    logits.mul_(3.0)
    return logits


def _edited_part(logits: Tensor) -> Tensor:
    logits[:, 0] *= 3.0
    return logits


def _edited_quotient(logits: Tensor) -> Tensor:
    half = logits / 2
    half.mul_(3.0)
    return half


@pytest.mark.parametrize("edit", [_edited, _edited_part, _edited_quotient])
def test_a_gradient_below_python_is_not_without_a_change_in_place(edit: Callable[[Tensor], Tensor]) -> None:
    logits = edit(peft_ext.accelerate(build("Llama"))(batch()["input_ids"]).logits)
    with torch.no_grad():
        assert logits.argmax(-1).shape == (3, 17)
    F.cross_entropy(logits.view(-1, 99), batch()["labels"].view(-1)).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Change a copy"):
        _Doubled.apply(logits).square().mean().backward()


def test_positions_are_those_that_were_chosen() -> None:
    """Whatever becomes of the mask before the logits are computed."""
    for index in (batch()["labels"] > 40, torch.tensor([2, 0])):
        found = []
        for model in (build("Llama"), peft_ext.accelerate(build("Llama"))):
            mine = index.clone()
            chosen = model(batch()["input_ids"]).logits[mine]
            mine.fill_(1)
            found.append(chosen.detach())
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_a_replaced_forward_is_told() -> None:
    """TRL's computes the loss from the head's weight, and does not call the head."""
    model = peft_ext.accelerate(build("Llama"))
    base = model.get_base_model()
    forward = base.forward
    base.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    (row,) = losses(model)
    assert not row.fused and row.reason.startswith("the model's forward was replaced")
    base._original_forward = forward  # accelerate's mixed precision, which calls it
    assert losses(model)[0].fused


class _OfAnArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def get_output_embeddings(self, x: Tensor) -> Tensor:
        return self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.get_output_embeddings(x)


def test_a_method_of_the_same_name_is_left_alone() -> None:
    model = peft_ext.accelerate(get_peft_model(_OfAnArgument(), LoraConfig(r=2, target_modules=["up"])))
    assert len(peft_ext.explain(model).rows) == 1 and not losses(model)
    assert model(torch.randn(3, 8)).shape == (3, 8)
