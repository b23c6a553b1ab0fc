"""Checks of peft_ext.sharded: shards that are read from files have the bits of a model that one process loads whole."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import peft
import torch
import torch.distributed as dist
from checks_common import LLAMA, assert_close, check, gradients, mean, part, raises, whole
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import Sizes, architecture
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

import peft_ext
from peft_ext import sharded
from peft_ext.model import register_layers
from peft_ext.nn import NF4Linear
from peft_ext.run.train import load_base
from peft_ext.sharded import adapter_values, meta_base, shard_and_load
from peft_ext.sources.model import SourceError

FLOATS = (torch.bfloat16, torch.float32)


def saved(folder: Path, name: str = "Llama", tied: bool = False, sizes: Optional[Sizes] = None, **options: Any) -> Path:
    """Process 0 saves a model with weights in float32; all processes wait for the files. Returns the folder."""
    path = folder / f"{name}-{'tied' if tied else 'untied'}{'' if sizes is None else '-large'}"
    if dist.get_rank() == 0:
        made = architecture(name, sizes)
        made.config.tie_word_embeddings = tied
        made.build().save_pretrained(path, **options)
    dist.barrier()
    return path


def loaded(path: Path, dtype: torch.dtype, quant: str) -> nn.Module:
    """Returns the base that ``peft-ext finetune`` loads in one process."""
    options = SimpleNamespace(model=str(path), quant=quant, blocksize=64, stock=False, method="lora")
    return load_base(SimpleNamespace(options=options, folder=path, device=torch.device("cpu"), dtype=dtype))


def on_meta(path: Path, dtype: torch.dtype, quant: str) -> sharded.MetaBase:
    return meta_base(path, AutoConfig.from_pretrained(path), dtype=dtype, quant=quant)


def mesh_of(processes: Optional[int] = None) -> Any:
    """Returns a mesh of one dimension, or with ``processes`` in the second of two dimensions."""
    count = dist.get_world_size()
    if processes is None:
        return init_device_mesh("cpu", (count,))
    return init_device_mesh("cpu", (count // processes, processes), mesh_dim_names=("replicate", "shard"))


def adapted(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Adds an adapter in the way of ``peft-ext finetune``."""
    torch.manual_seed(7)
    register_layers(config, model)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(7)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and not config.use_dora:
            module.reset_lora_parameters("default", True)
    return peft_ext.accelerate(model)


def config_of(method: str, **options: Any) -> PeftConfig:
    if method == "IA3":
        return LLAMA.peft_config("IA3")
    return LoraConfig(
        r=4, lora_alpha=6, use_dora=method == "DoRA", use_rslora=method == "rsLoRA", target_modules="all-linear",
        task_type="CAUSAL_LM", **options,
    )  # fmt: skip


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_bits(model: nn.Module, alone: nn.Module) -> None:
    """Tests that all tensors, gathered, have names, dtypes, shapes and bits of the tensors of one process."""
    came, wanted = tensors_of(model), tensors_of(alone)
    assert came.keys() == wanted.keys(), came.keys() ^ wanted.keys()
    for name, tensor in wanted.items():
        found = whole(came[name].detach())
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(*(t.detach().contiguous().view(-1).view(torch.uint8) for t in (found, tensor))), name
    for layer in (module for module in model.modules() if isinstance(module, NF4Linear)):
        assert isinstance(layer.weight, DTensor) is sharded._SHARDS_BYTES and type(layer.absmax) is Tensor


@check
def loading_gives_the_bits_of_one_process(folder: Path) -> None:
    """Tests one file and several files, tied and untied heads, and experts that transformers joins while it loads."""
    for name, tied, options in (("Llama", False, {"max_shard_size": "100KB"}), ("Llama", True, {}), ("Mixtral", False, {})):
        path = saved(folder, name, tied, **options)
        assert (path / "model.safetensors.index.json").exists() is bool(options)
        for dtype in FLOATS:
            for quant in ("none", "nf4"):
                base = on_meta(path, dtype, quant)
                assert all(parameter.is_meta for parameter in base.model.parameters())
                model = shard_and_load(base.model, base, mesh_of())
                assert sum(isinstance(module, FSDPModule) for module in model.modules()) == 1 + len(base.layers) == 3
                assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
                assert_same_bits(model, loaded(path, dtype, quant))


@check
def loading_with_whole_codes(folder: Path) -> None:
    """Tests the way of a PyTorch that can't shard bytes."""
    path, before = saved(folder), sharded._SHARDS_BYTES
    sharded._SHARDS_BYTES = False
    try:
        base = on_meta(path, torch.float32, "nf4")
        assert_same_bits(shard_and_load(base.model, base, mesh_of()), loaded(path, torch.float32, "nf4"))
    finally:
        sharded._SHARDS_BYTES = before


@check
def loading_starts_adapters_as_one_process(folder: Path) -> None:
    """Tests the initial bits of adapters, and the loss and the gradients of a step."""
    path, batch = saved(folder), LLAMA.batch()
    for method, dtype, quant in (
        ("LoRA", torch.float32, "nf4"), ("rsLoRA", torch.float32, "none"), ("IA3", torch.float32, "nf4"),
        ("DoRA", torch.float32, "none"), ("DoRA", torch.float32, "nf4"), ("DoRA", torch.bfloat16, "none"),
        ("DoRA", torch.bfloat16, "nf4"), ("LoRA", torch.bfloat16, "none"),
    ):  # fmt: skip
        alone = adapted(loaded(path, dtype, quant), config_of(method)).train()
        base = on_meta(path, dtype, quant)
        with adapter_values("cpu"):
            model = adapted(base.model, config_of(method)).train()
        shard_and_load(model, base, mesh_of())
        assert_same_bits(model, alone)
        if dtype is torch.float32:
            losses = [trained(**inputs).loss for trained, inputs in ((alone, batch), (model, part(batch)))]
            for loss in losses:
                loss.backward()
            assert abs(mean(losses[1].detach()) - losses[0].item()) <= 4e-6
            assert_close(gradients(model), gradients(alone))


@check
def loading_starts_dora_from_given_factors(folder: Path) -> None:
    """Tests DoRA's magnitude where the factors B are not zero."""
    path = saved(folder)
    for dtype, quant in ((torch.float32, "nf4"), (torch.bfloat16, "none")):
        alone = adapted(loaded(path, dtype, quant), config_of("DoRA", init_lora_weights=False))
        base = on_meta(path, dtype, quant)
        with adapter_values("cpu"):
            model = adapted(base.model, config_of("DoRA", init_lora_weights=False))
        assert_same_bits(shard_and_load(model, base, mesh_of()), alone)
