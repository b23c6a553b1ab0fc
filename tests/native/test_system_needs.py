"""Tests that a system that can't build the native library is told what to install, before anything is compiled."""

from __future__ import annotations

import ctypes
import importlib
import os
import shlex
import shutil
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
import native_build  # noqa: E402

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


@pytest.mark.parametrize(
    ("cxx", "said"), [("g++ '", "which is no command: No closing quotation"), ("", None), (" ", None)]
)
def test_a_compiler_that_is_no_command_is_named(cxx, said, monkeypatch) -> None:
    """Without words, CXX is the default."""
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setattr(system_needs, "compiler_version", lambda command: ("GCC", (12, 2)))
    monkeypatch.setattr(system_needs.shutil, "which", lambda name: name)
    fault = system_needs.compiler_fault()
    assert fault is None if said is None else said in fault


def test_missing_headers_and_a_missing_venv_are_named(monkeypatch, tmp_path) -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert f"sudo apt install python{version}-dev" in system_needs.headers_fault()
    (tmp_path / "Python.h").touch()
    assert system_needs.headers_fault() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else name)
    assert f"sudo apt install python{version}-venv" in system_needs.venv_fault()


@pytest.mark.slow
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


# --- setup.py ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch, tmp_path) -> types.ModuleType:
    """Returns setup.py as a module, which writes its files into a folder with a space and a comma in its name."""
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "setup", raising=False)
    module = importlib.import_module("setup")
    (tmp_path / "a, b").mkdir()
    monkeypatch.setattr(module, "GENERATED", tmp_path / "a, b/build")
    return module


def test_the_compiler_that_is_checked_also_compiles_and_links(script, monkeypatch, tmp_path) -> None:
    """Python's own build names other compilers."""
    used: list[list[str]] = []

    class Base:
        compiler = types.SimpleNamespace(
            compiler_so=["/env/clang", "-pthread", "-O3"], compiler_so_cxx=["clang++", "-O3"],
            compiler_cxx=["ccache", "clang++", "-pthread"], linker_so=["cc", "-shared", "-Wl,-rpath,/lib"],
        )  # fmt: skip

        def build_extensions(self) -> None:
            told = self.compiler
            used.extend([[os.environ["CXX"]], told.compiler_so, told.compiler_so_cxx, told.compiler_cxx])

    monkeypatch.setattr(script, "KERNELS", None)
    monkeypatch.setattr(script, "check_system", lambda: None)
    monkeypatch.setenv("CXX", "g++-12")
    script.build_command(Base)().build_extensions()
    assert used == [["g++-12"], ["g++-12", "-pthread", "-O3"], ["g++-12", "-O3"], ["g++-12", "-pthread"]]
    assert Base.compiler.linker_so == ["cc", "-shared"]


def test_setup_names_the_compiler_where_the_variable_is_not_set(script, monkeypatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PEFT_EXT_PURE", "0")
    monkeypatch.setattr(script, "KERNELS", "/no/such/file")
    with pytest.raises(SystemExit, match="PEFT_EXT_KERNELS is /no/such/file"):
        script.main()
    assert os.environ["CXX"] == "c++"


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_a_compiler_of_several_words_is_called_as_one(script, monkeypatch, tmp_path) -> None:
    own = compiler(tmp_path / "a, b", ["called"], "c++ of the test")
    Path(own).write_text(f'{Path(own).read_text()}echo "$@"\n')
    monkeypatch.delenv("TORCH_NO_COMPILER_WRAPPER", raising=False)
    monkeypatch.setenv("CXX", "g++")
    assert script.compiler() == "g++" and "TORCH_NO_COMPILER_WRAPPER" not in os.environ
    monkeypatch.setenv("CXX", f"env '{own}' -pipe")
    found = script.compiler()
    done = subprocess.run([found, "-c", "x y.cpp"], capture_output=True, text=True, check=True)
    assert done.stdout == "called\n-pipe -c x y.cpp\n"
    monkeypatch.setenv("CXX", f"env '{own}'")
    assert script.compiler() != found, "ninja would keep the objects of the other command"


@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="no g++")
def test_a_library_is_linked_in_a_folder_with_a_comma(script, tmp_path) -> None:
    source = tmp_path / "source.cpp"
    source.write_text('extern "C" int peft_ext_own() { return 1; }\nint other() { return 2; }\n')
    library = tmp_path / "a, b/own.so"
    command = ["g++", "-shared", "-fPIC", str(source), "-o", str(library), *script.linker_flags("peft_ext_*")]
    subprocess.run(command, check=True)
    assert ctypes.CDLL(str(library)).peft_ext_own() == 1
    assert not hasattr(ctypes.CDLL(str(library)), "_Z5otherv")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ("include-system-site-packages = false", ["own"]),
        ("home = /usr\ninclude-system-site-packages = true\n", ["own", "user", "system"]),
        (None, ["own", "user", "system"]),
    ],
    ids=["venv", "venv with the system's packages", "no venv"],
)
def test_torch_is_looked_for_where_the_environment_has_packages(
    settings, wanted, script, monkeypatch, tmp_path
) -> None:
    if settings is not None:
        (tmp_path / "pyvenv.cfg").write_text(settings)
    monkeypatch.setattr(script.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: "own")
    monkeypatch.setattr(script.site, "getusersitepackages", lambda: "user")
    monkeypatch.setattr(script.site, "getsitepackages", lambda prefixes: ["own", "system"])
    assert script.folders_of_packages() == wanted


def test_a_wheel_holds_no_module_that_is_gone(script, monkeypatch, tmp_path) -> None:
    from setuptools import Distribution

    monkeypatch.chdir(tmp_path)
    (tmp_path / "peft_ext").mkdir()
    (tmp_path / "peft_ext/__init__.py").touch()
    (tmp_path / "build/lib/peft_ext/gone").mkdir(parents=True)
    (tmp_path / "build/lib/peft_ext/gone/module.py").touch()
    command = script.COMMANDS["build_py"](Distribution({"packages": ["peft_ext"], "script_name": "setup.py"}))
    command.build_lib = "build/lib"
    command.ensure_finalized()
    command.run()
    assert [path.name for path in (tmp_path / "build/lib/peft_ext").rglob("*")] == ["__init__.py"]


@pytest.mark.parametrize(("command", "kept"), [("editable_wheel", []), ("bdist_wheel", ["_C.cp.so", "_kernels.so"])])
def test_an_editable_install_without_the_library_removes_a_built_one(
    command, kept, script, monkeypatch, tmp_path
) -> None:
    (tmp_path / "peft_ext").mkdir()
    for name in ("_C.cp.so", "_kernels.so", "_native.py"):
        (tmp_path / "peft_ext" / name).touch()
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "setup", lambda **given: None)
    monkeypatch.setattr(script.sys, "argv", ["setup.py", command])
    monkeypatch.setenv("PEFT_EXT_PURE", "1")
    script.main()
    assert sorted(path.name for path in (tmp_path / "peft_ext").iterdir()) == [*kept, "_native.py"]


def test_windows_gets_the_python_part(script, monkeypatch, capsys) -> None:
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


# --- tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    sys.platform != "linux" or native_build.missing_tools() is not None, reason="no Linux, g++ or ninja"
)
def test_the_tools_build_in_a_folder_with_a_space_a_comma_and_a_dollar(monkeypatch, tmp_path) -> None:
    root = tmp_path / "a, b$c"
    for folder in ("torch/include", "torch/lib", "csrc"):
        (root / folder).mkdir(parents=True)
    (root / "csrc/own.h").write_text("#define OWN 7\n")
    (root / "csrc/own.cpp").write_text('#include "own.h"\nextern "C" int own() { return OWN; }\n')
    (root / "torch.cpp").write_text('extern "C" int of_torch() { return 1; }\n')
    monkeypatch.setattr(native_build, "ROOT", root)
    monkeypatch.setattr(native_build.stable_abi, "torch_include", lambda: root / "torch/include")
    torch_library = [native_build.Group("-fPIC", [root / "torch.cpp"])]
    native_build.build(root / "torch/lib/libtorch_cpu.so", torch_library, "-Wl,-soname,libtorch_cpu.so")
    flags, libraries = native_build.torch_flags()
    groups = [native_build.Group(f"-fPIC {native_build.module_flags()} {flags}", [root / "csrc/own.cpp"])]
    library = native_build.build(root / "build/own.so", groups, f"-Wl,--no-as-needed {libraries}")
    assert ctypes.CDLL(str(library)).own() == 7
    assert "-ffile-prefix-map=" + str(root) + "/=" in shlex.split(flags)


@pytest.mark.skipif(shutil.which("make") is None, reason="make not found")
def test_the_battery_on_every_path_fails_where_the_library_does_not_load(tmp_path) -> None:
    (tmp_path / "bin").mkdir()
    compiler(tmp_path / "bin", [], "python")
    with (tmp_path / "bin/python").open("a") as file:
        file.write("exit 1\n")
    for name in (".installed", ".built"):
        (tmp_path / name).touch()
    done = subprocess.run(
        ["make", "-s", "battery-paths", f"VENV={tmp_path}", "LIMIT=false"], cwd=ROOT, capture_output=True
    )
    assert done.returncode != 0


def test_a_table_of_kills_without_kills_fails() -> None:
    kill_table = pytest.importorskip("kill_table", reason="needs transformers and psutil")
    row = ["1", "2", "ddp", "3", "0.2", "SIGKILL", "rank 0", "step 1", "1", "torchrun", "0", "0", "equal"]
    none = [*row[:6], "none", *row[7:]]
    assert kill_table.faults([row, row, none]) == [] and kill_table.faults([]) == ["no run"]
    assert kill_table.faults([row, none]) == ["1 agents, ddp: 1 of 2 runs got their signal"]
    of_two = ["2", *none[1:]]
    assert kill_table.faults([row, row, of_two]) == ["2 agents, ddp: 0 of 1 runs got their signal"]
    differs = [*row[:-1], "differs"]
    assert kill_table.faults([row, differs]) == ["\t".join(differs)]
