"""Tests that an operator's call runs on one CPU path, whatever another thread chooses meanwhile."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peft_ext import _native

SCRIPT = Path(__file__).with_name("set_isa.py")
CSRC = SCRIPT.parents[2] / "csrc"

pytestmark = pytest.mark.cpu_only("it is about CPU paths")


@pytest.mark.slow
def test_no_result_mixes_two_paths() -> None:
    """A process of its own runs the calls, because a call that mixes paths may read a null table of kernels."""
    module = _native.STATE.module
    if module is None or len(module.isas()) < 2:
        pytest.skip("this machine has one CPU path")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), *sys.path])}
    done = subprocess.run([sys.executable, str(SCRIPT), "4"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
    said = json.loads(done.stdout)
    assert said["wrong"] == [] and said["calls"] > 100
    assert any(len(paths) > 1 for paths in said["seen"].values()), f"one path ran alone: {said['seen']}"


@pytest.mark.skipif(not CSRC.exists(), reason="csrc/ is not here: not a checkout")
def test_every_cpu_function_is_registered_as_one_call() -> None:
    registered = {path: re.findall(r'm\.impl\("\w+",\s*(\w+)\(', path.read_text()) for path in CSRC.rglob("*_cpu.cpp")}
    assert sum(map(len, registered.values())) >= 30
    wrong = [path.name for path, macros in registered.items() if set(macros) - {"PEFT_EXT_CPU_BOX"}]
    assert wrong == [], "registered without PEFT_EXT_CPU_BOX"
