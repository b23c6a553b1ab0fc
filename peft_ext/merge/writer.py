"""Writes the files of a merged model, one tensor at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .._imports import required
from ..sources.model import load_tokenizer
from ..sources.weight_files import safetensors_header
from .base import Base
from .errors import as_merge_error, fail

with required("transformers", "peft_ext.merge_to_dense"):
    from transformers import PretrainedConfig

# Files of the tokenizer, the chat template and the processor, which are copied from the base.
_BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip


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


def write_beside(base: Base, config: PretrainedConfig, folder: Path) -> None:
    """Copies the base's tokenizer files, and writes generation_config.json, if the base has one, and then config.json.

    config.json is written last, because a folder without config.json can't be loaded as a model.
    """
    model = base.model
    if base.folder is not None and base.folder.is_file():
        with as_merge_error(ValueError):
            load_tokenizer(str(base.folder)).save_pretrained(folder)
    for name in _BESIDE if base.folder is not None else ():
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    if base.folder is not None and (base.folder / "additional_chat_templates").is_dir():
        shutil.copytree(base.folder / "additional_chat_templates", folder / "additional_chat_templates")
    about = None if base.folder is None else base.folder / "generation_config.json"
    if about is not None and about.is_file():
        shutil.copyfile(about, folder / about.name)
    elif model.can_generate() and model.generation_config is not None:
        with as_merge_error(ValueError, about="the model's generation_config: "):
            model.generation_config.save_pretrained(folder)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
