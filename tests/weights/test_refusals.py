"""Tests what packed weights and packed layers refuse: parts of a wrong shape, and PEFT's code that needs a dense
weight."""

from __future__ import annotations

from pathlib import Path

import packed_checkpoints as pc
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import peft_ext
from peft_ext.weights.fp8 import fp8
from peft_ext.weights.int_groups import int_rows


def test_transposed_scales_and_zero_points_are_refused() -> None:
    codes = torch.zeros(256, 128).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"scales of fp8 has shape \(1, 2\), wanted \(2, 1\) for shape \(256, 128\)"):
        fp8(codes, torch.ones(1, 2))
    fp8(codes, torch.ones(2))  # a flat tensor is in the order of the blocks
    words = torch.zeros(8, 16, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"scales of int is \[4, 8\], wanted \[8, 4\]"):
        int_rows(words, torch.ones(4, 8), (8, 128))
    with pytest.raises(ValueError, match=r"zero_points of int is \[4, 1\], wanted \[1, 4\]"):
        int_rows(words, torch.ones(8, 4), (8, 128), zero_points=torch.zeros(4, 1, dtype=torch.int32))


def test_peft_s_own_code_over_packed_experts_says_what_to_do(tmp_path: Path) -> None:
    path = pc.write_mixture(tmp_path, "fp8")
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=peft_ext.PackedConfig())
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=parameters))
    tokens = torch.arange(9)[None]
    with pytest.raises(RuntimeError, match=r"Experts: .* gate_up_proj is packed, wanted peft_ext.accelerate\(model\)"):
        model(tokens)
    assert peft_ext.accelerate(model)(tokens).logits.isfinite().all()


def test_a_state_dict_of_wrong_bytes_is_one_error_and_changes_nothing() -> None:
    layer = peft_ext.quantize_packed(nn.Sequential(nn.Linear(64, 32)), "mxfp4", progress=False)[0]
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"weight_packed is torch.float32 \(32, 32\), wanted torch.uint8") as caught:
        layer.load_state_dict({**before, "weight_packed": before["weight_packed"].float()})
    assert "Missing" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_packed_layer_is_not_trained_by_modules_to_save() -> None:
    """PyTorch lets 8-bit float codes require a gradient, which they never get."""
    model = peft_ext.quantize_packed(nn.ModuleDict({"q": nn.Linear(64, 64), "v": nn.Linear(64, 64)}), "fp8")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q"], modules_to_save=["v"]))
    layer = adapted.base_model.model["v"]
    with pytest.raises(RuntimeError, match=r"PackedLinear: the codes of a packed weight \(fp8\) require grad"):
        layer(torch.randn(2, 64))
