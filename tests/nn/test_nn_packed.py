"""Tests the adapted layers over a PackedLinear, merging into packed weights, and dequantize_packed."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from packed_formats import EACH_FORMAT
from torch import nn

import peft_ext
from peft_ext.nn import AdaLoRALinear, DoRALinear, IA3Linear, LoRALinear, PackedExperts, PackedLinear
from peft_ext.weights.int_groups import gptq
from peft_ext.weights.quantizers import quantized

ADAPTED = {
    "lora": (LoRALinear, {"r": 4}, "lora_B"), "dora": (DoRALinear, {"r": 4}, "lora_B"),
    "adalora": (AdaLoRALinear, {"r": 4}, "lora_E"), "ia3": (IA3Linear, {}, "ia3_l"),
    "ia3 input": (IA3Linear, {"feedforward": True}, "ia3_l"),
}  # fmt: skip
KIND = pytest.mark.parametrize("kind", ADAPTED)


def packed_linear(format: str, dtype: torch.dtype = torch.float32) -> PackedLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, dtype=dtype))
    return peft_ext.quantize_packed(model, format, progress=False)[0]


def adapted(kind: str, base: nn.Module) -> nn.Module:
    cls, own, last = ADAPTED[kind]
    module = cls.from_linear(base, **own).eval()
    with torch.no_grad():
        getattr(module, last).add_(0.1 * torch.randn_like(getattr(module, last)))
    return module


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


@KIND
@EACH_FORMAT
def test_an_adapted_layer_is_its_merged_weight(kind: str, format: str) -> None:
    module = adapted(kind, packed_linear(format))
    x = torch.randn(5, 64)
    merged = module.merged_weight(module.base_layer.dequantize(torch.float32))
    wanted = nn.functional.linear(x, merged, module.merged_bias(module.base_layer.bias))
    torch.testing.assert_close(module(x), wanted, rtol=1e-5, atol=1e-5)
    module(x).sum().backward()
    assert getattr(module, ADAPTED[kind][2]).grad.abs().sum() > 0
    assert all(p.grad is None for p in module.base_layer.parameters())


@KIND
@EACH_FORMAT
def test_merge_requantizes_and_unmerge_restores_all_bits(kind: str, format: str) -> None:
    module = adapted(kind, packed_linear(format, torch.bfloat16))
    x, before = torch.randn(5, 64, dtype=torch.bfloat16), bits(module)
    y, dense = module(x), module.merged_weight(module.base_layer.dequantize(torch.float32))
    module.merge()
    held = module.base_layer.packed
    error = (held.dequantize(torch.float32) - dense).norm() / dense.norm()
    assert module.merged and module.base_layer.merge_error == pytest.approx(error.item(), rel=1e-4)
    assert 0 < error < (0.05 if format == "fp8" else 0.2)
    assert held.tensors().keys() == quantized(dense, format).tensors().keys()
    assert (module(x) - y).norm() <= 0.2 * y.norm()
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    module.unmerge()
    assert torch.equal(module(x), y) and not hasattr(module.base_layer, "merge_error")
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def unpickled(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
@EACH_FORMAT
def test_a_copy_merges_as_the_layer(format: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    module = adapted("lora", packed_linear(format))
    other = copied(module)
    assert other.base_layer.format is module.base_layer.format
    module.merge()
    other.merge()
    assert torch.equal(other.base_layer.dequantize(), module.base_layer.dequantize())


@EACH_FORMAT
def test_a_merge_leaves_a_tied_layer_as_it_is(format: str) -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(64, 48))
    model[1].weight = model[0].weight
    peft_ext.quantize_packed(model, format, progress=False)
    assert model[0].weight is model[1].weight
    module, before = adapted("lora", model[0]), model[1].dequantize()
    module.merge()
    assert torch.equal(model[1].dequantize(), before) and not torch.equal(model[0].dequantize(), before)
    module.unmerge()
    assert torch.equal(model[0].dequantize(), before)
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr() and not model[0].weight.requires_grad


def without_a_quantizer() -> PackedLinear:
    qweight, qzeros = torch.randint(0, 2**31, (8, 32), dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int32)
    weight = gptq(qweight, qzeros, torch.rand(2, 32).half(), group=32)
    return PackedLinear.from_packed(weight, ("qweight", "scales", "qzeros"))


def test_a_layout_without_a_quantizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = LoRALinear.from_linear(without_a_quantizer(), r=2)
    before = bits(module)
    monkeypatch.setattr("peft_ext.weights.packed.PackedWeight.dequantize", lambda self, dtype: torch.zeros(self.shape))
    with pytest.raises(RuntimeError, match=r"packed \(gptq, groups of 32 columns\).*no quantizer.*dequantize_packed"):
        module.merge()
    assert not module.merged
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@EACH_FORMAT
def test_peft_layers_merge_into_packed_weights(format: str, changes: dict) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))
    peft_ext.quantize_packed(model, format, progress=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False,
                                                         **changes))  # fmt: skip
    peft_ext.accelerate(adapted).eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        y, before = adapted(x), bits(adapted)
        with pytest.warns(UserWarning, match="quantizes the merged weight again.*dequantize_packed"):
            adapted.merge_adapter()
        assert (adapted(x) - y).norm() < 0.5 * y.norm() and not torch.equal(adapted(x), y)
        assert "requantizing moved its weight by" in str(peft_ext.explain(adapted))
        with pytest.raises(ValueError, match="dequantize_packed: .* has a merged adapter"):
            peft_ext.dequantize_packed(adapted, progress=False)
        adapted.unmerge_adapter()
        assert torch.equal(adapted(x), y)
        assert all(torch.equal(value, before[key]) for key, value in adapted.state_dict().items())
        peft_ext.dequantize_packed(adapted, progress=False)
        torch.testing.assert_close(adapted(x), y, rtol=1e-4, atol=1e-4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapted.merge_adapter()
        torch.testing.assert_close(adapted(x), y, rtol=1e-4, atol=1e-4)


@EACH_FORMAT
def test_dequantize_packed_makes_the_decoded_layers(format: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16), nn.Linear(64, 64, dtype=torch.bfloat16))
    model[1].weight = model[0].weight
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    peft_ext.quantize_packed(model, format, progress=False)
    wanted, x = model[0].packed.dequantize(torch.bfloat16), torch.randn(2, 64, dtype=torch.bfloat16)
    peft_ext.dequantize_packed(model, progress=False)
    assert [type(layer) for layer in model] == [nn.Linear] * 2 and model[0].weight is model[1].weight
    assert torch.equal(model[0].weight, wanted) and not model[0].weight.requires_grad
    assert not {"names", "_template", "compute_dtype"} & vars(model[0]).keys()
    model(x)
    assert seen == [1]
    peft_ext.quantize_packed(model, format, progress=False)
    assert peft_ext.dequantize_packed(model, dtype=torch.float32, progress=False)[0].weight.dtype is torch.float32


@EACH_FORMAT
def test_dequantize_packed_makes_dense_experts(format: str) -> None:
    pytest.importorskip("transformers")
    from packed_checkpoints import config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config("qwen3_moe")).eval()
    names = set(model.state_dict())
    peft_ext.quantize_packed(model, format, progress=False)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        peft_ext.dequantize_packed(model, progress=False)
        assert not any(isinstance(module, (PackedLinear, PackedExperts)) for module in model.modules())
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == names


def test_dequantize_packed_refuses_by_name() -> None:
    layer = packed_linear("mxfp4")
    with pytest.raises(TypeError, match="dequantize_packed: model is a PackedLinear"):
        peft_ext.dequantize_packed(layer)
    with pytest.warns(UserWarning, match="dequantize_packed: Linear has no PackedLinear to replace"):
        peft_ext.dequantize_packed(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="dequantize_packed: 0.weight is on the meta device"):
        peft_ext.dequantize_packed(nn.Sequential(copy.deepcopy(layer).to("meta")))
