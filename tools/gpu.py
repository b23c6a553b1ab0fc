"""Runs, on a machine with an NVIDIA GPU: build, proof, tests on the device, sanitizer, training, benchmarks.

    python tools/gpu.py [--seconds 570] [--steps build,proof,battery,sanitizer,training,bench]
                        [--out benchmarks/results] [tests of the battery]

The program imports only the standard library. If torch of the running Python is a CUDA build, the steps run in this
Python; otherwise .venv is created with the torch of pip's default index. Each step has a time limit, which depends on
the remaining time. If a step fails or is cut off, its name is printed, the next steps run (except after a failed
build), and the exit status is 1. The log and the results are written during the run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional, TextIO

import cuda_check
import cuda_model

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
# Weights: a step may use its weight / (the sum of its own and all later weights) of the remaining time.
SHARES = {"build": 30, "proof": 3, "battery": 25, "sanitizer": 20, "training": 8, "bench": 40}
PROBE = """
import json, torch
found = {"cuda": torch.version.cuda, "gpu": torch.cuda.is_available()}
if found["gpu"]:
    found |= {"name": torch.cuda.get_device_name(), "arch": "%d.%d" % torch.cuda.get_device_capability()}
print(json.dumps(found))
"""
PROOF = """
import sys, torch
from peft_ext.ops import prove
found = prove.prove(torch.device("cuda"))
for family, why in found.items():
    print(f"{family:<14} {why or 'agrees with the reference'}")
sys.exit(any(found.values()))
"""
PROOF_SECONDS = 60.0
BATTERY = ("tests/ops/test_ops.py", "tests/ops/test_op_edges.py")
# Environment of all commands: without the proof at first use, the kernels run whatever the step "proof" has found.
UNPROVED = {"PEFT_EXT_PROVE": "0"}
NOT_RUN = "not run"  # the result of a step that cannot run on this machine starts so, and is no failure
# Cases of the operators in bfloat16: with odd sizes that no tile divides, and with sizes for which 16-byte copies and
# the kernels for few tokens are used.
SANITIZED = "test_values_and_gradients and -bfloat16] and (515 or 192 or (64 and 96))"


def probe(python: str) -> Optional[dict]:
    """Returns the description of torch in ``python`` and of its GPU; None if torch is not installed."""
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def driver_is_here() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


class Runner:
    """Runs commands one after the other, each within the remaining time, with output on the screen and in the log."""

    def __init__(self, seconds: float, log: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.end, self.log, self.clock = clock() + seconds, log, clock

    def left(self) -> float:
        return self.end - self.clock()

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    def run(self, command: list[str], limit: float, environment: Optional[dict[str, str]] = None) -> str:
        """Returns what went wrong, or "". At its time limit, the command and all processes that it started are
        killed.
        """
        self.say(f"$ {' '.join(command)}")
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1", **UNPROVED, **(environment or {})},
        )  # fmt: skip

        def copy() -> None:
            for line in process.stdout:
                self.say(line.rstrip("\n"))

        reader = threading.Thread(target=copy, daemon=True)
        reader.start()
        try:
            status = process.wait(timeout=max(1.0, limit))
        except BaseException as error:
            os.killpg(process.pid, signal.SIGINT)  # pytest then prints the failures so far
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"cut off after {limit:.0f} s"
        finally:
            reader.join(timeout=5)
        return "" if status == 0 else f"exit status {status}"


# --- steps: each returns what went wrong, or "" -----------------------------------------------------------------------


def build(runner: Runner, python: str, gpu: dict, out: Path, limit: float) -> str:
    environment = {
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": gpu["arch"],
        "MAX_JOBS": os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1),
    }
    # Without the build there is nothing to run, so the build may take nearly all the time.
    wrong = runner.run([python, "setup.py", "build_ext", "--inplace"], max(limit, runner.left() - 60), environment)
    return wrong or runner.run([python, "-m", "peft_ext", "doctor"], 60, {"PEFT_EXT_REQUIRE": "1"})


def proof(runner: Runner, python: str, gpu: dict, out: Path, limit: float) -> str:
    """Runs the proof that the first use on a GPU runs: each family of kernels is compared with plain PyTorch, and
    timed.
    """
    # The proof runs even if a slow build leaves little time, because the proof says most in the least time.
    return runner.run([python, "-c", PROOF], max(limit, PROOF_SECONDS), {"PEFT_EXT_REQUIRE": "1"})


def battery(runner: Runner, python: str, gpu: dict, out: Path, limit: float, *, named: Sequence[str] = ()) -> str:
    own = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_cuda_*.py"))
    # Tests of values run first. Tests of torch.compile take longest and say least about a kernel. CUDA_LAUNCH_BLOCKING
    # makes each fault appear in the test that caused it.
    slow = "test_compiles or test_opcheck"
    tests = [python, "-m", "pytest", "-q", "--device", "cuda"]
    end, environment = runner.clock() + limit, {"CUDA_LAUNCH_BLOCKING": "1"}
    files = [*(named or (*BATTERY, "tests/nn/test_nn.py")), *own]
    found = [
        runner.run([*tests, *files, "-k", f"not ({slow})"], 0.8 * limit, environment),
        runner.run([*tests, *BATTERY, "-k", slow], end - runner.clock()),
    ]
    return "; ".join(filter(None, found))


def sanitizer(runner: Runner, python: str, gpu: dict, out: Path, limit: float) -> str:
    tool = cuda_check.find("compute-sanitizer")
    if tool is None:
        return f"{NOT_RUN}: compute-sanitizer was not found"
    tests = [python, "-m", "pytest", "-q", "--device", "cuda", "tests/ops/test_ops.py", "-k", SANITIZED]
    wrong = []
    end = runner.clock() + limit
    for check, share in (("memcheck", 0.5), ("racecheck", 1.0)):
        # API errors are not reported, because torch asks for features that a driver may lack, and handles the answer.
        # Only peft_ext's kernels are checked, because checks of other kernels would take most of the time.
        command = [tool, "--tool", check, "--kernel-name", "kns=peft_ext", "--report-api-errors", "no",
                   "--error-exitcode", "1", *tests]  # fmt: skip
        # Without torch's caching, each tensor is an allocation of its own, so that an access behind a tensor is found.
        found = runner.run(command, share * (end - runner.clock()), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        wrong += [f"{check}: {found}"] if found else []
    return "; ".join(wrong)


def training(runner: Runner, python: str, gpu: dict, out: Path, limit: float) -> str:
    return runner.run([python, "-m", "pytest", "-q", "-rs", "tests/ops/test_gpu_training.py"], limit)


def bench(runner: Runner, python: str, gpu: dict, out: Path, limit: float) -> str:
    # Seconds for the import, the measurement of the machine's rates, and the row that is running at the limit.
    rows = max(10.0, limit - 40)
    return runner.run([python, "-m", "benchmarks", "--device", "cuda", "--limit", f"{rows:.0f}", "--out", str(out)],
                      limit)  # fmt: skip


STEPS = {
    "build": build,
    "proof": proof,
    "battery": battery,
    "sanitizer": sanitizer,
    "training": training,
    "bench": bench,
}


def run_steps(
    runner: Runner, names: list[str], python: str, gpu: dict, out: Path, tests: Sequence[str] = ()
) -> dict[str, str]:
    """Returns what went wrong in each step, or "". The limit of each step is its share of the remaining time."""
    steps = STEPS | {"battery": functools.partial(STEPS["battery"], named=tests)} if tests else STEPS
    found = {}
    for turn, name in enumerate(names):
        share = SHARES[name] / sum(SHARES[later] for later in names[turn:])
        limit = share * runner.left()
        runner.say(f"\n=== {name}: at most {limit:.0f} s of {runner.left():.0f}")
        start = runner.clock()
        try:
            found[name] = steps[name](runner, python, gpu, out, limit)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        runner.say(f"=== {name}: {found[name] or 'passed'} ({runner.clock() - start:.0f} s)")
        if name == "build" and found[name]:
            found |= {later: f"{NOT_RUN}: the build failed" for later in names[turn + 1 :]}
            break
    return found


# --- the whole --------------------------------------------------------------------------------------------------------


def make_venv(runner: Runner) -> str:
    python = str(VENV / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", str(VENV)],
        [*pip, "torch>=2.11", "setuptools>=77", "wheel", "pybind11>=2.12", "ninja", "numpy", "pytest>=9"],
        [*pip, "typer", "rich", "transformers>=5.0", "peft>=0.21", "aenum>=3.1.15", "accelerate>=1.0",
         "bitsandbytes>=0.47"],
    ):  # fmt: skip
        if wrong := runner.run(command, runner.left()):
            sys.exit(f"gpu: making {VENV} failed: {wrong}")
    return python


def summary(runner: Runner, found: dict[str, str], result: Optional[Path], card: str) -> None:
    """Prints the result of each step, and the times that cuda_model.py computes beside the measured times."""
    runner.say("")
    for name, wrong in found.items():
        runner.say(f"gpu: {name:<10} {wrong or 'passed'}")
    if result is not None:
        measured = json.loads(result.read_text())
        runner.say(f"gpu: results   {result}\n\n{cuda_model.beside(measured, card)}")


def main(argv: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=570.0, help="for all steps together; default: 570")
    parser.add_argument("--steps", default=",".join(STEPS), help="which, comma-separated; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of log and results")
    parser.add_argument("tests", nargs="*", help="files of the battery; default: the operators'")
    args = parser.parse_args(argv)
    names = [name for name in args.steps.split(",") if name]
    if unknown := set(names) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends a step's processes with this program
    python = sys.executable
    gpu = probe(python)
    own_torch = gpu is not None and gpu["cuda"] is not None
    if not (gpu["gpu"] if own_torch else driver_is_here()):
        print("gpu: no NVIDIA GPU is here", file=sys.stderr)
        return 1
    started = time.time()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / f"gpu-{time.strftime('%Y-%m-%d')}.log", "w") as log:
        runner = Runner(args.seconds, log)
        if not own_torch:
            python = str(VENV / "bin" / "python")
            if not Path(python).exists():
                make_venv(runner)
            gpu = probe(python)
            if gpu is None or not gpu["gpu"]:
                runner.say(f"gpu: the torch of {python} is missing, a CPU build, or sees no GPU; remove {VENV}, or run "
                           "with a python that has a CUDA build of torch")  # fmt: skip
                return 1
        if float(gpu["arch"]) < 8.0:
            runner.say(f"gpu: {gpu['name']} has compute capability {gpu['arch']}, wanted 8.0 or more")
            return 1
        runner.say(f"gpu: {gpu['name']}, sm_{gpu['arch'].replace('.', '')}, torch's CUDA {gpu['cuda']}, {python}")
        found = run_steps(runner, names, python, gpu, args.out, args.tests)
        written = [path for path in args.out.glob("*.json") if path.stat().st_mtime >= started]
        summary(runner, found, max(written, key=lambda path: path.stat().st_mtime, default=None), gpu["name"])
    return 1 if any(wrong and not wrong.startswith(NOT_RUN) for wrong in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
