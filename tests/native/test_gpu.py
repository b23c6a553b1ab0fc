"""Tests of tools/gpu.py without a GPU: order, limits, crashes and hangs of the parts, and the summary."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_run import needs_bnb, needs_hf

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
gpu = pytest.importorskip("gpu", reason="tools/ is not here: not a checkout")

DESCRIBED = {"missing": [], "path": [], "cuda": "13.0", "gpu": True, "name": "NVIDIA H100 80GB HBM3", "arch": "9.0"}


@pytest.fixture
def here(tmp_path: Path) -> Any:
    with open(tmp_path / "gpu.log", "w") as log:
        yield gpu.Machine(gpu.Runner(600.0, log), tmp_path, gpu=dict(DESCRIBED))


def outcome(limit: float = 300.0) -> Any:
    return gpu.Outcome("toy", limit=limit)


def log(here: Any) -> str:
    return (here.out / "gpu.log").read_text()


# --- order and limits -------------------------------------------------------------------------------------------------


def test_the_parts_that_teach_most_come_first() -> None:
    assert list(gpu.PARTS) == ["packages", "build", "import", "warm", "prove", "core", "training", "kernels", "table",
                               "battery", "sanitizer"]  # fmt: skip
    assert sum(seconds for _, seconds in gpu.PARTS.values()) == 570
    assert {*gpu.ESSENTIAL, *gpu.REHEARSED} <= set(gpu.PARTS)
    assert all(f"    {name} " in gpu.__doc__ for name in gpu.PARTS)


def test_each_part_has_its_seconds_and_its_share_of_what_others_left() -> None:
    names = list(gpu.PARTS)
    assert gpu.limit_of(names, names.index("import"), 470.0) == pytest.approx(20.0)
    assert gpu.limit_of(names, names.index("training"), 600.0) == pytest.approx(115 * 600 / 300)
    assert gpu.limit_of(names, names.index("build"), 545.0) == 545 / 2
    assert gpu.limit_of(names, len(names) - 1, 33.0) == 33.0


def toy_parts(monkeypatch: pytest.MonkeyPatch, **parts: Any) -> list[str]:
    monkeypatch.setattr(gpu, "PARTS", {name: (part, 10.0) for name, part in parts.items()})
    return list(parts)


def test_a_failure_stops_no_other_part(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(here: Any, outcome: Any) -> None:
        raise OSError("no memory")

    def cut(here: Any, outcome: Any) -> None:
        outcome.add(("cut off after 3 s", True))

    names = toy_parts(monkeypatch, one=raises, two=cut, three=lambda here, outcome: None)
    kept: list[list[str]] = []
    found = gpu.run_parts(here, names, lambda found: kept.append([one.part for one in found]))
    assert [(one.result, one.why) for one in found] == [("failed", "OSError: no memory"), ("cut", "cut off after 3 s"),
                                                        ("passed", "")]  # fmt: skip
    assert kept == [["one"], ["one", "two"], ["one", "two", "three"]]
    assert "=== one        failed     0 s: OSError: no memory" in log(here)


def test_nothing_runs_after_a_failed_build(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = toy_parts(monkeypatch, build=lambda here, outcome: outcome.add(("exit status 1", False)),
                      core=lambda here, outcome: pytest.fail("the part core ran"))  # fmt: skip
    found = gpu.run_parts(here, names, lambda found: None)
    assert [(one.result, one.why) for one in found] == [("failed", "exit status 1"),
                                                        ("not run", "the part build failed")]  # fmt: skip


@pytest.mark.parametrize("loads", [True, False])
def test_after_a_failed_build_an_earlier_library_is_used_if_it_loads(here: Any, loads: bool, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {0 if loads else 1}\necho no compiler >&2; exit 1\n')
    python.chmod(0o755)
    here.python = str(python)
    found = outcome()
    gpu.build(here, found)
    assert found.result == "failed" and here.has_earlier_build is loads
    assert ("use the library of an earlier build" in found.why) is loads


def test_other_parts_run_on_an_earlier_build(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(here: Any, outcome: Any) -> None:
        outcome.add(("exit status 1", False))
        here.has_earlier_build = True

    names = toy_parts(monkeypatch, build=build, core=lambda here, outcome: None)
    assert [one.result for one in gpu.run_parts(here, names, lambda found: None)] == ["failed", "passed"]


# --- commands that fail, crash and hang -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_command_is_cut_off_with_all_that_it_started_and_its_output_kept(here: Any) -> None:
    assert here.runner.run([sys.executable, "-c", "print('one')"], 300.0) == ("", False)
    assert here.runner.run([sys.executable, "-c", "raise SystemExit(3)"], 300.0) == ("exit status 3", False)
    crash = "import os; print('two', flush=True); os.abort()"
    assert here.runner.run([sys.executable, "-c", crash], 300.0) == ("killed by SIGABRT", False)
    # The command and its child ignore SIGINT; the child writes its process id.
    child = "import os, signal, time; signal.signal(2, signal.SIG_IGN); print('child', os.getpid(), flush=True); " \
            "time.sleep(600)"  # fmt: skip
    parent = "import signal, subprocess, sys; signal.signal(2, signal.SIG_IGN); " \
             f"subprocess.run([sys.executable, '-c', {child!r}])"  # fmt: skip
    lines: list[str] = []
    start = time.monotonic()
    ended = here.runner.run([sys.executable, "-c", parent], 4.0, see=lines.append)
    assert ended == ("cut off after 4 s", True) and time.monotonic() - start < 300
    (pid,) = [int(line.split()[1]) for line in lines if line.startswith("child")]
    assert _ended(pid)
    assert "one" in log(here) and "two" in log(here)


def _ended(pid: int) -> bool:
    """Returns whether the process has ended, within ten seconds. A zombie has ended."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_the_rows_before_a_crash_are_counted(here: Any) -> None:
    (here.out / "layer-old.json").write_text('{"rows": [{}]}')
    program = ("import json, os, pathlib, sys\n"
               "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
               "(out / 'layer-new.json').write_text(json.dumps({'rows': [1, 2], 'failed': ['a case']}))\n"
               "os.kill(os.getpid(), 9)\n")  # fmt: skip
    found = outcome()
    gpu.measure(here, found, ["-c", program])
    assert (found.result, found.why, found.rows) == ("failed", "killed by SIGKILL", 2)
    assert (found.failed, found.files) == (["a case"], ["layer-new.json"])


def test_the_results_of_tests_are_counted_as_they_come(here: Any) -> None:
    lines = ["[gw0] [  1%] PASSED tests/ops/test_ops.py::test_a[x y-8] ",
             "[gw11] [100%] FAILED tests/ops/test_ops.py::test_b[1] ",
             "tests/ops/test_ops.py::test_c[x y] PASSED   [ 33%]", "tests/ops/test_ops.py::test_d ERROR [ 34%]",
             "tests/ops/test_ops.py::test_e SKIPPED (no reason) [ 35%]",
             "FAILED tests/ops/test_ops.py::test_b[1] - AssertionError", "tests/ops/test_ops.py::test_f "]  # fmt: skip
    found = outcome()
    for line in lines:
        found.see(line)
    assert found.rows == 5
    assert found.failed == ["tests/ops/test_ops.py::test_b[1]", "tests/ops/test_ops.py::test_d"]


def test_the_tests_run_in_several_processes_where_xdist_is(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(here.runner, "run", lambda command, *args, **more: commands.append(command) or ("", False))
    gpu.core(here, outcome())
    gpu.battery(here, outcome())
    here.gpu["missing"] = ["pytest-xdist"]
    gpu.core(here, outcome())
    processes = str(min(gpu.WORKERS, os.cpu_count() or 1))
    assert commands[0][commands[0].index("-n") + 1] == processes and "-n" not in commands[-1]
    assert all(command[command.index("--device") + 1] == "cuda" for command in commands)
    assert gpu.CORE in commands[0] and not any(gpu.CORE in command for command in commands[1:-1])
    assert all("tests/ops/test_cuda_passes.py" in command for command in commands[1:-1])
    assert all((ROOT / name).exists() for name in (gpu.CORE, *gpu.BATTERY))


def test_the_layers_are_the_first_rows_of_the_table(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(here.runner, "run", lambda command, limit: commands.append(command) or ("", False))
    gpu.table(here, outcome(60.0))
    (command,) = commands
    names = command[3 : command.index("--device")]
    assert tuple(names[: len(gpu.FIRST)]) == gpu.FIRST
    assert sorted(f"bench_{name}.py" for name in names) == sorted(p.name for p in ROOT.glob("benchmarks/bench_*.py"))
    assert command[command.index("--limit") + 1] == "35"


@pytest.mark.slow
def test_the_families_after_a_crash_and_a_hang_are_proved(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    program = ("import json, os, sys, time\n"
               "for family in [name for name in 'abcde' if name not in sys.argv[1:]]:\n"
               "    print(json.dumps({'begins': family}), flush=True)\n"
               "    if family == 'b': sys.exit('a fault')\n"
               "    if family == 'd': time.sleep(600)\n"
               "    why = 'is slow' * (family == 'e')\n"
               "    print(json.dumps({'family': family, 'why': why}), flush=True)\n")  # fmt: skip
    monkeypatch.setattr(gpu, "PROVE", program)
    found = outcome(20.0)
    gpu.prove(here, found)
    assert found.rows == 5 and found.result == "failed" and found.why == "3 families failed"
    crash, hang, slow = found.failed
    assert crash == "b: exit status 1: a fault" and hang.startswith("d: cut off after") and slow == "e: is slow"


@pytest.mark.slow
def test_the_program_that_proves_knows_the_library(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs PROVE on the CPU: the CPU kernels are compared with the reference."""
    monkeypatch.setattr(gpu, "PROVE", gpu.PROVE.replace('torch.device("cuda")', 'torch.device("cpu")'))
    found = outcome()
    gpu.prove(here, found)
    assert (found.result, found.failed) == ("passed", []) and found.rows > 5


# --- compute-sanitizer ------------------------------------------------------------------------------------------------


def test_compute_sanitizer_is_found_in_nvidias_package(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(here.out))
    found = outcome()
    gpu.sanitizer(here, found)
    assert (found.result, found.why) == ("not run", "compute-sanitizer was not found")
    assert gpu.sanitizer_package(here) == ["nvidia-cuda-sanitizer-api==13.0.*"]
    here.gpu["cuda"] = "12.8"
    assert gpu.sanitizer_package(here) == ["nvidia-cuda-sanitizer-api-cu12==12.8.*"]
    tool = here.out / "nvidia/cu13/bin/compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.touch()
    here.gpu["path"] = [str(here.out)]
    commands: list[Any] = []
    monkeypatch.setattr(here.runner, "run", lambda *args: commands.append(args) or ("", False))
    gpu.sanitizer(here, found)
    assert gpu.sanitizer_package(here) == []
    assert [command[0][:3] for command in commands] == [[str(tool), "--tool", check] for check in
                                                        ("memcheck", "racecheck")]  # fmt: skip
    assert all(command[2]["PEFT_EXT_NVRTC_FLAGS"] == "-lineinfo" for command in commands)


@pytest.mark.slow
def test_the_sample_of_compute_sanitizer_is_not_empty() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/ops/test_ops.py", "-k", gpu.SANITIZED]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert 5 <= len(names) <= 25, done.stdout
    assert all("-bfloat16]" in name for name in names)


# --- packages ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pips(here: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Returns the list of pip's commands. Each command fails, as pip does without a network."""
    monkeypatch.setattr(gpu, "VENV", tmp_path / "venv")
    monkeypatch.setattr(gpu, "find_sanitizer", lambda here: "compute-sanitizer")
    commands: list[list[str]] = []

    def run(command: list[str], limit: float) -> tuple[str, bool]:
        if "venv" in command:
            (tmp_path / "venv/lib/python3/site-packages").mkdir(parents=True)
            return "", False
        commands.append(command)
        return "exit status 1", False

    monkeypatch.setattr(here.runner, "run", run)
    here.gpu = {}
    return commands


def test_a_python_with_all_packages_is_used_as_it_is(here: Any, pips: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "probe", lambda python: DESCRIBED if python == sys.executable else {})
    found = outcome()
    gpu.packages(here, found)
    assert (found.result, found.why, here.python, pips) == ("passed", "", sys.executable, [])


def test_what_is_missing_goes_into_a_venv_or_is_done_without(
    here: Any, pips: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = {**DESCRIBED, "missing": ["bitsandbytes"], "path": ["/some/site-packages"]}
    monkeypatch.setattr(gpu, "probe", lambda python: lacking if python == sys.executable else {})
    found = outcome()
    gpu.packages(here, found)
    assert (found.result, found.why, here.python) == ("passed", "without bitsandbytes", sys.executable)
    assert [command[-1] for command in pips] == ["bitsandbytes"]
    (seen,) = gpu.VENV.glob("lib/python*/site-packages/running_python.pth")
    assert seen.read_text() == "/some/site-packages\n"


def test_without_a_cuda_torch_there_is_nothing_to_run(here: Any, pips: list, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {sys.executable: {"why": "torch 2.13.0+cpu is not a CUDA build"}}
    monkeypatch.setattr(gpu, "probe", lambda python: told.get(python, {}))
    monkeypatch.setattr(gpu, "driver_cuda", lambda: (13, 0))
    found = outcome()
    gpu.packages(here, found)
    assert found.result == "failed" and found.why == (
        "no Python has a CUDA build of torch that sees the GPU: "
        f"{sys.executable} (torch 2.13.0+cpu is not a CUDA build), {gpu.VENV}/bin/python (no torch that loads)"
    )
    assert [command[-1] for command in pips] == ["torch>=2.11", gpu.PACKAGES[-1]]


@pytest.mark.parametrize(("driver", "index"), [((12, 9), "cu128"), ((12, 8), "cu128"), ((12, 4), "cu126"),
                                               ((13, 0), None), ((11, 8), None), (None, None)])  # fmt: skip
def test_an_older_driver_gets_a_torch_that_the_driver_supports(driver: Any, index: Any) -> None:
    name, *more = gpu.torch_arguments(driver)
    assert name == "torch>=2.11"
    assert more == (["--index-url", f"https://download.pytorch.org/whl/{index}"] if index else [])


def test_the_release_of_the_driver_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        @staticmethod
        def cuDriverGetVersion(found: Any) -> int:
            found._obj.value = 12040
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver if name == "libcuda.so.1" else pytest.fail(name))
    assert gpu.driver_cuda() == (12, 4)

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert gpu.driver_cuda() is None


def test_cuda_bindings_has_the_release_of_torchs_cuda(here: Any, pips: list, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {**DESCRIBED, "cuda": "12.6", "missing": ["numpy", "cuda-bindings"]}
    monkeypatch.setattr(gpu, "probe", lambda python: lacking if python == sys.executable else {})
    gpu.packages(here, outcome())
    assert [command[-2:] for command in pips] == [["numpy", "cuda-bindings==12.*"]]
    assert gpu.pip_names(["cuda-bindings"], None) == ["cuda-bindings"]


@pytest.mark.slow
def test_this_python_is_described() -> None:
    found = gpu.probe(sys.executable)
    assert isinstance(found["missing"], list) and any("site-packages" in place for place in found["path"])
    assert found["gpu"] or found["why"].startswith("torch ")
    assert gpu.probe("/no/such/python") == {}


# --- the whole --------------------------------------------------------------------------------------------------------


def test_without_a_gpu_the_program_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(gpu, "probe", lambda python: {"cuda": None, "gpu": False, "missing": []})
    monkeypatch.setattr(gpu, "driver_is_here", lambda: False)
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "gpu: no NVIDIA GPU is here\n"
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "build,tests"])
    assert "no part tests; there are packages, build, import, warm, prove, core, training" in capsys.readouterr().err


def test_the_summary_and_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def table(here: Any, outcome: Any) -> None:
        row = {"op": "lora_linear", "case": "T=8192 4096->4096, bf16 base", "tokens": 8192, "k": 4096, "n": 4096,
               "weights": "rotating", "speedup": {"frozen": 0.8}}  # fmt: skip
        (here.out / "layer-all-toy.json").write_text(json.dumps({"rows": [row]}))
        outcome.files, outcome.rows = ["layer-all-toy.json"], 1

    def core(here: Any, outcome: Any) -> None:
        outcome.rows, outcome.failed = 9, ["a test"]
        outcome.add(("exit status 1", False))

    def found(here: Any, outcome: Any) -> None:
        here.gpu = DESCRIBED

    monkeypatch.setattr(gpu, "driver_is_here", lambda: True)
    toy_parts(monkeypatch, packages=found, table=table)
    assert gpu.main(["--out", str(tmp_path)]) == 0
    toy_parts(monkeypatch, packages=found, core=core, table=table)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("gpu-*.json")
    summary = json.loads(path.read_text())
    assert (summary["name"], summary["cuda"]) == (DESCRIBED["name"], "13.0")
    assert [(part["part"], part["result"], part["rows"]) for part in summary["parts"]] == [
        ("packages", "passed", 0), ("core", "failed", 9), ("table", "passed", 1),
    ]  # fmt: skip
    text = next(tmp_path.glob("gpu-*.log")).read_text()
    assert "gpu: core       failed     0 s, 9 rows, 1 failed: exit status 1" in text
    assert "gpu: failed in core: a test" in text
    assert "| LoRA | 4096 -> 4096 | 8192 | 1.25 | 1.17 | 1.07 |" in text


@pytest.mark.slow
@needs_hf
@needs_bnb
def test_the_training_part_runs_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Runs the parts packages and training with --rehearse: on the CPU with tiny sizes, for one method."""
    assert gpu.METHODS == "LoRA; QLoRA; DoRA"
    monkeypatch.setattr(gpu, "METHODS", "QLoRA")
    status = gpu.main(["--rehearse", "--parts", "training", "--seconds", "900", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert status == 0, said
    (path,) = tmp_path.glob("step-tiny-*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["method"] == "QLoRA, dropout 0.05" and row["fused"] == row["layers"] == 7
    assert row["speedup"] > 0 and row["memory"] > 0
    assert "gpu: training   passed" in said and "1 rows" in said


@pytest.mark.slow
def test_a_test_that_loses_the_context_ends_its_process_alone(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "test_toy.py").write_text(
        "import pytest\n\n@pytest.mark.parametrize('i', range(12))\ndef test_toy(i):\n"
        "    if i == 3: raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
    )
    support = os.pathsep.join(str(ROOT / place) for place in (".", "tests", "tests/support", "tests/fuzz"))
    environment = {**os.environ, "PYTHONPATH": support}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "conftest", "-n", "2", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "1 failed, 11 passed" in done.stdout, done.stdout + done.stderr
    assert "test_toy[3] lost the CUDA context" in done.stdout + done.stderr
