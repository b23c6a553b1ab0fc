"""Builds the CUDA kernels for the emulator and loads the kernels as operators of the namespace ``peft_ext_emulated``.

g++ compiles every csrc/**/*_cuda.cpp, with csrc/emulator in place of CUDA. The operators of ``peft_ext_emulated``
compute on CPU tensors. The module needs g++ and ninja, and no GPU. Run as a script, the module builds the library and
prints the library's path.
"""

from __future__ import annotations

import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import native_build
from native_build import ROOT, Group

CSRC = ROOT / "csrc"
BUILD = ROOT / "build/emulated"
NAMESPACE = "peft_ext_emulated"

_libraries: list[object] = []  # the torch.library.Library objects, without which PyTorch would drop the operators

# The emulator needs no hooks of ThreadSanitizer at function entry and exit.
SANITIZE = "-fsanitize=thread,bounds-strict,alignment --param tsan-instrument-func-entry-exit=0"
# With -ffp-contract=off, as in setup.py, the compiler fuses no product and sum. -g1 is enough for line numbers in the
# messages about faults.
FOLDER = shlex.quote(f"-I{CSRC}")
COMMON = f"-O2 -g1 -std=c++17 -ffp-contract=off -fno-strict-aliasing -fvisibility=hidden -fPIC -Wall {FOLDER}"


def missing() -> str | None:
    """Returns the reason why the emulator cannot be built on this machine; None if no reason is known."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the emulator is for x86-64 Linux, this is {platform.machine()} {sys.platform}"
    return native_build.missing_tools()


def build(name: str, sources: list[Path], flags: str = "", libraries: str = "", folder: Path = BUILD) -> Path:
    """Builds, if a source changed, a shared library of the emulator and of ``sources``, which are compiled with
    ThreadSanitizer, in ``folder``."""
    kernels = (  # a kernel's stack frame may have 32 KiB at most, because the emulator runs it on a stack of 64 KiB
        f"{COMMON} {SANITIZE} -Wno-unknown-pragmas -Werror=frame-larger-than=32768 -DPEFT_EXT_EMULATE_CUDA "
        f"-include emulator/device.h {flags} -x c++"
    )
    # The emulator's objects are linked first, because the linker keeps the first copy of an inline function, and the
    # emulator's copies are not instrumented.
    groups = Group(COMMON, sorted((CSRC / "emulator").glob("*.cpp"))), Group(kernels, sources)
    return native_build.build(folder / f"lib{name}.so", groups, f"-Wl,--as-needed,-z,defs {libraries}")


def build_ops() -> Path:
    """Builds libpeft_ext_emulated.so with every CUDA operator, in a folder of build/emulated for this version of torch.

    In one folder, two environments with different versions of torch would replace each other's library, and ninja would
    keep objects that were compiled with another version's headers.
    """
    sources = sorted(CSRC.rglob("*_cuda.cpp"))
    return build(NAMESPACE, sources, *native_build.torch_flags(), folder=BUILD / f"torch-{version('torch')}")


def load() -> Path:
    """Builds sources that changed, declares each operator with a CUDA kernel in the namespace peft_ext_emulated, and
    registers the emulated kernels. Returns the path of the library.
    """
    import torch

    import peft_ext.ops  # noqa: F401  declares the ops
    from peft_ext.ops.library import OPERATORS

    path = build_ops()
    if not _libraries:
        library = torch.library.Library(NAMESPACE, "DEF")
        for name in (op.name for op in OPERATORS.values() if op.cuda):
            schema = str(getattr(torch.ops.peft_ext, name).default._schema)
            library.define(schema.removeprefix("peft_ext::"))
        torch.ops.load_library(str(path))
        _libraries.append(library)
    return path


if __name__ == "__main__":
    print(build_ops())
