"""Tests that a system that can't build the native library is told what to install, before anything is compiled."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest

from peft_ext import _native

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
system_needs = pytest.importorskip("system_needs", reason="tools/ is not here: not a checkout")

pytestmark = pytest.mark.cpu_only("a build is the same for every device")

GCC_10 = ["#define __GNUC__ 10", "#define __GNUC_MINOR__ 2"]
CLANG_13 = ["#define __GNUC__ 4", "#define __clang_major__ 13", "#define __clang_minor__ 0"]


def compiler(folder: Path, macros: list[str], name: str = "cc-of-the-test") -> str:
    """Makes a compiler that defines the macros and compiles nothing."""
    path = folder / name
    path.write_text("#!/bin/sh\n" + "".join(f"echo '{macro}'\n" for macro in macros))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("macros", "said"),
    [
        (GCC_10, "is GCC 10.2; wanted GCC 11 or clang 14 or newer"),
        (CLANG_13, "is clang 13.0; wanted GCC 11 or clang 14 or newer"),
        (["#define _MSC_VER 1940"], "is neither GCC nor clang, or does not run"),
    ],
    ids=["GCC 10", "clang 13", "another"],
)
def test_a_compiler_that_is_too_old_is_named(macros, said, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", f"{compiler(tmp_path, macros)} -pipe")
    fault = system_needs.compiler_fault()
    assert said in fault
    assert "sudo apt install g++" in fault and "sudo dnf install gcc-c++" in fault and "gcc-toolset-13" in fault


@pytest.mark.parametrize("macros", [["#define __GNUC__ 11", "#define __GNUC_MINOR__ 1"],
                                    ["#define __clang_major__ 14", "#define __clang_minor__ 0"]])  # fmt: skip
def test_the_oldest_compilers_are_accepted(macros, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, macros))
    assert system_needs.compiler_fault() is None


def test_no_compiler_is_named(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler was found (no-such-compiler)" in system_needs.compiler_fault()


def test_missing_headers_and_a_missing_venv_are_named(monkeypatch, tmp_path) -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert f"sudo apt install python{version}-dev" in system_needs.headers_fault()
    (tmp_path / "Python.h").touch()
    assert system_needs.headers_fault() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else name)
    assert f"sudo apt install python{version}-venv" in system_needs.venv_fault()


def test_a_build_ends_before_anything_is_compiled(tmp_path) -> None:
    log = tmp_path / "called"
    old = compiler(tmp_path, GCC_10)
    Path(old).write_text(f'{Path(old).read_text()}echo "$@" >> {log}\n')
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(tmp_path / "objects"),
               "--build-lib", str(tmp_path / "library")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "CXX": old}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "is GCC 10.2; wanted GCC 11" in done.stderr
    assert not any(" -c " in call for call in log.read_text().splitlines()), log.read_text()


def test_windows_gets_the_python_part(monkeypatch, capsys) -> None:
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "setup", raising=False)
    script = importlib.import_module("setup")
    asked: dict[str, object] = {}
    monkeypatch.setattr(script, "setup", lambda **given: asked.update(given))
    monkeypatch.setattr(script.sys, "platform", "win32")
    script.main()
    assert "ext_modules" not in asked and asked["license"] == "Apache-2.0"
    assert "not built on Windows. Operators run the slow reference." in capsys.readouterr().out


def test_the_import_on_windows_asks_for_no_other_build(monkeypatch, tmp_path) -> None:
    state = _native.NativeState()
    monkeypatch.setattr(_native, "STATE", state)
    monkeypatch.setattr(_native, "sys", types.SimpleNamespace(platform="win32"))
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    monkeypatch.delenv("PEFT_EXT_REQUIRE", raising=False)
    with pytest.warns(RuntimeWarning, match="the native library is not built on Windows") as caught:
        _native._load_cpu()
    assert len(caught) == 1 and "To mend" not in str(caught[0].message)
    assert state.module is None and state.cpu_error == "the native library is not built on Windows"
