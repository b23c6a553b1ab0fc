"""Tests finetune, and the commands on its adapters, over packed formats and over packed checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from packed_formats import FORMATS
from tiers import first
from tiny_run import check_packed_adapter, check_packed_base, finetune, needs_bnb, needs_hf, report

import peft_ext
from peft_ext.cli.main import main

pytestmark = needs_hf
CHECKPOINTS = ("fp8", "float8", "mxfp4", "nvfp4", "gpt_oss", *(["int4", "gptq"] if "int4" in FORMATS else []))


@pytest.fixture(scope="module", params=first(CHECKPOINTS, ("fp8",)))
def checkpoint(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder ``model`` with a packed checkpoint and a tokenizer, beside the data of ``tiny``."""
    import packed_checkpoints as made

    folder = tmp_path_factory.mktemp(request.param)
    held = {"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1}
    if request.param == "gpt_oss":
        made.write_gpt_oss(folder / "model", vocab_size=258, **held)
    else:
        made.write(folder / "model", request.param, vocab_size=258, **held)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / "model" / name, folder / "model" / name)
    shutil.copy(tiny / "pairs.jsonl", folder / "pairs.jsonl")
    return folder


@pytest.mark.slow
def test_a_packed_checkpoint_is_trained_and_its_adapter_is_used(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Tests a run over a packed checkpoint, its resume, the plan before it, and explain, chat and merge after it."""
    from transformers import AutoModelForCausalLM

    model, output = checkpoint / "model", tmp_path / "run"
    config = json.loads((model / "config.json").read_text())["quantization_config"]
    about = f"packed as in the checkpoint ({config['quant_method']})"
    check_packed_base(checkpoint, output, about, capsys)
    assert finetune(checkpoint, output, "--save-steps", "1", "--resume", steps=3) == 0
    assert report(output)["finished"]
    capsys.readouterr()

    check_packed_adapter(output, tmp_path / "merged", capsys)
    dense, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not hasattr(dense.config, "quantization_config")
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=peft_ext.PackedConfig())
    adapted = peft_ext.load_adapter(base, output).eval()
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        right, got = adapted(input_ids=ids).logits.float(), dense(input_ids=ids).logits.float()
    assert (got - right).norm() < 0.05 * right.norm()


@pytest.mark.slow
@pytest.mark.parametrize("format", first(FORMATS, ("mxfp4",)))
def test_a_dense_model_is_trained_in_a_packed_format(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture, format: str
) -> None:
    assert finetune(tiny, tmp_path / "run", "--quant", format, "--method", "dora", steps=2) == 0
    assert f"{tiny / 'model'}, {format.upper()}\n" in capsys.readouterr().out
    found = report(tmp_path / "run")
    assert found["check"]["ok"] and found["options"]["quant"] == format
    assert found["fused"]["groups"][0]["kind"].startswith("DoRA over PackedLinear")
    assert main(["merge", "--adapter", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 0
    assert f"quantization {format}, as the adapter's run.json has it" in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture, tiny: Path, output: Path, *options: str) -> str:
    assert finetune(tiny, output, *options) == 2
    assert not output.exists()
    return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")


def test_what_is_not_possible_is_refused_at_the_start(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import packed_checkpoints as made

    def message(*options: str, of: Path = tiny) -> str:
        return refused(capsys, of, tmp_path / "run", *options)

    assert message("--quant", "mxfp4", "--stock") == (
        "--stock with --quant mxfp4: PEFT and bitsandbytes have no layers over MXFP4, wanted nf4 or none"
    )
    assert message("--quant", "int4", "--method", "partial") == (
        "--quant int4 with --method partial: it trains the weights themselves, which INT4 freezes"
    )
    model = tiny / "model"
    assert message("--quant", "checkpoint") == (
        f"--quant checkpoint: the files of --model {model} are dense, wanted a packed checkpoint"
    )
    packed = tmp_path / "packed"
    shutil.copytree(tiny, packed, ignore=shutil.ignore_patterns("model"))
    made.write(packed / "model", "fp8", vocab_size=258)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, packed / "model" / name)
    for quant in ("none", "nf4", "mxfp4"):
        assert message("--quant", quant, of=packed) == (
            f"--quant {quant}: the files of --model {packed / 'model'} are packed by fp8, wanted no --quant, or "
            "checkpoint"
        )
    assert message("--stock", of=packed).startswith("--stock with --quant checkpoint: PEFT and bitsandbytes have no")
    assert message("--method", "partial", of=packed).endswith("which a packed checkpoint freezes")
    config = json.loads((packed / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm"}
    (packed / "model" / "config.json").write_text(json.dumps(config))
    assert f"{packed / 'model'} is quantized by aqlm" in message(of=packed)


def test_a_layer_that_the_format_can_t_hold_is_refused_at_the_start(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(tiny, odd)
    config = json.loads((odd / "model" / "config.json").read_text())
    (odd / "model" / "config.json").write_text(json.dumps({**config, "intermediate_size": 100}))
    said = refused(capsys, odd, tmp_path / "run", "--quant", "mxfp4")
    assert said.startswith(
        "--quant mxfp4: model.layers.0.mlp.down_proj has 100 input features, wanted a multiple of 32"
    )


@pytest.mark.slow
@needs_bnb
def test_a_checkpoint_of_bitsandbytes_is_trained(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    held = tmp_path / "held"
    shutil.copytree(tiny, held)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", quantization_config=how, device_map="cpu")
    model.save_pretrained(held / "model")
    assert finetune(held, tmp_path / "run", steps=2) == 0
    assert "NF4 as in the checkpoint (bitsandbytes)\n" in capsys.readouterr().out
    found = report(tmp_path / "run")
    assert found["check"]["ok"] and found["fused"]["groups"][0]["kind"] == "LoRA over Linear4bit"
    said = refused(capsys, held, tmp_path / "other", "--quant", "none")
    assert said == f"--quant none: the files of --model {held / 'model'} are NF4, wanted no --quant, or nf4"
