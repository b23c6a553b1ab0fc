"""Tests of LoRA on the experts of mixtures (PEFT's target_parameters): accelerated models are compared with PEFT
alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_ext
from peft_ext.nn.experts import adapter_fields

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
LoraConfig, PeftModel = peft.LoraConfig, peft.PeftModel

from mixtures import (  # noqa: E402  behind what it needs
    adapt,
    adapt_config,
    assert_alike,
    base,
    batch,
    dequantized,
    every_model,
    experts_rows,
    some_models,
    step,
    targets,
)

# --- the function -----------------------------------------------------------------------------------------------------


@every_model
def test_logits_and_gradients_are_pefts(name: str) -> None:
    wanted = step(adapt(base(name)))
    model = peft_ext.accelerate(adapt(base(name)))
    rows = experts_rows(model)
    assert rows and all(row.fused for row in rows), rows
    assert_alike(step(model), wanted)
    assert_alike(step(peft_ext.restore(model)), wanted, 0.0)


@pytest.mark.slow
@every_model
def test_gradients_in_bfloat16_are_as_close_to_float64s_as_pefts(name: str) -> None:
    """The median over eleven seeds of the ratio of the errors is at most 1.1. The median is used because in 16 bits a
    rounding may send a token to another expert in either model."""
    # transformers' default implementation of experts, grouped_mm, does not multiply float64.
    eager = None if name == "Llama 4" else "eager"
    ratios = []
    for seed in range(11):
        truth = step(adapt(base(name, torch.bfloat16, eager, seed)).double())
        stock = step(adapt(base(name, torch.bfloat16, seed=seed)))
        fused = step(peft_ext.accelerate(adapt(base(name, torch.bfloat16, seed=seed)), blocks=False))
        assert fused.keys() == truth.keys()
        names = [n for n in truth if "experts" in n]
        mine, pefts = (
            sum((found[n].double() - truth[n]).norm().item() ** 2 for n in names) for found in (fused, stock)
        )
        ratios.append((mine / pefts) ** 0.5)
    assert sorted(ratios)[5] <= 1.1, ratios


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_transformers(implementation: str) -> None:
    wanted = step(adapt(base(implementation=implementation)))
    assert_alike(step(peft_ext.accelerate(adapt(base(implementation=implementation)))), wanted)


def test_gradients_reach_every_expert_that_saw_a_token_and_no_other() -> None:
    model, seen = peft_ext.accelerate(adapt(base())), {}

    def watch(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: seen.update({name: torch.unique(args[1]).tolist()})

    for name, module in model.named_modules():
        if name.endswith("mlp"):
            module.gate.register_forward_hook(
                lambda m, a, out, name=name: seen.update({name: out[-1].unique().tolist()})
            )
    grads = step(model)
    assert seen
    for name, experts in seen.items():
        for where in ("experts.base_layer", "experts"):
            grad = grads[f"{name}.{where}.lora_A.default.weight"].view(6, 4, -1)
            assert [e for e in range(6) if grad[e].any()] == experts


@pytest.mark.parametrize("only", ["gate_up_proj", "down_proj"])
def test_one_of_the_two_parameters(only: str) -> None:
    parameters = [f"mlp.experts.{only}"]
    wanted = step(adapt(base(), target_parameters=parameters))
    model = peft_ext.accelerate(adapt(base(), target_parameters=parameters))
    assert all(row.fused for row in experts_rows(model))
    assert_alike(step(model), wanted)


def test_ranks_by_parameter_and_rslora() -> None:
    config = {"rank_pattern": {"experts.gate_up_proj": 6}, "use_rslora": True}
    assert_alike(step(peft_ext.accelerate(adapt(base(), **config))), step(adapt(base(), **config)))


def test_under_autocast_and_checkpointing() -> None:
    found = []
    for accelerated in (False, True):
        model = adapt(base())
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model = peft_ext.accelerate(model) if accelerated else model
        found.append(step(model))
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(model))
    assert_alike(found[2], found[0])
    wanted = torch.cat([found[1][n].flatten() for n in found[1] if "experts" in n])
    came = torch.cat([found[3][n].flatten() for n in found[1] if "experts" in n])
    assert (came - wanted).norm() <= 0.1 * wanted.norm()


def test_dropout_on_the_low_rank_path() -> None:
    """Evaluation has no dropout, equal seeds give equal masks, the mean over many masks is the result without dropout,
    and a copy keeps experts_dropout until accelerate is called again."""
    model, plain = (peft_ext.accelerate(adapt(base()), experts_dropout=p) for p in (0.4, 0.0))
    assert {row.kind.partition(" over")[0] for row in experts_rows(model)} == {"LoRA with dropout 0.4"}
    assert torch.equal(model.eval()(**batch()).logits, plain.eval()(**batch()).logits)
    first, again, other = step(model), step(model), step(plain)
    assert all(torch.equal(first[n], again[n]) for n in first)  # one seed gives equal masks
    assert (first["logits"] - other["logits"]).abs().max() > 1e-3
    rows, weight, a, b = torch.randn(40, 32), torch.randn(6, 16, 32), torch.randn(6, 4, 32), torch.randn(6, 16, 4)
    offsets, means = torch.tensor([10, 10, 25, 30, 40, 40]), []
    for seed in range(400):
        torch.manual_seed(seed)
        means.append(peft_ext.ops.lora_experts(rows, weight, offsets, a, b, dropout_p=0.4, training=True))
    wanted = peft_ext.ops.lora_experts(rows, weight, offsets, a, b)
    assert (torch.stack(means).mean(0) - wanted).norm() <= 0.1 * wanted.norm()
    copied = copy.deepcopy(model)
    assert experts_rows(copied)[0].kind.startswith("LoRA with dropout")
    assert not any("dropout" in row.kind for row in experts_rows(peft_ext.accelerate(model)))
    with pytest.raises(ValueError, match="experts_dropout is 1.0, wanted"):
        peft_ext.accelerate(model, experts_dropout=1.0)


@pytest.mark.slow
def test_memory_is_estimated_with_experts() -> None:
    size = {"batch_size": 2, "sequence_length": 24}
    stock, fused = (peft_ext.estimate_memory(adapt(base(dtype=torch.bfloat16)), accelerated=accelerated, **size)
                    for accelerated in (False, True))  # fmt: skip
    assert 0 < fused.activations < stock.activations
    quantized = adapt(peft_ext.quantize_nf4(base(dtype=torch.bfloat16)), target_parameters=targets(base()))
    assert peft_ext.estimate_memory(quantized, **size).weights < fused.weights
    planned = peft_ext.estimate_memory(base(dtype=torch.bfloat16), adapt_config(), quantization="nf4", **size)
    there = peft_ext.estimate_memory(quantized, **size)
    assert (planned.weights, planned.quantization, planned.parameters) == (
        there.weights, there.quantization, there.parameters)  # fmt: skip


def test_explain_names_the_parameters() -> None:
    kinds = {row.kind for row in experts_rows(peft_ext.accelerate(adapt(base())))}
    assert kinds == {"LoRA over Qwen3MoeExperts.down_proj", "LoRA over Qwen3MoeExperts.gate_up_proj"}


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_under_torch_compile(quantized: bool) -> None:
    torch._dynamo.reset()

    def make() -> nn.Module:
        model = peft_ext.quantize_nf4(base()) if quantized else base()
        return peft_ext.accelerate(adapt(model, target_parameters=targets(base())))

    wanted, model = step(make()), make()
    compiled = torch.compile(model, backend="aot_eager")
    model.train()
    out = compiled(**batch())
    out.loss.backward()
    torch.testing.assert_close(out.logits.detach(), wanted["logits"], rtol=1e-4, atol=1e-5)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_alike(found, {n: v for n, v in wanted.items() if n != "logits"}, 1e-4)
    torch._dynamo.reset()


# --- what is done to a model ------------------------------------------------------------------------------------------


@some_models
def test_files_go_both_ways_and_merging_gives_the_same(name: str, tmp_path: Path) -> None:
    model = peft_ext.accelerate(adapt(base(name))).eval()
    with torch.no_grad():
        wanted = model(**batch()).logits
        model.save_pretrained(tmp_path)
        stock = PeftModel.from_pretrained(base(name), tmp_path).eval()
        assert (stock(**batch()).logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        fused = peft_ext.accelerate(stock)
        assert all(row.fused for row in experts_rows(fused))
        assert (fused(**batch()).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        merged = model.merge_and_unload()
        assert not any(isinstance(module, peft.tuners.lora.layer.ParamWrapper) for module in merged.modules())
        assert (merged(**batch()).logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", ["Qwen3-MoE", "gpt-oss", "Mixtral"])
def test_generates_what_peft_does(name: str) -> None:
    ids = batch()["input_ids"][:1, :5]
    found = [
        model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        for model in (adapt(base(name)), peft_ext.accelerate(adapt(base(name))))
    ]
    assert torch.equal(*found)


def test_disabled_merged_and_switched() -> None:
    model, stock = peft_ext.accelerate(adapt(base())), adapt(base())
    for m in (model, stock):
        m.add_adapter("other", LoraConfig(r=2, target_modules=["o_proj"], target_parameters=targets(base()),
                                          init_lora_weights=False))  # fmt: skip
    with torch.no_grad():
        for one, two in zip(model.parameters(), stock.parameters(), strict=True):
            two.copy_(one)
    peft_ext.accelerate(model)
    with model.disable_adapter(), stock.disable_adapter():
        assert "disabled" in experts_rows(model)[0].reason
        torch.testing.assert_close(model.eval()(**batch()).logits, stock.eval()(**batch()).logits)
    for m in (model, stock):
        m.set_adapter("other")
    assert_alike(step(model), step(stock))
    for m in (model, stock):
        m.base_model.set_adapter(["default", "other"])
    assert experts_rows(model)[0].fused
    assert_alike(step(model), step(stock))
    for m in (model, stock):
        m.set_adapter("default")
        m.merge_adapter()
    assert "merged" in experts_rows(model)[0].reason
    torch.testing.assert_close(model.eval()(**batch()).logits, stock.eval()(**batch()).logits)


def test_copies_pickles_and_state_dict() -> None:
    model = peft_ext.accelerate(adapt(base()))
    wanted = step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(row.fused for row in experts_rows(other))
        assert_alike(step(other), wanted, 0.0)
    assert model.state_dict().keys() == adapt(base()).state_dict().keys()


def test_what_is_not_fused_says_why_and_is_pefts() -> None:
    model = peft_ext.accelerate(adapt(base()))
    experts = model.get_base_model().model.layers[0].mlp.experts
    experts.get_base_layer().gate_up_proj.requires_grad_(True)
    assert any("gate_up_proj requires grad" in row.reason for row in experts_rows(model))
    assert experts.get_base_layer().gate_up_proj.grad is None
    step(model)
    assert experts.get_base_layer().gate_up_proj.grad is not None
    model = peft_ext.accelerate(adapt(base()))
    called = []
    model.get_base_model().model.layers[0].mlp.experts.get_base_layer().register_forward_hook(
        lambda *_: called.append(1)
    )
    assert any("hooks" in row.reason for row in experts_rows(model))
    step(model)
    assert called


def test_a_token_without_an_expert_gets_nothing() -> None:
    """A token without an expert has an expert number beyond the last, as expert parallelism marks it."""
    model = peft_ext.accelerate(adapt(base())).eval()
    experts = model.get_base_model().model.layers[0].mlp.experts
    x, index = torch.randn(5, 32), torch.tensor([[0, 1], [6, 2], [6, 6], [3, 4], [5, 0]])
    weights = torch.rand(5, 2)
    y = experts(x, index, weights)
    assert not y[2].any()
    alone = experts(x[1:2], torch.tensor([[2]]), weights[1:2, 1:])
    torch.testing.assert_close(y[1:2], alone)


# --- over NF4 ---------------------------------------------------------------------------------------------------------


@some_models
def test_nf4_experts_are_the_dense_ones_of_their_weights(name: str) -> None:
    wanted = step(adapt(dequantized(base(name))))
    quantized = peft_ext.quantize_nf4(base(name))
    assert any(isinstance(module, peft_ext.nn.NF4Experts) for module in quantized.modules())
    frozen = dequantized(base(name)).eval()(**batch()).logits
    torch.testing.assert_close(quantized.eval()(**batch()).logits, frozen, rtol=1e-4, atol=1e-5)
    model = adapt(quantized, target_parameters=targets(base(name)))
    shapes = {n: p.shape for n, p in adapt(base(name)).named_parameters() if "lora" in n}
    assert {n: p.shape for n, p in model.named_parameters() if "lora" in n} == shapes
    model = peft_ext.accelerate(model)
    assert all(row.fused for row in experts_rows(model))
    found = step(model)
    assert_alike({n: v for n, v in found.items() if n in wanted}, wanted, 1e-4)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["Qwen3-MoE", "gpt-oss"])
def test_each_expert_has_the_bits_of_a_weight_of_its_own(name: str, double_quant: bool) -> None:
    dense = base(name)
    wanted = {n: p.detach().clone() for n, p in dense.named_parameters() if p.dim() == 3 and n.endswith("_proj")}
    peft_ext.quantize_nf4(dense, double_quant=double_quant)
    for full, parameter in wanted.items():
        module, _, short = full.rpartition(".")
        nf4 = dense.get_submodule(module).nf4(short)
        for e, one in enumerate(parameter):
            alone = peft_ext.ops.nf4_quantize((one.T if name == "gpt-oss" else one).contiguous(), 64, double_quant)
            for key, tensor in alone.tensors().items():
                assert torch.equal(nf4.expert(e).tensors()[key].reshape(-1), tensor.reshape(-1)), key


def test_nf4_experts_state_files_and_copies(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = peft_ext.quantize_nf4(base()).eval()
    wanted = model(**batch()).logits
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = peft_ext.quantize_nf4(base(seed=1)).eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(**batch()).logits, wanted)
    coarse = peft_ext.quantize_nf4(base(), blocksize=32)
    with pytest.raises((ValueError, RuntimeError), match="blocksize|size mismatch"):
        coarse.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(**batch()).logits, wanted)
        adapted = peft_ext.accelerate(adapt(copied, target_parameters=targets(base())))
        assert all(row.fused for row in experts_rows(adapted))
    half = copy.deepcopy(model).to(torch.bfloat16)
    experts = half.model.layers[0].mlp.experts
    assert torch.equal(experts.nf4("down_proj").dequantize(torch.float32),
                       model.model.layers[0].mlp.experts.nf4("down_proj").dequantize(torch.float32))  # fmt: skip
    held = sum(t.numel() * t.element_size() for t in (*experts._parameters.values(), *experts._buffers.values())
               if t is not None)  # fmt: skip
    dense = base(dtype=torch.bfloat16).model.layers[0].mlp.experts
    # Each of two NF4 parameters has a table of 1 KiB, which counts in a small model.
    assert held - 2 * 1024 <= 0.28 * sum(p.numel() * p.element_size() for p in dense.parameters())


@pytest.mark.parametrize("name", ["Qwen3-MoE", "gpt-oss", "Llama 4"])
def test_merging_into_nf4_experts_and_back(name: str, tmp_path: Path) -> None:
    model = peft_ext.accelerate(adapt(peft_ext.quantize_nf4(base(name)), target_parameters=targets(base(name)))).eval()
    wanted = model(**batch()).logits
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.warns(UserWarning, match="rounds the merged weight"):
        model.merge_adapter()
    moved = (model(**batch()).logits - wanted).norm() / wanted.norm()
    assert 0 < moved < 0.3
    merged = adapt(dequantized(base(name))).eval().merge_and_unload()
    experts = [m for m in model.modules() if isinstance(m, peft_ext.nn.NF4Experts)]
    dense = [m for n, m in merged.named_modules() if n.endswith("experts")]
    for one, other in zip(experts, dense, strict=True):
        found, exact = one.nf4("down_proj").dequantize(torch.float32), other.down_proj
        exact = exact.transpose(1, 2) if found.shape != exact.shape else exact
        assert (found - exact).norm() <= 0.1 * exact.norm()
    model.unmerge_adapter()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = peft_ext.accelerate(PeftModel.from_pretrained(peft_ext.quantize_nf4(base(name)), tmp_path)).eval()
    torch.testing.assert_close(again(**batch()).logits, wanted)
    exact = peft_ext.dequantize_nf4(model).merge_and_unload().eval()
    torch.testing.assert_close(exact(**batch()).logits, wanted, rtol=1e-3, atol=1e-4)


def test_adapters_that_nothing_can_add_to_nf4_experts_raise() -> None:
    hooked = peft_ext.accelerate(adapt(peft_ext.quantize_nf4(base()), target_parameters=targets(base())))
    hooked.get_base_model().model.layers[0].mlp.experts.scaling["default"] = torch.tensor(2.0)
    with pytest.raises(RuntimeError, match="its scaling is a tensor"):
        hooked(**batch())
    with hooked.disable_adapter():
        hooked(**batch())


@pytest.mark.slow
def test_hooks_around_nf4_experts_run() -> None:
    """Hooks on the wrappers and on the inner experts run, and hooks on lora_A do not run: PEFT too reads only the
    weights of an adapter's modules."""
    plain, model = (
        peft_ext.accelerate(adapt(peft_ext.quantize_nf4(base()), target_parameters=targets(base()))) for _ in range(2)
    )
    experts = model.get_base_model().model.layers[0].mlp.experts
    assert isinstance(experts.base_layer.base_layer, peft_ext.nn.NF4Experts)
    called = []
    lasting = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append("global") if isinstance(module, peft_ext.nn.NF4Experts) else None
    )
    step(model)
    lasting.remove()
    assert called == ["global"] * len(model.get_base_model().model.layers)
    called.clear()
    experts.lora_A["default"].register_forward_hook(lambda *_: called.append("lora_A"))
    experts.base_layer.register_forward_pre_hook(lambda *_: called.append("before"))
    experts.base_layer.register_full_backward_hook(lambda *_: called.append("backward"))
    handle = experts.base_layer.base_layer.register_forward_hook(lambda *_: called.append("experts"))
    assert all(row.fused for row in experts_rows(model))
    for one, other in zip(step(model).items(), step(plain).items(), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])
    assert called == ["before", "experts", "backward"]
    handle.remove()
    experts.base_layer.base_layer.register_forward_hook(lambda _module, _args, y: 2 * y)
    assert not torch.allclose(model(**batch()).logits, plain(**batch()).logits)

    def stop(*_: object) -> None:
        raise KeyError("stop")

    stopped = experts.base_layer.base_layer.register_forward_pre_hook(stop)
    with pytest.raises(KeyError):
        model(**batch())
    stopped.remove()
    with model.disable_adapter(), plain.disable_adapter():
        experts.base_layer.base_layer._forward_hooks.clear()
        assert torch.equal(model(**batch()).logits, plain(**batch()).logits)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["replaced", "skipped", "compiled", "compiled alone"])
def test_an_adapter_on_nf4_experts_is_never_left_out(how: str) -> None:
    """Where torch.compile or other code runs in place of the experts' forward, a call is right or raises an error."""
    model = peft_ext.accelerate(adapt(peft_ext.quantize_nf4(base()), target_parameters=targets(base()))).eval()
    wanted = model(**batch()).logits
    held = model.get_base_model().model.layers[0].mlp.experts.get_base_layer()
    if how == "replaced":
        held.forward = lambda x, *_: x
    else:
        held.register_forward_hook(lambda *_: None)
    if how == "skipped":
        held.__class__ = type("Others", (type(held),), {"forward": lambda self, x, *_: x})
    elif how == "compiled alone":
        held.compile(backend="eager")
    run = torch.compile(model, backend="eager") if how == "compiled" else model
    with pytest.raises(RuntimeError, match="PEFT can't add an adapter to packed experts"):
        torch.testing.assert_close(run(**batch()).logits, wanted)
        raise RuntimeError("PEFT can't add an adapter to packed experts, and it did not have to")


def test_nf4_experts_that_are_sharded_by_themselves_are_refused(tmp_path: Path) -> None:
    """NF4 experts that are sharded by themselves are refused: FSDP would gather the weights too late."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    try:
        model = peft_ext.accelerate(adapt(peft_ext.quantize_nf4(base()), target_parameters=targets(base())))
        fully_shard(model.get_base_model().model.layers[0].mlp.experts.get_base_layer())
        assert any("hooks on the experts" in row.reason for row in experts_rows(model))
        with pytest.raises(RuntimeError, match="hooks on the experts"):
            model(**batch())
    finally:
        torch.distributed.destroy_process_group()


def test_hooks_on_the_factors_of_experts_are_never_called() -> None:
    called = []
    for accelerated in (False, True):
        model = adapt(base())
        experts = model.get_base_model().model.layers[0].mlp.experts
        experts.lora_A["default"].register_forward_hook(lambda *_: called.append(1))
        model = peft_ext.accelerate(model) if accelerated else model
        step(model)
    assert not called and all(row.fused for row in experts_rows(model))


@pytest.mark.parametrize("quantized", [False, True])
def test_an_adapter_that_leaves_the_experts_alone(quantized: bool) -> None:
    """Tests an adapter that does not adapt the experts, and an adapter that adapts one of their two parameters.

    A parameter without adapter has the values of the base.
    """
    model = base()
    model = peft_ext.quantize_nf4(model) if quantized else model
    model, plain = adapt(model, target_parameters=targets(base())), adapt(dequantized(base()) if quantized else base())
    for one in (model, plain):
        torch.manual_seed(4)
        one.add_adapter("elsewhere", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        one.set_adapter("elsewhere")
    peft_ext.accelerate(model)
    assert all(row.reason == "no active adapter on this layer" for row in experts_rows(model))
    wanted = step(plain)
    assert_alike({n: v for n, v in step(model).items() if n in wanted}, wanted, 1e-4)
    for one in (model, plain):
        one.base_model.set_adapter(["default", "elsewhere"])
    wanted = step(plain)
    assert_alike({n: v for n, v in step(model).items() if n in wanted}, wanted, 1e-4)
    assert all(row.fused for row in experts_rows(model))


def test_a_mixed_batch_is_refused_in_pefts_words() -> None:
    for model in (base(), peft_ext.quantize_nf4(base())):
        model = peft_ext.accelerate(adapt(model, target_parameters=targets(base()))).eval()
        with pytest.raises(ValueError, match="ParamWrapper does not support mixed adapter batches"):
            model(input_ids=batch()["input_ids"], adapter_names=["default", "__base__"])


def test_adapters_of_several_dtypes_under_autocast() -> None:
    """Under bfloat16 autocast on a CPU, PyTorch's cat raises an error for float16 tensors."""
    model = adapt(base(dtype=torch.float16), autocast_adapter_dtype=False)
    model.add_adapter("other", adapt_config(target_parameters=targets(base())), autocast_adapter_dtype=True)
    peft_ext.accelerate(model)
    dtypes = {p.dtype for n, p in model.named_parameters() if "lora_A" in n and "experts" in n}
    assert dtypes == {torch.float16, torch.float32}
    model.base_model.set_adapter(["default", "other"])
    with torch.autocast("cpu", torch.bfloat16):
        assert step(model)["logits"].isfinite().all()


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Mixtral"])
def test_all_linear_as_peft_reads_it(name: str) -> None:
    """PEFT's "all-linear" adapts the experts and the router. The experts are fused, and PEFT's own code computes the
    router."""
    found = []
    for accelerated in (False, True):
        model = adapt(base(name), target_modules="all-linear", target_parameters=None)
        found.append(step(peft_ext.accelerate(model) if accelerated else model))
    assert any("gate.lora_A" in key for key in found[0])
    assert all(row.fused for row in experts_rows(model))
    router = [row for row in peft_ext.explain(model).rows if row.name.endswith("gate")]
    assert router and all("wanted a mixture's experts" in row.reason for row in router)
    assert_alike(found[1], found[0])


def test_experts_that_are_modules_run_as_fused_layers() -> None:
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4, vocab_size=99,
        decoder_start_token_id=0, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, dropout_rate=0.0,
        router_jitter_noise=0.0, tie_word_embeddings=False,
    )  # fmt: skip
    plain = peft.get_peft_model(transformers.SwitchTransformersForConditionalGeneration(config),
                                LoraConfig(target_modules=["wi", "wo"], init_lora_weights=False))  # fmt: skip
    model, ids = peft_ext.accelerate(copy.deepcopy(plain)), torch.randint(1, 99, (3, 11))
    rows = [row for row in peft_ext.explain(model).rows if ".experts." in row.name]
    assert len(rows) == 2 * 4 * 2 and all(row.fused for row in rows)
    for one in (plain, model):
        one(input_ids=ids, labels=ids).loss.backward()
    for wanted, found in zip(plain.parameters(), model.parameters(), strict=True):
        if wanted.grad is not None or found.grad is not None:  # an expert without a token has no gradient
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-6)
    wanted, found = ([sorted(m.__dict__) for m in one.modules()] for one in (plain, peft_ext.restore(model)))
    assert found == wanted


def experts_of(model: Any) -> Any:
    return next(module for module in model.modules() if isinstance(module, peft_ext.nn.NF4Experts))


def test_nf4_experts_of_no_token() -> None:
    for model in (peft_ext.quantize_nf4(base()), peft_ext.accelerate(adapt(peft_ext.quantize_nf4(base())))):
        experts = experts_of(model)
        hidden = experts.nf4_shapes["down_proj"][1]
        found = experts(torch.zeros(0, hidden), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
        assert found.shape == (0, hidden)


def test_a_state_of_nf4_experts_quantized_from_another_dtype() -> None:
    source, model = peft_ext.quantize_nf4(base(dtype=torch.bfloat16)), peft_ext.quantize_nf4(base())
    experts_of(model).load_state_dict(experts_of(source).state_dict())
    assert experts_of(model).quant_dtype is torch.bfloat16
    assert torch.equal(experts_of(model).down_proj, experts_of(source).down_proj)


def test_a_cast_of_nf4_experts_keeps_their_bits() -> None:
    for cast in (lambda m: m.half(), lambda m: m.type(torch.bfloat16)):
        experts = experts_of(peft_ext.quantize_nf4(base()))
        before = {name: tensor.clone() for name, tensor in experts.state_dict().items() if isinstance(tensor, Tensor)}
        cast(experts)
        for name, tensor in before.items():
            assert torch.equal(experts.state_dict()[name], tensor) and experts.state_dict()[name].dtype is tensor.dtype


@every_model
def test_the_fields_for_an_adapter_name_no_router(name: str) -> None:
    model = base(name)
    fields = adapter_fields(model, "lora")
    adapted = [path for path, module in model.named_modules()
               if isinstance(module, nn.Linear) and path.split(".")[-1] in fields["target_modules"]]  # fmt: skip
    assert adapted and not [path for path in adapted if "router" in path or path.endswith(".gate")]
