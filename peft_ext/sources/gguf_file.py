"""Reads the configuration and the quantization of a base model from one GGUF file; each error is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Union

import torch

from ..gguf import GgufHeader, is_gguf, read_header
from .json_file import raised_as


def gguf_path(name: Union[str, Path, None]) -> Optional[Path]:
    """Returns the path of the GGUF file ``name``; returns None if ``name`` is None or names no GGUF file."""
    return Path(name).expanduser().resolve() if name is not None and is_gguf(name) else None


def read_gguf(path: Path, error: type[Exception]) -> GgufHeader:
    """Returns the checked header of a GGUF file. Raises ``error``, one line, if the file is damaged or can't be
    read."""
    with raised_as(error, "", OSError, ValueError):
        return read_header(path)


def gguf_config(path: Path, error: type[Exception]) -> Any:
    """Returns the transformers configuration of the model in a GGUF file. Raises ``error``, one line, if the file is
    damaged, the model is not supported, or a package is missing."""
    with raised_as(error, "", OSError, ValueError, ImportError):
        from ..gguf.metadata import read_config

        return read_config(read_header(path))


def gguf_dtype(header: GgufHeader) -> torch.dtype:
    """Returns the floating-point dtype that most elements of a GGUF file's matrices have, where quantized matrices
    count as bfloat16."""
    sizes = {torch.bfloat16: 0}
    for info in header.tensors.values():
        dtype = torch.bfloat16 if info.dtype is None else info.dtype
        if len(info.shape) > 1 and dtype.is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + torch.Size(info.shape).numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def gguf_quantization(header: GgufHeader) -> str:
    """Returns the names of a GGUF file's quantized types, the type with the most bytes first: "gguf Q4_K, Q6_K"."""
    sizes: dict[str, int] = {}
    for info in header.tensors.values():
        if info.dtype is None:
            sizes[info.type_name] = sizes.get(info.type_name, 0) + info.nbytes
    return f"gguf {', '.join(sorted(sizes, key=lambda name: -sizes[name]))}" if sizes else "gguf"
