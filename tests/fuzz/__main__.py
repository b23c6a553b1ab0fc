"""``python -m tests.fuzz``: mutates and tries inputs until the time is up. Saves each finding, and prints a line that
repeats it.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import random
import sys
import tempfile
import time
from pathlib import Path

from . import TARGETS, Finding, Target, mutated, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="in all; default: 1")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="repeat it; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="where inputs are saved")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"), help="run one saved input, with its traceback")
    given = parser.parse_args()
    faulthandler.enable()
    if given.replay:
        with tempfile.TemporaryDirectory() as folder:
            print(run(TARGETS[given.replay[0]], Path(given.replay[1]).read_bytes(), Path(folder)))
        return 0
    targets = [TARGETS[name] for name in given.target or TARGETS]
    outcomes = {target.name: collections.Counter[str]() for target in targets}
    findings: set[tuple[str, str]] = set()
    until, number = time.monotonic() + 60 * given.minutes, 0
    while time.monotonic() < until:
        target = targets[number % len(targets)]
        outcome = _try(target, f"{given.seed}:{number}", given.out, findings)
        outcomes[target.name][outcome] += 1
        number += 1
    for name, counts in outcomes.items():
        print(f"{name}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    print(f"{number} inputs, {len(findings)} distinct findings, seed {given.seed}")
    return 1 if findings else 0


def _try(target: Target, seed: str, out: Path, findings: set[tuple[str, str]]) -> str:
    data = mutated(target, random.Random(seed))
    out.mkdir(parents=True, exist_ok=True)
    last = out / f"{target.name}-last"  # this file keeps the input if the process dies
    last.write_bytes(data)
    try:
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(target, data, Path(folder))
    except Finding as finding:
        about = (target.name, str(finding)[:60])
        if about not in findings:
            findings.add(about)
            saved = out / f"{target.name}-{seed.replace(':', '-')}"
            saved.write_bytes(data)
            print(f"{finding}: python -m tests.fuzz --replay {target.name} {saved}", flush=True)
        outcome = "FOUND"
    last.unlink()
    return outcome


if __name__ == "__main__":
    sys.exit(main())
