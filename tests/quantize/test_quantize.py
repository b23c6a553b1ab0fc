"""Tests which layers quantize_nf4 and dequantize_nf4 replace, which layers they keep, and when memory is freed."""

import copy
import functools
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

from peft_ext import PartialConfig, accelerate, explain, get_peft_model, ops, quantize_nf4, quantize_packed
from peft_ext.nn import LoRALinear, NF4Linear, PackedLinear
from peft_ext.quantize import PACKED_FORMATS, dequantize_nf4


class Tied(nn.Module):
    """An embedding, two blocks and a head that shares the embedding's weight."""

    def __init__(self, head: str = "lm_head") -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)}) for _ in "ab")
        self.add_module(head, nn.Linear(64, 32, bias=False))
        getattr(self, head).weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block["down"](block["up"](x))
        return x @ self.embed.weight.T


def test_replaces_every_linear_and_computes_with_its_bits():
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64, bias=False))
    wanted = [ops.nf4_quantize(model[i].weight, 128, True) for i in (0, 2)]
    biases = model[0].bias
    x = torch.randn(5, 64)
    assert quantize_nf4(model, blocksize=128, progress=False) is model
    for layer, nf4 in zip((model[0], model[2]), wanted, strict=True):
        assert type(layer) is NF4Linear and layer.blocksize == 128
        assert torch.equal(layer.nf4.packed, nf4.packed) and torch.equal(layer.nf4.absmax, nf4.absmax)
        assert not any(p.requires_grad for p in layer.parameters())
    assert model[0].bias is biases
    dense = torch.relu(x @ wanted[0].dequantize().T + biases) @ wanted[1].dequantize().T
    torch.testing.assert_close(model(x), dense)


def test_without_double_quantization():
    model = quantize_nf4(nn.Sequential(nn.Linear(64, 64)), double_quant=False)
    assert model[0].nf4.nested is None


@pytest.mark.parametrize("head", ["lm_head", "output"])
def test_a_tied_head_stays_tied(head):
    model = quantize_nf4(Tied(head))
    assert type(getattr(model, head)) is nn.Linear
    assert getattr(model, head).weight is model.embed.weight
    assert all(type(block[name]) is NF4Linear for block in model.blocks for name in ("up", "down"))
    assert model(torch.tensor([1, 2])).shape == (2, 32)


def test_layers_that_share_a_weight_share_the_quantized_one():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    model["d"] = model["c"]
    quantize_nf4(model)
    for found in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double()):
        assert found["a"].weight is found["b"].weight
        assert found["a"].bias is not found["b"].bias
        assert found["c"] is found["d"] and type(found["c"]) is NF4Linear


def test_skip_names_components():
    model = nn.ModuleDict({"head": nn.ModuleDict({"a": nn.Linear(64, 64)}), "header": nn.Linear(64, 64)})
    quantize_nf4(model, skip="head")
    assert type(model["head"]["a"]) is nn.Linear and type(model["header"]) is NF4Linear


def test_what_transformers_keeps_in_float32_stays_dense():
    class Model(nn.Module):
        _keep_in_fp32_modules = ["wide"]
        _keep_in_fp32_modules_strict = {"strict"}

        def __init__(self):
            super().__init__()
            self.wide, self.strict, self.other = (nn.Linear(64, 64) for _ in range(3))

    model = quantize_nf4(Model(), progress=False)
    assert [type(layer) for layer in model.children()] == [nn.Linear, nn.Linear, NF4Linear]


def test_subclasses_are_left():
    class Other(nn.Linear):
        pass

    model = nn.Sequential(Other(64, 64), NF4Linear(64, 64))
    before = list(model)
    with pytest.warns(UserWarning, match="quantize_nf4: Sequential has no nn.Linear to replace") as caught:
        assert list(quantize_nf4(model)) == before
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_nf4(nn.Sequential(nn.Linear(64, 64)))


@pytest.mark.slow
@pytest.mark.parametrize("convert, name", [(quantize_nf4, "from_nf4"), (dequantize_nf4, "dequantize")])
def test_weights_are_freed_one_by_one(monkeypatch, convert, name):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    if convert is dequantize_nf4:
        quantize_nf4(model)
    weights = [weakref.ref(layer.weight) for layer in model]
    alive, make = [], getattr(NF4Linear, name)

    def watched(*args, **kwargs):
        gc.collect()
        alive.append(sum(ref() is not None for ref in weights))
        return make(*args, **kwargs)

    monkeypatch.setattr(NF4Linear, name, watched)
    convert(model)
    assert alive == [6, 5, 4, 3, 2, 1]
    assert all(ref() is None for ref in weights)


def test_hooks_marks_and_mode_are_kept():
    model = nn.Sequential(nn.Linear(64, 64).eval())
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    model[0].mark = "kept"
    quantize_nf4(model)
    model(torch.zeros(1, 64))
    assert calls == ["before", "after"]
    handle.remove()
    model(torch.zeros(1, 64))
    assert calls == ["before", "after", "before"]
    assert model[0].mark == "kept" and not model[0].training


def test_refuses_before_it_changes_anything():
    good = nn.Linear(64, 64)
    cases = [
        (nn.Linear(64, 64, device="meta"), ValueError, "1.bad.weight is on the meta device"),
        (nn.Linear(64, 64).requires_grad_(False), TypeError, "1.bad.weight is int8"),
    ]
    cases[1][0].weight.data = torch.zeros(64, 64, dtype=torch.int8)
    patched = nn.Linear(64, 64)
    patched.forward = lambda x: x
    cases.append((patched, ValueError, "1.bad has its forward replaced"))
    for bad, kind, message in cases:
        model = nn.Sequential(good, nn.ModuleDict({"bad": bad}))
        with pytest.raises(kind, match=f"quantize_nf4: {message}"):
            quantize_nf4(model)
        assert model[0] is good and model[1]["bad"] is bad
    with pytest.raises(ValueError, match="blocksize is 65"):
        quantize_nf4(nn.Sequential(good), blocksize=65)
    with pytest.raises(TypeError, match="use NF4Linear.from_linear"):
        quantize_nf4(good)
    with pytest.raises(TypeError, match="quantize_nf4: model is str, wanted an nn.Module"):
        quantize_nf4("model")


@pytest.mark.parametrize("format", ["nf4", *PACKED_FORMATS])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(format, value):
    good, bad = nn.Linear(64, 64), nn.Linear(64, 64, dtype=torch.bfloat16)
    bad.weight.data[3, 5] = value
    model = nn.Sequential(good, nn.ModuleDict({"bad": bad}))
    quantize = quantize_nf4 if format == "nf4" else functools.partial(quantize_packed, format=format)
    op = "quantize_nf4" if format == "nf4" else "quantize_packed"
    with pytest.raises(ValueError, match=f"{op}: 1.bad.weight has values that are not finite"):
        quantize(model)
    assert model[0] is good and model[1]["bad"] is bad
    assert isinstance(quantize(model, skip=["bad"])[0], (NF4Linear, PackedLinear)) and model[1]["bad"] is bad


def test_errors_of_quantize_packed_have_its_name():
    for bad, kind, message in (
        (nn.Linear(64, 64, device="meta"), ValueError, "0.weight is on the meta device"),
        (nn.Linear(64, 64).requires_grad_(False), TypeError, "0.weight is int8"),
        (nn.Linear(64, 64), ValueError, "0 has its forward replaced"),
    ):
        if kind is TypeError:
            bad.weight.data = torch.zeros(64, 64, dtype=torch.int8)
        elif not bad.weight.is_meta:
            bad.forward = lambda x: x
        with pytest.raises(kind, match=f"quantize_packed: {message}"):
            quantize_packed(nn.Sequential(bad))
    merged = LoRALinear(64, 64, r=4)
    merged.merge()
    with pytest.raises(ValueError, match="quantize_packed: 0 has a merged adapter"):
        quantize_packed(nn.Sequential(merged))


def test_under_our_lora_only_the_base_is_quantized():
    model = nn.Sequential(LoRALinear(64, 64, r=4))
    quantize_nf4(model)
    assert type(model[0].base_layer) is NF4Linear
    assert model[0].lora_A.requires_grad
    merged = nn.Sequential(LoRALinear(64, 64, r=4))
    merged[0].merge()
    with pytest.raises(ValueError, match="0 has a merged adapter"):
        quantize_nf4(merged)


def test_under_peft_only_the_base_is_quantized():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    config = peft.LoraConfig(target_modules=["0"], modules_to_save=["2"], r=4)
    model = peft.get_peft_model(model, config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    quantize_nf4(model)
    layer = model.base_model.model[0]
    assert type(layer.base_layer) is NF4Linear
    assert type(layer.lora_A["default"]) is nn.Linear
    assert not any(isinstance(m, NF4Linear) for m in model.base_model.model[2].modules())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    model(torch.randn(2, 64)).sum().backward()
    assert layer.lora_B["default"].weight.grad is not None


def test_a_weight_that_an_adapter_replaces_stays_dense():
    tiny_models = pytest.importorskip("tiny_models", reason="PEFT is not here")
    architecture = tiny_models.ARCHITECTURES["Llama"]
    model = get_peft_model(architecture.build(), PartialConfig(num_last_layers=1))
    quantize_nf4(model, progress=False)
    replaced = [module.base_layer for module in model.modules() if hasattr(type(module), "replacements")]
    assert replaced and not any(isinstance(base, NF4Linear) for base in replaced)
    assert any(isinstance(module, NF4Linear) for module in model.modules())
    assert torch.isfinite(model(**architecture.batch()).logits).all()


# --- the way back -----------------------------------------------------------------------------------------------------


def test_dequantize_gives_the_weights_that_the_layers_multiplied_with():
    model = quantize_nf4(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64, bias=False).eval()))
    wanted, codes, bias = [model[i].dequantize() for i in (0, 2)], model[0].weight, model[0].bias
    bias.requires_grad_(True)
    x = torch.randn(5, 64)
    before = model(x)
    assert dequantize_nf4(model, progress=False) is model
    for layer, weight in zip((model[0], model[2]), wanted, strict=True):
        assert type(layer) is nn.Linear and torch.equal(layer.weight, weight) and not layer.weight.requires_grad
        assert vars(layer).keys() == vars(nn.Linear(1, 1)).keys()
    assert model[0].bias is bias and bias.requires_grad and model[2].bias is None
    assert model[0].training and not model[2].training
    torch.testing.assert_close(model(x), before)
    assert torch.equal(quantize_nf4(model)[0].weight, codes)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_dequantize_to_a_dtype(dtype):
    model = quantize_nf4(nn.Sequential(nn.Linear(64, 64)).bfloat16())
    model.float()  # of the NF4 layer, casts only the bias
    weight, bias = model[0].dequantize(dtype), model[0].bias
    dequantize_nf4(model, dtype=dtype)
    wanted = dtype or torch.bfloat16
    assert model[0].weight.dtype is wanted and torch.equal(model[0].weight, weight)
    assert model[0].bias is bias and bias.dtype is wanted
    assert model(torch.randn(2, 64, dtype=wanted)).dtype is wanted


def test_dequantized_layers_share_what_the_quantized_ones_did():
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in "abc"})
    model["b"].weight = model["a"].weight
    model["inner"] = nn.ModuleDict({"d": model["c"]})
    dequantize_nf4(quantize_nf4(model))
    assert model["a"].weight is model["b"].weight and model["a"] is not model["b"]
    assert model["a"].bias is not model["b"].bias
    assert model["inner"]["d"] is model["c"] and type(model["c"]) is nn.Linear
    assert model["c"].weight is not model["a"].weight
    tied = dequantize_nf4(quantize_nf4(Tied()))
    assert tied.lm_head.weight is tied.embed.weight and type(tied.blocks[0]["up"]) is nn.Linear
    other = quantize_nf4(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    other[1] = NF4Linear.from_nf4(other[0].nf4)
    other[1].quant_dtype = torch.bfloat16
    dequantize_nf4(other)
    assert [layer.weight.dtype for layer in other] == [torch.float32, torch.bfloat16]


def test_hooks_and_marks_survive_the_way_back():
    model = quantize_nf4(nn.Sequential(nn.Linear(64, 64)))
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].mark = "kept"
    dequantize_nf4(model)
    model(torch.zeros(1, 64))
    handle.remove()
    model(torch.zeros(1, 64))
    assert calls == ["after"] and model[0].mark == "kept"


def test_dequantize_refuses_before_it_changes_anything():
    good = NF4Linear(64, 64)
    patched = NF4Linear(64, 64)
    patched.forward = lambda x: x
    merged = LoRALinear(64, 64, r=4)
    quantize_nf4(nn.Sequential(merged))
    merged.merge()
    for bad, message in (
        (NF4Linear(64, 64, device="meta"), "1.bad.weight is on the meta device, load the model's weights first"),
        (patched, "1.bad has its forward replaced"),
        (merged, "1.bad has a merged adapter, unmerge it first"),
    ):
        model = nn.Sequential(good, nn.ModuleDict({"bad": bad}))
        with pytest.raises(ValueError, match=f"dequantize_nf4: {message}"):
            dequantize_nf4(model)
        assert model[0] is good and model[1]["bad"] is bad
    merged.unmerge()
    assert type(dequantize_nf4(nn.Sequential(merged))[0].base_layer) is nn.Linear
    for model, dtype, message in (
        (good, None, "model is an NF4Linear and can't be replaced in place"),
        ({}, None, "model is dict, wanted an nn.Module"),
        (nn.Sequential(good), torch.int8, "dtype is torch.int8, wanted one of"),
    ):
        with pytest.raises(TypeError, match=f"dequantize_nf4: {message}"):
            dequantize_nf4(model, dtype=dtype)
    with pytest.warns(UserWarning, match="dequantize_nf4: Linear has no NF4Linear to replace"):
        dequantize_nf4(nn.Linear(64, 64))


METHODS = ("LoRA", "DoRA", "AdaLoRA", "IA3")


def adapted_over_nf4(method):
    """Returns an accelerated Llama in NF4, with an adapter as after some training, and a batch."""
    tiny_models = pytest.importorskip("tiny_models", reason="PEFT is not here")
    peft_models = pytest.importorskip("peft_models")
    import peft

    torch.manual_seed(3)
    architecture = tiny_models.ARCHITECTURES["Llama"]
    config = (
        peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=10, target_modules="all-linear", task_type="CAUSAL_LM",
            init_lora_weights=False,
        )
        if method == "AdaLoRA"
        else architecture.peft_config(method)
    )  # fmt: skip
    model = get_peft_model(quantize_nf4(architecture.build(), progress=False), config)
    peft_models.spread(model)
    return model.eval(), architecture.inputs()


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_merges_into_dense_weights_without_loss(method):
    model, inputs = adapted_over_nf4(method)
    layers = {name: type(module) for name, module in model.named_modules() if hasattr(module, "base_layer")}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        wanted = model(**inputs).logits
        nf4 = copy.deepcopy(model).merge_and_unload()(**inputs).logits
        dequantize_nf4(model, progress=False)
        assert not any(isinstance(module, NF4Linear) for module in model.modules())
        assert {name: type(module) for name, module in model.named_modules() if hasattr(module, "base_layer")} == layers
        assert explain(model).fused_share == 1
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
        dense = model.merge_and_unload()(**inputs).logits
    spread = wanted.std()
    assert (dense - wanted).abs().max() < 1e-4 * spread
    assert (nf4 - wanted).abs().max() > 1e-2 * spread


@pytest.mark.parametrize("dora_dropout", ["peft", "lora"])
def test_dora_s_variant_follows_its_base(dora_dropout):
    dora = pytest.importorskip("peft_ext.integrations.adapter_layers.dora")
    lora = pytest.importorskip("peft_ext.integrations.adapter_layers.lora")
    model, inputs = adapted_over_nf4("DoRA")
    accelerate(model, dora_dropout=dora_dropout)

    def variants():
        layers = [module for module in model.modules() if isinstance(module, lora.Lora)]
        assert {module.__dict__.get(dora.DORA_DROPOUT, "peft") for module in layers} == {dora_dropout}
        return {type(variant) for module in layers for variant in module.lora_variant.values()}

    def on_pefts_path():
        """Returns the logits with one layer on PEFT's own code, which a fused layer with a hook runs."""
        layer = next(module for module in model.modules() if isinstance(module, lora.Lora))
        handle = layer.lora_A["default"].register_forward_hook(lambda *_: None)
        with torch.no_grad():
            logits = model(**inputs).logits
        handle.remove()
        return logits

    before = on_pefts_path()
    assert variants() == {dora.DoraNF4Variant}
    dequantize_nf4(model, progress=False)
    assert variants() == {dora.DoraLinearVariant}
    torch.testing.assert_close(on_pefts_path(), before, rtol=1e-4, atol=1e-4)
    quantize_nf4(model, double_quant=False, progress=False)  # quantizing the dequantized weights gives the same codes
    assert variants() == {dora.DoraNF4Variant}
    torch.testing.assert_close(on_pefts_path(), before, rtol=1e-4, atol=1e-4)


def test_merged_into_nf4_it_is_refused():
    model, inputs = adapted_over_nf4("LoRA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    with pytest.raises(ValueError, match="q_proj has a merged adapter, unmerge it first"):
        dequantize_nf4(model)
    assert any(isinstance(module, NF4Linear) for module in model.modules())
    model.unmerge_adapter()
    dequantize_nf4(model, progress=False)


def test_all_of_a_classifier_can_be_trained_over_nf4():
    """PEFT trains and saves modules whose name ends in "classifier", such as DistilBERT's pre_classifier."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(vocab_size=32, dim=32, hidden_dim=64, n_layers=1, n_heads=2)
    model = transformers.DistilBertForSequenceClassification(config)
    quantize_nf4(model, progress=False)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"]))
    model(input_ids=torch.zeros(2, 4, dtype=torch.int64), labels=torch.zeros(2, dtype=torch.int64)).loss.backward()
    assert model.base_model.model.pre_classifier.modules_to_save["default"].weight.grad is not None
