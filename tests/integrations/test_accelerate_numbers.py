"""Tests of accelerate on live PEFT models: outputs and gradients are as exact as PEFT's, and have PEFT's dtypes and
dropout probabilities.
"""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners import lora
from peft_models import (
    BASES,
    HIDDEN,
    METHODS,
    MLP,
    K,
    N,
    assert_as_good,
    both,
    compare,
    config_of,
    dropout_of,
    every_base,
    every_method,
    first,
    four_bit,
    in_float64,
    inputs,
    llama,
    make,
    make_method,
    make_several,
    run,
    spread,
    stock_of,
    tuners,
    with_philox,
)

import peft_ext
from peft_ext.nn import NF4Linear

pytestmark = pytest.mark.filterwarnings("ignore")
every_dtype = pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])


@pytest.mark.parametrize("mode", ["eval", "train", "dropout"])
@pytest.mark.parametrize("base", [*BASES, "float16"])
@pytest.mark.parametrize(
    ("method", "config"),
    [*((method, {}) for method in METHODS), ("LoRA", {"bias": "lora_only"})],
    ids=[*METHODS, "LoRA and biases"],
)
def test_output_and_gradients_are_as_good_as_pefts(method, config, base, mode):
    if mode == "dropout" and method == "IA3":
        pytest.skip("IA3 has no dropout")
    config = {**config, **dropout_of(method, 0.0 if mode == "train" else 0.25)}
    compare(make_method(method, base, **config).train(mode != "eval"), inputs(base, (21,)))


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@every_method
def test_float32_activations_over_a_16_bit_compute_dtype(method, dropout, compute):
    """Activations are float32, as after prepare_model_for_kbit_training. PEFT and peft_ext add the adapter in
    float32."""
    errors = {"stock": 0.0, "fused": 0.0}
    for _ in range(4):
        model = MLP(lambda k, n: four_bit(k, n, compute))
        model.is_loaded_in_4bit = True
        model = get_peft_model(model, config_of(method, **dropout_of(method, dropout)))
        spread(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # makes the adapter's term as large as the base's output
                parameter.data *= 8
        stock, fused = both(model.train())
        wide = copy.deepcopy(model)
        for layer in tuners(wide).values():
            layer.base_layer.compute_dtype = torch.float32
        if method != "DoRA":  # over this base, DoRA drops x by nn.Dropout, as in PEFT
            with_philox(stock), with_philox(wide)
        x = inputs("float32", (21,))
        truth = run(wide, x)
        assert {value.dtype for value in run(fused, x).values()} == {torch.float32}
        for name, found in (("stock", run(stock, x)), ("fused", run(fused, x))):
            errors[name] += sum(float((found[k] - truth[k]).norm() / truth[k].norm()) for k in truth)
    assert errors["fused"] <= 1.1 * errors["stock"]


@every_base
def test_a_sequence_is_its_rows(base):
    fused = peft_ext.accelerate(make(base).train())
    x = inputs(base)
    torch.testing.assert_close(fused(x).flatten(0, 1), fused(x.flatten(0, 1)))
    assert fused(x[:0]).shape == (0, x.shape[1], N)


@pytest.mark.parametrize("train", [False, True])
def test_a_llama_has_pefts_loss_and_gradients(train):
    stock, fused = both(llama().train(train))
    explanation = peft_ext.explain(fused)
    assert len(explanation.rows) == 14 and explanation.fused_share == 1.0
    ids = torch.randint(0, 97, (2, 12))
    for model in (stock, fused):
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, wanted), (_, actual) in zip(stock.named_parameters(), fused.named_parameters(), strict=True):
        if wanted.requires_grad:
            error = (actual.grad - wanted.grad).norm() / wanted.grad.norm()
            assert error < 1e-5, name  # bound for float32 through two layers; a wrong sign gives an error of 2


def test_dropout_draws_from_pytorchs_generator_and_keeps_the_right_share():
    model = peft_ext.accelerate(make(lora_dropout=0.25).train())
    layer = model.base_model.model.up
    # The base output is zero and A = B = I, so that y is the dropped x times the scaling and shows the mask.
    with torch.no_grad():
        layer.base_layer.weight.zero_(), layer.base_layer.bias.zero_()
    model.delete_adapter("default")
    model.add_adapter(
        "eye", LoraConfig(r=K, lora_alpha=K, target_modules=["up"], lora_dropout=0.25, init_lora_weights=False)
    )
    model.set_adapter("eye")
    with torch.no_grad():
        layer.lora_A["eye"].weight.copy_(torch.eye(K)), layer.lora_B["eye"].weight.copy_(torch.eye(HIDDEN, K))
    assert peft_ext.explain(model).rows[0].fused
    x = torch.ones(200, K)
    torch.manual_seed(7)
    first, second = layer(x)[:, :K], layer(x)[:, :K]
    torch.manual_seed(7)
    assert torch.equal(layer(x)[:, :K], first)
    assert not torch.equal(first, second)
    for y in (first, second):
        kept = y != 0
        torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.75))
        # The mean of 12,800 draws has a standard deviation of 0.0038; the bound is six standard deviations.
        assert abs(kept.float().mean().item() - 0.75) < 0.023
    layer.lora_dropout.eval()  # the mode of the dropout module decides, not the mode of the layer
    assert layer.training and torch.equal(layer(x)[:, :K], x)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@every_method
def test_adapters_keep_their_dtype(method, adapter_dtype):
    model = make_method(method, "bfloat16")
    model = model.to(torch.bfloat16) if adapter_dtype is torch.bfloat16 else model
    found = compare(model.train(), inputs("bfloat16", (21,)))
    adapters = {name for name in found if "lora_" in name or "ia3_" in name}
    assert adapters and {found[name].dtype for name in adapters} == {adapter_dtype}


def test_adapters_that_are_transposed_views():
    model = make().train()
    layer = model.base_model.model.up
    # PEFT's adapters of tied embeddings have a transposed lora_A, too.
    layer.lora_A["default"].weight = nn.Parameter(torch.randn(K, 8).t())
    compare(model, inputs(tokens=(21,)))
    assert not layer.lora_A["default"].weight.is_contiguous()


# --- several adapters -------------------------------------------------------------------------------------------------


@every_base
@pytest.mark.parametrize("method", ["LoRA", "IA3", "AdaLoRA"])
def test_several_active_adapters(method, base):
    compare(make_several(method, base).train(), inputs(base, (21,)))


def test_several_active_adapters_of_one_scale_and_one_active_twice():
    compare(make_several(r=2, lora_alpha=3).train(), inputs(tokens=(21,)))
    model = make_several(names=("default", "other", "default")).train()
    compare(model, inputs(tokens=(21,)))
    model = peft_ext.accelerate(make_several(lora_dropout=0.5).eval())
    assert peft_ext.explain(model).fused_share == 1.0  # in eval mode no dropout masks prevent the fusion


# --- an adapter for each sample ---------------------------------------------------------------------------------------

NAMES = ["default", "other", "__base__", "other", "third", "default", "default"]


def mixed(base="float32", **config):
    """Returns a model with three adapters of different ranks and scales. The adapter "third" is on one layer only."""
    model = make(base, **config)
    model.add_adapter("other", LoraConfig(target_modules=["up", "down"], r=2, lora_alpha=7, init_lora_weights=False))
    model.add_adapter("third", LoraConfig(target_modules=["down"], r=11, init_lora_weights=False))
    return model.eval()


@pytest.fixture
def grouped_calls(monkeypatch):
    calls = []
    grouped = peft_ext.ops.grouped_lora_linear
    monkeypatch.setattr(
        peft_ext.ops, "grouped_lora_linear", lambda *args, **kwargs: calls.append(args) or grouped(*args, **kwargs)
    )
    return calls


def as_nf4(model):
    """Replaces bitsandbytes' Linear4bit by NF4Linear under PEFT's own layers."""
    model = copy.deepcopy(model)
    for layer in tuners(model).values():
        base = layer.base_layer
        nf4 = NF4Linear.from_nf4(peft_ext.NF4Weight.from_bitsandbytes(base.weight), base.bias)
        layer.base_layer, layer.__class__ = nf4, lora.Linear
        layer.fan_in_fan_out = False
    return model


@pytest.mark.parametrize("length", [1, 13])
@every_base
def test_a_mixed_batch_is_one_call_as_good_as_pefts_loop(base, length, grouped_calls):
    stock, fused = both(mixed(base, lora_dropout=0.3))
    for model in (stock, fused):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    x = inputs(base, (len(NAMES), length))
    exact = run(in_float64(stock), x.double(), adapter_names=NAMES)
    found = run(fused, x, adapter_names=NAMES)
    assert len(grouped_calls) == 2
    if base.startswith("bnb"):  # PEFT adds in place to the output of bitsandbytes' layer, so that no gradient flows
        wanted = run(as_nf4(stock), x, adapter_names=NAMES)
    else:
        wanted = run(stock, x, adapter_names=NAMES)
    assert_as_good(found, wanted, exact)


def test_a_mixed_batch_generates_as_in_peft(grouped_calls):
    stock, fused = both(llama().eval())
    names = ["default", "__base__", "other"]
    for model in (stock, fused):
        torch.manual_seed(1)
        model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        peft_ext.accelerate(model) if model is fused else None
    ids = torch.randint(0, 97, (3, 6))
    settings = {"adapter_names": names, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 2):
        tokens = [model.generate(input_ids=ids, num_beams=beams, **settings) for model in (stock, fused)]
        assert torch.equal(*tokens)
    assert grouped_calls


STOCK_MIXED = {
    "dropout": lambda m: m.base_model.model.up.lora_dropout["other"].train(),
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "hook": lambda m: first(m).lora_A["other"].register_forward_hook(lambda *args: args[-1] * 2),
    "dtype": lambda m: first(m).lora_A["other"].to(torch.bfloat16) and first(m).lora_B["other"].to(torch.bfloat16),
}


@pytest.mark.parametrize("about", STOCK_MIXED)
def test_a_mixed_batch_that_is_not_fused_is_pefts_to_the_bit(about, grouped_calls):
    model = mixed(lora_dropout=0.3)
    model.base_model.model.up.lora_dropout["other"] = nn.Dropout(0.3).eval()
    STOCK_MIXED[about](model)
    stock, fused = both(model)
    peft_ext.restore(fused.base_model.model.down)  # the other layer becomes stock, so that all bits can be compared
    x, found = inputs(tokens=(len(NAMES), 5)), []
    for model in (stock, fused):
        torch.manual_seed(3)
        found.append(model(x, adapter_names=NAMES))
    assert torch.equal(*found)
    assert not grouped_calls


def test_extra_arguments_and_the_argument_check():
    stock, fused = both(mixed())
    x = inputs(tokens=(len(NAMES), 5))
    for layers in (("third",), ("__base__",)):  # the layer has neither of these adapters
        up = [first(model)(x, adapter_names=[*layers] * len(NAMES)) for model in (stock, fused)]
        assert torch.equal(*up)
    for model in (stock, fused):
        with pytest.raises(TypeError, match="unexpected keyword"):
            first(model)(x, unknown=1)
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            first(model)(x, adapter_names=NAMES[:2])
        model.merge_adapter(["other"])
        with pytest.raises(ValueError, match="merged adapters"):
            first(model)(x, adapter_names=NAMES)


# --- dtypes -----------------------------------------------------------------------------------------------------------


def assert_of_pefts_dtype(actual, wanted):
    assert actual.dtype is wanted.dtype
    assert (actual.double() - wanted.double()).norm() <= 2**-6 * wanted.double().norm()


@every_method
@every_base
@every_dtype
def test_autocast_gives_pefts_dtype(method, base, x_dtype):
    model = make_method(method, base).train()
    stock, fused = stock_of(model), peft_ext.accelerate(model)
    x = torch.randn(5, K, dtype=x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert_of_pefts_dtype(fused(x), stock(x))
        explanation = peft_ext.explain(fused)
    stock_base = base in (
        "bnb",
        "bnb nested",
    )  # under autocast, a Linear4bit with compute dtype float32 still computes in float32, by its own forward
    assert explanation.fused_share == (0.0 if stock_base and method in ("DoRA", "IA3") else 1.0)
    alone = "autocast computes in bfloat16, the layer's compute_dtype is float32" if stock_base else ""
    assert all(alone in row.reason and bool(alone) == bool(row.reason) for row in explanation.rows)


def test_several_adapters_in_float16_under_bfloat16_autocast():
    """Under bfloat16 autocast on a CPU, PyTorch's cat raises an error for float16 tensors."""
    torch.manual_seed(0)
    model = make_method("LoRA", "dense").train()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()
    model.base_model.set_adapter(["default", "other"])
    stock, fused = stock_of(model), peft_ext.accelerate(model)
    assert peft_ext.explain(fused).fused_share == 1.0
    with torch.autocast("cpu", torch.bfloat16):
        assert_of_pefts_dtype(fused(torch.ones(5, K)), stock(torch.ones(5, K)))


def assert_layers_return_pefts_dtype(stock, fused, x_dtype):
    for name in ("up", "down"):
        layers = [model.base_model.model.get_submodule(name) for model in (stock, fused)]
        x = torch.randn(5, layers[0].in_features, dtype=x_dtype)
        wanted, actual = (layer(x) for layer in layers)
        assert_of_pefts_dtype(actual, wanted)
        assert layers[0].base_layer.compute_dtype is layers[1].base_layer.compute_dtype


@pytest.mark.parametrize("method", METHODS[1:])
@every_dtype
def test_a_4bit_layer_returns_pefts_dtype_under_cudas_autocast(method, x_dtype, monkeypatch):
    """PEFT's 4-bit layers check CUDA's autocast on every device. The test makes this check return the CPU's
    autocast."""
    stock, fused = both(make_method(method, "bnb bfloat16").train())
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": enabled(device))
    with torch.autocast("cpu", torch.bfloat16):
        assert_layers_return_pefts_dtype(stock, fused, x_dtype)
        assert peft_ext.explain(fused).fused_share == 1.0


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", ["bnb", "bnb bfloat16"])
def test_a_4bit_layer_returns_pefts_dtype(method, x_dtype, base):
    assert_layers_return_pefts_dtype(*both(make_method(method, base).train()), x_dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS[:3])
def test_falcons_linear_with_a_bias_is_float32_under_autocast_as_in_peft(method, bias):
    """FalconLinear adds its bias separately: autocast multiplies in bfloat16, and the sum with a float32 bias is
    float32.
    """
    from transformers.models.falcon.modeling_falcon import FalconLinear

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = FalconLinear(64, 32, bias=bias)

        def forward(self, x):
            return self.proj(x)

    config = {
        "LoRA": LoraConfig(target_modules=["proj"], init_lora_weights=False),
        "DoRA": LoraConfig(target_modules=["proj"], init_lora_weights=False, use_dora=True),
        "IA3": IA3Config(target_modules=["proj"], feedforward_modules=[], init_ia3_weights=False),
    }[method]
    stock, fused = both(get_peft_model(Model(), config))
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = stock(x), fused(x)
    assert found.dtype is wanted.dtype is (torch.float32 if bias else torch.bfloat16)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
