"""Runs tests on a CPU library that a sanitizer instruments. Needs Linux, g++ with libasan and libtsan, and ninja.

    python tools/sanitize.py address [pytest arguments]     AddressSanitizer and UndefinedBehaviorSanitizer
    python tools/sanitize.py thread [pytest arguments]      ThreadSanitizer

Without pytest arguments, the program runs the shape sweep at small sizes: 1,000 calls, on all CPU paths in turn. Only
the code of csrc/ is instrumented, but the sanitizer's malloc also guards the memory of Python and torch. In the build
for ThreadSanitizer, the loops run on the threads of ``tests/native/sanitize/threads.cpp``, because ThreadSanitizer does
not see how torch's threads wait for each other.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import native_build
from native_build import ROOT

BUILD = ROOT / "build/sanitized"
TESTS = ("tests/fuzz/test_sweep.py",)
FLAGS = {
    "address": "-fsanitize=address,undefined",
    "thread": "-fsanitize=thread",
}
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    # Leaks are not reported, because Python and torch leave memory allocated at exit. Some tests provoke a failed
    # allocation and expect an error.
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    },
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0:ignore_noninstrumented_modules=1"},
}


def missing(kind: str) -> str | None:
    """Returns the reason why the sanitizer ``kind`` cannot run on this machine; None if no reason is known."""
    if sys.platform != "linux":
        return f"the sanitizers are for Linux, this is {sys.platform}"
    return native_build.missing_tools() or next(
        (f"{name} not found" for name in RUNTIMES[kind] if not Path(_runtime(name)).is_absolute()), None
    )


def _runtime(name: str) -> str:
    """Returns the path of the runtime library ``name`` of g++, or ``name`` itself if g++ has no such library."""
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def build(kind: str) -> Path:
    """Builds a folder with the package peft_ext, which has links to this checkout's Python files and to the
    instrumented library."""
    flags, libraries = native_build.torch_flags()
    common = (
        f"-g1 -std=c++17 -ffp-contract=off -fno-omit-frame-pointer -fvisibility=hidden -fPIC -Wall {FLAGS[kind]} "
        f"{native_build.module_flags()} {flags}"
    )
    sources = [*native_build.module_sources(), ROOT / "tests/native/sanitize/planted.cpp"]
    if kind == "thread":
        sources.append(ROOT / "tests/native/sanitize/threads.cpp")
    groups = native_build.groups(common, sources, "-O1", "-O0")
    library = native_build.build(BUILD / f"lib{kind}.so", groups, f"{FLAGS[kind]} -Wl,-Bsymbolic {libraries}")
    return native_build.package(BUILD / f"site-{kind}", library)


def command(kind: str, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Returns the command and the environment that run ``python <arguments>`` on the instrumented library."""
    site = build(kind)
    preload = ":".join(_runtime(name) for name in RUNTIMES[kind])
    options = {name: f"{value}:{os.environ.get(name, '')}" for name, value in OPTIONS[kind].items()}
    environment = {**os.environ, **options, "LD_PRELOAD": preload, "PYTHONPATH": str(site),
                   "PEFT_EXT_REQUIRE": "1", "PEFT_EXT_SANITIZER": kind, "PYTHONMALLOC": "malloc"}  # fmt: skip
    # setarch turns off the random placement of memory, because the sanitizers need fixed addresses for their shadow
    # memory.
    return ["setarch", "--addr-no-randomize", sys.executable, *arguments], environment


# The planted faults that each sanitizer must report. The program PLANT passes the memory of a torch tensor to the
# function of tests/native/sanitize/planted.cpp that has the fault.
PLANTED = {"address": ("address", "undefined"), "thread": ("thread",)}
WANTED = {"address": "heap-buffer-overflow", "undefined": "signed integer overflow", "thread": "data race"}
PLANT = """
import ctypes, sys, torch, peft_ext
library = ctypes.CDLL(peft_ext._native.STATE.module.__file__)
values = torch.zeros(1024)
getattr(library, "planted_" + sys.argv[1])(ctypes.c_void_p(values.data_ptr()), ctypes.c_size_t(values.numel()))
"""


def check_planted(kind: str) -> None:
    """Exits if the sanitizer does not report a planted fault, because it would then not report faults of kernels
    either."""
    for fault in PLANTED[kind]:
        line, environment = command(kind, ["-c", PLANT, fault])
        environment.update(OPTIONS[kind])
        done = subprocess.run(line, env=environment, cwd=BUILD, capture_output=True, text=True)
        if done.returncode == 0 or WANTED[fault] not in done.stderr:
            sys.exit(
                f"sanitize: a planted fault ({fault}) went unreported, exit code {done.returncode}:\n{done.stderr}"
            )
    print(f"sanitize: planted faults were reported: {', '.join(PLANTED[kind])}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=FLAGS)
    args, rest = parser.parse_known_args()
    if why := missing(args.kind):
        sys.exit(f"sanitize: {why}")
    check_planted(args.kind)
    rest = rest or ["-q", "-x", "-p", "no:cacheprovider", *TESTS]
    # With pytest's default capture of file descriptors, the report with which the process ends would be lost.
    line, environment = command(args.kind, ["-c", native_build.PYTEST, "--capture=sys", *rest])
    return subprocess.run(line, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
