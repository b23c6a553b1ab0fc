"""A folder with a tiny random model and data files, and functions that run the command line on this folder."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import write_pairs, write_tiny_model

from peft_ext.cli.main import main
from peft_ext.methods import METHODS

needs_hf = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "peft", "accelerate")),
    reason="needs peft_ext[hf]",
)
needs_bnb = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Returns a folder with ``model`` (a random Llama with a byte tokenizer) and the files pairs.jsonl and docs.txt."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "model")
    write_pairs(folder / "pairs.jsonl")
    text = "\n\n".join(f"Paragraph {i}. " + "The quick brown fox jumps over the lazy dog. " * 20 for i in range(40))
    (folder / "docs.txt").write_text(text)
    return folder


def write_gemma3(tiny: Path, folder: Path) -> Path:
    """Writes a random Gemma 3 for text and images, with the tokenizer of the tiny model, and returns ``folder``."""
    import torch
    import transformers

    text = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16, "max_position_embeddings": 256,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4,
                                       image_token_id=257, boi_token_id=255, eoi_token_id=256)  # fmt: skip
    transformers.Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(folder)
    return folder


def used(options: dict[str, Any]) -> dict[str, Any]:
    """Returns those of the options of a run that its method uses: only low-rank methods have a rank and dropout."""
    low_rank = METHODS[options.get("method", "lora")].kind == "low-rank"
    return {name: value for name, value in options.items() if low_rank or name not in ("rank", "dropout")}


def rank_for(options: Sequence[Any]) -> tuple[str, ...]:
    """Returns the arguments that give a small rank, if the method that the arguments ``options`` name has a rank."""
    method = options[options.index("--method") + 1] if "--method" in options else "lora"
    return ("--rank", "4") if method in METHODS and METHODS[method].kind == "low-rank" else ()


def finetune(tiny: Path, output: Path, *options: str, data: str = "pairs.jsonl", steps: int = 4) -> int:
    """Runs a few steps of finetune on the tiny model and returns the exit code."""
    return main(
        ["finetune", "--model", str(tiny / "model"), "--data", str(tiny / data), "--output", str(output),
         "--batch-size", "2", "--block-size", "64", *rank_for(options), "--max-steps", str(steps), *options]
    )  # fmt: skip


def check_packed_base(folder: Path, output: Path, about: str, capsys: pytest.CaptureFixture) -> dict:
    """Checks the plan and a run of finetune over the packed base ``folder / "model"``. Returns the run's report.

    ``about`` is the text that describes the base's weights. The run has two steps, and a checkpoint after each step.
    """
    assert finetune(folder, output, "--dry-run", steps=2) == 0
    out = capsys.readouterr().out
    assert about in out and "loading: the packed weights" in out and not output.exists()
    assert finetune(folder, output, "--save-steps", "1", steps=2) == 0
    assert f"model: {folder / 'model'}, {about}\n" in capsys.readouterr().out
    found = report(output)
    assert found["options"]["quant"] == "checkpoint" and found["finished"] and found["check"]["ok"]
    assert 0 < found["fused"]["fused"] == found["fused"]["layers"]
    adapter = json.loads((output / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(folder / "model")
    return found


def check_packed_adapter(output: Path, merged: Path, capsys: pytest.CaptureFixture) -> None:
    """Checks explain, chat and merge on the adapter of a packed base. ``merged`` is the folder of the merged model."""
    assert main(["explain", str(output), "--json", "--sequence-length", "32"]) == 0
    shown = json.loads(capsys.readouterr().out)
    (method,) = shown["methods"]
    assert shown["quantization"] == "checkpoint" and method["fused"] == method["layers"]
    assert method["memory"] is not None
    assert main(["chat", "--adapter", str(output), "--prompt", "hello", "--max-new-tokens", "2"]) == 0
    assert main(["merge", "--adapter", str(output), "--output", str(merged)]) == 0
    assert "as the base is held" in capsys.readouterr().out


def report(output: Path) -> dict:
    """Returns the content of a run's run.json."""
    return json.loads((output / "run.json").read_text())
