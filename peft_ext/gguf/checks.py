"""Checks the header of an untrusted GGUF model before transformers or the package gguf read the file.

transformers makes objects for each layer, each token and each merge that the metadata announces, and takes every size
in the metadata as it comes. :func:`check_model` ties these numbers to the tensors that the file holds, and
:func:`check_tokenizer` checks the lists of the tokenizer.
"""

from __future__ import annotations

import math
import re
from typing import Any, Optional

from .header import GgufHeader, TensorInfo
from .names import ARCHITECTURES

__all__ = ["KNOWN", "MOST_LAYERS", "check_model", "check_tokenizer"]

MOST_LAYERS = 10_000
_LONGEST_TOKEN = 1024  # characters; transformers tries every split of every token where the file has no merges
_MOST = (1 << 31) - 1
_WIDEST = 65_536  # features of an attention head
_MOST_MASKS = 1 << 28  # bytes; transformers' GPT-2 makes a mask of context_length ** 2 bytes in each layer

# Architectures whose layers' tensors are known: see _check_shapes.
_STRICT = {name for name, _ in ARCHITECTURES.values()}
# Architectures that transformers 5.24 reads from GGUF files.
KNOWN = _STRICT | {
    "bloom", "falcon", "gpt2", "mamba", "minimax-m2", "mistral", "qwen2moe", "qwen35", "qwen35moe", "qwen3moe", "t5",
    "t5encoder",
}  # fmt: skip
# Architectures in transformers' lists whose files transformers 5.24 can't read, and the reason.
_UNREADABLE = {
    "deci": "transformers has no model deci",
    "gemma4": "transformers does not read the sizes of Gemma 4's layers from the file",
    "gpt-oss": "transformers does not read the experts of gpt-oss from the file",
}

# Fields of an architecture that must be integers: the smallest and the largest value.
_SIZES: dict[str, tuple[int, int]] = {
    "block_count": (1, MOST_LAYERS),
    "context_length": (1, _MOST),
    "embedding_length": (1, _MOST),
    "feed_forward_length": (1, _MOST),
    "attention.head_count": (1, MOST_LAYERS),
    "attention.head_count_kv": (1, MOST_LAYERS),
    "attention.key_length": (1, _WIDEST),
    "attention.relative_buckets_count": (2, _WIDEST),
    "attention.value_length": (1, _WIDEST),
    "attention.sliding_window": (0, _MOST),  # 0: no window
    "decoder_block_count": (1, MOST_LAYERS),
    "decoder_start_token_id": (0, _MOST),
    "expert_count": (0, MOST_LAYERS),
    "expert_feed_forward_length": (1, _MOST),
    "expert_gating_func": (0, 4),
    "expert_shared_feed_forward_length": (1, _MOST),
    "expert_used_count": (0, MOST_LAYERS),
    "full_attention_interval": (1, MOST_LAYERS),
    "nextn_predict_layers": (0, MOST_LAYERS),
    "rope.dimension_count": (1, _WIDEST),
    "shortconv.l_cache": (1, MOST_LAYERS),
    "ssm.conv_kernel": (1, MOST_LAYERS),
    "ssm.group_count": (1, MOST_LAYERS),
    "ssm.inner_size": (1, _MOST),
    "ssm.state_size": (1, _WIDEST),
    "ssm.time_step_rank": (1, _MOST),
    "vocab_size": (1, _MOST),
}
_REQUIRED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
_MIXTURE = ("expert_count", "expert_used_count", "expert_feed_forward_length")
_QWEN35 = ("attention.head_count_kv", "attention.key_length", "full_attention_interval", "rope.dimension_count",
           "rope.dimension_sections", "rope.freq_base", "ssm.conv_kernel", "ssm.group_count", "ssm.inner_size",
           "ssm.state_size", "ssm.time_step_rank")  # fmt: skip
# Further fields that a file of an architecture must have.
_REQUIRED_OF = {
    "lfm2": ("rope.freq_base", "shortconv.l_cache"),
    "mamba": ("ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank"),
    "minimax-m2": (*_MIXTURE, "rope.dimension_count", "attention.key_length"),
    "qwen2moe": (*_MIXTURE, "expert_shared_feed_forward_length"),
    "qwen35": _QWEN35,
    "qwen35moe": (*_QWEN35, *_MIXTURE, "expert_shared_feed_forward_length"),
    "qwen3moe": _MIXTURE,
    "t5": ("attention.key_length", "attention.relative_buckets_count"),
    "t5encoder": ("attention.key_length", "attention.relative_buckets_count"),
}
# Fields that may be 0 or missing in files of an architecture.
_UNUSED = {"mamba": ("feed_forward_length", "attention.head_count"), "qwen35moe": ("feed_forward_length",)}
_MIXTURES = ("minimax-m2", "qwen2moe", "qwen35moe", "qwen3moe")
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
# Further fields that transformers reads for other architectures. transformers does not compare the prefix of a key with
# the file's architecture: in a file of a llama, "mamba.ssm.inner_size" sets intermediate_size.
_FIELDS = {*_SIZES, *_EPSILONS, "rope.freq_base", "rope.dimension_sections", "sliding_window"}
_READERS_OWN = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")  # the package gguf adds these keys itself

_WHOLE_HEADS = ("bloom", "falcon", "gemma2", "gemma3", "gpt2", "llama")  # whole heads in the embedding

_TEXTS = ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template")
_BOOLS = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix")
_IDS = ("bos", "eos", "unknown", "padding")
_TOKENIZERS = ("gpt2", "llama")


def check_model(header: GgufHeader) -> None:
    """Checks that a header is of a model in one file, whose metadata transformers and the package gguf can read.

    Every size that transformers takes from the metadata is in a fixed range. The number of layers, the width and the
    size of the vocabulary are those of the tensors. The tokenizer is not checked: see :func:`check_tokenizer`.

    Raises GgufError, one line.
    """
    _check_kind(header)
    _check_sizes(header)
    _check_shapes(header)


def check_tokenizer(header: GgufHeader) -> None:
    """Checks the tokenizer of a header that :func:`check_model` has taken.

    The tokenizer's lists have the types and lengths that transformers expects. Raises GgufError, one line.
    """
    for key in _TEXTS:
        if key in header:
            header.text(key)
    for key in _BOOLS:
        if not isinstance(value := header.get(key, False), bool):
            raise header.error(f"{key} is {_shown(value)}, wanted a bool")
    kind = header.text("tokenizer.ggml.model")
    if kind not in _TOKENIZERS:
        raise header.error(f"tokenizer.ggml.model is {kind!r:.60}, wanted one of {', '.join(_TOKENIZERS)}")
    tokens = _checked_list(header, "tokenizer.ggml.tokens", str)
    vocabulary = header.tensors["token_embd.weight"].shape[0]
    if not 1 <= len(tokens) <= vocabulary:
        raise header.error(f"tokenizer.ggml.tokens has {len(tokens)} tokens, wanted 1 to {vocabulary}, the rows of "
                           "the embedding")  # fmt: skip
    longest = max(tokens, key=len)
    if len(longest) > _LONGEST_TOKEN:
        raise header.error(f"a token has {len(longest)} characters, wanted at most {_LONGEST_TOKEN}")
    has_merges = "tokenizer.ggml.merges" in header
    if "tokenizer.ggml.scores" in header or not has_merges:
        _checked_list(header, "tokenizer.ggml.scores", float, len(tokens))
    if "tokenizer.ggml.token_type" in header:
        _checked_list(header, "tokenizer.ggml.token_type", int, len(tokens))
    if has_merges:
        for merge in _checked_list(header, "tokenizer.ggml.merges", str):
            if len(merge.split(" ")) != 2:
                raise header.error(f"tokenizer.ggml.merges has {merge!r:.60}, wanted two tokens and a space")
    for name in _IDS:
        value = header.get(key := f"tokenizer.ggml.{name}_token_id", 0)
        _check_size(header, key, value, 0, len(tokens) - 1)


def _check_kind(header: GgufHeader) -> None:
    if (kind := header.get("general.type", "model")) != "model":
        raise header.error(f"general.type is {kind!r:.60}, wanted a model")
    if (parts := header.get("split.count", 1)) not in (0, 1):
        raise header.error(f"split.count is {parts!r:.60}: the model is split over several files, wanted one file")
    architecture = header.architecture
    if architecture in _UNREADABLE:
        raise header.error(f"general.architecture is {architecture!r}: {_UNREADABLE[architecture]}")
    if architecture not in KNOWN:
        raise header.error(f"general.architecture is {architecture!r:.60}, wanted one of {', '.join(sorted(KNOWN))}")
    if "general.name" in header:
        header.text("general.name")
    if not header.tensors:
        raise header.error("the file has no tensors, wanted a model with weights")
    for key in header.keys:
        prefix, _, field = key.partition(".")
        if key in _READERS_OWN or (field in _FIELDS and prefix != architecture):
            raise header.error(f"the metadata has the key {key!r:.80}, wanted no such key beside {architecture}.*")


def _check_sizes(header: GgufHeader) -> None:
    architecture = header.architecture
    unused = _UNUSED.get(architecture, ())
    for field in (*_REQUIRED, *_REQUIRED_OF.get(architecture, ())):
        if f"{architecture}.{field}" not in header and field not in unused:
            raise header.error(f"{architecture}.{field} is missing, wanted a number")
    for field, (least, most) in _SIZES.items():
        key = f"{architecture}.{field}"
        if key in header and not (architecture == "lfm2" and field == "attention.head_count_kv"):
            least = 0 if field in unused else least
            most = 0 if field == "expert_count" and architecture in _STRICT else most
            _check_size(header, key, header.get(key), least, most)
    for field in ("attention.key_length", "rope.dimension_count"):
        if header.get(key := f"{architecture}.{field}", 0) % 2:
            raise header.error(f"{key} is {header.get(key)}, wanted an even number")
    _check_heads(header)
    if not any(f"{architecture}.{field}" in header for field in _EPSILONS):
        raise header.error(f"{architecture}.{_EPSILONS[0]} is missing, wanted a positive float")
    for field in (*_EPSILONS, "rope.freq_base", "rope.freq_base_swa"):
        value = header.get(key := f"{architecture}.{field}", 1.0)
        if type(value) is not float or not 0 < value < math.inf:
            raise header.error(f"{key} is {_shown(value)}, wanted a positive float")
    if architecture == "gpt2":
        _check_masks(header)
    elif architecture in ("qwen35", "qwen35moe"):
        _check_qwen35(header)
    if architecture in _MIXTURES:
        experts = header.get(f"{architecture}.expert_count")
        _check_size(header, f"{architecture}.expert_count", experts, 1, MOST_LAYERS)
        key = f"{architecture}.expert_used_count"
        _check_size(header, key, header.get(key), 1, experts)


def _check_heads(header: GgufHeader) -> None:
    architecture = header.architecture
    heads, layers = header.get(f"{architecture}.attention.head_count"), header.get(f"{architecture}.block_count")
    if not heads:  # a model without attention
        return
    key = f"{architecture}.attention.head_count_kv"
    kv_heads = header.get(key, heads)
    if architecture == "lfm2":  # a number for each layer; 0: a layer without attention
        if not isinstance(kv_heads, list) or len(kv_heads) != layers:
            raise header.error(f"{key} is {_shown(kv_heads)}, wanted an array of {layers} integers, one of each layer")
        for number in kv_heads:
            _check_size(header, key, number, 0, heads)
        if not (kv_heads := max(kv_heads)):
            raise header.error(f"{key} is 0 for every layer, wanted a layer with attention")
    if architecture in _WHOLE_HEADS and (width := header.get(f"{architecture}.embedding_length")) % heads:
        raise header.error(
            f"{architecture}.embedding_length is {width}, wanted a multiple of the {heads} attention heads"
        )
    if heads % kv_heads:
        raise header.error(f"{key} is {kv_heads}, wanted a divisor of the {heads} attention heads")


def _check_masks(header: GgufHeader) -> None:
    layers, context = header.get("gpt2.block_count"), header.get("gpt2.context_length")
    if layers * context**2 > _MOST_MASKS:
        raise header.error(f"gpt2.context_length is {context} with {layers} layers, wanted masks of at most "
                           f"{_MOST_MASKS} bytes")  # fmt: skip


def _check_qwen35(header: GgufHeader) -> None:
    """Checks what transformers divides by, and the layers of Qwen 3.5."""
    name = f"{header.architecture}.rope.dimension_sections"
    sections = header.get(name)
    if not isinstance(sections, list) or len(sections) > 4:
        raise header.error(f"{name} is {_shown(sections)}, wanted an array of up to 4 integers")
    for section in sections:
        _check_size(header, name, section, 0, _WIDEST)
    values, keys = (header.get(f"{header.architecture}.ssm.{field}") for field in ("time_step_rank", "group_count"))
    key = f"{header.architecture}.ssm.time_step_rank"
    _check_size(header, key, values, 1, MOST_LAYERS)
    if values % keys:
        raise header.error(f"{key} is {values}, wanted a multiple of the {keys} groups")
    inner = header.get(f"{header.architecture}.ssm.inner_size")
    if inner % values:
        raise header.error(f"{header.architecture}.ssm.inner_size is {inner}, wanted a multiple of the {values} heads")
    layers = header.get(f"{header.architecture}.block_count")
    key = f"{header.architecture}.nextn_predict_layers"
    _check_size(header, key, header.get(key, 0), 0, layers - 1)


def _check_size(header: GgufHeader, key: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        wanted = f"an integer from {least} to {most}" if most > least else f"{least}"
        raise header.error(f"{key} is {_shown(value)}, wanted {wanted}")


def _check_shapes(header: GgufHeader) -> None:
    """Compares the sizes in the metadata with the shapes of the tensors."""
    architecture = header.architecture
    if architecture in ("t5", "t5encoder"):
        _check_layers(header, "block_count", "enc.blk", header.get(f"{architecture}.block_count"))
        if architecture == "t5":
            layers = header.get("t5.decoder_block_count", header.get("t5.block_count"))
            _check_layers(header, "decoder_block_count", "dec.blk", layers)
    else:
        _check_layers(header, "block_count", "blk", header.get(f"{architecture}.block_count"))
    width, inner = (header.get(f"{architecture}.{side}_length") for side in ("embedding", "feed_forward"))
    experts, size = (header.get(f"{architecture}.{field}") for field in ("expert_count", "expert_feed_forward_length"))
    for info in header.tensors.values():
        if info.dtype is None and len(info.shape) not in (2, 3):
            raise header.error(f"tensor {info.name!r:.80} is {info.type_name} with {len(info.shape)} sizes, wanted 2 "
                               "or 3 sizes of a quantized tensor")  # fmt: skip
        if re.fullmatch(r"((enc|dec)\.)?blk\.[0-9]+\.ffn_down(_exps)?\.weight", info.name):
            wanted = (experts, width, size) if "_exps" in info.name else (width, inner)
            if info.shape != wanted:
                raise header.error(f"tensor {info.name!r} has shape {info.shape}, wanted {wanted}")
    embedding: Optional[TensorInfo] = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise header.error("the file has no tensor 'token_embd.weight', wanted the weight of the embedding")
    tokens = header.get("tokenizer.ggml.tokens")
    rows = header.get(f"{architecture}.vocab_size", len(tokens) if isinstance(tokens, list) else embedding.shape[0])
    if embedding.shape != (rows, width):
        raise header.error(f"tensor 'token_embd.weight' has shape {embedding.shape}, wanted {(rows, width)}")
    _check_size(header, "the number of rows of 'token_embd.weight'", rows, 1, _MOST)


def _check_layers(header: GgufHeader, field: str, prefix: str, layers: int) -> None:
    pattern = re.compile(re.escape(prefix) + r"\.([0-9]{1,9})\.")
    found = {int(match[1]) for name in header.tensors if (match := pattern.match(name))}
    if found != set(range(layers)):
        absent = next((index for index in range(layers) if index not in found), None)
        problem = f"layer {max(found)} has tensors" if absent is None else f"layer {absent} has no tensors"
        raise header.error(f"{header.architecture}.{field} is {layers}, but {problem}")


def _checked_list(header: GgufHeader, key: str, kind: type, length: Optional[int] = None) -> list[Any]:
    value = header.get(key)
    if isinstance(value, list) and all(type(one) is kind for one in value) and length in (None, len(value)):
        return value
    wanted = f"an array of {kind.__name__}" if length is None else f"an array of {length} {kind.__name__}"
    raise header.error(f"{key} is {'missing' if value is None else _shown(value)}, wanted {wanted}")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"an array of {len(value)}" + (f" {type(value[0]).__name__}" if value else "")
    return repr(value)[:60]
