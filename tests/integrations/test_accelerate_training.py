"""Training accelerated models: gradient checkpointing, torch.compile, Trainer and AdaLoRA's rank allocator."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from peft import LoraConfig
from peft_models import (
    METHODS,
    K,
    N,
    assert_identical,
    both,
    dropout_of,
    every_base,
    first,
    inputs,
    llama,
    make,
    make_method,
    make_several,
    run,
    tuners,
)
from transformers import Trainer, TrainingArguments

import peft_ext

pytestmark = pytest.mark.filterwarnings("ignore")


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


@every_base
@pytest.mark.parametrize(
    ("method", "dropout"), [("LoRA", 0.0), *((method, 0.3) for method in METHODS)], ids=["LoRA alone", *METHODS]
)
def test_compiles_into_one_graph(method, dropout, base):
    model = peft_ext.accelerate(make_method(method, base, **dropout_of(method, dropout)).train())
    assert_compiles(model, inputs(base))
    assert_compiles(model.eval(), inputs(base))


@pytest.mark.parametrize("method", ["LoRA", "IA3", "AdaLoRA"])
def test_several_active_adapters_compile(method):
    assert_compiles(peft_ext.accelerate(make_several(method).train()), inputs())


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
    """Ten steps of AdaLoRA: the same losses, the same budget, the same ranks; then the pruned ranks are cut out."""

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
