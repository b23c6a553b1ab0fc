"""Kills a process of a fine-tuning run at evenly spread moments, and compares the results with an unbroken run.

    python tools/kill_table.py [--moments 20] [--processes 2] [--write docs/kills.tsv]

Each run of ``peft-ext finetune`` has ``--processes`` processes of torchrun and up to three restarts. At its moment, a
process of the run gets SIGKILL, rank 0 and the other ranks in turn. A row of the table has the moment in seconds after
the start, the rank, the last line that the run had printed, the number of restarts, and the largest differences of
losses and weights from those of the unbroken run. The exit code is 1 if a run failed, if a difference is not 0, or if a
run left a hidden file. ``make nightly`` runs this script.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from launched import Run, differences, options_of, torchrun  # noqa: E402
from tiny_run import write_tiny_model  # noqa: E402

COLUMNS = ("moment s", "rank", "after", "restarts", "losses differ by", "weights differ by", "result")
OPTIONS = ("--dropout", "0.1", "--max-steps", "60")


def killed(folder: Path, moment: float, rank: int, processes: int) -> list[str]:
    """Returns the row of a run of which ``rank`` is killed ``moment`` seconds after the start."""
    output, log = folder / f"out{moment:.2f}", folder / f"log{moment:.2f}"
    command = [*torchrun(processes, "--max-restarts", "3"), *options_of(folder, output, 4 // processes, *OPTIONS)]
    run = Run(command, log)
    time.sleep(moment)
    process, said = run.of_rank(rank), run.out.strip().splitlines()
    if process is not None:
        process.kill()
    code = run.end()
    after = said[-1].split("  ")[0] if said else "the start"
    restarts = str(sum("failed (exitcode" in line for line in run.out.splitlines()))
    head = [f"{moment:.1f}", str(rank) if process is not None else "none", after, restarts]
    if code:
        return [*head, "", "", f"exit code {code}"]
    losses, weights = differences(folder / "whole", output)
    left = [path.name for path in output.rglob(".*") if path.name != ".lock"]
    result = f"left {left[0]}" if left else "equal" if losses == weights == 0 else "differs"
    return [*head, f"{losses:g}", f"{weights:g}", result]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2))
    parser.add_argument("--write", type=Path, help="file that gets the table")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_model(folder / "model")
        pairs = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(24)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        start = time.monotonic()
        options = options_of(folder, folder / "whole", 4 // given.processes, *OPTIONS)
        whole = Run([*torchrun(given.processes), *options], folder / "whole.log")
        if whole.end():
            sys.exit(whole.out)
        seconds = time.monotonic() - start
        for count in range(given.moments):
            moment = 0.9 * seconds * (count + 0.5) / given.moments  # the end of torchrun itself is left out
            rows.append(killed(folder, moment, count % given.processes, given.processes))
            print("\t".join(rows[-1]), flush=True)
    if given.write:
        given.write.write_text("".join("\t".join(row) + "\n" for row in (COLUMNS, *rows)))
    return int(any(row[-1] != "equal" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
