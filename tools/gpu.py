"""Tests and measures peft_ext on a machine with an NVIDIA GPU, in ten minutes; the most informative parts come first.

    python tools/gpu.py [--seconds 570] [--parts import,prove] [--out benchmarks/results] [tests of the battery]

The parts, in this order:

    packages   finds a Python with a CUDA build of torch; pip installs missing packages into .venv
    build      compiles the native library with the C++ compiler; nvcc is not needed
    import     loads torch, the GPU and the native library, and says how long each takes
    warm       compiles all CUDA kernels for this GPU
    prove      compares each family of kernels, except those of packed formats, with plain PyTorch
    core       calls of every operator that cover each pair of dtype, shape and layout, against float64
    training   a training step of LoRA, QLoRA and DoRA at Llama 3 8B's width, against PEFT: time and memory
    kernels    the time of each kernel of a layer, beside the time that cuda_model.py computes
    table      the benchmarks of all operators, against their peers
    battery    the tests of the operators and modules, in several processes
    sanitizer  compute-sanitizer over some of the operators' tests

The program imports only the standard library and modules of tools/ that need no other package. Each part runs in
processes of its own, and has a time limit that depends on the remaining time. At the limit, all processes of the part
are killed. If a part fails or is cut off, the exit status is 1, and the next parts run, except after the part
"packages" failed, or after a failed build without a library of an earlier build. The log, the rows of the measurements
and the summary gpu-<date>.json are written during the run, so that a crash loses none of the earlier results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Optional, TextIO

import cuda_measured
from gpu_torch import driver_cuda, pip_names, torch_arguments

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
# pip's names of the packages that the parts need.
PACKAGES = ("setuptools", "pybind11", "ninja", "numpy", "typer", "rich", "filelock", "cuda-bindings", "pytest",
            "pytest-xdist", "transformers", "peft", "accelerate", "aenum", "bitsandbytes")  # fmt: skip
PROBE = f"""
import importlib.metadata as metadata, json, sys
def missing(name):
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return True
found = {{"missing": [name for name in {PACKAGES} if missing(name)], "path": [place for place in sys.path if place]}}
import torch
is_new = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
found |= {{"cuda": torch.version.cuda, "gpu": is_new and torch.cuda.is_available()}}
if found["gpu"]:
    found |= {{"name": torch.cuda.get_device_name(), "arch": "%d.%d" % torch.cuda.get_device_capability()}}
elif not is_new:
    found["why"] = f"torch {{torch.__version__}} is older than 2.11"
elif torch.version.cuda is None:
    found["why"] = f"torch {{torch.__version__}} is not a CUDA build"
else:
    try:
        torch.cuda.init()
        found["why"] = f"torch {{torch.__version__}} sees no GPU"
    except Exception as error:  # for example, the driver is older than torch's CUDA release
        found["why"] = f"torch {{torch.__version__}}: {{str(error).partition('. ')[0]}}"
print(json.dumps(found))
"""
PROBE_SECONDS = 90.0  # seconds after which a process that runs PROBE or LOADS is killed
IMPORT = """
import json, sys, time
took, last = {}, time.perf_counter()
def lap(name):
    global last
    now = time.perf_counter()
    took[name], last = round(now - last, 2), now
import torch
lap("torch")
torch.zeros(1, device="cuda").item()
lap("GPU")
from peft_ext import _native, ops
lap("peft_ext")
state = _native.STATE
print(json.dumps({"seconds": took, "CPU path": state.isa, "CUDA kernels": state.cuda_error or "registered"}))
sys.exit(not state.cuda_loaded)
"""
# The program LOADS succeeds if the native library loads and its CUDA kernels are registered.
LOADS = "import sys; from peft_ext import _native; sys.exit(not _native.STATE.cuda_loaded)"
# The program PROVE proves the families of CUDA kernels that its arguments do not name, without those of packed formats,
# and prints a line before and after each family.
PROVE = """
import json, sys, torch
from peft_ext.ops import prove
device = torch.device("cuda")
for family in [name for name in prove.families(device.type.upper()) if name not in sys.argv[1:]]:
    print(json.dumps({"begins": family}), flush=True)
    print(json.dumps({"family": family, "why": prove.prove(device, [family])[family]}), flush=True)
"""
CORE = "tests/ops/test_covering.py"
BATTERY = ("tests/ops/test_ops.py", "tests/ops/test_op_edges.py", "tests/nn/test_nn.py")
METHODS = "LoRA; QLoRA; DoRA"  # Methods of the part "training", as benchmarks.e2e names them.
FIRST = ("lora", "nf4", "dora", "siblings", "gated_lora", "ia3", "experts", "grouped_lora")  # "table" runs these first.
WORKERS = 8  # Largest number of processes that run the tests of one part; all of them use one GPU.
# The tests of the part "sanitizer": linear layers in bfloat16 with dropout or over NF4, with sizes that no tile
# divides.
SANITIZED = "test_values_and_gradients and -bfloat16] and 515 and linear and (dropout or nf4_linear)"
# The environment variables that are set for the commands of all parts. PEFT_EXT_PROVE=0 turns off the proof at first
# use, so that the kernels run even if the part "prove" has found them wrong.
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "PEFT_EXT_PROVE": "0",
    "PEFT_EXT_REQUIRE": "1",
}
GRACE = 5.0  # Seconds between the interrupt of a command at its limit and its end by SIGKILL.
# TEST matches a line of pytest's output with the result of a test. The first alternative of TEST is the line that
# pytest-xdist prints, and the second is the line that pytest prints without it.
TEST = re.compile(
    r"^\[gw\d+\] \[ *\d+%\] (?P<result>PASSED|FAILED|ERROR|SKIPPED) (?P<test>\S.*?)\s*$"
    r"|^(?P<test_>tests/\S+::.+?) (?P<result_>PASSED|FAILED|ERROR|SKIPPED)\b"
)
PASSED, FAILED, CUT, NOT_RUN = "passed", "failed", "cut", "not run"


@dataclass
class Outcome:
    """The result of a part.

    Attributes:
        result: PASSED, FAILED, CUT or NOT_RUN.
        why: what went wrong, or the reason why the part did not run.
        seconds, limit: seconds that the part took, and its time limit in seconds.
        rows: number of results of the part, such as tests, families of kernels or rows of a result file.
        failed: the names of the tests, families or rows that failed.
        files: names of the result files that the part wrote.
    """

    part: str
    result: str = PASSED
    why: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    rows: int = 0
    failed: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def add(self, ended: tuple[str, bool]) -> bool:
        """Adds the result of a command, as Runner.run returns the result, to this outcome. Returns whether the command
        succeeded."""
        wrong, cut = ended
        if wrong:
            self.result = CUT if cut and self.result != FAILED else FAILED
            self.why = "; ".join(filter(None, [self.why, wrong]))
        return not wrong

    def see(self, line: str) -> None:
        """If ``line`` of pytest's output has a test's result, counts the test, and adds a failed test to ``failed``."""
        if found := TEST.match(line):
            self.rows += 1
            if (found["result"] or found["result_"]) in ("FAILED", "ERROR"):
                self.failed.append(found["test"] or found["test_"])


class Runner:
    """Runs commands one after the other, each within its limit, with output on the screen and in the log."""

    def __init__(self, seconds: float, log: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.end, self.log, self.clock = clock() + seconds, log, clock

    def left(self) -> float:
        return self.end - self.clock()

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    def run(
        self, command: list[str], limit: float, environment: Optional[dict[str, str]] = None,
        see: Callable[[str], None] = lambda line: None,
    ) -> tuple[str, bool]:  # fmt: skip
        """Runs a command. Returns what went wrong, or "", and whether the command was cut off at its limit. ``see``
        gets each line of the output. At the limit, the command and all processes that it started are killed.
        """
        self.say(f"$ {' '.join(command)}")
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True, env={**os.environ, **ENVIRONMENT, **(environment or {})},
        )  # fmt: skip

        def copy() -> None:
            for line in process.stdout:
                self.say(line.rstrip("\n"))
                see(line.rstrip("\n"))

        reader = threading.Thread(target=copy, daemon=True)
        reader.start()
        try:
            status = process.wait(timeout=max(1.0, limit))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # after SIGINT, pytest prints the failures so far
            try:
                process.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                pass
            return f"cut off after {limit:.0f} s", True
        finally:
            self._end(process)
            reader.join(timeout=5)
        signalled = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return ("" if status == 0 else signalled), False

    def _end(self, process: subprocess.Popen) -> None:
        """Kills the processes of a command that still run. A process that waits in the driver may outlive SIGKILL; the
        next command runs all the same.
        """
        try:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


@dataclass
class Machine:
    """The Python, the GPU and the folder of the results that the parts use. ``gpu`` is the description that the program
    PROBE printed. ``has_earlier_build`` is True if the build failed and the library of an earlier build loads.
    """

    runner: Runner
    out: Path
    tests: Sequence[str] = ()
    device: str = "cuda"
    python: str = sys.executable
    gpu: dict = field(default_factory=dict)
    has_earlier_build: bool = False


# --- packages and build -----------------------------------------------------------------------------------------------


def probe(python: str) -> dict:
    """Returns a description of the torch of the interpreter ``python``, of the GPU and of the missing packages. Returns
    {} if this interpreter does not exist, or if the program PROBE fails (for example without torch) or takes longer
    than PROBE_SECONDS.
    """
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}


def driver_is_here() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def packages(here: Machine, outcome: Outcome) -> None:
    """Chooses the Python of the next parts: the running Python, .venv, or a new .venv.

    Nothing is installed into the running Python, unless the running Python is .venv's. If torch in the running Python
    is 2.11 or newer and sees the GPU, a new .venv also sees the packages of the running Python, and pip installs only
    the missing packages. If torch sees the GPU in neither Python, pip installs a torch into .venv, if .venv is new or
    runs this program. If pip fails, parts run without the missing packages, but not without torch.
    """
    venv, new = str(VENV / "bin" / "python"), not VENV.exists()
    end = here.runner.clock() + outcome.limit
    if here.device == "cpu":
        here.gpu = probe(here.python)
        return
    probed = {python: probe(python) for python in dict.fromkeys((here.python, venv))}
    found = {python: about for python, about in probed.items() if about.get("gpu")}
    if found:
        here.python = min(found, key=lambda python: len(found[python]["missing"]))
        here.gpu = found[here.python]
    wanted = [here.gpu["missing"]] if found else [torch_arguments(driver_cuda()), PACKAGES]
    if (new or here.python == venv) and (any(wanted) or sanitizer_package(here)):
        probed[venv] = install(here, venv, wanted, end) or probed[venv]
    if not here.gpu:
        told = (f"{python} ({about.get('why', 'no torch that loads')})" for python, about in probed.items())
        outcome.add((f"no Python has a CUDA build of torch that sees the GPU: {', '.join(told)}", False))
    elif here.gpu["missing"]:
        outcome.why = f"without {', '.join(here.gpu['missing'])}"


def install(here: Machine, venv: str, wanted: Sequence[Sequence[str]], end: float) -> dict:
    """Makes .venv if .venv is missing, and runs pip in .venv for each list of arguments in ``wanted``. If the torch of
    .venv then sees the GPU, the next parts use the Python of .venv. Returns the last result of ``probe`` for .venv.
    """
    about: dict = {}
    if not VENV.exists():
        wrong, _ = here.runner.run([sys.executable, "-m", "venv", str(VENV)], end - here.runner.clock())
        if wrong:
            shutil.rmtree(VENV, ignore_errors=True)
            return about
        if here.gpu:
            (place,) = VENV.glob("lib/python*/site-packages")
            (place / "running_python.pth").write_text("\n".join(here.gpu["path"]) + "\n")
    pip = [venv, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
    # pip installs torch before the packages whose versions depend on the CUDA release of torch: cuda-bindings, and
    # last compute-sanitizer.
    for names in (*wanted, None):
        if arguments := sanitizer_package(here) if names is None else pip_names(names, here.gpu.get("cuda")):
            here.runner.run([*pip, *arguments], end - here.runner.clock())
            if (about := probe(venv)).get("gpu"):
                here.python, here.gpu = venv, about
    return about


def sanitizer_package(here: Machine) -> list[str]:
    """Returns a list with pip's requirement of compute-sanitizer for the CUDA release of torch. Returns [] if
    compute-sanitizer is installed already, or if torch has no CUDA release."""
    release = here.gpu.get("cuda")
    if release is None or find_sanitizer(here):
        return []
    suffix = "" if int(release.split(".")[0]) >= 13 else f"-cu{release.split('.')[0]}"
    return [f"nvidia-cuda-sanitizer-api{suffix}=={release}.*"]


def build(here: Machine, outcome: Outcome) -> None:
    environment = {"MAX_JOBS": os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)}
    command = [here.python, "setup.py", "build_ext", "--inplace"]
    if not outcome.add(here.runner.run(command, outcome.limit, environment)):
        here.has_earlier_build = here.runner.run([here.python, "-c", LOADS], PROBE_SECONDS) == ("", False)
        if here.has_earlier_build:
            outcome.why += "; the next parts use the library of an earlier build"


def imports(here: Machine, outcome: Outcome) -> None:
    outcome.add(here.runner.run([here.python, "-c", IMPORT], outcome.limit))


def warm(here: Machine, outcome: Outcome) -> None:
    outcome.add(here.runner.run([here.python, "-m", "peft_ext", "doctor", "--warm"], outcome.limit))


# --- tests ------------------------------------------------------------------------------------------------------------


def prove(here: Machine, outcome: Outcome) -> None:
    """Proves each family of kernels, except those of packed formats. After a crash or a hang, a new process proves the
    families that are left."""
    done: dict[str, str] = {}
    begun: list[str] = []
    last = ""

    def see(line: str) -> None:
        nonlocal last
        last = line or last
        if line.startswith('{"begins"'):
            begun.append(json.loads(line)["begins"])
        elif line.startswith('{"family"'):
            row = json.loads(line)
            done[row["family"]] = row["why"]

    end = here.runner.clock() + outcome.limit
    while True:
        # One process proves the families of kernels in turn. A process that hangs is ended after three fifths of the
        # time that was left, so that a new process can prove the other families.
        left = end - here.runner.clock()
        wrong, cut = here.runner.run([here.python, "-c", PROVE, *done], 0.6 * left, see=see)
        if not wrong:
            break
        if not begun or begun[-1] in done:  # the process failed while it was proving no family
            outcome.add((wrong, cut))
            break
        done[begun[-1]] = f"{wrong}{'' if cut else f': {last}'}"
        if end - here.runner.clock() < GRACE:
            outcome.add(("not all families were proved", True))
            break
    outcome.rows, outcome.failed = len(done), [f"{family}: {why}" for family, why in done.items() if why]
    if outcome.failed:
        outcome.add((f"{len(outcome.failed)} families failed", False))


def pytest(here: Machine, outcome: Outcome, limit: float, tests: Sequence[str], processes: int = WORKERS,
           environment: Optional[dict[str, str]] = None, before: Sequence[str] = ()) -> None:  # fmt: skip
    """Runs tests on ``here.device``, in up to ``processes`` processes if pytest-xdist is installed. ``before``: words
    before the command of pytest, such as a sanitizer's command. Each process gets an equal number of CPU cores, because
    the tests compute the expected results on the CPU.
    """
    several = processes > 1 and "pytest-xdist" not in here.gpu.get("missing", ())
    how = ["-n", str(min(processes, os.cpu_count() or 1))] if several else []
    command = [*before, here.python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--device", here.device, *how,
               *tests]  # fmt: skip
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    cores = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads}
    outcome.add(here.runner.run(command, limit, {**cores, **(environment or {})}, outcome.see))


def core(here: Machine, outcome: Outcome) -> None:
    pytest(here, outcome, outcome.limit, [CORE])


def battery(here: Machine, outcome: Outcome) -> None:
    own = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/ops").glob("test_cuda_*.py"))
    files = [name for name in dict.fromkeys((*(here.tests or BATTERY), *own)) if name != CORE]
    # Tests of torch.compile run last, because they take longest and say least about a kernel. CUDA_LAUNCH_BLOCKING
    # makes each fault of a kernel appear in the test that caused the fault.
    slow = "test_compiles or test_opcheck"
    end = here.runner.clock() + outcome.limit
    pytest(here, outcome, 0.75 * outcome.limit, [*files, "-k", f"not ({slow})"],
           environment={"CUDA_LAUNCH_BLOCKING": "1"})  # fmt: skip
    pytest(here, outcome, end - here.runner.clock(), [*files, "-k", slow])


def find_sanitizer(here: Machine) -> Optional[str]:
    """Returns the path of compute-sanitizer: on PATH, in CUDA_HOME or in NVIDIA's package of ``here``'s Python."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    packed = [
        found for place in here.gpu.get("path", ()) for found in Path(place).glob("nvidia/*/bin/compute-sanitizer")
    ]
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.path.join(home, "bin"))
    return tool or next(map(str, packed), None)


def sanitizer(here: Machine, outcome: Outcome) -> None:
    tool = find_sanitizer(here)
    if tool is None:
        outcome.result, outcome.why = NOT_RUN, "compute-sanitizer was not found"
        return
    # Without torch's caching, each tensor is an allocation of its own, so that the tool finds an access behind a
    # tensor. With -lineinfo in the compiled kernels, the tool names the source line of an error.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PEFT_EXT_NVRTC_FLAGS": "-lineinfo"}
    end = here.runner.clock() + outcome.limit
    for check, share in (("memcheck", 0.6), ("racecheck", 1.0)):
        # API errors are not reported, because torch asks for features that a driver may lack. Only peft_ext's kernels
        # are checked, because checks of other kernels would take most of the time.
        before = [tool, "--tool", check, "--kernel-name", "kns=peft_ext", "--report-api-errors", "no",
                  "--error-exitcode", "1"]  # fmt: skip
        pytest(here, outcome, share * (end - here.runner.clock()), ["tests/ops/test_ops.py", "-k", SANITIZED], 1,
               environment, before)  # fmt: skip


# --- measurements -----------------------------------------------------------------------------------------------------


def measure(here: Machine, outcome: Outcome, program: Sequence[str]) -> None:
    """Runs a program that writes result files, and counts the rows of these files, also if the program fails."""

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in here.out.glob("*.json") if not path.name.startswith("gpu-")}

    before = written()
    outcome.add(here.runner.run([here.python, *program, "--out", str(here.out)], outcome.limit))
    for path in sorted(path for path, when in written().items() if before.get(path) != when):
        result = json.loads(path.read_text())
        outcome.files.append(path.name)
        outcome.rows += len(result["rows"])
        outcome.failed += result.get("failed", [])


def training(here: Machine, outcome: Outcome) -> None:
    # Each run, of which a method has three, is killed after a third of the part's time, so that a run that hangs leaves
    # time for other runs.
    sizes = ["--shape", "8b", "--batch", "2", "--length", "2048", "--steps", "30"]
    if here.device == "cpu":
        sizes = ["--shape", "tiny", "--batch", "2", "--length", "16", "--steps", "2"]
    measure(here, outcome, ["-m", "benchmarks.e2e", "methods", "--device", here.device, "--methods",
                            METHODS, "--repeats", "1", "--limit", f"{outcome.limit / 3:.0f}",
                            *sizes])  # fmt: skip


def kernels(here: Machine, outcome: Outcome) -> None:
    measure(here, outcome, ["tools/kernel_times.py"])


def table(here: Machine, outcome: Outcome) -> None:
    # 25 seconds of the part are kept for the import, for the measurement of the machine's rates, and for the row that
    # is measured when the limit of the rows is reached.
    rows = max(10.0, outcome.limit - 25)
    names = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py"))
    names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    measure(here, outcome, ["-m", "benchmarks", *names, "--device", "cuda", "--quick", "--limit", f"{rows:.0f}"])


# The function of each part, and the planned seconds of the part in a run of 570 seconds. When a part starts, the
# remaining time is divided among this part and the later parts in proportion to the planned seconds.
PARTS: dict[str, tuple[Callable[[Machine, Outcome], None], float]] = {
    "packages": (packages, 25), "build": (build, 75), "import": (imports, 20), "warm": (warm, 70), "prove": (prove, 45),
    "core": (core, 35), "training": (training, 115), "kernels": (kernels, 40), "table": (table, 50),
    "battery": (battery, 55), "sanitizer": (sanitizer, 40),
}  # fmt: skip
# A part of ESSENTIAL may take at least half of the remaining time, because the later parts need the part's result.
ESSENTIAL = ("packages", "build")
REHEARSED = ("packages", "core", "training")  # the parts that run with --rehearse, on a machine without a GPU


# --- the whole --------------------------------------------------------------------------------------------------------


def limit_of(names: Sequence[str], turn: int, left: float) -> float:
    """Returns the seconds that the part ``names[turn]`` may take if ``left`` seconds remain of the run."""
    own, later = PARTS[names[turn]][1], sum(PARTS[name][1] for name in names[turn + 1 :])
    share = left * own / (own + later)
    return max(share, left / 2) if names[turn] in ESSENTIAL else share


def run_parts(here: Machine, names: Sequence[str], keep: Callable[[list[Outcome]], None]) -> list[Outcome]:
    """Runs the parts, and passes the outcomes so far to ``keep`` after each part. Later parts also run after a part
    that fails, unless the part is "packages", or "build" without a library of an earlier build.
    """
    found: list[Outcome] = []
    stopped = ""
    for turn, name in enumerate(names):
        start = here.runner.clock()
        outcome = Outcome(name, limit=round(limit_of(names, turn, max(1.0, here.runner.left())), 1))
        if stopped:
            outcome.result, outcome.why = NOT_RUN, stopped
        else:
            here.runner.say(f"\n=== {name}: at most {outcome.limit:.0f} s")
            try:
                PARTS[name][0](here, outcome)
            except Exception as error:
                outcome.add((f"{type(error).__name__}: {error}", False))
        outcome.seconds = round(here.runner.clock() - start, 1)
        if name in ESSENTIAL and outcome.result in (FAILED, CUT) and not here.has_earlier_build:
            stopped = f"the part {name} failed"
        found.append(outcome)
        here.runner.say(f"=== {line(outcome)}")
        keep(found)
    return found


def line(outcome: Outcome) -> str:
    rows = f", {outcome.rows} rows" if outcome.rows else ""
    failed = f", {len(outcome.failed)} failed" if outcome.failed else ""
    why = f": {outcome.why}" if outcome.why else ""
    return f"{outcome.part:<10} {outcome.result:<7} {outcome.seconds:4.0f} s{rows}{failed}{why}"


def keep(path: Path, about: dict, found: list[Outcome]) -> None:
    """Writes the summary file ``path``. If the write is interrupted, the old file remains."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({**about, "parts": [asdict(outcome) for outcome in found]}, indent=1) + "\n")
    os.replace(new, path)


def summary(here: Machine, found: list[Outcome]) -> None:
    """Prints the result of each part, the failures, and for operators the measured times beside the computed times."""
    here.runner.say("")
    for outcome in found:
        here.runner.say(f"gpu: {line(outcome)}")
    for outcome in found:
        for name in outcome.failed:
            here.runner.say(f"gpu: failed in {outcome.part}: {name}")
    for outcome in found:
        for name in outcome.files:
            here.runner.say(f"gpu: results of {outcome.part}: {here.out / name}")
            if name.startswith("layer-"):
                measured = json.loads((here.out / name).read_text())
                here.runner.say(f"\n{cuda_measured.beside(measured, here.gpu.get('name', ''))}\n")


def main(argv: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=570.0, help="for all parts together; default: 570")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, comma-separated; default: all. The part "
                        "packages always runs, because it finds the Python")  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of log and results")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: run the parts "
                        f"{', '.join(REHEARSED)} on the CPU with tiny sizes, to test this program")  # fmt: skip
    parser.add_argument("tests", nargs="*", help="files of the battery; default: the operators' and modules'")
    args = parser.parse_args(argv)
    asked = [name for name in args.parts.split(",") if name]
    if unknown := set(asked) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # SIGTERM to this program also ends the running part
    if not (args.rehearse or driver_is_here() or probe(sys.executable).get("gpu")):
        print("gpu: no NVIDIA GPU is here", file=sys.stderr)
        return 1
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in PARTS if name in {"packages", *asked} and (name in REHEARSED or not args.rehearse)]
    date = time.strftime("%Y-%m-%d-%H%M")
    with open(args.out / f"gpu-{date}.log", "w") as log:
        here = Machine(Runner(args.seconds, log), args.out, args.tests, "cpu" if args.rehearse else "cuda")

        def kept(found: list[Outcome]) -> None:
            about = {
                "date": date,
                "python": here.python,
                **{key: here.gpu.get(key) for key in ("name", "arch", "cuda")},
            }
            keep(args.out / f"gpu-{date}.json", about, found)

        found = run_parts(here, names, kept)
        summary(here, found)
    return 1 if any(outcome.result in (FAILED, CUT) for outcome in found) else 0


if __name__ == "__main__":
    sys.exit(main())
