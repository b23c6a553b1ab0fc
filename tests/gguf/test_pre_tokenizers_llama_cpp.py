"""Compares the tokens of GGUF files with the tokens that llama.cpp itself gives."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
import llama_cpp
from gguf_files import BOOL
from gguf_vocabularies import all_pairs, write_byte_level, write_sentencepiece
from test_loaded import smollm2

from peft_ext.gguf import GgufError, metadata, read_header
from peft_ext.gguf import pre_tokenizers as own
from peft_ext.gguf.metadata import read_tokenizer
from peft_ext.sources.model import load_tokenizer

pytestmark = [pytest.mark.cpu_only("files are read on the CPU"), pytest.mark.filterwarnings("ignore")]

CHARACTERS = "aB1 \n.'s"
OTHERS = "aBc123 \n\t\r.,'s(=$é中Å½_!?/-"


@contextmanager
def theirs(file: Path) -> Iterator[Any]:
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    try:
        yield lambda text, special=False: model.tokenize(text.encode(), add_bos=special, special=False)
    finally:
        model.close()


def texts(count: int, characters: str = OTHERS) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(characters, k=draw.randrange(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("name", [*sorted(own._EXPRESSIONS), None])
def test_words(name: str | None, tmp_path: Path) -> None:
    file = write_byte_level(tmp_path / "a.gguf", name, all_pairs(CHARACTERS), ["aBa", "11", " aB1"])
    tokenizer = read_tokenizer(read_header(file))
    with theirs(file) as tokenize:
        for text in texts(2000) + texts(2000, CHARACTERS):
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokenize(text), repr(text)
        assert tokenizer("aB")["input_ids"] == tokenize("aB", True)


def test_a_name_that_llama_cpp_refuses(tmp_path: Path) -> None:
    file = write_byte_level(tmp_path / "a.gguf", "unknown")
    with pytest.raises(GgufError):
        read_tokenizer(read_header(file))
    with pytest.raises(ValueError):
        llama_cpp.Llama(str(file), vocab_only=True, verbose=False)


@pytest.mark.parametrize("says", [True, False])
def test_bos_as_the_file_says(says: bool, tmp_path: Path) -> None:
    file = write_byte_level(tmp_path / "a.gguf", "smollm", more={"tokenizer.ggml.add_bos_token": (BOOL, says)})
    with theirs(file) as tokenize:
        assert read_tokenizer(read_header(file))("aB")["input_ids"] == tokenize("aB", True)


@pytest.mark.parametrize("prefix", [None, True, False])
def test_a_space_before_the_text(prefix: bool | None, tmp_path: Path) -> None:
    file = write_sentencepiece(tmp_path / "a.gguf", prefix)
    tokenizer = read_tokenizer(read_header(file))
    with theirs(file) as tokenize:
        for text in ("ab", " ab", "ab a", "a  b", "b\n a"):
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokenize(text), repr(text)


VOCABULARIES = sorted(Path(os.environ.get("LLAMA_CPP_SOURCE", "nowhere"), "models").glob("ggml-vocab-*.gguf"))


@pytest.mark.skipif(not VOCABULARIES, reason="needs LLAMA_CPP_SOURCE, a folder of llama.cpp's sources")
@pytest.mark.parametrize("name", [
    "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "mpt", "qwen2", "qwen35", "refact",
    "starcoder",
])  # fmt: skip
def test_texts_of_llama_cpp_s_own_tests(name: str) -> None:
    """The tokens are those of the models' own tokenizers, with which llama.cpp tests its tokenizers."""
    file = next(file for file in VOCABULARIES if file.stem == f"ggml-vocab-{name}")
    texts = Path(f"{file}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{file}.out").read_text().split("\n")
    tokenizer = metadata._tokenizer(read_header(file))
    for text, line in zip(texts, lines, strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == [int(one) for one in line.split()], repr(text)


def test_smollm2() -> None:
    file = smollm2()
    tokenizer = load_tokenizer(str(file))
    with theirs(file) as tokenize:
        for text in [Path(__file__).read_text(), *texts(2000)]:
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokenize(text), repr(text[:80])
