"""Writes random models of transformers as GGUF files in float32, with the keys that llama.cpp needs to run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from tiny_gguf import write_and_close

from peft_ext.gguf.names import GgufNames

# Architectures whose files store 1 + w for the weight w of a norm.
_NORMS_PLUS_ONE = ("gemma2", "gemma3", "nemotron")
KINDS = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3", "stablelm": "StableLm",
    "starcoder2": "Starcoder2", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text", "nemotron": "Nemotron", "lfm2": "Lfm2",
}  # fmt: skip


def small_model(kind: str) -> Any:
    """Returns a random model of transformers' model type ``kind``, a key of ``KINDS``."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "initializer_range": 0.1,
    }  # fmt: skip
    if kind in ("gemma2", "gemma3_text", "qwen3"):
        sizes["head_dim"] = 16
    if kind.startswith("gemma"):
        sizes["query_pre_attn_scalar"] = 16
    if kind == "lfm2":
        sizes |= {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]}
    config = getattr(transformers, f"{KINDS[kind]}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def write_model(model: Any, path: Path) -> Path:
    """Writes the model without a tokenizer. A tied head is not written."""
    config, names = model.config, GgufNames.of_config(model.config)
    heads, size = config.num_attention_heads, getattr(config, "head_dim", None)
    size = size or config.hidden_size // heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer = gguf.GGUFWriter(path, names.architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    kv_heads = config.num_key_value_heads
    if config.model_type == "lfm2":
        writer.add_head_count_kv([kv_heads if one != "conv" else 0 for one in config.layer_types])
        writer.add_shortconv_l_cache(config.conv_L_cache)
    else:
        writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    epsilon = next(getattr(config, name) for name in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps")
                   if getattr(config, name, None) is not None)  # fmt: skip
    writer.add_layer_norm_rms_eps(epsilon)
    writer.add_layer_norm_eps(epsilon)
    writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    if config.model_type == "stablelm":
        writer.add_parallel_residual(config.use_parallel_residual)
    if names.architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, leaf = name.rpartition(".")
        inside = names.tensor(module)
        assert inside is not None, f"{name} has no name in a GGUF file"
        if names.architecture in _NORMS_PLUS_ONE and "norm" in inside and leaf == "weight":
            tensor = tensor + 1
        order = names.row_order(inside, len(tensor))
        if order is not None:
            tensor = tensor[order.argsort()]
        writer.add_tensor(f"{inside}.{leaf}", (tensor.squeeze(1) if "shortconv.conv" in inside else tensor).numpy())
    write_and_close(writer)
    return path
