"""Tiny checkpoints whose weights are stored in the layouts of quantization libraries, with random values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Qwen3Config, Qwen3MoeConfig

HIDDEN, INNER, VOCAB = 64, 128, 96
_BODY = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False}

Tensors = dict[str, Tensor]
# Returns the tensors of one layer by name, for a dense weight [N, K].
Pack = Callable[[Tensor], Tensors]


def config(kind: str, **fields: Any) -> Any:
    """Returns the configuration of a tiny model of the given kind: llama, qwen3, qwen3_moe or gpt_oss."""
    if kind == "gpt_oss":
        layers = ["sliding_attention", "full_attention"]
        own = {"intermediate_size": HIDDEN, "num_local_experts": 4, "sliding_window": 16, "layer_types": layers}
        return GptOssConfig(**{**_BODY, **_EXPERTS, **own, **fields})
    if kind == "qwen3_moe":
        return Qwen3MoeConfig(**{**_BODY, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": HIDDEN, **fields})
    return {"llama": LlamaConfig, "qwen3": Qwen3Config}[kind](**{**_BODY, **fields})


def codes(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Returns random codes: all bits of each element are random."""
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, size, dtype=torch.uint8).view(dtype)


def scales(*shape: int, dtype: torch.dtype = torch.bfloat16, largest: float = 0.02) -> Tensor:
    return (torch.rand(shape) * largest + largest / 4).to(dtype)


def e4m3(*shape: int) -> Tensor:
    """Returns random e4m3 values without NaN."""
    return (torch.randn(shape) * 20).clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8(weight: Tensor, block: int = 32, dtype: torch.dtype = torch.float32) -> Tensors:
    n, k = weight.shape
    grid = -(-n // block), -(-k // block)
    return {"weight": e4m3(n, k), "weight_scale_inv": scales(*grid, dtype=dtype, largest=0.002)}


def fp8_rows(weight: Tensor) -> Tensors:
    return {"weight": e4m3(*weight.shape), "weight_scale": scales(weight.shape[0], 1, largest=0.002)}


def int4(weight: Tensor, group: int = 32, symmetric: bool = True, bits: int = 4) -> Tensors:
    n, k = weight.shape
    held = {
        "weight_packed": codes(n, k * bits // 32),
        "weight_scale": scales(n, k // group),
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        held["weight_zero_point"] = codes(n * bits // 32, k // group)
    return held


def int8(weight: Tensor) -> Tensors:
    n, k = weight.shape
    return {"weight": codes(n, k, dtype=torch.int8), "weight_scale": scales(n, 1, largest=0.001)}


def nvfp4(weight: Tensor) -> Tensors:
    n, k = weight.shape
    return {
        "weight_packed": codes(n, k // 2, dtype=torch.uint8),
        "weight_scale": (torch.rand(n, k // 16) * 8).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([300.0]),
    }


def mxfp4(weight: Tensor) -> Tensors:
    n, k = weight.shape
    return {
        "weight_packed": codes(n, k // 2, dtype=torch.uint8),
        "weight_scale": torch.randint(118, 124, (n, k // 32), dtype=torch.uint8),
    }


def gptq(weight: Tensor, group: int = 32, act_order: bool = False, bits: int = 4) -> Tensors:
    n, k = weight.shape
    g_idx = torch.arange(k, dtype=torch.int32) // group
    return {
        "qweight": codes(k * bits // 32, n),
        "qzeros": codes(k // group, n * bits // 32),
        "scales": scales(k // group, n, dtype=torch.float16, largest=0.005 if bits == 4 else 0.0003),
        "g_idx": g_idx[torch.randperm(k)] if act_order else g_idx,
    }


def awq(weight: Tensor, group: int = 32) -> Tensors:
    n, k = weight.shape
    return {
        "qweight": codes(k, n // 8),
        "qzeros": codes(k // group, n // 8),
        "scales": scales(k // group, n, dtype=torch.float16, largest=0.005),
    }


def hqq(weight: Tensor, group: int = 64) -> Tensors:
    n, k = weight.shape
    groups = n * k // group
    held: Tensors = {"W_q": codes(groups // 2, group, dtype=torch.uint8), "scale": scales(groups, 1, largest=0.005)}
    held |= {"zero": (torch.rand(groups, 1) * 15).to(torch.bfloat16), "shape": torch.tensor([n, k])}
    return held | {"nbits": torch.tensor(4, dtype=torch.int32), "packing": torch.tensor(list(b"4bit_u8")).byte()}


def compressed(format: str, weights: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Returns a quantization_config of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
            "ignore": ["lm_head"], "config_groups": {"group_0": group}, **fields}  # fmt: skip


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}

# By name: the quantization_config of a checkpoint, and the function that packs a layer.
CASES: dict[str, tuple[dict[str, Any], Pack]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic",
             "modules_to_not_convert": ["lm_head"]}, fp8),
    "int4": (compressed("pack-quantized", _INT4), int4),
    "int4 zeros": (compressed("pack-quantized", {**_INT4, "symmetric": False}), lambda w: int4(w, symmetric=False)),
    "int8": (compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
             int8),
    "float8": (compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel",
                                              "symmetric": True}), fp8_rows),
    "mxfp4": (compressed("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group",
                                                  "group_size": 32, "symmetric": True}), mxfp4),
    "nvfp4": (compressed("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group",
                                                  "group_size": 16, "symmetric": True}), nvfp4),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True,
              "checkpoint_format": "gptq"}, gptq),
    "gptq act-order": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True,
                        "checkpoint_format": "gptq_v2"}, lambda w: gptq(w, act_order=True)),
    "gptq 8": ({"quant_method": "gptq", "bits": 8, "group_size": -1, "desc_act": False, "sym": True,
                "checkpoint_format": "gptq_v2"}, lambda w: gptq(w, group=w.shape[1], bits=8)),
    "hqq": ({"quant_method": "hqq", "skip_modules": ["lm_head"], "quant_config": {
        "weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}, "scale_quant_params": None}}, hqq),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
             "modules_to_not_convert": None}, awq),
}  # fmt: skip


def is_packed(name: str) -> bool:
    """Returns whether the checkpoints store this parameter packed: the projections of attention and MLP."""
    return name.endswith("_proj.weight")


def write_mixture(path: Path, case: str) -> Path:
    """Writes a tiny checkpoint of a mixture whose experts are stored in the layout ``case``, each as linear layers."""
    return write(path, case, "qwen3_moe")


def write(
    path: Path,
    case: str,
    kind: str = "llama",
    *,
    dtype: torch.dtype = torch.bfloat16,
    packs: Callable[[str], bool] = is_packed,
    shards: bool = False,
    **fields: Any,
) -> Path:
    """Writes a tiny checkpoint in which the parameters that ``packs`` names are stored in the layout ``case``."""
    quantization, pack = CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(kind, **fields)).to(dtype)
    model.save_pretrained(path)
    held: Tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if packs(name):
            held |= {f"{name.removesuffix('weight')}{part}": value for part, value in pack(tensor).items()}
        else:
            held[name] = tensor
    for name in held:
        # GPTQ orders columns by the layer's inputs, which an expert's gate and up have in common.
        if name.endswith("up_proj.g_idx") and "experts" in name:
            held[name] = held[name.replace("up_proj", "gate_proj")].clone()
        if name.endswith("up_proj.weight_global_scale"):
            held[name] = held[name] * 0.75
    finish(path, held, quantization, shards=shards)
    return path


def write_gpt_oss(path: Path, **fields: Any) -> Path:
    """Writes a tiny gpt-oss checkpoint with experts in MXFP4, as OpenAI's."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config("gpt_oss", **fields)).to(torch.bfloat16).save_pretrained(path)
    held: Tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, k, n = tensor.shape
            held[f"{name}_blocks"] = codes(experts, n, k // 32, 16, dtype=torch.uint8)
            held[f"{name}_scales"] = torch.randint(118, 124, (experts, n, k // 32), dtype=torch.uint8)
        else:
            held[name] = tensor
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    finish(path, held, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    return path


def finish(path: Path, held: Tensors, quantization: dict[str, Any], shards: bool = False) -> None:
    """Writes the tensors, in two files with an index if ``shards``, and the quantization_config."""
    about = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**about, "quantization_config": quantization}))
    if not shards:
        save_file(held, path / "model.safetensors", {"format": "pt"})
        return
    (path / "model.safetensors").unlink()
    names, files = sorted(held), {}
    for index, part in enumerate((names[::2], names[1::2]), 1):  # each of the two files has some tensors of a layer
        file = f"model-{index:05}-of-00002.safetensors"
        save_file({name: held[name] for name in part}, path / file, {"format": "pt"})
        files |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def stored(path: Path) -> Tensors:
    """Returns all tensors of a checkpoint."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
