"""accelerate, restore and explain on live PEFT models: the numbers, the stock path, and what a model can go through."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")

from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model, inject_adapter_in_model  # noqa: E402
from peft.helpers import disable_input_dtype_casting  # noqa: E402
from peft.tuners import lora  # noqa: E402
from peft.utils import hotswap  # noqa: E402
from peft_models import (  # noqa: E402
    BASES,
    HIDDEN,
    MLP,
    K,
    N,
    assert_as_good,
    assert_identical,
    both,
    config_of,
    first,
    four_bit,
    in_float64,
    inputs,
    llama,
    make,
    quantize,
    run,
    spread,
    state_of,
    tuners,
    with_philox,
)
from transformers import Trainer, TrainingArguments  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import peft_ext  # noqa: E402
from peft_ext.integrations import peft as integration  # noqa: E402
from peft_ext.integrations.fused import reasons  # noqa: E402
from peft_ext.integrations.fused.base import FUSED as FUSED_BY_STOCK  # noqa: E402
from peft_ext.integrations.fused.base import KEPT  # noqa: E402
from peft_ext.nn import NF4Linear  # noqa: E402
from peft_ext.ops.library import OPS  # noqa: E402

BNB_8BIT = bnb.nn.Linear8bitLt


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("mode", ["eval", "train", "dropout"])
@pytest.mark.parametrize("base", BASES)
def test_output_and_gradients_are_as_good_as_pefts(base, mode, bias):
    model = make(base, lora_dropout=0.25 if mode == "dropout" else 0.0, bias=bias).train(mode != "eval")
    stock, fused = both(model)
    assert peft_ext.explain(fused).fused_share == 1.0
    with_philox(stock)
    x = inputs(base, (21,))
    assert_as_good(run(fused, x), run(stock, x), run(in_float64(stock), x.double()))


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "AdaLoRA", "IA3"])
def test_float32_activations_over_a_16_bit_compute_dtype(method, dropout, compute):
    """As behind prepare_model_for_kbit_training's norms: PEFT adds the adapter in float32, and so do we."""
    errors = {"stock": 0.0, "fused": 0.0}
    for _ in range(4):
        model = MLP(lambda k, n: four_bit(k, n, compute))
        model.is_loaded_in_4bit = True
        model = get_peft_model(model, config_of(method, **({} if method == "IA3" else {"lora_dropout": dropout})))
        spread(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # as large as the base's own output
                parameter.data *= 8
        stock, fused = both(model.train())
        wide = copy.deepcopy(model)
        for layer in tuners(wide).values():
            layer.base_layer.compute_dtype = torch.float32
        if method != "DoRA":  # whose dropped base takes PyTorch's own mask, as PEFT does
            with_philox(stock), with_philox(wide)
        x = inputs("float32", (21,))
        truth = run(wide, x)
        assert {value.dtype for value in run(fused, x).values()} == {torch.float32}
        for name, found in (("stock", run(stock, x)), ("fused", run(fused, x))):
            errors[name] += sum(float((found[k] - truth[k]).norm() / truth[k].norm()) for k in truth)
    assert errors["fused"] <= 1.1 * errors["stock"]


@pytest.mark.parametrize("base", BASES)
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
            assert error < 1e-5, name  # float32 through two layers; a wrong sign gives 2


def test_dropout_draws_from_pytorchs_generator_and_keeps_the_right_share():
    model = peft_ext.accelerate(make(lora_dropout=0.25).train())
    layer = model.base_model.model.up
    with torch.no_grad():  # y - base = x̃ Aᵀ Bᵀ s with A = B = I over 64 features: the mask itself
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
        # 12,800 draws: a standard deviation of 0.0038; six of them
        assert abs(kept.float().mean().item() - 0.75) < 0.023
    layer.lora_dropout.eval()  # the dropout module's own mode counts, not the layer's
    assert layer.training and torch.equal(layer(x)[:, :K], x)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_adapters_keep_their_dtype(adapter_dtype):
    model = make("bfloat16").to(torch.bfloat16) if adapter_dtype is torch.bfloat16 else make("bfloat16")
    stock, fused = both(model.train())
    x = inputs("bfloat16", (21,))
    found = run(fused, x)
    assert found["base_model.model.up.lora_A.default.weight"].dtype is adapter_dtype
    assert_as_good(found, run(stock, x), run(in_float64(stock), x.double()))


def test_adapters_that_are_transposed_views():
    model = make().train()
    layer = model.base_model.model.up
    layer.lora_A["default"].weight = nn.Parameter(torch.randn(K, 8).t())  # as PEFT ties them to an embedding's
    stock, fused = both(model)
    assert not tuners(fused)["base_model.model.up"].lora_A["default"].weight.is_contiguous()
    x = inputs(tokens=(21,))
    assert_as_good(run(fused, x), run(stock, x), run(in_float64(stock), x.double()))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_pefts_dtype(base, x_dtype):
    stock, fused = both(make(base).train())
    x = torch.randn(5, K, dtype=x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, actual = stock(x), fused(x)
        explanation = peft_ext.explain(fused)
    assert actual.dtype is wanted.dtype
    assert (actual.double() - wanted.double()).norm() <= 2**-6 * wanted.double().norm()
    assert explanation.fused_share == 1.0
    # a 4-bit layer that computes in float32 does so under autocast too: on its own
    alone = (
        "autocast computes in bfloat16, the layer's compute_dtype is float32" if base in ("bnb", "bnb nested") else ""
    )
    assert all(alone in row.reason and bool(alone) == bool(row.reason) for row in explanation.rows)


# --- the stock path ---------------------------------------------------------------------------------------------------


def weights(layer):
    return (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])


class Subclass(lora.Linear):
    pass


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def _merge(model):
    model.merge_adapter()


def _disable(model):
    model.base_model.disable_adapter_layers()


def _no_adapter(model):
    model.base_model.set_adapter([])


def _patch_layer(model):
    layer = first(model)
    original = type(layer).forward
    layer.forward = lambda x: original(layer, x) * 2


def _patch_base(model):
    base = first(model).base_layer
    base.forward = lambda x: nn.functional.linear(x, base.weight, base.bias) * 2


def _parametrize(model):
    nn.utils.parametrize.register_parametrization(first(model).lora_A["default"], "weight", Negated())


def _swap_dropout(model):
    first(model).lora_dropout["default"] = nn.AlphaDropout(0.3)


def _scale(value):
    def prepare(model):
        first(model).scaling["default"] = value

    return prepare


def _to_float64(model):
    model.double()


def _train_base(model):
    first(model).base_layer.weight.requires_grad_()


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


def _other_base(model):
    for layer in tuners(model).values():
        layer.base_layer.__class__ = Doubled


def _second(model):
    model.add_adapter("second", LoraConfig(target_modules=["up"], r=3, lora_bias=True, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def _ds_id(model):
    first(model).base_layer.weight.ds_id = 0


def _adapter_float64(model):
    for module in weights(first(model))[1:]:
        module.double()


HOOKS = {
    "forward hook on lora_A": lambda m: first(m).lora_A["default"].register_forward_hook(lambda *a: a[-1] * 2),
    "pre-hook on lora_B": lambda m: first(m).lora_B["default"].register_forward_pre_hook(lambda _, a: (a[0] * 2,)),
    "pre-hook on dropout": lambda m: (
        first(m).lora_dropout["default"].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    ),
    "forward hook on the base": lambda m: first(m).base_layer.register_forward_hook(lambda *args: args[-1] * 2),
    "backward hook on lora_A": lambda m: (
        first(m).lora_A["default"].register_full_backward_hook(lambda _, grads, __: (grads[0] * 2,))
    ),
    "backward pre-hook on the base": lambda m: first(m).base_layer.register_full_backward_pre_hook(
        lambda _, grads: (grads[0] * 2,)
    ),
}

STOCK = {
    "merged": (_merge, {}, "merged"),
    "disabled": (_disable, {}, "disabled"),
    "aLoRA": (None, {"alora_invocation_tokens": [1]}, "aLoRA is not fused yet"),
    "no active adapter": (_no_adapter, {}, "no active adapter"),
    "forward patched": (_patch_layer, {}, "replaced on the instance"),
    "parametrized": (_parametrize, {}, "wanted plain nn.Linear"),
    "another dropout": (_swap_dropout, {}, "AlphaDropout"),
    "dropout of 1": (None, {"lora_dropout": 1.0}, "Dropout(p=1.0"),
    "scaling is infinite": (_scale(float("inf")), {}, "finite"),
    "float64": (_to_float64, {}, "float64"),
    "float64 adapters": (_adapter_float64, {}, "lora_A is float64"),
    "ZeRO-3": (_ds_id, {}, "shard"),
    **{name: (prepare, {}, "hooks on lora_A, lora_B") for name, prepare in HOOKS.items() if "base" not in name},
}

# Fused, over the base layer's own forward where a reason says why.
FUSED = {
    "lora_bias": (None, {"lora_bias": True}, ""),
    "lora_bias, several": (_second, {"lora_bias": True}, ""),
    "scaling is a tensor": (_scale(torch.tensor(1.5)), {}, ""),
    "scaling is a tensor, several": (lambda m: (_second(m), _scale(torch.tensor([1.5]))(m)), {}, ""),
    "base forward patched": (_patch_base, {}, "hooks on base_layer"),
    "base requires grad": (_train_base, {}, "its base weight requires grad"),
    "another linear": (_other_base, {}, "its base layer is a Doubled"),
    **{name: (prepare, {}, "hooks on base_layer") for name, prepare in HOOKS.items() if "base" in name},
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", STOCK)
def test_the_stock_path_is_pefts_to_the_bit(case, when):
    prepare, config, reason = STOCK[case]
    prepare = prepare or (lambda model: None)
    stock = make(**config).train()
    fused = copy.deepcopy(stock)
    prepare(stock)
    if when == "after":
        peft_ext.accelerate(fused)
    prepare(fused)
    peft_ext.accelerate(fused)
    x = inputs()
    x = x.double() if case == "float64" else x
    row = peft_ext.explain(fused).rows[0]
    assert not row.fused and reason in row.reason
    assert row.name == "base_model.model.up"
    assert row.kind == ("aLoRA over Linear" if case == "aLoRA" else "LoRA over Linear")
    # Where the other layer is fused, it takes PEFT's class again, so that all bits can be compared.
    peft_ext.restore(fused.base_model.model.down)
    found, wanted = run(fused, x), run(stock, x)
    assert_identical(found, wanted)
    assert case in ("dropout of 1", "scaling is infinite") or wanted["y"].isfinite().all()


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", FUSED)
def test_a_bias_a_tensor_and_a_base_that_runs_on_its_own(case, base):
    prepare, config, reason = FUSED[case]
    stock = make(base, **config).train()
    (prepare or (lambda model: None))(stock)
    fused = copy.deepcopy(stock)
    wide = copy.deepcopy(stock).double()  # every layer in float64, hooks and all
    for model in (fused, wide):  # hooks and patched forwards of the first are bound to it
        for layer in tuners(model).values():
            base_layer = layer.base_layer
            base_layer._forward_hooks.clear(), base_layer._backward_pre_hooks.clear()
            base_layer.__dict__.pop("forward", None)
        if case in ("base forward patched", *HOOKS):
            prepare(model)
    peft_ext.accelerate(fused)
    row = peft_ext.explain(fused).rows[0]
    assert row.fused and (row.reason.startswith(f"the adapter's part: {reason}") if reason else row.reason == "")
    x = inputs(base, (21,))
    assert_as_good(run(fused, x), run(stock, x), run(wide, x.double()))


@pytest.mark.parametrize("train", [False, True])
def test_an_8bit_base_runs_on_its_own(train):
    model = MLP().to(torch.bfloat16)
    for name, linear in list(model.named_children()):
        eight = BNB_8BIT(linear.in_features, linear.out_features, has_fp16_weights=False)
        eight.load_state_dict(linear.state_dict())
        setattr(model, name, eight.to("cpu"))
    model.is_loaded_in_8bit = True
    model = get_peft_model(
        model, LoraConfig(target_modules=["up", "down"], r=8, lora_dropout=0.25, init_lora_weights=False)
    ).train(train)
    assert type(first(model)) is lora.Linear8bitLt
    stock, fused = both(model)
    rows = peft_ext.explain(fused).rows
    assert [row.kind for row in rows] == ["LoRA over Linear8bitLt"] * 2
    assert all(row.fused and "its base layer is a Linear8bitLt" in row.reason for row in rows)
    with_philox(stock)
    x = inputs("bfloat16", (21,))
    found, wanted = run(fused, x), run(stock, x)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():  # eight bits of x: a rounding that moves moves them
        assert found[name].dtype is value.dtype
        assert (found[name] - value).norm() <= 2e-2 * value.norm(), name
    assert type(first(peft_ext.restore(fused))) is lora.Linear8bitLt


def test_a_global_hook_takes_the_stock_path():
    stock, fused = both(make())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        assert "hooks" in peft_ext.explain(fused).rows[0].reason
        x = inputs()
        stock(x)
        wanted = [FUSED_BY_STOCK.get(kind, kind) if kind is lora.Linear else kind for kind in seen]
        seen.clear()
        fused(x)
        assert seen == wanted
    finally:
        handle.remove()
    assert peft_ext.explain(fused).fused_share == 1.0


def test_without_a_native_kernel_the_stock_path_runs(monkeypatch):
    """The reference behind the op is correct and slower than PEFT: it must not run in a layer's place."""
    monkeypatch.setattr(reasons, "KERNELS", {op: {"cpu": False} for op in reasons.KERNELS})
    for base in BASES:
        stock, fused = both(make(base).eval())
        x = inputs(base)
        assert_identical(run(fused, x), run(stock, x))
        rows = peft_ext.explain(fused).rows
        assert rows and {row.reason for row in rows} == {"no native kernels of lora_linear for cpu tensors are loaded"}


@pytest.mark.parametrize("op", reasons.KERNELS)
def test_a_layer_on_a_gpu_is_fused_where_the_cuda_library_has_its_kernels(op, monkeypatch):
    def loaded(*missing):
        monkeypatch.setattr(reasons, "has_kernel", lambda name, key: key == "CPU" or name not in missing)
        monkeypatch.setattr(reasons, "KERNELS", reasons.native_kernels())
        return reasons.kernel_reason(op, "cuda")

    monkeypatch.setattr(reasons.STATE, "cuda_loaded", True)
    assert loaded() is None
    for name in reasons._CALLED[op]:  # the forward alone is not enough
        assert loaded(name) == f"no native kernels of {op} for cuda tensors are loaded"
        assert reasons.kernel_reason(op, "cpu") is None
    monkeypatch.setattr(reasons.STATE, "cuda_loaded", False)
    monkeypatch.setattr(reasons.STATE, "cuda_error", "not built")
    everything = {name for called in reasons._CALLED.values() for name in called}
    assert loaded(*everything) == "it is on a GPU, and the CUDA library is not loaded (not built)"
    assert set(reasons._CALLED[op]) <= set(OPS)


NAMES = ["default", "other", "__base__", "other", "third", "default", "default"]


def mixed(base="float32", **config):
    """Three adapters of other ranks, scales and targets; "third" is on one layer alone."""
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
    """PEFT's own layers over NF4Linear in place of bitsandbytes' Linear4bit."""
    model = copy.deepcopy(model)
    for layer in tuners(model).values():
        base = layer.base_layer
        nf4 = NF4Linear.from_nf4(peft_ext.NF4Weight.from_bitsandbytes(base.weight), base.bias)
        layer.base_layer, layer.__class__ = nf4, lora.Linear
        layer.fan_in_fan_out = False
    return model


@pytest.mark.parametrize("length", [1, 13])
@pytest.mark.parametrize("base", BASES)
def test_a_mixed_batch_is_one_call_as_good_as_pefts_loop(base, length, grouped_calls):
    stock, fused = both(mixed(base, lora_dropout=0.3))
    for model in (stock, fused):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    x = inputs(base, (len(NAMES), length))
    exact = run(in_float64(stock), x.double(), adapter_names=NAMES)
    found = run(fused, x, adapter_names=NAMES)
    assert len(grouped_calls) == 2
    if base.startswith("bnb"):  # PEFT adds in place to bitsandbytes' output: it has no gradient there
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
    peft_ext.restore(fused.base_model.model.down)  # where it is fused: so that all bits can be compared
    x, found = inputs(tokens=(len(NAMES), 5)), []
    for model in (stock, fused):
        torch.manual_seed(3)
        found.append(model(x, adapter_names=NAMES))
    assert torch.equal(*found)
    assert not grouped_calls


def test_extra_arguments_and_the_argument_check():
    stock, fused = both(mixed())
    x = inputs(tokens=(len(NAMES), 5))
    for layers in (("third",), ("__base__",)):  # the first layer has neither
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


def test_inputs_that_do_not_fit_fail_or_pass_as_in_peft():
    stock, fused = both(make())
    for x in (torch.randn(2, K).bfloat16(), torch.ones(2, K, dtype=torch.int64), torch.randn(2, K).double()):
        with pytest.raises(RuntimeError) as wanted:
            stock(x)
        with pytest.raises(RuntimeError) as actual:
            fused(x)
        assert str(actual.value) == str(wanted.value)
    fused.to("meta"), stock.to("meta")
    assert fused(torch.empty(2, K, device="meta")).shape == (2, N)
    assert "on meta" in peft_ext.explain(fused).rows[0].reason


def test_transforms_take_the_stock_path():
    stock, fused = both(make())
    x = inputs(tokens=(5,))
    per_row = [torch.func.vmap(torch.func.grad(lambda row, m=m: m(row).sum()))(x) for m in (stock, fused)]
    assert torch.equal(per_row[1], per_row[0])
    traced = torch.jit.trace(fused, x)
    assert torch.equal(traced(x), stock(x))
    exported = torch.export.export(fused, (x,))
    assert not any("peft_ext" in str(node.target) for node in exported.graph.nodes)


def test_input_cast_switched_off_takes_the_stock_path():
    stock, fused = both(make("bfloat16").to(torch.bfloat16))
    x = inputs("bfloat16")
    with disable_input_dtype_casting(stock), disable_input_dtype_casting(fused):
        assert "cast_input_dtype_enabled" in peft_ext.explain(fused).rows[0].reason
        assert torch.equal(fused(x), stock(x))
    assert peft_ext.explain(fused).fused_share == 1.0


@pytest.mark.parametrize("shape", [(0,), (100,)])
def test_a_flat_shard_is_not_read(shape):
    fused = peft_ext.accelerate(make())
    base = first(fused).base_layer
    base.weight.data = torch.zeros(shape)
    assert "shard" in peft_ext.explain(fused).rows[0].reason
    with pytest.raises(RuntimeError):  # PyTorch's own error, from PEFT's path
        fused(inputs())


def test_a_dtensor_is_not_read(tmp_path):
    distributed = torch.distributed
    from torch.distributed.tensor import distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        fused = peft_ext.accelerate(make())
        base = first(fused).base_layer
        base.weight = nn.Parameter(distribute_tensor(base.weight.data, mesh), requires_grad=False)
        assert "is a DTensor" in peft_ext.explain(fused).rows[0].reason
    finally:
        distributed.destroy_process_group()


def test_layers_of_other_types_stay_as_they_are():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.conv1d, self.embedding = nn.Linear(K, K), Conv1D(K, K), nn.Embedding(9, K)

        def forward(self, ids):
            return self.conv1d(self.linear(self.embedding(ids)))

    targets = ["linear", "conv1d", "embedding"]
    model = get_peft_model(Mixed(), LoraConfig(target_modules=targets, init_lora_weights=False))
    model.base_model.model.linear.__class__ = Subclass
    stock, fused = both(model)
    ids = torch.arange(9)
    torch.testing.assert_close(fused(ids), stock(ids), rtol=1e-5, atol=1e-5)
    rows = {row.name.rpartition(".")[2]: row for row in peft_ext.explain(fused).rows}
    assert "Conv1D" not in rows["linear"].kind and "Subclass is a subclass of PEFT's Linear" in rows["linear"].reason
    assert rows["conv1d"] == integration.Row("base_model.model.conv1d", "LoRA over Conv1D", True, "")
    assert rows["embedding"].reason == "LoRA over Embedding is not fused yet"
    assert [name for name, row in rows.items() if row.fused] == ["conv1d"]


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_4bit_linear(nested, compute, x_dtype):
    stock = nn.Sequential(four_bit(K, N, compute, nested))
    nn.init.normal_(stock[0].bias)
    fused = peft_ext.accelerate(copy.deepcopy(stock))
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
    assert fused[0].bias.dtype is torch.float32  # bitsandbytes has cast its own for good
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
    layer.support_avx512bf16_for_cpu = True  # as on a CPU that has it
    packed = layer.weight.data.clone()
    with torch.no_grad():
        fused(torch.randn(2, K).bfloat16())
        fused(torch.randn(2, K).double())  # the stock path
        if adapted:
            with fused.disable_adapter():
                fused(torch.randn(2, K).bfloat16())
    assert torch.equal(layer.weight.data, packed)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    for name, value in fused.state_dict().items():
        assert torch.equal(value, before[name]), name
    peft_ext.restore(fused)
    assert layer.support_avx512bf16_for_cpu is True


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_training_after_evaluation_has_the_gradients_of_training_alone(quant_type):
    """Where the CPU has AVX-512 BF16, bitsandbytes repacks in evaluation: of 4-bit weights below others the gradients
    are lost then."""

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
    for one, two in zip(grads(False), grads(True), strict=True):
        assert torch.equal(one, two)


def test_a_weight_that_was_repacked_before_is_said():
    model = nn.Sequential(four_bit(K, K), four_bit(K, K))
    model[1].weight.quant_state.packing_format_for_cpu = True
    with pytest.warns(UserWarning, match=r"repacked the weight of 1 for its CPU inference \(1 in all\): training"):
        peft_ext.accelerate(model)


def test_4bit_weights_that_stay_stock():
    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.fp4, self.derived = four_bit(K, K, quant_type="fp4"), bnb.nn.LinearNF4(K, K).to("cpu")
            self.waiting, self.repacked = bnb.nn.Linear4bit(K, K, quant_type="nf4"), four_bit(K, K)
            self.eight, self.ours = BNB_8BIT(K, K), NF4Linear(K, K)

    model = Kinds()
    model.repacked.weight.quant_state.packing_format_for_cpu = True
    with pytest.warns(UserWarning, match="repacked the weight of repacked"):
        stock, fused = both(model.train())
    rows = {row.name: row for row in peft_ext.explain(fused).rows}
    assert len(rows) == 6
    assert "'fp4', wanted 'nf4'" in rows["fp4"].reason
    assert rows["derived"].reason == "LinearNF4 is not fused; only Linear4bit itself is"
    assert "not quantized yet" in rows["waiting"].reason
    assert "repacked" in rows["repacked"].reason
    assert rows["eight"].reason == "Linear8bitLt is not fused; only Linear4bit itself is"
    assert rows["ours"].fused
    x = torch.randn(3, K, requires_grad=True)
    for name in ("fp4", "derived"):
        assert torch.equal(getattr(fused, name)(x), getattr(stock, name)(x))


def test_lora_linear_over_a_4bit_layer():
    """Where the model does not say that it was loaded in 4 bits, PEFT adapts a Linear4bit with its plain Linear."""
    model = quantize(MLP(), "bnb")
    del model.is_loaded_in_4bit
    model = get_peft_model(model, LoraConfig(target_modules=["up", "down"], init_lora_weights=False))
    assert type(first(model)) is lora.Linear
    stock, fused = both(model.train())
    assert peft_ext.explain(fused).rows[0] == integration.Row("base_model.model.up", "LoRA over Linear4bit", True, "")
    x = inputs(tokens=(21,))
    assert_as_good(run(fused, x), run(stock, x), run(in_float64(stock), x.double()))


# --- what a model goes through ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_restore_leaves_nothing_behind(base):
    model = make(base, lora_dropout=0.1)
    before, keys, text = state_of(model), list(model.state_dict()), repr(model)
    assert peft_ext.accelerate(model) is model
    assert peft_ext.accelerate(model) is model  # again: harmless
    changed = [name for name, (kind, _) in state_of(model).items() if kind is not before[name][0]]
    assert len(changed) == (4 if base.startswith("bnb") else 2)
    assert repr(model) == text and list(model.state_dict()) == keys
    assert all(isinstance(layer, lora.LoraLayer) for layer in tuners(model).values())
    run(model.eval(), inputs(base))
    model.train()
    peft_ext.explain(model)
    assert peft_ext.restore(model) is model
    after = state_of(model)
    for name, (kind, held) in before.items():
        assert after[name][0] is kind and after[name][1].keys() == held.keys(), name


@pytest.mark.parametrize("base", ["float32", "nf4", "bnb"])
def test_saved_files_are_the_same_and_stock_peft_loads_them(base, tmp_path):
    model = make(base)
    model.save_pretrained(tmp_path / "before")
    peft_ext.accelerate(model)
    model.save_pretrained(tmp_path / "after")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()
    x = inputs(base)
    wanted = model(x)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model.unload()), tmp_path / "after")
    torch.testing.assert_close(loaded(x), wanted, rtol=1e-4, atol=1e-5)
    # and a model that is accelerated loads what stock PEFT saved
    loaded = peft_ext.accelerate(loaded)
    loaded.load_adapter(tmp_path / "before", adapter_name="again")
    loaded.set_adapter("again")
    assert peft_ext.explain(loaded).fused_share == 1.0
    torch.testing.assert_close(loaded(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["float32", "nf4", "bnb"])
def test_adapters_come_and_go(base):
    stock, fused = both(make(base))
    x = inputs(base)

    def agree():
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-5)

    for model in (stock, fused):
        torch.manual_seed(6)
        model.add_adapter("other", LoraConfig(target_modules=["up"], r=3, init_lora_weights=False))
    agree()
    for model in (stock, fused):
        model.set_adapter("other")
    agree()
    rows = peft_ext.explain(fused).rows
    assert rows[0].fused and rows[1].reason == "no active adapter on this layer"
    for model in (stock, fused):
        model.delete_adapter("default")
    agree()
    for model in (stock, fused):
        first(model).set_scale("other", 3.0)
    agree()


def test_layers_added_later_are_stock_until_accelerated():
    model = make(target_modules=["up"])
    peft_ext.accelerate(model)
    model.add_adapter("other", LoraConfig(target_modules=["down"], init_lora_weights=False))
    rows = {row.name: row for row in peft_ext.explain(model).rows}
    assert rows["base_model.model.up"].fused
    assert rows["base_model.model.down"].reason == "accelerate(model) was not called on it"
    peft_ext.accelerate(model)
    model.set_adapter("other")
    assert {row.name: row.fused for row in peft_ext.explain(model).rows} == {
        "base_model.model.up": False,
        "base_model.model.down": True,
    }


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_stay_fused(base, clone):
    fused = peft_ext.accelerate(make(base))
    other = clone(fused)
    x = inputs(base)
    assert peft_ext.explain(other).fused_share == 1.0
    assert torch.equal(other(x), fused(x))
    assert {type(layer) for layer in tuners(peft_ext.restore(other)).values()} <= {lora.Linear, lora.Linear4bit}
    assert peft_ext.explain(fused).fused_share == 1.0


def test_the_trees_that_transformers_injects():
    model = inject_adapter_in_model(LoraConfig(target_modules=["up"], init_lora_weights=False), MLP())
    peft_ext.accelerate(model)
    assert peft_ext.explain(model).rows == [integration.Row("up", "LoRA over Linear", True, "")]


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("base", ["float32", "bfloat16", "bnb", "bnb nested"])
def test_merging_is_pefts(base, safe):
    stock, fused = both(make(base).train())
    x = inputs(base)
    for model in (stock, fused):
        model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(fused(x), stock(x))
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
def test_merging_into_nf4_requantizes_and_unmerging_gives_the_bits_back(base, safe):
    model = peft_ext.accelerate(make(base))
    layer = first(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = inputs(base)
    unmerged, nf4 = model(x), layer.base_layer.nf4
    wanted = peft_ext.ops.nf4_quantize(
        nf4.dequantize(torch.float32) + layer.get_delta_weight("default"), nf4.blocksize, nf4.nested is not None
    )
    model.merge_adapter(safe_merge=safe)
    merged = layer.base_layer.nf4
    # A code may fall on the other side of a threshold: the sums of B A have another order.
    found = merged.dequantize(torch.float32)
    assert ((found - wanted.dequantize(torch.float32)).abs() > 1e-4).float().mean() < 1e-2
    error = layer.base_layer.merge_error
    dense = nf4.dequantize(torch.float32) + layer.get_delta_weight("default")
    assert error == pytest.approx(((found - dense).norm() / dense.norm()).item(), rel=0.05)
    assert f"requantizing moved its weight by {error:.2%}" in peft_ext.explain(model).rows[0].reason
    assert layer.base_layer.nf4.dtype is nf4.dtype and layer.base_layer.weight.dtype is torch.uint8
    # NF4 keeps about 10% of a weight's norm as error; the adapter's share is far above it
    assert (model(x) - unmerged).norm() < 0.5 * unmerged.norm()
    clone = copy.deepcopy(model)
    for copied in (model, clone):
        copied.unmerge_adapter()
        assert_identical(copied.state_dict(), before)
        assert torch.equal(copied(x), unmerged)
        assert KEPT not in vars(first(copied)) and first(copied).base_layer.merge_error is None
    model.merge_and_unload(safe_merge=safe)
    base_layer = model.base_model.model.up
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
    with pytest.raises(RuntimeError, match="base_model.model.up is merged into an NF4 weight"):
        peft_ext.restore(model)
    assert state_of(model) == before
    model.unmerge_adapter()
    assert type(first(peft_ext.restore(model))) is lora.Linear


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("base", ["float32", "nf4", "bnb"])
def test_checkpointing_draws_the_same_mask_again(base, reentrant):
    model = peft_ext.accelerate(make(base, lora_dropout=0.4).train())

    class Checkpointed(nn.Module):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)

        def named_parameters(self):
            return model.named_parameters()

        def zero_grad(self):
            model.zero_grad()

    x = inputs(base)
    assert_identical(run(Checkpointed(), x), run(model, x))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_into_one_graph(base, dropout):
    torch._dynamo.reset()
    model = peft_ext.accelerate(make(base, lora_dropout=dropout).train())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = inputs(base)
    assert_identical_to_rounding(run_compiled(compiled, model, x), run(model, x))


def run_compiled(compiled, model, x):
    found = run(compiled, x)
    return {name.removeprefix("_orig_mod."): value for name, value in found.items()}


def assert_identical_to_rounding(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_a_changed_scale_and_adapter_recompile():
    torch._dynamo.reset()
    model = peft_ext.accelerate(make())
    model.add_adapter("other", LoraConfig(target_modules=["up", "down"], r=2, init_lora_weights=False))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = inputs()
    torch.testing.assert_close(compiled(x), model(x))
    for scale in (2.0, 3.0, 4.0):
        first(model).set_scale("default", scale)
        torch.testing.assert_close(compiled(x), model(x))
    model.set_adapter("other")
    torch.testing.assert_close(compiled(x), model(x))
    model.base_model.disable_adapter_layers()
    torch.testing.assert_close(compiled(x), model(x))


def test_a_trainer_run_has_pefts_losses(tmp_path):
    ids = torch.randint(0, 97, (20, 16))
    data = [{"input_ids": row, "labels": row} for row in ids]

    def losses(model, folder):
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=5, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-2,
            report_to=[], save_strategy="no", use_cpu=True, seed=11, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    stock, fused = both(llama(init_lora_weights=True))
    wanted, actual = losses(stock, tmp_path / "stock"), losses(fused, tmp_path / "fused")
    assert len(wanted) == 5 and not torch.equal(wanted, wanted[0].expand(5))
    torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)


# --- explain ----------------------------------------------------------------------------------------------------------


def test_explain_names_every_method():
    rows = peft_ext.explain(make()).rows
    assert [(row.kind, row.fused, row.reason) for row in rows] == [
        ("LoRA over Linear", False, "accelerate(model) was not called on it")
    ] * 2
    model = get_peft_model(MLP(), VeraConfig(target_modules=["up"]))
    explanation = peft_ext.explain(peft_ext.accelerate(model))
    assert {(row.kind, row.fused, row.reason) for row in explanation.rows} == {
        ("VeRA over Linear", False, "VeRA is not fused yet")
    }
    assert explanation.fused_share == 0.0
    for base, kind in (("nf4", "NF4Linear"), ("bnb", "Linear4bit")):
        rows = peft_ext.explain(peft_ext.accelerate(make(base))).rows
        assert [(row.kind, row.fused, row.reason) for row in rows] == [(f"LoRA over {kind}", True, "")] * 2
    assert peft_ext.explain(MLP()).rows == [] and peft_ext.explain(MLP()).fused_share == 0.0


def test_explain_prints_a_table():
    explanation = peft_ext.explain(peft_ext.accelerate(make(target_modules=["up"])))
    assert str(explanation).splitlines() == [
        "layer                kind              fused  reason",
        "base_model.model.up  LoRA over Linear  yes",
        "1 of 1 layers fused (100%)",
    ]
    rows = [integration.Row(f"layer.{i}", "LoRA over Linear", True, "") for i in range(30)]
    rows += [integration.Row("head", "DoRA over Linear", False, "DoRA is not fused yet")]
    text = str(integration.Explanation(rows))
    assert len(text.splitlines()) == 4
    assert "30 x, first layer.0" in text and "DoRA is not fused yet" in text and "30 of 31 layers fused (97%)" in text


def test_wrong_arguments_are_named():
    for function in (peft_ext.accelerate, peft_ext.restore, peft_ext.explain):
        with pytest.raises(TypeError, match=f"{function.__name__}: model is str, wanted an nn.Module"):
            function("model")


def test_models_without_any_adapter_pass_through():
    model = MLP()
    assert peft_ext.restore(peft_ext.accelerate(model)) is model
    assert type(model.up) is nn.Linear


# --- a base that runs on its own, and adapters swapped in place -------------------------------------------------------

SWAPPED = {"small": {"r": 4, "lora_alpha": 3}, "large": {"r": 9, "lora_alpha": 7}}


def test_hooks_of_a_base_run_once_and_in_order():
    x, found = inputs(), []
    for accelerated in (False, True):
        torch.manual_seed(0)
        model, calls = make(), []
        base = first(model).base_layer
        base.register_forward_pre_hook(lambda module, args, calls=calls: calls.append("before"))
        base.register_forward_hook(lambda module, args, y, calls=calls: calls.append("after") or y * 2)
        base.register_full_backward_hook(lambda module, *grads, calls=calls: calls.append("backward"))
        if accelerated:
            peft_ext.accelerate(model)
            assert peft_ext.explain(model).rows[0].fused
        found.append((run(model, x), calls))
    (wanted, theirs), (actual, ours) = found
    assert ours == theirs == ["before", "after", "backward"]
    assert_identical_to_rounding(actual, wanted)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_8bit_layers_are_copied_pickled_and_checkpointed(clone):
    model = MLP().to(torch.bfloat16)
    eight = BNB_8BIT(K, HIDDEN, has_fp16_weights=False)
    eight.load_state_dict(model.up.state_dict())
    model.up = eight.to("cpu")
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
    for name, parameter in fused.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, wanted[name]), name


@pytest.mark.parametrize(
    ("base", "compiled"), [*((base, False) for base in BASES), ("float32", True), ("nf4 bfloat16", True)]
)
def test_swapped_adapters_are_pefts(base, compiled, tmp_path):
    """PEFT's hotswap makes the scale a tensor and pads the rank: another adapter, in the same graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for name, config in SWAPPED.items():
        make(base, **config).save_pretrained(tmp_path / name)
    stock, fused = both(make(base, **SWAPPED["small"]).train())  # in eval mode bitsandbytes rounds x to bfloat16
    for model in (stock, fused):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=12)
    if compiled:
        fused.compile(fullgraph=True, backend="aot_eager")
    x, seen, graphs = inputs(base, (21,)), [], []
    for name in (None, *SWAPPED, "large"):
        for model in (stock, fused) if name else ():
            hotswap.hotswap_adapter(model, tmp_path / name, "default", torch_device="cpu")
        assert peft_ext.explain(fused).fused_share == 1.0
        assert_as_good({"x": x, "y": fused(x)}, {"x": x, "y": stock(x)}, {"x": x, "y": in_float64(stock)(x.double())})
        seen.append(fused(x).detach())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert not torch.allclose(seen[1], seen[2], rtol=0.1) and torch.equal(seen[2], seen[3])
    assert len(set(graphs)) == 1 and (graphs[0] > 0) is compiled


class Wide(nn.Linear):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x).double()


@pytest.mark.parametrize("method", ["LoRA", "AdaLoRA", "IA3"])
def test_a_base_whose_result_the_op_does_not_take_runs_once(method):
    from peft_models import make_method

    stock = make() if method == "LoRA" else make_method(method)
    for layer in tuners(stock).values():
        layer.base_layer.__class__ = Wide
    model = stock.base_model.model
    stock, fused = both(stock.eval())
    assert peft_ext.explain(fused).fused_share == 1.0
    for name, features in (("up", K), ("down", HIDDEN)):
        x = torch.randn(3, features)
        wanted = getattr(model, name)(x)
        Wide.calls = 0
        found = getattr(fused.base_model.model, name)(x)
        assert Wide.calls == 1 and found.dtype is wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_accelerate_says_where_there_is_nothing_to_accelerate() -> None:
    with pytest.warns(UserWarning, match="Linear has no adapter layer and no 4-bit layer, nothing to accelerate: call"):
        peft_ext.accelerate(nn.Linear(4, 4))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "IA3"])
def test_falcons_linear_with_a_bias_is_float32_under_autocast_as_in_peft(method, bias):
    """It adds the bias apart: autocast multiplies in bfloat16, and the sum with a float32 bias is float32."""
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
    stock = get_peft_model(Model(), config)
    fused = peft_ext.accelerate(copy.deepcopy(stock))
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = stock(x), fused(x)
    assert found.dtype is wanted.dtype is (torch.float32 if bias else torch.bfloat16)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_a_4bit_weight_of_inference_mode_trains_as_in_peft():
    """PEFT's merge and unmerge make one, where they run in inference mode."""
    base = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    with torch.inference_mode():
        weight = torch.randn(32, 64)
        base.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=base).to("cpu")
    model = nn.Sequential()
    model.add_module("proj", base)
    model.is_loaded_in_4bit = True
    stock = get_peft_model(model, LoraConfig(target_modules=["proj"], init_lora_weights=False))
    fused = peft_ext.accelerate(copy.deepcopy(stock))
    fused.get_submodule("base_model.model.proj").base_layer.weight = base.weight
    assert base.weight.is_inference()
    x = torch.randn(4, 64)
    for model in (stock, fused):
        model(x).sum().backward()
    for (name, wanted), (_, found) in zip(stock.named_parameters(), fused.named_parameters(), strict=True):
        if wanted.requires_grad:
            torch.testing.assert_close(found.grad, wanted.grad, msg=name)
