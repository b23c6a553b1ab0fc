"""Writes a small Llama of transformers as a GGUF file, and adapters whose matrices all change the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tiny_gguf import write_and_close
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 300

_MODULES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def small_llama(tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    """Returns a random Llama with two layers, 64 hidden features, 4 heads and 2 key-value heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Returns the rows in the order of llama.cpp's converter (LlamaModel.permute)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def llama_names(model: LlamaForCausalLM) -> dict[str, str]:
    """Returns by the name of each module with a weight the name of the weight in a GGUF file."""
    names = {"model.embed_tokens": "token_embd.weight", "model.norm": "output_norm.weight", "lm_head": "output.weight"}
    for layer in range(model.config.num_hidden_layers):
        for module, name in _MODULES.items():
            names[f"model.layers.{layer}.{module}"] = f"blk.{layer}.{name}.weight"
    return names


def write_llama(model: LlamaForCausalLM, path: Path, kind: str = "F32") -> Path:
    """Writes the model as llama.cpp's converter does, with matrices of the type ``kind`` and a tokenizer of bytes."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name("small llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] + [f"▁{n}" for n in range(config.vocab_size - 259)]
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(n) for n in range(len(tokens))])
    kinds = [gguf.TokenType.UNKNOWN] + 2 * [gguf.TokenType.CONTROL] + 256 * [gguf.TokenType.BYTE]
    writer.add_token_types([*kinds, *(len(tokens) - 259) * [gguf.TokenType.NORMAL]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for module, name in llama_names(model).items():
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        weight = model.get_submodule(module).weight.detach().numpy()
        if "attn_q" in name:
            weight = interleaved(weight, config.num_attention_heads)
        if "attn_k" in name and "norm" not in name:
            weight = interleaved(weight, config.num_key_value_heads)
        number = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(weight), number), raw_dtype=number)
    write_and_close(writer)
    return path


def adapted(model: Any, config: PeftConfig, size: float = 0.1, seed: int = 1) -> PeftModel:
    """Adds an adapter whose tensors are random, so that no part of the adapter is zero."""
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * size
    return wrapped.eval()
