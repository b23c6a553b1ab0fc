"""Installs a wheel into a new environment, uses the package, installs the wheel again and uninstalls the package.

    python tools/wheel_trial.py WHEEL [--python PYTHON] [--torch "torch==2.11.*"]
    python tools/wheel_trial.py WHEEL --emulated

WHEEL is a wheel, or a folder from which pip chooses the wheel for PYTHON.
Without ``--torch`` the new environment sees the packages of PYTHON, torch among them. With ``--torch`` the environment
begins empty, and pip installs the named torch, the wheel and the packages that the wheel requires, from pip's index.
With ``--emulated`` a wheel for 64-bit Arm runs on Debian's Python for Arm under qemu-user; tools/aarch64_tests.py
downloads this Python, torch and other packages once.

If the wheel holds the native library, the installed package must use the library. Otherwise ``import peft_ext`` must
warn that the operators run the slow reference.

The trial also runs a few steps of ``peft-ext finetune`` on a tiny random model, without the network. With ``--torch``
pip also installs the packages of the extra ``hf``, which ``finetune`` needs. Without ``--torch``, if PYTHON lacks a
package that ``finetune`` needs, the trial leaves out ``finetune`` and says so. All layers of the model must run on
kernels, or no layer if the wheel has no native library.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "peft_ext"
MODEL = Path(__file__).resolve().parents[1] / "tests/support/tiny_llama.py"  # script that writes the tiny model
NEEDED = ("transformers", "peft", "accelerate", "datasets", "bitsandbytes", "psutil")
STEPS = 3

# The first argument of PROGRAM is the folder that the package must be in. The second argument is "native" if the wheel
# holds the native library, and otherwise "pure".
PROGRAM = """
import os, sys, warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft_ext
place, native = sys.argv[1], sys.argv[2] == "native"
assert os.path.realpath(peft_ext.__file__).startswith(os.path.realpath(place)), peft_ext.__file__
state = peft_ext._native.STATE
said = [str(warning.message) for warning in caught if "reference" in str(warning.message)]
assert (state.isa != "reference") == native, state
assert bool(said) == (not native), said
assert state.cuda_loaded == (native and torch.version.cuda is not None), state
x, w = torch.randn(5, 128), torch.randn(48, 128)
A, B = torch.randn(8, 128, requires_grad=True), torch.randn(48, 8, requires_grad=True)
y = peft_ext.ops.lora_linear(x, w, A, B)
torch.testing.assert_close(y, x @ w.T + x @ A.T @ B.T, atol=1e-3, rtol=1e-3)
y.sum().backward()
torch.testing.assert_close(A.grad, B.sum(0)[:, None] * x.sum(0), atol=1e-3, rtol=1e-3)
nf4 = peft_ext.ops.nf4_quantize(w)
torch.testing.assert_close(peft_ext.ops.nf4_linear(x, nf4), x @ nf4.dequantize().T, atol=1e-3, rtol=1e-3)
try:
    peft_ext.ops.lora_linear(x, w, A[:4], B)
except (RuntimeError, ValueError) as error:
    assert "lora_linear" in str(error), error
else:
    raise AssertionError("operands whose ranks differ were accepted")
path = state.isa + (" and CUDA" if state.cuda_loaded else "")
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, {path}")
for text in said:
    print(f"said: {text}")
"""


def _tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _run(*command: str | Path, wanted: int = 0, **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if done.returncode != wanted:
        printed = (done.stdout + done.stderr)[-4000:]
        sys.exit(f"wheel-trial: {' '.join(map(str, command[:6]))} failed:\n{printed}")
    return done.stdout


def _use(python: Sequence[str | Path], folder: Path, native: bool, environment: dict[str, str]) -> str:
    """Runs PROGRAM, and returns what the program printed."""
    (folder / "program.py").write_text(PROGRAM)
    kind = "native" if native else "pure"
    printed = _run(*python, "-W", "ignore", folder / "program.py", folder, kind, env=environment, cwd=folder)
    (folder / "program.py").unlink()
    return printed.strip()


def _finetune(python: Sequence[str | Path], folder: Path, native: bool, environment: dict[str, str]) -> str:
    """Runs STEPS steps of ``peft-ext finetune``, checks the report, and returns a summary of the run."""
    missing = f"import importlib.util as u; print(*[n for n in {NEEDED} if u.find_spec(n) is None])"
    if lacks := _run(*python, "-c", missing, env=environment, cwd=folder).strip():
        return f"finetune left out: no {lacks}"
    with tempfile.TemporaryDirectory() as place:
        environment = environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": place}
        _run(*python, MODEL, place, env=environment, cwd=place)
        output = Path(place, "out")
        _run(*python, "-W", "ignore", "-m", PACKAGE, "finetune", "--model", Path(place, "model"), "--data",
             Path(place, "pairs.jsonl"), "--output", output, "--batch-size", "2", "--block-size", "64", "--rank", "4",
             "--max-steps", STEPS, env=environment, cwd=place)  # fmt: skip
        report = json.loads((output / "run.json").read_text())
        if why := run_faults(report, native):
            sys.exit(f"wheel-trial: finetune: {why}")
        if not (output / "adapter_model.safetensors").is_file():
            sys.exit("wheel-trial: finetune wrote no adapter_model.safetensors")
    fused = report["fused"]
    return f"finetune: {STEPS} steps, {fused['fused']} of {fused['layers']} layers on kernels"


def run_faults(report: dict, native: bool) -> str:
    """Returns what is wrong with ``report``, the run.json of a run of ``finetune``, or "" if nothing is. ``native``:
    whether all layers must run on kernels; if False, no layer may."""
    fused, layers = report["fused"]["fused"], report["fused"]["layers"]
    if not report["finished"] or not report["check"]["ok"]:
        return f"finished is {report['finished']}, and the check is {report['check']}"
    if layers == 0 or fused != (layers if native else 0):
        return f"{fused} of {layers} layers run on kernels, wanted {'all' if native else 'none'}"
    return ""


def _is_native(wheel: Path) -> bool:
    return not wheel.name.endswith("-none-any.whl")


def chosen(folder: Path, python: str) -> Path:
    """Returns the wheel in ``folder`` that pip installs into ``python``."""
    with tempfile.TemporaryDirectory() as place:
        _run(python, "-m", "pip", "--disable-pip-version-check", "download", "--no-index", "--no-deps",
             "--only-binary=:all:", "--find-links", folder, "--dest", place, PACKAGE)  # fmt: skip
        (found,) = Path(place).iterdir()
        return folder / found.name


def _environment(native: bool, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PEFT_EXT", "PYTHON"))}
    # With several threads, which wait for each other in busy loops, a run would take minutes on a busy machine.
    one_thread = {"OMP_NUM_THREADS": "1"}
    return kept | one_thread | ({"PEFT_EXT_REQUIRE": "1"} if native else {}) | more


def _purelib(python: str | Path) -> Path:
    return Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def trial(wheel: Path, python: str, torch: str | None = None) -> str:
    """Installs the wheel twice into a new virtual environment of ``python``, runs PROGRAM and a fine-tuning there, and
    uninstalls the wheel. Returns what PROGRAM printed, and a summary of the fine-tuning. Exits if a step fails, or if
    the uninstallation leaves files.

    ``torch``: pip's requirement of the torch that pip installs into the environment, such as "torch==2.11.*"; pip then
    also installs the packages that the wheel and its extra ``hf`` require. If ``torch`` is None, pip installs the wheel
    alone, and the environment sees the packages of ``python``.
    """
    native = _is_native(wheel)
    with tempfile.TemporaryDirectory() as folder:
        _run(python, "-m", "venv", *(["--without-pip"] if torch is None else []), folder)
        programs = Path(folder, "Scripts" if os.name == "nt" else "bin")
        inside = programs / "python"
        if torch is None:
            pip = [python, "-m", "pip", "--disable-pip-version-check", "--python", folder]
            (_purelib(inside) / "zz-packages.pth").write_text(f"{_purelib(python)}\n")
            install = [*pip, "install", "--no-index", "--no-deps"]
        else:
            pip = [inside, "-m", "pip", "--disable-pip-version-check"]
            _run(*pip, "install", torch)
            _run(*pip, "install", f"{wheel}[hf]")
            _run(*pip, "check")
            _run(*pip, "uninstall", "--yes", PACKAGE)
            install = [*pip, "install", "--no-deps"]
        before = _tree(Path(folder))
        for again in ([], ["--force-reinstall"]):
            _run(*install, *again, wheel)
        environment = _environment(native, PYTHONDONTWRITEBYTECODE="1")
        printed = _use([inside], Path(folder), native, environment)
        command = programs / "peft-ext"
        _run(command, "--version", env=environment, cwd=folder)
        # `peft-ext doctor` exits with 1 where the native library is missing.
        _run(command, "doctor", env=environment, cwd=folder, wanted=0 if native else 1)
        printed += "; " + _finetune([inside], Path(folder), native, environment)
        _run(*pip, "uninstall", "--yes", PACKAGE)
        left = {
            name for name in _tree(Path(folder)) - before if not name.endswith(".pyc") and "__pycache__" not in name
        }
        if left:
            sys.exit(f"wheel-trial: {wheel.name}: uninstalling leaves {', '.join(sorted(left))}")
    return printed


def emulated_version() -> str:
    """Returns the version of Debian's Python for 64-bit Arm, such as "3.11", after downloading this Python."""
    import aarch64_tests

    aarch64_tests.make_system()
    return (aarch64_tests.SYSTEM / "usr/bin/python3").readlink().name.removeprefix("python")


def emulated(wheel: Path) -> str:
    """Runs PROGRAM and a fine-tuning with a wheel for 64-bit Arm under qemu-user. Returns what PROGRAM printed, and a
    summary of the fine-tuning."""
    import aarch64_tests

    version = emulated_version()
    aarch64_tests.make_site(version)
    with tempfile.TemporaryDirectory() as folder:
        _run(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps",
             "--target", folder, "--python-version", version, "--only-binary=:all:",
             "--platform", "manylinux_2_28_aarch64", wheel)  # fmt: skip
        environment = _environment(True, PYTHONPATH=f"{folder}:{aarch64_tests.SITE}")
        python = [aarch64_tests.EMULATOR, "-cpu", "max", "-L", aarch64_tests.SYSTEM,
                  aarch64_tests.SYSTEM / "usr/bin/python3"]  # fmt: skip
        printed = _use(python, Path(folder), True, environment)
        _run(*python, "-m", PACKAGE, "doctor", env=environment, cwd=folder)
        printed += "; " + _finetune(python, Path(folder), True, environment)
    return printed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", default=sys.executable, help="the interpreter (default: this one)")
    parser.add_argument("--torch", help="a requirement of torch that pip installs into an empty environment")
    parser.add_argument("--emulated", action="store_true", help="runs a wheel for 64-bit Arm under qemu-user")
    asked = parser.parse_args(argv)
    wheel = asked.wheel if asked.wheel.is_file() else chosen(asked.wheel, asked.python)
    print(f"{wheel.name}: {emulated(wheel) if asked.emulated else trial(wheel, asked.python, asked.torch)}")


if __name__ == "__main__":
    main()
