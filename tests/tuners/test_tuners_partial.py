"""Tests of partial fine-tuning: which modules a name means, modules with own parameters, and tied tensors."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("aenum")
pytest.importorskip("bitsandbytes")

import peft
from accelerate.hooks import ModelHook, add_hook_to_module
from peft.utils import get_peft_model_state_dict
from transformers import Trainer
from tuner_models import (
    HIDDEN,
    Mixed,
    Mixer,
    adapter_parameters,
    assert_same,
    gradients,
    logits,
    make,
    make_base,
    make_spread,
    of_base,
    reference,
    spread,
    state_bits,
    wrapped,
)

from peft_ext.tuners import BitFitConfig, PartialConfig

pytestmark = pytest.mark.filterwarnings("ignore")


def test_print_trainable_parameters(capsys):
    model, base = make("partial", task_type="SEQ_CLS")
    model.print_trainable_parameters()
    layer = sum(p.numel() for p in base.bert.encoder.layer[1].parameters())
    head = sum(p.numel() for p in base.classifier.parameters())
    everything = sum(p.numel() for p in base.parameters())
    assert (
        f"trainable params: {layer + head:,d} || all params: {everything + layer + head:,d}" in capsys.readouterr().out
    )


def test_a_container_means_all_below_it():
    whole, _ = make("partial", "llama", num_last_layers=None, target_modules=["model.layers.1", "lm_head"])
    below = {f"model.layers.1.{part}" for part in ("input_layernorm", "post_attention_layernorm")}
    below |= {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    below |= {f"model.layers.1.self_attn.{part}_proj" for part in "qkvo"}
    assert wrapped(whole) == below | {"lm_head"}
    for config in (
        {"num_last_layers": 1},
        {"layers_to_transform": 1},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": r"model\.layers\.1"},
    ):
        assert wrapped(make("partial", "llama", **{"num_last_layers": None, **config})[0]) == below, config
    attention, _ = make("partial", "llama", target_modules=["self_attn"], exclude_modules=["q_proj"])
    assert wrapped(attention) == {f"model.layers.1.self_attn.{part}_proj" for part in "kvo"}
    linear, _ = make("partial", "gpt2", target_modules="all-linear")
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert wrapped(linear) == {f"transformer.h.1.{part}" for part in parts}
    both, _ = make("partial", "t5")
    assert {name.rsplit(".block.1.")[0] for name in wrapped(both)} == {"encoder", "decoder"}
    one, _ = make("partial", "t5", target_modules=["decoder"])
    assert {name.rsplit(".block.1.")[0] for name in wrapped(one)} == {"decoder"}


def test_a_second_adapter_finds_linear_layers_under_the_first():
    model, _ = make("partial", "llama", target_modules="all-linear")
    first = wrapped(model)
    model.add_adapter("second", PartialConfig(target_modules="all-linear"))
    second = {name for name, layer in model.base_model.layers() if "second" in layer.adapters}
    assert first < second and len(second) == 14
    # The names in target_modules must also exist in a model without adapters.
    assert model.peft_config["second"].target_modules >= first


def test_a_module_with_parameters_beside_its_children_is_one_unit_with_its_buffers():
    base = Mixed()
    before = state_bits(base)
    model = peft.get_peft_model(copy.deepcopy(base), PartialConfig(num_last_layers=1))
    assert wrapped(model) == {"layers.1"}
    keys = {key.rpartition("partial_tensors.")[2] for key in get_peft_model_state_dict(model)}
    assert keys == {"decay", "seen", "inner.weight", "inner.bias", "norm.weight", "norm.bias", "norm.running_mean",
                    "norm.running_var", "norm.num_batches_tracked"}  # fmt: skip
    x = torch.randn(16, 8)
    plain = copy.deepcopy(base)
    plain.requires_grad_(False).layers[1].requires_grad_(True)
    for net in (model, plain):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            net.train()(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(model.eval()(x), plain.eval()(x))
    inner = model.base_model.model.layers[1]
    # Reading a buffer of the wrapper gives the adapter's buffer; the base module's buffer does not change.
    assert inner.seen == 4 and inner.base_layer.seen == 0
    assert_same({k: v for k, v in inner.base_layer.state_dict().items()},
                {k.removeprefix("layers.1."): v for k, v in before.items() if k.startswith("layers.1.")})  # fmt: skip
    merged = model.merge_and_unload()
    assert type(merged.layers[1]) is Mixer
    assert torch.equal(merged(x), plain(x))


def test_tensors_are_read_and_children_run_through_the_wrapper():
    """PyTorch's encoder layer passes the weights of its attention, and of a layer in it, to one kernel."""
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 8)
    for config in (PartialConfig(num_last_layers=1), BitFitConfig()):
        model = spread(peft.get_peft_model(copy.deepcopy(base), config))
        wanted = reference(model, base)(x)
        assert torch.equal(model(x), wanted)
        with torch.no_grad():
            torch.testing.assert_close(model(x), wanted)
    attention = model.base_model.model.layers[1].self_attn
    assert attention.out_proj.bias is attention.out_proj.bitfit_tensors["default"].bias
    unit = spread(peft.get_peft_model(Mixed(), PartialConfig(num_last_layers=1))).base_model.model.layers[1]
    own = unit.partial_tensors["default"]
    assert unit.decay is own.decay and unit.inner.weight is own.inner.weight and unit.norm is not unit.base_layer.norm
    assert torch.equal(unit.inner(x), nn.functional.linear(x, own.inner.weight, own.inner.bias))
    add_hook_to_module(unit.base_layer.inner, ModelHook())  # accelerate then replaces the forward of the module itself
    assert torch.equal(unit.inner(x), nn.functional.linear(x, own.inner.weight, own.inner.bias))
    unit.enable_adapters(False)
    assert unit.decay is unit.base_layer.decay and unit.inner is unit.base_layer.inner
    added = peft.get_peft_model(make_base("llama"), BitFitConfig(add_bias=["q_proj"]))
    query = added.base_model.model.model.layers[0].self_attn.q_proj
    assert query.bias is query.bitfit_tensors["default"].bias and query.in_features == HIDDEN
    with pytest.raises(AttributeError, match="nope"):
        query.nope  # noqa: B018


def test_tied_tensors_are_one_tensor_of_the_adapter():
    config = {"num_last_layers": None, "target_modules": ["wte", "lm_head"]}
    model, base = make_spread("partial", "gpt2", **config)
    names = set(adapter_parameters(model))
    assert names == {"base_model.model.transformer.wte.partial_tensors.default.weight"}
    plain = reference(model, base)
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert torch.equal(logits(model), logits(plain))
    (actual,), (wanted,) = gradients(model).values(), gradients(plain).values()
    assert torch.equal(actual, wanted)
    clone = copy.deepcopy(model)
    spread(clone, seed=5)
    assert not torch.equal(logits(clone), logits(model))
    assert torch.equal(logits(clone), logits(reference(clone, base)))
    wanted = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), wanted)
    model.unmerge_adapter()
    assert_same(state_bits(model.unload()), state_bits(base))
    merged = clone.merge_and_unload()
    assert merged.lm_head.weight is merged.transformer.wte.weight and merged.config.tie_word_embeddings

    base = make_base("bert mlm")  # the bias of BERT's head is registered in two places
    biases = peft.get_peft_model(copy.deepcopy(base), BitFitConfig())
    wanted = sum(p.numel() for n, p in base.named_parameters() if n.endswith("bias"))
    assert biases.get_nb_trainable_parameters()[0] == wanted
    assert torch.equal(logits(spread(biases)), logits(reference(biases, base)))


def test_adapters_on_different_modules_run_together():
    model, base = make_spread("partial", "llama")
    model.add_adapter("other", PartialConfig(layers_to_transform=0))
    spread(model, "other")
    model.base_model.set_adapter(["default", "other"])
    plain = reference(model, reference(model, base), "other")
    assert torch.equal(logits(model), logits(plain))


class Sublayer(nn.Module):
    """A module with a parameter of its own and a LayerNorm whose name does not say that it is a norm."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(8))
        self.ln_1, self.inner = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return self.gate * self.inner(self.ln_1(x))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "sublayer"])
def test_trainer_decays_the_parameters_that_it_decays_in_full_fine_tuning(name):
    if name == "sublayer":
        base = nn.Sequential(nn.Linear(8, 8), Sublayer(), nn.LayerNorm(8))
        model = peft.get_peft_model(copy.deepcopy(base), PartialConfig(target_modules=["1", "2"]))
    else:
        model, base = make("partial", name)

    def decayed(net):
        return set(Trainer.get_decay_parameter_names(None, net))

    trained = {of_base(n) for n, p in model.named_parameters() if p.requires_grad}
    found = {of_base(n) for n in decayed(model) if "_tensors.default." in n}
    assert found == decayed(base) & trained and found < trained
    assert "partial_tensors" in repr(model)
