"""Tests runs of the command line that train LoRA or DoRA on a mixture's experts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import finetune, needs_hf, report, tiny, write_tiny_model  # noqa: F401

pytestmark = needs_hf


@pytest.fixture(scope="module")
def mixture(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Returns a folder like that of ``tiny``, with a mixture of experts as model."""
    folder = tmp_path_factory.mktemp("mixture")
    for path in tiny.glob("*.*"):
        shutil.copy(path, folder / path.name)
    write_tiny_model(folder / "model", experts=8)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_run_on_experts_learns_saves_and_is_read_again(mixture: Path, tmp_path: Path, quant: str) -> None:
    out = tmp_path / "out"
    assert finetune(mixture, out, "--quant", quant, "--lr", "0.02", steps=12) == 0  # finetune finds the experts itself
    found = report(out)
    assert found["check"]["ok"] and found["finished"]
    assert found["fused"]["fused"] == found["fused"]["layers"]
    assert {g["kind"] for g in found["fused"]["groups"]} >= {
        "LoRA with dropout 0.05 over Qwen3MoeExperts.gate_up_proj",
        "LoRA with dropout 0.05 over Qwen3MoeExperts.down_proj",
    }
    assert found["losses"][-1] < found["losses"][0]
    from safetensors.torch import load_file

    saved = load_file(out / "adapter_model.safetensors")
    assert not any("gate.lora" in name for name in saved)  # the router has no adapter
    experts = [tensor for name, tensor in saved.items() if "experts" in name and "lora_B" in name]
    assert len(experts) == 4 and all(tensor.any() for tensor in experts)


@pytest.mark.slow
def test_a_run_of_dora_on_experts(mixture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert finetune(mixture, out, "--method", "dora", "--quant", "none", "--lr", "0.02", steps=12) == 0
    found = report(out)
    assert found["check"]["ok"] and found["fused"]["fused"] == found["fused"]["layers"]
    assert {g["kind"] for g in found["fused"]["groups"]} >= {
        "DoRA with dropout 0.05 over Qwen3MoeExperts.gate_up_proj",
        "DoRA with dropout 0.05 over Qwen3MoeExperts.down_proj",
    }
    assert found["losses"][-1] < found["losses"][0]
    assert finetune(mixture, tmp_path / "nf4", "--method", "dora", steps=2) == 0
    assert report(tmp_path / "nf4")["check"]["ok"]


@pytest.mark.slow
def test_names_instead_of_all(mixture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--target-parameters", "mlp.experts.down_proj", "--quant", "none", "--gradient-checkpointing")
    assert finetune(mixture, out, *options) == 0
    assert not any("gate_up_proj" in g["kind"] for g in report(out)["fused"]["groups"])


@pytest.mark.slow
def test_resumes(mixture: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("--target-parameters", "experts", "--save-steps", "2")
    assert finetune(mixture, whole, *options, steps=4) == 0
    assert finetune(mixture, parts, *options, steps=4) == 0
    shutil.rmtree(parts / "checkpoints" / "checkpoint-4", ignore_errors=True)
    assert report(whole)["losses"] == report(parts)["losses"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--method", "ia3"), "--target-parameters with --method ia3: only LoRA and DoRA adapt parameters"),
        (
            ("--stock", "--quant", "none", "--method", "dora"),
            "--stock with DoRA and experts: PEFT has no DoRA for experts, give --target-modules",
        ),
        (("--stock",), "--stock with NF4 and experts: PEFT can't add to 4-bit experts, give --quant none"),
        (
            ("--stock", "--quant", "none"),
            "--stock with experts and --dropout 0.05: PEFT has no dropout for experts, "
            "which a run without --stock has, give --dropout 0",
        ),
    ],
)
def test_what_can_not_be(mixture: Path, tmp_path: Path, capsys, options: tuple[str, ...], text: str) -> None:
    assert finetune(mixture, tmp_path / "out", "--target-parameters", "experts", *options) != 0
    assert text in capsys.readouterr().err


def test_a_model_without_experts(tiny: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    assert finetune(tiny, tmp_path / "out", "--target-parameters", "experts") != 0
    assert "LlamaForCausalLM has no experts that peft_ext knows" in capsys.readouterr().err


@pytest.mark.slow
def test_stock_runs_too(mixture: Path, tmp_path: Path) -> None:
    fused, stock = tmp_path / "fused", tmp_path / "stock"
    options = ("--target-parameters", "experts", "--quant", "none", "--dropout", "0", "--dtype", "fp32")
    assert finetune(mixture, fused, *options) == 0
    assert finetune(mixture, stock, *options, "--stock") == 0
    pairs = torch.tensor([report(fused)["losses"], report(stock)["losses"]])
    torch.testing.assert_close(pairs[0], pairs[1], rtol=1e-4, atol=1e-4)
