"""quantize_nf4: what is replaced, what is left, when memory is freed."""

import gc
import weakref

import pytest
import torch
from torch import nn

from peft_ext import PartialConfig, get_peft_model, ops, quantize_nf4
from peft_ext.nn import LoRALinear, NF4Linear


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
    assert model["a"].weight.data_ptr() == model["b"].weight.data_ptr()
    assert model["a"].bias is not model["b"].bias
    assert model["c"] is model["d"] and type(model["c"]) is NF4Linear


def test_skip_names_components():
    model = nn.ModuleDict({"head": nn.ModuleDict({"a": nn.Linear(64, 64)}), "header": nn.Linear(64, 64)})
    quantize_nf4(model, skip="head")
    assert type(model["head"]["a"]) is nn.Linear and type(model["header"]) is NF4Linear


def test_subclasses_are_left():
    class Other(nn.Linear):
        pass

    model = nn.Sequential(Other(64, 64), NF4Linear(64, 64))
    before = list(model)
    assert list(quantize_nf4(model)) == before


def test_dense_weights_are_freed_one_by_one(monkeypatch):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    dense = [weakref.ref(layer.weight) for layer in model]
    alive = []
    convert = NF4Linear.from_linear.__func__

    def watched(cls, linear, *args):
        gc.collect()
        alive.append(sum(ref() is not None for ref in dense))
        return convert(cls, linear, *args)

    monkeypatch.setattr(NF4Linear, "from_linear", classmethod(watched))
    quantize_nf4(model)
    assert alive == [6, 5, 4, 3, 2, 1]
    assert all(ref() is None for ref in dense)


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
