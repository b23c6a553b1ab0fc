"""Tests parts of a sharded run in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers as hf
from packed_checkpoints import write
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

import peft_ext
from peft_ext.nn import PackedLinear
from peft_ext.run import shard
from peft_ext.run.shard_memory import sharded_memory
from peft_ext.sharded import adapter_values, meta_base, shard_and_load
from peft_ext.sharded.adapter import magnitude, whole_factors
from peft_ext.sources.model import SourceError, loading_arguments

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.cpu_only("a run chooses the device itself"),
]
CONFIG = hf.LlamaConfig(vocab_size=66, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                        num_key_value_heads=2)  # fmt: skip
DORA = {"r": 4, "use_dora": True, "init_lora_weights": False, "target_modules": ["q_proj"]}


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return hf.LlamaForCausalLM(CONFIG)


@pytest.mark.parametrize("shards", [1, 4])
def test_the_largest_process_holds_its_rows_of_each_parameter(shards: int) -> None:
    with torch.device("meta"):
        model = peft_ext.get_peft_model(llama(), LoraConfig(r=6, target_modules=["q_proj"]), accelerate=False)
    memory = sharded_memory(model, shards, None)

    def of_largest(trained: bool) -> int:
        rows = {4: {66: 17, 48: 12, 32: 8, 16: 4, 6: 2}, 1: {n: n for n in (66, 48, 32, 16, 6)}}[shards]
        tensors = [p for p in model.parameters() if p.requires_grad is trained]
        return sum(rows[p.shape[0]] * p[0].nbytes for p in tensors)

    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert memory.frozen == of_largest(False) + buffers and memory.adapter == memory.gradients == of_largest(True)


def test_a_saved_adapter_has_its_magnitudes_when_it_is_read_again(tmp_path: Path) -> None:
    """In a sharded run the magnitudes of a new DoRA adapter have no values until the base is read."""
    saved = peft_ext.get_peft_model(llama(), LoraConfig(**DORA, task_type="CAUSAL_LM"), accelerate=False)
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    saved.save_pretrained(tmp_path)
    model = peft_ext.get_peft_model(llama(1), LoraConfig(**DORA, task_type="CAUSAL_LM"), accelerate=False)
    for layer in model.modules():
        for held in getattr(layer, "lora_magnitude_vector", {}).values():
            held.weight = nn.Parameter(held.weight.to("meta"))
    shard._read_adapter(model, tmp_path, torch.device("cpu"))
    wanted = {name: tensor for name, tensor in saved.named_parameters() if tensor.requires_grad}
    found = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert found.keys() == wanted.keys() and any("magnitude" in name for name in found)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_the_magnitude_over_a_packed_weight_is_that_of_a_new_adapter(kind: str, dtype: torch.dtype) -> None:
    base = peft_ext.quantize_packed(nn.Sequential(nn.Linear(64, 96, dtype=dtype)), kind, progress=False)
    packed = base[0].packed
    layer = peft_ext.get_peft_model(base, LoraConfig(**{**DORA, "target_modules": ["0"]})).base_model.model[0]
    found = magnitude(layer, "default", packed, *whole_factors(layer, "default"))
    assert torch.equal(found, layer.lora_magnitude_vector["default"].weight)


def test_8_bit_floats_without_scales_are_no_dense_weight(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    meta_base(tmp_path, CONFIG, dtype=torch.float32, quant="none")
    save_file({key: t.to(torch.float8_e4m3fn) if key == name else t for key, t in load_file(file).items()}, file,
              {"format": "pt"})  # fmt: skip
    with pytest.raises(SourceError, match=f"{name} is torch.float8_e4m3fn, wanted floats of 16 or more bits"):
        meta_base(tmp_path, CONFIG, dtype=torch.float32, quant="none")


def test_a_sharded_layer_has_the_layout_that_its_tensors_have(tmp_path: Path) -> None:
    """The values of the tensor g_idx of a GPTQ weight tell whether the weight's columns have another order."""
    path = write(tmp_path / "gptq", "gptq")
    alone = hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **loading_arguments("checkpoint"))
    wanted = {name: layer for name, layer in alone.named_modules() if isinstance(layer, PackedLinear)}
    base = meta_base(path, alone.config, dtype=torch.float32, quant="none")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with adapter_values("cpu"):
            model = peft_ext.get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"]))
        shard_and_load(model, base, init_device_mesh("cpu", (1,)))
        found = {name: layer for name, layer in base.model.named_modules() if isinstance(layer, PackedLinear)}
        assert len(found) == len(wanted) > 0
        for name, layer in found.items():
            whole = wanted[name.removesuffix(".base_layer")]
            assert layer.names == whole.names
            assert layer.with_codes(whole.weight).layout == whole.packed.layout
    finally:
        distributed.destroy_process_group()
