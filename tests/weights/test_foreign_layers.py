"""Tests PEFT's LoRA over quantized layers of GPTQModel, hqq and transformers, whose packed weights operators read."""

from __future__ import annotations

import copy
from typing import Any

import packed_checkpoints as pc
import pytest
import torch
from format_libraries import format_library
from packed_weights import packed_weight
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import Tensor, nn

import peft_ext
from peft_ext.integrations.adapter_layers.base import weight_of
from peft_ext.reference.formats import decoded
from peft_ext.weights.int_groups import from_awq, from_gptq

N, K = 48, 64


class TorchLinear(nn.Module):
    """Has the attributes, and computes the function, of GPTQModel's layer of this name."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        for name, tensor in pc.gptq(torch.empty(N, K)).items():
            self.register_buffer(name, tensor.bfloat16() if name == "scales" else tensor)
        self.register_buffer("bias", torch.randn(N).bfloat16() if bias else None)
        self.bits, self.group_size, self.in_features, self.out_features, self.adapter = 4, 32, K, N, None
        self.pack_dtype = torch.int32

    def qzero_format(self) -> int:
        return 2

    def forward(self, x: Tensor) -> Tensor:
        y = x @ decoded(from_gptq(self), x.dtype).t()
        return y if self.bias is None else y + self.bias


TorchLinear.__module__, TorchLinear.__qualname__ = "gptqmodel.nn_modules.qlinear.torch", "TorchLinear"


def adapted(base: nn.Module) -> Any:
    config = LoraConfig(r=4, init_lora_weights=False)
    return nn.Sequential(GPTQLoraLinear(base, "default", config, r=4, lora_alpha=8))


@pytest.mark.parametrize("bias", [False, True])
def test_lora_over_gptqmodel_is_fused(bias: bool) -> None:
    torch.manual_seed(0)
    stock = adapted(TorchLinear(bias))
    fused = peft_ext.accelerate(copy.deepcopy(stock))
    (row,) = peft_ext.explain(fused).rows
    assert row.fused and row.kind == "LoRA over TorchLinear" and row.reason == ""
    x, grad = torch.randn(5, K).bfloat16(), torch.randn(5, N).bfloat16()
    results = [model(x) for model in (stock, fused)]
    step = torch.finfo(torch.bfloat16).eps
    assert (results[0] - results[1]).abs().max() <= 2 * step * results[0].abs().max()
    for one in results:
        one.backward(grad)
    for one, other in zip(stock.parameters(), fused.parameters(), strict=True):
        if one.requires_grad:
            assert (one.grad - other.grad).abs().max() <= 4 * step * one.grad.abs().max()


def test_the_weight_is_read_again_if_the_layer_s_tensors_change() -> None:
    base = TorchLinear()
    first = weight_of(base)
    assert weight_of(base) is first and first.parts[0].data_ptr() == base.qweight.data_ptr()
    base.qzeros = base.qzeros.clone()
    assert weight_of(base) is not first
    assert torch.equal(weight_of(base).dequantize(), first.dequantize())


def test_what_is_not_known_stays_stock() -> None:
    class Other(TorchLinear):
        pass

    def reason_of(base: nn.Module) -> str:
        (row,) = peft_ext.explain(peft_ext.accelerate(adapted(base))).rows
        assert not row.fused
        return row.reason

    assert reason_of(Other()).startswith("its base layer is a Other, wanted Linear, Conv1D")
    layer = TorchLinear()
    layer.adapter = object()
    assert reason_of(layer).startswith("its base layer has an adapter of its own")
    layer = TorchLinear()
    layer.bits = 3
    assert "bits of gptq is 3" in reason_of(layer)


def test_an_input_of_another_dtype_runs_the_layer_s_own_forward() -> None:
    torch.manual_seed(0)
    stock = adapted(TorchLinear(bias=False))
    fused = peft_ext.accelerate(copy.deepcopy(stock))
    x = torch.randn(5, K)
    assert torch.equal(fused(x), stock(x))


def test_lora_over_hqq_is_fused() -> None:
    quantize = format_library("hqq.core.quantize")
    torch.manual_seed(0)
    base = quantize.HQQLinear(nn.Linear(K, N), quantize.BaseQuantizeConfig(nbits=4, group_size=64, axis=1),
                              compute_dtype=torch.bfloat16, device="cpu")  # fmt: skip
    model = get_peft_model(nn.Sequential(base), LoraConfig(target_modules=["0"], r=4, init_lora_weights=False))
    x = torch.randn(5, K).bfloat16()
    wanted = model(x)
    peft_ext.accelerate(model)
    assert all(row.fused for row in peft_ext.explain(model).rows)
    assert (model(x) - wanted).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()


# --- AWQ --------------------------------------------------------------------------------------------------------------


class AwqTorchLinear(nn.Module):
    """Has the attributes, and computes the function, of GPTQModel's layer of this name."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        for name, tensor in pc.awq(torch.empty(N, K)).items():
            self.register_buffer(name, tensor.to(dtype) if name == "scales" else tensor)
        self.register_buffer("bias", torch.randn(N).to(dtype))
        self.bits, self.group_size, self.in_features, self.out_features, self.adapter = 4, 32, K, N, None

    def forward(self, x: Tensor) -> Tensor:
        self.scales, self.bias = self.scales.to(x.dtype), self.bias.to(x.dtype)  # as GPTQModel's layer does
        return x @ decoded(from_awq(self), x.dtype).t() + self.bias


AwqTorchLinear.__module__, AwqTorchLinear.__qualname__ = "gptqmodel.nn_modules.qlinear.torch_awq", "AwqTorchLinear"


def check_fused(stock: Any, x: Tensor, kind: str) -> Any:
    """Compares the output and the gradients of an accelerated copy with those of PEFT."""
    fused = peft_ext.accelerate(copy.deepcopy(stock))
    (row,) = peft_ext.explain(fused).rows
    assert row.fused and row.kind == kind and row.reason == ""
    results = [model(x) for model in (stock, fused)]
    # The sums of float32 differ by their order, those of bfloat16 by the last rounding.
    step = 1e-5 if x.dtype is torch.float32 else torch.finfo(x.dtype).eps
    assert results[0].dtype is results[1].dtype
    assert (results[0] - results[1]).abs().max() <= 2 * step * results[0].abs().max()
    for one in results:
        one.backward(torch.linspace(-1, 1, one.numel()).view(one.shape).to(one.dtype))
    for one, other in zip(stock.parameters(), fused.parameters(), strict=True):
        if one.requires_grad:
            assert (one.grad - other.grad).abs().max() <= 4 * step * one.grad.abs().max()
    return fused


def test_lora_over_gptqmodel_s_awq_layer_is_fused() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False)
    stock = nn.Sequential(AwqLoraLinear(AwqTorchLinear(), "default", config, r=4, lora_alpha=8))
    check_fused(stock, torch.randn(5, K).bfloat16(), "LoRA over AwqTorchLinear")


def test_the_first_call_of_gptqmodel_s_awq_layer_casts_its_scales() -> None:
    """GPTQModel's layer rounds its scales to the dtype of the first input. The calls after that one are fused."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False)
    stock = nn.Sequential(AwqLoraLinear(AwqTorchLinear(torch.float16), "default", config, r=4, lora_alpha=8))
    fused, x = peft_ext.accelerate(copy.deepcopy(stock)), torch.randn(5, K).bfloat16()
    wanted = stock(x)
    assert torch.equal(fused(x), wanted) and fused[0].base_layer.scales.dtype is torch.bfloat16
    assert (fused(x) - wanted).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()


# --- transformers' layers over the blocks of a GGUF file --------------------------------------------------------------


def gguf_layer(type: str, bias: bool = False) -> Any:
    utils = pytest.importorskip("transformers.integrations.gguf.utils")
    weight = packed_weight(type, N, 256, torch.Generator().manual_seed(0))
    layer = utils.GgufLinear(256, N, weight.format.number - 64, bias)
    layer.weight.data = weight.parts[0].reshape(N, -1)
    if bias:
        layer.bias.data.normal_()
    return layer


def over_gguf(layer: nn.Module) -> Any:
    """Returns a model with LoRA over ``layer``. PEFT does not know the class, so it is registered as a custom
    module."""
    config = LoraConfig(target_modules=["0"], r=4, init_lora_weights=False)
    config._register_custom_module({type(layer): lora.Linear})
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(layer), config)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("type", ["Q4_K", "Q8_0"])
def test_lora_over_transformers_gguf_layer_is_fused(type: str, bias: bool) -> None:
    model = over_gguf(gguf_layer(type, bias))
    torch.manual_seed(1)
    fused = check_fused(model, torch.randn(20, 256), "LoRA over GgufLinear")
    base = fused.base_model.model[0].base_layer
    assert weight_of(base).parts[0].data_ptr() == base.weight.data_ptr()


def test_a_gguf_layer_that_permutes_its_input_runs_its_own_forward() -> None:
    layer = gguf_layer("Q4_K")
    layer.input_permutation = torch.arange(255, -1, -1)
    stock = over_gguf(layer)
    model, x = peft_ext.accelerate(copy.deepcopy(stock)), torch.randn(20, 256)
    (row,) = peft_ext.explain(model).rows
    assert row.reason == "the adapter's part: its base layer permutes its input"
    assert (model(x) - stock(x)).abs().max() <= 1e-5 * stock(x).abs().max()


def test_layers_of_other_libraries_are_named_as_stock() -> None:
    """PEFT's layer over AQLM's weights stands for those over EETQ, Intel's and torchao's."""
    config = LoraConfig(r=4, init_lora_weights=False)
    base = nn.Linear(K, N)
    base.codes = nn.Parameter(torch.zeros(N, K))  # PEFT's layer names its parameters so
    model = peft_ext.accelerate(nn.Sequential(AqlmLoraLinear(base, "default", config, r=4, lora_alpha=8)))
    row = next(row for row in peft_ext.explain(model).rows if row.name == "0")
    assert not row.fused and row.reason
