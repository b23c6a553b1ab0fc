"""Tests that no fused layer computes with a parameter that DeepSpeed's ZeRO-3 has partitioned.

The parameters have the attributes that DeepSpeed 0.19 gives them. A partitioned parameter is empty.
tests/distributed/checks_deepspeed.py runs DeepSpeed itself.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from packed_weights import fitting, packed_weight
from peft import LoraConfig, get_peft_model
from peft_models import BASES, METHODS, MLP, llama, make_method
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import peft_ext
from peft_ext.integrations.adapter_layers.reasons import is_partitioned
from peft_ext.nn import NF4Linear, PackedLinear

AVAILABLE, NOT_AVAILABLE = SimpleNamespace(name="AVAILABLE"), SimpleNamespace(name="NOT_AVAILABLE")


def partition(parameter, leaf=None):
    """Makes a parameter as ZeRO-3 leaves it outside of its module's forward, and returns the whole values."""
    whole = parameter.data
    parameter.ds_id, parameter.ds_shape, parameter.ds_status = 0, whole.shape, NOT_AVAILABLE
    if leaf is not None:
        parameter.ds_z3_leaf_module = leaf
    parameter.data = torch.empty(0, dtype=whole.dtype)
    return whole


def gather(parameter, whole):
    parameter.data, parameter.ds_status = whole, AVAILABLE


def layer_of(method, base):
    torch.manual_seed(0)
    model = peft_ext.accelerate(make_method(method, base).eval())
    return model, model.base_model.model.up


def parameters_of(layer):
    return {name: parameter for name, parameter in layer.named_parameters() if "ranknum" not in name}


@pytest.mark.parametrize("base", [base for base in BASES if "bfloat16" not in base])
@pytest.mark.parametrize("method", METHODS)
def test_a_partitioned_parameter_is_no_operand(method, base):
    model, layer = layer_of(method, base)
    x = torch.randn(3, layer.in_features)
    for name in parameters_of(layer):
        model, layer = layer_of(method, base)
        wanted = layer._fused(x)  # an equal call was accepted before the parameter was partitioned
        assert wanted is not None
        parameter = parameters_of(layer)[name]
        whole = partition(parameter)
        assert is_partitioned(parameter)
        assert layer._fused(x) is None, name
        assert "is a shard" in layer.stock_reason(), (name, layer.stock_reason())
        gather(parameter, whole)  # gathered for the parameter's own module alone, not for the adapter layer
        assert layer._fused(x) is None, name


@pytest.mark.parametrize("base", [base for base in BASES if "bfloat16" not in base])
@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_a_leaf_module_are_operands_while_gathered(method, base):
    model, layer = layer_of(method, base)
    x = torch.randn(3, layer.in_features)
    wanted = layer._fused(x)
    whole = [(parameter, partition(parameter, model)) for parameter in layer.parameters()]
    model._z3_leaf = True
    rows = [row for row in peft_ext.explain(model).rows if row.name.endswith("up")]
    assert rows and all(row.fused for row in rows), rows  # explain tells what the forward of the model does
    assert "is a shard" in layer.stock_reason() and layer._fused(x) is None
    for parameter, values in whole:
        gather(parameter, values)
    assert layer.stock_reason() is None
    assert torch.equal(layer._fused(x), wanted)
    whole[-1][0].ds_status = SimpleNamespace(name="INFLIGHT")
    assert layer._fused(x) is None


def test_siblings_with_a_partitioned_parameter_are_not_joined():
    model = peft_ext.accelerate(llama()).train()
    attention = model.get_base_model().model.layers[0].self_attn
    partition(attention.k_proj.base_layer.weight)
    assert attention.q_proj.joint_state() is not None and attention.k_proj.joint_state() is None


def test_heads_and_norms_of_partitioned_parameters_stay_stock():
    model = peft_ext.accelerate(llama()).train()
    base = model.get_base_model()
    head, norm = base.lm_head, base.model.norm
    whole = partition(head.weight, base)
    gather(head.weight, whole)
    assert head.head_reason() == "ZeRO-3 frees its weight after the forward"
    partition(norm.weight)
    (row,) = (row for row in peft_ext.explain(model).blocks if row.name.endswith("model.norm"))
    assert not row.fused and "is a shard" in row.reason


def test_an_nf4_layer_refuses_partitioned_codes():
    layer = NF4Linear.from_linear(nn.Linear(64, 32))
    x = torch.randn(2, 64)
    wanted = layer(x)
    whole = partition(layer.weight)
    for call in (lambda: layer(x), layer.dequantize, lambda: layer.nf4):
        with pytest.raises(RuntimeError, match=r"NF4Linear: weight is \(0,\), partitioned by ZeRO-3, .*\(32, 64\)"):
            call()
    gather(layer.weight, whole)
    assert torch.equal(layer(x), wanted)


def test_the_codes_are_freed_between_forward_and_backward():
    torch.manual_seed(0)
    layer = NF4Linear.from_linear(nn.Linear(64, 32))
    other, x = copy.deepcopy(layer), torch.randn(2, 64, requires_grad=True)
    (wanted,) = torch.autograd.grad(other(x).square().sum(), x)
    whole = partition(layer.weight)
    gather(layer.weight, whole.clone())
    y = layer(x).square().sum()
    layer.weight.data.zero_()  # ZeRO-3 frees the gathered values here
    partition(layer.weight)
    gather(layer.weight, whole)
    (found,) = torch.autograd.grad(y, x)
    assert torch.equal(found, wanted)


def packed_layer(kind):
    weight = packed_weight(kind, *fitting(kind, 32, 64), torch.Generator().manual_seed(0), dtype=torch.float32)
    names = ["codes", *(None if part is None else f"part{i}" for i, part in enumerate(weight.parts[1:]))]
    return PackedLinear.from_packed(weight, names)


# Formats whose codes are uint8, int32, 8-bit floats and int8.
PACKED = ("mxfp4", "int4", "gptq", "fp8", "int8-rows", "Q4_0")


@pytest.mark.parametrize("kind", PACKED)
def test_partitioned_codes_are_not_decoded(kind):
    layer = packed_layer(kind)
    x = torch.randn(2, layer.in_features)
    wanted = layer(x)  # an equal call was accepted before the codes were partitioned
    whole = partition(layer.codes)
    size = rf"\({layer.out_features}, {layer.in_features}\)"
    for call in (lambda: layer(x), layer.dequantize, lambda: layer.packed):
        with pytest.raises(RuntimeError, match=rf"PackedLinear: codes is \(0,\), partitioned by ZeRO-3, .* {size}"):
            call()
    gather(layer.codes, whole)
    assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("kind", PACKED)
def test_packed_codes_are_freed_between_forward_and_backward(kind):
    layer = packed_layer(kind)
    other, x = copy.deepcopy(layer), torch.randn(2, layer.in_features, requires_grad=True)
    (wanted,) = torch.autograd.grad(other(x).square().sum(), x)
    whole = partition(layer.codes)
    gather(layer.codes, whole.clone())
    kept = StorageWeakRef(layer.codes.untyped_storage())
    y = layer(x).square().sum()
    partition(layer.codes)
    is_freed = kept.expired()
    gather(layer.codes, whole)
    (found,) = torch.autograd.grad(y, x)
    assert torch.equal(found, wanted)
    # PyTorch has no operator that reads 8-bit floats, so that the kernels get a view, which autograd keeps.
    assert is_freed or whole.dtype not in (torch.uint8, torch.int32)


def test_an_adapter_over_partitioned_codes_is_not_fused():
    model = MLP()
    model.up = packed_layer("mxfp4")
    model = peft_ext.accelerate(get_peft_model(model, LoraConfig(target_modules=["up"])))
    layer = model.base_model.model.up
    x = torch.randn(3, layer.in_features)
    wanted = layer._fused(x)
    whole = [(parameter, partition(parameter, model)) for parameter in layer.parameters()]
    assert layer._fused(x) is None and "is a shard" in layer.stock_reason()
    model._z3_leaf = True
    assert all(row.fused for row in peft_ext.explain(model).rows)  # explain tells what the forward of the model does
    for parameter, values in whole:
        gather(parameter, values)
    assert torch.equal(layer._fused(x), wanted)


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_a_partitioned_weight_is_not_merged(base):
    model, layer = layer_of("LoRA", base)
    whole = partition(layer.base_layer.weight)
    with pytest.raises(RuntimeError, match=r"merge: base_layer.weight is \(0,\), partitioned by ZeRO-3"):
        model.merge_adapter()
    assert not layer.merged
    gather(layer.base_layer.weight, whole)
    model.merge_adapter()
    assert layer.merged


def test_a_partitioned_weight_is_not_quantized():
    model = llama().get_base_model()
    partition(model.model.layers[0].mlp.up_proj.base_layer.weight)
    with pytest.raises(ValueError, match="partitioned by ZeRO-3, quantize before"):
        peft_ext.quantize_nf4(model, progress=False)
