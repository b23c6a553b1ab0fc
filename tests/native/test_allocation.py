"""Tests that only a lack of memory raises an error about memory: see tests/native/allocation.cpp."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMPILER = (sysconfig.get_config_var("CXX") or "c++").split()[0]

pytestmark = [
    pytest.mark.cpu_only("a failed allocation of the CPU's"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}"),
]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    sys.path.insert(0, str(ROOT / "tools"))
    import native_build

    built = tmp_path_factory.mktemp("allocation") / "allocation"
    flags, libraries = native_build.torch_flags()
    sources = [str(ROOT / "tests/native/allocation.cpp")]
    # The command names libc10, which libtorch_cpu needs, because not every linker finds libc10 by itself.
    command = [COMPILER, "-std=c++17", "-O0", f"-I{ROOT / 'csrc'}", *shlex.split(flags), *sources, "-o", str(built),
               *shlex.split(libraries), "-lc10", "-ldl"]  # fmt: skip
    subprocess.run(command, check=True)
    done = subprocess.run([built], capture_output=True, text=True, check=True)
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if re.match(r"[a-z ,]+: ", line))


def test_only_a_lack_of_memory_is_called_so(errors: dict[str, str]) -> None:
    assert errors["none"] == "no error"
    assert f"can't allocate memory: peft_ext wanted {2**57} bytes" in errors["memory"]
    assert "a size of a new tensor is -3, wanted 0 or more" in errors["negative"]
    assert f"a size of {4 * 2**40} times {2**40}, wanted one that 63 bits hold" in errors["overflow"]
    assert not any("memory" in errors[name] for name in ("negative", "overflow"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device that torch does not have is wanted")
@pytest.mark.skipif(not torch.__version__.startswith("2.") or int(torch.__version__.split(".")[1]) < 13,
                    reason="torch before 2.13 loses the message")  # fmt: skip
def test_another_failure_has_the_message_of_pytorch(errors: dict[str, str]) -> None:
    assert "peft_ext: no tensor of 40 bytes: " in errors["no such device"]
    assert "'CUDA' backend" in errors["no such device"]
    assert not any(words in errors["no such device"] for words in ("out of memory", "can't allocate"))
