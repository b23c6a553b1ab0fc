"""Tests PackedLinear, PackedEmbedding and PackedExperts: forward, gradients, state dict, casts, attributes for PEFT."""

from __future__ import annotations

import copy
import pickle

import packed_checkpoints as pc
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn

import peft_ext
from peft_ext.integrations.packed.layouts import LAYOUTS
from peft_ext.integrations.packed.rules import Scheme, read_rules
from peft_ext.nn import PackedEmbedding, PackedLinear
from peft_ext.reference.formats import decoded
from peft_ext.weights.mx import mxfp4

N, K = 48, 64


def scheme_of(case: str) -> Scheme:
    (scheme,) = read_rules(pc.CASES[case][0]).schemes.values()
    return scheme


def linear(case: str, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> PackedLinear:
    """Returns a layer whose tensors are those that a checkpoint of the layout ``case`` stores."""
    torch.manual_seed(0)
    scheme, tensors = scheme_of(case), pc.CASES[case][1](torch.empty(N, K))
    weight, names, extra = LAYOUTS[scheme.layout].built(tensors, (N, K), scheme)
    given = torch.randn(N, dtype=dtype) if bias else None
    return PackedLinear.from_packed(weight, names, given, extra=extra, dtype=dtype)


def rows_backwards(tensor: Tensor) -> Tensor:
    if tensor.dim() == 0:
        return tensor
    flat = tensor.view(torch.uint8).reshape(len(tensor), -1).flip(0)
    return flat.view(tensor.dtype).reshape(tensor.shape)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    flat = [tensor.detach().reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other)]
    return one.dtype is other.dtype and one.shape == other.shape and torch.equal(*flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", pc.CASES)
def test_forward_and_gradient_are_those_of_the_decoded_weight(case: str, dtype: torch.dtype) -> None:
    layer = linear(case, dtype=dtype)
    dense = decoded(layer.packed, dtype)
    assert torch.equal(layer.dequantize(), dense) and layer.dequantize().dtype is dtype
    x = torch.randn(5, K, dtype=dtype).requires_grad_()
    wanted = F.linear(x.double(), dense.double(), layer.bias.double())
    y = layer(x)
    y.sum().backward()
    step = torch.finfo(dtype).eps
    assert y.dtype is dtype and (y.double() - wanted).abs().max() <= 2 * step * wanted.abs().max()
    grad = dense.double().sum(0)
    assert (x.grad.double() - grad).abs().max() <= 2 * step * grad.abs().max()
    assert all(tensor.grad is None for tensor in layer.parameters() if tensor is not layer.bias)


@pytest.mark.parametrize("case", pc.CASES)
def test_state_dict_has_the_names_and_bytes_of_the_file(case: str) -> None:
    torch.manual_seed(0)
    tensors = pc.CASES[case][1](torch.empty(N, K))
    layer, other = linear(case, bias=False), linear(case, bias=False)
    assert layer.state_dict().keys() == tensors.keys()
    assert all(same_bytes(layer.state_dict()[name], tensor) for name, tensor in tensors.items())
    changed = {name: rows_backwards(tensor) for name, tensor in tensors.items()}
    before = layer.packed
    layer.load_state_dict(changed)
    assert all(same_bytes(layer.state_dict()[name], tensor) for name, tensor in changed.items())
    assert torch.equal(layer.dequantize(), decoded(layer.packed, torch.bfloat16))
    layer.load_state_dict(other.state_dict(), assign=True)
    assert all(same_bytes(layer.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert not any(parameter.requires_grad for parameter in layer.parameters()) and before is not layer.packed


def test_state_dict_of_another_layout_is_refused() -> None:
    layer = linear("int4")
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"weight_scale is torch.float16 \(48, 2\), wanted torch.bfloat16 \(48, 2\)"):
        layer.load_state_dict({**state, "weight_scale": state["weight_scale"].half()})
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"weight_packed\""):
        layer.load_state_dict({name: tensor for name, tensor in state.items() if name != "weight_packed"})
    with pytest.raises(RuntimeError, match="Unexpected"):
        layer.load_state_dict({**state, "qweight": state["weight_packed"]})


@pytest.mark.parametrize("case", ["fp8", "int4 zeros", "nvfp4", "gptq act-order"])
def test_casts_keep_the_bytes(case: str) -> None:
    layer = linear(case)
    state, weight = copy.deepcopy(layer.state_dict()), layer.packed
    for cast in (nn.Module.half, nn.Module.float, nn.Module.bfloat16, lambda m: m.to(torch.float64)):
        cast(layer)
        assert all(same_bytes(layer.state_dict()[name], state[name]) for name in state if name != "bias")
    assert layer.bias.dtype is torch.float64 and torch.equal(layer.packed.dequantize(), weight.dequantize())
    there = layer.to("meta")
    assert all(tensor.is_meta for tensor in there.state_dict().values()) and there.packed.device.type == "meta"


def test_copies_and_pickles() -> None:
    layer = linear("int4 zeros")
    x = torch.randn(3, K, dtype=torch.bfloat16)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x)) and other.packed.parts[0] is not layer.packed.parts[0]


def test_packed_is_one_object_until_the_tensors_change() -> None:
    layer = linear("fp8")
    first = layer.packed
    assert layer.packed is first and first.parts[0] is layer.weight
    layer.weight_scale_inv = layer.weight_scale_inv * 2
    assert layer.packed is not first
    assert torch.equal(layer.dequantize(torch.float32), 2 * first.dequantize(torch.float32))


def test_what_peft_reads() -> None:
    model = nn.Sequential(linear("int4"), nn.Linear(N, 4, dtype=torch.bfloat16))
    layer = model[0]
    assert layer.weight is layer.weight_packed and layer.W_q is layer.weight_packed
    state = copy.deepcopy(layer.state_dict())
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # casts parameters of 16 bits to float32
    assert all(same_bytes(layer.state_dict()[name], tensor) for name, tensor in state.items() if name != "bias")
    adapted = get_peft_model(nn.Sequential(linear("fp8")), LoraConfig(target_modules=["0"], use_dora=True, r=4))
    lora = adapted.base_model.model[0]
    dense = lora.get_base_layer().dequantize()
    assert lora.lora_A["default"].weight.dtype is torch.float32
    assert torch.equal(lora.lora_magnitude_vector["default"].weight, torch.linalg.norm(dense, dim=1).float())
    peft_ext.accelerate(adapted)
    before = lora.get_base_layer().packed.map(torch.clone)
    with pytest.warns(UserWarning, match=r"merging into a packed weight \(fp8\) quantizes the merged weight again"):
        lora.merge()
    assert 0 < lora.get_base_layer().merge_error < 0.1
    lora.unmerge()
    after = lora.get_base_layer().packed
    assert all(torch.equal(after.tensors()[name].view(torch.uint8), part.view(torch.uint8))
               for name, part in before.tensors().items())  # fmt: skip


@pytest.mark.parametrize("case", ["mxfp4", "int4", "nvfp4"])
def test_embedding_looks_rows_up(case: str) -> None:
    scheme, tensors = scheme_of(case), pc.CASES[case][1](torch.empty(N, K))
    weight, names, extra = LAYOUTS[scheme.layout].built(tensors, (N, K), scheme)
    table = PackedEmbedding.from_packed(weight, names, 3, extra=extra, dtype=torch.float32)
    index = torch.randint(0, N, (2, 7))
    wanted = F.embedding(index, decoded(weight, torch.float32))
    assert torch.equal(table(index), wanted) and table.state_dict().keys() == tensors.keys()
    assert table.padding_idx == 3 and not table.weight.requires_grad


def test_wrong_arguments() -> None:
    weight = mxfp4(torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8))
    with pytest.raises(TypeError, match="PackedLinear: weight is Tensor, wanted a PackedWeight"):
        PackedLinear.from_packed(torch.zeros(2, 2), ())
    with pytest.raises(ValueError, match=r"names is \('weight_packed', None\), wanted one name for each of"):
        PackedLinear.from_packed(weight, ("weight_packed",))
    stack = mxfp4(torch.zeros(2, 4, 32, dtype=torch.uint8), torch.zeros(2, 4, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"weight has shape \(2, 4, 64\), wanted \(N, K\)"):
        PackedLinear.from_packed(stack, ("weight_packed", "weight_scale"))
