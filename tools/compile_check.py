"""Compiles the native library with another compiler than the build's, or for another machine. Warnings are errors.

    python tools/compile_check.py clang [pytest arguments]
                                            compiles with clang++, and runs some tests of the operators in bfloat16
    python tools/compile_check.py aarch64   compiles with aarch64-linux-gnu-g++ and this machine's headers of Python
    python tools/compile_check.py macos     compiles and links with zig (pip install ziglang) for macOS on Apple silicon

The compiled code for Arm and for macOS is not run. A warning about an unused function is no error. Each compiler has
its own folder below build/compilers, and compiles only changed sources. The program fails if the compiler is not
installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import native_build
from native_build import ROOT

BUILD = ROOT / "build/compilers"
COMPILERS = {"clang": "clang++", "aarch64": "aarch64-linux-gnu-g++", "macos": "zig"}
MEND = {"clang": "apt-get install clang", "aarch64": "apt-get install g++-aarch64-linux-gnu",
        "macos": "pip install ziglang"}  # fmt: skip
# The compilers get flags like those of setup.py, with warnings as errors. Only clang's kernels are optimized, because
# only they are run; the optimization does not change clang's warnings.
COMMON = "-std=c++17 -ffp-contract=off -fvisibility=hidden -fPIC -Wall -Werror -Wno-error=unused-function -g0"
OPTIMIZATION = {"clang": "-O2", "aarch64": "-O0", "macos": "-O0"}
TESTS = ("-k", "(matches or float64 or errors or gradients) and bfloat16",
         "tests/ops/test_ops.py", "tests/ops/test_op_edges.py")  # fmt: skip


def compiler_of(kind: str) -> str:
    """Returns the command that runs the compiler for ``kind``. For macOS the command is zig with arguments."""
    if kind != "macos" or importlib.util.find_spec("ziglang") is None:
        return COMPILERS[kind]
    import ziglang

    return f"{shlex.quote(str(Path(ziglang.__file__).with_name('zig')))} c++ -target aarch64-macos"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=COMPILERS)
    known, arguments = parser.parse_known_args()
    kind = known.kind
    compiler = compiler_of(kind)
    if why := native_build.missing_tools(shlex.split(compiler)[0]):
        sys.exit(f"{kind}-check: {why}: {MEND[kind]}")

    start = time.monotonic()
    flags, libraries = native_build.torch_flags()
    sources = native_build.module_sources()
    flags = f"{COMMON} {native_build.module_flags()} {flags}"
    groups = native_build.groups(flags, sources, OPTIMIZATION[kind], "-O0")
    # A library for macOS finds torch's functions when the library is loaded.
    link = {"clang": f"-Wl,-Bsymbolic {libraries}", "macos": "-Wl,-undefined,dynamic_lookup"}.get(kind)
    try:
        library = native_build.build(BUILD / f"lib{kind}.so", groups, link, compiler)
    except RuntimeError as error:
        sys.exit(f"{kind}-check: {error}")
    command = [*shlex.split(compiler), "--version"]
    version = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0]
    print(
        f"{kind}-check: {len(sources)} sources compile with {version} in {time.monotonic() - start:.0f} s", flush=True
    )
    if kind != "clang":
        return 0

    site = native_build.package(BUILD / f"site-{kind}", library)
    environment = {**os.environ, "PYTHONPATH": str(site), "PEFT_EXT_REQUIRE": "1"}
    command = [sys.executable, "-c", native_build.PYTEST, "-q", "-p", "no:cacheprovider", *arguments, *TESTS]
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
