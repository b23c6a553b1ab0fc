"""Tests of norms and MLPs on fused operators: their forms are known, and their results are those of stock code."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from tiny_models import OperatorCalls
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import peft_ext
from peft_ext import ops
from peft_ext.integrations.adapter_layers.recompute import computed_again
from peft_ext.integrations.model_blocks import norm
from peft_ext.integrations.model_blocks.dropout import Dropout
from peft_ext.integrations.model_blocks.mlp import Mlp

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
MODELS = {
    "Llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)), "RMSNorm", 5),
    "Gemma": (lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**SMALL, head_dim=8)), "RMSNorm", 5),
    "Gemma 2": (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, head_dim=8)), "RMSNorm", 9),
    "Qwen 3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, head_dim=8)), "RMSNorm", 9),
    "OLMo": (lambda: hf.OlmoForCausalLM(hf.OlmoConfig(**SMALL)), "LayerNorm", 5),
    "Cohere": (lambda: hf.CohereForCausalLM(hf.CohereConfig(**SMALL)), "LayerNorm", 3),
    "GPT-2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        ),
        "LayerNorm",
        5,
    ),
}
IDS = {"input_ids": torch.arange(3, 37).view(2, 17), "labels": torch.arange(3, 37).view(2, 17)}


def build(name: str, dtype: torch.dtype = torch.float32, trained: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[name][0]()
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__ and hasattr(module, "weight"):  # a norm of OLMo has no weight
                module.weight.add_(torch.randn_like(module.weight), alpha=0.3)
    model = get_peft_model(model.to(dtype), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or (trained and "norm" in parameter_name.lower()))
    return model.train()


def step(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**IDS).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def norms(model: nn.Module) -> list[Any]:
    return [row for row in peft_ext.explain(model).blocks if "Norm" in row.kind]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_stock_one(name: str, trained: bool) -> None:
    stock, model = step(build(name, trained=trained)), peft_ext.accelerate(build(name, trained=trained))
    _, kind, count = MODELS[name]
    assert [(row.kind, row.fused) for row in norms(model)] == [(kind, True)] * count
    found = step(model)
    assert found.keys() == stock.keys()
    for key, value in stock.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_good_as_stock(name: str) -> None:
    errors = [0.0, 0.0]
    for seed in range(6):  # several seeds, because one model alone may agree by chance
        exact = step(build(name, seed=seed))
        narrow = [build(name, torch.bfloat16, seed=seed) for _ in errors]
        for i, model in enumerate((narrow[0], peft_ext.accelerate(narrow[1]))):
            found = step(model)
            errors[i] += sum((found[key].double() - value).norm() ** 2 for key, value in exact.items()).item()
    assert errors[1] <= 1.3**2 * errors[0]


def test_gemmas_and_llamas_are_told_apart_by_where_they_round() -> None:
    found = {}
    for name in ("Llama", "Gemma"):
        model = peft_ext.accelerate(build(name))
        known = [type(module).peft_ext_known for module in model.modules() if isinstance(module, norm.Norm)]
        (found[name],) = {(one.offset, one.rounds, one.mixed) for one in known}
    assert found == {"Llama": ("0", True, True), "Gemma": ("1", False, True)}


@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, T5LayerNorm, GemmaRMSNorm])
def test_a_weight_of_another_dtype_gives_what_the_class_does(kind, of_weight, of_x) -> None:
    """T5's norm returns the dtype of its weight, Llama's the dtype that PyTorch gives the product, Gemma's the dtype of
    x.
    """
    torch.manual_seed(0)
    module = kind(32).to(of_weight)
    x, found = torch.randn(3, 32).to(of_x), []
    for one in (module, copy.deepcopy(module)):
        if found:
            one = nn.Sequential(one)
            with pytest.warns(UserWarning, match="no adapter layer"):
                peft_ext.accelerate(one)
            assert isinstance(one[0], norm.Norm)
        y = one(leaf := x.clone().requires_grad_())
        y.float().square().sum().backward()
        found.append((y.detach(), leaf.grad))
    for ours, stock in zip(found[1], found[0], strict=True):
        assert ours.dtype is stock.dtype
        narrow = torch.bfloat16 in (of_x, of_weight)  # in bfloat16, stock code also rounds in the backward
        torch.testing.assert_close(ours, stock, rtol=2**-6 if narrow else 1e-5, atol=0.05 if narrow else 1e-4)


@pytest.mark.parametrize("under", ["meta", "bfloat16", "inference"])
def test_the_device_dtype_and_mode_of_the_moment_change_nothing(under: str) -> None:
    """The default device, dtype and mode at the time of accelerate do not change which blocks are fused."""
    model = get_peft_model(MODELS["Llama"][0](), LoraConfig(target_modules="all-linear"))
    if under == "meta":
        with torch.device("meta"):
            peft_ext.accelerate(model)
    elif under == "inference":
        with torch.inference_mode():
            peft_ext.accelerate(model)
    else:
        torch.set_default_dtype(torch.bfloat16)
        try:
            peft_ext.accelerate(model)
        finally:
            torch.set_default_dtype(torch.float32)
    rows = peft_ext.explain(model).blocks
    assert {row.kind for row in rows} == {
        "RMSNorm",
        "MLP",
        "loss",
        "projections of one input",
        "rotary positions",
        "attention",
        "decoder layer",
    }
    assert {row.kind for row in rows if not row.fused} == {"decoder layer"}, rows  # decoder layers fuse only in eval


class Odd(nn.Module):
    """Looks like an RMSNorm, but computes another function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.eps)


class Cubed(Odd):
    """Has the values of an RMSNorm, but another gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps).detach()


class Raises(Odd):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("not for a trial")


@pytest.mark.parametrize("kind", [Odd, Cubed, Raises])
def test_another_function_keeps_its_own(kind: type) -> None:
    model = build("Llama")
    model.get_base_model().model.norm = kind()
    peft_ext.accelerate(model)
    assert type(model.get_base_model().model.norm) is kind
    assert len(norms(model)) == 4


@pytest.mark.slow
def test_what_takes_it_back() -> None:
    for name in MODELS:
        model = build(name)
        kinds, wanted = [type(module) for module in model.modules()], step(model)
        peft_ext.accelerate(model)
        for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
            torch.testing.assert_close(step(other)["loss"], wanted["loss"])
        assert model.state_dict().keys() == build(name).state_dict().keys()
        peft_ext.accelerate(model, blocks=False)
        assert not any(row.fused for row in peft_ext.explain(model).blocks)
        peft_ext.restore(peft_ext.accelerate(model))
        assert [type(module) for module in model.modules()] == kinds


def test_nothing_wide_is_saved() -> None:
    """A norm in a bfloat16 model keeps x and a few float32 numbers per row; stock code keeps float32 activations."""
    saved = []
    for model in (build("Llama", torch.bfloat16), peft_ext.accelerate(build("Llama", torch.bfloat16))):
        norm, wide = model.get_base_model().model.norm, []
        x = torch.randn(2, 17, 32, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, wide=wide: wide.append(t.numel() if t.dtype is torch.float32 else 0) or t, lambda t: t
        ):
            norm(x)
        saved.append(max(wide))
    assert saved == [2 * 17 * 32, 2 * 17]


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are allocated within the context and are still in use."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return found

    def bytes(self) -> int:
        return sum(size for reference, size in self._made.values() if not reference.expired())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_mlp_keeps_gate_and_up_and_the_ranks(dropout: float) -> None:
    """Besides x and y, an MLP of inner size I with LoRA of rank R keeps 2 I bfloat16 numbers and 3 R float32 numbers
    per token, and with dropout three seeds of 16 bytes.
    """
    inner, r, tokens = 64, 4, 80
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, "intermediate_size": inner})).bfloat16()
    config = LoraConfig(r=r, target_modules="all-linear", lora_dropout=dropout)
    mlp = peft_ext.accelerate(get_peft_model(model, config)).train().get_base_model().model.layers[0].mlp
    x = torch.randn(2, tokens // 2, 32, dtype=torch.bfloat16, requires_grad=True)
    mlp(x)  # a first call allocates everything that later calls reuse
    with Alive() as alive:
        y = mlp(x)
    kept = alive.bytes() - y.numel() * 2
    assert kept == tokens * (2 * 2 * inner + 3 * 4 * r) + (3 * 16 if dropout else 0)


def test_who_asks_for_more_gets_the_own_forward() -> None:
    model = peft_ext.accelerate(build("GPT-2"))
    norm = model.get_base_model().transformer.ln_f
    x = torch.randn(2, 3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.bfloat16()).dtype is nn.LayerNorm(32)(x.bfloat16()).dtype
        assert "autocast" in norms(model)[0].reason
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm(x[..., :5])
    norm.forward = lambda x: x + 1
    assert torch.equal(norm(x), x + 1)


@pytest.mark.slow
def test_a_compiled_step_has_the_stock_loss() -> None:
    compiled = torch.compile(peft_ext.accelerate(build("Llama")), backend="aot_eager")
    torch.testing.assert_close(step(compiled)["loss"], step(build("Llama"))["loss"])


MLPS = {
    "gate and up": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "GELU by tanh, of GELU": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**SMALL, head_dim=8)),
    "gate and up in one": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**SMALL)),
    "squared ReLU": lambda: hf.NemotronForCausalLM(hf.NemotronConfig(**SMALL)),
    "two layers": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SMALL, resid_pdrop=0.0)),
    "two layers and a dropout": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, resid_pdrop=0.3, embd_pdrop=0, attn_pdrop=0)
    ),
}


def adapted(name: str, checkpointing: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(
        MLPS[name]().to(dtype), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MLPS)
def test_a_step_through_mlps_is_the_stock_one(name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "dropout", torch.nn.functional.dropout)  # both models draw PyTorch's masks
    stock = adapted(name, checkpointing)
    torch.manual_seed(3)
    stock = step(stock)
    model = peft_ext.accelerate(adapted(name, checkpointing))
    assert [row.fused for row in peft_ext.explain(model).blocks if row.kind == "MLP"] == [True, True]
    torch.manual_seed(3)
    found = step(model)
    for key, value in stock.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())


ENCODERS = {
    "an activation alone": (
        lambda: hf.BertForMaskedLM(hf.BertConfig(
            vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
        "bert.encoder.layer.1.intermediate",
        2,
    ),
    "an MLP in parts": (
        lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(
            vocab_size=99, dim=32, hidden_dim=48, n_layers=2, n_heads=4, dropout=0.0, attention_dropout=0.0)),
        "distilbert.transformer.layer.1.ffn",
        4,  # the backward of each of the two MLPs computes the input of the MLP's last layer again
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_a_step_through_the_mlps_of_encoders_is_the_stock_one(name: str) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(ENCODERS[name][0](), config).train()

    stock, model = step(made()), peft_ext.accelerate(made())
    assert [row.fused for row in peft_ext.explain(model).blocks if row.kind == "MLP"] == [True, True]
    with OperatorCalls() as mode:
        found = step(model)
    assert mode.calls["activation"] == ENCODERS[name][2]
    for key, value in stock.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())
    block = model.get_base_model().get_submodule(ENCODERS[name][1])
    if hasattr(block, "chunk_size_feed_forward"):
        block.chunk_size_feed_forward = 1
        reasons = [row.reason for row in peft_ext.explain(model).blocks if row.kind == "MLP"]
        assert reasons == ["", "its chunk_size_feed_forward is 1, wanted 0"]


def test_an_mlp_with_a_probability_drops_in_training_alone() -> None:
    torch.manual_seed(0)
    config = hf.Starcoder2Config(**SMALL, residual_dropout=0.5, embedding_dropout=0.0)
    stock = get_peft_model(hf.Starcoder2ForCausalLM(config), LoraConfig(target_modules="all-linear")).eval()
    model = peft_ext.accelerate(copy.deepcopy(stock))
    assert [row.fused for row in peft_ext.explain(model).blocks if row.kind == "MLP"] == [True, True]
    with torch.no_grad():
        wanted = stock(**IDS).logits
        torch.testing.assert_close(model(**IDS).logits, wanted)
        assert not torch.allclose(model.train()(**IDS).logits, wanted, rtol=1e-2)


def test_a_gate_changed_before_the_backward_is_found() -> None:
    model = peft_ext.accelerate(adapted("gate and up"))
    kept: list[Tensor] = []
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.gate_proj.register_forward_hook(lambda _layer, _args, out: kept.append(out))
    loss = model(**IDS).loss
    kept[0].data.mul_(1.0)  # a change that autograd does not see
    with torch.no_grad():
        kept[0].add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place|modified by an inplace"):
        loss.backward()


def test_what_was_changed_in_place_before_it_is_saved_is_not_computed_again() -> None:
    x, weight = torch.randn(4, requires_grad=True), torch.ones(4, requires_grad=True)
    h = x * 2
    with computed_again(h, lambda value: value * 2, x):
        h.add_(1.0)
        y = h * weight
    y.sum().backward()
    assert torch.equal(weight.grad, h.detach())


def test_what_a_hook_changes_in_place_is_kept_as_it_is() -> None:
    """A forward pre-hook on the last layer changes the layer's input in place. The changed input must be saved, because
    a recomputation of the activation would give the unchanged input."""
    found = []

    def shift(_layer: nn.Module, args: tuple[Tensor]) -> None:
        args[0].add_(0.5)

    for model in (adapted("gate and up"), peft_ext.accelerate(adapted("gate and up"))):
        for layer in model.get_base_model().model.layers:
            layer.mlp.down_proj.register_forward_pre_hook(shift)
        found.append(step(model))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())


class Shifted(nn.Module):
    """Looks like an MLP, but computes another function."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1.0))


class Unknown(Shifted):
    """Has an activation that no operator computes."""

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.Mish()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("kind", [Shifted, Unknown])
def test_another_mlp_keeps_its_own(kind: type) -> None:
    model = adapted("gate and up")
    model.get_base_model().model.layers[0].mlp = kind()
    peft_ext.accelerate(model)
    mlp = model.get_base_model().model.layers[0].mlp
    assert not isinstance(mlp, Mlp) or mlp.block_reason() == "its activation is none of the known ones"
    assert isinstance(mlp, kind)
    step(model)


def test_an_activation_that_was_replaced_is_used() -> None:
    model = peft_ext.accelerate(adapted("gate and up"))
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.act_fn = nn.Mish()
    assert "none of the known ones" in mlp.block_reason()
    x = torch.randn(3, 32)
    wanted = mlp.down_proj(nn.Mish()(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True], ids=["model", "each layer"])
def test_compiled_with_checkpointing_and_dropout(regional: bool) -> None:
    """In layers compiled with dynamic shapes and checkpointing, the backward must use the dropout mask of the forward
    (PEFT's issue 3020).
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", lora_dropout=0.25, init_lora_weights=False)
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL | {"num_hidden_layers": 2 if regional else 1}))
    model = peft_ext.accelerate(get_peft_model(llama, config)).train()
    eager = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    if regional:
        for layer in model.get_base_model().model.layers:
            layer.compile(dynamic=True, backend="aot_eager")
    compiled = model if regional else torch.compile(model, dynamic=True, backend="aot_eager")
    for length in (17, 12):
        ids, found = IDS["input_ids"][:, :length], []
        for one, call in ((eager, eager), (model, compiled)):
            one.zero_grad()
            torch.manual_seed(1)
            loss = call(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            found.append((loss.detach(), *(p.grad for p in one.parameters() if p.grad is not None)))
        for value, wanted in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


# --- dropout ----------------------------------------------------------------------------------------------------------


def with_dropouts(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns an adapted model in training mode, whose own dropouts and whose adapter's dropout act."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "BERT":
        config = hf.BertConfig(**sizes, intermediate_size=48, hidden_dropout_prob=0.2)
        model, targets = hf.BertForMaskedLM(config), ["query", "value"]
    else:
        config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, resid_pdrop=0.2, embd_pdrop=0.2)
        model, targets = hf.GPT2LMHeadModel(config), ["c_attn"]
    config = LoraConfig(target_modules=targets, lora_dropout=0.3, init_lora_weights=False)
    return get_peft_model(model.to(dtype), config).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["BERT", "GPT-2"])
def test_the_dropouts_of_a_model(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch's masks, a step equals the stock step. With the operator's masks, equal seeds give equal losses, and
    each step draws new masks."""
    stock, model = with_dropouts(kind, dtype), peft_ext.accelerate(with_dropouts(kind, dtype))
    rows = [row for row in peft_ext.explain(model).blocks if row.kind == "dropout"]
    assert len(rows) >= 5 and all(row.fused for row in rows) and not any("lora" in row.name for row in rows)
    drawn, real = [], ops.dropout
    monkeypatch.setattr(ops, "dropout", lambda x, p: drawn.append(p) or real(x, p))
    torch.manual_seed(1)
    first = step(model)["loss"]
    assert drawn == [0.2] * len(drawn) and len(drawn) == 5 and step(model)["loss"] != first  # each step draws new masks
    torch.manual_seed(1)
    assert step(model)["loss"] == first
    # Dropouts of adapters and of attention are off, because their masks differ as well.
    monkeypatch.setattr(ops, "dropout", torch.nn.functional.dropout)
    for one in (stock, model):
        for name, module in one.named_modules():
            if isinstance(module, nn.Dropout) and (
                "lora_dropout" in name or "self.dropout" in name or "attn_dropout" in name
            ):
                module.p = 0.0
    found = []
    for one in (stock, model):
        torch.manual_seed(2)
        found.append(step(one))
    bound = 1e-4 if dtype == torch.float32 else 5e-2
    for key, value in found[0].items():
        assert (found[1][key] - value).norm() <= bound * value.norm(), key
    model.eval()
    monkeypatch.setattr(ops, "dropout", None)
    step(model)


def test_dropouts_that_stay_as_they_are() -> None:
    """The stock class stays for in-place dropouts, for probabilities of 0 and 1, for the dropouts of adapters, and for
    all dropouts after restore."""
    model = with_dropouts("BERT")
    layers = [nn.Dropout(0.5, inplace=True), nn.Dropout(0.0), nn.Dropout(1.0), nn.Dropout1d(0.5), nn.Dropout(0.5)]
    model.get_base_model().more = nn.ModuleList(layers)
    peft_ext.accelerate(model)
    assert [isinstance(layer, Dropout) for layer in layers] == [False, False, False, False, True]
    x = torch.ones(4, 40)
    layers[0](x)
    assert set(x.unique().tolist()) == {0.0, 2.0} and layers[2](x).count_nonzero() == 0
    own = layers[4]
    assert set(own(torch.ones(40, 4).t()).unique().tolist()) == {0.0, 2.0}  # the input is not contiguous
    assert own(torch.ones(4, dtype=torch.float64)).dtype is torch.float64 and own(torch.ones(0, 3)).shape == (0, 3)
    assert own(input=x).shape == x.shape  # input is PyTorch's name of the argument
    own.p = 1.0
    assert own.block_reason() == "it drops in place, or all" and own(x).count_nonzero() == 0
    own.p, own.forward = 0.5, lambda x: x + 1
    assert "replaced" in own.block_reason() and torch.equal(own(x), x + 1)
    del own.forward
    for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert type(copied) is type(own) and set(copied(torch.ones(99)).unique().tolist()) == {0.0, 2.0}
    peft_ext.restore(model)
    assert all(type(module) is nn.Dropout for module in model.modules() if isinstance(module, nn.Dropout))


def test_a_dropout_that_is_not_on_a_cpu_is_pytorchs() -> None:
    model = peft_ext.accelerate(with_dropouts("BERT")).to("meta")
    reasons = {row.reason for row in peft_ext.explain(model).blocks if row.kind == "dropout"}
    assert reasons == {"it is on meta, where PyTorch's own is used"}


def test_a_norm_is_called_by_name() -> None:
    layer = peft_ext.accelerate(with_dropouts("GPT-2")).get_base_model().transformer.ln_f
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(input=x), nn.LayerNorm.forward(layer, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_few_elements_are_normed_by_pytorch(dtype, few_elements, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, PyTorch's layer_norm runs for few elements, because its call has less overhead."""
    monkeypatch.setattr(norm, "LEAST", few_elements)
    layer = peft_ext.accelerate(with_dropouts("GPT-2")).get_base_model().transformer.ln_f.to(dtype)
    rows = few_elements[dtype] // 32
    with OperatorCalls() as mode:
        y = layer(x := torch.randn(rows - 1, 32).to(dtype).requires_grad_())
        y.sum().backward()
    assert not mode.calls and torch.equal(y, nn.LayerNorm.forward(layer, x))
    with OperatorCalls() as mode:
        layer(torch.randn(rows, 32).to(dtype).requires_grad_()).sum().backward()
    assert mode.calls == {"layer_norm": 1, "layer_norm_backward": 1}
