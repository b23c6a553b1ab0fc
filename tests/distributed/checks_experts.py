"""Checks of a mixture's experts in several processes, each of which routes tokens of its own to the experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checks_common import (
    adapter,
    assert_all_fused,
    assert_close,
    assert_losses,
    assert_same_files,
    assert_same_gradients,
    check,
    gradients,
    mean,
    optimizer_of,
    part,
    raises,
    shard,
    step,
    whole,
)
from mixtures import base, targets
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

import peft_ext
from peft_ext.nn import NF4Experts

KINDS = [(name, method, nf4) for name in ("Qwen3-MoE", "gpt-oss") for method in ("LoRA", "DoRA")
         for nf4 in (False, True)]  # fmt: skip


def make(name: str = "Qwen3-MoE", method: str = "LoRA", nf4: bool = False, seed: int = 0, **options: Any) -> PeftModel:
    """Returns the same mixture in every process, with adapters on its experts and attention, in training mode."""
    model = base(name, seed=seed)
    parameters = targets(model)
    model = peft_ext.quantize_nf4(model, progress=False) if nf4 else model
    config = LoraConfig(r=4, lora_alpha=6, use_dora=method == "DoRA", init_lora_weights=False, task_type="CAUSAL_LM",
                        target_modules=["q_proj", "o_proj"], target_parameters=parameters)  # fmt: skip
    torch.manual_seed(3 + seed)
    return peft_ext.get_peft_model(model, config, **options).train()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids}


def train_all(model: Any, inputs: dict[str, Tensor]) -> list[float]:
    optimizer = optimizer_of(model)
    return [mean(step(model, inputs, optimizer)) for _ in range(3)]


def experts_of(model: Any) -> list[NF4Experts]:
    return [module for module in model.modules() if isinstance(module, NF4Experts)]


@check
def experts_under_ddp(folder: Path) -> None:
    for kind in KINDS:
        alone, model = make(*kind), DDP(make(*kind))
        assert_all_fused(model)
        step(alone, batch())
        step(model, part(batch()))
        assert_same_gradients(model, alone)


@check
def fsdp2_experts_take_the_steps_of_one_process(folder: Path) -> None:
    for kind in KINDS:
        alone, model = make(*kind), shard(make(*kind))
        assert_all_fused(model)
        step(alone, batch())
        step(model, part(batch()))
        assert_same_gradients(model, alone)
        alone.zero_grad()
        model.zero_grad()
        assert_losses(train_all(model, part(batch())), train_all(alone, batch()))
        assert_close(adapter(model), adapter(alone))


@check
def fsdp2_shards_the_experts(folder: Path) -> None:
    """A process holds the codes of some experts, and whole scales. A process without a token for an expert takes part
    in the communication too.
    """
    alone, model = make(nf4=True), shard(make(nf4=True))
    for one, other in zip(experts_of(alone), experts_of(model), strict=True):
        for name in one.nf4_shapes:
            codes = other._parameters[name]
            assert isinstance(codes, DTensor) and codes.dtype is torch.uint8
            assert torch.equal(whole(codes), one._parameters[name])
            assert torch.equal(other._buffers[f"{name}_absmax"], one._buffers[f"{name}_absmax"])
    held = torch.tensor([experts_of(model)[0]._parameters["down_proj"].to_local().shape[0]])
    dist.all_reduce(held)
    assert held.item() == 6
    for _ in range(2):  # two forwards before a backward, as some trainers call a model
        (model(**part(batch())).loss + model(**part(batch())).loss).backward()
        (alone(**batch()).loss + alone(**batch()).loss).backward()
    assert_close(gradients(model), gradients(alone))


@check
def fsdp2_experts_in_bfloat16_and_without_resharding(folder: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for nf4 in (False, True):
        alone = make(nf4=nf4).to(torch.bfloat16)
        model = shard(make(nf4=nf4), mp_policy=policy, reshard_after_forward=False)
        assert_all_fused(model)
        assert abs(mean(step(model, part(batch()))) - step(alone, batch()).item()) <= 2**-5
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@check
def fsdp2_experts_state_goes_both_ways(folder: Path) -> None:
    for method, nf4 in (("LoRA", True), ("DoRA", False), ("DoRA", True)):
        model = shard(make("Qwen3-MoE", method, nf4)).eval()
        with torch.no_grad():
            wanted = model(**batch()).logits
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        other = make("Qwen3-MoE", method, nf4, seed=5).eval()
        assert full.keys() == other.state_dict().keys()
        with torch.no_grad():
            assert not torch.equal(other(**batch()).logits, wanted)
            other.load_state_dict(full)
            assert torch.equal(other(**batch()).logits, wanted)
            sharded = shard(make("Qwen3-MoE", method, nf4, seed=5)).eval()
            set_model_state_dict(sharded, full, options=StateDictOptions(full_state_dict=True))
            assert torch.equal(sharded(**batch()).logits, wanted)
        one, several = folder / f"{method}-{nf4}-alone", folder / f"{method}-{nf4}-fsdp2"
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_model_state_dict(model, options=options)
        if dist.get_rank() == 0:
            make("Qwen3-MoE", method, nf4).save_pretrained(one)
            model.save_pretrained(several, state_dict=state)
            assert_same_files(one, several)
        dist.barrier()


@check
def fsdp2_around_the_wrappers_of_experts(folder: Path) -> None:
    """A wrapper of experts stays fused where fully_shard wraps it after accelerate, and stays PEFT's where before."""
    alone, model = make(), make()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer.mlp.experts)
    fully_shard(model)
    assert_all_fused(model)
    step(alone, batch())
    step(model, part(batch()))
    assert_same_gradients(model, alone)
    with raises(RuntimeError, "fully_shard wrapped base_model.model.model.layers.0.mlp.experts itself"):
        peft_ext.restore(model)
