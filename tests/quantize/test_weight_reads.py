"""Tests the layers that quantize_nf4 keeps dense: weights that other code reads, routers, target_parameters."""

from __future__ import annotations

import linecache
import sys
import types
import warnings

import pytest
import torch
from torch import Tensor, nn

from peft_ext import quantize_nf4, quantize_packed
from peft_ext.nn import BottleneckAdapter, NF4Experts, NF4Linear, PrefixEncoder
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


def test_a_class_of_a_notebook_is_read_from_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook, ``__main__`` has no file, and linecache has the text of the cells."""
    text = "class Made(nn.Module):\n    def forward(self, x):\n        return x @ self.a.weight\n"
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    for file, dense in (("<a cell>", {"a"}), ("<no cell>", set())):
        if dense:
            monkeypatch.setitem(linecache.cache, file, (len(text), None, text.splitlines(True), file))
        space: dict = {"nn": nn, "__name__": "__main__"}
        exec(compile(text, file, "exec"), space)
        model = space["Made"]()
        model.a, model.b = nn.Linear(32, 32), nn.Linear(32, 32)
        assert kept(quantize_nf4(model, progress=False)) == dense


def lora(model: nn.Module, *names: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(names)))


def test_the_base_of_an_adapted_layer_is_read_too() -> None:
    model = quantize_nf4(lora(Reads(), "plain", "dtype", "deep"), blocksize=32, progress=False).base_model.model
    assert type(model.plain.base_layer) is NF4Linear and type(model.inner.deep.base_layer) is nn.Linear
    assert type(model.dtype.base_layer) is nn.Linear and type(model.whole) is nn.Linear


def test_the_layers_of_an_adapter_stay_dense() -> None:
    """The layers of learned prompts, prefixes and bottleneck adapters, and X-LoRA's classifier, are trained."""
    llama = hf.LlamaConfig(**SMALL, num_key_value_heads=2)
    common = {"num_virtual_tokens": 2, "encoder_hidden_size": 32, "task_type": "CAUSAL_LM"}
    for config in (peft.PromptEncoderConfig(**common), peft.PrefixTuningConfig(**common, prefix_projection=True)):
        model = peft.get_peft_model(hf.LlamaForCausalLM(llama), config)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        quantize_nf4(model, blocksize=32, progress=False)
        assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert isinstance(model.base_model.model.layers[0].self_attn.q_proj, NF4Linear)
        model(input_ids=torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)

    config = peft.XLoraConfig(hidden_size=32, adapters={"a": "a"}, xlora_depth=2, xlora_size=32)
    classifier = peft.tuners.xlora.classifier.XLoraClassifier(nn.Linear(32, 32), config, 1, 1, torch.device("cpu"))
    prefix = PrefixEncoder(1, 2, 16, 2, projection=True, hidden_size=32, token_dim=32)
    model = nn.Sequential(nn.Linear(32, 32), classifier, prefix, BottleneckAdapter(32, 32))
    layers = {name for name in kept(model) if name != "0"}
    assert kept(quantize_nf4(model, progress=False)) == layers and len(layers) == 6
    assert kept(quantize_packed(model, progress=False)) == layers


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


@pytest.mark.parametrize("name", ["LongT5", "Switch"])
def test_a_model_that_is_adapted_before_it_is_quantized_computes(name: str) -> None:
    model = quantize_nf4(lora(MODELS[name](), "wi", "wi_0", "wo", "q"), blocksize=32, progress=False).eval()
    assert any(path.endswith("wo.base_layer") for path in kept(model))
    assert not any(path.endswith("q.base_layer") for path in kept(model))
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        assert model(input_ids=ids, decoder_input_ids=ids).logits.isfinite().all()


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


def test_experts_are_left_by_names_with_dots() -> None:
    model = quantize_nf4(MODELS["Qwen2-MoE"](), blocksize=32, skip=["layers.0.mlp.experts"], progress=False)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert not isinstance(first, NF4Experts) and isinstance(second, NF4Experts)
