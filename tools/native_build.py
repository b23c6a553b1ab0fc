"""Builds shared libraries from csrc/ with other flags or compilers than setup.py, by ninja.

A lock lets only one process at a time build a library. A source is compiled only if the source, a header in csrc/ that
it includes, or its flags have changed.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import stable_abi

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Group:
    """Sources that are compiled with the same flags."""

    flags: str
    sources: Sequence[Path]


def missing_tools(compiler: str = "g++") -> str | None:
    """Returns a message that ``compiler`` or ninja is missing; None if neither is."""
    if shutil.which(compiler) is None:
        return f"{compiler} not found"
    return "ninja not found" if _ninja() is None else None


def _ninja() -> str | None:
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        path = Path(ninja.BIN_DIR, "ninja")
        if path.exists():
            return str(path)
    return shutil.which("ninja")


def _dollars(command: str) -> str:
    """Doubles each ``$`` of a shell command, as a ninja file needs it."""
    return command.replace("$", "$$")


def _escape(path: Path | str) -> str:
    return _dollars(str(path)).replace(" ", "$ ").replace(":", "$:")


def torch_flags() -> tuple[str, str]:
    """Returns shell-quoted flags for the compiler and for the linker: torch's headers with the stable ABI of the oldest
    supported torch, and libtorch_cpu. Raises RuntimeError if torch is not installed.
    """
    include = stable_abi.torch_include()
    if include is None:
        raise RuntimeError("torch not found")
    target = stable_abi.TARGET[0] << 56 | stable_abi.TARGET[1] << 48
    library = include.parent / "lib"
    return (
        shlex.join(["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include"),
                    f"-DTORCH_TARGET_VERSION=0x{target:016x}", f"-ffile-prefix-map={ROOT}/="]),
        # The path is passed by -Xlinker, because the compiler would divide an argument of -Wl at each comma of the
        # path.
        shlex.join([f"-L{library}", "-Xlinker", "-rpath", "-Xlinker", str(library), "-ltorch_cpu"]),
    )  # fmt: skip


def module_flags(python: Path | None = None) -> str:
    """Returns shell-quoted flags for the sources of ``module_sources``: the folders of the headers of csrc/, of Python
    and of pybind11, and macros of setup.py.

    ``python`` is the folder of Python's headers, by default of the running Python.
    """
    import pybind11
    import torch

    sys.path.insert(0, str(ROOT))
    from peft_ext._version import __version__

    return shlex.join([
        f"-I{pybind11.get_include()}", f"-I{python or sysconfig.get_path('include')}", f"-I{ROOT / 'csrc'}",
        f'-DPEFT_EXT_VERSION="{__version__}"', f'-DPEFT_EXT_TORCH="{torch.__version__}"',
        '-DPEFT_EXT_TORCH_TARGET="2.11"', "-Wno-unknown-pragmas",
    ])  # fmt: skip


def module_sources() -> list[Path]:
    """Returns the sources of the native library and of the module ``peft_ext._C``, as setup.py finds them."""
    written = runpy.run_path(str(ROOT / "csrc/embed_sources.py"))
    embedded = written["write"](ROOT / "build/embedded_sources.cpp")
    digest = written["write_digest"](ROOT / "build/source_digest.cpp")
    found = sorted(path for path in (ROOT / "csrc").rglob("*.cpp") if path.parent.name != "emulator")
    return [*found, embedded, digest]


# KERNELS matches the sources of the CPU kernels: the sources for one instruction set, and those in folders named tiles.
KERNELS = re.compile(r"_(scalar|avx2|avx512|amx|neon)\.cpp$|/tiles/")


def groups(flags: str, sources: Iterable[Path], kernels: str, others: str) -> list[Group]:
    """Returns two groups: the sources that KERNELS matches, with the optimization flag ``kernels``, and the other
    sources, with the optimization flag ``others``.

    The sources that KERNELS does not match check arguments and call kernels: their code takes a small part of the time
    of an operator's call, but most of the time of a build, because most of them include torch's headers. A build whose
    library is only tested, such as that of tools/sanitize.py, therefore compiles these sources without optimization.
    """
    held = {True: [], False: []}
    for source in sources:
        held[KERNELS.search(source.as_posix()) is not None].append(source)
    return [Group(f"{kernels} {flags}", held[True]), Group(f"{others} {flags}", held[False])]


def package(folder: Path, library: Path, suffix: str | None = None) -> Path:
    """Makes a package peft_ext in ``folder``, which PYTHONPATH may name, with links to this checkout's Python files and
    to ``library``. Returns ``folder``.

    ``library`` is both the native library and the module ``_C``; the loader loads the file once for both names.
    ``suffix`` is the suffix of extension modules, by default that of the running Python.
    """
    inside = folder / "peft_ext"
    inside.mkdir(parents=True, exist_ok=True)
    for path in inside.iterdir():
        path.unlink()
    for path in (ROOT / "peft_ext").iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (inside / path.name).symlink_to(path)
    (inside / "_kernels.so").symlink_to(library)
    (inside / f"_C{suffix or sysconfig.get_config_var('EXT_SUFFIX')}").symlink_to(library)
    return folder


# PYTEST runs pytest without the working directory in sys.path. `python -m pytest` would put the checkout, which has
# another library, before the folders of PYTHONPATH.
PYTEST = "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main(sys.argv[1:]))"


def build(library: Path, groups: Iterable[Group], link: str | None = "", compiler: str = "g++") -> Path:
    """Builds ``library`` from the groups' sources and returns its path. The objects are in a folder beside the library,
    with the library's name.

    ``link``: flags of the linker; with None, the sources are only compiled. Raises RuntimeError with ninja's output if
    the build fails.
    """
    folder = library.parent / library.name.removeprefix("lib").partition(".")[0]
    folder.mkdir(parents=True, exist_ok=True)
    lines, objects = [], []
    for number, group in enumerate(groups):
        lines += [
            f"rule compile{number}",
            f"  command = {_dollars(compiler)} -MMD -MF $out.d {_dollars(group.flags)} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        for source in group.sources:
            objects.append(folder / source.relative_to(ROOT).with_suffix(".o"))
            lines.append(f"build {_escape(objects[-1])}: compile{number} {_escape(source)}")
    if link is not None:
        lines += ["rule link", f"  command = {_dollars(compiler)} -shared $in -o $out {_dollars(link)}"]
        lines.append(f"build {_escape(library)}: link {' '.join(_escape(path) for path in objects)}")
    text = "\n".join(lines) + "\n"

    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        recipe = folder / "build.ninja"
        if not recipe.exists() or recipe.read_text() != text:
            recipe.write_text(text)
        jobs = os.environ.get("MAX_JOBS", str(len(os.sched_getaffinity(0))))
        command = [str(_ninja()), "-C", str(folder), "-j", jobs]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{library.name} does not build:\n{done.stdout}")
    return library
