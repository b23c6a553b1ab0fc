"""Reads parts of the tensors in a model's safetensors files, without mapping the files into memory.

``safetensors.safe_open`` maps a whole file into memory, and each page that was read counts as resident memory of the
process while the file is open. :class:`TensorFiles` reads bytes into new tensors, so that the resident memory grows by
the bytes of these tensors only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from .json_file import first_line, parse, read_object
from .model import INDEX, WEIGHTS, SourceError, check_index
from .weight_files import DTYPES, weight_shapes

_DTYPES = {name: dtype for dtype, name in DTYPES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: the file, the tensor's dtype and shape, and the position of the tensor's first byte in the
    file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class TensorFiles:
    """The tensors of ``model.safetensors``, or of the files that ``model.safetensors.index.json`` names, in a folder.

    ``entries`` maps the name of each tensor to its :class:`Entry`.

    Raises: SourceError, one line with the file's path, where a file is missing, cut off or no safetensors, where a file
    lacks a tensor that the index names, or where a tensor has a dtype that peft_ext does not read.
    """

    def __init__(self, folder: Path) -> None:
        self.entries: dict[str, Entry] = {}
        self._open: dict[Path, BufferedReader] = {}
        try:
            self._read_headers(folder)
        except OSError as error:
            named = f"{error.filename}: " if error.filename else ""
            raise SourceError(f"model {named}{error.strerror or first_line(error)}") from error
        except SourceError:
            raise
        except ValueError as error:
            raise SourceError(f"model {first_line(error)}") from error

    def _read_headers(self, folder: Path) -> None:
        index = folder / INDEX
        if (folder / WEIGHTS).is_file() or not index.is_file():
            self.entries = _entries(folder / WEIGHTS)
            return
        check_index(index)
        places: dict[str, str] = read_object(index)["weight_map"]
        files = {name: _entries(folder / name) for name in sorted(set(places.values()))}
        for tensor, name in places.items():
            if tensor not in files[name]:
                raise SourceError(f"model {folder / name}: no tensor {tensor}, which {INDEX} names")
            self.entries[tensor] = files[name][tensor]

    def rows(self, name: str, start: int = 0, end: Optional[int] = None) -> Tensor:
        """Returns the rows ``start`` to ``end`` (exclusive) of the tensor ``name``, on the CPU, in the file's dtype.

        Rows are the indices of dimension 0. A tensor without dimensions is returned whole. Raises SourceError where the
        file can't be read.
        """
        entry = self.entries[name]
        rows, *others = entry.shape or (1,)
        end = rows if end is None else end
        width = entry.dtype.itemsize * math.prod(others)
        opened, held = self.open(entry.file), torch.empty((end - start) * width, dtype=torch.uint8)
        try:
            opened.seek(entry.offset + start * width)
            if opened.readinto(held.numpy()) != held.numel():
                raise OSError("the file ends before the tensor does")
        except OSError as error:
            raise SourceError(f"model {entry.file}: {name}: {error.strerror or error}") from error
        shape = (end - start, *others) if entry.shape else ()
        return held.view(entry.dtype).view(shape)

    def open(self, file: Path) -> BufferedReader:
        """Opens ``file`` if it is not open yet, and returns the open file. Raises SourceError if opening fails."""
        if file not in self._open:
            try:
                self._open[file] = file.open("rb")
            except OSError as error:
                raise SourceError(f"model {file}: {error.strerror}") from error
        return self._open[file]

    def close(self) -> None:
        """Closes the files. A later call of :meth:`rows` opens a file again."""
        while self._open:
            self._open.popitem()[1].close()


def _entries(file: Path) -> dict[str, Entry]:
    """Returns a dict that maps the name of each tensor in a safetensors file to the tensor's :class:`Entry`. Raises
    ValueError, one line with the file's path, for a damaged file or an unknown dtype, and OSError where the file can't
    be read."""
    shapes = weight_shapes(file)  # safetensors checks the header and the file's size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, dict[str, Any]] = parse(f"{file}: header", opened.read(length).decode(), has_lines=False)
    found = {}
    for name, shape in shapes.items():
        kind = header[name]["dtype"]
        if kind not in _DTYPES:
            raise ValueError(f"{file}: {name} is {kind}, wanted one of {', '.join(sorted(_DTYPES))}")
        found[name] = Entry(file, _DTYPES[kind], shape, 8 + length + header[name]["data_offsets"][0])
    return found
