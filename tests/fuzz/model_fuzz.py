"""The model fuzzer: random models, adapters and actions. The accelerated model must do what the model under PEFT does.

A seed determines a case: an architecture of ``tiny_models`` and its sizes, the base layers (dense, NF4, bitsandbytes';
float32, bfloat16, float16), a PEFT configuration, and a list of actions: training steps, evaluations, generation;
adapters added, weighted, toggled, disabled, merged, deleted, saved and loaded; hooks, layers whose output is changed in
place, checkpointing, autocast, a base that trains, copies, pickles, restore. The same actions are applied to one model
under PEFT alone and to one accelerated model, from the same weights and seeds. A failed case prints the command line
that repeats the case.

    python tests/fuzz/model_fuzz.py --cases 300                 cases from seed 0
    python tests/fuzz/model_fuzz.py --minutes 60 [--seed N]     from a seed of the clock; used by `make model-fuzz`
    python tests/fuzz/model_fuzz.py --case 17                   one case, told step by step

The fuzzer compares outputs, the loss and every gradient; parameters and buffers, bitwise, after each step that changes
them; files, byte by byte; errors. An error of PEFT must also occur in the accelerated model, in the same words, and no
other error may occur; ``model_pair`` has the few known exceptions, such as the values of NF4 weights.

Cases run in a separate process, which is ended if a case takes longer than ``LIMIT``: a hang is a failure too.
``model_life`` has the actions, ``model_pair`` the two models and the allowed differences, ``model_probe`` one call of a
model.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import math
import os
import select
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

os.environ.setdefault("PEFT_EXT_REQUIRE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import torch
import transformers
from model_life import Case
from model_pair import MANY, ROUNDED_MEAN, Failed, Statistics
from tiny_models import FAMILIES

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()

LIMIT = 60.0  # Time limit of a case in seconds. A case takes about 0.3 s, and longer if it imports an architecture.
WARM_UP = -1  # Seed of the case that runs before the first case and imports the libraries.


def reproducer(seed: int) -> str:
    return f"python tests/fuzz/model_fuzz.py --case {seed}"


def run_case(seed: int, say: Callable[[str], None] = lambda text: None, family: Optional[str] = None
             ) -> tuple[Optional[str], Statistics]:  # fmt: skip
    """Returns the report of the case's failure, or None, and the case's statistics."""
    case = Case(seed, say, family)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.live()
        return None, case.seen
    except Exception as error:
        what = str(error) if isinstance(error, Failed) else traceback.format_exc(limit=-6)
        return f"{chr(10).join(case.told)}\n  {type(error).__name__}: {what}", case.seen


def serve() -> None:
    """Runs the cases whose seeds arrive on stdin, and writes one line of JSON for each."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries must not mix with the results on stdout
    for line in sys.stdin:
        seed = int(line)
        faulthandler.dump_traceback_later(0.95 * LIMIT, file=sys.stderr)
        started = time.monotonic()
        failure, seen = run_case(seed)
        faulthandler.cancel_dump_traceback_later()
        answers.write(json.dumps({
            "failure": failure, "seconds": time.monotonic() - started, "counts": seen.counts,
            "rounded": seen.rounded,
        }) + "\n")  # fmt: skip


class Worker:
    """A process that runs cases. Where a case does not return or ends the process, the Worker starts a new process."""

    COMMAND = (sys.executable, os.fspath(Path(__file__).resolve()), "--serve")

    def __init__(self, command: Sequence[str] = COMMAND, limit: float = LIMIT) -> None:
        self.command, self.limit = command, limit
        self.process: Optional[subprocess.Popen] = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        self.ask(WARM_UP, 10 * LIMIT)  # imports do not count as time of a case

    def ask(self, seed: int, limit: float) -> Optional[dict[str, Any]]:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{seed}\n".encode())
            self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        line = self.process.stdout.readline() if ready else b""
        return json.loads(line) if line else None

    def run(self, seed: int) -> dict[str, Any]:
        if self.process is None:
            self.start()
        started = time.monotonic()
        answer = self.ask(seed, self.limit)
        if answer is None:
            taken = time.monotonic() - started
            what = f"it hangs: {self.limit:g} s" if taken >= self.limit else "it ends its process"
            self.stop()
            answer = {"failure": what, "seconds": taken, "counts": {}, "rounded": []}
        return answer

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process = None


def fuzz(
    seeds: Iterable[int], until: float = math.inf, worker: Optional[Worker] = None
) -> tuple[Statistics, list[str]]:
    """Runs cases until ``until``. Returns the statistics of the cases, and the reports of failures.

    The report of a failed case is printed at once.
    """
    worker = Worker() if worker is None else worker
    found, failures = Statistics(), []
    try:
        for seed in seeds:
            if time.monotonic() > until:
                break
            answer = worker.run(seed)
            found.counts.update(answer["counts"])
            found.counts.update({"cases": 1, "milliseconds": round(1000 * answer["seconds"])})
            found.rounded.extend(answer["rounded"])
            if answer["failure"]:
                failures.append(f"case {seed}: {answer['failure']}\n  {reproducer(seed)}")
                print(failures[-1], file=sys.stderr, flush=True)
    finally:
        worker.stop()
    if len(found.rounded) >= MANY and found.mean > ROUNDED_MEAN:
        failures.append(f"{len(found.rounded)} calls that round to 16 bits: our error is {found.mean:.2f} times PEFT's "
                        f"in the mean, wanted at most {ROUNDED_MEAN}")  # fmt: skip
    return found, failures


def main(arguments: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=int, help="one case, told step by step")
    parser.add_argument("--family", choices=FAMILIES, help="of --case: this architecture whatever was drawn")
    parser.add_argument("--seed", type=int, help="the first of many")
    parser.add_argument("--cases", type=int, help="how many; default 300")
    parser.add_argument("--minutes", type=float, help="for how long, instead")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.serve:
        serve()
        return 0
    if args.case is not None:
        told: list[str] = []
        failure, _ = run_case(args.case, lambda text: (told.append(text), print(text, flush=True)), args.family)
        print(failure.removeprefix("\n".join(told)) if failure else "passed")
        return 1 if failure else 0
    start = args.seed if args.seed is not None else int(time.time()) * 10_000 if args.minutes else 0
    count = args.cases if args.cases is not None else sys.maxsize - start if args.minutes else 300
    until = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    found, failures = fuzz(range(start, start + count), until)
    counts = found.counts
    print(f"{counts['cases']} cases from seed {start}: {len(failures)} failed; {counts['calls compared']} calls, "
          f"{counts['fused layers']} of {counts['layers']} layers fused, 16 bits {found.mean:.3f} of PEFT's error in "
          f"the mean of {len(found.rounded)}; {counts['milliseconds'] / 1000:.0f} s")  # fmt: skip
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
