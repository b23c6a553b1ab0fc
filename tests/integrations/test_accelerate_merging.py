"""Tests of merging the adapters of accelerated models: merges equal PEFT's merges, and adapters merge into NF4 weights,
which stock PEFT can't do."""

import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peft import LoraConfig
from peft.tuners import lora
from peft_models import (
    METHODS,
    assert_identical,
    both,
    config_of,
    dense_twin,
    every_method,
    first,
    inputs,
    make,
    make_method,
    state_of,
    tuners,
)

import peft_ext
from peft_ext.integrations.adapter_layers.base import KEPT
from peft_ext.nn import NF4Linear

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(
    ("method", "base"),
    [
        *((method, base) for method in METHODS for base in ("float32", "bfloat16")),
        # PEFT refuses to merge the other methods into bitsandbytes' layers.
        *((method, base) for method in ("LoRA", "DoRA") for base in ("bnb", "bnb nested")),
    ],
)
def test_merging_is_pefts(method, base, safe):
    stock, fused = both(make_method(method, base).train())
    x = inputs(base)
    for model in (stock, fused):
        model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(fused(x), stock(x), rtol=1.3e-6, atol=1e-5)
    assert all(row.reason.startswith("merged") for row in peft_ext.explain(fused).rows)
    for model in (stock, fused):
        model.unmerge_adapter()
    assert_identical(fused.state_dict(), stock.state_dict())
    assert peft_ext.explain(fused).fused_share == 1.0
    stock, fused = (model.merge_and_unload(safe_merge=safe) for model in (stock, fused))
    torch.testing.assert_close(fused(x), stock(x))
    assert {type(m) for m in peft_ext.restore(fused).modules()} == {type(m) for m in stock.modules()}


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("base", ["nf4", "nf4 bfloat16"])
@every_method
def test_merging_into_nf4_requantizes_and_unmerging_gives_the_bits_back(method, base, safe):
    model = peft_ext.accelerate(make_method(method, base).eval())
    # The expected weight is that of PEFT's own merge in float32.
    twin = dense_twin(peft_ext.restore(copy.deepcopy(model)), torch.float32).float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = inputs(base)
    unmerged, nf4 = model(x), first(model).base_layer.nf4
    twin.merge_adapter()
    model.merge_adapter(safe_merge=safe)
    rows = peft_ext.explain(model).rows
    for layer, dense, row in zip(tuners(model).values(), tuners(twin).values(), rows, strict=True):
        layer, dense = layer.base_layer, dense.base_layer
        wanted = peft_ext.ops.nf4_quantize(dense.weight, nf4.blocksize, nf4.nested is not None)
        found = layer.dequantize(torch.float32)
        # A code may fall on the other side of a threshold if the merged weight was rounded differently.
        assert ((found - wanted.dequantize(torch.float32)).abs() > 1e-6).float().mean() < 1e-2
        torch.testing.assert_close(layer.bias.float(), dense.bias.float(), rtol=1e-2, atol=1e-3)
        error = (found - dense.weight).norm() / dense.weight.norm()
        assert layer.merge_error == pytest.approx(error.item(), rel=0.05)
        assert f"requantizing moved its weight by {layer.merge_error:.2%}" in row.reason
        assert layer.nf4.dtype is nf4.dtype and layer.weight.dtype is torch.uint8
    # NF4's rounding error is about 10% of a weight's norm, and the adapter's part of the output is far larger.
    assert (model(x) - unmerged).norm() < 0.5 * unmerged.norm()
    merged, error = first(model).base_layer.nf4, first(model).base_layer.merge_error
    with pytest.raises(RuntimeError, match="is merged into a packed weight"):
        peft_ext.restore(model)
    clone = copy.deepcopy(model)
    for copied in (model, clone):
        copied.unmerge_adapter()
        assert_identical(copied.state_dict(), before)
        assert torch.equal(copied(x), unmerged)
        assert KEPT not in vars(first(copied)) and first(copied).base_layer.merge_error is None
    base_layer = model.merge_and_unload(safe_merge=safe).up
    assert type(base_layer) is NF4Linear
    assert torch.equal(base_layer.weight, merged.packed)
    row = peft_ext.explain(model.base_model.model).rows[0]
    assert (row.kind, row.fused) == ("NF4Linear", True) and f"requantizing moved it by {error:.2%}" in row.reason


def test_merging_several_adapters_into_nf4_rounds_once():
    model = make("nf4")
    model.add_adapter("other", LoraConfig(target_modules=["up", "down"], r=3, init_lora_weights=False))
    packed = first(model).base_layer.weight.clone()
    step, at_once = both(peft_ext.accelerate(model))
    step.merge_adapter(["other"])
    step.merge_adapter(["default"])
    at_once.merge_adapter(["default", "other"])
    assert first(step).merged_adapters == ["other", "default"]
    torch.testing.assert_close(
        first(step).base_layer.dequantize(), first(at_once).base_layer.dequantize(), rtol=1e-5, atol=1e-6
    )
    step.unmerge_adapter()
    assert torch.equal(first(step).base_layer.weight, packed)


def test_a_bias_on_lora_b_is_merged_into_nf4_too():
    model = peft_ext.accelerate(make("nf4", lora_bias=True))
    layer = first(model)
    before = layer.base_layer.bias.detach().clone()
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.bias, before + layer.lora_B["default"].bias * layer.scaling["default"])
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, before)


def test_a_bias_on_lora_b_that_has_no_place_is_refused_in_pefts_words():
    said = []
    for base in ("float32", "nf4"):
        model = make(base, lora_bias=True)
        first(model).base_layer.bias = None
        with pytest.raises(RuntimeError) as refused:
            peft_ext.accelerate(model).merge_adapter()
        said.append(str(refused.value))
    assert said[1] == said[0]


def test_safe_merge_into_nf4_refuses_what_is_not_finite():
    model = peft_ext.accelerate(make("nf4"))
    layer = first(model)
    packed = layer.base_layer.weight.clone()
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, packed) and not layer.merged and KEPT not in vars(layer)


def test_stock_peft_does_not_corrupt_an_nf4_weight():
    model = make("nf4")
    packed = first(model).base_layer.weight.clone()
    for safe in (False, True):
        with pytest.raises(RuntimeError):
            model.merge_adapter(safe_merge=safe)
    assert torch.equal(first(model).base_layer.weight, packed)
    with pytest.raises(RuntimeError):
        make("nf4", use_dora=True)


def test_restore_refuses_a_layer_that_only_it_can_unmerge():
    model = peft_ext.accelerate(make("nf4"))
    model.merge_adapter()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="base_model.model.up is merged into a packed weight"):
        peft_ext.restore(model)
    assert state_of(model) == before
    model.unmerge_adapter()
    assert type(first(peft_ext.restore(model))) is lora.Linear


def test_merging_dora_after_lora_into_nf4_takes_the_norm_of_the_unmerged_weight():
    model = make_method("DoRA", "nf4").eval()
    peft_ext.accelerate(model).add_adapter("plain", config_of("LoRA", r=2))
    layer = first(model)
    layer.merge(adapter_names=["plain", "default"])
    layer.unmerge()
    weight = layer.base_layer.dequantize(torch.float32)
    plain, delta = layer.get_delta_weight("plain"), layer.get_delta_weight("default")
    norm = (weight + delta).norm(dim=1, keepdim=True)
    wanted = layer.lora_magnitude_vector["default"].weight[:, None] / norm * (weight + plain + delta)
    layer.merge(adapter_names=["plain"])
    # The second merge starts from the kept unmerged weight and merges both adapters into this weight.
    layer.merge(adapter_names=["default"])
    nf4 = layer.base_layer.nf4
    expected = peft_ext.ops.nf4_quantize(wanted, nf4.blocksize, nf4.nested is not None).dequantize(torch.float32)
    assert ((nf4.dequantize(torch.float32) - expected).abs() > 1e-6).float().mean() < 1e-2
