"""The configuration and the tokenizer that a GGUF file describes, read by transformers.

transformers 5.24 takes seconds to read the metadata of a file, because it converts each string of the vocabulary by
itself. :func:`read_config` therefore gives transformers a small file with the same metadata without the vocabulary.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Optional

import numpy
import torch

from .._imports import required
from .checks import check_model
from .header import GgufHeader

with required("transformers", "a model in a GGUF file"):
    from transformers import AutoConfig, PreTrainedTokenizerFast
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

__all__ = ["read_config", "read_tokenizer"]

# Values of the metadata that change the model's function, and the field of the configuration that holds the value.
# transformers reads some of these for some architectures.
_FIELDS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
    "residual_scale": "residual_multiplier",
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
}
# Values that change the function, and that no configuration of transformers' GGUF architectures has.
_REFUSED = ("attention.clamp_kqv", "attention.max_alibi_bias", "router_logit_softcapping", "swin_norm")


def read_config(header: GgufHeader) -> Any:
    """Returns the transformers configuration of the model in a file.

    Raises GgufError where transformers does not know the architecture, where a value that changes the model's function
    can't be put into the configuration, or where the metadata is damaged.
    """
    check_model(header)
    architecture = header.architecture
    try:
        if architecture in GGUF_CONFIG_ARCHS:
            config = AutoConfig.from_pretrained(str(header.path.parent), gguf_file=header.path.name)
        else:
            config = _read_without_vocabulary(header)
    except Exception as error:  # an untrusted file can make transformers raise any error
        raise header.error(f"transformers can't read the configuration: {_line(error)}") from error
    if architecture not in GGUF_CONFIG_ARCHS:
        _take_fields(header, config)
        _take_rope_scaling(header, config)
    config._name_or_path = str(header.path)
    config.dtype = torch.bfloat16
    return config


def read_tokenizer(header: GgufHeader, **kwargs: Any) -> Any:
    """Returns the tokenizer in a file, with its chat template. Raises GgufError where transformers can't read it."""
    check_model(header)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(header.path.parent), gguf_file=header.path.name, **kwargs
        )
    except Exception as error:  # an untrusted file can make transformers raise any error
        raise header.error(f"transformers can't read the tokenizer: {_line(error)}") from error
    tokenizer.init_kwargs.pop("gguf_file", None)
    tokenizer.name_or_path = str(header.path)
    return tokenizer


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + text[0][:200] if text else ''}"


def _read_without_vocabulary(header: GgufHeader) -> Any:
    """Returns the configuration that transformers reads from a file with the metadata and the names of the tensors."""
    with required("gguf", "a model in a GGUF file"):
        from gguf import GGUFValueType, GGUFWriter

    vocabulary = header.get("tokenizer.ggml.tokens")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        writer = GGUFWriter(file, header.architecture)
        size = f"{header.architecture}.vocab_size"
        if size not in header and isinstance(vocabulary, list):
            writer.add_uint32(size, len(vocabulary))
        for key in header.keys:
            value = header.value(key)
            if key == "general.architecture" or (value.element is not None and key.startswith("tokenizer.")):
                continue
            element = None if value.element is None else GGUFValueType(value.element)
            if element is None or value.data:  # gguf writes no empty array
                writer.add_key_value(key, value.data, GGUFValueType(value.type), element)
        for name in header.tensors:
            writer.add_tensor(name, numpy.zeros(1, dtype=numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return AutoConfig.from_pretrained(folder, gguf_file=file.name)


def _take_fields(header: GgufHeader, config: Any) -> None:
    """Puts the values of ``_FIELDS`` into the configuration. Raises GgufError where it has no such field."""
    read = GGUF_CONFIG_MAPPING.get(config.model_type, {})
    for key, field in _FIELDS.items():
        value = header.get(f"{header.architecture}.{key}")
        if value is None or read.get(key) is not None:
            continue
        if key == "attention.key_length" and value * config.num_attention_heads == config.hidden_size:
            continue
        if key == "attention.scale" and value == 0:
            continue
        if key == "attention.sliding_window" and value >= config.max_position_embeddings:
            continue
        if not hasattr(config, field):
            raise header.error(f"{header.architecture}.{key} is {value!r:.60}, and transformers' {config.model_type} "
                               f"has no {field}")  # fmt: skip
        setattr(config, field, value)
    for key in _REFUSED:
        if header.get(f"{header.architecture}.{key}") not in (None, 0, 0.0, False):
            raise header.error(f"{header.architecture}.{key} is set, which is not supported")
    experts = header.get(f"{header.architecture}.expert_count", 0)
    if experts and not any(hasattr(config, name) for name in ("num_experts", "num_local_experts")):
        raise header.error(f"the model has {experts} experts, and transformers reads {header.architecture} files as "
                           f"{config.model_type}, without experts")  # fmt: skip


def _take_rope_scaling(header: GgufHeader, config: Any) -> None:
    """Puts the scaling of rotary positions into the configuration, which transformers does not read from GGUF."""
    prefix = f"{header.architecture}.rope."
    kind = header.get(f"{prefix}scaling.type")
    factor: Optional[float] = header.get(f"{prefix}scaling.factor", header.get(f"{prefix}scale_linear"))
    if kind is None and factor in (None, 0.0, 1.0):
        return
    kind = "linear" if kind is None else kind
    if kind == "none" or getattr(config, "rope_scaling", None) is not None:
        return
    known = getattr(config, "rope_parameters", None) or {}
    if kind not in ("linear", "yarn") or known.get("rope_type", "default") != "default" or not factor:
        raise header.error(f"{prefix}scaling.type is {kind!r:.60} with the factor {factor}, wanted linear or yarn")
    more: dict[str, Any] = {}
    if kind == "yarn":
        original = header.get(f"{prefix}scaling.original_context_length")
        more = {"original_max_position_embeddings": original or config.max_position_embeddings}
    config.rope_parameters = {**known, "rope_type": kind, "factor": float(factor), **more}
