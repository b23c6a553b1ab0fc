"""Tests of accelerate on live PEFT models: a layer that is not fused gives bitwise PEFT's results, and explain gives
the reason.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners import lora
from peft_models import (
    HIDDEN,
    METHODS,
    K,
    N,
    activate,
    assert_as_good,
    assert_identical,
    both,
    config_of,
    dense_twin,
    every_base,
    every_method,
    first,
    inputs,
    make,
    make_method,
    run,
    stock_of,
    tuners,
)
from transformers.pytorch_utils import Conv1D

import peft_ext
from peft_ext.integrations import peft as integration
from peft_ext.integrations.adapter_layers import dora, reasons
from peft_ext.integrations.adapter_layers.base import FUSED as FUSED_BY_STOCK
from peft_ext.ops import cards
from peft_ext.ops.library import OPERATORS, PUBLIC

pytestmark = pytest.mark.filterwarnings("ignore")


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


def _double(*args):
    """Returns twice the layer's output, as a forward hook."""
    return args[-1] * 2


def _patch_layer(model):
    layer = first(model)
    original = type(layer).forward
    layer.forward = lambda x: original(layer, x) * 2


def _patch_base(model):
    base = first(model).base_layer
    base.forward = lambda x: nn.functional.linear(x, base.weight, base.bias) * 2


def _parametrize(held, name):
    return lambda model: nn.utils.parametrize.register_parametrization(held(first(model)), name, Negated())


def _scale(value):
    return lambda model: first(model).scaling.update(default=value)


def _other_base(model):
    for layer in tuners(model).values():
        layer.base_layer.__class__ = Doubled


def _second(model):
    model.add_adapter("second", LoraConfig(target_modules=["up"], r=3, lora_bias=True, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def _adapter_float64(model):
    for held in (first(model).lora_A, first(model).lora_B):
        held["default"].double()


def _add(method, **config):
    def prepare(model):
        torch.manual_seed(2)
        model.add_adapter("other", config_of(method, **config))
        activate(model, ["default", "other"])

    return prepare


def _other_dtype(model):
    _add("LoRA", r=2)(model)
    for held in (first(model).lora_A, first(model).lora_B):
        held["other"].to(torch.bfloat16)


def _other_vector_dtype(model):
    _add("IA3")(model)
    held = first(model).ia3_l
    held["other"] = nn.Parameter(held["other"].data.bfloat16())


def _resize(model):
    for layer in tuners(model).values():
        layer.update_layer("default", 0, 12, config_of("AdaLoRA"))


def _bias_of_lora_A(model):
    lora_A = first(model).lora_A["default"]
    lora_A.bias = nn.Parameter(torch.ones(lora_A.out_features))


def _hook_magnitudes(model):
    for layer in tuners(model).values():
        layer.lora_magnitude_vector["default"].register_forward_hook(_double)


HOOKS = {
    "forward hook on lora_A": lambda m: first(m).lora_A["default"].register_forward_hook(_double),
    "pre-hook on lora_B": lambda m: first(m).lora_B["default"].register_forward_pre_hook(lambda _, a: (a[0] * 2,)),
    "pre-hook on dropout": lambda m: (
        first(m).lora_dropout["default"].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    ),
    "forward hook on the base": lambda m: first(m).base_layer.register_forward_hook(_double),
    "backward hook on lora_A": lambda m: (
        first(m).lora_A["default"].register_full_backward_hook(lambda _, grads, __: (grads[0] * 2,))
    ),
    "backward pre-hook on the base": lambda m: first(m).base_layer.register_full_backward_pre_hook(
        lambda _, grads: (grads[0] * 2,)
    ),
}
COMMON = {
    "disabled": (lambda m: m.base_model.disable_adapter_layers(), "disabled"),
    "merged": (lambda m: m.merge_adapter(), "merged"),
    "no adapter": (lambda m: activate(m, []), "no active adapter"),
    "patched": (_patch_layer, "replaced on the instance"),
    "float64": (lambda m: m.double(), "float64"),
}
ON_ITS_OWN = {  # bases over which DoRA is not fused, and only the adapter's term of other methods is fused
    "base requires grad": (lambda m: first(m).base_layer.weight.requires_grad_(), "requires grad"),
    "base hook": (HOOKS["forward hook on the base"], "hooks on base_layer"),
}
STOCK = {
    **{f"{method}: {name}": (method, case[0], {}, case[1]) for method in METHODS for name, case in COMMON.items()},
    **{f"DoRA: {name}": ("DoRA", case[0], {}, case[1]) for name, case in ON_ITS_OWN.items()},
    "LoRA: aLoRA": ("LoRA", None, {"alora_invocation_tokens": [1]}, "aLoRA is not fused yet"),
    "LoRA: no active adapter": ("LoRA", lambda m: m.base_model.set_adapter([]), {}, "no active adapter"),
    "LoRA: parametrized": ("LoRA", _parametrize(lambda layer: layer.lora_A["default"], "weight"), {},
                           "wanted plain nn.Linear"),
    "LoRA: another dropout": ("LoRA", lambda m: first(m).lora_dropout.update({"default": nn.AlphaDropout(0.3)}), {},
                              "AlphaDropout"),
    "LoRA: a bias of lora_A": ("LoRA", _bias_of_lora_A, {}, "lora_A has a bias"),
    "LoRA: scaling is infinite": ("LoRA", _scale(float("inf")), {}, "finite"),
    "LoRA: float64 adapters": ("LoRA", _adapter_float64, {}, "lora_A is float64"),
    "LoRA: ZeRO-3": ("LoRA", lambda m: setattr(first(m).base_layer.weight, "ds_id", 0), {}, "shard"),
    **{f"LoRA: {name}": ("LoRA", prepare, {}, "hooks on lora_A, lora_B") for name, prepare in HOOKS.items()
       if "base" not in name},
    **{f"{method}: dropout of 1": (method, None, {"lora_dropout": 1.0}, "Dropout(p=1.0") for method in METHODS
       if method != "IA3"},
    "DoRA: beside LoRA": ("DoRA", _add("LoRA", r=2), {}, "DoRA beside another active adapter"),
    "DoRA: hook on the magnitude": ("DoRA", _hook_magnitudes, {}, "hooks on lora_magnitude_vector"),
    "AdaLoRA: rank 0": ("AdaLoRA", _resize, {}, "rank 0"),
    "AdaLoRA: parametrized": ("AdaLoRA", _parametrize(lambda layer: layer.lora_E, "default"), {},
                              "lora_E is a NoneType"),
    "IA3: parametrized": ("IA3", _parametrize(lambda layer: layer.ia3_l, "default"), {}, "ia3_l is a NoneType"),
    "several: a mask each": ("LoRA", _add("LoRA", r=2, lora_dropout=0.5), {}, "a dropout mask each"),
    "several: dtypes": ("LoRA", _other_dtype, {}, "several adapters: float32 on cpu, bfloat16 on cpu"),
    "several IA3: dtypes": ("IA3", _other_vector_dtype, {}, "several active adapters: float32 on cpu, bfloat16"),
    "several: a variant": ("LoRA", _add("DoRA", r=2), {}, "DoRA beside another active adapter"),
}  # fmt: skip

# Cases in which a whole LoRA layer is fused, or only the layer's low-rank term over the base layer's own forward. The
# third value is the reason that explain gives for the base layer; "" if the whole layer is fused.
FUSED = {
    "lora_bias": (None, {"lora_bias": True}, ""),
    "lora_bias, several": (_second, {"lora_bias": True}, ""),
    "scaling is a tensor": (_scale(torch.tensor(1.5)), {}, ""),
    "scaling is a tensor, several": (lambda m: (_second(m), _scale(torch.tensor([1.5]))(m)), {}, ""),
    "base forward patched": (_patch_base, {}, "hooks on base_layer"),
    "base requires grad": (ON_ITS_OWN["base requires grad"][0], {}, "its base weight requires grad"),
    "another linear": (_other_base, {}, "its base layer is a Doubled"),
    **{name: (prepare, {}, "hooks on base_layer") for name, prepare in HOOKS.items() if "base" in name},
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", STOCK)
def test_the_stock_path_is_pefts_to_the_bit(case, when):
    method, prepare, config, reason = STOCK[case]
    prepare = prepare or (lambda model: None)
    stock = make_method(method, **config).train()
    fused = copy.deepcopy(stock)
    prepare(stock)
    if when == "after":
        peft_ext.accelerate(fused)
    prepare(fused)
    peft_ext.accelerate(fused)
    x = inputs()
    x = x.double() if case.endswith(": float64") else x
    row = peft_ext.explain(fused).rows[0]
    assert not row.fused and reason in row.reason, row
    assert row.name == "base_model.model.up"
    if case.startswith("LoRA: "):
        assert row.kind == ("aLoRA over Linear" if case == "LoRA: aLoRA" else "LoRA over Linear")
    # The layer `down` becomes stock again if it is fused, so that all bits can be compared.
    peft_ext.restore(fused.base_model.model.down)
    found, wanted = run(fused, x), run(stock, x)
    assert_identical(found, wanted)
    assert case.endswith(("dropout of 1", "scaling is infinite")) or wanted["y"].isfinite().all()


def test_a_dropout_that_writes_into_its_input_is_not_fused():
    model = make_method("LoRA").train()
    first(model).lora_dropout.update({"default": nn.Dropout(0.3, inplace=True)})
    row = peft_ext.explain(peft_ext.accelerate(model)).rows[0]
    assert not row.fused and row.reason == "Dropout(p=0.3, inplace=True) is not fused"


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", FUSED)
def test_a_bias_a_tensor_and_a_base_that_runs_on_its_own(case, base):
    prepare, config, reason = FUSED[case]
    stock = make(base, **config).train()
    (prepare or (lambda model: None))(stock)
    fused = copy.deepcopy(stock)
    wide = copy.deepcopy(stock).double()  # All layers compute in float64, also within hooks.
    for model in (fused, wide):  # A copied patched forward still calls the first model.
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


@pytest.mark.parametrize("name", ON_ITS_OWN)
@pytest.mark.parametrize("method", ["IA3", "AdaLoRA"])
def test_over_a_base_that_runs_on_its_own_the_adapters_part_is_fused(method, name):
    prepare, reason = ON_ITS_OWN[name]
    stock = make_method(method).train()
    fused = copy.deepcopy(stock)
    for model in (stock, fused):
        for layer in ("up", "down"):  # one of the two layers is (IA)³'s feedforward layer
            prepare(SimpleNamespace(base_model=SimpleNamespace(model=SimpleNamespace(up=getattr(model, layer)))))
    peft_ext.accelerate(fused)
    rows = peft_ext.explain(fused).rows
    assert len(rows) == 2
    assert all(row.fused and row.reason.startswith("the adapter's part: ") and reason in row.reason for row in rows)
    x = inputs(tokens=(21,))
    torch.testing.assert_close(run(fused, x), run(stock, x), rtol=1e-4, atol=1e-5)


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
    torch.testing.assert_close(actual, wanted)


class Wide(nn.Linear):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x).double()


@pytest.mark.parametrize("method", ["LoRA", "AdaLoRA", "IA3"])
def test_a_base_whose_result_the_op_does_not_take_runs_once(method):
    stock = make_method(method)
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


# --- what is not loaded, not given or not read ------------------------------------------------------------------------


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(reasons, "KERNELS", {op: {"cpu": False} for op in reasons.KERNELS})


@every_base
@every_method
def test_without_a_native_kernel_the_stock_path_runs(method, base, no_kernels):
    """Without a kernel an operator would run the reference, which is slower than PEFT, so PEFT's layer must run."""
    model = make_method(method, base)
    stock, fused = stock_of(model), peft_ext.accelerate(model)
    x = inputs(base, (21,))
    for train in (False, True):
        found, wanted = run(fused.train(train), x), run(stock.train(train), x)
        if method == "DoRA" and base.startswith("nf4"):  # the stock layer's weight is dequantized
            torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
        else:
            assert_identical(found, wanted)
    rows = peft_ext.explain(fused).rows
    op = {"DoRA": "dora_linear", "IA3": "ia3_linear"}.get(method, "lora_linear")
    assert rows and {row.reason for row in rows} == {f"no native kernels of {op} for cpu tensors are loaded"}


def test_dora_over_nf4_has_a_stock_path(no_kernels):
    model = make_method("DoRA", "nf4", lora_dropout=0.25).train()
    twin, fused = dense_twin(model), peft_ext.accelerate(copy.deepcopy(model))
    assert peft_ext.explain(fused).fused_share == 0.0
    x = inputs(tokens=(21,))
    torch.testing.assert_close(run(fused, x), run(twin, x))
    peft_ext.restore(fused)
    assert type(first(fused).lora_variant["default"]).__name__ == "DoraLinearVariant"
    assert type(first(fused).lora_variant["default"]) is not dora.DoraNF4Variant


@pytest.mark.parametrize("op", reasons.KERNELS)
def test_a_layer_on_a_gpu_is_fused_where_the_cuda_library_has_its_kernels(op, monkeypatch):
    def loaded(*missing):
        monkeypatch.setattr(reasons, "has_kernel", lambda name, key: key == "CPU" or name not in missing)
        monkeypatch.setattr(reasons, "KERNELS", reasons.native_kernels())
        return reasons.kernel_reason(op, "cuda")

    monkeypatch.setattr(reasons.STATE, "cuda_loaded", True)
    assert loaded() is None
    for name in PUBLIC[op]:  # a layer is not fused if the kernel of one native operator is missing
        assert loaded(name) == f"no native kernels of {op} for cuda tensors are loaded"
        assert reasons.kernel_reason(op, "cpu") is None
    monkeypatch.setattr(reasons.STATE, "cuda_loaded", False)
    monkeypatch.setattr(reasons.STATE, "cuda_error", "not built")
    everything = {name for called in PUBLIC.values() for name in called}
    assert loaded(*everything) == "it is on a GPU, and the CUDA library is not loaded (not built)"
    assert set(PUBLIC[op]) <= set(OPERATORS)


@pytest.mark.parametrize("name", ["LoRA", "IA3"])
def test_a_layer_on_an_old_gpu_beside_a_newer_one_is_told(name, monkeypatch):
    fused = peft_ext.accelerate(make_method(name, "float32"))
    assert peft_ext.explain(fused).fused_share == 1.0
    monkeypatch.setattr(cards, "why_old", lambda device: f"the reference runs on {device}")
    rows = peft_ext.explain(fused).rows
    assert rows and {(row.fused, row.reason) for row in rows} == {(False, "the reference runs on cpu")}


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
    with pytest.raises(RuntimeError):  # PEFT's code runs and raises PyTorch's own error
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


# --- other layers -----------------------------------------------------------------------------------------------------


class Subclass(lora.Linear):
    pass


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
    assert [name for name, row in rows.items() if row.fused] == ["conv1d", "embedding"]


class Others(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.conv1d, self.linear = nn.Conv2d(1, 4, 3), Conv1D(K, K), nn.Linear(K, K)

    def forward(self, x):
        return self.linear(self.conv1d(self.conv(x).flatten(1)[:, :K]))


@pytest.mark.parametrize("method", METHODS[1:])
def test_convolutions_stay_as_they_are(method):
    targets = {"target_modules": ["conv", "linear"] + ["conv1d"] * (method != "AdaLoRA")}
    if method == "IA3":
        targets["feedforward_modules"] = []
    stock, fused = both(get_peft_model(Others(), config_of(method, **targets)).train())
    rows = {row.name.rpartition(".")[2]: row for row in peft_ext.explain(fused).rows}
    assert rows["conv"].reason == f"{method} over Conv2d is not fused yet"
    assert rows["linear"].fused
    if method != "AdaLoRA":
        assert (rows["conv1d"].kind, rows["conv1d"].fused) == (f"{method} over Conv1D", True)
    x = torch.randn(2, 1, 12, 12)
    torch.testing.assert_close(fused(x), stock(x), rtol=1e-5, atol=1e-5)


def test_a_dora_whose_lora_b_has_a_bias():
    """PEFT makes no DoRA layer with a bias in lora_B, but a failed ``add_adapter`` may leave one behind."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(K, N)), LoraConfig(r=3, target_modules=["0"], use_dora=True))
    layer = model.base_model.model[0]
    layer.lora_B["default"] = nn.Linear(3, N)
    stock, fused = copy.deepcopy(model), peft_ext.accelerate(model)
    assert peft_ext.explain(fused).rows[0].reason == "DoRA with a bias of lora_B is not fused"
    x = torch.randn(4, K)
    assert torch.equal(fused(x), stock(x))
