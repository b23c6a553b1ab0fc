"""Runs of ``peft-ext finetune`` in several processes, which tests start, kill and compare."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import psutil  # the accelerate library requires psutil
import torch
from safetensors.torch import load_file

WEIGHTS = "adapter_model.safetensors"
# Bounds of the differences of runs that sum over a step's examples in other parts: for losses, a few units in the last
# place of a loss near 5; for weights, the effect of the gradients' rounding in eight steps of Adam with a learning rate
# of 0.01.
LOSS, WEIGHT = 4e-6, 2e-5
SECONDS = 300  # a run that takes longer is ended


def options_of(tiny: Path, output: Path, batch_size: int, *more: str) -> list[str]:
    """Returns the arguments of a float32 run without dropout over the tiny model, whose losses fall fast."""
    options = {
        "model": tiny / "model", "data": tiny / "pairs.jsonl", "output": output, "block-size": 64, "dtype": "fp32",
        "dropout": 0, "quant": "none", "lr": 1e-2, "rank": 4, "batch-size": batch_size, "max-steps": 8, "save-steps": 4,
        "prompt": "What is 3 plus 3?",
    }  # fmt: skip
    return ["finetune", *(text for name, value in options.items() for text in (f"--{name}", str(value))), *more]


def torchrun(processes: int, *options: str) -> list[str]:
    """Returns torchrun's command up to the arguments of peft_ext."""
    where = () if any("nnodes" in option for option in options) else ("--standalone",)
    return [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(processes), *options,
            "-m", "peft_ext"]  # fmt: skip


class Run:
    """A started command. ``out``: the text that the command has printed so far."""

    def __init__(self, command: Sequence[Any], log: Path, **environment: str) -> None:
        own = {**os.environ, "PEFT_EXT_REQUIRE": "1"}  # without the native library, the run fails
        own |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [str(part) for part in command], cwd=Path(__file__).parents[2], env=own, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def out(self) -> str:
        return self.log.read_text()

    def end(self) -> int:
        """Waits for the command, and returns its exit code."""
        try:
            return self.process.wait(SECONDS)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kills the command and its processes, if they still run."""
        for process in self.processes():
            process.kill()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def processes(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def of_rank(self, rank: int) -> Optional[psutil.Process]:
        """Returns the process of a rank; None if no process of the rank runs now."""
        for process in self.processes():
            try:
                if process.environ().get("RANK") == str(rank):
                    return process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return None

    def wait_for_rank(self, rank: int) -> psutil.Process:
        """Waits until a process of the rank runs, and returns the process."""
        return self.wait_for(lambda: self.of_rank(rank))

    def wait_for(self, ready: Callable[[], Any]) -> Any:
        """Calls ``ready`` until its value is true, and returns the value. Fails if the command ends before."""
        end = time.monotonic() + SECONDS
        while not (found := ready()):
            assert time.monotonic() < end and self.process.poll() is None, self.out[-4000:]
            time.sleep(0.02)
        return found


@contextmanager
def started(command: Sequence[Any], log: Path, **environment: str) -> Iterator[Run]:
    """Starts a command and yields its Run. At the end of the block, kills the command and its processes."""
    run = Run(command, log, **environment)
    try:
        yield run
    finally:
        run.kill()


# The variables that a launcher sets for the processes of one machine, as formats of a process's numbers.
VARIABLES = {"RANK": "{rank}", "WORLD_SIZE": "{world}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"}


def by_hand(
    world: int,
    arguments: Callable[[int], list[str]],
    folder: Path,
    port: int,
    launcher: Mapping[str, str] = VARIABLES,
    **environment: str,
) -> list[Run]:
    """Starts ``world`` processes without a launcher, and returns their runs.

    Each process has the variables of ``launcher`` and ``environment``, with values for {rank}, {world} and {port}.
    """
    runs = []
    for rank in range(world):
        numbers = {"rank": rank, "world": world, "port": port}
        variables = {name: text.format(**numbers) for name, text in {**launcher, **environment}.items()}
        runs.append(Run([sys.executable, "-m", "peft_ext", *arguments(rank)], folder / f"rank{rank}.log", **variables))
    return runs


def saved(output: Path, step: int) -> Callable[[], bool]:
    """Returns a function that returns whether a run has a checkpoint of ``step`` or of a later step.

    A run keeps its last two checkpoints and removes earlier ones, so that a test that looks rarely may never see the
    checkpoint of one step.
    """

    def has_come() -> bool:
        names = [path.name for path in (output / "checkpoints").glob("checkpoint-*")]
        return any(int(found[1]) >= step for name in names if (found := re.fullmatch(r"checkpoint-(\d+)", name)))

    return has_come


def record_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "run.json").read_text())


def differences(one: Path, other: Path) -> tuple[float, float]:
    """Returns the largest difference of the losses of two runs, and of the weights of their adapters."""
    first, second = record_of(one), record_of(other)
    assert len(first["losses"]) == len(second["losses"])
    losses = max(abs(a - b) for a, b in zip(first["losses"], second["losses"], strict=True))
    a, b = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert a.keys() == b.keys()
    return losses, max(torch.dist(a[name], b[name], float("inf")).item() for name in a)


def port() -> int:
    """Returns a port that no process uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def errors_of(runs: list[Run]) -> list[list[str]]:
    """Returns the lines of errors that each process printed. All processes must end with an error."""
    assert all(run.end() for run in runs), [run.out for run in runs]
    return [re.findall(r"^error: (.*)", run.out, re.MULTILINE) for run in runs]
