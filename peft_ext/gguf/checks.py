"""Checks the header of an untrusted GGUF model before transformers or the package gguf read the file.

transformers makes objects for each layer, each token and each merge that the metadata announces, and takes every size
in the metadata as it comes. :func:`check_model` ties these numbers to the tensors that the file holds.
"""

from __future__ import annotations

import math
import re
from typing import Any, Optional

from .header import GgufHeader, TensorInfo
from .names import ARCHITECTURES

__all__ = ["MOST_LAYERS", "check_model"]

MOST_LAYERS = 10_000
_LONGEST_TOKEN = 1024  # characters; transformers tries every split of every token where the file has no merges
_MOST = (1 << 31) - 1

# Fields of an architecture that must be integers: the smallest and the largest value.
_SIZES: dict[str, tuple[int, int]] = {
    "block_count": (1, MOST_LAYERS),
    "context_length": (1, _MOST),
    "embedding_length": (1, _MOST),
    "feed_forward_length": (1, _MOST),
    "attention.head_count": (1, MOST_LAYERS),
    "attention.head_count_kv": (1, MOST_LAYERS),
    "attention.key_length": (1, 65_536),
    "attention.value_length": (1, 65_536),
    "attention.sliding_window": (0, _MOST),  # 0: no window
    "rope.dimension_count": (1, 65_536),
    "shortconv.l_cache": (1, MOST_LAYERS),
    "vocab_size": (1, _MOST),
    "expert_count": (0, 0),  # no architecture of ARCHITECTURES has experts
}
_REQUIRED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
_REQUIRED_LFM2 = ("rope.freq_base", "shortconv.l_cache")
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
# Further fields that transformers reads for other architectures. transformers does not compare the prefix of a key with
# the file's architecture: in a file of a llama, "mamba.ssm.inner_size" sets intermediate_size.
_OTHER_FIELDS = {
    "attention.relative_buckets_count", "decoder_start_token_id", "expert_gating_func", "expert_used_count",
    "sliding_window", "ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank",
}  # fmt: skip
_FIELDS = {*_SIZES, *_EPSILONS, "rope.freq_base", *_OTHER_FIELDS}
_READERS_OWN = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")  # the package gguf adds these keys itself

_WHOLE_HEADS = ("gemma2", "gemma3", "llama")  # transformers takes whole heads in the embedding for these alone

_TEXTS = ("general.name", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template")
_BOOLS = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix")
_IDS = ("bos", "eos", "unknown", "padding")
_TOKENIZERS = ("gpt2", "llama")


def check_model(header: GgufHeader) -> None:
    """Checks that a header is of a model in one file, whose metadata transformers and the package gguf can read.

    Every size that transformers takes from the metadata is in a fixed range. The number of layers, the width and the
    size of the vocabulary are those of the tensors. The tokenizer's lists have the types and lengths that transformers
    expects.

    Raises GgufError, one line.
    """
    _check_kind(header)
    _check_sizes(header)
    _check_tokenizer(header, _check_shapes(header))


def _check_kind(header: GgufHeader) -> None:
    if (kind := header.get("general.type", "model")) != "model":
        raise header.error(f"general.type is {kind!r:.60}, wanted a model")
    if (parts := header.get("split.count", 1)) not in (0, 1):
        raise header.error(f"split.count is {parts!r:.60}: the model is split over several files, wanted one file")
    architecture = header.architecture
    known = sorted({name for name, _ in ARCHITECTURES.values()})
    if architecture not in known:
        raise header.error(f"general.architecture is {architecture!r:.60}, wanted one of {', '.join(known)}")
    if not header.tensors:
        raise header.error("the file has no tensors, wanted a model with weights")
    for key in header.keys:
        prefix, _, field = key.partition(".")
        if key in _READERS_OWN or (field in _FIELDS and prefix != architecture):
            raise header.error(f"the metadata has the key {key!r:.80}, wanted no such key beside {architecture}.*")


def _check_sizes(header: GgufHeader) -> None:
    architecture = header.architecture
    for field in (*_REQUIRED, *(_REQUIRED_LFM2 if architecture == "lfm2" else ())):
        if f"{architecture}.{field}" not in header:
            raise header.error(f"{architecture}.{field} is missing, wanted a number")
    for field, (least, most) in _SIZES.items():
        key = f"{architecture}.{field}"
        if key in header and not (architecture == "lfm2" and field == "attention.head_count_kv"):
            _check_size(header, key, header.get(key), least, most)
    for field in ("attention.key_length", "rope.dimension_count"):
        if header.get(key := f"{architecture}.{field}", 0) % 2:
            raise header.error(f"{key} is {header.get(key)}, wanted an even number")
    heads, layers = header.get(f"{architecture}.attention.head_count"), header.get(f"{architecture}.block_count")
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
    if not any(f"{architecture}.{field}" in header for field in _EPSILONS):
        raise header.error(f"{architecture}.{_EPSILONS[0]} is missing, wanted a positive float")
    for field in (*_EPSILONS, "rope.freq_base"):
        value = header.get(key := f"{architecture}.{field}", 1.0)
        if type(value) is not float or not 0 < value < math.inf:
            raise header.error(f"{key} is {_shown(value)}, wanted a positive float")


def _check_size(header: GgufHeader, key: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        wanted = f"an integer from {least} to {most}" if most > least else f"{least}"
        raise header.error(f"{key} is {_shown(value)}, wanted {wanted}")


def _check_shapes(header: GgufHeader) -> int:
    """Compares the sizes in the metadata with the shapes of the tensors. Returns the rows of the embedding."""
    architecture = header.architecture
    layers = header.get(f"{architecture}.block_count")
    width, inner = (header.get(f"{architecture}.{side}_length") for side in ("embedding", "feed_forward"))
    found = {int(match[1]) for name in header.tensors if (match := re.match(r"blk\.([0-9]{1,9})\.", name))}
    if found != set(range(layers)):
        absent = next((index for index in range(layers) if index not in found), None)
        problem = f"layer {max(found)} has tensors" if absent is None else f"layer {absent} has no tensors"
        raise header.error(f"{architecture}.block_count is {layers}, but {problem}")
    for index in range(layers):
        down = header.tensors.get(f"blk.{index}.ffn_down.weight")
        if down is not None and down.shape != (width, inner):
            raise header.error(f"tensor {down.name!r} has shape {down.shape}, wanted {(width, inner)}")
    embedding: Optional[TensorInfo] = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise header.error("the file has no tensor 'token_embd.weight', wanted the weight of the embedding")
    tokens = header.get("tokenizer.ggml.tokens")
    rows = header.get(f"{architecture}.vocab_size", len(tokens) if isinstance(tokens, list) else None)
    if embedding.shape != (rows, width):
        raise header.error(f"tensor 'token_embd.weight' has shape {embedding.shape}, wanted {(rows, width)}")
    return embedding.shape[0]


def _check_tokenizer(header: GgufHeader, vocabulary: int) -> None:
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
