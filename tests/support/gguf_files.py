"""Writes GGUF files byte by byte, valid and broken, without the package gguf."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
INTEGERS = {24: 1, 25: 2, 26: 4, 27: 8}  # ggml's types of integers, and bytes of an element

# A key, its type, and its value. The value of an array is (type of an element, elements).
Key = tuple[Any, int, Any]
# A tensor's name, its sizes with the columns first, ggml's type, the offset in the data, and its bytes.
TensorOf = tuple[Any, Sequence[int], int, int, bytes]


@dataclass
class Writer:
    """The bytes of a header, and the places of its numbers: ``fields`` has offset and size of each number in bytes."""

    out: bytearray = field(default_factory=bytearray)
    fields: list[tuple[int, int]] = field(default_factory=list)

    def number(self, kind: int, value: Any) -> None:
        data = struct.pack("<" + FORMATS[kind], value)
        self.fields.append((len(self.out), len(data)))
        self.out += data

    def text(self, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else value
        self.number(U64, len(data))
        self.out += data

    def value(self, kind: int, value: Any) -> None:
        if kind == ARRAY:
            element, values = value
            self.number(U32, element)
            self.number(U64, len(values))
            for one in values:
                self.value(element, one)
        elif kind == STRING:
            self.text(value)
        elif isinstance(value, bytes):
            self.out += value
        else:
            self.number(kind, value)


def written(
    keys: Sequence[Key] = (),
    tensors: Sequence[TensorOf] = (),
    version: int = 3,
    alignment: int = 32,
    counts: tuple[Optional[int], Optional[int]] = (None, None),
    data: bool = True,
) -> Writer:
    """Returns a file. ``counts``: numbers of tensors and keys that the header announces instead of the true numbers."""
    file = Writer(bytearray(b"GGUF"))
    file.number(U32, version)
    for count, items in zip(counts, (tensors, keys), strict=True):
        file.number(U64, len(items) if count is None else count)
    for name, kind, value in keys:
        file.text(name)
        file.number(U32, kind)
        file.value(kind, value)
    for name, sizes, kind, offset, _ in tensors:
        file.text(name)
        file.number(U32, len(sizes))
        for size in sizes:
            file.number(U64, size)
        file.number(U32, kind)
        file.number(U64, offset)
    if not data:
        return file
    file.out += bytes(-len(file.out) % alignment)
    start = len(file.out)
    for *_, offset, values in tensors:
        if not values:
            continue
        file.out += bytes(max(0, start + offset - len(file.out)))
        file.out[start + offset : start + offset + len(values)] = values
    return file


def placed(tensors: Sequence[tuple[str, Sequence[int], int, bytes]], alignment: int = 32) -> list[TensorOf]:
    """Returns the tensors at the first aligned offsets."""
    found: list[TensorOf] = []
    at = 0
    for name, sizes, kind, values in tensors:
        found.append((name, sizes, kind, at, values))
        at += -(-len(values) // alignment) * alignment
    return found


def model_keys(architecture: str = "llama", layers: int = 2, tokens: int = 6) -> dict[str, tuple[int, Any]]:
    """Returns type and value of each key of a tiny model with 32 columns, 4 heads and 2 key-value heads."""
    names = ["<s>", "</s>", "a", "b", "ab", "c"][:tokens]
    of = {
        "block_count": (U32, layers), "context_length": (U32, 64), "embedding_length": (U32, 32),
        "feed_forward_length": (U32, 64), "attention.head_count": (U32, 4), "attention.head_count_kv": (U32, 2),
        "attention.layer_norm_rms_epsilon": (F32, 2.0**-17), "rope.freq_base": (F32, 10_000.0),
        "vocab_size": (U32, tokens),
    }  # fmt: skip
    if architecture == "lfm2":
        of["attention.head_count_kv"] = (ARRAY, (I32, [0, *[2] * (layers - 1)]))
        of["shortconv.l_cache"] = (U32, 3)
    return {
        "general.architecture": (STRING, architecture),
        "general.type": (STRING, "model"),
        "general.name": (STRING, "tiny"),
        **{f"{architecture}.{key}": value for key, value in of.items()},
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "smollm"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, names)),
        "tokenizer.ggml.token_type": (ARRAY, (I32, [3, 3, 1, 1, 1, 1][:tokens])),
        "tokenizer.ggml.merges": (ARRAY, (STRING, ["a b"])),
        "tokenizer.ggml.bos_token_id": (U32, 0),
        "tokenizer.ggml.eos_token_id": (U32, 1),
        "tokenizer.ggml.unknown_token_id": (U32, 0),
        "tokenizer.ggml.add_bos_token": (BOOL, False),
        "tokenizer.chat_template": (STRING, "{{ messages[0]['content'] }}"),
    }


def model_tensors(layers: int = 2, tokens: int = 6) -> dict[str, tuple[Sequence[int], int, bytes]]:
    """Returns sizes, type and bytes of some tensors of the model of :func:`model_keys`, in Q8_0 and F32."""

    def q8_0(rows: int, columns: int) -> tuple[Sequence[int], int, bytes]:
        return (columns, rows), 8, bytes(range(34)) * (rows * columns // 32)

    found = {"token_embd.weight": q8_0(tokens, 32), "output_norm.weight": ((32,), 0, bytes(128))}
    for layer in range(layers):
        found[f"blk.{layer}.attn_q.weight"] = q8_0(32, 32)
        found[f"blk.{layer}.ffn_down.weight"] = q8_0(32, 64)
        found[f"blk.{layer}.attn_norm.weight"] = ((32,), 0, bytes(128))
    return found


def model_file(
    architecture: str = "llama",
    keys: Callable[[dict[str, tuple[int, Any]]], Any] = lambda keys: None,
    tensors: Callable[[dict[str, tuple[Sequence[int], int, bytes]]], Any] = lambda tensors: None,
    layers: int = 2,
) -> Writer:
    """Returns the file of a tiny model, whose keys and tensors the two functions change in place."""
    metadata, weights = model_keys(architecture, layers), model_tensors(layers)
    keys(metadata)
    tensors(weights)
    return written(
        [(key, *value) for key, value in metadata.items()], placed([(name, *one) for name, one in weights.items()])
    )
