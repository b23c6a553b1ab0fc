"""Tests the commands on GGUF files that are broken, absurd or of another kind.

A command must refuse a bad file with a one-line error that names the fault, and must write nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused
from gguf_files import ARRAY, F32, STRING, U32, placed, written
from tiny_run import needs_hf

from peft_ext.cli.main import main

pytest.importorskip("gguf")
pytestmark = [
    needs_hf, pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("files are read on the CPU"),
]  # fmt: skip

Edit = Callable[[dict[str, Any], dict[str, Any]], Any]


@pytest.fixture(scope="module")
def good(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the GGUF file model.gguf of the tiny model, an adapter of this model, and data."""
    import peft
    from tiny_gguf import write_tiny_gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("good")
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    write_tiny_gguf(folder / "model.gguf", model, "Q8_0", tokenizer, {"tokenizer.ggml.scores": [0.0] * 258})
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, lora).save_pretrained(folder / "adapter")
    shutil.copy(tiny / "pairs.jsonl", folder / "pairs.jsonl")
    return folder


def changed(file: Path, out: Path, edit: Edit) -> Path:
    """Writes ``file`` to ``out`` with changed keys (type and value) and tensors (sizes, type and bytes)."""
    from peft_ext.gguf import read_header

    header = read_header(file)
    keys: dict[str, Any] = {}
    for key in header.keys:
        data, kind, element = header.value(key)
        keys[key] = kind, data if element is None else (element, data)
    tensors = {
        name: (info.shape[::-1], info.type, header.data(name).view(torch.uint8).numpy().tobytes())
        for name, info in header.tensors.items()
    }
    edit(keys, tensors)
    parts = [(name, *one) for name, one in tensors.items()]
    out.write_bytes(written([(key, *value) for key, value in keys.items()], placed(parts)).out)
    return out


def sets(**changes: Any) -> Edit:
    """Returns a function that sets keys of the metadata; None removes the key. "__" in a name is a dot."""

    def edit(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name, value in changes.items():
            key = name.replace("__", ".")
            keys.pop(key, None)
            keys.update({} if value is None else {key: value})

    return edit


def dropped(name: str) -> Edit:
    return lambda keys, tensors: tensors.pop(name)


def resized(name: str) -> Edit:
    """Returns a function that removes the last row of a tensor."""

    def edit(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
        (columns, rows), kind, data = tensors[name]
        tensors[name] = (columns, rows - 1), kind, data[: len(data) // rows * (rows - 1)]

    return edit


FILES: tuple[tuple[Edit, str], ...] = (
    (sets(general__type=(STRING, "adapter")), "general.type is 'adapter', wanted a model"),
    (sets(split__count=(U32, 3)), "split.count is 3"),
    (sets(general__architecture=None), "general.architecture is missing"),
    (sets(general__architecture=(STRING, "nope")), "the file's architecture is nope, wanted nope."),
    (sets(llama__block_count=(U32, 2**32 - 1)), "llama.block_count is 4294967295, wanted an integer from 1 to 10000"),
    (sets(llama__block_count=(U32, 9999)), "llama.block_count is 9999, but layer"),
    (sets(llama__embedding_length=(U32, 2**30)), "wanted ("),
    (sets(llama__attention__head_count=(U32, 0)), "llama.attention.head_count is 0"),
    (sets(llama__attention__head_count_kv=(STRING, "x")), "llama.attention.head_count_kv is 'x'"),
    (sets(llama__vocab_size=(U32, 2**31 - 1)), "tensor 'token_embd.weight' has shape"),
    (sets(llama__rope__scaling__type=(STRING, "nope")), "rope.scaling.type is 'nope'"),
    (sets(llama__rope__scaling__factor=(F32, float("nan"))), "llama.rope.scaling.factor is nan"),
    (sets(llama__attention__key_length=(U32, 2)), "llama.attention.value_length is 16"),
    (sets(tokenizer__ggml__tokens=(ARRAY, (STRING, ["a"] * 9999))), "tokenizer.ggml.tokens has 9999 tokens"),
    (sets(tokenizer__ggml__eos_token_id=(U32, 10**6)), "tokenizer.ggml.eos_token_id is 1000000"),
    (dropped("token_embd.weight"), "no tensor 'token_embd.weight'"),
    (resized("blk.0.attn_k.weight"), "31 rows for 2 heads"),
    (resized("blk.0.ffn_up.weight"), "up_proj"),
    (lambda keys, tensors: tensors.update({"blk.0.x.weight": ((1,), 24, b"\0")}), "blk.0.x.weight"),
)


@pytest.mark.parametrize(("edit", "message"), FILES, ids=range(len(FILES)))
def test_finetune_refuses(edit: Edit, message: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = changed(good / "model.gguf", tmp_path / "bad.gguf", edit)
    command = (
        "finetune",
        "--model",
        file,
        "--data",
        good / "pairs.jsonl",
        "--output",
        tmp_path / "run",
        "--max-steps",
        1,
    )
    said = refused(capsys, *command, unchanged=tmp_path)
    assert message in said and "bad.gguf" in said


def test_a_tensor_that_is_missing(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = changed(good / "model.gguf", tmp_path / "bad.gguf", dropped("blk.0.attn_q.weight"))
    command = ("finetune", "--model", file, "--data", good / "pairs.jsonl", "--output", tmp_path / "run")
    assert main([str(one) for one in command]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bad.gguf" in error and "layers.0.self_attn.q_proj" in error
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("number", [1, 4, 7])
def test_commands_on_an_adapter_refuse(number: int, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file, adapter = changed(good / "model.gguf", tmp_path / "bad.gguf", FILES[number][0]), good / "adapter"
    for command in (
        ("chat", "--adapter", adapter, "--model", file, "--prompt", "a", "--max-new-tokens", 1),
        ("explain", adapter, "--model", file),
        ("merge", "--adapter", adapter, "--model", file, "--output", tmp_path / "out"),
        ("merge", "--adapter", adapter, "--model", file, "--gguf", tmp_path / "out.gguf"),
        ("export", adapter, "--model", file, "--gguf", tmp_path / "adapter.gguf"),
    ):
        assert "bad.gguf" in refused(capsys, *command, unchanged=tmp_path), command


def test_files_that_are_no_gguf(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = (good / "model.gguf").read_bytes()
    for size in (0, 3, 30, len(data) // 2, len(data) - 1):
        (tmp_path / f"cut{size}.gguf").write_bytes(data[:size])
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "other.gguf").write_bytes(b"PK\3\4" + data[4:])
    os.mkfifo(tmp_path / "pipe.gguf")
    for file in (*sorted(tmp_path.iterdir()), tmp_path / "missing.gguf"):
        command = ("finetune", "--model", file, "--data", good / "pairs.jsonl", "--output", tmp_path / "run")
        assert file.name in refused(capsys, *command, unchanged=tmp_path)
