"""Tests checkpoints loaded with PackedConfig(activation_scheme="dynamic"), and adapters over Float8Linear."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import packed_checkpoints as pc
import pytest
import torch
import transformers
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import peft_ext
from peft_ext.integrations.packed.rules import DYNAMIC, read_rules
from peft_ext.nn import Float8Linear, PackedExperts, PackedLinear
from peft_ext.reference import float8_linear

TOKENS = torch.arange(18).reshape(2, 9) * 5 % pc.VOCAB


def inputs(**fields: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, **fields}


def with_inputs(path: Path, given: dict[str, Any]) -> Path:
    """Adds quantized inputs to the config of a checkpoint of compressed-tensors."""
    about = json.loads((path / "config.json").read_text())
    about["quantization_config"]["config_groups"]["group_0"]["input_activations"] = given
    (path / "config.json").write_text(json.dumps(about))
    return path


def written(path: Path, case: str, kind: str = "llama") -> Path:
    pc.write(path, case, kind)
    return with_inputs(path, inputs(strategy="token")) if case == "float8" else path


def load(path: Path, scheme: str | None = "dynamic", **options: Any) -> Any:
    config = peft_ext.PackedConfig(activation_scheme=scheme)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, **options)


class Reference(nn.Module):
    """A Float8Linear in plain PyTorch."""

    def __init__(self, layer: Float8Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return float8_linear(x, self.layer.packed, self.layer.bias)


@pytest.mark.parametrize(("case", "columns"), [("fp8", " and 32 columns"), ("float8", "")])
def test_the_layers_quantize_their_input_only_if_asked(case: str, columns: str, tmp_path: Path) -> None:
    path = written(tmp_path / "model", case)
    plain, model = (load(path, scheme, dtype=torch.float32) for scheme in (None, "dynamic"))
    assert type(plain.model.layers[0].mlp.up_proj) is PackedLinear and plain.model.layers[0].mlp.up_proj.note == DYNAMIC
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 14 and {type(layer) for layer in layers} == {Float8Linear}
    note = f"its input is quantized to 8-bit floats (e4m3), with a scale for each token{columns}"
    assert {layer.note for layer in layers} == {note}
    rows = peft_ext.explain(model).rows
    assert len(rows) == 14 and all(row.kind == "Float8Linear (fp8)" and note in row.reason for row in rows)
    logits = model(TOKENS).logits
    assert (plain(TOKENS).logits - logits).abs().max() > 1e-3 * logits.abs().max()
    right = copy.deepcopy(model)
    for name, layer in list(right.named_modules()):
        if isinstance(layer, Float8Linear):
            right.set_submodule(name, Reference(layer))
    assert (right(TOKENS).logits - logits).abs().max() <= 1e-2 * logits.abs().max()
    before = right.model.layers[0].self_attn.q_proj(x := torch.randn(3, pc.HIDDEN))
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj(x), before)
    model.save_pretrained(tmp_path / "again")
    one, other = pc.stored(path), pc.stored(tmp_path / "again")
    assert one.keys() == other.keys()
    for name in one:
        if "norm" not in name and "embed" not in name and "lm_head" not in name:  # these are float32 in the model
            assert torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((path / "config.json").read_text())["quantization_config"]
    assert type(load(tmp_path / "again").model.layers[0].mlp.up_proj) is Float8Linear


def test_layers_on_the_disk(tmp_path: Path) -> None:
    path = written(tmp_path / "model", "fp8")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = load(path, device_map=places, offload_folder=tmp_path / "disk")
    layer = model.model.layers[1].mlp.up_proj
    assert layer.weight.is_meta and type(layer) is Float8Linear and "its input is quantized to 8-bit" in layer.note
    assert torch.equal(model(TOKENS).logits, load(path)(TOKENS).logits)


def test_experts_do_not_quantize_their_input_and_say_so(tmp_path: Path) -> None:
    model = load(written(tmp_path, "fp8", "qwen3_moe"))
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, PackedExperts) and experts.note == DYNAMIC
    assert type(model.model.layers[1].self_attn.q_proj) is Float8Linear


METHODS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj", "up_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_adapters_compute_what_stock_peft_computes(method: str, tmp_path: Path) -> None:
    base = load(written(tmp_path, "fp8"), dtype=torch.float32)
    torch.manual_seed(0)
    stock = get_peft_model(base, copy.deepcopy(METHODS[method]))
    for name, parameter in stock.named_parameters():
        if "lora_B" in name or "lora_E" in name:
            nn.init.normal_(parameter, std=0.1)
    fused = peft_ext.accelerate(copy.deepcopy(stock))
    name = "base_model.model.model.layers.0." + ("self_attn.k_proj" if method == "ia3" else "self_attn.q_proj")
    row = next(row for row in peft_ext.explain(fused).rows if row.name == name)
    assert row.kind.endswith("over Float8Linear (fp8)") and "its input is quantized to 8-bit floats" in row.reason
    assert row.fused == (method != "dora") and "Float8Linear runs its own forward" in row.reason
    found = []
    for model in (stock, fused):
        layer, x = model.get_submodule(name), torch.randn(5, pc.HIDDEN, generator=torch.manual_seed(1))
        y = layer(x.requires_grad_())
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, *trained), allow_unused=True)))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    loss = fused(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    assert (loss - stock(input_ids=TOKENS, labels=TOKENS).loss).abs() <= 1e-3
    assert peft_ext.verify(fused, {"input_ids": TOKENS, "labels": TOKENS}).ok


def test_an_adapter_reads_the_unquantized_input_and_merges(tmp_path: Path) -> None:
    base = load(written(tmp_path, "fp8"), dtype=torch.float32)
    model = peft_ext.accelerate(get_peft_model(base, copy.deepcopy(METHODS["lora"])))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    x, below = torch.randn(5, pc.HIDDEN), layer.get_base_layer()
    low_rank = (x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T) * layer.scaling["default"]
    torch.testing.assert_close(layer(x), below(x) + low_rank)
    weight = below.dequantize()
    with pytest.warns(UserWarning, match="quantizes the merged weight again"):
        layer.merge()
    assert type(layer.get_base_layer()) is Float8Linear and not torch.equal(below.dequantize(), weight)
    torch.testing.assert_close(layer(x), float8_linear(x, below.packed))
    layer.unmerge()
    assert torch.equal(below.dequantize(), weight)


# --- which checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "given", "quantizes"),
    [
        ({"strategy": "channel"}, {"strategy": "token"}, True),
        ({"strategy": "tensor"}, {"strategy": "token"}, True),
        ({"strategy": "block", "block_structure": [128, 128]}, {"strategy": "group", "group_size": 128}, True),
        ({"strategy": "block", "block_structure": [128, 128]}, {"strategy": "group", "group_size": 64}, False),
        ({"strategy": "block", "block_structure": [128, 128]}, {"strategy": "token"}, False),
        ({"strategy": "channel"}, {"strategy": "tensor"}, False),
        ({"strategy": "channel"}, {"strategy": "token", "type": "int"}, False),
    ],
)
def test_inputs_with_the_columns_of_the_weights(weights: dict, given: dict, quantizes: bool) -> None:
    config = pc.compressed("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, **weights})
    config["config_groups"]["group_0"]["input_activations"] = inputs(**given)
    (scheme,) = read_rules(config).schemes.values()
    assert scheme.quantizes == quantizes and scheme.note == DYNAMIC
    if not quantizes:
        with pytest.raises(ValueError, match=r"the checkpoint \(compressed-tensors\) has no FP8 layers whose inputs"):
            peft_ext.PackedConfig(config, activation_scheme="dynamic")


@pytest.mark.parametrize("case", ["int4", "float8", "gptq"])
def test_checkpoints_without_quantized_inputs_are_refused(case: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PackedConfig: activation_scheme is 'dynamic', and the checkpoint"):
        load(pc.write(tmp_path, case))
    with pytest.raises(ValueError, match="PackedConfig: activation_scheme is 'static', wanted None or 'dynamic'"):
        peft_ext.PackedConfig(activation_scheme="static")


def test_bitsandbytes_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    AutoModelForCausalLM.from_config(pc.config("llama")).save_pretrained(tmp_path / "dense")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    stock.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"the checkpoint's layers \(bitsandbytes\) quantize no inputs"):
        load(tmp_path / "model")


def test_a_weight_with_one_scale_says_nothing_of_its_inputs() -> None:
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None}
    with pytest.raises(ValueError, match="has no FP8 layers whose inputs are quantized"):
        peft_ext.PackedConfig(config, activation_scheme="dynamic")
    peft_ext.PackedConfig(config | {"weight_block_size": [128, 128]}, activation_scheme="dynamic")
