"""Reads the configuration and the tokenizer that a GGUF file describes, with transformers.

transformers 5.24 takes seconds to read the metadata of a file, because transformers converts the strings of the
vocabulary one by one. The function :func:`read_config` therefore gives transformers the metadata without the
vocabulary.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy
import torch

from .._imports import required
from .checks import check_model, check_tokenizer
from .facts import take_facts
from .header import GgufError, GgufHeader
from .pre_tokenizers import adds_bos, check_pre_tokenizer, fit_tokenizer

with required("transformers", "a model in a GGUF file"):
    from transformers import AutoConfig, PreTrainedTokenizerFast
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, get_gguf_config


# Architectures that transformers 5.24 reads from GGUF files, in addition to those of transformers.integrations.gguf.
_READ = {
    "bloom", "falcon", "gemma2", "gemma3", "gpt-oss", "gpt2", "llama", "mamba", "minimax-m2", "mistral", "nemotron",
    "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "stablelm", "starcoder2", "t5", "t5encoder",
}  # fmt: skip
# Architectures in transformers' lists whose files transformers 5.24 can't read, and the reason.
_UNREADABLE = {
    "deci": "transformers has no model deci",
    "gemma4": "transformers does not read the sizes of Gemma 4's layers from the file",
}


def read_config(header: GgufHeader) -> Any:
    """Returns the transformers configuration of the model in a file.

    Raises GgufError where the file is not a whole model, where transformers can't read the architecture, where a value
    that changes the model's function can't be put into the configuration, or where the metadata is damaged.
    """
    check_model(header)
    architecture = header.architecture
    if architecture in _UNREADABLE:
        raise header.error(f"general.architecture is {architecture!r}: {_UNREADABLE[architecture]}")
    if architecture not in (known := {*_READ, *GGUF_CONFIG_ARCHS}):
        wanted = ", ".join(sorted(known))
        raise header.error(f"general.architecture is {architecture!r:.60}, wanted one of {wanted}")
    try:
        if architecture in GGUF_CONFIG_ARCHS:
            config = _read_by_function(header)
        else:
            config = _read_without_vocabulary(header)
        config = take_facts(header, config)
    except GgufError:
        raise
    except Exception as error:  # an untrusted file can make transformers raise any error
        raise header.error(f"transformers can't read the configuration: {_line(error)}") from error
    config._name_or_path = str(header.path)
    config.dtype = torch.bfloat16
    return config


def read_tokenizer(header: GgufHeader, **kwargs: Any) -> Any:
    """Returns the tokenizer in a file, with its chat template. For how the tokenizer splits text, see
    :func:`~peft_ext.gguf.pre_tokenizers.fit_tokenizer`.

    Raises GgufError where the file is no model, has no tokenizer, has a tokenizer that transformers can't read, or has
    a ``tokenizer.ggml.pre`` that is not known.
    """
    check_model(header)
    check_tokenizer(header)
    if "tokenizer.ggml.tokens" not in header:
        raise header.error("the file has no tokenizer: tokenizer.ggml.tokens is missing")
    check_pre_tokenizer(header)
    return _tokenizer(header, **kwargs)


def _tokenizer(header: GgufHeader, **kwargs: Any) -> Any:
    if adds_bos(header):
        kwargs.setdefault("add_bos_token", True)
    try:
        # The file is linked into an empty folder, because transformers would take a tokenizer.json beside the file.
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, header.path.name).symlink_to(header.path.resolve())
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=header.path.name, **kwargs)
        fit_tokenizer(header, tokenizer)
    except Exception as error:  # an untrusted file can make transformers raise any error
        raise header.error(f"transformers can't read the tokenizer: {_line(error)}") from error
    tokenizer.init_kwargs.pop("gguf_file", None)
    tokenizer.name_or_path = str(header.path)
    return tokenizer


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + text[0][:200] if text else ''}"


def _read_by_function(header: GgufHeader) -> Any:
    """Returns the configuration that transformers' ``get_gguf_config`` makes from the metadata."""
    metadata = {
        key: header.get(key)
        for key in header.keys
        if not key.startswith("tokenizer.") or key.endswith("_token_id")  # the vocabulary's long lists are not needed
    }
    # get_gguf_config takes the number of tokens in place of the list of tokens.
    metadata["tokenizer.ggml.tokens"] = header.tensors["token_embd.weight"].shape[0]
    fields = get_gguf_config(metadata, tuple(header.tensors))
    return AutoConfig.for_model(**fields)


def _read_without_vocabulary(header: GgufHeader) -> Any:
    """Returns the configuration that transformers reads from a small temporary file.

    The temporary file has the names of the tensors, and the metadata without the vocabulary, the name of the model and
    the scaling of rotary positions.
    """
    with required("gguf", "a model in a GGUF file"):
        from gguf import GGUFValueType, GGUFWriter

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        writer = GGUFWriter(file, header.architecture)
        size = f"{header.architecture}.vocab_size"
        if size not in header:
            writer.add_uint32(size, header.tensors["token_embd.weight"].shape[0])
        # transformers recognizes UMT5 by the file's general.name. In UMT5, every layer has a relative_attention_bias.
        if "enc.blk.1.attn_rel_b.weight" in header.tensors:
            writer.add_name("umt5")
        for key in header.keys:
            if key in ("general.architecture", "general.name"):
                continue
            if key.startswith("tokenizer.") and not key.endswith("_token_id"):
                continue
            if ".rope.scaling." in key:  # transformers misreads the scaling of gpt-oss; take_facts reads the scaling
                continue
            value = header.value(key)
            element = None if value.element is None else GGUFValueType(value.element)
            if element is None or value.data:  # the package gguf can't write an empty array
                writer.add_key_value(key, value.data, GGUFValueType(value.type), element)
        for name in header.tensors:
            writer.add_tensor(name, numpy.zeros(1, dtype=numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return AutoConfig.from_pretrained(folder, gguf_file=file.name)
