"""Builds the CUDA kernels for the emulator and loads them, as the ops of the namespace ``peft_ext_emulated``.

g++ compiles every csrc/**/*_cuda.cu, with csrc/emulator in place of CUDA; the ops then take CPU tensors. Needs g++ and
ninja, no nvcc and no GPU. As a script: builds and prints the library's path.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import stable_abi

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build/emulated"
NAMESPACE = "peft_ext_emulated"

_libraries: list[object] = []  # keeps the ops' definitions alive

# The hooks of function entry and exit would check nothing.
SANITIZE = "-fsanitize=thread,bounds-strict,alignment --param tsan-instrument-func-entry-exit=0"
# No contraction: see setup.py. Line numbers, for the faults' messages, take no more than -g1.
COMMON = f"-O2 -g1 -std=c++17 -ffp-contract=off -fno-strict-aliasing -fvisibility=hidden -fPIC -Wall -I{CSRC}"


def missing() -> str | None:
    """Why the emulator can't be built here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the emulator is for x86-64 Linux, this is {platform.machine()} {sys.platform}"
    if shutil.which("g++") is None:
        return "g++ not found"
    if _ninja() is None:
        return "ninja not found"
    return None


def _ninja() -> str | None:
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        path = Path(ninja.BIN_DIR, "ninja")
        if path.exists():
            return str(path)
    return shutil.which("ninja")


def _escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def build(name: str, sources: list[Path], flags: str = "", libraries: str = "") -> Path:
    """A shared library of the emulator and ``sources``, which are instrumented; built where something changed."""
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    library = BUILD / f"lib{name}.so"
    lines = [  # a kernel's frame has to fit a fiber's stack, 64 KiB
        "rule emulator",
        f"  command = g++ -MMD -MF $out.d {COMMON} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule kernels",
        f"  command = g++ -MMD -MF $out.d {COMMON} {SANITIZE} -Wno-unknown-pragmas -Werror=frame-larger-than=32768 "
        f"-DPEFT_EXT_EMULATE_CUDA -include emulator/device.h {flags} -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ -shared $in -o $out -Wl,--as-needed,-z,defs {libraries}",
    ]
    objects = []
    # The emulator comes first: the linker keeps the first copy of an inline function, and its own are not instrumented.
    for rule, group in (("emulator", sorted((CSRC / "emulator").glob("*.cpp"))), ("kernels", sources)):
        for source in group:
            objects.append(folder / source.relative_to(ROOT).with_suffix(".o"))
            lines.append(f"build {_escape(objects[-1])}: {rule} {_escape(source)}")
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
        raise RuntimeError(f"the emulator's library {name} does not build:\n{done.stdout}")
    return library


def build_ops() -> Path:
    """build/emulated/libpeft_ext_emulated.so, with every CUDA op."""
    include = stable_abi.torch_include()
    if include is None:
        raise RuntimeError("torch not found")
    target = stable_abi.TARGET[0] << 56 | stable_abi.TARGET[1] << 48
    flags = (
        f"-isystem {include} -isystem {include / 'torch/csrc/api/include'} -DTORCH_TARGET_VERSION=0x{target:016x} "
        f"-ffile-prefix-map={ROOT}/="
    )
    torch_lib = include.parent / "lib"
    libraries = f"-L{torch_lib} -Wl,-rpath,{torch_lib} -ltorch_cpu"
    return build(NAMESPACE, sorted(CSRC.rglob("*_cuda.cu")), flags, libraries)


def load() -> Path:
    """Build what changed, declare each op of peft_ext in the namespace peft_ext_emulated, register its kernels."""
    import torch

    import peft_ext.ops  # noqa: F401  declares the ops
    from peft_ext.ops._library import OPS

    path = build_ops()
    if not _libraries:
        library = torch.library.Library(NAMESPACE, "DEF")
        for name in OPS:
            schema = str(getattr(torch.ops.peft_ext, name).default._schema)
            library.define(schema.removeprefix("peft_ext::"))
        torch.ops.load_library(str(path))
        _libraries.append(library)
    return path


if __name__ == "__main__":
    print(build_ops())
