"""Tests finetune over a GGUF file, the adapter file that it exports, and the commands on the adapter."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from tiers import first
from tiny_run import check_packed_adapter, check_packed_base, finetune, needs_hf, report

import peft_ext
from peft_ext.cli.main import main

pytest.importorskip("gguf")
pytestmark = needs_hf


@pytest.fixture(scope="module")
def gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the GGUF file ``model`` of the tiny model, whose matrices are Q8_0, and the data."""
    from tiny_gguf import write_tiny_gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("gguf")
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    # A byte tokenizer has no merges, and a file without merges needs scores.
    write_tiny_gguf(folder / "model", model, "Q8_0", tokenizer, {"tokenizer.ggml.scores": [0.0] * 258})
    shutil.copy(tiny / "pairs.jsonl", folder / "pairs.jsonl")
    return folder


@pytest.mark.slow
def test_a_gguf_file_is_trained_and_its_adapter_is_used(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Tests the plan, a run with a checkpoint, its resume with an export, and then explain, chat and merge."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, output = gguf / "model", tmp_path / "run"
    about = "packed as in the checkpoint (gguf Q8_0)"
    found = check_packed_base(gguf, output, about, capsys)
    assert found["runner"] == {
        "base": str(model), "weights": about, "commands": [f"peft-ext export {output} --gguf {output / 'adapter.gguf'}"]
    }  # fmt: skip

    assert finetune(gguf, output, "--save-steps", "1", "--resume", "--export", "gguf", steps=3) == 0
    assert f"exported: {output / 'adapter.gguf'}, for llama.cpp" in capsys.readouterr().out
    runner, page = report(output)["runner"], (output / "report.html").read_text()
    assert runner["modelfile"] == [f"FROM {model}", f"ADAPTER {output / 'adapter.gguf'}"]
    assert all(line in page for line in (*runner["commands"], *runner["modelfile"], about))

    check_packed_adapter(output, tmp_path / "merged", capsys)
    dense, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and dense.config.tie_word_embeddings
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("hello")["input_ids"]
    adapted = peft_ext.load_adapter(peft_ext.load_gguf(model), output).eval()
    again = peft_ext.load_gguf_adapter(peft_ext.load_gguf(model), output / "adapter.gguf").eval()
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        right, got, exported = (one(input_ids=ids).logits.float() for one in (adapted, dense, again))
    assert (got - right).norm() < 0.05 * right.norm()
    assert (exported - right).norm() < 0.02 * right.norm()  # the exported matrices are float16


@pytest.mark.slow
@pytest.mark.parametrize("refused", first([False, True], [True]))
def test_a_failing_export_keeps_the_adapter_and_the_record(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    from peft_ext import export

    output = tmp_path / "a run"

    def fail(adapter: Path, file: Path, **kwargs: object) -> None:
        assert report(output)["finished"] and (adapter / "adapter_model.safetensors").is_file()
        raise export.ExportError("write_gguf_adapter: no") if refused else OSError(28, "No space left", str(file))

    monkeypatch.setattr(export, "write_gguf_adapter", fail)
    assert finetune(gguf, output, "--export", "gguf", steps=2) == 2
    why = "no" if refused else f"{output / 'adapter.gguf'}: No space left"
    message = f"error: --export gguf: {why}; the adapter in PEFT's format is saved in {output}"
    assert capsys.readouterr().err.splitlines()[-1] == message
    found = report(output)
    assert found["finished"] and found["check"]["ok"] and "adapter" not in found["runner"]
    monkeypatch.undo()
    (command,) = found["runner"]["commands"]
    assert main(shlex.split(command)[1:]) == 0 and (output / "adapter.gguf").is_file()


@pytest.mark.slow
def test_the_export_of_an_earlier_adapter_is_removed(gguf: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    exported = output / "adapter.gguf"
    assert finetune(gguf, output, "--save-steps", "1", "--export", "gguf", steps=1) == 0 and exported.is_file()
    assert finetune(gguf, output, "--save-steps", "1", "--resume", steps=2) == 0 and not exported.exists()
    exported.write_bytes(b"GGUF")
    assert finetune(gguf, output, "--overwrite", steps=1) == 0 and not exported.exists()
    shutil.copy(gguf / "model", exported)
    # The run does not remove adapter.gguf if adapter.gguf is the base model of the run.
    assert main(["finetune", "--model", str(exported), "--data", str(gguf / "pairs.jsonl"), "--output", str(output),
                 "--overwrite", "--max-steps", "1", "--block-size", "64"]) == 0  # fmt: skip
    assert exported.read_bytes() == (gguf / "model").read_bytes()


@pytest.mark.slow
def test_a_file_of_dense_weights_is_quantized_as_a_folder_is(
    gguf: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from tiny_gguf import write_tiny_gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    write_tiny_gguf(tmp_path / "model", model, "F16", tokenizer, {"tokenizer.ggml.scores": [0.0] * 258})
    shutil.copy(tiny / "pairs.jsonl", tmp_path / "pairs.jsonl")
    assert finetune(tmp_path, tmp_path / "run", steps=2) == 0
    assert "NF4, double quantization" in capsys.readouterr().out
    assert report(tmp_path / "run")["check"]["ok"]


@pytest.mark.parametrize(("options", "message"), [
    (("--quant", "nf4"), "--quant nf4: the files of --model {model} are packed by gguf Q8_0, wanted no --quant, or "
     "checkpoint"),
    (("--stock",), "--stock with --quant checkpoint: PEFT and bitsandbytes have no layers over a packed checkpoint, "
     "wanted nf4 or none"),
    (("--shard", "fsdp2"), "--shard fsdp2 with a GGUF file: only folders of safetensors are sharded, wanted ddp"),
    (("--export", "onnx"), "--export onnx: wanted gguf"),
    (("--export", "gguf", "--method", "ia3"), "--export gguf with --method ia3: llama.cpp reads low-rank adapters "
     "only, wanted one of lora, rslora, qlora, adalora; peft-ext merge --gguf merges other methods"),
    (("--method", "partial"), "--quant checkpoint with --method partial: it trains the weights themselves, which a "
     "packed checkpoint freezes"),
])  # fmt: skip
def test_what_is_not_possible_is_refused_at_the_start(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: tuple[str, ...], message: str
) -> None:
    assert finetune(gguf, tmp_path / "run", *options) == 2
    assert not (tmp_path / "run").exists()
    came = capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")
    assert came == message.format(model=gguf / "model")


def test_a_damaged_file_is_refused_at_the_start(gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = (gguf / "model").read_bytes()
    for name, damaged, wanted in (
        ("model", data[:-1], "past the end of the file"),
        ("model", data[:1000], "the file ends in"),
        ("model.gguf", b"GGML" + data[4:], "this is no GGUF file"),
    ):
        file = tmp_path / name
        file.write_bytes(damaged)
        assert main(["finetune", "--model", str(file), "--output", str(tmp_path / "run")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --model {file}: ") and wanted in line
    assert not (tmp_path / "run").exists()
    assert main(["finetune", "--model", str(tmp_path / "none.gguf"), "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"error: --model {tmp_path / 'none.gguf'}: no such file\n"


def test_a_file_of_an_unknown_pre_tokenizer_gets_its_tokenizer_from_a_folder(
    gguf: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The run saves the tokenizer beside the adapter, where chat and merge find it. A run that replaces this run
    removes the tokenizer."""
    from tiny_gguf import write_tiny_gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    keys = {"tokenizer.ggml.scores": [0.0] * 258, "tokenizer.ggml.pre": "tomorrow"}
    write_tiny_gguf(tmp_path / "model", model, "Q8_0", tokenizer, keys)
    shutil.copy(tiny / "pairs.jsonl", tmp_path / "pairs.jsonl")
    output, named = tmp_path / "run", ("--tokenizer", str(tiny / "model"))

    def refusal(*options: str) -> str:
        assert finetune(tmp_path, output, *options, steps=1) == 2 and not output.exists()
        return capsys.readouterr().err.splitlines()[-1]

    assert "tokenizer.ggml.pre is 'tomorrow', whose way to split text" in refusal() and "--tokenizer" in refusal()
    assert refusal("--tokenizer", "nowhere") == "error: --tokenizer nowhere: no such folder"
    (tmp_path / "empty").mkdir()
    assert f"--tokenizer {tmp_path / 'empty'}: no tokenizer (" in refusal("--tokenizer", str(tmp_path / "empty"))
    turned = json.loads((tiny / "model/tokenizer.json").read_text())
    vocabulary = turned["model"]["vocab"]
    turned["model"]["vocab"] = {token: number if number < 2 else 259 - number for token, number in vocabulary.items()}
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "turned")
    (tmp_path / "turned/tokenizer.json").write_text(json.dumps(turned))
    assert "its token 2 is" in refusal("--tokenizer", str(tmp_path / "turned"))

    assert finetune(tmp_path, output, *named, steps=1) == 0
    assert report(output)["options"]["tokenizer"] == named[1]
    assert main(["chat", "--adapter", str(output), "--prompt", "hello", "--max-new-tokens", "2"]) == 0
    assert main(["merge", "--adapter", str(output), "--output", str(tmp_path / "merged")]) == 0
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert words("What is 2?")["input_ids"] == tokenizer("What is 2?")["input_ids"]
    saved = report(output)["tokenizer_files"]
    assert "tokenizer.json" in saved and all((output / name).is_file() for name in saved)
    shutil.copy(gguf / "model", tmp_path / "model")
    assert finetune(tmp_path, output, "--overwrite", steps=1) == 0
    assert not any((output / name).exists() for name in saved) and "tokenizer_files" not in report(output)


def test_a_token_beyond_the_model_s_vocabulary(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.add_tokens(["plus"])
    tokenizer.save_pretrained(tmp_path / "words")
    assert finetune(tiny, tmp_path / "run", "--tokenizer", str(tmp_path / "words")) == 2
    message = "the tokenizer gives 'plus' the number 258, wanted less than 258, the size of the model's vocabulary"
    assert message in capsys.readouterr().err
