"""Compiles the C++ programs of tests/native that run without the library, such as the tests of plans."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = (sysconfig.get_config_var("CXX") or "c++").split()[0]

of_plans = [
    pytest.mark.cpu_only("a plan is arithmetic"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}"),
]


def compiled(name: str, folder: Path, *flags: str) -> Path:
    """Compiles tests/native/``name``.cpp and returns the path of the program in ``folder``."""
    source, built = ROOT / "tests" / "native" / f"{name}.cpp", folder / name
    command = [COMPILER, "-std=c++17", "-O2", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}", *flags, source, "-o", built]
    subprocess.run(command, check=True)
    return built
