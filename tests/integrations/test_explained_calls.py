"""Tests that ``explain`` calls a block or a layer fused exactly if a call runs the operators of this block or layer."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import peft_ext
from peft_ext import ops
from peft_ext.integrations.adapter_layers.reasons import KERNELS
from peft_ext.integrations.model_blocks import decoder_layer
from peft_ext.integrations.model_blocks.mlp import Mlp

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
         "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
IDS = torch.arange(3, 83).view(2, 40)


def llama(**more: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2, **more))


def gpt2(**more: Any) -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=99, eos_token_id=2, **more))


def accelerated(model: nn.Module, targets: Any = "all-linear", **more: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **more)
    return peft_ext.accelerate(get_peft_model(model, config))


def explained(model: nn.Module, kind: str) -> tuple[bool, str]:
    """Returns ``fused`` and ``reason`` of the blocks of a kind, which have to be equal for all of them."""
    (found,) = {(row.fused, row.reason) for row in peft_ext.explain(model).blocks if row.kind == kind}
    return found


# --- decoder layers ---------------------------------------------------------------------------------------------------


def _hook(model: Any) -> None:
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *_: None)


LAYERS: dict[str, tuple[Callable, Callable, str]] = {
    "evaluation": (llama, lambda model: model.eval(), ""),
    "training": (llama, lambda model: model.train(), "it is in training"),
    "hook": (llama, lambda model: _hook(model.eval()), "hooks on its mlp"),
    "float32 norm": (
        lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8)).bfloat16(),
        lambda model: model.eval().get_base_model().model.layers[0].post_attention_layernorm.float(),
        "its input is bfloat16, its weight float32",
    ),
    "ungated MLP": (
        lambda: hf.ArceeForCausalLM(hf.ArceeConfig(**SMALL)), lambda model: model.eval(), "it is not down(act",
    ),
    "attention without a forward of peft_ext": (
        lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(
            **SMALL, num_key_value_heads=4, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=16,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)),
        lambda model: model.eval(),
        "no forward of peft_ext replaces its own",
    ),
}  # fmt: skip


def plans(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Returns, for each decoder layer that a call of one token looks up a plan for, whether it has a plan."""
    found: list[bool] = []
    real = decoder_layer.plan_of

    def noting(block: Any, x: Tensor, make: Callable) -> Any:
        found.append((made := real(block, x, make)) is not None)
        return made

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(decoder_layer, "plan_of", noting)
        model(IDS[:1, :1])
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_a_decoder_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, changed, reason = LAYERS[name]
    model = accelerated(made())
    changed(model)
    fused, said = explained(model, "decoder layer")
    assert fused is (not reason) and (reason or "few tokens") in said
    assert plans(model, monkeypatch) == [fused]


# --- MLPs, dropouts, attention, the loss ------------------------------------------------------------------------------


def t5(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Returns a T5 whose layers ``wo`` are float32, as ``from_pretrained`` keeps them in float16."""
    config = hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=99, dropout_rate=0.0,
                         decoder_start_token_id=0)  # fmt: skip
    model = hf.T5ForConditionalGeneration(config).to(dtype)
    for name, module in model.named_modules():
        if name.endswith("wo"):
            module.float()
    return model


AUTOCAST = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731  a context for one call
STATES: dict[str, tuple[Callable, str, Callable, Callable, str, str]] = {
    "MLP": (lambda: gpt2(activation_function="gelu_new"), "train", contextlib.nullcontext, "MLP", "activation", ""),
    "MLP in float16": (
        lambda: gpt2(activation_function="gelu_new").half(), "train", contextlib.nullcontext, "MLP", "activation",
        "none of the known ones in float16",
    ),
    "MLP under autocast": (gpt2, "train", AUTOCAST, "MLP", "activation", ""),
    "T5's MLP": (lambda: t5(torch.float32), "eval", contextlib.nullcontext, "MLP", "activation", ""),
    "T5's MLP with wo in float32": (t5, "eval", contextlib.nullcontext, "MLP", "activation", "it casts for its wo"),
    "dropout": (gpt2, "train", contextlib.nullcontext, "dropout", "dropout", ""),
    "dropout in evaluation": (gpt2, "eval", contextlib.nullcontext, "dropout", "dropout", "drops nothing"),
    "rotary": (llama, "train", contextlib.nullcontext, "rotary positions", "rotary_embedding", ""),
    "rotary under autocast": (llama, "train", AUTOCAST, "rotary positions", "rotary_embedding", "the positions are"),
    "large heads": (
        lambda: llama(head_dim=520), "train", contextlib.nullcontext, "attention", "scaled_dot_product_attention",
        "wanted at most 512",
    ),
    "attention": (llama, "train", contextlib.nullcontext, "attention", "scaled_dot_product_attention", ""),
    "loss": (llama, "train", contextlib.nullcontext, "loss", "linear_cross_entropy", ""),
    "loss in evaluation": (llama, "eval", contextlib.nullcontext, "loss", "linear_cross_entropy", "in evaluation"),
    "loss under autocast": (llama, "train", AUTOCAST, "loss", "linear_cross_entropy", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_block_is_fused_if_its_operator_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, mode, context, kind, operator, reason = STATES[name]
    model = getattr(accelerated(made()), mode)()
    called, real = [], getattr(ops, operator)
    monkeypatch.setattr(ops, operator, lambda *args, **kwargs: called.append(1) or real(*args, **kwargs))
    with context():
        fused, said = explained(model, kind)
        model(input_ids=IDS, labels=IDS)
    assert fused is (not reason) and reason in said, said
    assert bool(called) is fused


def test_an_argument_that_only_transformers_function_reads() -> None:
    model = accelerated(hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8)))
    model.get_base_model().config._attn_implementation = "sdpa"  # older releases of transformers allow this value
    assert explained(model, "attention") == (False, "its call has a softcap, which only transformers' function reads")
    for layer in model.get_base_model().model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert explained(model, "attention") == (True, "")


def test_projections_of_one_input_with_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model, called, real = accelerated(llama()).train(), [], ops.lora_linears
    monkeypatch.setattr(ops, "lora_linears", lambda *args, **more: called.append(1) or real(*args, **more))
    assert explained(model, "projections of one input") == (True, "")
    model(IDS)
    assert called.pop()
    called.clear()
    model.get_base_model().model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: None)
    fused, reason = explained(model, "projections of one input")
    model(IDS)
    # The one call computes gate and up of the MLP.
    assert not fused and "a hook on one of them" in reason and len(called) == 1


@pytest.mark.parametrize("name", ["OLMo", "Cohere"])
def test_norms_without_kernels_or_over_two_dimensions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"OLMo": lambda: hf.OlmoForCausalLM(hf.OlmoConfig(**SMALL)),
            "Cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SMALL, use_qk_norm=True))}  # fmt: skip
    model = accelerated(made[name]())
    if name == "OLMo":
        assert explained(model, "LayerNorm") == (True, "")
        monkeypatch.setitem(KERNELS, "layer_norm", {"cpu": False, "cuda": False})
    said = {row.reason for row in peft_ext.explain(model).blocks if row.kind == "LayerNorm"}
    wanted = {"OLMo": {"no native kernels of layer_norm for cpu tensors are loaded"},
              "Cohere": {"", "its weight is [4, 8], wanted 1 dimension"}}  # fmt: skip
    assert said == wanted[name]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_layer_norm_with_parameters_of_two_dtypes_raises_pytorchs_error(name: str) -> None:
    """x has the dtype of the weight, so that the operator alone would compute a result."""
    norm = nn.LayerNorm(16)
    norm._parameters[name].data = norm._parameters[name].data.bfloat16()
    x = torch.randn(512, 16, dtype=norm.weight.dtype)
    with pytest.raises(RuntimeError) as stock:
        norm(x)
    with pytest.warns(UserWarning, match="no adapter layer"):
        model = peft_ext.accelerate(nn.Sequential(norm))
    assert explained(model, "LayerNorm")[0] is False
    with pytest.raises(RuntimeError, match=re.escape(str(stock.value))):
        model(x)


def test_a_model_in_float64() -> None:
    rows = [row for row in peft_ext.explain(accelerated(llama().double())).blocks if row.kind != "decoder layer"]
    assert not any(row.fused for row in rows), rows


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "autocast", "tensor"])
def test_lora_over_an_embedding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, called, real = accelerated(llama(), ["embed_tokens"]), [], ops.lora_embedding
    monkeypatch.setattr(ops, "lora_embedding", lambda *args, **more: called.append(1) or real(*args, **more))
    layer = model.get_base_model().model.embed_tokens
    if name == "tensor":
        layer.scaling["default"] = torch.tensor(2.0)
    with AUTOCAST() if name == "autocast" else contextlib.nullcontext():
        (row,) = peft_ext.explain(model).rows
        model(IDS)
    assert row.fused is bool(called) is (not name), row


def test_a_layer_that_adds_in_float32_what_its_base_multiplies_in_16_bits() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.LayerNorm(32), bnb.nn.Linear4bit(32, 32, compute_dtype=torch.bfloat16, quant_type="nf4"))
    model.to("cpu")
    model[1].compute_type_is_set = True
    model = peft_ext.accelerate(get_peft_model(model, LoraConfig(target_modules=["1"])))
    (row,) = peft_ext.explain(model).rows
    assert row.fused and "PEFT adds in float32" in row.reason
    with AUTOCAST():
        (row,) = peft_ext.explain(model).rows
    assert row.fused and not row.reason


# --- the class's own code behind layers that were called --------------------------------------------------------------


class Strided(nn.Linear):
    """A linear layer whose output is not contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("name", ["Beam", "Llama"])
def test_an_mlp_whose_layers_give_strided_outputs_rounds_as_its_class_does(name: str, few: bool) -> None:
    """Beam computes the activation and the product in float32, Llama in the dtype of the layers."""
    module = pytest.importorskip(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(hidden_size=64, intermediate_size=96)
    mlp = getattr(module, f"{name}MLP")(config).bfloat16()
    mlp.gate_proj.__class__ = Strided
    x = torch.randn(2, 3 if few else 40, 64).bfloat16()
    with torch.no_grad() if few else contextlib.nullcontext():
        stock = mlp(x)
        with pytest.warns(UserWarning, match="nothing to accelerate"):
            peft_ext.accelerate(model := nn.Sequential(mlp))
        assert isinstance(model[0], Mlp) and torch.equal(model(x), stock)
