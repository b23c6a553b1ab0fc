"""Writes a GGUF file with the metadata of another file and other tensors, one tensor at a time.

``GGUFWriter`` of the package gguf writes metadata from Python values. The function :func:`write_gguf` copies the bytes
of the metadata, so that the order and the types of all keys stay, and the vocabulary is not decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import IO, NamedTuple, Optional

import torch
from torch import Tensor

from ..gguf import GgufHeader

_TENSOR_COUNT_AT = 8  # offset of the number of tensors: after "GGUF" and the version
_UINT32 = 4  # GGUF's number of the value type uint32


class PlannedTensor(NamedTuple):
    """One tensor of the new file: sizes in PyTorch's order, ggml's type, and the number of bytes."""

    shape: tuple[int, ...]
    type: int
    nbytes: int


def _head(header: GgufHeader) -> bytearray:
    """Returns the bytes of the file from the start to the end of the metadata."""
    with header.path.open("rb") as file:
        return bytearray(file.read(header.values_end))


def file_type_offset(header: GgufHeader) -> Optional[int]:
    """Returns the offset of the value of ``general.file_type``; None unless the metadata has exactly one key of this
    name with a uint32 as its value."""
    key = b"general.file_type"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<I", _UINT32)
    head = _head(header)
    return head.index(entry) + len(entry) if head.count(entry) == 1 else None


def _table(tensors: dict[str, PlannedTensor], alignment: int) -> bytes:
    """Returns the part of a GGUF header that lists names, sizes, types and offsets of the tensors."""
    parts, offset = [], 0
    for name, one in tensors.items():
        text = name.encode()
        sizes = one.shape[::-1]  # a GGUF file lists the number of columns first
        parts.append(struct.pack("<Q", len(text)) + text + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        parts.append(struct.pack("<IQ", one.type, offset))
        offset = _padded(offset + one.nbytes, alignment)
    return b"".join(parts)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def file_size(header: GgufHeader, tensors: dict[str, PlannedTensor]) -> int:
    """Returns the number of bytes that :func:`write_gguf` writes."""
    start = _padded(header.values_end + len(_table(tensors, header.alignment)), header.alignment)
    return start + sum(_padded(one.nbytes, header.alignment) for one in tensors.values())


def write_gguf(
    file: IO[bytes],
    header: GgufHeader,
    tensors: dict[str, PlannedTensor],
    take: Callable[[str], Tensor],
    file_type: Optional[int] = None,
) -> None:
    """Writes a GGUF file with other tensors and with the metadata of ``header``'s file, byte for byte except for
    ``file_type``.

    Args:
        tensors: a dict that maps the name of each tensor of the new file to its :class:`PlannedTensor`, in the file's
            order.
        take: function that returns the data of the named tensor, ``nbytes`` bytes. ``take`` is called once for each
            tensor, in order.
        file_type: the new value of ``general.file_type``; None: the value does not change. With a new value,
            :func:`file_type_offset` must not return None.
    """
    alignment = header.alignment
    head = _head(header)
    struct.pack_into("<Q", head, _TENSOR_COUNT_AT, len(tensors))
    if file_type is not None:
        struct.pack_into("<I", head, file_type_offset(header), file_type)
    head += _table(tensors, alignment)
    file.write(head + bytes(_padded(len(head), alignment) - len(head)))
    for name, one in tensors.items():
        data = take(name).contiguous().reshape(-1).view(torch.uint8)
        if data.numel() != one.nbytes:
            raise RuntimeError(f"write_gguf: {name} has {data.numel()} bytes, wanted {one.nbytes}")
        file.write(data.numpy().data)
        file.write(bytes(_padded(one.nbytes, alignment) - one.nbytes))
