"""Checks the tensors of a safetensors file, and makes the header of a new file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .json_file import first_line, shown

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def weight_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Returns a dict that maps the name of each tensor in a safetensors file to the tensor's shape, as the file's
    header has it. Raises ValueError, one line, where the file is damaged or the weights are a pickle, and OSError where
    the file can't be read."""
    if not file.is_file():
        if (pickle := file.with_suffix(".bin")).is_file():
            raise ValueError(f"{file.parent} has {pickle.name}, a pickle, and no {file.name}. A pickle runs code as it "
                             "is read: save the adapter again with safe_serialization=True")  # fmt: skip
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    try:
        with safe_open(file, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    except (SafetensorError, ValueError, OverflowError) as error:
        raise ValueError(f"{file}: {first_line(error)}") from None


def check_floats(file: Path, prefix: str) -> None:
    """Raises ValueError if a tensor whose name contains ``prefix`` has no float dtype, because PEFT would cast the
    tensor."""
    with safe_open(file, "pt") as opened:
        for name in opened.keys():
            dtype = opened.get_slice(name).get_dtype()
            if prefix in name and not dtype.startswith(("F", "BF")):
                raise ValueError(f"{file}: {shown(name)} is {dtype}, wanted floats")


def check_finite(file: Path) -> None:
    """Raises ValueError if a tensor in the safetensors ``file``, except a tensor of 8-bit floats, has a number that is
    not finite, for example after a bit error on the disk."""
    with safe_open(file, "pt") as opened:
        for name in opened.keys():
            tensor = opened.get_tensor(name)
            if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.isfinite().all():
                raise ValueError(f"{file}: {name} has values that are not finite")


def safetensors_header(tensors: Mapping[str, Tensor]) -> bytes:
    """Returns the header of a safetensors file of ``tensors``, which may be on the meta device.

    The first 8 bytes of the header are the length of the JSON text that follows, little-endian. Spaces pad the JSON
    text to a multiple of 8 bytes. In the file, the data of the tensors follows the header, in the order of ``tensors``
    and without gaps. Raises ValueError for a dtype that the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}, a dtype that safetensors does not have")
        end = offset + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
