"""Mutations of GGUF files, and the check of what :func:`peft_ext.gguf.read_header` makes of a file."""

from __future__ import annotations

import functools
import random
import struct
from pathlib import Path

import gguf_files as gf

from peft_ext.gguf import GgufError, check_model, check_tokenizer, read_header
from peft_ext.weights.gguf import TYPES

DENSE = {0: 4, 1: 2, 28: 8, 30: 2, **gf.INTEGERS}  # type number of ggml's dense types -> bytes of an element

_NUMBERS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 14, 31, 32, 33, 64, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 32, 2**32 - 1)
_LONG = (*_NUMBERS, 2**32, 2**33, 2**40, 2**58, 2**59, 2**60, 2**62, 2**63 - 32, 2**63 - 1, 2**63, 2**63 + 32,
         2**64 - 64, 2**64 - 34, 2**64 - 32, 2**64 - 8, 2**64 - 1)  # fmt: skip


@functools.cache
def seeds() -> tuple[tuple[bytes, tuple[tuple[int, int], ...], int], ...]:
    """Returns valid files: the bytes, offset and size of each number, and the number of bytes before the data."""
    every = [(f"k{kind}", kind, True if kind == gf.BOOL else 1) for kind in gf.FORMATS]
    arrays = [(f"a{kind}", gf.ARRAY, (kind, [1, 0, 1])) for kind in gf.FORMATS]
    arrays.append(("texts", gf.ARRAY, (gf.STRING, ["", "a", "日本"])))
    dense = [(f"t{kind}", (2, 3), kind, bytes(range(6 * size))) for kind, size in DENSE.items()]
    blocks = [(f"q{kind}", (one.columns, 2), kind, bytes(2 * one.bytes)) for kind, one in TYPES.items()]
    align = ("general.alignment", gf.U32, 64)
    made = [
        gf.model_file(layers=1),
        gf.written([("general.architecture", gf.STRING, "llama"), *every, *arrays], gf.placed(dense)),
        gf.written([align], gf.placed(blocks, 64), alignment=64),
        gf.written([align, ("x", gf.STRING, "y")], gf.placed(dense[:2], 64), version=2, alignment=64),
        gf.written(arrays),
    ]
    return tuple((bytes(one.out), tuple(one.fields), max(at + size for at, size in one.fields)) for one in made)


def mutated(draw: random.Random) -> bytes:
    """Returns a valid file with one to three mutations, most of which are in the header."""
    data, fields, header = draw.choice(seeds())
    held = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        _mutate(held, fields, min(header, len(held)), draw)
    return bytes(held)


def _mutate(held: bytearray, fields: tuple[tuple[int, int], ...], header: int, draw: random.Random) -> None:
    at, end = sorted(draw.randrange(header + 1) for _ in range(2))
    end = min(end, at + draw.choice((1, 4, 8, 40, header)))
    kind = draw.randrange(8)
    if kind <= 2:
        place, size = draw.choice(fields)
        held[place : place + size] = _number(size, len(held), draw)
    elif kind == 3:
        held[at : at + 8] = _number(8, len(held), draw)
    elif kind == 4:
        for _ in range(draw.choice((1, 1, 2, 8))):
            if header:
                held[draw.randrange(header)] ^= 1 << draw.randrange(8)
    elif kind == 5:
        del held[draw.randrange(len(held) + 1) if draw.random() < 0.5 else at :]
    elif kind == 6:
        other = draw.choice(seeds())[0]
        start = draw.randrange(len(other))
        held[at : draw.choice((at, end))] = other[start : start + end - at]
    else:
        held[draw.choice((at, end)) : end] = held[at:end] if draw.random() < 0.7 else b""


def _number(size: int, length: int, draw: random.Random) -> bytes:
    value = draw.choice(_LONG if size == 8 else _NUMBERS)
    if draw.random() < 0.3:
        value = max(0, length + draw.randrange(-40, 41))
    return struct.pack("<Q", value)[:size]


def outcome(path: Path) -> str:
    """Reads a file. Returns "refused", "taken", or "model" for a file that :func:`peft_ext.gguf.check_model` takes.

    Raises AssertionError where an error is not of one line, where a tensor lies outside the file or over another
    tensor, or where a value or tensor is not that of the file.
    """
    try:
        header = read_header(path)
    except GgufError as error:
        return _one_line(path, error)
    size, end = path.stat().st_size, header.data_start
    data = path.read_bytes()
    for info in sorted(header.tensors.values(), key=lambda one: one.offset):
        count = 1
        for one in info.shape:
            count *= one
        columns, block = TYPES[info.type][1:3] if info.type in TYPES else (1, DENSE[info.type])
        assert len(info.shape) in range(1, 5) and min(info.shape) > 0 and info.shape[-1] % columns == 0
        assert info.nbytes == count // columns * block
        assert end <= info.offset and info.offset + info.nbytes <= size, info
        assert (info.offset - header.data_start) % header.alignment == 0
        end = info.offset + info.nbytes
        held = header.data(info.name)
        assert held.numpy().tobytes() == data[info.offset : end] if info.type != 30 else held.nbytes == info.nbytes
    for key in header.keys:
        assert isinstance(header.get(key), (int, float, str, list)), key
    try:
        check_model(header)
        check_tokenizer(header)
    except GgufError as error:
        _one_line(path, error)
        return "taken"
    return "model"


def _one_line(path: Path, error: GgufError) -> str:
    text = str(error)
    assert text.startswith(f"{path}: ") and text.isprintable() and len(text) < len(str(path)) + 400, text
    return "refused"


def equal_to_library(path: Path) -> None:
    """Compares values and tensors with those of the package gguf, which must read the file, too. Returns nothing."""
    from gguf import GGUFReader

    header, reader = read_header(path), GGUFReader(path)
    assert {key: repr(header.get(key)) for key in header.keys} == {
        key: repr(field.contents()) for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    assert header.data_start == reader.data_offset and len(header.tensors) == len(reader.tensors)
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert (info.offset, info.nbytes, info.type) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert info.shape == tuple(map(int, tensor.shape[::-1]))
