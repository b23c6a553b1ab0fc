"""Tests from where the commands take the base model and the options of an adapter's run."""

import json
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_ext.cli.merge import _gguf_base
from peft_ext.sources.adapter import training_options


def test_the_base_of_a_gguf_run_is_the_file_that_was_trained_over(tmp_path, monkeypatch):

    (tmp_path / "a").mkdir()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for folder in (tmp_path / "a", tmp_path):
        (folder / "model.gguf").write_text(folder.name)
    (adapter / "run.json").write_text(json.dumps({"options": {"model": "model.gguf"}}))
    configured = {"base_model_name_or_path": str(tmp_path / "a/model.gguf")}
    (adapter / "adapter_config.json").write_text(json.dumps(configured))
    monkeypatch.chdir(tmp_path)  # this folder has another file with the name in run.json
    assert _gguf_base(adapter, None) == tmp_path / "a/model.gguf"
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "a")}))
    assert _gguf_base(adapter, None).read_text() == tmp_path.name  # an adapter whose configuration names no file


def test_a_checkpoint_by_a_relative_name_has_the_options_of_its_run(tmp_path, monkeypatch):

    checkpoint = tmp_path / "run/checkpoints/checkpoint-4"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run/run.json").write_text(json.dumps({"command": "peft-ext finetune", "options": {"quant": "nf4"}}))
    (tmp_path / "latest").symlink_to(checkpoint)
    monkeypatch.chdir(checkpoint)
    wanted = training_options(checkpoint)
    assert wanted["quant"] == "nf4"
    assert training_options(Path(".")) == training_options(tmp_path / "latest") == wanted
