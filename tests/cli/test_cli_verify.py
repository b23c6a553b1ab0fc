"""Tests explain --verify, which reads weights, compares a training step, and exits with code 1 if a number is wrong."""

import json
import shutil

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from commands import refused, said  # noqa: E402

import peft_ext.verification  # noqa: E402
from peft_ext.cli.main import main  # noqa: E402
from peft_ext.integrations.adapter_layers.lora import FusedLoraLinear  # noqa: E402
from peft_ext.methods import make_config, method_config  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.cpu_only("the commands choose the device themselves"),
]
SMALL = ("--verify", "--batch-size", "2", "--sequence-length", "24")


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    path, fields = method_config("dora", "CAUSAL_LM")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.bfloat16)
    peft.get_peft_model(base, make_config(path, {**fields, "r": 4, "init_lora_weights": False})).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_methods_on_a_model(capsys, tiny):
    asked = ("explain", tiny / "model", *SMALL, "--rank", 4, "--data", tiny / "pairs.jsonl")
    methods = [argument for name in ("lora", "qlora", "ia3", "adalora") for argument in ("--method", name)]
    out = said(capsys, *asked, *methods)
    assert out.count(" verified: PeftModelForCausalLM in ") == out.count("\nas good as stock: 0 of ") == 4
    assert out.count("\nblock base_model.") == 4 and "WRONG" not in out


def test_an_adapter_as_json(capsys, tiny, adapter):
    found = json.loads(said(capsys, "explain", adapter, "--model", tiny / "model", *SMALL, "--dtype", "fp32", "--json"))
    (checked,) = found["verified"].values()
    assert checked["ok"] and "float64" in checked["about"] and len(checked["blocks"]) > 14
    trained = [row for row in checked["rows"] if row["name"].startswith("gradient of ")]
    assert len(trained) == 3 * 14 and all(0 < row["stock_error"] < 1e-4 for row in trained)


def test_an_encoder_has_no_labels(capsys, tiny, tmp_path):
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, num_hidden_layers=1)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path)
    out = said(capsys, "explain", tmp_path, *SMALL, "--data", tiny / "docs.txt")
    assert "as good as stock" in out and "\nlogits " in out and "\nloss " not in out


def test_a_wrong_number_is_the_exit_code(capsys, tiny, monkeypatch):
    usual = FusedLoraLinear._fused
    monkeypatch.setattr(FusedLoraLinear, "_fused", lambda self, x: usual(self, x) * 1.1)
    data = tiny / "pairs.jsonl"
    assert main(["explain", str(tiny / "model"), *SMALL, "--data", str(data)]) == 1
    assert "NOT as good as stock" in capsys.readouterr().out


def test_the_batch_has_the_asked_size(capsys, tiny, monkeypatch):
    shapes, usual = [], peft_ext.verification.verify

    def verify(model, batch):
        shapes.append(batch["input_ids"].shape)
        return usual(model, batch)

    monkeypatch.setattr(peft_ext.verification, "verify", verify)
    said(capsys, "explain", tiny / "model", *SMALL, "--data", tiny / "docs.txt")
    assert shapes == [(2, 24)]


def test_the_tokenizer_in_the_adapter_s_folder_is_used(capsys, tiny, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    for file in (tiny / "model").glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "tokenizer.json").write_text("{}")
    refusal = refused(capsys, "explain", folder, "--model", tiny / "model", *SMALL, "--data", tiny / "docs.txt")
    assert refusal.startswith(f"--verify: {folder} has no tokenizer (")


def test_refusals(capsys, tiny, tmp_path):
    model = tiny / "model"
    assert refused(capsys, "explain", model, "--data", "x.txt") == "--data: wanted with --verify, which uses the data"
    assert "no such" in refused(capsys, "explain", model, *SMALL, "--data", tmp_path / "none.jsonl")
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    assert "has no safetensors" in refused(capsys, "explain", tmp_path, *SMALL)
