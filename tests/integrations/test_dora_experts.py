"""Tests of DoRA on the experts of mixtures, which PEFT lacks: the layer is compared with dense sums of weights."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_ext

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
LoraConfig, PeftModel = peft.LoraConfig, peft.PeftModel
ParamWrapper = peft.tuners.lora.layer.ParamWrapper

from mixtures import (  # noqa: E402  behind what it needs
    adapt_config,
    assert_alike,
    base,
    batch,
    dequantized,
    experts_rows,
    some_models,
    step,
    targets,
)


def config(name: str = "Qwen3-MoE", **fields: Any) -> Any:
    return adapt_config(**{"target_parameters": targets(base(name)), "use_dora": True, **fields})


@torch.no_grad()
def moved(model: PeftModel) -> PeftModel:
    """Changes the magnitudes of a DoRA, which start as the norms, and returns the model."""
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.mul_(1 + 0.2 * torch.sin(torch.arange(parameter.numel())).view(parameter.shape))
    return model


def adapt(name: str = "Qwen3-MoE", model: nn.Module | None = None, accelerate: bool = True, **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    held = base(name) if model is None else model
    return moved(peft_ext.get_peft_model(held, config(name, **fields), accelerate=accelerate))


@torch.no_grad()
def with_sums(model: PeftModel) -> nn.Module:
    """Returns the base model, in float64, with DoRA's weights, which are computed from PEFT's own sum W + s B A."""
    model = copy.deepcopy(model)
    for wrapper in [m for m in model.modules() if isinstance(m, ParamWrapper)]:
        experts = wrapper.get_base_layer()
        weight = getattr(experts, wrapper.parameter_name)
        magnitude = wrapper.lora_magnitude_vector["default"].weight.double()
        summed = weight.double() + ParamWrapper.get_delta_weight(wrapper, "default").double()
        # Llama 4's experts have no attribute `is_transposed`, and are stored transposed.
        transposed = experts.is_transposed if hasattr(experts, "is_transposed") else True
        inputs = 1 if transposed else 2
        assert magnitude.shape == summed.sum(inputs).shape
        norm = torch.linalg.vector_norm(summed, dim=inputs, keepdim=True)
        weight.copy_(magnitude.unsqueeze(inputs) * summed / norm)
    for module in [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]:
        module.merge()
    # Replaces each wrapper by the module below it.
    for parent in list(model.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, ParamWrapper) and not isinstance(parent, ParamWrapper):
                setattr(parent, child, module.get_base_layer())
    return model


@some_models
def test_the_function_is_doras(name: str) -> None:
    plain = adapt(name, accelerate=False)
    with torch.no_grad():
        wanted = with_sums(plain).eval()(**batch()).logits
    torch.testing.assert_close(plain.eval()(**batch()).logits, wanted, rtol=1e-4, atol=1e-5)
    expected, model = step(plain), peft_ext.accelerate(plain)
    rows = experts_rows(model)
    assert rows and all(row.fused and row.kind.startswith("DoRA over") for row in rows), rows
    torch.testing.assert_close(model.eval()(**batch()).logits, wanted, rtol=1e-4, atol=1e-5)
    found = step(model)
    assert any("magnitude" in n and "experts" in n for n in found)
    assert_alike(found, expected)
    assert_alike(step(peft_ext.restore(model)), expected, 0.0)


@some_models
def test_over_nf4(name: str) -> None:
    wanted = step(adapt(name, dequantized(base(name))))
    model = adapt(name, peft_ext.quantize_nf4(base(name)))
    assert all(row.fused for row in experts_rows(model))
    found = step(model)
    assert_alike({n: v for n, v in found.items() if n in wanted}, wanted, 1e-4)


def test_over_fp8() -> None:
    """PEFT would cast a new adapter to the dtype of the codes."""
    wanted = step(adapt(model=peft_ext.dequantize_packed(peft_ext.quantize_packed(base(), "fp8"))))
    model = adapt(model=peft_ext.quantize_packed(base(), "fp8"))
    assert all(row.fused for row in experts_rows(model))
    found = step(model)
    assert_alike({n: v for n, v in found.items() if n in wanted}, wanted, 1e-4)


@some_models
def test_files_merging_and_back(name: str, tmp_path: Path) -> None:
    model = adapt(name).eval()
    with torch.no_grad():
        wanted = model(**batch()).logits
        model.save_pretrained(tmp_path)
        again = peft_ext.load_adapter(base(name), tmp_path)
        assert all(row.fused and row.kind.startswith("DoRA") for row in experts_rows(again))
        assert torch.equal(again.eval()(**batch()).logits, wanted)
        with pytest.raises(ValueError, match="does not work with use_dora=True"):
            # Stock PEFT must raise an error for the file and not load the adapter as LoRA.
            PeftModel.from_pretrained(base(name), tmp_path)
        before = {n: p.clone() for n, p in model.state_dict().items()}
        model.merge_adapter()
        torch.testing.assert_close(model(**batch()).logits, wanted, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        for n, value in model.state_dict().items():
            torch.testing.assert_close(value, before[n], rtol=1e-4, atol=1e-5)
        merged = model.merge_and_unload(safe_merge=True)
        assert not any(isinstance(module, ParamWrapper) for module in merged.modules())
        torch.testing.assert_close(merged(**batch()).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Mixtral"])
def test_merged_on_disk(name: str, tmp_path: Path) -> None:
    model, plain = adapt(name).eval(), base(name)
    plain.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    peft_ext.merge_to_dense(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    merged = type(plain).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch()).logits, model(**batch()).logits, rtol=1e-4, atol=1e-4)


def test_a_new_adapter_changes_nothing() -> None:
    """A new DoRA adapter gives the output of a LoRA adapter with equal matrices, because the magnitudes start as the
    norms."""
    torch.manual_seed(0)
    for init in (True, False):
        model = peft_ext.get_peft_model(base(), config(init_lora_weights=init, target_modules=[])).eval()
        plain = peft.get_peft_model(base(), config(init_lora_weights=init, target_modules=[], use_dora=False)).eval()
        with torch.no_grad():
            held = dict(plain.named_parameters())
            for n, p in model.named_parameters():
                if n in held:
                    held[n].copy_(p)
            torch.testing.assert_close(model(**batch()).logits, plain(**batch()).logits, rtol=1e-4, atol=1e-5)


def test_a_step_lowers_the_loss_and_moves_the_magnitudes() -> None:
    model = peft_ext.get_peft_model(base(), config(init_lora_weights=True), experts_dropout=0.1)
    assert {row.kind.partition(" over")[0] for row in experts_rows(model)} == {"DoRA with dropout 0.1"}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "magnitude" in n}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert len(before) == 2 * 2 + 2  # in each of two layers: two parameters of the experts, and o_proj


def test_several_adapters_switched_and_together() -> None:
    model = adapt()
    model.add_adapter("plain", config(use_dora=False))
    again = config()
    model.add_adapter("again", again)
    moved(model)
    peft_ext.accelerate(model)
    stock = peft_ext.restore(copy.deepcopy(model))
    assert {type(m).__qualname__ for m in stock.modules() if isinstance(m, ParamWrapper)} == {"DoraParamWrapper"}
    for active, kind in (("default", "DoRA"), ("plain", "LoRA"), ("again", "DoRA")):
        for m in (model, stock):
            m.set_adapter(active)
        assert all(row.fused and row.kind.startswith(kind) for row in experts_rows(model))
        assert_alike(step(model), step(stock))
    for active in (["default", "plain"], ["plain", "again", "default"]):
        for m in (model, stock):
            m.base_model.set_adapter(active)
        assert all(row.fused for row in experts_rows(model))
        assert_alike(step(model), step(stock))
    model.delete_adapter("again")
    assert not any("again" in n for n, _ in model.named_parameters())


def test_a_dora_adapter_beside_pefts_lora(tmp_path: Path) -> None:
    """A DoRA adapter can be loaded or added to a model that has a LoRA adapter on the experts, accelerated or not."""
    adapt().save_pretrained(tmp_path)
    wanted = peft_ext.load_adapter(base(), tmp_path).eval()(**batch()).logits
    for accelerate in (True, False):
        torch.manual_seed(1)
        model = peft_ext.get_peft_model(base(), config(use_dora=False), accelerate=accelerate)
        model = peft_ext.load_adapter(model, tmp_path, "more", accelerate=accelerate).eval()
        torch.testing.assert_close(model(**batch()).logits, wanted, rtol=1e-4, atol=1e-5)
    accelerated = peft_ext.get_peft_model(base(), config(use_dora=False))
    accelerated.add_adapter("own", config())  # PEFT's wrapper would ignore use_dora without a warning
    assert any("own" in n and "magnitude" in n and "experts" in n for n, _ in accelerated.named_parameters())


@pytest.mark.parametrize("quantized", [False, True])
def test_copies_pickles_generation_and_the_norms_cache(quantized: bool) -> None:
    model = adapt(model=peft_ext.quantize_nf4(base()) if quantized else base())
    wanted = step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(row.fused for row in experts_rows(other))
        assert_alike(step(other), wanted, 0.0)
    ids = batch()["input_ids"][:1, :5]
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    plain = model.eval().generate(input_ids=ids, **how)
    if not quantized:
        stock = peft_ext.restore(copy.deepcopy(model)).eval()
        assert torch.equal(stock.generate(input_ids=ids, **how), plain)
    with peft.helpers.DoraCaching():
        assert torch.equal(model.generate(input_ids=ids, **how), plain)
        caches = [m._dora_cache for n, m in model.named_modules() if n.endswith("lora_magnitude_vector.default")]
        assert len(caches) == 6 and all(len(cache) == 1 for cache in caches)
    model.train()
    step(model)
    assert not any(m._dora_cache for m in model.modules() if hasattr(m, "_dora_cache"))


def test_merging_into_nf4() -> None:
    model = adapt(model=peft_ext.quantize_nf4(base())).eval()
    with torch.no_grad():
        wanted = model(**batch()).logits
        with pytest.warns(UserWarning, match="rounds the merged weight"):
            model.merge_adapter()
        away = (model(**batch()).logits - wanted).norm() / wanted.norm()
        assert 0 < away < 0.3
        model.unmerge_adapter()
        assert torch.equal(model(**batch()).logits, wanted)
        exact = peft_ext.dequantize_nf4(model).merge_and_unload().eval()
        torch.testing.assert_close(exact(**batch()).logits, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("accelerate", [True, False])
@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_two_adapters_one_of_them_dora_are_not_merged(quantized: bool, use_dora: bool, accelerate: bool) -> None:
    """The forward adds the changes that each adapter makes to the unmerged weight."""
    two = adapt(model=peft_ext.quantize_nf4(base()) if quantized else base(), target_modules=[])
    two.add_adapter("other", config(target_modules=[], use_dora=use_dora))
    two.base_model.set_adapter(["default", "other"])
    (peft_ext.accelerate if accelerate or quantized else peft_ext.restore)(two).eval()
    before = {name: tensor.clone() for name, tensor in two.state_dict().items()}
    with torch.no_grad():
        wanted = two(**batch()).logits
        with pytest.raises(ValueError, match="default, other, one of them DoRA, into experts: merge one alone"):
            two.merge_adapter()
        assert torch.equal(two(**batch()).logits, wanted)
        for one, other in (("default", "other"), ("other", "default")):
            two.merge_adapter([one])
            with pytest.raises(ValueError, match=f"{one}, {other}, one of them DoRA"):
                two.merge_adapter([other])
            two.unmerge_adapter()
    for name, tensor in two.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_under_compile_autocast_and_checkpointing(quantized: bool) -> None:
    torch._dynamo.reset()

    def make() -> PeftModel:
        return adapt(model=peft_ext.quantize_nf4(base()) if quantized else base())

    wanted, model = step(make()), make()
    compiled = torch.compile(model, backend="aot_eager")
    model.train()
    out = compiled(**batch())
    out.loss.backward()
    torch.testing.assert_close(out.logits.detach(), wanted["logits"], rtol=1e-4, atol=1e-5)
    assert_alike({n: p.grad for n, p in model.named_parameters() if p.grad is not None},
                 {n: v for n, v in wanted.items() if n != "logits"}, 1e-4)  # fmt: skip
    torch._dynamo.reset()
    checkpointed = make()
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    assert_alike(step(checkpointed), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(checkpointed)
    names = [n for n in wanted if "experts" in n]
    came, exact = (torch.cat([held[n].flatten() for n in names]) for held in (found, wanted))
    assert (came - exact).norm() <= 0.1 * exact.norm()


def test_memory_is_estimated() -> None:
    size = {"batch_size": 2, "sequence_length": 24}
    there = peft_ext.estimate_memory(adapt(model=base(dtype=torch.bfloat16)), **size)
    planned = peft_ext.estimate_memory(base(dtype=torch.bfloat16), config(), **size)
    lora = peft_ext.estimate_memory(base(dtype=torch.bfloat16), config(use_dora=False), **size)
    assert (planned.weights, planned.parameters) == (there.weights, there.parameters)
    assert planned.activations > lora.activations  # DoRA also keeps Z


def test_hooks_leave_it_to_the_sum_of_weights() -> None:
    model, called = adapt(), []
    wrapper = next(m for m in model.modules() if isinstance(m, ParamWrapper))
    wrapper.lora_magnitude_vector["default"].register_forward_hook(lambda *_: called.append(1))
    assert any("hooks on lora_magnitude_vector" in row.reason for row in experts_rows(model))
    assert_alike(step(model), step(adapt()))


def test_a_magnitude_of_zero_merges_and_says_that_it_is_no_way_back() -> None:
    model = adapt(target_modules=[])
    wrapper = next(m for m in model.modules() if isinstance(m, ParamWrapper))
    with torch.no_grad():
        wrapper.lora_magnitude_vector["default"].weight[1, 3] = 0
        wanted = model.eval()(**batch()).logits
        model.merge_adapter()
        torch.testing.assert_close(model(**batch()).logits, wanted, rtol=1e-4, atol=1e-4)
    held: Tensor = wrapper.get_param()
    assert torch.isfinite(held).all()
    for _ in range(2):  # each call raises the error
        with pytest.raises(RuntimeError, match="a magnitude is 0"):
            model.unmerge_adapter()
