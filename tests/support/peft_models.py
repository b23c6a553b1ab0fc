"""Makes small PEFT models over dense, NF4 and bitsandbytes base layers, and compares accelerated models with PEFT's own
models."""

import copy
import pickle

import bitsandbytes as bnb
import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
from peft.tuners import ia3
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_ext
from peft_ext.nn import NF4Experts, NF4Linear
from peft_ext.nn.experts import dense_experts
from peft_ext.reference import lora as reference

K, HIDDEN, N = 64, 128, 64  # multiples of 64: bitsandbytes' CPU dequantize is wrong for other sizes
BASES = ("float32", "bfloat16", "nf4", "nf4 bfloat16", "bnb", "bnb nested", "bnb bfloat16")
METHODS = ("LoRA", "DoRA", "IA3", "AdaLoRA")

every_base = pytest.mark.parametrize("base", BASES)
every_method = pytest.mark.parametrize("method", METHODS)
every_clone = pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])


class MLP(nn.Module):
    def __init__(self, linear=nn.Linear):
        super().__init__()
        self.up, self.down = linear(K, HIDDEN), linear(HIDDEN, N)

    def forward(self, x, **kwargs):
        return self.down(nn.functional.silu(self.up(x, **kwargs)), **kwargs)


def dtype_of(base):
    for dtype in (torch.bfloat16, torch.float16):
        if str(dtype).removeprefix("torch.") in base:
            return dtype
    return torch.float32


def four_bit(in_features, out_features, compute_dtype=torch.float32, nested=False, quant_type="nf4", bias=True):
    layer = bnb.nn.Linear4bit(
        in_features, out_features, bias, compute_dtype=compute_dtype, compress_statistics=nested, quant_type=quant_type
    )
    return layer.to("cpu")


def quantize(model, base, skip=("lm_head",), only=lambda linear: True):
    """Converts the linear layers of a model to another base, in place: "float32", "nf4", "bnb nested", ... Layers named
    in ``skip`` keep their class. Returns the model."""
    dtype = dtype_of(base)
    model = model.to(dtype)
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear or name in skip or not only(linear):
                continue
            if base.startswith("nf4"):
                setattr(parent, name, NF4Linear.from_linear(linear))
            elif base.startswith("bnb"):
                layer = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=dtype,
                    compress_statistics="nested" in base, quant_type="nf4",
                )  # fmt: skip
                layer.load_state_dict(linear.state_dict())
                if linear.bias is not None:  # as in a loaded model; otherwise the first forward casts the bias
                    layer.bias.data = layer.bias.data.to(dtype)
                setattr(parent, name, layer.to("cpu"))
    model.is_loaded_in_4bit = base.startswith("bnb")
    return model


def eight_bit(linear):
    """Returns bitsandbytes' 8-bit layer with the linear layer's weight; the first call quantizes the weight."""
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def config_of(method, **config):
    """Returns a PEFT configuration of one of METHODS for MLP's two layers; IA3 has one layer as feedforward."""
    config = {"target_modules": ["up", "down"], **config}
    if method == "IA3":
        return IA3Config(**{"feedforward_modules": ["down"], "init_ia3_weights": False, **config})
    config = {"lora_alpha": 12, "init_lora_weights": False, **config}
    if method == "AdaLoRA":
        return AdaLoraConfig(**{"init_r": 6, "target_r": 3, "total_step": 20, "tinit": 2, "tfinal": 2, **config})
    return LoraConfig(**{"r": 8, "use_dora": method == "DoRA", **config})


def make_method(method, base="float32", **config):
    """Returns MLP with an adapter. For DoRA over NF4, the adapter is added before the weights are quantized, since PEFT
    can't compute an NF4Linear's norm."""
    late = method == "DoRA" and base.startswith("nf4")
    model = get_peft_model(quantize(MLP(), str(dtype_of(base)) if late else base), config_of(method, **config))
    if late:
        peft_ext.quantize_nf4(model, progress=False)
    spread(model)
    return model


def make(base="float32", **config):
    return make_method("LoRA", base, **config)


def dropout_of(method, p):
    """Returns the dropout argument of :func:`make_method`; IA3 has no dropout."""
    return {} if method == "IA3" else {"lora_dropout": p}


def spread(model, name="default"):
    """Changes the initial values of a DoRA, IA3 or AdaLoRA adapter to random values, as after some training."""
    for layer in tuners(model).values():
        if name in getattr(layer, "lora_magnitude_vector", {}):
            magnitude = layer.lora_magnitude_vector[name].weight
            magnitude.data *= 0.5 + torch.rand(magnitude.shape).to(magnitude.dtype)
        if name in getattr(layer, "ia3_l", {}):
            layer.ia3_l[name].data.mul_(0.25).add_(1)
        if name in getattr(layer, "lora_E", {}):
            layer.lora_A[name].data *= 0.1
            layer.lora_B[name].data *= 0.1
            layer.ranknum[name].requires_grad_(False)  # over a base that is not float32, PEFT leaves ranknum trainable


def dense_twin(model, dtype=None):
    """Returns a copy that stock PEFT can run, in which NF4Linear layers and NF4 experts are dequantized, to ``dtype``
    or to their own dtype."""
    model = copy.deepcopy(model)
    for layer in tuners(model).values():
        base = layer.base_layer
        if isinstance(base, NF4Linear):
            layer.base_layer = nn.Linear(base.in_features, base.out_features)
            layer.base_layer.weight = nn.Parameter(base.dequantize(dtype), requires_grad=False)
            layer.base_layer.bias = base.bias
    for module in model.modules():
        if isinstance(module, NF4Experts):
            dense_experts(module, dtype)
    return model


def llama(**config):
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    )
    config = {"target_modules": "all-linear", "r": 4, "init_lora_weights": False, **config}
    return get_peft_model(model, LoraConfig(**config))


def first(model):
    return model.base_model.model.up


def tuners(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def both(model):
    """Returns the unchanged model and an accelerated copy."""
    return model, peft_ext.accelerate(copy.deepcopy(model))


def inputs(base="float32", tokens=(3, 7)):
    return torch.randn(*tokens, K, dtype=dtype_of(base))


def run(model, x, **kwargs):
    """Returns the output and the gradients of x and of every trainable parameter, from a fixed seed."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    y = model(x, **kwargs)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    y.backward(grad.to(y.dtype))
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **found}


class PhiloxDropout(nn.Module):
    """A dropout for a layer that runs PEFT's code. PhiloxDropout draws the same seed and mask as the fused operator."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        return reference.dropped(x, self.p, torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64))


def with_philox(model):
    for layer in tuners(model).values():
        for name, dropout in getattr(layer, "lora_dropout", {}).items():
            if isinstance(dropout, nn.Dropout):
                layer.lora_dropout[name] = PhiloxDropout(dropout.p).train(dropout.training)
    return model


def in_float64(model):
    """Returns a float64 copy of a stock PEFT model, whose quantized weights are dequantized."""
    model = copy.deepcopy(model)
    for layer in tuners(model).values():
        base = layer.base_layer
        wide = nn.Linear(base.in_features, base.out_features, dtype=torch.float64)
        if isinstance(base, NF4Linear):
            weight = base.dequantize(dtype_of(str(base.quant_dtype)))
        elif isinstance(base, bnb.nn.Linear4bit):
            weight = peft_ext.NF4Weight.from_bitsandbytes(base.weight).dequantize(base.compute_dtype)
        else:
            weight = base.weight
        wide.weight = nn.Parameter(weight.detach().double(), requires_grad=False)
        wide.bias = nn.Parameter(base.bias.detach().double(), requires_grad=base.bias.requires_grad)
        layer.base_layer = wide
        if isinstance(layer, ia3.IA3Layer):  # PEFT's IA3 class for 4-bit layers would cast x to float32
            layer.__class__, layer.fan_in_fan_out = ia3.Linear, False
    return model.double()


def assert_as_good(actual, stock, exact):
    """Asserts that each tensor's error from float64 is at most 1.5 times PEFT's error plus 1e-6 of the tensor's norm.

    The 1e-6 allows for rounding in float32 sums of 100 terms. For a tensor of at most 16 elements the allowance is at
    least 2 eps, because PEFT's error may be near zero by chance.
    """
    assert actual.keys() == stock.keys() == exact.keys()
    eps = 2 * torch.finfo(stock["x"].dtype).eps
    for name, wanted in exact.items():
        assert actual[name].dtype is stock[name].dtype, name
        assert actual[name].shape == stock[name].shape, name
        error, theirs = ((found[name].double() - wanted).norm() for found in (actual, stock))
        slack = 1e-6 if wanted.numel() > 16 else max(1e-6, eps)
        assert error <= 1.5 * theirs + slack * wanted.norm(), f"{name}: error {error:.2e}, PEFT's {theirs:.2e}"
        assert wanted.norm() > 0, f"{name} is zero: nothing was compared"


def assert_identical(actual, wanted):
    """Asserts that two dictionaries have bitwise equal tensors. NaNs are equal, and None equals None."""
    torch.testing.assert_close(dict(actual), dict(wanted), rtol=0, atol=0, equal_nan=True)


def state_of(model):
    return {
        name: (type(module), {key: id(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    }


def assert_restored(model, before):
    """Asserts that all modules have the classes and the attribute names of ``before``, a result of :func:`state_of`."""
    after = state_of(model)
    assert after.keys() == before.keys()
    for name, (kind, held) in before.items():
        assert after[name][0] is kind and after[name][1].keys() == held.keys(), name


def activate(model, names):
    """Makes several adapters active and trainable in each layer. PEFT's AdaLoRA model refuses to activate several."""
    for layer in tuners(model).values():
        layer.set_adapter(names)


def make_several(method="LoRA", base="float32", names=("default", "other"), **other):
    """Returns a model with two adapters of one method, "default" and "other", of which ``names`` are active."""
    model = make_method(method, base)
    sizes = {"LoRA": {"r": 3, "lora_alpha": 5}, "AdaLoRA": {"init_r": 5, "inference_mode": True}, "IA3": {}}[method]
    torch.manual_seed(2)
    model.add_adapter("other", config_of(method, **{**sizes, **other}))
    spread(model, "other")
    activate(model, list(names))
    return model


def stock_of(model):
    """Returns a restored copy, which runs PEFT's own code. With DoRA, NF4 weights are dequantized, because stock PEFT
    can't compute DoRA over an NF4Linear."""
    has_dora = any(getattr(layer, "lora_variant", None) for layer in tuners(model).values())
    model = peft_ext.restore(copy.deepcopy(model))
    return dense_twin(model) if has_dora else model


def compare(model, x):
    """Accelerates the model in place, asserts that all layers are fused and as exact as PEFT's layers, and returns the
    fused results."""
    fused = peft_ext.accelerate(model)
    stock, exact = stock_of(model), in_float64(peft_ext.restore(copy.deepcopy(model)))
    assert peft_ext.explain(fused).fused_share == 1.0, peft_ext.explain(fused)
    with_philox(stock)
    found = run(fused, x)
    assert_as_good(found, run(stock, x), run(with_philox(exact), x.double()))
    return found
