"""Tests the library of a run: each method trains, saves, re-reads and reports, and resumes and merges if possible."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiers import first
from transformers import AutoModelForCausalLM

import peft_ext
from peft_ext.methods import KINDS, METHODS, make_config, method_config
from peft_ext.run import Options, RunError, dry_run, evaluate, finetune, train
from peft_ext.run.prepare import prepare
from peft_ext.text import format_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.cpu_only("a run chooses the device itself"),
]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "NEW_TOKENS", 2)
        patch.setattr(evaluate, "SAMPLES", 0)
        yield


def options_of(tiny: Path, output: Path, **changes) -> Options:
    return Options(
        **{"model": str(tiny / "model"), "data": str(tiny / "pairs.jsonl"), "output": output, "rank": 4,
           "batch_size": 2, "block_size": 64, "max_steps": 4, "save_steps": 2, **changes}
    )  # fmt: skip


@pytest.mark.parametrize("method", first(METHODS, ("lora", "dora")))
def test_every_method(tiny, tmp_path, method):
    if method == "dora":
        pytest.importorskip("bitsandbytes")
    options = options_of(tiny, tmp_path / "run", method=method)
    result = finetune(options)
    assert result.finished and result.check.ok and result.stopped_by == 0
    assert result.steps == len(result.losses) == 4
    assert result.perplexity_after != result.perplexity_before
    assert result.adapter_bytes == (result.output / WEIGHTS).stat().st_size
    assert result.tokens_per_s > 0 and result.peak_mib > 0
    record = json.loads((result.output / "run.json").read_text())
    assert record["options"]["quant"] == METHODS[method].quant and record["losses"] == result.losses
    assert (result.output / "report.html").read_text().endswith("</html>\n")
    assert result.fused_layers == result.layers or METHODS[method].kind == "selective"
    if method == "diff-pruning":
        kept = json.loads((result.output / "adapter_config.json").read_text())["kept"]
        assert 0 < sum(kept.values()) <= 0.005 * 73_728  # 73,728 is the number of parameters of the linear layers
    _resumes(options, result, tmp_path / "broken")
    _merges(options, result, tmp_path)


def _resumes(options: Options, whole: train.Result, folder: Path) -> None:
    """Asserts that a resumed run has the bits of an uninterrupted run, or that the method can't resume, with a
    reason.
    """
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole.output / "checkpoints/checkpoint-2", folder / "checkpoints/checkpoint-2")
    shutil.copy(whole.output / "run.json", folder / "run.json")
    again = replace(options, output=folder, resume=True)
    if not METHODS[options.method].can_resume:
        with pytest.raises(RunError, match=f"^--resume with --method {options.method}: "):
            finetune(again)
        return
    resumed = finetune(again)
    assert resumed.losses == whole.losses
    assert (folder / WEIGHTS).read_bytes() == (whole.output / WEIGHTS).read_bytes()


def _merges(options: Options, result: train.Result, folder: Path) -> None:
    """Asserts that the merged model has the adapted model's logits up to rounding, or that the merge is refused."""
    assert result.can_merge == METHODS[options.method].can_merge
    if not result.can_merge:
        with pytest.raises(peft_ext.MergeError, match="."):
            peft_ext.merge_to_dense(None, result.output, folder / "dense")
        return
    peft_ext.merge_to_dense(None, result.output, folder / "dense", dtype="fp32")
    run = prepare(replace(options, output=folder / "nothing", dtype="fp32"))
    adapted = peft_ext.load_adapter(train.load_base(run), result.output, accelerate=False).eval()
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        wanted = adapted(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.slow
def test_equal_runs_in_two_processes_write_equal_adapters(tiny, tmp_path):
    """Python's hash seed decides the order of PEFT's sets of module names; this order must not change the adapter."""
    written = []
    for seed in ("1", "2"):
        run = tmp_path / seed / "run"
        command = [sys.executable, "-m", "peft_ext", "finetune", "--model", tiny / "model", "--output", run,
                   "--data", tiny / "pairs.jsonl", "--max-steps", "1", "--save-steps", "1",
                   "--block-size", "64"]  # fmt: skip
        done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        written.append({str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*")
                        if path.name in ("README.md", "adapter_config.json", WEIGHTS)})  # fmt: skip
    names = json.loads(written[0]["adapter_config.json"])["target_modules"]
    assert len(written[0]) == 6 and len(names) > 6 and names == sorted(names)
    assert written[0] == written[1]


def test_the_table_has_a_configuration_and_a_page_for_every_method():
    pages = Path(__file__).parents[2] / "docs/methods"
    for name, method in METHODS.items():
        assert method.kind in KINDS and (pages / f"{method.page}.md").is_file(), name
        config = make_config(*method_config(name, "CAUSAL_LM"))
        assert config.is_prompt_learning == (method.kind == "prompt")


def test_a_run_tells_what_it_does_to_who_listens(tiny, tmp_path, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="peft_ext.run"):
        finetune(options_of(tiny, tmp_path / "run", max_steps=1, save_steps=0))
    assert capsys.readouterr() == ("", "")
    assert any(message.startswith("step 1/1  loss ") for message in caplog.messages)
    assert caplog.messages[-1].startswith("checked: stock PEFT re-reads the adapter")


def test_a_dry_run_tells_what_the_run_would_be(tiny, tmp_path):
    plan = dry_run(options_of(tiny, tmp_path / "run", method="bitfit"))
    assert plan.steps == 4 and plan.adapter.trainable == plan.run.trainable > 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes, message", [
    ({"rank": 0}, "--rank 0: wanted 1 to 2147483647"),
    ({"method": "full"}, "--method full: unknown method, wanted one of "),
    ({"model": "./nowhere"}, "--model ./nowhere: no such folder"),
    ({"method": "diff-pruning", "quant": "nf4"}, "--quant nf4 with --method diff-pruning: "),
    ({"method": "prefix", "gradient_checkpointing": True}, "--gradient-checkpointing with --method prefix: "),
])  # fmt: skip
def test_what_can_be_mended_is_one_line(tiny, tmp_path, changes, message):
    with pytest.raises(RunError) as caught:
        finetune(options_of(tiny, tmp_path / "run", **changes))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_bytes_are_written_in_one_way():
    shown = {0: "0 bytes", 999: "999 bytes", 1536: "1.50 KiB", 2448424960: "2.28 GiB", 250 * 2**20: "250 MiB"}
    assert {size: format_bytes(size) for size in shown} == shown
    assert format_bytes(19_600_000, binary=False) == "19.6 MB" and format_bytes(None) == "–"
