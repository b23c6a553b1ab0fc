"""Writes the files of a merged model, one tensor at a time."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Optional

import torch
from torch import Tensor

from .._imports import required
from ..gguf import read_header
from ..sources.json_file import read_object
from ..sources.model import load_tokenizer
from ..sources.weight_files import safetensors_header
from .base import Base
from .errors import as_merge_error, fail

with required("transformers", "peft_ext.merge_to_dense"):
    from transformers import TOKENIZER_MAPPING, PretrainedConfig
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

TOKENIZER_CONFIG = "tokenizer_config.json"
# Files of the tokenizer and the chat template, which are copied from the adapter or the base. The class of a tokenizer
# may have further files.
_TOKENIZER = (
    "tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
# Files of the processor, which are copied from the base.
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def write_safetensors(
    stream: BinaryIO, planned: dict[str, Tensor], take: Callable[[str], Tensor], advance: Callable[[int], None]
) -> None:
    """Writes a safetensors file one tensor at a time; safetensors' own writer needs all tensors in memory.

    Tensors of wide dtypes come first, so that each tensor is aligned. ``take(name)`` returns the tensor ``name``;
    ``advance(n)`` is called after each tensor, with the number n of the tensor's bytes.
    """
    names = sorted(planned, key=lambda name: -planned[name].element_size())
    with as_merge_error(ValueError):
        header = safetensors_header({name: planned[name] for name in names})
    stream.write(header)
    for name in names:
        tensor = take(name)
        if tensor.shape != planned[name].shape or tensor.dtype != planned[name].dtype:
            came, wanted = (f"{t.dtype} {tuple(t.shape)}" for t in (tensor, planned[name]))
            fail(f"{name} is {came} after merging, wanted {wanted}")
        if tensor.numel():
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        advance(tensor.nbytes)


def gguf_tokenizer(base: Base, adapter: Path) -> Any:
    """Returns the tokenizer in the GGUF file of a base if the merge writes this tokenizer, else None.

    Returns None if the base is no GGUF file, if the file has no tokenizer, or if the adapter's folder has a tokenizer.

    Raises MergeError for a tokenizer that can't be read.
    """
    file = base.folder
    if file is None or not file.is_file() or (adapter / TOKENIZER_CONFIG).is_file():
        return None
    with as_merge_error(ValueError):
        return load_tokenizer(str(file)) if "tokenizer.ggml.tokens" in read_header(file) else None


def write_beside(base: Base, config: PretrainedConfig, adapter: Path, folder: Path, words: Any) -> Optional[Path]:
    """Copies tokenizer files (or writes those of the tokenizer ``words``) and the base's processor files, writes
    generation_config.json, if the base has this file or generates text, and then writes config.json. ``words``: the
    result of :func:`gguf_tokenizer`.

    config.json is written last, because a folder without config.json can't be loaded as a model.

    Returns the folder or the GGUF file whose tokenizer was written: the adapter's folder if the folder has
    tokenizer_config.json, else the base's; None where neither has tokenizer files.
    """
    model = base.model
    tokenizer = adapter if (adapter / TOKENIZER_CONFIG).is_file() else base.folder
    if tokenizer is not None and tokenizer.is_file():
        if words is None:
            tokenizer = None
        else:
            words.save_pretrained(folder)
    elif tokenizer is not None:
        if not _copy((*_TOKENIZER, *_files_of_class(tokenizer, config)), tokenizer, folder):
            tokenizer = None
        elif (tokenizer / _TEMPLATES).is_dir():
            shutil.copytree(tokenizer / _TEMPLATES, folder / _TEMPLATES)
    if base.folder is not None:
        _copy(_PROCESSOR, base.folder, folder)
    about = None if base.folder is None else base.folder / "generation_config.json"
    if about is not None and about.is_file():
        shutil.copyfile(about, folder / about.name)
    elif model.can_generate() and model.generation_config is not None:
        with as_merge_error(ValueError, about="the model's generation_config: "):
            model.generation_config.save_pretrained(folder)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    return tokenizer


def _files_of_class(source: Path, config: PretrainedConfig) -> list[str]:
    """Returns the names that the class of the tokenizer in the folder ``source`` gives the files of its vocabulary, and
    the names of files in the folder that tokenizer_config.json lists as ``fast_tokenizer_files``."""
    about: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        about = read_object(source / TOKENIZER_CONFIG)
    named = [getattr(config, "tokenizer_class", None), about.get("tokenizer_class")]
    classes = [tokenizer_class_from_name(name.removesuffix("Fast")) for name in named if isinstance(name, str)]
    listed = about.get("fast_tokenizer_files")
    listed = map(str, listed if isinstance(listed, list) else [])
    names: list[Any] = [name for name in listed if re.fullmatch(r"tokenizer\.[\w.-]+\.json", name)]
    for found in [*classes, TOKENIZER_MAPPING.get(type(config), None)]:
        with contextlib.suppress(AttributeError, ImportError):  # a class whose package is not installed has no names
            names += found.vocab_files_names.values()
    return [name for name in names if isinstance(name, str)]


def _copy(names: tuple[str, ...], source: Path, folder: Path) -> int:
    """Copies the files ``names`` that are in ``source``, and returns their number."""
    found = [name for name in dict.fromkeys(names) if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, folder / name)
    return len(found)
