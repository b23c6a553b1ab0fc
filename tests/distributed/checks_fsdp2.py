"""Checks of FSDP2: shards of codes and adapters, whole scales, state dicts and checkpoints in both directions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checks_common import (
    LAYERS,
    LLAMA,
    STEPS,
    Entropy,
    LossOutside,
    adapter,
    assert_all_fused,
    assert_close,
    assert_joins,
    assert_loss,
    assert_losses,
    assert_same_files,
    assert_same_gradients,
    assert_trains,
    batch,
    check,
    counted_calls,
    counted_losses,
    gradients,
    make,
    mean,
    mine,
    nf4_layers,
    optimizer_of,
    raises,
    shard,
    step,
    train,
    train_alone,
    whole,
)
from peft import LoraConfig, PeftModel
from peft_models import quantize
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import peft_ext
from peft_ext.nn import NF4Linear


@check
def fsdp2_takes_the_steps_of_one_process(folder: Path) -> None:
    runs = [("LoRA", base) for base in ("float32", "nf4", "bnb", "bnb nested")]
    for method, base in (*runs, ("DoRA", "nf4"), ("DoRA", "bnb nested"), ("IA3", "float32")):
        alone, model = make(method, base), shard(make(method, base))
        assert_all_fused(model)
        step(alone, batch())
        with counted_calls() as calls:
            step(model, mine())
        assert calls["fused"] >= 2 and not calls["stock"]
        assert_same_gradients(model, alone)
        assert_all_fused(model)
        alone.zero_grad()
        model.zero_grad()
        assert_losses(train(model), train_alone(alone))
        assert_close(adapter(model), adapter(alone))


@check
def fsdp2_joins_layers_of_one_input(folder: Path) -> None:
    for method, base in (("LoRA", "float32"), ("LoRA", "nf4"), ("LoRA", "bnb nested")):
        assert_joins(shard(make(method, base)), make(method, base))


@check
def fsdp2_without_resharding_and_with_two_forwards(folder: Path) -> None:
    """Calls a model twice before a backward, as the trainers of DPO and GRPO do."""
    alone, model = make(base="nf4"), shard(make(base="nf4"), reshard_after_forward=False)
    for _ in range(2):
        for trained, inputs in ((alone, batch()), (model, mine())):
            (trained(**inputs).loss + trained(**inputs).loss).backward()
    assert_close(gradients(model), gradients(alone))


@check
def fsdp2_leaves_the_logits_to_the_loss(folder: Path) -> None:
    """The loss needs no whole logits if the root keeps its parameters until the backward, which is the default. If the
    root frees its parameters, whole logits are computed.
    """
    targets = ["q_proj", "down_proj"]
    for names in (targets, [*targets, "lm_head"]):
        config = LoraConfig(r=4, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")

        def build(config: LoraConfig = config) -> PeftModel:
            torch.manual_seed(3)
            return peft_ext.get_peft_model(quantize(LLAMA.build(), "float32"), config).train()

        for of, counts in ((lambda model: model, (STEPS, 0)), (LossOutside, (0, 0)), (Entropy, (STEPS, STEPS))):
            wanted = train_alone(of(build()))
            model = shard(build())
            assert_loss(model, "logits in chunks")
            with counted_losses() as counted:
                assert_losses(train(of(model)), wanted)
            assert tuple(counted.values()) == counts, counted
            # The whole model is one unit of FSDP2: only the hooks of this unit gather the parameters and reduce the
            # gradients.
            assert_losses(train(of(fully_shard(build()))), wanted)
            model = build()
            for layer in model.get_base_model().model.layers:
                fully_shard(layer)
            fully_shard(model, reshard_after_forward=True)
            with counted_losses() as counted:
                assert_losses(train(of(model)), wanted)
            assert not any(counted.values()), counted
            assert_loss(model, "FSDP2 frees its weight after the forward (reshard_after_forward)")


@check
def fsdp2_with_whole_codes(folder: Path) -> None:
    """Tests FSDP2 with whole codes in each process, as with PyTorch 2.11, which shards only floating parameters."""
    model = make(base="nf4")
    codes = {parameter for parameter in model.parameters() if parameter.dtype is torch.uint8}
    shard(model, ignored_params=codes)
    assert len(codes) == LAYERS and not any(isinstance(layer.weight, DTensor) for _, layer in nf4_layers(model))
    assert_all_fused(model)
    assert_losses(train(model), train_alone(make(base="nf4")))


@check
def fsdp2_accumulates_without_sending(folder: Path) -> None:
    alone, model = make(base="nf4"), shard(make(base="nf4"))
    step(alone, batch())
    for half in (0, 1):
        model.set_requires_gradient_sync(half == 1)
        (model(**{name: part[half::2] for name, part in mine().items()}).loss / 2).backward()
    assert_close(gradients(model), gradients(alone))


@check
def fsdp2_shards_the_codes(folder: Path) -> None:
    """Each process has its part of the packed bytes, and whole scales. The gathered bytes equal the bytes before
    sharding.
    """
    whole_model, model = make(base="nf4"), shard(make(base="nf4"))
    size, rank = dist.get_world_size(), dist.get_rank()
    seen = []
    for (name, alone), part in zip(nf4_layers(whole_model), (layer for _, layer in nf4_layers(model)), strict=True):
        weight = part.weight
        assert isinstance(weight, DTensor) and weight.dtype is torch.uint8 and not weight.requires_grad, name
        count = alone.weight.numel()
        rows = -(-count // size)
        wanted = max(0, min(rows, count - rank * rows))
        assert tuple(weight.to_local().shape) == (wanted, 1), (name, weight.to_local().shape)
        for scale in ("absmax", "nested_absmax", "nested_code", "nested_offset"):
            assert type(getattr(part, scale)) is Tensor and torch.equal(getattr(part, scale), getattr(alone, scale))
        part.register_forward_pre_hook(lambda layer, _, bits=alone.weight: seen.append(torch.equal(layer.weight, bits)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**mine())
    assert seen == [True] * LAYERS


@check
def fsdp2_shards_unevenly(folder: Path) -> None:
    """With 165 bytes of codes, 11 rows and rank 3 the shards are uneven, and some processes hold no part of a
    parameter.
    """

    def build() -> PeftModel:
        torch.manual_seed(1)
        model = peft_ext.quantize_nf4(nn.Sequential(nn.Linear(30, 11), nn.GELU(), nn.Linear(11, 1)), progress=False)
        config = LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False, use_dora=True)
        return peft_ext.get_peft_model(model, config)

    x = torch.randn(8, 30, generator=torch.Generator().manual_seed(2))
    alone, model = build(), build()
    fully_shard(model)
    sizes = [parameter.to_local().numel() for parameter in model.parameters()]
    everywhere = [torch.empty(len(sizes), dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, torch.tensor(sizes))
    assert (torch.stack(everywhere) == 0).any()
    alone(x).square().mean().backward()
    assert_all_fused(model)
    with counted_calls() as calls:
        model(x.chunk(dist.get_world_size())[dist.get_rank()]).square().mean().backward()
    assert (calls["fused"], calls["stock"]) == (2, 0), calls
    assert_close(gradients(model), gradients(alone))
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    for name, tensor in alone.state_dict().items():
        assert torch.equal(full[name], tensor), name


@check
def fsdp2_casts_no_codes(folder: Path) -> None:
    """A mixed precision policy casts gathered float parameters, and neither codes nor scales."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    alone = make(base="nf4").to(torch.bfloat16)
    model = shard(make(base="nf4"), mp_policy=policy)
    assert_all_fused(model)
    with counted_calls() as calls:
        loss = step(model, mine())
    assert (calls["fused"], calls["stock"]) == (LAYERS, 0), calls
    # Both models compute in bfloat16, whose products may add in another order for another batch size.
    assert abs(mean(loss) - step(alone, batch()).item()) <= 2**-7
    for (name, before), (_, after) in zip(nf4_layers(make(base="nf4")), nf4_layers(model), strict=True):
        assert torch.equal(whole(after.weight), before.weight), name
        assert after.absmax.dtype is torch.uint8 and after.nested_absmax.dtype is torch.float32, name


@check
def fsdp2_saves_the_adapter_of_one_process(folder: Path) -> None:
    for method in ("LoRA", "DoRA", "IA3"):
        one, several = folder / f"{method}-alone", folder / f"{method}-fsdp2"
        alone, model = make(method, "nf4"), shard(make(method, "nf4"))
        train_alone(alone)
        train(model)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_model_state_dict(model, options=options)
        if dist.get_rank() == 0:
            alone.save_pretrained(one)
            model.save_pretrained(several, state_dict=state)
            assert_same_files(one, several)
            PeftModel.from_pretrained(quantize(LLAMA.build(), "float32"), several)
        dist.barrier()


@check
def fsdp2_state_dict_goes_both_ways(folder: Path) -> None:
    """A gathered state dict has bitsandbytes' keys. One process can load this state dict, and so can the shards of
    another model.
    """
    model = shard(make(base="nf4"))
    model.eval()
    with torch.no_grad():
        wanted = model(**batch()).logits
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert not any(isinstance(tensor, DTensor) for tensor in full.values())
    other = _moved(make(base="nf4")).eval()
    assert full.keys() == other.state_dict().keys()
    with torch.no_grad():
        assert not torch.equal(other(**batch()).logits, wanted)
        other.load_state_dict(full)
        assert torch.equal(other(**batch()).logits, wanted)
        for options in ({}, {"broadcast_from_rank0": True}):
            sharded = shard(_moved(make(base="nf4"))).eval()
            state = copy.copy(full) if not options or dist.get_rank() == 0 else _scales_alone(full)
            set_model_state_dict(sharded, state, options=StateDictOptions(full_state_dict=True, **options))
            assert torch.equal(sharded(**batch()).logits, wanted), options
        parts = shard(_moved(make(base="nf4"))).eval()
        parts.load_state_dict(model.state_dict())
        assert torch.equal(parts(**batch()).logits, wanted)
        with raises(RuntimeError, "weight is a DTensor, wanted a plain tensor"):
            _moved(make(base="nf4")).load_state_dict(model.state_dict())


def _scales_alone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the entries that every process has to provide: broadcast_from_rank0 sends no buffers that are not
    persistent, such as the scales.
    """
    return {name: tensor for name, tensor in state.items() if ".weight." in name}


def _moved(model: PeftModel) -> PeftModel:
    """Changes the weights of the model and returns the model."""
    torch.manual_seed(11)
    with torch.no_grad():
        for name, layer in nf4_layers(model):
            layer.set_nf4(peft_ext.ops.nf4_quantize(torch.randn(layer.out_features, layer.in_features), 64, True))
            assert layer.weight.dtype is torch.uint8, name
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1.5)
    return model


@check
def fsdp2_goes_on_from_a_checkpoint(folder: Path) -> None:
    """Saves sharded files of torch.distributed.checkpoint, only with the adapter and its optimizer. The resumed run has
    the losses of the uninterrupted run.
    """
    options = StateDictOptions(ignore_frozen_params=True)

    def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = get_model_state_dict(model, options=options)
        state = {name: tensor for name, tensor in state.items() if "base_layer" not in name}
        return {"adapter": state, "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}

    model = shard(make("DoRA", "nf4"))
    optimizer = optimizer_of(model)
    train(model, 2, optimizer)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / "checkpoint")
    wanted = train(model, 2, optimizer)
    resumed = make("DoRA", "nf4")
    with torch.no_grad():
        for parameter in resumed.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    resumed = shard(resumed)
    optimizer = optimizer_of(resumed)
    state = state_of(resumed, optimizer)
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(resumed, state["adapter"], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(resumed, optimizer, state["optimizer"], options=options)
    assert train(resumed, 2, optimizer) == wanted


@check
def fsdp2_around_single_layers(folder: Path) -> None:
    """An adapter layer that is sharded by itself stays fused if it was accelerated before; otherwise explain gives the
    reason.
    """
    wanted = train_alone(make(base="nf4"))

    def wrap(model: PeftModel, chosen: Callable[[Any], bool]) -> PeftModel:
        for module in [module for module in model.modules() if chosen(module)]:
            fully_shard(module)
        return fully_shard(model)

    def is_adapted(module: Any) -> bool:
        return hasattr(module, "lora_A")

    before, after = wrap(make(base="nf4"), is_adapted), wrap(make(base="nf4", accelerated=False), is_adapted)
    assert_all_fused(before)
    assert_trains(before, wanted)
    with raises(RuntimeError, "fully_shard wrapped base_model.model.model.layers.0.self_attn.q_proj itself"):
        peft_ext.restore(before)
    peft_ext.accelerate(after)
    assert {row.reason for row in peft_ext.explain(after).rows} == {
        "fully_shard wrapped the layer itself, and so changed its class: call accelerate(model) before that"
    }
    assert_losses(train(after), wanted)

    bases = wrap(make(base="nf4"), lambda module: isinstance(module, NF4Linear))
    reasons = {row.reason for row in peft_ext.explain(bases).rows}
    assert reasons == {"the adapter's part: hooks on base_layer, or its replaced forward, would not run"}
    assert_trains(bases, wanted)

    def is_trained(module: Any) -> bool:  # PEFT's fsdp_auto_wrap_policy wraps these modules
        return type(module) is nn.Linear and module.weight.requires_grad

    leaves = wrap(make(base="nf4"), is_trained)
    reasons = {row.reason for row in peft_ext.explain(leaves).rows}
    assert reasons == {"lora_A is a FSDPLinear, lora_B a FSDPLinear, wanted plain nn.Linear"}
    assert_trains(leaves, wanted, fused=0, stock=STEPS * LAYERS)


@check
def shards_say_that_they_are_shards(folder: Path) -> None:
    """An operation that is impossible on a shard raises an error that names the shard, and changes nothing."""
    model = shard(make(base="nf4"))
    (name, layer), *_ = nf4_layers(model)
    for call in (layer.dequantize, lambda: layer(torch.ones(1, layer.in_features)), model.merge_adapter):
        with raises(RuntimeError, "NF4Linear: weight is a DTensor with placements (Shard(dim=0),)"):
            call()
    inner = model.get_submodule(name.removesuffix(".base_layer"))
    # assert_all_fused explains a submodule here, without the module whose hooks gather the submodule's parameters.
    with raises(AssertionError, "lora_A is a DTensor, wanted a plain parameter"):
        assert_all_fused(inner)
    with raises(TypeError, "weight is a DTensor, wanted a plain parameter"):
        peft_ext.quantize_nf4(shard(make()), progress=False)
    assert_losses(train(model), train_alone(make(base="nf4")))


@check
def hybrid_sharding(folder: Path) -> None:
    """Each half of the processes shards the model; the two halves have copies, as with several machines."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))
    alone, model = make("DoRA", "nf4"), shard(make("DoRA", "nf4"), mesh=mesh)
    assert_all_fused(model)
    wanted = train_alone(alone)
    assert_trains(model, wanted)
    assert_close(adapter(model), adapter(alone))
