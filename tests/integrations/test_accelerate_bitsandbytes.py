"""Tests of accelerate over bitsandbytes' 4-bit and 8-bit layers, with and without adapters: numbers, dtypes, state."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import bitsandbytes as bnb
from peft import LoraConfig, get_peft_model
from peft.tuners import adalora, ia3, lora
from peft_models import (
    MLP,
    K,
    N,
    assert_identical,
    both,
    compare,
    config_of,
    eight_bit,
    every_clone,
    every_method,
    first,
    four_bit,
    inputs,
    make,
    quantize,
    run,
    with_philox,
)

import peft_ext
from peft_ext.integrations import peft as integration
from peft_ext.integrations.adapter_layers import reasons
from peft_ext.nn import NF4Linear

pytestmark = pytest.mark.filterwarnings("ignore")


# --- 4 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_4bit_linear(nested, compute, x_dtype):
    stock = nn.Sequential(four_bit(K, N, compute, nested))
    nn.init.normal_(stock[0].bias)
    stock, fused = both(stock)
    assert peft_ext.explain(fused).rows == [integration.Row("0", "Linear4bit", True, "")]
    x = torch.randn(2, 5, K, dtype=x_dtype)
    found = [x.clone().requires_grad_() for _ in range(2)]
    ys = [model(leaf) for model, leaf in zip((stock, fused), found, strict=True)]
    for y in ys:
        y.sum().backward()
    assert ys[0].dtype is ys[1].dtype is x_dtype
    eps = max(torch.finfo(t).eps for t in (compute, x_dtype))
    for actual, wanted in ((ys[1], ys[0]), (found[1].grad, found[0].grad)):
        assert (actual.double() - wanted.double()).norm() <= 2 * eps * wanted.double().norm()
    assert fused[0].bias.dtype is torch.float32  # only the stock layer's forward casts the bias parameter itself
    assert stock[0].bias.dtype is compute


def test_the_compute_dtype_is_settled_by_the_first_input():
    fused = peft_ext.accelerate(four_bit(K, N, compute_dtype=None))
    assert fused.compute_dtype is None
    assert fused(torch.randn(2, K).bfloat16()).dtype is torch.bfloat16
    assert fused.compute_dtype is torch.bfloat16
    assert fused(torch.randn(2, K)).dtype is torch.float32


@pytest.mark.parametrize("adapted", [False, True])
def test_a_4bit_weight_is_never_repacked(adapted):
    model = make("bnb bfloat16") if adapted else nn.Sequential(four_bit(K, N, torch.bfloat16, bias=False))
    fused = peft_ext.accelerate(model).eval()
    before = {name: value.clone() for name, value in fused.state_dict().items()}
    layer = next(module for module in fused.modules() if isinstance(module, bnb.nn.Linear4bit))
    layer.support_avx512bf16_for_cpu = True  # bitsandbytes sets this attribute on CPUs with AVX-512 BF16
    packed = layer.weight.data.clone()
    with torch.no_grad():
        fused(torch.randn(2, K).bfloat16())
        fused(torch.randn(2, K).double())  # for a float64 input stock code runs
        if adapted:
            with fused.disable_adapter():
                fused(torch.randn(2, K).bfloat16())
    assert torch.equal(layer.weight.data, packed)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert_identical(fused.state_dict(), before)
    peft_ext.restore(fused)
    assert layer.support_avx512bf16_for_cpu is True


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_training_after_evaluation_has_the_gradients_of_training_alone(quant_type):
    """On a CPU with AVX-512 BF16, bitsandbytes repacks a 4-bit weight in evaluation. A repacked layer passes no
    gradient to the layers below it.
    """

    def grads(evaluated):
        torch.manual_seed(3)
        model = nn.Sequential(*(four_bit(K, K, quant_type=quant_type, bias=False) for _ in range(2)))
        model.is_loaded_in_4bit = True
        config = LoraConfig(target_modules=["0", "1"], r=4, init_lora_weights=False)
        model = peft_ext.accelerate(get_peft_model(model, config))
        if evaluated:
            with torch.no_grad():
                model.eval()(x)
        model.train()(x).square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    x = torch.randn(5, K)
    torch.testing.assert_close(grads(False), grads(True), rtol=0, atol=0)


def test_a_weight_that_was_repacked_before_is_said():
    model = nn.Sequential(four_bit(K, K), four_bit(K, K))
    model[1].weight.quant_state.packing_format_for_cpu = True
    with pytest.warns(UserWarning, match=r"repacked the weight of 1 for its CPU inference \(1 in all\): training"):
        peft_ext.accelerate(model)


def test_4bit_weights_that_stay_stock():
    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.derived = bnb.nn.LinearNF4(K, K).to("cpu")
            self.waiting, self.repacked = bnb.nn.Linear4bit(K, K, quant_type="nf4"), four_bit(K, K)
            self.eight, self.ours = bnb.nn.Linear8bitLt(K, K), NF4Linear(K, K)

    model = Kinds()
    model.repacked.weight.quant_state.packing_format_for_cpu = True
    with pytest.warns(UserWarning, match="repacked the weight of repacked"):
        stock, fused = both(model.train())
    rows = {row.name: row for row in peft_ext.explain(fused).rows}
    assert len(rows) == 5
    assert rows["derived"].reason == "LinearNF4 is not fused; only Linear4bit itself is"
    assert "not quantized yet" in rows["waiting"].reason
    assert "repacked" in rows["repacked"].reason
    assert rows["eight"].reason == "Linear8bitLt is not fused; only Linear4bit itself is"
    assert rows["ours"].fused
    x = torch.randn(3, K, requires_grad=True)
    assert torch.equal(fused.derived(x), stock.derived(x))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_4bit_weight_with_another_table_of_codes_stays_stock(quant_type, adapted, monkeypatch):
    monkeypatch.setattr(reasons, "_foreign_tables", set())
    model = nn.Sequential(four_bit(K, K, quant_type=quant_type), four_bit(K, N, quant_type=quant_type))
    model[1].weight.quant_state.code = torch.linspace(-1, 1, 16)
    if adapted:
        model.is_loaded_in_4bit = True
        model = get_peft_model(model, LoraConfig(target_modules=["0", "1"], init_lora_weights=False))
    stock, fused = both(model)
    rows = peft_ext.explain(fused).rows
    said = f"its table of codes is not {quant_type.upper()}'s"
    assert rows[0].fused and rows[0].reason == "" and said in rows[1].reason
    assert rows[1].fused == adapted  # with an adapter, the adapter's part is fused
    x = torch.randn(3, K, dtype=torch.bfloat16)
    first, second = fused.base_model.model if adapted else fused
    assert torch.equal(second(x), (stock.base_model.model if adapted else stock)[1](x)) or adapted
    assert first.stock_reason() is None
    # While torch.compile traces, a table of codes can't be compared, so that the layer with NF4's own table is refused
    # too.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert reasons.weight_reason(first.base_layer if adapted else first) == said


@pytest.mark.parametrize("nested", [False, True])
def test_fp4_weights_are_fused(nested):
    """A Linear4bit with an FP4 weight, alone and below LoRA, multiplies by bitsandbytes' own decoded weight."""
    model = nn.Sequential(four_bit(K, K, None, nested, quant_type="fp4"), nn.ReLU(),
                          four_bit(K, K, None, nested, quant_type="fp4"))  # fmt: skip
    model.is_loaded_in_4bit = True
    model = get_peft_model(model, LoraConfig(target_modules=["0"], r=4, init_lora_weights=False))
    stock, fused = both(model)
    assert all(row.fused for row in peft_ext.explain(fused).rows) and len(peft_ext.explain(fused).rows) == 2
    x = torch.randn(5, K)
    torch.testing.assert_close(fused(x), stock(x), rtol=1e-5, atol=1e-5)
    for model in (stock, fused):
        model(x).square().sum().backward()
    for one, other in zip(stock.parameters(), fused.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4)


@every_method
def test_a_plain_adapter_class_over_a_4bit_layer(method):
    """If the model does not say that it was loaded in 4 bits, PEFT adapts a Linear4bit with its plain Linear."""
    model = quantize(MLP(), "bnb")
    del model.is_loaded_in_4bit
    model = get_peft_model(model, config_of(method))
    assert peft_ext.explain(model).rows[0].kind == f"{method} over Linear4bit"
    assert type(first(model)) in (lora.Linear, ia3.Linear, adalora.SVDLinear)
    compare(model.train(), inputs(tokens=(21,)))
    row = peft_ext.explain(model).rows[0]
    assert row == integration.Row("base_model.model.up", f"{method} over Linear4bit", True, "")


def test_a_4bit_weight_of_inference_mode_trains_as_in_peft():
    """In inference mode PEFT's merge and unmerge make a 4-bit weight that is an inference tensor."""
    base = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    with torch.inference_mode():
        weight = torch.randn(32, 64)
        base.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=base).to("cpu")
    model = nn.Sequential()
    model.add_module("proj", base)
    model.is_loaded_in_4bit = True
    stock = get_peft_model(model, LoraConfig(target_modules=["proj"], init_lora_weights=False))
    stock, fused = both(stock)
    fused.get_submodule("base_model.model.proj").base_layer.weight = base.weight
    assert base.weight.is_inference()
    x = torch.randn(4, 64)
    for model in (stock, fused):
        model(x).sum().backward()
    wanted, found = ([p.grad for p in model.parameters() if p.requires_grad] for model in (stock, fused))
    torch.testing.assert_close(found, wanted)


# --- 8 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_an_8bit_base_runs_on_its_own(train):
    model = MLP().to(torch.bfloat16)
    model.up, model.down = eight_bit(model.up), eight_bit(model.down)
    model.is_loaded_in_8bit = True
    model = get_peft_model(model, config_of("LoRA", lora_alpha=8, lora_dropout=0.25)).train(train)
    assert type(first(model)) is lora.Linear8bitLt
    stock, fused = both(model)
    rows = peft_ext.explain(fused).rows
    assert [row.kind for row in rows] == ["LoRA over Linear8bitLt"] * 2
    assert all(row.fused and "its base layer is a Linear8bitLt" in row.reason for row in rows)
    with_philox(stock)
    x = inputs("bfloat16", (21,))
    found, wanted = run(fused, x), run(stock, x)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():  # x is quantized to eight bits, so a difference in rounding changes the values
        assert found[name].dtype is value.dtype
        assert (found[name] - value).norm() <= 2e-2 * value.norm(), name
    assert type(first(peft_ext.restore(fused))) is lora.Linear8bitLt


@every_clone
def test_8bit_layers_are_copied_pickled_and_checkpointed(clone):
    model = MLP().to(torch.bfloat16)
    model.up = eight_bit(model.up)
    model = get_peft_model(model, LoraConfig(target_modules=["up"], r=4, lora_dropout=0.4, init_lora_weights=False))
    fused = peft_ext.accelerate(model.train())
    x = inputs("bfloat16")
    wanted = run(fused, x)  # the first call quantizes the weight
    copied = clone(fused)
    assert peft_ext.explain(copied).rows[0].fused
    assert_identical(run(copied, x), run(fused, x))
    assert_identical(run(fused, x), wanted)
    torch.manual_seed(3)
    y = torch.utils.checkpoint.checkpoint(fused, x, use_reentrant=False)
    assert torch.equal(y, wanted["y"])
    fused.zero_grad()
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype))
    grads = {name: p.grad for name, p in fused.named_parameters() if p.requires_grad}
    torch.testing.assert_close(grads, {name: wanted[name] for name in grads}, rtol=0, atol=0)
