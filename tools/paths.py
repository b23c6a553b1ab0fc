"""Runs a few steps of the default fine-tuning on each CPU path that this CPU supports, to show each path's speed and
loss.

    python tools/paths.py [--steps 5] [--seconds 600] [--paths avx2,avx512_bf16] [--dtype auto] [--json FILE]

Each path runs in a process of its own with a time limit. On x86-64, peft_ext, PyTorch's kernels, oneDNN and MKL (which
multiplies float32) may use only the instructions of the path, but MKL obeys its setting on Intel CPUs alone. On 64-bit
Arm only peft_ext's path is forced. The options are the defaults of ``peft-ext finetune``, except for the number of
steps, the dtype, and the number of held-out examples, because the scalar path would need minutes for all held-out
examples. The program prints a table. The exit status is 1 if a run failed or took too long, if held-out losses differ
by more than rounding explains, or if AVX2 takes more than AT_MOST times as long as AVX512-BF16.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parents[1]
# For each CPU path: environment variables that limit the instructions of PyTorch, oneDNN and MKL to those of the path.
# MKL obeys its variable on Intel CPUs alone.
LIMITS = {
    "scalar": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
               "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx512_bf16": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
                    "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "amx": {},
    # On 64-bit Arm only peft_ext's path is forced.
    "neon": {},
    "neon_bf16": {},
}  # fmt: skip
AT_MOST = 4.0  # Largest allowed time of the path avx2 divided by the time of avx512_bf16.
# Largest allowed relative difference of the held-out losses of two paths. bfloat16's rounding changes a loss by about
# 1e-3 in a few steps.
APART = 0.01
EVAL_FRACTION = 0.02
COMMAND = "import sys; from peft_ext.cli.main import main; sys.exit(main())"


@dataclass(frozen=True)
class Result:
    """The result of the run on one path. ``failed``: the reason why the run failed, or "". After a failed run, each
    figure is NaN."""

    path: str
    dtype: str = ""
    tokens_per_s: float = math.nan
    median_step_s: float = math.nan
    peak_mib: float = math.nan
    held_out_before: float = math.nan
    held_out_after: float = math.nan
    failed: str = ""


def environment(path: str) -> dict[str, str]:
    """Returns the environment variables of this process with the variables that force the path, and without variables
    that force another path."""
    ours = {name for limits in LIMITS.values() for name in limits} | {"DNNL_MAX_CPU_ISA"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | LIMITS[path] | {"PEFT_EXT_CPU_ISA": path, "PEFT_EXT_REQUIRE": "1"}


def read(path: str, document: dict[str, Any]) -> Result:
    """Returns the figures in ``document``, the content of a run.json."""
    perplexity = document["perplexity"]
    return Result(
        path, document["machine"]["dtype"].partition(":")[0], document["tokens_per_s"], document["median_step_s"],
        document["peak_mib"], math.log(perplexity["before"]), math.log(perplexity["after"]),
    )  # fmt: skip


def run(path: str, steps: int, seconds: float, dtype: str, python: str = sys.executable) -> Result:
    """Runs ``peft-ext finetune`` on one path. After ``seconds``, kills all processes of the run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-c", COMMAND, "finetune", "--output", folder, "--overwrite", "--max-steps", str(steps),
                   "--eval-fraction", str(EVAL_FRACTION), "--dtype", dtype]  # fmt: skip
        child = subprocess.Popen(command, cwd=ROOT, env=environment(path), text=True, start_new_session=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        try:
            output = child.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return Result(path, failed=f"took more than {seconds:g} s")
        if child.returncode != 0:
            last = (output.strip().splitlines() or ["no output"])[-1]
            return Result(path, failed=f"exit status {child.returncode}: {last}")
        return read(path, json.loads((Path(folder) / "run.json").read_text()))


def table(results: list[Result]) -> str:
    """Returns the results as a Markdown table."""
    best = max((one.tokens_per_s for one in results if not one.failed), default=math.nan)
    lines = ["| path | computes in | tokens/s | time, of the best | peak MiB | held-out loss before | after |",
             "|---|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for one in results:
        if one.failed:
            lines.append(f"| {one.path} | {one.failed} | | | | | |")
            continue
        lines.append(f"| {one.path} | {one.dtype} | {one.tokens_per_s:.0f} | {best / one.tokens_per_s:.2f} | "
                     f"{one.peak_mib:.0f} | {one.held_out_before:.4f} | {one.held_out_after:.4f} |")  # fmt: skip
    return "\n".join(lines)


def faults(results: list[Result]) -> list[str]:
    """Returns a line for each run that failed and for each limit that the runs exceed."""
    wrong = [f"{one.path}: {one.failed}" for one in results if one.failed]
    ran = {one.path: one for one in results if not one.failed}
    for which in ("held_out_before", "held_out_after"):
        losses = {path: getattr(one, which) for path, one in ran.items()}
        finite = all(map(math.isfinite, losses.values()))
        if losses and not (finite and max(losses.values()) - min(losses.values()) <= APART * min(losses.values())):
            wrong.append(f"{which} differs: {', '.join(f'{path} {loss:.4f}' for path, loss in losses.items())}")
    if "avx2" in ran and "avx512_bf16" in ran:
        ratio = ran["avx512_bf16"].tokens_per_s / ran["avx2"].tokens_per_s
        if not ratio <= AT_MOST:
            wrong.append(f"avx2 takes {ratio:.2f} times the time of avx512_bf16, wanted at most {AT_MOST:g}")
    return wrong


def main(argv: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="of each run; the speed leaves out the first two")
    parser.add_argument("--seconds", type=float, default=600, help="wall limit of a run")
    parser.add_argument("--paths", default="", help="some of the build's, with commas")
    parser.add_argument("--dtype", default="auto", help="auto, bf16 or fp32, as finetune has it")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    chosen = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from peft_ext import _cpu, _native

    module = _native.STATE.module
    usable = [path for path in LIMITS if module is not None and path in module.isas()]
    if not usable:
        parser.error(f"no path can run: the native library is not loaded: {_native.STATE.cpu_error}")
    paths = [name for name in chosen.paths.split(",") if name] or usable
    if unknown := [path for path in paths if path not in usable]:
        parser.error(f"--paths {unknown[0]}: wanted some of {', '.join(usable)}")
    print(f"this CPU: {', '.join(_cpu.instruction_sets())}", flush=True)
    results = []
    for path in paths:
        results.append(run(path, chosen.steps, chosen.seconds, chosen.dtype))
        print(results[-1], flush=True)
        if chosen.json is not None:
            chosen.json.write_text(json.dumps([asdict(one) for one in results], indent=2) + "\n")
    print(f"\n{table(results)}")
    wrong = faults(results)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
