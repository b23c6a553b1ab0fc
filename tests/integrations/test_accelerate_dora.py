"""Tests of accelerate on DoRA: both values of dora_dropout, PEFT's cache of the norm, and DoRA over NF4Linear, which
stock PEFT can't compute.
"""

import copy
import functools

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peft import LoraConfig, get_peft_model
from peft.helpers import DoraCaching
from peft.tuners import lora
from peft_models import (
    MLP,
    assert_restored,
    both,
    compare,
    config_of,
    every_clone,
    first,
    inputs,
    make,
    make_method,
    quantize,
    spread,
    state_of,
)

import peft_ext
from peft_ext.integrations.adapter_layers.base import FUSED
from peft_ext.nn import NF4Linear

pytestmark = pytest.mark.filterwarnings("ignore")


def test_doras_dropout_can_act_on_the_low_rank_path_alone():
    model = make_method("DoRA", lora_dropout=0.25).train()
    fused = peft_ext.accelerate(copy.deepcopy(model), dora_dropout="lora")
    assert {row.kind for row in peft_ext.explain(fused).rows} == {"DoRA (dropout on the low-rank path) over Linear"}
    layer, x = first(fused), inputs(tokens=(21,))
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    seed = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64)
    lora_A, lora_B, base = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer
    wanted = peft_ext.reference.dora_linear(
        x, base.weight, lora_A, lora_B, layer.lora_magnitude_vector["default"].weight, base.bias, scaling=1.5,
        dropout_p=0.25, training=True, dropout_mode="lora", seed=seed,
    )  # fmt: skip
    torch.testing.assert_close(y, wanted)
    torch.manual_seed(5)
    other = first(peft_ext.accelerate(copy.deepcopy(model)))(x)
    # The default dora_dropout="peft" gives other values than "lora" for the same random seed.
    assert (other - wanted).norm() > 0.01 * wanted.norm()
    for eval_mode in (fused.eval(), peft_ext.accelerate(fused)):
        torch.testing.assert_close(eval_mode(x), model.eval()(x))


@every_clone
def test_the_choice_of_doras_dropout_is_kept_until_restore(clone):
    model = make_method("DoRA", lora_dropout=0.25).train()
    before = state_of(model)
    other = clone(peft_ext.accelerate(model, dora_dropout="lora"))
    x = inputs()
    for each in (model, other):
        torch.manual_seed(3)
        assert peft_ext.explain(each).rows[0].kind.startswith("DoRA (dropout on the low-rank path)")
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    assert torch.equal(other(x), y)
    peft_ext.accelerate(other)
    assert peft_ext.explain(other).rows[0].kind == "DoRA over Linear"
    peft_ext.restore(model)
    assert_restored(model, before)


def test_a_wrong_dropout_is_named_before_anything_changes():
    model = make_method("DoRA")
    with pytest.raises(ValueError, match="accelerate: dora_dropout is 'base', wanted one of"):
        peft_ext.accelerate(model, dora_dropout="base")
    assert type(first(model)) is lora.Linear


def test_doras_dropout_needs_the_layer_in_training_too():
    model = make_method("DoRA", lora_dropout=0.9).eval()
    first(model).lora_dropout.train()  # PEFT's DoRA also reads the layer's training mode
    stock, fused = both(model)
    x = inputs()
    torch.testing.assert_close(fused(x), stock(x), rtol=1e-5, atol=1e-5)


def test_doras_cache_is_honoured(monkeypatch):
    stock, fused = both(make_method("DoRA").eval())
    x, seen = inputs(), []
    norm = peft_ext.ops.dora_weight_norm
    monkeypatch.setattr(peft_ext.ops, "dora_weight_norm", lambda *a, **k: seen.append(0) or norm(*a, **k))
    wanted = fused(x)
    assert not seen
    with DoraCaching():
        for _ in range(3):
            torch.testing.assert_close(fused(x), wanted)
        assert len(seen) == 2  # one computation of the norm for each layer
        cached, theirs = (first(model).lora_magnitude_vector["default"] for model in (fused, stock))
        stock(x)
        key = "weight-norm-default"
        torch.testing.assert_close(cached._dora_cache[key], theirs._dora_cache[key])
    fused(x)
    assert not cached._dora_cache  # outside of DoraCaching a call clears the cached norm, as in PEFT
    with DoraCaching():
        fused(x)
        assert cached._dora_cache
        fused.train()
        assert not cached._dora_cache
        fused(x).sum().backward()
        assert not cached._dora_cache


@pytest.mark.parametrize("base", ["nf4", "nf4 bfloat16"])
def test_dora_over_nf4(base):
    """Tests DoRA over NF4, added to an accelerated model, made before the quantization, or made by PEFT's hook for
    layers.
    """
    model = peft_ext.accelerate(make(base))
    model.add_adapter("dora", config_of("DoRA"))
    model.set_adapter("dora")
    assert {row.kind for row in peft_ext.explain(model).rows} == {"DoRA over NF4Linear"}
    assert peft_ext.explain(model).fused_share == 1.0
    layer = first(model)
    weight = layer.base_layer.dequantize().float() + layer.get_delta_weight("dora").float()
    torch.testing.assert_close(
        layer.lora_magnitude_vector["dora"].weight.float(), weight.norm(dim=1), rtol=2e-3, atol=1e-6
    )
    compare(model.train(), inputs(base, (21,)))

    config = config_of("DoRA")
    config._register_custom_module({NF4Linear: FUSED[lora.Linear]})
    compare(get_peft_model(quantize(MLP(), base), config).train(), inputs(base, (21,)))


def test_other_variants_over_nf4_are_a_clear_error():
    model = peft_ext.accelerate(make("nf4"))
    with pytest.raises(NotImplementedError, match="aLoRA over an NF4Linear is not supported yet"):
        model.add_adapter("other", config_of("LoRA", alora_invocation_tokens=[1]))


def test_dora_on_a_quantized_base_is_made_loaded_and_added(tmp_path):
    """PEFT computes DoRA's norm when it makes a layer; for an NF4Linear this would fail without peft_ext."""
    torch.manual_seed(0)
    dense = MLP()
    config = functools.partial(config_of, "DoRA")
    adapted = peft_ext.get_peft_model(peft_ext.quantize_nf4(copy.deepcopy(dense), progress=False), config())
    spread(adapted)
    adapted.save_pretrained(tmp_path)
    x = inputs()
    wanted = adapted.eval()(x)
    quantized = peft_ext.quantize_nf4(copy.deepcopy(dense), progress=False)
    loaded = peft_ext.load_adapter(copy.deepcopy(quantized), tmp_path)
    plain = LoraConfig(target_modules=["up", "down"], r=3)
    beside = peft_ext.get_peft_model(quantized, plain, accelerate=False)
    beside = peft_ext.load_adapter(beside, tmp_path, "second")
    for model in (loaded, beside):
        assert peft_ext.explain(model).fused_share == 1.0
        assert torch.equal(model.eval()(x), wanted)
