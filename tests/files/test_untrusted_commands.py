"""Tests the commands on untrusted adapters, bases, runs and data that are broken, absurd or malicious.

A command must refuse a bad input with a one-line error that names the fault: no crash, no traceback of the command
line, no endless wait, no partial output and no wrong numbers. ``tests/fuzz`` searches for further bad files.
"""

from __future__ import annotations

import copy
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from commands import refused  # noqa: E402
from gguf_files import model_file  # noqa: E402
from torch import nn  # noqa: E402
from untrusted_files import EVIL, edited, rewritten  # noqa: E402

import peft_ext  # noqa: E402
from peft_ext.cli import chat  # noqa: E402
from peft_ext.cli.main import main  # noqa: E402
from peft_ext.run import RunError, demo_model  # noqa: E402
from peft_ext.run.data import read_corpus  # noqa: E402
from peft_ext.sources import expressions  # noqa: E402
from peft_ext.sources.adapter import training_options  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("files are read on the CPU")]


# - the commands -


def commands(adapter: Path, root: Path, model: Path | None = None) -> tuple[tuple[object, ...], ...]:
    base = () if model is None else ("--model", model)
    return (
        ("chat", "--adapter", adapter, "--prompt", "w5 w6", "--max-new-tokens", 2, *base),
        ("merge", "--adapter", adapter, "--output", root / "out", *base),
        ("explain", adapter, *base),
    )


def test_the_commands_refuse_adapters(made, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(expressions, "_SECONDS", 0.4)
    base, adapter = made
    for changes, message in (
        ({"peft_type": "NOPE"}, "peft_type is 'NOPE'"),
        ({"r": 10**9}, "r is 1000000000, wanted at most 64"),
        ({"target_modules": EVIL}, "which takes more than 0.4 s"),
        ({"base_model_name_or_path": "../../no-such"}, "model is ../../no-such, no such folder"),
        ({"base_model_name_or_path": "x" * 5000}, "File name too long"),
        ({"base_model_name_or_path": "~nobody-of-this-name/x"}, "model is ~nobody-of-this-name/x"),
        ({"base_model_name_or_path": "a\0b"}, "no such folder"),
        ({"base_model_name_or_path": ""}, "names no base model"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron"),
    ):
        folder = edited(adapter, tmp_path / "v", **changes)
        for command in commands(folder, tmp_path):
            assert message in refused(capsys, *command, unchanged=tmp_path), command
    assert "antigravity" not in sys.modules
    shutil.rmtree(tmp_path / "v")
    folder = rewritten(adapter, tmp_path / "v", "adapter_config.json", b"[" * 100_000)
    for command in commands(folder, tmp_path):
        assert "nested too deep" in refused(capsys, *command, unchanged=tmp_path)


def test_no_command_imports_what_a_config_names(made, tmp_path, capsys) -> None:
    mapping = {"base_model_class": "system", "parent_library": "antigravity"}
    folder = edited(made[1], tmp_path / "v", auto_mapping=mapping, task_type=None)
    for command in commands(folder, tmp_path):
        assert main([str(argument) for argument in command]) == 0
    assert "antigravity" not in sys.modules


def test_no_command_reads_a_pickle(made, tmp_path, capsys) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    base, adapter = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in made)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(Evil(), adapter / "adapter_model.bin")
    for command in commands(adapter, tmp_path, base):
        assert "has adapter_model.bin, a pickle, and no " in refused(capsys, *command, unchanged=tmp_path), command
    with pytest.raises(ValueError, match="a pickle"):
        peft_ext.load_adapter(nn.Linear(4, 4), adapter)
    weights = base / "model.safetensors"
    weights.rename(base / "pytorch_model.bin")
    torch.save(Evil(), base / "pytorch_model.bin")
    for command in commands(made[1], tmp_path, base)[:2]:
        assert "has pytorch_model.bin, a pickle, and no safetensors" in refused(capsys, *command, unchanged=tmp_path)
    # This index of safetensors names a pickle file, which transformers would read.
    shutil.copy(made[0] / "model.safetensors", base / "model-9.safetensors")
    for name, message in (("pytorch_model.bin", "weight_map has 'pytorch_model.bin', wanted the name of a"),
                          ("../x.safetensors", "weight_map has '../x.safetensors', wanted")):  # fmt: skip
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        for command in commands(made[1], tmp_path, base)[:2]:
            assert message in refused(capsys, *command, unchanged=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_commands_refuse_bases(made, tmp_path, capsys) -> None:
    base, adapter = made
    for changes, message in (
        ({"hidden_size": "abc"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size' is 0, wanted at least 1"),
        ({"num_attention_heads": 3}, "num_attention_heads|Class validation error"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000, wanted at most 10000"),
        ({"text_config": {"num_experts": 10**9}}, "'num_experts' is 1000000000, wanted at most 10000"),
        ({"model_type": "evil"}, "evil"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}, "custom code"),
        ({"dtype": "int8"}, "int8"),
        ({"architectures": [5]}, "attribute name must be string"),
    ):
        folder = edited(base, tmp_path / "b", "config.json", **changes)
        for command in commands(adapter, tmp_path, folder):
            assert re.search(message, refused(capsys, *command, unchanged=tmp_path)), (command, changes)
    for name, data in (("config.json", b"[" * 100_000), ("config.json", b'{"a"'), ("model.safetensors", b"\0" * 99)):
        folder = rewritten(base, tmp_path / "b", name, data)
        for command in commands(adapter, tmp_path, folder)[:2]:
            assert refused(capsys, *command, unchanged=tmp_path).startswith("model ")
        shutil.rmtree(folder)


def test_chat_refuses_tokenizers_templates_and_generation(made, tmp_path, capsys, monkeypatch) -> None:
    base, adapter = made
    loop = b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for name, data, message in (
        ("tokenizer.json", b"[1]", "no tokenizer"),
        ("tokenizer.json", b"[" * 100_000, "no tokenizer"),
        ("tokenizer_config.json", b"[]", "no tokenizer"),
        ("chat_template.jinja", b"{{ 1/0 }}", "the tokenizer's chat template: division by zero"),
        ("chat_template.jinja", b"{{ ''.__class__.__mro__ }}", "the tokenizer's chat template: access to attribute"),
        ("chat_template.jinja", loop, "the tokenizer's chat template: it takes more than 0.3 s"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "generate, with the base's generation_config: "),
    ):
        folder = rewritten(base, tmp_path / "b", name, data)
        with monkeypatch.context() as patch:
            if data is loop:  # of these chat templates only `loop` never ends, and so gets a shorter time limit
                patch.setattr(chat, "_SECONDS", 0.3)
            assert message in refused(capsys, *commands(adapter, tmp_path, folder)[0], unchanged=tmp_path), name
        shutil.rmtree(folder)
    folder = rewritten(base, tmp_path / "b", "generation_config.json", b'{"num_beams": 1000000, "max_length": 9}')
    assert main([str(argument) for argument in commands(adapter, tmp_path, folder)[0]]) == 0


def test_chat_refuses_what_is_no_text(made, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"w5 \xff\n"), encoding="utf-8"))
    command = ("chat", "--adapter", made[1], "--max-new-tokens", 2)
    assert refused(capsys, *command, unchanged=tmp_path) == "standard input: not UTF-8 text"


_RUNS = (
    (b"[", "run.json:1: not JSON"),
    (b"[" * 100_000, "run.json: not JSON that can be read: nested too deep"),
    (b"\xff", "run.json: not UTF-8 text"),
    (b'{"options": {"quant": "int3"}}', "run.json: options have the quant 'int3', wanted one of nf4, mxfp4, nvfp4, "),
    (b'{"options": {"quant": "nf4", "blocksize": "64"}}', "run.json: options have the blocksize '64', wanted one of"),
    (b'{"options": {"quant": "nf4", "blocksize": true}}', "run.json: options have the blocksize True, wanted one of"),
)


@pytest.mark.parametrize(("text", "message"), _RUNS, ids=range(len(_RUNS)))
def test_a_run_that_does_not_say_which_base(made, tmp_path, capsys, text: bytes, message: str) -> None:
    """The commands must refuse a bad run.json: the adapter could be merged into another base than in training."""
    folder = rewritten(made[1], tmp_path / "v", "run.json", text)
    for command in commands(folder, tmp_path):
        assert message in refused(capsys, *command, unchanged=tmp_path)


def test_a_run_json_of_something_else_says_nothing(made, tmp_path) -> None:
    for text in (b"{}", b'{"options": 5}', b'{"options": {"model": "x"}}'):
        assert training_options(rewritten(made[1], tmp_path / "v", "run.json", text)) == {}


# - data -

_ROW = b'{"text": "one"}\n'
_DATA: tuple[tuple[str, bytes, str], ...] = (
    (".jsonl", b"\0\n" + _ROW, ":1: not JSON: Expecting value (column 1)"),
    (".jsonl", _ROW + b'{"text": "a\0b"}', ":2: not JSON: Invalid control character at (column 12)"),
    (".jsonl", _ROW + b'{"text":', ":2: not JSON: Expecting value (column 9)"),
    (".jsonl", _ROW + b'{"a": ' + b"[" * 100_000, ":2: not JSON that can be read: nested too deep"),
    (".jsonl", _ROW + b'{"a": ' + b"1" * 5000 + b"}", ":2: not JSON: Exceeds the limit (4300 digits)"),
    (".jsonl", _ROW + b'{"text": "\\ud800"}', ": record 2 has a lone surrogate, '\\ud800', wanted Unicode text"),
    (".jsonl", b'{"prompt": "\\udfff", "completion": "a"}\n' * 2, ": record 1 has a lone surrogate, '\\udfff'"),
    (".jsonl", b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}\n' * 2, ": record 1 has a lone surrogate"),
    (".jsonl", _ROW + b"\xff", ": not UTF-8 text (byte 16)"),
    (".jsonl", _ROW + b"NaN", ":2: a JSON float, wanted an object with named columns"),
    (".jsonl", _ROW + b'{"text": 1e999}', ": record 2 has float in column 'text', wanted text"),
    (".json", b"[" * 100_000, ": not JSON that can be read: nested too deep"),
    (".json", b"[" + b"1" * 5000 + b"]", ": not JSON: Exceeds the limit (4300 digits)"),
    (".json", b'[\n{"text"]', ":2: not JSON: Expecting ':' delimiter (column 8)"),
    (".csv", b"text,text\na,b\nc,d\n", ":1: the header has the column 'text' twice"),
    (".csv", b'text\n"a\nb\n', ":1: not CSV: unexpected end of data"),
    (".csv", b"text\na\nb,c\n", ":3: a row that has not 1 columns as the header"),
    (".csv", b"\xff\xfet\0e\0", ": not UTF-8 text (byte 0)"),
    (".txt", b"\xff", ": not UTF-8 text (byte 0)"),
)


@pytest.mark.parametrize(("suffix", "data", "message"), _DATA, ids=range(len(_DATA)))
def test_data(tmp_path, suffix: str, data: bytes, message: str) -> None:
    file = tmp_path / f"data{suffix}"
    file.write_bytes(data)
    with pytest.raises(RunError) as caught:
        read_corpus(str(file))
    text = str(caught.value)
    assert f"{file}{message}" in text and "\n" not in text and "\0" not in text


def test_data_that_is_no_file(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for spec, message in (
        (str(tmp_path / "pipe.jsonl"), "a pipe or a device, wanted a file"),
        ("x" * 5000 + ".jsonl", "File name too long"),
        ("~nobody-of-this-name/a.jsonl", "Could not determine home directory"),
        ("/dev/zero", "a nameless file, wanted .jsonl"),
    ):
        with pytest.raises(RunError, match=message):
            read_corpus(spec)


# - the model that comes as a GGUF -


def test_a_gguf_of_values_that_are_not_finite(made, tmp_path, monkeypatch) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(made[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(made[0])
    (tmp_path / "x.gguf").write_bytes(model_file(keys=lambda keys: keys.pop("tokenizer.ggml.model")).out)
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[3] = float("nan")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer)
    for found in (broken, model):
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, found=found, **k: found)
        if found is broken:
            with pytest.raises(ValueError, match="x.gguf: model.norm.weight has values that are not finite"):
                demo_model.convert(tmp_path / "x.gguf", tmp_path / "out")
            assert not (tmp_path / "out").exists()
        else:
            demo_model.convert(tmp_path / "x.gguf", tmp_path / "out")


def test_a_gguf_that_is_none(tmp_path, monkeypatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    monkeypatch.setattr(demo_model, "packed_model", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(demo_model, "_target", lambda: tmp_path / "cache/model")

    def run(command: list[str], **kwargs: Any) -> Any:
        """Converts the model in this process, because a child process would import packages for seconds."""
        with pytest.raises(Exception) as caught:
            demo_model.convert(Path(command[-2]), Path(command[-1]))
        return subprocess.CompletedProcess(command, 1, "", f"Traceback\n{caught.value!r}\n")

    monkeypatch.setattr(demo_model.subprocess, "run", run)
    with pytest.raises(RunError, match="unpacking .*x.gguf failed: ") as caught:
        demo_model.demo_model()
    assert "\n" not in str(caught.value) and list((tmp_path / "cache").iterdir()) == []
