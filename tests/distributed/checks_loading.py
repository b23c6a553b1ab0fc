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
from transformers import AutoConfig, conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter

import peft_ext
from peft_ext.methods import method_config
from peft_ext.model import register_layers
from peft_ext.nn import NF4Linear
from peft_ext.nn.experts import adapter_fields
from peft_ext.run.train import load_base
from peft_ext.sharded import MetaBase, adapter_values, load, meta_base, shard_and_load
from peft_ext.sharded.adapter import tensors_of as named_tensors
from peft_ext.sharded.base import decoder_layers
from peft_ext.sources.model import INDEX, SourceError

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


def on_meta(path: Path, dtype: torch.dtype, quant: str) -> MetaBase:
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
        assert isinstance(layer.weight, DTensor) is load.SHARDS_BYTES and type(layer.absmax) is Tensor


@check
def loading_gives_the_bits_of_one_process(folder: Path) -> None:
    """Tests one file and several files, tied and untied heads, and experts that transformers joins while it loads."""
    for name, tied, options in (
        ("Llama", False, {"max_shard_size": "100KB"}),
        ("Llama", True, {}),
        ("Mixtral", False, {}),
    ):
        path = saved(folder, name, tied, **options)
        assert (path / INDEX).exists() is bool(options)
        for dtype in FLOATS:
            for quant in ("none", "nf4"):
                base = on_meta(path, dtype, quant)
                assert all(parameter.is_meta for parameter in base.model.parameters())
                model = shard_and_load(base.model, base, mesh_of())
                assert sum(isinstance(module, FSDPModule) for module in model.modules()) == 1 + len(base.layers) == 3
                assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
                assert_same_bits(model, loaded(path, dtype, quant))


@check
def loading_splits_tensors_that_transformers_splits(folder: Path) -> None:
    """Tests a conversion that makes three weights of one tensor, and files of a model without a head."""
    sizes = Sizes(kv_heads=4)
    path, kinds = saved(folder, sizes=sizes), ("q_proj", "k_proj", "v_proj")

    def fuse(tensors: dict[str, Tensor]) -> None:
        for layer in range(sizes.layers):
            at = f"model.layers.{layer}.self_attn"
            tensors[f"{at}.qkv.weight"] = torch.cat([tensors.pop(f"{at}.{kind}.weight") for kind in kinds])

    fused = _changed(path, folder / f"fused-{dist.get_rank()}", fuse)
    targets = [f"self_attn.{kind}.weight" for kind in kinds]
    converter = WeightConverter("self_attn.qkv.weight", targets, [Chunk(dim=0)])
    conversion_mapping.register_checkpoint_conversion_mapping("LlamaForCausalLM", [converter])
    try:
        base = on_meta(fused, torch.float32, "nf4")
        assert sum(group.converter is not None for group, _ in base.groups) == sizes.layers
        model = shard_and_load(base.model, base, mesh_of())
    finally:
        del conversion_mapping._checkpoint_conversion_mapping_cache["LlamaForCausalLM"]
    assert_same_bits(model, loaded(path, torch.float32, "nf4"))

    def headless(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    tied = saved(folder, tied=True)
    base = on_meta(_changed(tied, folder / f"headless-{dist.get_rank()}", headless), torch.float32, "none")
    assert_same_bits(shard_and_load(base.model, base, mesh_of()), loaded(tied, torch.float32, "none"))


@check
def loading_with_whole_codes(folder: Path) -> None:
    """Tests the way of a PyTorch that can't shard bytes."""
    path, before = saved(folder), load.SHARDS_BYTES
    load.SHARDS_BYTES = False
    try:
        base = on_meta(path, torch.float32, "nf4")
        assert_same_bits(shard_and_load(base.model, base, mesh_of()), loaded(path, torch.float32, "nf4"))
    finally:
        load.SHARDS_BYTES = before


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


@check
def loading_for_hybrid_sharding_and_several_nodes(folder: Path) -> None:
    """Tests a mesh of two dimensions, and nodes that read the files separately."""
    rank = dist.get_rank()
    for dtype, quant, mesh, node in (
        (torch.float32, "nf4", mesh_of(2), rank // 2), (torch.bfloat16, "none", mesh_of(2), None),
        (torch.float32, "nf4", mesh_of(), rank % 2), (torch.bfloat16, "nf4", mesh_of(), rank),
    ):  # fmt: skip
        path = saved(folder)
        alone = adapted(loaded(path, dtype, quant), config_of("DoRA"))
        base = on_meta(path, dtype, quant)
        with adapter_values("cpu"):
            model = adapted(base.model, config_of("DoRA"))
        assert_same_bits(shard_and_load(model, base, mesh, node=node), alone)


# --- memory -----------------------------------------------------------------------------------------------------------

LARGE = Sizes(hidden=512, inner=2048, layers=8, heads=8, kv_heads=8, vocab=512)
SLACK = 6 << 20  # bytes of Python objects, of buffers of gloo, and of freed memory that malloc keeps


class Peak:
    """Measures the growth of this process's resident memory in the context, in bytes: at the peak, and at the end."""

    growth = kept = 0

    def __enter__(self) -> Peak:
        ctypes.CDLL(None).malloc_trim(0)
        self.before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
        return self

    def __exit__(self, *exception: Any) -> None:
        self.growth = _status("VmHWM") - self.before
        self.kept = _status("VmRSS") - self.before


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s*(\d+) kB$", text, re.MULTILINE)[1]) << 10


def bytes_of(tensors: Any) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in {id(t): t for t in tensors}.values())


@check
def loading_peaks_at_the_shard_and_one_layer(folder: Path) -> None:
    """Tests the peak memory against the shard and one decoder layer in bfloat16 with its quantized form."""
    if not Path("/proc/self/clear_refs").exists():
        return
    path = saved(folder, sizes=LARGE)
    for dtype, quant in ((torch.bfloat16, "none"), (torch.float32, "nf4")):
        base = on_meta(path, dtype, quant)
        layer = sum(
            parameter.numel() for parameter in base.layers[0].parameters() if parameter.dtype is not torch.uint8
        )
        packed = sum(tensor.nbytes for _, tensor in named_tensors(base.layers[0]) if tensor.dtype is torch.uint8)
        layer = 2 * (
            layer + sum(m.in_features * m.out_features for m in base.layers[0].modules() if type(m) is NF4Linear)
        )
        with Peak() as peak:
            model = shard_and_load(base.model, base, mesh_of())
        shard = bytes_of(tensors_of(model).values())
        assert peak.growth <= shard + layer + packed + SLACK, (dtype, quant, peak.growth, shard, layer, packed)
        whole = bytes_of(loaded(path, dtype, quant).parameters())
        assert whole > 1.4 * shard, (whole, shard)
        del model, base


# --- errors -----------------------------------------------------------------------------------------------------------


def _changed(path: Path, copy: Path, change: Any) -> Path:
    """Writes a copy of a model with one file, whose tensors ``change`` edits."""
    shutil.copytree(path, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@check
def loading_names_the_tensor_that_is_wrong(folder: Path) -> None:
    """Tests that the errors of one process name file and tensor, without communication."""
    path, mine = saved(folder), folder / f"of-{dist.get_rank()}"
    name, file = "model.layers.1.mlp.up_proj.weight", "model.safetensors"
    changes = {
        f"the files lack {name}, which would be random": lambda t: t.pop(name),
        f"{file}: {name}: {name} has shape (64, 64), wanted (128, 64)": lambda t: t.update(
            {name: t[name][:64].clone()}
        ),
        f"{file}: {name} is torch.int8, wanted floats": lambda t: t.update({name: t[name].to(torch.int8)}),
        f"{file}: {name} is torch.float8_e4m3fn, wanted floats of 16": lambda t: t.update(
            {name: t[name].to(torch.float8_e4m3fn)}
        ),
        f"{file}: lm_head.weight": lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:5].clone()}),
    }
    for number, (text, change) in enumerate(changes.items()):
        with raises(SourceError, text):
            on_meta(_changed(path, mine / str(number), change), torch.float32, "nf4")
    several = saved(folder / "several", max_shard_size="100KB")
    index = json.loads((several / INDEX).read_text())
    first, *_, end = sorted(set(index["weight_map"].values()))
    lacking = shutil.copytree(several, mine / "lacking")
    (lacking / end).unlink()
    with raises(SourceError, f"has no {end}"):
        on_meta(lacking, torch.float32, "none")
    moved = next(name for name, held in index["weight_map"].items() if held == end)
    index["weight_map"][moved] = first
    other = shutil.copytree(several, mine / "other")
    (other / INDEX).write_text(json.dumps(index))
    with raises(SourceError, f"{first}: no tensor {moved}, which {INDEX} names"):
        on_meta(other, torch.float32, "none")
    config = AutoConfig.from_pretrained(path)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    with raises(SourceError, "the weights are quantized, wanted dense weights"):
        meta_base(path, config, dtype=torch.float32)
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    with raises(SourceError, "the weights are quantized, wanted dense weights"):
        meta_base(path, config, dtype=torch.float32, quant="mxfp4")
    with raises(SourceError, "no layer of its files is stored as fp8"):
        meta_base(path, config, dtype=torch.float32)
    with raises(SourceError, "Embedding: no list of decoder layers, wanted a list of layers"):
        decoder_layers(nn.Embedding(1, 1))


@check
def loading_fails_in_all_processes(folder: Path) -> None:
    """Tests that all processes raise where the file of one process changes after the headers were read."""
    path, last = saved(folder), dist.get_rank() == dist.get_world_size() - 1
    about = "" if last else f"process {dist.get_world_size() - 1}: "
    mine = shutil.copytree(path, folder / f"at-{dist.get_rank()}")
    for quant in ("none", "nf4"):
        base = on_meta(mine, torch.float32, quant)
        with _cut(mine / "model.safetensors", 1000 if last else None):
            with raises(SourceError, f"{about}model {folder}/at-{dist.get_world_size() - 1}/model.safetensors: "):
                shard_and_load(base.model, base, mesh_of())
    base = on_meta(mine, torch.float32, "none")
    if last:
        (mine / "model.safetensors").unlink()
    with raises(SourceError, "model.safetensors: No such file or directory"):
        shard_and_load(base.model, base, mesh_of())
    dist.barrier()


@contextlib.contextmanager
def _cut(file: Path, size: Optional[int]) -> Iterator[None]:
    """Cuts ``file`` off within the context, unless ``size`` is None."""
    held = file.read_bytes()
    if size is not None:
        os.truncate(file, size)
    yield
    file.write_bytes(held)


@check
def loading_refuses_what_it_cannot_shard(folder: Path) -> None:
    """Tests meshes, tied weights with two values, methods without shards, and adapters without values."""
    path = saved(folder, tied=True)
    with raises(
        ValueError, "mesh has 2 dimensions and the names None, wanted one dimension, or two with mesh_dim_names"
    ):
        unnamed = init_device_mesh("cpu", (1, dist.get_world_size()))
        base = on_meta(path, torch.float32, "none")
        shard_and_load(base.model, base, unnamed)
    mine = _changed(
        path, folder / f"two-{dist.get_rank()}", lambda t: t.update({"lm_head.weight": torch.ones(128, 64)})
    )
    base = on_meta(mine, torch.float32, "none")
    with raises(
        SourceError,
        "model.safetensors: model.embed_tokens.weight: the configuration ties model.embed_tokens.weight to another",
    ):
        shard_and_load(base.model, base, mesh_of())
    adalora = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, task_type="CAUSAL_LM", target_modules=["q_proj"])
    for config, text, device in (
        (adalora, "the adapter is ADALORA, wanted one of LORA, IA3 for a sharded model", "cpu"),
        (config_of("LoRA"), "lora_A.default.weight has no values: add the adapter within adapter_values(device)", None),
    ):
        base = on_meta(path, torch.float32, "nf4")
        with adapter_values(device) if device else contextlib.nullcontext():
            model = peft.get_peft_model(base.model, config)
        with raises(SourceError, text):
            shard_and_load(model, base, mesh_of())


@check
def loading_starts_the_experts_adapters(folder: Path) -> None:
    """Tests LoRA and DoRA on the experts of a mixture, which transformers joins while it loads the files."""
    path, batch = saved(folder, "Mixtral"), LLAMA.batch()
    for method, dtype, quant in (
        ("lora", torch.float32, "nf4"), ("dora", torch.float32, "none"), ("dora", torch.float32, "nf4"),
        ("dora", torch.bfloat16, "none"),
    ):  # fmt: skip
        alone = loaded(path, dtype, quant)
        fields = {**method_config(method, "CAUSAL_LM")[1], **adapter_fields(alone, method)}
        alone = adapted(alone, LoraConfig(**fields)).train()
        base = on_meta(path, dtype, quant)
        with adapter_values("cpu"):
            model = adapted(base.model, LoraConfig(**fields)).train()
        shard_and_load(model, base, mesh_of())
        assert_same_bits(model, alone)
        if dtype is torch.float32:
            losses = [trained(**inputs).loss for trained, inputs in ((alone, batch), (model, part(batch)))]
            for loss in losses:
                loss.backward()
            assert_close(gradients(model), gradients(alone))
