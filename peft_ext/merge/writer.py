"""Writes the files of a merged model, one tensor at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Optional

import torch
from torch import Tensor

from .._imports import required
from ..sources.model import load_tokenizer
from ..sources.weight_files import safetensors_header
from .base import Base
from .errors import as_merge_error, fail

with required("transformers", "peft_ext.merge_to_dense"):
    from transformers import PretrainedConfig

TOKENIZER_CONFIG = "tokenizer_config.json"
# Files of the tokenizer and the chat template, which are copied from the adapter or the base.
_TOKENIZER = (
    "tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
# Files of the processor, which are copied from the base.
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def write_safetensors(
    stream: BinaryIO, planned: dict[str, Tensor], take: Callable[[str], Tensor], advance: Callable[[int], None]
) -> None:
    """Writes a safetensors file one tensor at a time; safetensors' own writer needs all tensors in memory.

    Tensors of wide dtypes come first, so that each tensor is aligned. ``take(name)`` returns the tensor ``name``;
    ``advance(n)`` is called after each tensor, with the tensor's n bytes.
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


def write_beside(base: Base, config: PretrainedConfig, adapter: Path, folder: Path) -> Optional[Path]:
    """Copies tokenizer files and the base's processor files, writes generation_config.json, if the base has this file
    or generates text, and then writes config.json.

    config.json is written last, because a folder without config.json can't be loaded as a model.

    Returns the folder or the GGUF file whose tokenizer was written: the adapter's folder if the folder has
    tokenizer_config.json, else the base's; None where neither has tokenizer files.
    """
    model = base.model
    tokenizer = adapter if (adapter / TOKENIZER_CONFIG).is_file() else base.folder
    if tokenizer is not None and tokenizer.is_file():
        with as_merge_error(ValueError):
            load_tokenizer(str(tokenizer)).save_pretrained(folder)
    elif tokenizer is not None:
        if not _copy(_TOKENIZER, tokenizer, folder):
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


def _copy(names: tuple[str, ...], source: Path, folder: Path) -> int:
    """Copies the files ``names`` that are in ``source``, and returns their number."""
    found = [name for name in names if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, folder / name)
    return len(found)
