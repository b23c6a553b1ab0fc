"""Kills or stops processes of fine-tuning runs at many moments, and compares the results with those of unbroken runs.

    python tools/kill_table.py [--parts one,shard,two] [--moments 19] [--write docs/kills.tsv]

The parts of the table:

- one: one agent of torchrun with two processes and up to three restarts. In each run one process gets SIGKILL, rank 0
  and rank 1 in turn; the moment differs from run to run.
- shard: the runs of the part one with ``--shard fsdp2``.
- two: two agents of torchrun with two processes each, like two machines; CASES lists the runs.

A row has the moment in seconds after the start, the signal, the process or agent that got the signal, the last line
that the run had printed, the number of processes whose failure torchrun reports, what made the run continue, and the
largest differences of losses and weights from those of the unbroken run. A run continues by torchrun (with
``--max-restarts``), by a new agent in the place of the agent that ended, by the same command with ``--resume``, which
the error or the last line names, or, if the run has no checkpoint yet, by the same command with ``--overwrite``.

The exit code is 1 if a part sent its signal in half of its runs or fewer, if a run failed, if a difference is too
large, if an error is missing or names the wrong option, if a process outlived its agent, or if a run left a hidden file
other than ``.lock`` and ``.metadata``. With two processes, no difference is allowed. With four processes, the losses
may differ by 4e-5, because DDP adds the gradients in another order in the first step after a start. ``make nightly``
runs this script.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil  # noqa: E402
from launched import Run, differences, options_of, torchrun  # noqa: E402
from tiny_run import write_tiny_model  # noqa: E402

COLUMNS = (
    "agents", "processes", "engine", "--max-restarts", "moment s", "signal", "to", "after", "failures", "continues by",
    "losses differ by", "weights differ by", "result",
)  # fmt: skip
OPTIONS = ("--dropout", "0.1", "--max-steps", "60")
LOSS = 4e-5  # Largest allowed difference of the losses of runs with four processes; the losses are near 5.
# Without TORCH_DISABLE_SHARE_RDZV_TCP_STORE, agents of PyTorch 2.13 do not tell the address of rank 0 to an agent that
# joins later.
ENVIRONMENT = {"PEFT_EXT_RANK_SECONDS": "60", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@dataclass(frozen=True)
class Case:
    """A run of the part two, in which the process or agent ``to`` (such as "rank 3" or "agent 1") gets the signal
    ``number``. With ``whole``, the processes of the agent get SIGKILL too.

    ``at``: the moment of the signal: seconds after the start (a float), the first log line of at least this step (an
    int), or the first log line that begins with this text. ``restarts``: value of --max-restarts. ``then``: what makes
    the run continue.
    """

    at: Union[float, int, str]
    to: str
    number: signal.Signals
    restarts: int
    then: str
    whole: bool = False


KILL, TERM = signal.SIGKILL, signal.SIGTERM
CASES = (
    Case(2.0, "rank 0", KILL, 3, "torchrun"), Case(6.0, "agent 1", KILL, 3, "a new agent", True),
    Case("model: ", "rank 3", KILL, 0, "--overwrite"), Case("before: ", "rank 2", KILL, 3, "torchrun"),
    Case("training: ", "rank 1", KILL, 3, "torchrun"), Case(1, "rank 3", KILL, 0, "--overwrite"),
    Case(4, "rank 2", KILL, 3, "torchrun"), Case(5, "agent 1", TERM, 3, "a new agent"),
    Case(8, "rank 0", KILL, 0, "--resume"), Case(13, "agent 1", KILL, 3, "a new agent", True),
    Case(18, "agent 0", TERM, 3, "--resume"), Case(24, "rank 3", KILL, 3, "torchrun"),
    Case(29, "agent 1", KILL, 3, "a new agent"), Case(33, "agent 0", KILL, 3, "--resume", True),
    Case(38, "rank 1", KILL, 0, "--resume"), Case(44, "rank 0", KILL, 3, "torchrun"),
    Case(47, "agent 1", KILL, 0, "--resume", True), Case(52, "rank 1", KILL, 3, "torchrun"),
    Case(56, "rank 3", KILL, 0, "--resume"), Case(59, "rank 2", KILL, 3, "torchrun"),
    Case("speed: ", "rank 0", KILL, 3, "torchrun"), Case("held-out perplexity", "rank 1", KILL, 3, "torchrun"),
)  # fmt: skip


def row_of(
    head: list[str], whole: Path, output: Path, codes: list[int], processes: int, wrong: str
) -> list[str]:  # fmt: skip
    """Returns a row of the table: ``head``, the differences of losses and weights between the runs in the folders
    ``whole`` and ``output`` (empty texts if one of ``codes``, the exit codes of the run, is not 0), and the result.
    ``wrong``: an error of the run that is already known, or ""."""
    if any(codes):
        return [*head, "", "", f"exit codes {codes}"]
    losses, weights = differences(whole, output)
    # torch.distributed.checkpoint calls the description of a checkpoint ".metadata".
    left = [path.name for path in output.rglob(".*") if path.name not in (".lock", ".metadata")]
    result = "equal" if losses == weights == 0 else "equal up to rounding" if losses <= LOSS else "differs"
    if processes == 2 and result != "equal":
        result = "differs"
    result = wrong or (f"left {left[0]}" if left else result)
    return [*head, f"{losses:.1e}" if losses else "0", f"{weights:.1e}" if weights else "0", result]


def faults(rows: list[list[str]]) -> list[str]:
    """Returns a line for each row with a fault, and for each part in which half of the runs or fewer got their signal.
    A signal hits no process before the processes of a run have started and after they have ended."""
    wrong = ["\t".join(row) for row in rows if row[-1] not in ("equal", "equal up to rounding")]
    for agents, engine in dict.fromkeys((row[0], row[2]) for row in rows):
        hit = [row[COLUMNS.index("to")] != "none" for row in rows if (row[0], row[2]) == (agents, engine)]
        if 2 * sum(hit) <= len(hit):
            wrong.append(f"{agents} agents, {engine}: {sum(hit)} of {len(hit)} runs got their signal")
    return wrong if rows else ["no run"]


def last_line(said: str) -> str:
    """Returns the beginning of the last line in ``said`` that peft-ext finetune, and not torchrun, has printed."""
    lines = [line for line in said.strip().splitlines() if not re.match(r"[WEI]\d{4} |\*{9}|Failed to load|\s*$", line)]
    return re.sub("^step +", "step ", lines[-1]).split("  ")[0].split(";")[0] if lines else "the start"


def has_come(at: Union[int, str], said: str) -> bool:
    if isinstance(at, str):
        return re.search(f"^{re.escape(at)}", said, re.MULTILINE) is not None
    return any(int(step) >= at for step in re.findall(r"^step +(\d+)/", said, re.MULTILINE))


def failures(said: str) -> int:
    return sum("failed (exitcode" in line for line in said.splitlines())


def killed(folder: Path, moment: float, rank: int, engine: str) -> list[str]:
    """Returns the table's row for a run with one agent of torchrun. The process of rank ``rank`` is killed ``moment``
    seconds after the start."""
    output, log = folder / f"{engine}{moment:.2f}", folder / f"{engine}{moment:.2f}.log"
    options = options_of(folder, output, 2, *OPTIONS, "--shard", engine)
    run = Run([*torchrun(2, "--max-restarts", "3"), *options], log)
    time.sleep(moment)
    process, said = run.of_rank(rank), run.out
    if process is not None:
        process.kill()
    code = run.end()
    to = f"rank {rank}" if process is not None else "none"
    by = "torchrun" if process is not None else ""
    head = ["1", "2", engine, "3", f"{moment:.1f}", "SIGKILL", to, last_line(said), str(failures(run.out)), by]
    return row_of(head, folder / f"whole-{engine}", output, [code], 2, "")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def stopped(folder: Path, case: Case, number: int) -> list[str]:
    """Returns the table's row for a run with two agents of torchrun, in which one process or one agent gets a
    signal."""
    output, port = folder / f"two{number}", free_port()
    options = options_of(folder, output, 1, *OPTIONS, "--lr", "1e-4")

    def start(agent: int, name: str, restarts: int, *more: str) -> Run:
        conf = f"is_host={int(agent == 0)},keep_alive_interval=1,keep_alive_max_attempt=3"
        at = ["--nnodes", "2", "--max-restarts", str(restarts), "--rdzv-backend", "c10d", "--rdzv-endpoint",
              f"127.0.0.1:{port}", "--rdzv-id", "job", "--rdzv-conf", conf]  # fmt: skip
        return Run([*torchrun(2, *at), *options, *more], folder / f"two{number}-{name}{agent}.log", **ENVIRONMENT)

    def said() -> str:
        return "".join(run.out for run in started)

    runs = [start(0, "first", case.restarts), start(1, "first", case.restarts)]
    started, begin, wrong, (kind, index) = [*runs], time.monotonic(), "", case.to.split()
    below: list[psutil.Process] = []
    orphans: list[psutil.Process] = []
    try:
        if isinstance(case.at, float):
            time.sleep(case.at)
        else:
            runs[0].wait_for(lambda: has_come(case.at, said()))
        moment, after = time.monotonic() - begin, last_line(said())
        if kind == "rank":
            there = (run.of_rank(int(index)) for run in runs)
            hit: Optional[psutil.Process] = next((found for found in there if found is not None), None)
        else:
            agent = runs[int(index)]
            below, hit = agent.processes() if case.number == KILL else [], agent.process
        if hit is not None:
            hit.send_signal(case.number)
        elif not isinstance(case.at, float):  # the processes of a run that has just printed a line must be running
            wrong = "no process got the signal"
        for process in below if case.whole else ():
            process.kill()
        orphans = [] if case.whole else below
        if case.then == "a new agent":
            runs[int(index)].process.wait()
            runs[int(index)] = start(int(index), "second", case.restarts)
            started.append(runs[int(index)])
        codes = [run.end() for run in runs]
        failed = str(failures(said()))
        if case.then in ("--resume", "--overwrite") and hit is not None:
            if not re.search(r"^error: |^stopped after step ", said(), re.MULTILINE):
                wrong = "no error"
            named = re.search(r"--resume(?: continues|, or|$)", said(), re.MULTILINE)
            if (case.then == "--resume") is not bool(named):
                wrong = wrong or f"--resume is {'' if named else 'not '}named"
            port, more = free_port(), [case.then]
            runs = [start(0, "again", 0, *more), start(1, "again", 0, *more)]
            started += runs
            codes = [run.end() for run in runs]
    finally:
        for run in started:
            run.kill()
        for process in orphans:
            if process.is_running():
                wrong = wrong or "a process without an agent still runs"
                process.kill()
    to = case.to + (" and its processes" if case.whole else "") if hit is not None else "none"
    head = ["2", "4", "ddp", str(case.restarts), f"{moment:.1f}", case.number.name, to, after, failed, case.then]
    return row_of(head, folder / "whole-two", output, codes, 4, wrong)


def unbroken(folder: Path, name: str, processes: int, *more: str) -> float:
    """Runs the fine-tuning without a signal, and returns the seconds that the run took."""
    start = time.monotonic()
    options = options_of(folder, folder / name, 4 // processes, *OPTIONS, *more)
    run = Run([*torchrun(processes), *options], folder / f"{name}.log")
    if run.end():
        sys.exit(run.out)
    return time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default="one,shard,two")
    parser.add_argument("--moments", type=int, default=19, help="moments of the part one")
    parser.add_argument("--write", type=Path, help="file that gets the table")
    given = parser.parse_args()
    rows: list[list[str]] = []

    def add(row: list[str]) -> None:
        rows.append(row)
        print("\t".join(row), flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_model(folder / "model")
        pairs = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(24)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        for part, engine, moments in (("one", "ddp", given.moments), ("shard", "fsdp2", 5)):
            if part in given.parts.split(","):
                seconds = unbroken(folder, f"whole-{engine}", 2, "--shard", engine)
                for count in range(moments):
                    # No signal is sent in the last tenth of the run's time, because torchrun itself ends then.
                    add(killed(folder, 0.9 * seconds * (count + 0.5) / moments, count % 2, engine))
        if "two" in given.parts.split(","):
            unbroken(folder, "whole-two", 4, "--lr", "1e-4")
            for number, case in enumerate(CASES):
                add(stopped(folder, case, number))
    if given.write:
        given.write.write_text("".join("\t".join(row) + "\n" for row in (COLUMNS, *rows)))
    wrong = faults(rows)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
