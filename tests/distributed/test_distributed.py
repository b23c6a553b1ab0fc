"""Tests fused layers in several processes over gloo on the CPU: with DDP, FSDP2, tensor parallelism, DeepSpeed,
accelerate and Trainer.

The checks are in distributed/checks*.py. ``torchrun`` starts two processes once for most checks, and four processes
once for the checks that depend on the number of processes. Each test in this file reports one check.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.cpu_only("gloo's processes train on the CPU"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"),
]

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("checks.py")
SECONDS = 720  # time limit of a run, which took 200 s on two busy cores

CHECKS = [name for path in sorted(SCRIPT.parent.glob("checks*.py"))
          for name in re.findall(r"^@check\n(?:@\w+\n)?def (\w+)", path.read_text(), re.MULTILINE)]  # fmt: skip
# Checks that need a mesh of two by two.
OF_FOUR = ("hybrid_sharding", "loading_for_hybrid_sharding_and_several_nodes", "trainer_hybrid_sharding")
IN_TURN = "trainer_fsdp2_resumes_in_other_processes"  # runs in two processes, then in four, then in one
HAS_TRL = importlib.util.find_spec("trl") is not None
ALSO_OF_FOUR = (
    "ddp_gradients_are_the_same_everywhere",
    "fsdp2_shards_the_codes",
    "fsdp2_shards_unevenly",
    "fsdp2_saves_the_adapter_of_one_process",
    "fsdp2_shards_the_experts",
    "loading_peaks_at_the_shard_and_one_layer",
    "trainer_fsdp2_takes_a_sharded_model",
    *OF_FOUR,
)
# Before 2.13, PyTorch makes each shard a parameter that requires gradients, which uint8 can't: pytorch/pytorch#177844.
SHARDS_BYTES = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 13)
NEEDS_BYTES = re.compile("fsdp2(?!_with_whole)|hybrid|shards|checkpointing|dropout|wrapping|tensor|accelerate_library")

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None

RUNS = {
    2: [
        name
        for name in CHECKS
        if name not in (*OF_FOUR, IN_TURN) and (HAS_DEEPSPEED or not name.startswith("deepspeed_"))
    ],
    4: [name for name in CHECKS if name in ALSO_OF_FOUR],
}
RUNS = {n: [name for name in names if SHARDS_BYTES or not NEEDS_BYTES.search(name)] for n, names in RUNS.items()}


# Each process's results, what all processes printed, and the exit code of torchrun.
Ran = tuple[list[dict[str, str]], str, int]


def torchrun(processes: int, *command: str) -> tuple[int, str]:
    """Returns the exit code and the output. After SECONDS the processes of the run are ended."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run = subprocess.Popen(
        [*launcher, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, _ = run.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGTERM)  # torchrun then ends its workers, which have sessions of their own
        try:
            out, _ = run.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            out, _ = run.communicate()
        out += f"\nended after {SECONDS} s"
    return run.returncode, out


class Results(dict[tuple[int, bool], Ran]):
    """Has, by number of processes and by whether the checks are DeepSpeed's, each process's results, the output and
    the exit code.

    The first test that needs the results starts the processes.
    """

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self.folders = folders

    def __missing__(self, key: tuple[int, bool]) -> Ran:
        processes, of_deepspeed = key
        folder = self.folders.mktemp(f"processes-{processes}")
        names = [name for name in RUNS[processes] if HAS_TRL or not name.startswith("sft_")]
        names = [name for name in names if name.startswith("deepspeed_") is of_deepspeed]
        self[key] = run(processes, folder, *names)
        return self[key]


def run(processes: int, folder: Path, *names: str) -> Ran:
    """Runs checks, and returns each process's results, the output and the exit code."""
    code, out = torchrun(processes, str(SCRIPT), str(folder), *names)
    files = [folder / f"{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files], out, code


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory)


@pytest.mark.skipif(HAS_DEEPSPEED, reason="DeepSpeed is installed: test_in_processes runs the checks")
@pytest.mark.parametrize("name", [name for name in CHECKS if name.startswith("deepspeed_")])
def test_deepspeed_is_absent(name: str) -> None:
    pytest.skip("needs the package deepspeed: make deepspeed installs it and runs the check")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "name"), [(n, name) for n, names in RUNS.items() for name in names])
def test_in_processes(processes: int, name: str, results: Results) -> None:
    if name.startswith("sft_"):
        pytest.importorskip("trl", reason="needs trl, of peft_ext[examples]")
    found, out, _ = results[processes, name.startswith("deepspeed_")]
    for rank, done in enumerate(found):
        failed = [(other, outcome) for results in found for other, outcome in results.items() if outcome != "ok"]
        if name not in done and failed:
            pytest.fail(f"process {rank} did not reach the check, because of {failed[0][0]}: {failed[0][1]}")
        assert done.get(name) == "ok", f"process {rank}: {done.get(name, 'not reached')}\n{out[-4000:]}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "key", sorted({(n, name.startswith("deepspeed_")) for n, names in RUNS.items() for name in names})
)
def test_the_processes_end_without_an_error(key: tuple[int, bool], results: Results) -> None:
    """A process may also end with an error after its last check, for example when Python is finalized."""
    _, out, code = results[key]
    assert code == 0, out[-4000:]


def test_every_check_is_run() -> None:
    assert len(CHECKS) == len(set(CHECKS)) >= 20 and set(ALSO_OF_FOUR) <= set(CHECKS)
    if SHARDS_BYTES:
        wanted = {name for name in CHECKS if HAS_DEEPSPEED or not name.startswith("deepspeed_")}
        assert {IN_TURN, *(name for names in RUNS.values() for name in names)} == wanted


@pytest.mark.slow
@pytest.mark.skipif(not SHARDS_BYTES, reason="this PyTorch cannot shard uint8")
def test_a_checkpoint_resumes_in_another_number_of_processes(tmp_path: Path) -> None:
    for processes in (2, 4, 1):
        found, out, code = run(processes, tmp_path, IN_TURN)
        assert code == 0, out[-4000:]
        assert [done.get(IN_TURN) for done in found] == ["ok"] * processes, (found, out[-4000:])


@pytest.mark.slow
def test_example(tmp_path: Path) -> None:
    options = ("--tiny", "--max-steps", "3", "--strategy", "fsdp2", "--output", str(tmp_path))
    code, out = torchrun(2, "docs/examples/distributed.py", *options)
    assert code == 0, out
    assert out.count("14 of 14 layers fused (100%)") == 1
    assert len(re.findall(r"^loss: \S+ -> \S+ in 3 steps$", out, re.MULTILINE)) == 1
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}


def test_the_figures_of_the_page_are_those_of_its_code(capsys: pytest.CaptureFixture) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "MODELS" in block)
    exec(compile(code, "scaling.md", "exec"), {})
    rows = capsys.readouterr().out
    assert rows.count("\n") == 12 and rows in page
