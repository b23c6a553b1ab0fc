"""Runs the operators' tests on each CPU path of 64-bit Arm, emulated by qemu-user.

    python tools/aarch64_tests.py [--paths neon_bf16,neon,scalar] [pytest arguments]

The native library is cross-compiled on this machine. Debian's Python for Arm, PyTorch and the packages that the tests
import are downloaded into build/aarch64 (5 GB, once); the program installs nothing outside of build/aarch64. The
program needs Debian, aarch64-linux-gnu-g++ and qemu-aarch64. The emulated CPU has bfloat16 instructions. The emulated
run checks results and says nothing about speed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import extra
import native_build
import stable_abi
from native_build import ROOT, Group

BUILD = ROOT / "build/aarch64"
SYSTEM, SITE = BUILD / "system", BUILD / "site"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
DEBIAN = {COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}
PATHS = ("neon_bf16", "neon", "scalar")
PACKAGES = ("python3", "libpython3-dev", "libgomp1", "libstdc++6")
# Packages that the tests import in addition to the requirements of peft_ext and of its extra hf.
OF_TESTS = ("numpy", "pytest>=9", "pytest-repeat", "pytest-xdist", "parameterized", "attrs")
NEWEST_MANYLINUX = 40
# The compiler's flags are like those of setup.py, with -O2 in place of -O3, because the emulator spends most of its
# time outside of the library.
FLAGS = "-O2 -std=c++17 -ffp-contract=off -fvisibility=hidden -fPIC -Wall -g0"
TESTS = ("tests/ops/test_ops.py", "tests/ops/test_op_edges.py")
# NOT_THESE excludes the tests that need a compiler for the emulated machine, and the tests that run on two threads.
NOT_THESE = "not compile and not opcheck and not two_threads"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", default=",".join(PATHS))
    options, arguments = parser.parse_known_args()
    for tool, package in DEBIAN.items():
        if shutil.which(tool) is None:
            sys.exit(f"aarch64-tests: {tool} not found: apt-get install {package}")
    make_system()
    version = (SYSTEM / "usr/bin/python3").readlink().name.removeprefix("python")
    make_site(version)
    start = time.monotonic()
    library = build(version)
    print(f"aarch64-tests: compiled in {time.monotonic() - start:.0f} s", flush=True)
    package = native_build.package(BUILD / "package", library, ".so")
    failed = [path for path in options.paths.split(",") if run(path, package, arguments) != 0]
    print(f"aarch64-tests: {', '.join(failed) + ' failed' if failed else 'all paths passed'}")
    return 1 if failed else 0


def make_system() -> None:
    """Unpacks the Debian packages PACKAGES for Arm, and the packages that these need, into SYSTEM."""
    if (SYSTEM / "usr/bin/python3").is_symlink():
        return
    apt = BUILD / "apt"
    for folder in ("state", "lists/partial", "cache/archives/partial", "packages"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    settings = {"APT::Architecture": "arm64", "Dir::State": apt / "state", "Dir::State::lists": apt / "lists",
                "Dir::State::status": "/dev/null", "Dir::Cache": apt / "cache", "APT::Sandbox::User": ""}  # fmt: skip
    text = "".join(f'{name} "{value}";\n' for name, value in settings.items())
    (apt / "apt.conf").write_text(text + 'APT::Architectures { "arm64"; };\n')
    environment = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}

    def call(*command: str) -> str:
        done = subprocess.run(command, env=environment, cwd=apt / "packages", capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"aarch64-tests: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    call("apt-get", "update", "-qq")
    hard = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    needed = call("apt-cache", "depends", "--recurse", *hard, *PACKAGES)
    names = sorted(set(re.findall(r"^([a-z0-9][\w.+-]*)$", needed, re.MULTILINE)))
    call("apt-get", "download", "-qq", *names)
    partial = BUILD / "system.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for file in sorted((apt / "packages").glob("*.deb")):
        call("dpkg-deb", "-x", str(file), str(partial))
    if not (partial / "lib").exists():
        (partial / "lib").symlink_to("usr/lib")
    partial.rename(SYSTEM)
    shutil.rmtree(apt)


def make_site(version: str) -> None:
    """Installs the packages that the tests import, and the oldest supported torch, into SITE.

    pip ignores its configuration files, because an index that they name may have no packages for Arm.
    """
    if SITE.exists():
        return
    partial = BUILD / "site.partial"
    shutil.rmtree(partial, ignore_errors=True)
    own = [line for line in extra.declared() if ";" not in line and not line.startswith("torch")]
    wheels = [f"torch=={'.'.join(map(str, stable_abi.TARGET))}.*", *own, *extra.requirements("hf"), *OF_TESTS]
    tags = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(5, NEWEST_MANYLINUX + 1))]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
               "--target", str(partial), "--python-version", version, "--only-binary=:all:",
               *(word for tag in tags for word in ("--platform", tag)), *wheels]  # fmt: skip
    if subprocess.run(command, env={**os.environ, "PIP_CONFIG_FILE": os.devnull}).returncode != 0:
        sys.exit("aarch64-tests: pip found no packages for Arm")
    partial.rename(SITE)


def build(version: str) -> Path:
    include, libraries = SITE / "torch/include", SITE / "torch/lib"
    target = stable_abi.TARGET[0] << 56 | stable_abi.TARGET[1] << 48
    headers = shlex.join([f"-DTORCH_TARGET_VERSION=0x{target:016x}"] + [
        word for folder in (include, include / "torch/csrc/api/include", SYSTEM / "usr/include")
        for word in ("-isystem", str(folder))
    ])  # fmt: skip
    headers += f" {native_build.module_flags(SYSTEM / 'usr/include' / f'python{version}')}"
    group = Group(f"{FLAGS} {headers}", native_build.module_sources())
    # The interpreter that loads the library defines the symbols of Python, so that the linker leaves them undefined.
    link = shlex.join([f"-L{libraries}", "-Xlinker", "-rpath", "-Xlinker", str(libraries),
                       "-Wl,--unresolved-symbols=ignore-all", "-ltorch_cpu"])  # fmt: skip
    try:
        return native_build.build(BUILD / "libpeft_ext.so", [group], link, COMPILER)
    except RuntimeError as error:
        sys.exit(f"aarch64-tests: {error}")


def run(path: str, package: Path, arguments: list[str]) -> int:
    print(f"aarch64-tests: {path}", flush=True)
    environment = {**os.environ, "PYTHONPATH": f"{package}:{SITE}", "PEFT_EXT_REQUIRE": "1", "HF_HUB_OFFLINE": "1",
                   "OMP_NUM_THREADS": "1", "PEFT_EXT_CPU_ISA": path}  # fmt: skip
    kept = () if "-k" in arguments else ("-k", NOT_THESE)
    tests = () if any(word.startswith("tests/") for word in arguments) else TESTS
    command = [EMULATOR, "-cpu", "max", "-L", str(SYSTEM), str(SYSTEM / "usr/bin/python3"), "-c", native_build.PYTEST,
               "-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=0", *kept, *arguments, *tests]  # fmt: skip
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
