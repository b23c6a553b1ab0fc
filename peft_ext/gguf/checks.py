"""Checks the header of an untrusted GGUF model before transformers or the package gguf read the file.

transformers makes objects for each layer, each token and each merge that the metadata announces, and does not check the
sizes in the metadata. The function :func:`check_model` compares sizes in the metadata with the tensors of the file, and
the function :func:`check_tokenizer` checks the tokenizer's part of the metadata.
"""

from __future__ import annotations

import math
import re
from typing import Any, Optional

from .header import GgufHeader, TensorInfo

MOST_LAYERS = 10_000
# Largest accepted number of characters of a token. If a file has no merges, transformers tries every split of each
# token into two, which takes long for long tokens.
_LONGEST_TOKEN = 1024
_MOST = (1 << 31) - 1
# Largest accepted number of bytes of all attention masks together. transformers' GPT-2 makes a mask of context_length
# ** 2 bytes in each layer.
_MOST_MASKS = 1 << 28

# For each key of the metadata, without the architecture's prefix, whose value must be an integer or, for the keys in
# _PER_LAYER, may be an array of integers: the smallest and the largest accepted integer.
_SIZES: dict[str, tuple[int, int]] = {
    "block_count": (1, MOST_LAYERS),
    "nextn_predict_layers": (0, MOST_LAYERS),
    "context_length": (1, _MOST),
    "embedding_length": (1, _MOST),
    "feed_forward_length": (0, _MOST),
    "attention.head_count": (0, MOST_LAYERS),
    "attention.head_count_kv": (0, MOST_LAYERS),
    "attention.key_length": (1, 65_536),
    "attention.value_length": (1, 65_536),
    "attention.sliding_window": (0, _MOST),  # 0: no window
    "attention.relative_buckets_count": (1, MOST_LAYERS),
    "sliding_window": (0, _MOST),
    "rope.dimension_count": (1, 65_536),
    "rope.scaling.original_context_length": (1, _MOST),
    "shortconv.l_cache": (1, MOST_LAYERS),
    "full_attention_interval": (1, MOST_LAYERS),
    "vocab_size": (1, _MOST),
    "decoder_block_count": (1, MOST_LAYERS),
    "decoder_start_token_id": (0, _MOST),
    "expert_count": (0, MOST_LAYERS),
    "expert_used_count": (0, MOST_LAYERS),
    "expert_feed_forward_length": (0, _MOST),
    "expert_shared_feed_forward_length": (0, _MOST),
    "expert_gating_func": (0, 255),
    "ssm.conv_kernel": (1, MOST_LAYERS),
    "ssm.group_count": (1, MOST_LAYERS),
    "ssm.inner_size": (1, _MOST),
    "ssm.state_size": (1, 65_536),
    "ssm.time_step_rank": (1, _MOST),
}
# Keys, without the architecture's prefix, whose value may be an array with one integer for each layer.
_PER_LAYER = {"feed_forward_length", "attention.head_count", "attention.head_count_kv"}
_REQUIRED = ("block_count", "embedding_length")
_REQUIRED_OF = {"lfm2": ("context_length", "feed_forward_length", "rope.freq_base", "shortconv.l_cache")}
_WITHOUT_ATTENTION = ("mamba",)
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_NOT_NEGATIVE = (
    "attention.scale", "attn_logit_softcapping", "embedding_scale", "final_logit_softcapping", "logit_scale",
    "residual_scale", "rope.scale_linear", "rope.scaling.factor",
)  # fmt: skip
# transformers does not compare the prefix of a key with the file's architecture: in a file of the architecture llama,
# the key "mamba.ssm.inner_size" sets the configuration's intermediate_size.
_FIELDS = {*_SIZES, *_EPSILONS, "rope.freq_base"}
# Keys that the package gguf adds to the metadata of each file that it reads.
_READERS_OWN = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")
# Architectures for which transformers needs an embedding whose width is a multiple of the number of attention heads.
_WHOLE_HEADS = ("gemma2", "gemma3", "llama")

_TEXTS = ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template")
_BOOLS = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix")
_IDS = ("bos", "eos", "unknown", "padding")
# Kinds of tokenizers for which transformers makes missing merges from the scores.
_WITH_MERGES = ("gemma4", "gpt2", "llama")


def check_model(header: GgufHeader) -> None:
    """Checks that a header is of a model in one file, whose metadata transformers and the package gguf can read.

    The sizes in the metadata must be in fixed ranges. The number of layers, the width, the sizes of the MLPs and of the
    experts, and the size of the vocabulary must fit the tensors' names and shapes. The tokenizer is checked by
    :func:`check_tokenizer`.

    Raises GgufError, with a message of one line, where a check fails.
    """
    _check_kind(header)
    _check_sizes(header)
    _check_shapes(header)


def _check_kind(header: GgufHeader) -> None:
    if (kind := header.get("general.type", "model")) != "model":
        raise header.error(f"general.type is {kind!r:.60}, wanted a model")
    if (parts := header.get("split.count", 1)) not in (0, 1):
        raise header.error(f"split.count is {parts!r:.60}: the model is split over several files, wanted one file "
                           "(llama-gguf-split --merge joins the files)")  # fmt: skip
    architecture = header.architecture
    if not re.fullmatch("[a-z0-9_-]{1,40}", architecture):
        raise header.error(f"general.architecture is {architecture!r:.60}, wanted a name in a-z, 0-9, - and _")
    if "general.name" in header:
        header.text("general.name")
    if not header.tensors:
        raise header.error("the file has no tensors, wanted a model with weights")
    for key in header.keys:
        prefix, _, field = key.partition(".")
        if key in _READERS_OWN:
            raise header.error(f"the metadata has the key {key!r}, which the package gguf adds itself, wanted no such "
                               "key")  # fmt: skip
        if field in _FIELDS and prefix != architecture:
            raise header.error(f"the metadata has the key {key!r:.80}, and the file's architecture is "
                               f"{architecture}, wanted {architecture}.{field}")  # fmt: skip


def _check_sizes(header: GgufHeader) -> None:
    architecture = header.architecture
    for field in (*_REQUIRED, *_REQUIRED_OF.get(architecture, ())):
        if f"{architecture}.{field}" not in header:
            raise header.error(f"{architecture}.{field} is missing, wanted a number")
    for field, (least, most) in _SIZES.items():
        value = header.get(key := f"{architecture}.{field}")
        if field in _PER_LAYER and isinstance(value, list):
            layers = header.get(f"{architecture}.block_count")
            if len(value) != layers:
                raise header.error(f"{key} is {_shown(value)}, wanted one of each of the {layers} layers")
            for one in value:
                _check_size(header, key, one, least, most)
        elif value is not None:
            _check_size(header, key, value, least, most)
    for field in ("attention.key_length", "rope.dimension_count"):
        if header.get(key := f"{architecture}.{field}", 0) % 2:
            raise header.error(f"{key} is {header.get(key)}, wanted an even number")
    if architecture not in _WITHOUT_ATTENTION:
        _check_heads(header, architecture)
    if not any(f"{architecture}.{field}" in header for field in _EPSILONS):
        raise header.error(f"{architecture}.{_EPSILONS[0]} is missing, wanted a positive float")
    for field in (*_EPSILONS, "rope.freq_base", *_NOT_NEGATIVE):
        value, may_be_0 = header.get(key := f"{architecture}.{field}", 1.0), field in _NOT_NEGATIVE
        if type(value) is not float or not 0 <= value < math.inf or not (value or may_be_0):
            raise header.error(f"{key} is {_shown(value)}, wanted a {'float >= 0' if may_be_0 else 'positive float'}")
    if (key := f"{architecture}.rope.scaling.type") in header:
        header.text(key)


def _check_heads(header: GgufHeader, architecture: str) -> None:
    """Raises GgufError where a layer's number of attention heads is no multiple of the layer's number of key-value
    heads, where no layer has heads, where the width of the embedding is no multiple of the number of heads (for the
    architectures in ``_WHOLE_HEADS``), or where LFM2's numbers of heads have other types than transformers expects.

    A layer without attention has 0 heads.
    """
    heads, kv_heads = (header.get(f"{architecture}.attention.{field}") for field in ("head_count", "head_count_kv"))
    if not (most := _largest(heads)):
        raise header.error(f"{architecture}.attention.head_count is {_shown(heads)}, wanted a layer with heads")
    if kv_heads is not None and not _largest(kv_heads):
        raise header.error(f"{architecture}.attention.head_count_kv is {_shown(kv_heads)}, wanted a layer with heads")
    if architecture == "lfm2" and not (isinstance(heads, int) and isinstance(kv_heads, list)):
        raise header.error(f"lfm2.attention.head_count_kv is {_shown(kv_heads)} beside a head_count of "
                           f"{_shown(heads)}, wanted an array and an integer")  # fmt: skip
    layers = header.get(f"{architecture}.block_count")
    for one, kv in zip(_of_layers(heads, layers), _of_layers(kv_heads, layers), strict=True):
        if kv and one % kv:
            raise header.error(f"{architecture}.attention.head_count_kv is {kv}, wanted a divisor of the {one} "
                               "attention heads")  # fmt: skip
    width = header.get(f"{architecture}.embedding_length")
    if architecture in _WHOLE_HEADS and width % most:
        raise header.error(
            f"{architecture}.embedding_length is {width}, wanted a multiple of the {most} attention heads"
        )


def _largest(value: Any) -> int:
    return max(value, default=0) if isinstance(value, list) else value or 0


def _of_layers(value: Any, layers: int) -> list[int]:
    """Returns a list with the value of each layer. ``value`` is an array, one number for all layers, or None, which
    counts as 0."""
    return value if isinstance(value, list) else [value or 0] * layers


def _check_size(header: GgufHeader, key: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        wanted = f"an integer from {least} to {most}" if most > least else f"{least}"
        raise header.error(f"{key} is {_shown(value)}, wanted {wanted}")


def _check_shapes(header: GgufHeader) -> None:
    """Raises GgufError where sizes in the metadata differ from the shapes of the tensors, where a layer or the
    embedding has no tensor, where a quantized tensor has neither 2 nor 3 sizes, or where GPT-2's masks would be too
    large."""
    architecture = header.architecture
    layers, width = (header.get(f"{architecture}.{field}") for field in ("block_count", "embedding_length"))
    # The names of T5's tensors begin with enc.blk.N in the encoder and with dec.blk.N in the decoder.
    pattern = re.compile(r"(?:enc\.|dec\.)?blk\.([0-9]{1,9})\.")
    found = {int(match[1]) for name in header.tensors if (match := pattern.match(name))}
    # The file may lack the tensors of the last layers, which are for multi-token prediction (nextn).
    present = layers - header.get(f"{architecture}.nextn_predict_layers", 0)
    problem = next((f"layer {index} has no tensors" for index in range(present) if index not in found), None)
    if problem is None and max(found, default=0) >= layers:
        problem = f"layer {max(found)} has tensors"
    if problem is not None or present < 1:
        raise header.error(f"{architecture}.block_count is {layers}, but {problem or 'none is a decoder layer'}")
    if (inner := header.get(f"{architecture}.feed_forward_length")) is not None:
        for index, size in enumerate(_of_layers(inner, layers)):
            down = header.tensors.get(f"blk.{index}.ffn_down.weight")
            if down is not None and down.shape != (width, size):
                raise header.error(f"tensor {down.name!r} has shape {down.shape}, wanted {(width, size)}")
    experts, size = (header.get(f"{architecture}.{field}") for field in ("expert_count", "expert_feed_forward_length"))
    for info in header.tensors.values():
        if info.dtype is None and len(info.shape) not in (2, 3):
            raise header.error(f"tensor {info.name!r:.80} is {info.type_name} with the sizes {info.shape}, wanted 2 or "
                               "3 sizes of a quantized tensor")  # fmt: skip
        if experts and size and re.fullmatch(r"blk\.[0-9]+\.ffn_down_exps\.weight", info.name):
            if info.shape != (experts, width, size):
                raise header.error(f"tensor {info.name!r} has shape {info.shape}, wanted {(experts, width, size)}")
    embedding: Optional[TensorInfo] = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise header.error("the file has no tensor 'token_embd.weight', wanted the weight of the embedding")
    if (rows := header.get(f"{architecture}.vocab_size")) is None:
        tokens = header.get("tokenizer.ggml.tokens")
        rows = len(tokens) if isinstance(tokens, list) else embedding.shape[0]
    if embedding.shape != (rows, width):
        raise header.error(f"tensor 'token_embd.weight' has shape {embedding.shape}, wanted {(rows, width)}")
    _check_decoder(header)
    context = header.get(f"{architecture}.context_length", 0)
    if architecture == "gpt2" and layers * context**2 > _MOST_MASKS:
        raise header.error(f"gpt2.context_length is {context} with {layers} layers, wanted masks of at most "
                           f"{_MOST_MASKS} bytes")  # fmt: skip


def _check_decoder(header: GgufHeader) -> None:
    """Raises GgufError where the metadata has ``decoder_block_count``, and the decoder layers that have tensors in the
    file are not exactly the layers 0 to ``decoder_block_count`` - 1."""
    architecture = header.architecture
    if (count := header.get(f"{architecture}.decoder_block_count")) is None:
        return
    pattern = re.compile(r"dec\.blk\.([0-9]{1,9})\.")
    found = {int(match[1]) for name in header.tensors if (match := pattern.match(name))}
    if found != set(range(count)):
        raise header.error(f"{architecture}.decoder_block_count is {count}, but the file has tensors of {len(found)} "
                           "layers of the decoder")  # fmt: skip


def check_tokenizer(header: GgufHeader) -> None:
    """Raises GgufError, with a message of one line, where a value of the tokenizer in the metadata (a list, a text, a
    bool or the number of a special token) has another type, length or range than transformers expects, or where a token
    is too long.

    The header must have passed :func:`check_model`.
    """
    vocabulary = header.tensors["token_embd.weight"].shape[0]
    for key in _TEXTS:
        if key in header:
            header.text(key)
    for key in _BOOLS:
        if not isinstance(value := header.get(key, False), bool):
            raise header.error(f"{key} is {_shown(value)}, wanted a bool")
    kind = header.get("tokenizer.ggml.model", "none")
    if kind == "none" and "tokenizer.ggml.tokens" not in header:  # the file has no tokenizer
        return
    tokens = _checked_list(header, "tokenizer.ggml.tokens", str)
    if not 1 <= len(tokens) <= vocabulary:
        raise header.error(f"tokenizer.ggml.tokens has {len(tokens)} tokens, wanted 1 to {vocabulary}, the rows of "
                           "the embedding")  # fmt: skip
    longest = max(tokens, key=len)
    if len(longest) > _LONGEST_TOKEN:
        raise header.error(f"a token has {len(longest)} characters, wanted at most {_LONGEST_TOKEN}")
    has_merges = "tokenizer.ggml.merges" in header
    if "tokenizer.ggml.scores" in header or kind == "t5" or (not has_merges and kind in _WITH_MERGES):
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
    raise header.error(f"{key} is {_shown(value)}, wanted {wanted}")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"an array of {len(value)}" + (f" {type(value[0]).__name__}" if value else "")
    return "missing" if value is None else repr(value)[:60]
