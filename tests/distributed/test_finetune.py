"""Tests ``peft-ext finetune`` in several processes of one launcher: equal results, output and errors of one process
only, and no lost data."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from launched import (
    LOSS,
    WEIGHT,
    WEIGHTS,
    Run,
    by_hand,
    differences,
    errors_of,
    options_of,
    port,
    record_of,
    saved,
    started,
    torchrun,
)
from tiny_run import write_gemma3

from peft_ext.cli.main import main
from peft_ext.files import is_sealed

pytestmark = [
    pytest.mark.cpu_only("gloo's processes train on the CPU"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"),
    pytest.mark.skipif(sys.platform != "linux", reason="the tests look into /proc"),
]


def run_of(processes: int, tiny: Path, folder: Path, *more: str) -> Path:
    output = folder / f"of{processes}"
    if not (output / WEIGHTS).exists():
        run = Run([*torchrun(processes), *options_of(tiny, output, 4 // processes, *more)], folder / f"{processes}.log")
        assert run.end() == 0, run.out
        (folder / f"said{processes}").write_text(run.out)
    return output


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_and_adapter_are_those_of_one_process(processes, tiny, folder, alone):
    output = run_of(processes, tiny, folder)
    losses, weights = differences(alone, output)
    assert losses <= LOSS and weights <= WEIGHT
    one, several = record_of(alone), record_of(output)
    for name in ("before", "after"):
        assert several["perplexity"][name] == pytest.approx(one["perplexity"][name], rel=1e-5)
    assert several["held_out"]["last"][1] == pytest.approx(one["held_out"]["last"][1], rel=1e-5)
    curve = [entry for entry in several["history"]["held_out_loss"] if entry is not None]
    assert curve == pytest.approx([entry for entry in one["history"]["held_out_loss"] if entry is not None], rel=1e-5)
    assert several["history"]["tokens"] == one["history"]["tokens"]  # each number counts the tokens of all processes
    assert [sample["before"] for sample in several["samples"]] == [sample["before"] for sample in one["samples"]]
    assert several["check"]["ok"] and several["finished"] and several["step_examples"] == 4
    assert several["processes"]["count"] == len(several["processes"]["peak_mib"]) == processes
    assert all(peak > 100 for peak in several["processes"]["peak_mib"])
    said = (folder / f"said{processes}").read_text()
    for line in ("model: ", "before: held-out", "checked: stock PEFT", f"processes: {processes}, by torchrun; a step"):
        assert len(re.findall(f"^{line}", said, re.MULTILINE)) == 1, said
    assert "arning" not in said, said


@pytest.mark.slow
def test_processes_train_over_8_bit_floats(tiny, tmp_path):
    """gloo can't send 8-bit floats, so that DDP must not send the codes."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(options_of(tiny, one, 4, "--quant", "fp8")) == 0
    run = Run([*torchrun(2), *options_of(tiny, two, 2, "--quant", "fp8")], tmp_path / "log")
    assert run.end() == 0, run.out
    losses, weights = differences(one, two)
    assert losses <= LOSS and weights <= WEIGHT and record_of(two)["check"]["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("targets", [(), ("--target-modules", "q_proj,fc1")], ids=["default", "named"])
def test_processes_train_a_model_for_images_on_text(targets, tiny, tmp_path):
    """Text does not use the vision tower, which gets no adapter by default; "q_proj,fc1" names layers of the tower."""
    more, one, two = ("--model", str(write_gemma3(tiny, tmp_path / "gemma3")), *targets), tmp_path / "1", tmp_path / "2"
    assert main(options_of(tiny, one, 4, *more)) == 0
    run = Run([*torchrun(2), *options_of(tiny, two, 2, *more)], tmp_path / "log")
    assert run.end() == 0, run.out
    losses, weights = differences(one, two)
    assert losses <= LOSS and weights <= WEIGHT and record_of(two)["check"]["ok"]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1)])
def test_a_run_goes_on_with_another_number_of_processes(before, after, tiny, folder, alone):
    whole, output = run_of(before, tiny, folder), folder / f"from{before}to{after}"
    (output / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints/checkpoint-4", output / "checkpoints/checkpoint-4")
    shutil.copy(whole / "run.json", output / "run.json")
    if after == 1:
        assert main([*options_of(tiny, output, 2), "--resume"]) == 2  # refused: two examples a step instead of four
        assert main([*options_of(tiny, output, 4), "--resume"]) == 0
    else:
        run = Run([*torchrun(after), *options_of(tiny, output, 4 // after), "--resume"], folder / "resumed.log")
        assert run.end() == 0, run.out
    losses, weights = differences(alone, output)
    assert losses <= LOSS and weights <= WEIGHT
    assert record_of(output)["resumed"] == [4]


# The variables of other launchers. The port of a job of Slurm follows from the job's number.
LAUNCHERS = {
    "srun": {
        "SLURM_PROCID": "{rank}", "SLURM_STEP_NUM_TASKS": "{world}", "SLURM_LOCALID": "{rank}", "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "{port}",
    },
    "mpirun (Open MPI)": {
        "OMPI_COMM_WORLD_RANK": "{rank}", "OMPI_COMM_WORLD_SIZE": "{world}", "OMPI_COMM_WORLD_LOCAL_RANK": "{rank}",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "{world}", "PMIX_NAMESPACE": "job", "MASTER_PORT": "{port}",
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_with_the_variables_of_srun_or_mpirun(launcher, tiny, alone, tmp_path):
    while not 20000 <= (free := port()) < 40000:  # the ports that jobs of Slurm get
        pass
    first, second = by_hand(2, lambda rank: options_of(tiny, tmp_path / "out", 2), tmp_path, free, LAUNCHERS[launcher])
    assert (first.end(), second.end()) == (0, 0), first.out + second.out
    losses, weights = differences(alone, tmp_path / "out")
    assert losses <= LOSS and weights <= WEIGHT
    assert f"processes: 2, by {launcher}; a step" in first.out and "checked: stock PEFT" not in second.out


# --- accelerate launch ------------------------------------------------------------------------------------------------


def accelerate_launch(file: Path, **settings) -> list[str]:
    """Writes a configuration of accelerate for two processes, and returns the command up to peft_ext's arguments."""
    plain = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_machines": 1,
             "num_processes": 2, "machine_rank": 0, "mixed_precision": "no", "use_cpu": False}  # fmt: skip
    file.write_text(json.dumps(plain | settings))  # JSON is YAML too
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port",
            str(port()), "-m", "peft_ext"]  # fmt: skip


@pytest.mark.slow
def test_the_options_decide_and_not_accelerates_configuration(tiny, folder, alone, tmp_path):
    """With autocast, the losses would be those of bfloat16."""
    command = accelerate_launch(tmp_path / "two.yaml", mixed_precision="bf16")
    run = Run([*command, *options_of(tiny, tmp_path / "out", 2)], tmp_path / "log")
    assert run.end() == 0, run.out
    losses, weights = differences(alone, tmp_path / "out")
    assert losses <= LOSS and weights <= WEIGHT and record_of(tmp_path / "out")["check"]["ok"]
    note = "mixed_precision bf16 of accelerate's configuration has no effect: --dtype decides"
    assert run.out.count(note) == 1 and "processes: 2, by torchrun" in run.out


@pytest.mark.slow
def test_an_engine_of_accelerates_configuration_is_refused(tiny, tmp_path):
    command = accelerate_launch(tmp_path / "fsdp.yaml", distributed_type="FSDP", fsdp_config={"fsdp_version": 2})
    (said,) = errors_of([Run([*command, *options_of(tiny, tmp_path / "out", 2)], tmp_path / "log")])
    assert said == ["accelerate's configuration: ACCELERATE_USE_FSDP is true, wanted a configuration without FSDP: "
                    "--shard fsdp2 and hsdp shard a base"]  # fmt: skip
    assert not (tmp_path / "out").exists()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_error_of_all_ranks_is_printed_once_and_without_a_rank(tiny, tmp_path):
    def arguments(rank):
        return options_of(tiny, tmp_path / "out", 2, "--target-modules", "nothing")

    (said,) = [lines for lines in errors_of(by_hand(2, arguments, tmp_path, port())) if lines]
    assert len(said) == 1 and said[0].startswith("--method lora: ")


def swap_tokens(model: Path) -> None:
    """Exchanges the numbers of two letters in the tokenizer of a folder."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["t"] = vocabulary["t"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


CASES = {
    "other data": (
        ["--data", "{tmp}/pairs.jsonl"],
        r"rank 1: the data of --data, as SHA-256 of the records, is \w{16}, on rank 0 it is \w{16}$",
    ),
    "no data": (["--data", "{tmp}/none.jsonl"], r"rank 1: --data .*none.jsonl: no such file"),
    "other options": (["--lr", "1e-3"], r"rank 1: --lr is 0.001, on rank 0 it is 0.01"),
    "other model": (["--model", "{tmp}/model"], r"rank 1: config.json of --model.* on rank 0 it is"),
    "other tokenizer": (
        ["--model", "{tmp}/tokenizer"],
        r"rank 1: the data of --data, as SHA-256 of the tokens that the tokenizer of --model makes, is \w{16}, on rank",
    ),
    "other package": ([], r"rank 1: bitsandbytes is 0\.0\.1, on rank 0 it is (?!0\.0\.1)"),
    "other folder": (
        ["--output", "{tmp}/elsewhere"],
        r"rank 1: --output .*elsewhere: rank 0 writes into another folder",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_one_rank_sees_otherwise_is_named_by_that_rank(case, tiny, tmp_path):
    (tmp_path / "pairs.jsonl").write_text((tiny / "pairs.jsonl").read_text().replace("It is", "That is"))
    shutil.copytree(tiny / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    (tmp_path / "elsewhere").mkdir()
    swap_tokens(shutil.copytree(tiny / "model", tmp_path / "tokenizer"))
    if case == "other package":  # importlib.metadata finds this version before the installed version
        (about := tmp_path / "packages1/bitsandbytes-0.0.1.dist-info").mkdir(parents=True)
        (about / "METADATA").write_text("Name: bitsandbytes\nVersion: 0.0.1\n")
    more, wanted = CASES[case]

    def arguments(rank):
        changed = [text.format(tmp=tmp_path) for text in more] if rank == 1 else []
        return options_of(tiny, tmp_path / "out", 2, *changed)

    runs = by_hand(2, arguments, tmp_path, port(), PYTHONPATH=str(tmp_path / "packages{rank}"))
    none, said = errors_of(runs)
    assert none == [] and len(said) == 1 and re.match(wanted, said[0]), said
    assert not (tmp_path / "out" / WEIGHTS).exists()


FAILS = """
import errno, os, sys, time
import torch
from transformers import Trainer
from peft_ext.cli.main import main

step, save, fault = Trainer.training_step, Trainer._save_rng_state, sys.argv.pop(1)
def failing_step(self, *args):
    if fault == "memory" and self.state.global_step == 5 and self.args.process_index == 1:
        torch.empty(2**60)
    if fault == f"slow {self.args.process_index}" and self.state.global_step == 5:
        time.sleep(40)
    return step(self, *args)
def failing_save(self, folder):
    if fault == "disk" and self.state.global_step == 8 and self.args.process_index == 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder + "/rng_state_1.pth")
    return save(self, folder)
Trainer.training_step, Trainer._save_rng_state = failing_step, failing_save
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "wanted"),
    [("memory", "rank 1: out of memory: a smaller --batch-size"), ("disk", "rank 1: .*No space left on device")],
)
def test_a_full_memory_or_disk_of_one_rank_ends_all_with_one_error(fault, wanted, tiny, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    command = [*torchrun(2)[:-2], tmp_path / "fails.py", fault, *options_of(tiny, tmp_path / "out", 2)]
    (said,) = errors_of([Run([*command, "--max-steps", "400"], tmp_path / "log")])
    assert len(said) == 1 and re.match(wanted, said[0]) and said[0].endswith("--resume continues from checkpoint-4")


EXPORT_FAILS = """
import errno, os, sys, time
from peft_ext import export
from peft_ext.cli.main import main

def fail(adapter, file, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
export.write_gguf_adapter = fail
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_one_rank_exports(tiny, tmp_path):
    """A failing export ends all ranks with one error, after the adapter was saved."""
    pytest.importorskip("gguf")
    output = tmp_path / "out"
    options = options_of(tiny, output, 2, "--export", "gguf")
    (tmp_path / "fails.py").write_text(EXPORT_FAILS)
    (said,) = errors_of([Run([*torchrun(2)[:-2], tmp_path / "fails.py", *options], tmp_path / "log")])
    assert said == [f"rank 0: --export gguf: {output / 'adapter.gguf'}: No space left on device; the adapter in PEFT's "
                    f"format is saved in {output}"]  # fmt: skip
    assert record_of(output)["finished"] and record_of(output)["check"]["ok"] and (output / WEIGHTS).exists()
    run = Run([*torchrun(2), *options, "--overwrite"], tmp_path / "log")
    assert run.end() == 0 and run.out.count("exported: ") == 1, run.out
    assert (output / "adapter.gguf").is_file()
    assert record_of(output)["runner"]["adapter"] == str(output / "adapter.gguf")


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tiny, tmp_path):
    command = [*torchrun(2), *options_of(tiny, tmp_path / "out", 2, "--max-steps", "4000")]
    with started(command, tmp_path / "log", PEFT_EXT_RANK_SECONDS="8") as run:
        run.wait_for(saved(tmp_path / "out", 8))
        hung = run.wait_for_rank(1)
        hung.suspend()
        run.wait_for(lambda: re.search("^error: ", run.out, re.MULTILINE))
        hung.kill()
        assert run.end()
        (said,) = errors_of([run])
    assert len(said) == 1
    assert re.match(
        r"rank 1 has come no further than step \d+ within 8 s; --resume continues from checkpoint-", said[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_slow_rank_is_named(rank, tiny, tmp_path):
    """The slow rank gives signs of life, and has come as far as the other rank."""
    (tmp_path / "fails.py").write_text(FAILS)
    command = [*torchrun(2)[:-2], tmp_path / "fails.py", f"slow {rank}", *options_of(tiny, tmp_path / "out", 2)]
    (said,) = errors_of([Run(command, tmp_path / "log", PEFT_EXT_RANK_SECONDS="12")])
    assert said == [f"rank {rank} has come no further than step 5 within 12 s; --resume continues from checkpoint-4"]


LONG = ("--dropout", "0.1", "--max-steps", "60")


def unbroken(processes: int, tiny: Path, folder: Path, *more: str) -> Path:
    """Returns the output folder of a run with the options LONG that nothing interrupts."""
    output = folder / f"unbroken{processes}"
    if not output.exists():
        command = [*torchrun(processes), *options_of(tiny, output, 4 // processes, *LONG, *more)]
        run = Run(command, folder / f"unbroken{processes}.log")
        assert run.end() == 0, run.out
    return output


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_that_was_in_a_group_ends_without_finalization():
    """gloo's threads outlive a group that DDP used, and abort a process that Python finalizes meanwhile."""
    program = """
import atexit, sys
from peft_ext.cli import main
from peft_ext.run.ranks import had_group, joined
class Finalized:
    def __del__(self): print("finalized")
kept = Finalized()
atexit.register(print, "exit functions")
if sys.argv[1] == "group":
    with joined(of_one=True): assert had_group()  # also where an error ends the block
main.main = lambda: print("the end", end="") or 3
main.run()
"""
    for group, last in ("group", "the endexit functions\n"), ("none", "the endexit functions\nfinalized\n"):
        done = subprocess.run([sys.executable, "-c", program, group], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (3, last), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("to", ["rank 1", "torchrun"])
def test_a_signal_stops_all_with_one_checkpoint(to, tiny, folder, tmp_path):
    command = [*torchrun(2), *options_of(tiny, tmp_path / "out", 2, *LONG)]
    with started(command, tmp_path / "log") as run:
        run.wait_for(saved(tmp_path / "out", 8))
        if to == "torchrun":
            run.process.send_signal(signal.SIGINT)  # torchrun sends SIGINT to all ranks
        else:
            run.wait_for_rank(1).send_signal(signal.SIGTERM)
        assert run.end()
    (step,) = map(int, re.findall(r"^stopped after step (\d+); the same command with --resume", run.out, re.MULTILINE))
    assert is_sealed(tmp_path / f"out/checkpoints/checkpoint-{step}") and "error: " not in run.out
    again = Run([*command, "--resume"], tmp_path / "again.log")
    assert again.end() == 0, again.out
    assert differences(unbroken(2, tiny, folder), tmp_path / "out") == (0, 0)  # each rank has its saved random state


@pytest.mark.slow
def test_sigusr1_to_one_rank_makes_one_checkpoint_and_the_training_continues(tiny, folder, tmp_path):
    command = [*torchrun(2), *options_of(tiny, tmp_path / "out", 2, *LONG, "--save-steps", "1000")]
    with started(command, tmp_path / "log") as run:
        run.wait_for(lambda: "step  9/60" in run.out)
        run.wait_for_rank(1).send_signal(signal.SIGUSR1)
        assert run.end() == 0, run.out
    found = sorted(int(path.name.partition("-")[2]) for path in (tmp_path / "out/checkpoints").glob("checkpoint-*"))
    assert len(found) == 2 and 9 <= found[0] < found[1] == 60  # the last step has a checkpoint of its own
    assert is_sealed(tmp_path / f"out/checkpoints/checkpoint-{found[0]}")
    assert differences(unbroken(2, tiny, folder), tmp_path / "out") == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 3])
def test_a_killed_rank(restarts, tiny, folder, tmp_path):
    options = options_of(tiny, tmp_path / "out", 2, *LONG)
    with started([*torchrun(2, "--max-restarts", str(restarts)), *options], tmp_path / "log") as run:
        run.wait_for(saved(tmp_path / "out", 8))
        run.wait_for_rank(1).kill()
        code = run.end()
    (said,) = [re.findall("^error: (.*)", run.out, re.MULTILINE)]
    assert len(said) == 1 and re.match(r"rank 1 ended without an error message, after step \d+: a signal", said[0])
    assert re.search(r"--resume continues from checkpoint-\d+$", said[0])
    if not restarts:
        assert code
        again = Run([*torchrun(2), *options, "--resume"], tmp_path / "again.log")
        assert again.end() == 0, again.out
    else:
        assert code == 0, run.out
        assert run.out.count("restart: the run in") == 1, run.out
    assert differences(unbroken(2, tiny, folder), tmp_path / "out") == (0, 0)
    leftovers = [
        path for path in tmp_path.rglob("*") if path.name.endswith((".part", ".tmp")) or ".shared-" in path.name
    ]
    assert leftovers == []


@pytest.mark.slow
def test_two_machines_and_a_killed_agent(tiny, folder, tmp_path):
    """Two agents of torchrun stand for two machines. One agent is killed with its processes, and started again."""
    endpoint = f"127.0.0.1:{port()}"

    def command(is_host):
        conf = f"is_host={is_host},keep_alive_interval=1,keep_alive_max_attempt=3"
        at = ["--nnodes", "2", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint,
              "--rdzv-id", "job", "--rdzv-conf", conf]  # fmt: skip
        return [*torchrun(2, *at), *options_of(tiny, tmp_path / "out", 1, *LONG, "--lr", "1e-4")]

    # Without TORCH_DISABLE_SHARE_RDZV_TCP_STORE, agents of PyTorch 2.13 do not tell the address of rank 0 to an agent
    # that joins later.
    environment = {"PEFT_EXT_RANK_SECONDS": "60", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    first = Run(command(1), tmp_path / "first.log", **environment)  # the agent of this run holds the rendezvous' store
    second = Run(command(0), tmp_path / "second.log", **environment)
    third = None
    try:
        first.wait_for(saved(tmp_path / "out", 8))
        assert second.process.poll() is None and len(second.processes()) == 2, second.out
        second.kill()
        third = Run(command(0), tmp_path / "third.log", **environment)
        assert first.end() == 0 and third.end() == 0, first.out + third.out
    finally:
        for run in filter(None, (first, second, third)):
            run.kill()
    assert (first.out + third.out).count("restart: the run in") >= 1, first.out + third.out
    assert "processes: 4 on 2 machines, by torchrun" in first.out + third.out
    # After a restart, DDP adds the four processes' gradients in another order until it has ordered its buckets.
    losses, _ = differences(unbroken(4, tiny, folder, "--lr", "1e-4"), tmp_path / "out")
    assert losses <= 10 * LOSS
