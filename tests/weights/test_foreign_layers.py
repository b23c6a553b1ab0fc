"""PEFT's LoRA over GPTQModel's and hqq's layers, whose packed weights the operators read where they lie."""

from __future__ import annotations

import copy
from typing import Any

import packed_checkpoints as pc
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import Tensor, nn

import peft_ext
from peft_ext.integrations.adapter_layers.base import weight_of
from peft_ext.reference.formats import decoded
from peft_ext.weights.int_groups import from_gptq

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
    quantize = pytest.importorskip("hqq.core.quantize")
    from peft import get_peft_model

    torch.manual_seed(0)
    base = quantize.HQQLinear(nn.Linear(K, N), quantize.BaseQuantizeConfig(nbits=4, group_size=64, axis=1),
                              compute_dtype=torch.bfloat16, device="cpu")  # fmt: skip
    model = get_peft_model(nn.Sequential(base), LoraConfig(target_modules=["0"], r=4, init_lora_weights=False))
    x = torch.randn(5, K).bfloat16()
    wanted = model(x)
    peft_ext.accelerate(model)
    assert all(row.fused for row in peft_ext.explain(model).rows)
    assert (model(x) - wanted).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()
