"""Checks of packed base layers in several processes: DDP and FSDP2 give the numbers of one process."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import torch
import torch.distributed as dist
from checks_common import (
    LAYERS,
    LLAMA,
    STEPS,
    adapter,
    assert_all_fused,
    assert_close,
    assert_losses,
    assert_same_everywhere,
    assert_same_gradients,
    batch,
    check,
    counted_calls,
    mine,
    part,
    raises,
    shard,
    step,
    train,
    train_alone,
)
from mixtures import base, targets
from peft import LoraConfig, PeftModel
from peft_models import spread
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

import peft_ext
from peft_ext.nn import PackedLinear

FORMATS = ("mxfp4", "nvfp4", "fp8")


def make_packed(format: str, method: str = "LoRA") -> PeftModel:
    """Returns a Llama with packed linear layers and an adapter as after some training, equal in every process."""
    model = peft_ext.quantize_packed(LLAMA.build(), format, progress=False)
    config = LoraConfig(r=4, lora_alpha=6, use_dora=method == "DoRA", init_lora_weights=False,
                        target_modules="all-linear", task_type="CAUSAL_LM")  # fmt: skip
    torch.manual_seed(3)
    model = peft_ext.get_peft_model(model, config)
    spread(model)
    return model.train()


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))


def ddp(model: nn.Module, sends: bool) -> DDP:
    """Returns ``model`` in DDP, which sends parameters and buffers of the first process to the others if ``sends``."""
    if sends:
        return DDP(model)
    name = "forward_sync_buffers" if "forward_sync_buffers" in signature(DDP).parameters else "broadcast_buffers"
    return DDP(model, init_sync=False, **{name: False})


@check
def packed_layers_under_ddp(folder: Path) -> None:
    """gloo sends no 8-bit floats, so that DDP must not send the scales of NVFP4 and the codes of FP8."""
    for format in FORMATS:
        if format != "mxfp4":
            with raises(RuntimeError, "Invalid scalar type"):
                ddp(make_packed(format), sends=True)
        alone, model = make_packed(format), ddp(make_packed(format), sends=format == "mxfp4")
        assert_all_fused(model)
        step(alone, batch())
        step(model, mine())
        assert_same_gradients(model, alone)
        alone.zero_grad()
        model.zero_grad()
        assert_losses(train(model), train_alone(alone))
        assert_same_everywhere(adapter(model))


@check
def packed_layers_under_fsdp2(folder: Path) -> None:
    """FSDP2 shards the codes, which are parameters; the scales, which are buffers, stay whole in each process."""
    for format, method in (*((format, "LoRA") for format in FORMATS), ("mxfp4", "DoRA")):
        alone, model = make_packed(format, method), shard(make_packed(format, method))
        assert all(isinstance(layer.weight, DTensor) for layer in packed_layers(model).values())
        assert_all_fused(model)
        step(alone, batch())
        with counted_calls() as calls:
            step(model, mine())
        assert calls["fused"] >= LAYERS // 7 and not calls["stock"], calls
        assert_same_gradients(model, alone)
        alone.zero_grad()
        model.zero_grad()
        assert_losses(train(model, STEPS), train_alone(alone, STEPS))
        assert_close(adapter(model), adapter(alone))
        layers = packed_layers(alone)
        for name, layer in packed_layers(model).items():
            for key in (one for one in layer.names if one is not None):
                held, wanted = layer.tensor(key), layers[name].tensor(key)
                if isinstance(held, DTensor):  # gloo can't gather 8-bit floats
                    held, wanted = held.to_local(), wanted.chunk(dist.get_world_size())[dist.get_rank()]
                assert same_bytes(held, wanted), (name, key)


def make_experts(name: str, format: str) -> PeftModel:
    """Returns the same mixture with packed layers and experts in every process, with LoRA on experts and attention."""
    model = base(name)
    parameters = targets(model)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", target_modules=["q_proj"],
                        target_parameters=parameters)  # fmt: skip
    torch.manual_seed(3)
    return peft_ext.get_peft_model(peft_ext.quantize_packed(model, format, progress=False), config).train()


@check
def packed_experts_under_ddp_and_fsdp2(folder: Path) -> None:
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "labels": ids}
    for name, format in (("gpt-oss", "nvfp4"), ("Qwen3-MoE", "fp8")):
        for wrap in (shard, lambda model: ddp(model, sends=False)):
            alone, model = make_experts(name, format), wrap(make_experts(name, format))
            assert_all_fused(model)
            step(alone, inputs)
            step(model, part(inputs))
            assert_same_gradients(model, alone)
