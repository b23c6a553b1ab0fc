"""Writes GGUF files with small vocabularies. A text's tokens show how the tokenizer divided the text into words."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import gguf_files as gf
from gguf_files import ARRAY, BOOL, F32, I32, STRING, U32
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = bytes_to_unicode()  # byte -> the character that stands for the byte in a byte-level vocabulary


def in_bytes(text: str) -> str:
    """Returns a text as a byte-level vocabulary spells it, with one character for each byte."""
    return "".join(BYTES[byte] for byte in text.encode())


def write_vocabulary(
    path: Path, tokens: Sequence[str], types: Sequence[int], keys: dict[str, tuple[int, Any]],
    architecture: str = "llama",
) -> Path:  # fmt: skip
    """Writes a GGUF file with the vocabulary ``tokens`` and the additional metadata ``keys``. ``types``: the type of
    each token: 1 for a normal token, 2 for the unknown token, 3 for a control token, 6 for a byte."""

    def edit(metadata: dict[str, Any]) -> None:
        for key in [key for key in metadata if key.startswith("tokenizer.")]:
            del metadata[key]
        metadata |= {
            f"{architecture}.vocab_size": (U32, len(tokens)),
            "tokenizer.ggml.tokens": (ARRAY, (STRING, list(tokens))),
            "tokenizer.ggml.token_type": (ARRAY, (I32, list(types))),
            **keys,
        }

    embedding = gf.model_tensors(tokens=len(tokens))["token_embd.weight"]
    path.write_bytes(gf.model_file(architecture, edit, lambda all: all.update({"token_embd.weight": embedding})).out)
    return path


def write_byte_level(
    path: Path, pre: Optional[str], merges: Sequence[tuple[str, str]] = (), words: Sequence[str] = (),
    more: Optional[dict[str, tuple[int, Any]]] = None, bos: str = "<s>", raw: Optional[dict[str, int]] = None,
) -> Path:  # fmt: skip
    """Writes a file with the byte-level vocabulary of all bytes, the results of ``merges``, and ``words``.

    ``pre``: the value of ``tokenizer.ggml.pre``; None: the file has no such key. ``bos``: the text of token 0, the BOS
    token; token 1 is the EOS token. ``raw``: a dict from tokens that are not spelled in bytes to their types.
    """
    raw = raw or {}
    spelled = {in_bytes(token): token for token in raw}
    pairs = [(in_bytes(a), in_bytes(b)) for a, b in merges]
    made = dict.fromkeys([*BYTES.values(), *(a + b for a, b in pairs), *map(in_bytes, words), *spelled])
    tokens = [spelled.get(one, one) for one in made]
    keys: dict[str, tuple[int, Any]] = {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.merges": (ARRAY, (STRING, [f"{a} {b}" for a, b in pairs])),
        "tokenizer.ggml.bos_token_id": (U32, 0),
        "tokenizer.ggml.eos_token_id": (U32, 1),
        **(more or {}),
    }
    if pre is not None:
        keys["tokenizer.ggml.pre"] = STRING, pre
    return write_vocabulary(path, [bos, "</s>", *tokens], [3, 3, *(raw.get(one, 1) for one in tokens)], keys)


def all_pairs(characters: str) -> list[tuple[str, str]]:
    """Returns a merge for each pair of ASCII characters, so that two neighbours in one word mostly become a token."""
    return list(itertools.product(characters, characters))


def write_sentencepiece(path: Path, prefix: Optional[bool], architecture: str = "llama", kind: str = "llama") -> Path:
    """Writes a file with a vocabulary of SentencePiece. ``prefix``: the value of ``tokenizer.ggml.add_space_prefix``;
    None: no such key. ``kind``: the value of ``tokenizer.ggml.model``."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, "▁", "a", "b", "▁a", "ab", "▁ab", "▁b"]
    scores = [0.0] * 259 + [-10.0, -11.0, -12.0, -1.0, -3.0, -2.0, -4.0]
    keys: dict[str, tuple[int, Any]] = {
        "tokenizer.ggml.model": (STRING, kind),
        "tokenizer.ggml.pre": (STRING, "default"),
        "tokenizer.ggml.scores": (ARRAY, (F32, scores)),
        "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.eos_token_id": (U32, 2),
        "tokenizer.ggml.unknown_token_id": (U32, 0),
        "tokenizer.ggml.add_bos_token": (BOOL, False),
    }
    if prefix is not None:
        keys["tokenizer.ggml.add_space_prefix"] = BOOL, prefix
    return write_vocabulary(path, tokens, [2, 3, 3, *[6] * 256, *[1] * 7], keys, architecture)
