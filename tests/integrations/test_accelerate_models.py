"""Tests of explain, and of operations on an accelerated model: restore, copies, files, other adapters, training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import tiers
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners import adalora, ia3, lora
from peft.utils import hotswap
from peft_models import (
    BASES,
    METHODS,
    MLP,
    K,
    N,
    assert_as_good,
    assert_identical,
    assert_restored,
    both,
    config_of,
    dropout_of,
    every_base,
    every_clone,
    every_method,
    first,
    in_float64,
    inputs,
    llama,
    make,
    make_method,
    make_several,
    run,
    state_of,
    tuners,
)
from transformers import Trainer, TrainingArguments

import peft_ext
from peft_ext.integrations import peft as integration

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {"nf4": "NF4Linear", "bnb": "Linear4bit"}
STOCK_CLASSES = (lora.Linear, lora.Linear4bit, ia3.Linear, ia3.Linear4bit, adalora.SVDLinear, adalora.SVDLinear4bit)


@every_base
@every_method
def test_restore_leaves_nothing_behind(method, base):
    model = make_method(method, base, **dropout_of(method, 0.1))
    before, keys, text = state_of(model), list(model.state_dict()), repr(model)
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):  # a second call of accelerate changes nothing
        assert peft_ext.accelerate(model) is model
    changed = [name for name, (kind, _) in state_of(model).items() if kind is not before[name][0]]
    assert len(changed) == (4 if base.startswith("bnb") else 2)
    assert repr(model) == text and list(model.state_dict()) == keys
    assert all(isinstance(layer, (lora.LoraLayer, ia3.IA3Layer)) for layer in tuners(model).values())
    run(model.eval(), inputs(base))
    peft_ext.explain(model.train())
    assert peft_ext.restore(model) is model
    assert_identical(model.state_dict(), bits)
    assert_restored(model, before)
    variants = [v for layer in tuners(model).values() for v in getattr(layer, "lora_variant", {}).values()]
    assert all(type(variant).__module__.startswith("peft.") for variant in variants)


@every_base
@every_method
@every_clone
def test_copies_and_pickles_stay_fused(method, base, clone):
    fused = peft_ext.accelerate(make_method(method, base))
    other = clone(fused)
    x = inputs(base)
    assert peft_ext.explain(other).fused_share == 1.0
    assert {row.kind for row in peft_ext.explain(other).rows} == {f"{method} over {KINDS.get(base[:3], 'Linear')}"}
    for train in (False, True):
        assert torch.equal(other.train(train)(x), fused.train(train)(x))
    assert {type(layer) for layer in tuners(peft_ext.restore(other)).values()} <= set(STOCK_CLASSES)
    assert peft_ext.explain(fused).fused_share == 1.0


@pytest.mark.parametrize(
    ("method", "base"), [("LoRA", "nf4"), *((method, base) for method in METHODS for base in ("float32", "bnb"))]
)
def test_saved_files_are_the_same_and_stock_peft_loads_them(method, base, tmp_path):
    model = make_method(method, base).eval()
    model.save_pretrained(tmp_path / "before")
    peft_ext.accelerate(model)
    model.save_pretrained(tmp_path / "after")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()
    x = inputs(base)
    wanted = model(x)
    if (method, base) == ("IA3", "bnb"):  # PEFT cannot unload IA3 from bitsandbytes' layers
        plain = MLP()
        plain.up, plain.down = (layer.base_layer for layer in tuners(model).values())
        plain.is_loaded_in_4bit = True
    else:
        plain = model.unload()
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "after").eval()
    torch.testing.assert_close(loaded(x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(peft_ext.accelerate(loaded)(x), wanted, rtol=1e-4, atol=1e-5)
    # An accelerated model loads files of stock PEFT.
    loaded.load_adapter(tmp_path / "before", adapter_name="again")
    loaded.set_adapter("again")
    assert peft_ext.explain(loaded).fused_share == 1.0
    torch.testing.assert_close(loaded(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "base"), [*((method, "float32") for method in METHODS), ("LoRA", "nf4"), ("LoRA", "bnb")]
)
def test_adapters_come_and_go(method, base):
    stock, fused = both(
        make_method(method, base).train(base == "bnb")
    )  # the 4-bit model is in training mode, because in eval mode bitsandbytes rounds x to bfloat16
    x = inputs(base)
    # AdaLoRA allows only one trainable adapter, so the second adapter is for inference.
    config = {"inference_mode": True} if method == "AdaLoRA" else {}

    def agree(change):
        for model in (stock, fused):
            torch.manual_seed(6)
            change(model)
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-5)
        return [(row.fused, row.reason) for row in peft_ext.explain(fused).rows]

    target = {"target_modules": ["up"], **({"feedforward_modules": []} if method == "IA3" else {})}
    agree(lambda model: model.add_adapter("other", config_of(method, **target, **config)))
    rows = agree(lambda model: model.set_adapter("other"))
    assert rows == [(True, ""), (False, "no active adapter on this layer")]
    agree(lambda model: model.delete_adapter("default"))
    if method == "LoRA":
        agree(lambda model: first(model).set_scale("other", 3.0))
    agree(lambda model: model.base_model.disable_adapter_layers())
    agree(lambda model: model.base_model.enable_adapter_layers())


def test_several_active_lora_adapters_come_and_go():
    stock, fused = both(make_several().eval())
    x = inputs()
    for names in (["default", "other"], ["other"], ["other", "default"]):
        for model in (stock, fused):
            model.base_model.set_adapter(names)
        assert peft_ext.explain(fused).fused_share == 1.0
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-5)
    for model in (stock, fused):
        first(model).set_scale("other", 3.0)
    torch.testing.assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-5)


SWAPPED = {"small": {"r": 4, "lora_alpha": 3}, "large": {"r": 9, "lora_alpha": 7}}


@pytest.mark.parametrize(
    ("base", "compiled"), [*((base, False) for base in BASES), ("float32", True), ("nf4 bfloat16", True)]
)
def test_swapped_adapters_are_pefts(base, compiled, tmp_path):
    """PEFT's hotswap makes the scaling a tensor and pads the rank, so that another adapter can run in one graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for name, config in SWAPPED.items():
        make(base, **config).save_pretrained(tmp_path / name)
    # The model is in training mode, because in eval mode bitsandbytes rounds x to bfloat16.
    stock, fused = both(make(base, **SWAPPED["small"]).train())
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


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("method", "base"), [*((method, "float32") for method in METHODS), ("LoRA", "nf4"), ("LoRA", "bnb")]
)
def test_checkpointing_draws_the_same_mask_again(method, base, reentrant):
    model = peft_ext.accelerate(make_method(method, base, **dropout_of(method, 0.4)).train())

    class Checkpointed(nn.Module):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)

        def named_parameters(self):
            return model.named_parameters()

        def zero_grad(self):
            model.zero_grad()

    x = inputs(base)
    assert_identical(run(Checkpointed(), x), run(model, x))


def assert_compiles(model, x):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = {name.removeprefix("_orig_mod."): value for name, value in run(compiled, x).items()}
    torch.testing.assert_close(found, run(model, x))


@pytest.mark.slow
@every_base
@pytest.mark.parametrize(
    ("method", "dropout"), [("LoRA", 0.0), *((method, 0.3) for method in METHODS)], ids=["LoRA alone", *METHODS]
)
def test_compiles_into_one_graph(method, dropout, base):
    model = peft_ext.accelerate(make_method(method, base, **dropout_of(method, dropout)).train())
    assert_compiles(model, inputs(base))
    assert_compiles(model.eval(), inputs(base))


@pytest.mark.parametrize("method", tiers.first(["LoRA", "IA3", "AdaLoRA"], ["LoRA"]))
def test_several_active_adapters_compile(method):
    assert_compiles(peft_ext.accelerate(make_several(method).train()), inputs())


@pytest.mark.slow
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


def test_the_rank_allocator_prunes_as_under_peft():
    """Ten steps of AdaLoRA under accelerate give the same losses and ranks as under PEFT alone. Cutting the pruned
    ranks out of the tensors does not change the output."""

    def train(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        x = torch.randn(16, K, generator=torch.Generator().manual_seed(5))
        target = torch.randn(16, N, generator=torch.Generator().manual_seed(6))
        losses = []
        for step in range(10):
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.item())
        kept = {name: p != 0 for name, p in model.named_parameters() if "lora_E" in name}
        return torch.tensor(losses), kept

    config = {"total_step": 10, "tinit": 1, "tfinal": 2, "deltaT": 1, "init_r": 6, "target_r": 2}
    stock, fused = both(make_method("AdaLoRA", **config).train())
    (wanted, wanted_kept), (actual, kept) = train(stock), train(fused)
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    assert_identical(kept, wanted_kept)
    assert sum(mask.sum() for mask in kept.values()) == 4
    assert peft_ext.explain(fused).fused_share == 1.0

    x = inputs(tokens=(21,))
    before = fused(x)
    pattern = {name.removeprefix("base_model.model."): mask.view(-1) for name, mask in kept.items()}
    fused.base_model.resize_modules_by_rank_pattern(pattern, "default")
    assert sum(layer.lora_A["default"].shape[0] for layer in tuners(fused).values()) == 4
    torch.testing.assert_close(fused(x), before)


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


def test_the_trees_that_transformers_injects():
    model = inject_adapter_in_model(LoraConfig(target_modules=["up"], init_lora_weights=False), MLP())
    peft_ext.accelerate(model)
    assert peft_ext.explain(model).rows == [integration.Row("up", "LoRA over Linear", True, "")]


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


def test_wrong_arguments_are_named():
    for function in (peft_ext.accelerate, peft_ext.restore, peft_ext.explain):
        with pytest.raises(TypeError, match=f"{function.__name__}: model is str, wanted an nn.Module"):
            function("model")


def test_models_without_any_adapter_pass_through():
    model = MLP()
    assert peft_ext.restore(peft_ext.accelerate(model)) is model
    assert type(model.up) is nn.Linear


def test_accelerate_says_where_there_is_nothing_to_accelerate() -> None:
    with pytest.warns(UserWarning, match="Linear has no adapter layer and no 4-bit layer, nothing to accelerate: call"):
        peft_ext.accelerate(nn.Linear(4, 4))
