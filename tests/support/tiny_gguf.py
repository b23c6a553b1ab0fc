"""Writes GGUF files of tiny models of transformers, as llama.cpp's converter lays the files out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor

from peft_ext.gguf.names import GgufNames
from peft_ext.reference.formats import decoded
from peft_ext.weights.gguf import TYPES, gguf_weight, type_number
from peft_ext.weights.gguf_quantize import quantize_gguf

# llama_ftype of a file by the type of most weights (enum llama_ftype in llama.h; K-quants: the "S" mixtures).
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11,
              "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37,
              "MXFP4": 38}  # fmt: skip


def tiny_config(kind: str = "llama", **options: Any) -> Any:
    """Returns a configuration of "llama", "mistral", "qwen2" or "qwen3", whose weights have 256 or 512 columns."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    kinds = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    sizes = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "initializer_range": 0.06,
        "rms_norm_eps": 2.0**-17,  # a value that float32 in the file does not round
    }  # fmt: skip
    if kind == "qwen3":
        sizes["head_dim"] = 128  # transformers reads GGUF files of Qwen3 with this size only
    return kinds[kind](**{**sizes, **options})


def tiny_model(kind: str = "llama", seed: int = 1, **options: Any) -> Any:
    """Returns a random float32 model in eval mode, whose norms and biases have random values too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **options), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def write_tiny_gguf(
    path: Union[str, Path], model: Any, types: Union[str, Mapping[str, str]] = "Q8_0", tokenizer: Any = None,
    metadata: Optional[Mapping[str, Any]] = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Writes a model of the types llama, mistral, qwen2 or qwen3 to a GGUF file.

    Vectors (norms, biases) are F32. The file of a model with tied embeddings has no ``output.weight``.

    Args:
        model: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM.
        types: ggml's type of all matrices, or the types by name: the name of a tensor ("blk.0.attn_q"), or the last
            part of the name ("attn_q", "token_embd", "output"); "*" is the type of all others (default F32).
        tokenizer: a fast byte-level BPE tokenizer of transformers; None: the file has no tokenizer
            (``tokenizer.ggml.model`` is "none").
        metadata: further keys, with values that are bool, int, float, str or lists of these.

    Returns: the values of the file by the names of the model's ``state_dict``, float32, with rows in transformers'
    order: the weights of the model that the file holds.
    """
    import gguf

    names, config = GgufNames.of_config(model.config), model.config
    writer = gguf.GGUFWriter(str(path), names.architecture)
    chosen = {"*": types} if isinstance(types, str) else types
    _add_config(writer, config, names, FILE_TYPES.get(chosen.get("*", "F32").upper(), 0))
    _add_tokenizer(writer, config, tokenizer)
    for key, value in (metadata or {}).items():
        kinds = {bool: writer.add_bool, int: writer.add_int64, float: writer.add_float64, str: writer.add_string}
        kinds.get(type(value), writer.add_array)(key, value)
    values = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, leaf = name.rpartition(".")
        inside = names.tensor(module)
        assert inside is not None, f"{name} has no name in a GGUF file"
        tensor = tensor.detach().float()
        order = names.row_order(inside, len(tensor))
        back = None if order is None else torch.argsort(order)
        ggml = "F32" if tensor.dim() == 1 else chosen.get(inside) or chosen.get(inside.rpartition(".")[2])
        number = type_number(ggml or chosen.get("*", "F32"))
        data = quantize_gguf(tensor if back is None else tensor[back], number)
        if number in TYPES:
            held = decoded(gguf_weight(data, number), torch.float32)
        else:
            dense = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}[number]
            held = data.view(dense).view(tensor.shape).float()
        values[name] = held if order is None else held[order]
        kind = gguf.GGMLQuantizationType(number)
        raw = data.numpy() if number in TYPES or number == 30 else data.view(dense).numpy()
        writer.add_tensor(f"{inside}.{leaf}", raw, raw_dtype=kind)
    if config.tie_word_embeddings:
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
    write_and_close(writer)
    return values


def write_and_close(writer: Any) -> None:
    """Writes the file of a ``gguf.GGUFWriter``, to which all keys and tensors were added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: Any, config: Any, names: GgufNames, file_type: int) -> None:
    writer.add_name(f"tiny {config.model_type}")
    writer.add_file_type(file_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(names.heads)
    writer.add_head_count_kv(names.kv_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    size = getattr(config, "head_dim", None) or config.hidden_size // names.heads
    if names.architecture == "llama":
        writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        writer.add_sliding_window(config.sliding_window)


def _add_tokenizer(writer: Any, config: Any, tokenizer: Any) -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    about = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    kinds = [5] * config.vocab_size  # unused
    special = set(tokenizer.all_special_ids)
    for token, number in tokenizer.get_vocab().items():
        tokens[number], kinds[number] = token, 3 if number in special else 1  # control or normal
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in about["merges"]])
    for name, number in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
