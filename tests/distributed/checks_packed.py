"""Checks of packed base layers in several processes: DDP, FSDP2 and shards of files give the numbers of one process."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import packed_checkpoints as made
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
from checks_loading import adapted, assert_same_bits, config_of, loaded, mesh_of, on_meta, saved
from mixtures import base, targets
from peft import LoraConfig, PeftConfig, PeftModel
from peft_models import spread
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

import peft_ext
from peft_ext.methods import method_config
from peft_ext.nn import PackedLinear
from peft_ext.nn.experts import adapter_fields
from peft_ext.sharded import adapter_values, shard_and_load
from peft_ext.weights.quantizers import PACKED_FORMATS

FLOAT = torch.float32
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


# --- shards that are read from files ----------------------------------------------------------------------------------


def assert_starts_alike(path: Path, quant: str, stored: str, dtype: torch.dtype, config: PeftConfig) -> None:
    """Tests that the bits of a sharded model and its gradients are those of a model that one process loads.

    ``quant``: how ``meta_base`` quantizes the files. ``stored``: what ``peft-ext finetune`` calls the weights.
    """
    alone = adapted(loaded(path, dtype, stored), config).train()
    base = on_meta(path, dtype, quant)
    with adapter_values("cpu"):
        model = adapted(base.model, config).train()
    shard_and_load(model, base, mesh_of())
    assert_same_bits(model, alone)
    layers = packed_layers(alone)
    for name, layer in packed_layers(model).items():
        assert isinstance(layer.weight, DTensor) and layer.names == layers[name].names, name
        assert layer.with_codes(layers[name].weight).layout == layers[name].packed.layout
    assert all(row.fused for row in peft_ext.explain(model).rows)
    if dtype is torch.float32:
        ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(2))
        inputs = {"input_ids": ids, "labels": ids}
        step(alone, inputs)
        step(model, part(inputs))
        assert_same_gradients(model, alone)


@check
def loading_quantizes_to_packed_formats(folder: Path) -> None:
    """Tests dense files whose weights one process of a node quantizes while it reads them."""
    path = saved(folder)
    for quant in PACKED_FORMATS:
        assert_starts_alike(path, quant, quant, torch.float32, config_of("LoRA"))
        assert_starts_alike(path, quant, quant, torch.bfloat16, config_of("DoRA"))
    assert_starts_alike(path, "fp8", "fp8", torch.float32, config_of("IA3"))
    assert_starts_alike(path, "mxfp4", "mxfp4", torch.float32, config_of("DoRA", init_lora_weights=False))
    mixture = saved(folder, "Mixtral")
    for quant, method in (("nvfp4", "lora"), ("fp8", "dora")):
        fields = {**method_config(method, "CAUSAL_LM")[1], **adapter_fields(loaded(mixture, FLOAT, quant), method)}
        assert_starts_alike(mixture, quant, quant, FLOAT, LoraConfig(**fields))


@check
def loading_keeps_packed_checkpoints(folder: Path) -> None:
    """Tests files with packed weights, of which each process reads its own rows of the codes."""

    def written(case: str, **options: Any) -> Path:
        path = folder / "packed" / f"{case} {options}".replace(" ", "_")
        if dist.get_rank() == 0:
            path.parent.mkdir(exist_ok=True)
            {"gpt_oss": made.write_gpt_oss}.get(case, lambda path: made.write(path, case, **options))(path)
        dist.barrier()
        return path

    for case in made.CASES:
        assert_starts_alike(written(case), "none", "checkpoint", FLOAT, config_of("LoRA"))
    for case in ("fp8", "gptq act-order", "int4 zeros"):
        assert_starts_alike(written(case), "none", "checkpoint", torch.bfloat16, config_of("DoRA"))
    assert_starts_alike(written("mxfp4", shards=True), "none", "checkpoint", FLOAT, config_of("DoRA"))
    mixtures = [written("gpt_oss"), *(written(case, kind="qwen3_moe") for case in ("fp8", "int4"))]
    for path, method in zip(mixtures, ("lora", "dora", "lora"), strict=True):
        fields = {**method_config(method, "CAUSAL_LM")[1],
                  **adapter_fields(loaded(path, FLOAT, "checkpoint"), method)}  # fmt: skip
        assert_starts_alike(path, "none", "checkpoint", FLOAT, LoraConfig(**fields))
