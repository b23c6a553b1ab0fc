"""Tests the library of a run: each method trains, saves, re-reads and reports, and resumes and merges if possible."""

import json
import logging
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiers import first
from tiny_run import used
from transformers import AutoModelForCausalLM

import peft_ext
from peft_ext.files import seal
from peft_ext.methods import KINDS, METHODS, make_config, method_config
from peft_ext.run import Options, RunError, dry_run, finetune, train
from peft_ext.run.checkpoints import check_output, check_same_data, may_write_config, own_output, sole_writer
from peft_ext.run.config import write_config
from peft_ext.run.data import Order
from peft_ext.run.errors import Stop
from peft_ext.run.prepare import prepare, pruning_step
from peft_ext.run.ranks import Ranks
from peft_ext.run.record import Record
from peft_ext.text import format_bytes
from peft_ext.tuners import DiffPruningModel

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.cpu_only("a run chooses the device itself"),
    pytest.mark.usefixtures("short_answers"),
]
WEIGHTS = "adapter_model.safetensors"


def options_of(tiny: Path, output: Path, **changes) -> Options:
    return Options(
        **used({"model": str(tiny / "model"), "data": str(tiny / "pairs.jsonl"), "output": output, "rank": 4,
                "batch_size": 2, "block_size": 64, "max_steps": 4, "save_steps": 2, **changes})
    )  # fmt: skip


@pytest.mark.parametrize("method", first(METHODS, ("lora",)))
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


@pytest.mark.slow
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


# --- files of an earlier run ------------------------------------------------------------------------------------------

KEPT = ("README.md", "notes.txt", "checkpoints/mine/state", "checkpoints/checkpoint-best/state")
OWN = ("report.html", "finetune.yaml", "adapter.gguf", "run.json", "checkpoints/checkpoint-2/state")
ADAPTER = (WEIGHTS, "adapter_config.json")


def earlier_run(folder: Path, with_record: bool = True) -> Options:
    """Writes files of an earlier run and files of the user; returns the options of a run that starts over."""
    options = Options(output=folder, lr=1e-3, overwrite=True)
    for name in (*KEPT, *OWN, *ADAPTER):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    write_config(folder / "finetune.yaml", options)
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    (folder / "run.json").write_text(json.dumps({"options": values} if with_record else [values]))
    return options


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {".lock"}


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    options = earlier_run(tmp_path)
    assert check_output(options) is None
    with own_output(options, None, Ranks()):
        saved = {f".previous/{name}" for name in ("README.md", *OWN[:-1], *ADAPTER)}
        assert files_of(tmp_path) == {*KEPT, *saved} and may_write_config(options)


def test_overwrite_keeps_options_that_were_edited(tmp_path):
    options = earlier_run(tmp_path)
    text = (tmp_path / "finetune.yaml").read_text().replace("0.001", "0.002")
    (tmp_path / "finetune.yaml").write_text(text)
    assert not may_write_config(options)
    with own_output(options, None, Ranks()):
        assert (tmp_path / "finetune.yaml").read_text() == text and not (tmp_path / "report.html").exists()
        assert not may_write_config(options)


def test_overwrite_removes_nothing_where_no_run_was(tmp_path):
    options = earlier_run(tmp_path, with_record=False)
    foreign = [tmp_path / name for name in ("run.json", "report.html", "adapter.gguf", "checkpoints/checkpoint-2")]
    before = files_of(tmp_path)
    with own_output(options, None, Ranks()):  # the two files of the adapter are moved, all other files stay
        assert files_of(tmp_path) == (before - {*ADAPTER}) | {f".previous/{name}" for name in ("README.md", *ADAPTER)}
        assert not may_write_config(options)
    # This file alone may belong to an adapter whose weights are a pickle, so nothing is moved.
    (tmp_path / "adapter_config.json").write_text("")
    before = files_of(tmp_path)
    with own_output(options, None, Ranks()):
        assert files_of(tmp_path) == before
    for path in foreign:  # a run would write over these files
        with pytest.raises(RunError, match=f"^--overwrite: {path} is not of an earlier run, because .* no run.json"):
            check_output(replace(options, export="gguf"))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert check_output(replace(options, export="gguf")) is None


def test_another_run_that_began_and_ended_meanwhile(tiny, tmp_path):
    """The folder was empty, or had an earlier last checkpoint, when the run looked at the folder first."""
    options = options_of(tiny, tmp_path / "run")
    assert check_output(options) is None
    checkpoint, later = (tmp_path / f"run/checkpoints/checkpoint-{step}" for step in (2, 4))
    for folder in (checkpoint, later):
        folder.mkdir(parents=True)
        (folder / "a").write_text("a")
        seal(folder)
    with pytest.raises(RunError, match="not empty; --resume continues it"), own_output(options, None, Ranks()):
        pass
    resumed = replace(options, resume=True)
    with pytest.raises(RunError, match="another run has written into .*: its last checkpoint is no longer"):
        with own_output(resumed, checkpoint, Ranks()):
            pass
    assert later.is_dir()
    (later / "a").write_text("b")  # a later checkpoint that is not whole is removed
    with own_output(resumed, checkpoint, Ranks()):
        assert checkpoint.is_dir() and not later.exists()


def test_a_folder_that_another_process_has_locked_is_refused(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=f"^--output {tmp_path}: another process is writing to it$"):
            with sole_writer(tmp_path):
                pass
    with sole_writer(tmp_path), (tmp_path / ".lock").open("w") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_resumed_run_takes_the_data_of_the_run(tmp_path):
    options = Options(output=tmp_path, data="pairs.jsonl", resume=True)
    for record in ({}, {"examples": None}, {"examples": {}}, {"examples": {"digest": "a"}}):
        (tmp_path / "run.json").write_text(json.dumps(record))
        check_same_data(options, "a")  # a former version wrote no digest
    with pytest.raises(RunError, match="^--resume: the records of --data pairs.jsonl differ from those of the run in"):
        check_same_data(options, "b")


def test_resume_needs_the_record_of_the_run(tmp_path):
    options = replace(earlier_run(tmp_path), overwrite=False, resume=True)
    with pytest.raises(RunError, match="^--resume: no checkpoint in .* is whole"):
        check_output(options)
    wrong = (b"[1]", b"{}", b'{"options": [1]}', b"{", b"\xff", b"[" * 10**5)
    for text in (*wrong, None):
        (tmp_path / "run.json").unlink() if text is None else (tmp_path / "run.json").write_bytes(text)
        with pytest.raises(RunError) as caught:
            check_output(options)
        assert str(caught.value) == (
            f"--resume: {tmp_path}/run.json is missing or no record of a run, so options and data can't be compared "
            "with those of the run: restore the file, or choose another --output"
        )


@pytest.mark.slow
def test_a_run_that_starts_over_keeps_what_the_user_wrote(tiny, tmp_path):
    options = options_of(tiny, tmp_path / "run", max_steps=1, save_steps=1)
    finetune(options)
    card, config = tmp_path / "run/README.md", tmp_path / "run/finetune.yaml"
    card.write_text(card.read_text() + "\nMine.\n")
    (tmp_path / "run/checkpoints/notes").write_text("mine")
    finetune(replace(options, overwrite=True, seed=1))
    assert "Mine." in card.read_text() and "seed: 1\n" in config.read_text()
    assert (tmp_path / "run/checkpoints/notes").exists() and not (tmp_path / "run/.previous").exists()
    config.write_text(config.read_text() + "# mine\n")
    finetune(replace(options, overwrite=True, seed=2))
    assert "seed: 1\n" in config.read_text() and config.read_text().endswith("# mine\n")
    assert json.loads((tmp_path / "run/run.json").read_text())["options"]["seed"] == 2


# --- the trainer ------------------------------------------------------------------------------------------------------


def test_the_trainer_has_the_options_of_the_run(tiny, tmp_path):
    options = options_of(tiny, tmp_path / "run", grad_accum=3, lr=3e-3, seed=7, warmup=0.0, quant="none")
    run = prepare(options)
    trainer = train._trainer(run, Record(run), AutoModelForCausalLM.from_config(run.config))
    trainer.create_optimizer_and_scheduler(run.steps)
    assert trainer.args.max_steps == 4 and trainer.args.seed == 7
    assert trainer.args.train_batch_size == 2 and trainer.args.gradient_accumulation_steps == 3
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [3e-3] * len(trainer.optimizer.param_groups)
    assert list(trainer._get_train_sampler()) == list(Order(len(run.examples.train), 4 * 2 * 3, 7))


@pytest.mark.parametrize("world", [1, 2])
def test_training_goes_on_from_the_checkpoint_with_random_numbers_of_each_rank(tmp_path, monkeypatch, world):
    seen = []

    class Trainer:
        state = SimpleNamespace(global_step=4)

        def train(self, resume_from_checkpoint):
            seen.append((resume_from_checkpoint, torch.rand(1).item()))

    monkeypatch.setattr(train, "_trainer", lambda *_: Trainer())
    monkeypatch.setattr(train.gc, "collect", lambda: 0)  # takes half a second in a process with many objects
    for rank, checkpoint in [(rank, path) for rank in range(world) for path in (None, tmp_path / "checkpoint-2")]:
        ranks = SimpleNamespace(rank=rank, world=world, speaks=rank == 0, gather=lambda value: [value])
        run = SimpleNamespace(options=Options(seed=3), ranks=ranks, checkpoint=checkpoint, steps=4, stop=Stop(),
                              seconds={"train": 1.0}, sharded=False, phase=lambda name: nullcontext())  # fmt: skip
        torch.manual_seed(3)
        assert train.fit(run, SimpleNamespace(meter=SimpleNamespace(peak_mib=None)), None) == 4
    assert [path for path, _ in seen] == [None, str(tmp_path / "checkpoint-2")] * world
    assert len({number for _, number in seen}) == world  # each rank draws its own dropout masks


# --- steps and errors -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("steps, pruned", [(2, 2), (3, 2), (6, 3)])
def test_diff_pruning_prunes_after_a_step_that_trains(tiny, tmp_path, monkeypatch, steps, pruned):
    """With a warmup the learning rate of the first step is 0."""
    seen = []
    prune = DiffPruningModel.prune

    def counted(self, target, name, optimizer):
        seen.append(int(next(iter(optimizer.state.values()))["step"]))
        return prune(self, target, name, optimizer)

    monkeypatch.setattr(DiffPruningModel, "prune", counted)
    result = finetune(options_of(tiny, tmp_path / "run", method="diff-pruning", max_steps=steps, save_steps=0))
    assert result.finished and result.check.ok and seen == [pruned]


def test_diff_pruning_needs_a_step_that_trains(tiny, tmp_path):
    with pytest.raises(RunError, match="^--method diff-pruning with one step and --warmup 0.05: "):
        prepare(options_of(tiny, tmp_path / "run", method="diff-pruning", max_steps=1))
    run = prepare(options_of(tiny, tmp_path / "run", method="diff-pruning", max_steps=1, warmup=0.0))
    assert pruning_step(run) == 1


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
