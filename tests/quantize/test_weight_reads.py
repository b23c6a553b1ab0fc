"""Tests the layers that quantize_nf4 keeps dense: weights that other code reads, routers, target_parameters."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from peft_ext import quantize_nf4
from peft_ext.nn import NF4Linear
from peft_ext.weight_reads import weights_read_past

hf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("plain", "whole", "dtype", "device", "told", "never", "set_up"):
            setattr(self, name, nn.Linear(32, 32))
        self.inner = nn.ModuleDict({"deep": nn.Linear(32, 32)})
        self.inner.deep = self.inner["deep"]
        with torch.no_grad():
            self.set_up.weight.zero_()
        self.pretraining_tp = 1

    def casts(self, x: Tensor) -> Tensor:
        return x.to(self.dtype.weight.dtype)

    def told_of_bytes(self, x: Tensor) -> Tensor:
        return x if self.told.weight.dtype == torch.uint8 else x.to(self.told.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.device.weight.device) @ self.whole.weight
        if isinstance(self.plain.weight, Tensor) and self.pretraining_tp > 1:
            return x @ self.never.weight
        return self.plain(x) @ self.inner.deep.weight


def kept(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is nn.Linear}


def test_what_the_code_reads_is_told_by_its_source() -> None:
    assert weights_read_past(nn.Sequential(Reads())) == {"0.whole", "0.dtype", "0.inner.deep"}
    model = quantize_nf4(Reads(), blocksize=32, progress=False)
    assert kept(model) == {"whole", "dtype", "inner.deep"}
    model(torch.randn(2, 32))


def test_a_class_without_a_source_is_quantized() -> None:
    space: dict = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x @ self.a.weight\n", space)
    model = space["Made"]()
    model.a = nn.Linear(32, 32)
    assert weights_read_past(model) == set() and kept(quantize_nf4(model, progress=False)) == set()


SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
MODELS = {
    "LongT5": lambda: hf.LongT5ForConditionalGeneration(
        hf.LongT5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    ),
    "Mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    ),
    "MobileBERT": lambda: hf.MobileBertForMaskedLM(
        hf.MobileBertConfig(**SMALL, embedding_size=16, intra_bottleneck_size=16)
    ),
    "Switch": lambda: hf.SwitchTransformersForConditionalGeneration(
        hf.SwitchTransformersConfig(vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8,
                                    num_experts=4)
    ),
    "HunYuan": lambda: hf.HunYuanMoEV1ForCausalLM(
        hf.HunYuanMoEV1Config(**SMALL, num_key_value_heads=2, num_experts=4, moe_topk=2, head_dim=8)
    ),
    "Qwen2-MoE": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**SMALL, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
                          moe_intermediate_size=32, shared_expert_intermediate_size=32)
    ),
}  # fmt: skip
DENSE = {
    "LongT5": "wo", "Mamba": "dt_proj", "MobileBERT": "dense", "Switch": "wo", "HunYuan": "wg",
    "Qwen2-MoE": "shared_expert_gate",
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_model_computes(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    quantize_nf4(model, blocksize=32, progress=False)
    assert any(isinstance(module, NF4Linear) for module in model.modules())
    assert any(path.rpartition(".")[2] == DENSE[name] for path in kept(model))
    if name == "HunYuan":
        assert not any(isinstance(m, NF4Linear) for path, m in model.named_modules() if ".gate." in path)
    ids = torch.arange(3, 19).view(2, 8)
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        assert model(input_ids=ids, **inputs).logits.isfinite().all()


def test_pytorchs_encoder_takes_its_fast_path() -> None:
    model = quantize_nf4(nn.Sequential(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), nn.Linear(32, 32)),
                         progress=False).eval()  # fmt: skip
    with torch.no_grad():
        assert model(torch.randn(2, 5, 32)).shape == (2, 5, 32)
    assert isinstance(model[1], NF4Linear)


def test_names_with_dots_that_a_model_keeps_in_float32() -> None:
    class Keeps(nn.Module):
        _keep_in_fp32_modules_strict = ("a.b",)

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.ModuleDict({"b": nn.Linear(32, 32), "c": nn.Linear(32, 32)}), nn.Linear(32, 32)

    assert kept(quantize_nf4(Keeps(), progress=False)) == {"a.b"}


def test_the_weight_that_peft_adds_a_sum_to_stays_dense() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llama = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2))
        config = peft.LoraConfig(r=2, target_modules=["k_proj"], target_parameters=["q_proj.weight"])
        model = peft.get_peft_model(llama, config)
    ids = torch.arange(3, 19).view(2, 8)
    quantize_nf4(model, blocksize=32, progress=False)
    layer = model.base_model.model.model.layers[0].self_attn
    assert type(layer.q_proj.base_layer) is nn.Linear and type(layer.k_proj.base_layer) is NF4Linear
    assert model(input_ids=ids).logits.isfinite().all()
