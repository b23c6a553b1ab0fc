"""Reads and checks the header of a GGUF file: metadata, and each tensor's type, shape and place in the file.

A GGUF file is a header and the tensors' bytes::

    "GGUF"  version u32  number of tensors u64  number of keys u64
    for each key:     name  type u32  value
    for each tensor:  name  number of sizes u32  sizes u64 (columns first)  type u32  offset u64
    padding to a multiple of general.alignment, then the tensors

All numbers are little-endian. A string is its length as u64 and its UTF-8 bytes. Everything in the header is checked
against the size of the file before any memory is allocated for the tensors.

Source: the specification of GGUF in ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from ..weights.gguf import TYPES, dense_dtype, type_name

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_SIZES = 4  # GGML_MAX_DIMS.
_LONGEST_NAME = 65_535  # Largest number of bytes in a key, by the specification, and in a tensor's name.
# Bounds of memory and time: the package gguf takes some 500 bytes of memory for each element of an array.
_MOST_NAMES = 1 << 20  # Largest number of keys, and largest number of tensors.
_MOST_ELEMENTS = 1 << 22  # Largest number of elements in all arrays of the metadata together.

# Types of values: number of the type in the file -> format character of Python's struct. A bool is one byte.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U32, _STRING, _ARRAY = 4, 8, 9
_LENGTH = struct.Struct("<Q")  # format of the length of a string

# Number of one of ggml's integer types in the file -> PyTorch's dtype.
_INTEGERS = {24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64}


class GgufError(ValueError):
    """A GGUF file is damaged or has something that is not supported. The message is one line that names the file."""


class Value(NamedTuple):
    """A value of the metadata with two of GGUF's type numbers: the value's type, and the type of the elements if the
    value is an array, else None."""

    data: Any
    type: int
    element: Optional[int]


class _Place(NamedTuple):
    """The place of a value of the metadata in the file.

    ``type`` is GGUF's type of the value. For an array, ``element`` is the type of the elements and ``count`` is their
    number. For a value that is no array, ``element`` equals ``type`` and ``count`` is 1. ``offset`` is the position of
    the data in bytes.
    """

    type: int
    element: int
    count: int
    offset: int


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file, as the header describes it.

    Attributes:
        name: name of the tensor in the file.
        shape: sizes in PyTorch's order, rows before columns.
        type: ggml's number of the type of the tensor's elements, such as 12 for Q4_K.
        offset: position of the tensor's first byte in the file.
        nbytes: number of bytes that the tensor takes in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int

    @property
    def dtype(self) -> Optional[torch.dtype]:
        """dtype of a dense tensor; None for a quantized tensor."""
        return _INTEGERS[self.type] if self.type in _INTEGERS else dense_dtype(self.type)

    @property
    def type_name(self) -> str:
        return f"I{8 * self.dtype.itemsize}" if self.type in _INTEGERS else type_name(self.type)


class GgufHeader:
    """The checked header of a file, as :func:`read_header` returns it.

    Attributes:
        path: path of the GGUF file.
        version: version of the format, 2 or 3.
        tensors: a dict that maps the name of each tensor to its :class:`TensorInfo`, in the file's order.
        alignment: the offsets of the tensors are multiples of ``alignment`` bytes.
        values_end: position in the file of the first byte after the metadata.
        data_start: position in the file of the first byte of the tensors' data.
    """

    path: Path
    version: int
    tensors: dict[str, TensorInfo]
    alignment: int
    values_end: int
    data_start: int

    def __init__(self, path: Path, blob: Any, size: int) -> None:
        self.path, self._size = path, size
        reader = _Reader(path, blob, size)
        self.version, self._places, self.values_end = reader.metadata()
        self._reader = reader
        self.alignment = self.get("general.alignment", 32)
        # By the specification and in the package gguf, general.alignment is a u32.
        is_u32 = "general.alignment" not in self or self._places["general.alignment"].type == _U32
        if not is_u32 or self.alignment < 1 or self.alignment & (self.alignment - 1):
            raise self.error(f"general.alignment is {self.alignment!r:.60}, wanted a power of two, as u32")
        self.tensors, self.data_start = reader.tensors(self.values_end, self.alignment)

    def error(self, text: str) -> GgufError:
        return GgufError(f"{self.path}: {text}")

    def __contains__(self, key: str) -> bool:
        return key in self._places

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the metadata, in the file's order."""
        return tuple(self._places)

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of ``key``: a number, a bool, a str or a list; ``default`` where the key is missing."""
        place = self._places.get(key)
        return default if place is None else self._reader.value(place)

    def value(self, key: str) -> Value:
        """Returns the value of ``key`` with the value's GGUF types. Raises KeyError where the key is missing."""
        place = self._places[key]
        return Value(self._reader.value(place), place.type, place.element if place.type == _ARRAY else None)

    def text(self, key: str) -> str:
        """Returns the value of ``key``, which must be a string. Raises GgufError where the key is missing or has
        another type."""
        value = self.get(key)
        if not isinstance(value, str):
            raise self.error(f"{key} is {'missing' if value is None else repr(value)[:60]}, wanted a string")
        return value

    @property
    def architecture(self) -> str:
        return self.text("general.architecture")

    @cached_property
    def _mapped(self) -> mmap.mmap:
        # A private mapping: a page is read from the disk when it is first used, and a write never reaches the file.
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), self._size, access=mmap.ACCESS_COPY)

    def data(self, name: str) -> Tensor:
        """Returns a tensor of the file, mapped from the disk.

        A quantized tensor is returned as uint8, with the number of bytes of a row as the last size. A dense tensor is
        returned with its dtype and shape; the tensor is copied if its offset is no multiple of the dtype's size.
        """
        info = self.tensors[name]
        # frombuffer gives each tensor a storage of its own. torch.save and pickle write the whole storage of a tensor.
        raw = torch.frombuffer(self._mapped, dtype=torch.uint8, offset=info.offset, count=info.nbytes)
        if info.dtype is None:
            _, columns, size, _ = TYPES[info.type]
            return raw.view(*info.shape[:-1], info.shape[-1] // columns * size)
        if info.offset % info.dtype.itemsize:
            raw = raw.clone()
        return raw.view(info.dtype).view(info.shape)


def is_gguf(path: Union[str, Path]) -> bool:
    """Returns whether ``path`` is a file that starts with GGUF's magic bytes or whose name ends in ``.gguf``."""
    try:
        path = Path(path).expanduser()
        if not path.is_file():
            return False
        if path.suffix == ".gguf":
            return True
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except (OSError, RuntimeError):  # expanduser raises RuntimeError for a ~ of an unknown user
        return False


def read_header(path: Union[str, Path]) -> GgufHeader:
    """Returns the checked header of a GGUF file. No tensor is read.

    Raises:
        OSError: the file can't be read.
        GgufError: the file is damaged or not supported. For example: the file is not GGUF of version 2 or 3, or is
            truncated; the file has a name twice, or a type that is not known; a size overflows, or is no multiple of
            its type's block; tensors overlap, or lie past the end of the file.
    """
    path = Path(path).expanduser()
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
        raise GgufError(f"{path}: this is no regular file, wanted a GGUF file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(4)
        if start != MAGIC:
            raise GgufError(f"{path}: the first four bytes are {start!r}, wanted {MAGIC!r}: this is no GGUF file")
        blob = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return GgufHeader(path, blob, size)


class _Reader:
    """Reads the parts of the header, and checks each length against the bytes that are left."""

    def __init__(self, path: Path, blob: Any, size: int) -> None:
        self.path, self.blob, self.size = path, blob, size
        self.elements = 0  # number of elements in all arrays that were read

    def error(self, text: str) -> GgufError:
        return GgufError(f"{self.path}: {text}")

    def need(self, offset: int, count: int, what: str) -> None:
        if count > self.size - offset:
            raise self.error(f"the file ends in {what}: {count} bytes wanted at offset {offset}, the file has "
                             f"{self.size} bytes")  # fmt: skip

    def number(self, format: str, offset: int, what: str) -> tuple[Any, int]:
        size = struct.calcsize("<" + format)
        self.need(offset, size, what)
        return struct.unpack_from("<" + format, self.blob, offset)[0], offset + size

    def text(self, offset: int, what: str) -> tuple[str, int]:
        # A header can have some 300,000 strings, so this method calls no function that only an error needs.
        start = offset + 8
        if start > self.size:
            self.need(offset, 8, what)
        (length,) = _LENGTH.unpack_from(self.blob, offset)
        end = start + length
        if end > self.size:
            self.need(start, length, what)
        try:
            return self.blob[start:end].decode("utf-8"), end
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8") from None

    def name(self, offset: int, what: str) -> tuple[str, int]:
        name, end = self.text(offset, what)
        if not 0 < end - offset - 8 <= _LONGEST_NAME:
            raise self.error(f"{what} has {end - offset - 8} bytes, wanted 1 to {_LONGEST_NAME}")
        return name, end

    def metadata(self) -> tuple[int, dict[str, _Place], int]:
        """Returns a tuple: the file's version, a dict that maps each key of the metadata to the place of its value, and
        the offset of the first byte after the metadata."""
        version, offset = self.number("I", 4, "the version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            more = " (the file is big-endian)" if swapped else ""
            raise self.error(f"the version of GGUF is {version}{more}, wanted 2 or 3, little-endian")
        self.tensor_count, offset = self.number("Q", offset, "the number of tensors")
        keys, offset = self.number("Q", offset, "the number of keys")
        # A tensor takes at least 33 bytes of the header and a key at least 14.
        for count, least, what in ((self.tensor_count, 33, "tensors"), (keys, 14, "keys")):
            if count * least > self.size:
                raise self.error(f"the header announces {count} {what}, more than the file of {self.size} bytes holds")
            if count > _MOST_NAMES:
                raise self.error(f"the header announces {count} {what}, wanted at most {_MOST_NAMES}")
        places: dict[str, _Place] = {}
        for index in range(keys):
            key, offset = self.name(offset, f"key {index} of the metadata")
            if key in places:
                raise self.error(f"the key {key!r:.80} is in the metadata twice")
            places[key], offset = self.place(offset, f"the value of {key!r:.80}")
        return version, places, offset

    def place(self, offset: int, what: str) -> tuple[_Place, int]:
        """Checks the value at ``offset``, and returns its place and the offset of the first byte after the value."""
        type, offset = self.number("I", offset, what)
        element, count = type, 1
        if type == _ARRAY:
            element, offset = self.number("I", offset, what)
            count, offset = self.number("Q", offset, what)
            self.elements += count
            if self.elements > _MOST_ELEMENTS:
                raise self.error(f"the arrays of the metadata have {self.elements} elements or more, wanted at most "
                                 f"{_MOST_ELEMENTS}")  # fmt: skip
        place = _Place(type, element, count, offset)
        if element in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[element]) * count
            self.need(offset, size, what)
            return place, offset + size
        if element != _STRING:
            raise self.error(f"{what} has type {element}, wanted a number, bool, string or array of these")
        self.need(offset, 8 * count, what)
        for _ in range(count):
            _, offset = self.text(offset, what)
        return place, offset

    def value(self, place: _Place) -> Any:
        if place.element == _STRING:
            values, offset = [], place.offset
            for _ in range(place.count):
                value, offset = self.text(offset, "a string")
                values.append(value)
        else:
            values = list(struct.unpack_from(f"<{place.count}{_SCALARS[place.element]}", self.blob, place.offset))
        return values if place.type == _ARRAY else values[0]

    def tensors(self, offset: int, alignment: int) -> tuple[dict[str, TensorInfo], int]:
        """Returns a dict that maps names to the tensors that the header lists from ``offset`` on, and the position of
        the tensors' data."""
        found: dict[str, TensorInfo] = {}
        for index in range(self.tensor_count):
            name, offset = self.name(offset, f"the name of tensor {index}")
            about = f"tensor {name!r:.80}"
            if name in found:
                raise self.error(f"{about} is in the file twice")
            sizes, offset = self.number("I", offset, about)
            if not 1 <= sizes <= _MOST_SIZES:
                raise self.error(f"{about} has {sizes} sizes, wanted 1 to {_MOST_SIZES}")
            self.need(offset, 8 * sizes, about)
            shape = struct.unpack_from(f"<{sizes}Q", self.blob, offset)[::-1]
            type, offset = self.number("I", offset + 8 * sizes, about)
            start, offset = self.number("Q", offset, about)
            if start % alignment:
                raise self.error(f"{about} is at offset {start} of the data, wanted a multiple of {alignment}")
            found[name] = TensorInfo(name, shape, type, start, self.nbytes(about, shape, type))
        data_start = -(-offset // alignment) * alignment
        placed = {name: TensorInfo(name, one.shape, one.type, data_start + one.offset, one.nbytes)
                  for name, one in found.items()}  # fmt: skip
        self.check_places(placed)
        return placed, data_start

    def nbytes(self, about: str, shape: tuple[int, ...], type: int) -> int:
        count = math.prod(shape)
        if count == 0 or count >= 1 << 63:
            raise self.error(f"{about} has the sizes {shape}, wanted 1 to 2**63 - 1 elements")
        if type in _INTEGERS:
            return count * _INTEGERS[type].itemsize
        if type not in TYPES:
            try:
                return count * dense_dtype(type).itemsize
            except ValueError:
                raise self.error(f"{about} has ggml's type {type}, which is not known") from None
        name, columns, size, _ = TYPES[type]
        if shape[-1] % columns:
            raise self.error(f"{about} has {shape[-1]} columns, wanted a multiple of {columns}, the block of {name}")
        return count // columns * size

    def check_places(self, tensors: dict[str, TensorInfo]) -> None:
        """Raises GgufError for tensors that overlap or lie past the end of the file."""
        end, before = 0, ""
        for one in sorted(tensors.values(), key=lambda one: one.offset):
            about = f"tensor {one.name!r:.80}"
            if one.offset + one.nbytes > self.size:
                raise self.error(f"{about} ends at offset {one.offset + one.nbytes}, past the end of the file of "
                                 f"{self.size} bytes: the file is truncated")  # fmt: skip
            if one.offset < end:
                raise self.error(f"{about} overlaps tensor {before!r:.80}")
            end, before = one.offset + one.nbytes, one.name
