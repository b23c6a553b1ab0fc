"""Tests of what is shipped: one version, equal minimum versions, a complete source distribution, a wheel with only the
package's files, hardened libraries, licences.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from fnmatch import fnmatch
from pathlib import Path

import pytest

import peft_ext
from peft_ext import _native

ROOT = Path(__file__).resolve().parents[2]

sys.path.insert(0, str(ROOT / "tools"))
stable_abi = pytest.importorskip("stable_abi", reason="tools/ is not here: not a checkout")
import licenses  # noqa: E402
import old_runtime  # noqa: E402
import release_check  # noqa: E402
import wheel_trial  # noqa: E402
import wheels  # noqa: E402

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.cpu_only("packaging is the same for every device")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Names in a checkout that no source distribution holds: build outputs, benchmarks/results, .ci, .github and .gitignore.
NOT_SHIPPED = (".git", ".ci", ".github", ".gitignore", ".venv*", "build", "dist", "outputs", "data", "*.egg-info",
               "__pycache__", "*.pyc", "*.so", "*.o", ".*_cache", "_build", "results")  # fmt: skip


# --- version ----------------------------------------------------------------------------------------------------------


def test_the_version_stands_in_one_place():
    version = re.compile(rf"(?<![\w.]){re.escape(peft_ext.__version__)}(?![\w.])")
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "CITATION.cff", ROOT / "Makefile"]
    for folder in ("peft_ext", "csrc", "tools", "docs"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]
    holding = [str(path.relative_to(ROOT)) for path in files if version.search(path.read_text())]
    assert holding == ["peft_ext/_version.py"]


def test_everything_that_states_the_version_states_the_same():
    assert importlib.metadata.version("peft_ext") == peft_ext.__version__
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] in (peft_ext.__version__, "Unreleased")
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "peft_ext._version.__version__"}


def test_the_floor_of_torch_is_the_target_of_the_build():
    floor = ".".join(map(str, stable_abi.TARGET))
    assert f"torch>={floor}" in PROJECT["project"]["dependencies"]
    setup = (ROOT / "setup.py").read_text()
    assert f"TORCH_TARGET = ({floor.replace('.', ', ')})\n" in setup and f'"torch>={floor}"' in setup
    assert stable_abi.TARGET == _native.OLDEST_TORCH
    makefile = (ROOT / "Makefile").read_text()
    assert f"\nTORCH ?= torch>={floor}\n" in makefile and f"\nCUDA_TORCH ?= torch=={floor}.0\n" in makefile


def test_the_command_is_installed():
    (found,) = importlib.metadata.entry_points(group="console_scripts", name="peft-ext")
    assert callable(found.load())


# --- source distribution ----------------------------------------------------------------------------------------------


STRAYS = ("outputs/demo/model.safetensors", "build/temp/isa.o", "data/banking77/train.csv", ".venv/pyvenv.cfg",
          "dist/peft_ext.whl", "peft_ext/_C.cpython-311-x86_64-linux-gnu.so", "peft_ext/ops/__pycache__/nf4.pyc",
          "docs/_build/html/index.html", "csrc/nf4/nf4_cpu.o", ".pytest_cache/README.md")  # fmt: skip


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory):
    """Builds a source distribution of a used checkout. Returns the checkout's own files, the distribution's files, and
    its PKG-INFO.
    """
    checkout = tmp_path_factory.mktemp("checkout") / "peft_ext"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    files = {str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file()}
    for stray in STRAYS:
        (checkout / stray).parent.mkdir(parents=True, exist_ok=True)
        (checkout / stray).write_text("stray")
    output = tmp_path_factory.mktemp("sdist")
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(output)],
        cwd=checkout, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = output.iterdir()
    assert path.name == f"peft_ext-{peft_ext.__version__}.tar.gz"
    with tarfile.open(path) as archive:
        members = {member.name.partition("/")[2]: member for member in archive if member.isfile()}
        description = archive.extractfile(members["PKG-INFO"]).read().decode()
    return files, set(members), description


@pytest.mark.slow
def test_the_source_distribution_holds_the_checkout_and_nothing_that_lies_about(source_distribution):
    files, names, _ = source_distribution
    assert files - names == set(), "MANIFEST.in leaves them out"
    made = {"PKG-INFO", "setup.cfg"} | {name for name in names if name.startswith("peft_ext.egg-info/")}
    assert names - files == made


def test_the_metadata_is_whole(source_distribution):
    metadata = message_from_string(source_distribution[2])
    assert metadata["Name"] == "peft_ext" and metadata["Version"] == peft_ext.__version__
    assert metadata["Requires-Python"] == PROJECT["project"]["requires-python"]
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["project"]["optional-dependencies"])


# --- wheel ------------------------------------------------------------------------------------------------------------


def test_what_a_wheel_must_not_hold_is_found():
    good = ["peft_ext/__init__.py", "peft_ext/ops/nf4.py", "peft_ext/py.typed", "peft_ext-0.1.0.dist-info/RECORD",
            "peft_ext/_C.cpython-311-x86_64-linux-gnu.so", "peft_ext/_kernels.so",
            "peft_ext-0.1.0.dist-info/licenses/LICENSE", "peft_ext/ops/", "peft_ext/run/report/page.html"]  # fmt: skip
    bad = ["peft_ext.libs/libgomp-a34b3233.so.1.0.0", "peft_ext/libtorch_cpu.so", "tests/ops/test_ops.py",
           "csrc/nf4/nf4.h", "peft_ext/ops/__pycache__/nf4.cpython-311.pyc", "peft_ext/nf4.cpp",
           "setup.py"]  # fmt: skip
    assert wheels.misplaced(good + bad) == bad


def compiled(folder: Path, source: str, *flags: str) -> Path:
    """Compiles a C source to ``_C.so``, hardened unless the flags say otherwise."""
    (folder / "source.c").write_text(source)
    (folder / "exports.map").write_text("{ global: PyInit_*; local: *; };")
    library = folder / "_C.so"
    hardened = ["-shared", "-fPIC", "-Wl,-z,relro,-z,now,-z,noexecstack", "-nodefaultlibs"]
    subprocess.run(["gcc", "source.c", "-o", library, *hardened, *flags], check=True, cwd=folder)
    return library


NO_BINUTILS = pytest.mark.skipif(any(shutil.which(tool) is None for tool in ("gcc", "g++", "nm", "readelf")),
                                 reason="no compiler or binutils")  # fmt: skip
MODULE = "void *PyInit__C(void) { return 0; }\n"
SCRIPT = "-Wl,--version-script=exports.map"


@NO_BINUTILS
@pytest.mark.parametrize(
    ("source", "flags", "fault"),
    [
        (MODULE, [SCRIPT], None),
        (MODULE + "int helper(void) { return 1; }", [], "exports 1 symbols besides its own: helper"),
        (MODULE, [SCRIPT, "-Wl,-z,execstack"], "an executable stack"),
        (MODULE, [SCRIPT, "-Wl,-z,norelro"], "no RELRO"),
        (MODULE, [SCRIPT, "-Wl,-z,lazy"], "symbols are bound lazily"),
        (MODULE, [SCRIPT, "-Wl,-rpath,/opt/torch/lib"], "a search path: /opt/torch/lib"),
        (MODULE, [SCRIPT, "-Wl,--no-as-needed", "-lgomp"], "needs libgomp.so.1"),
        (MODULE + "void *newer(void); void *call(void) { return newer(); }", [SCRIPT], "needs newer of no library"),
        (MODULE + 'const char *file = "/build/place/csrc/nf4.cpp";', [SCRIPT, "-Wl,--no-gc-sections"],
         "holds the path /build/place/csrc/nf4.cpp"),
    ],
    ids=["good", "export", "stack", "relro", "lazy", "rpath", "openmp", "unresolved", "path"],
)  # fmt: skip
def test_faults_of_a_library_are_found(tmp_path, source, flags, fault):
    assert wheels.faults(compiled(tmp_path, source, *flags)) == ([] if fault is None else [fault])


@pytest.mark.slow
@NO_BINUTILS
def test_a_library_that_is_linked_to_the_stand_ins_runs_here_and_on_an_old_system(tmp_path):
    stand_ins = old_runtime.make(tmp_path / "stand-ins")
    # The source calls functions that have newer versions of their symbols in glibc 2.29, 2.32 and 2.34 and in
    # GLIBCXX_3.4.26 and later, and older versions too.
    (tmp_path / "source.cpp").write_text("""
        #include <cmath>
        #include <dlfcn.h>
        #include <memory>
        #include <pthread.h>
        #include <sstream>
        #include <stdexcept>
        extern "C" __attribute__((visibility("default"))) int peft_ext_new(double x, const char* name) {
          std::ostringstream text;
          text << std::shared_ptr<int>(new int[1], [](int* p) { delete[] p; }).use_count() << std::pow(x, 0.5);
          std::exception_ptr error;
          try { throw std::runtime_error(text.str()); } catch (...) { error = std::current_exception(); }
          pthread_t thread;
          pthread_create(&thread, nullptr, [](void*) -> void* { return nullptr; }, nullptr);
          pthread_join(thread, nullptr);
          try { std::rethrow_exception(error); }
          catch (const std::exception& caught) { return dlsym(RTLD_DEFAULT, name) && caught.what() == text.str(); }
        }
    """)
    library = tmp_path / "_kernels.so"
    script = tmp_path / "exports.map"
    script.write_text("{ global: peft_ext_*; local: *; };")
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", tmp_path / "source.cpp", "-o", library,
               *old_runtime.linker_flags(stand_ins), f"-Wl,--version-script={script}",
               "-Wl,-z,relro,-z,now,-z,noexecstack"]  # fmt: skip
    subprocess.run(command, check=True)
    for family, newest in wheels.newest_versions(library).items():
        assert tuple(map(int, newest.split("."))) <= old_runtime.NEWEST[family], (family, newest)
    assert wheels.faults(library) == []
    loaded = ctypes.CDLL(str(library)).peft_ext_new
    loaded.argtypes = [ctypes.c_double, ctypes.c_char_p]
    assert loaded(4.0, b"malloc") == 1


@NO_BINUTILS
def test_a_c_function_that_is_newer_than_the_stand_ins_is_an_error_of_the_linker(tmp_path):
    stand_ins = old_runtime.make(tmp_path / "stand-ins")
    (tmp_path / "source.c").write_text("void closefrom(int); void call(void) { closefrom(3); }")  # since glibc 2.34
    command = ["gcc", "-shared", "-fPIC", tmp_path / "source.c", "-o", tmp_path / "a.so", "-Wl,-z,defs"]
    assert subprocess.run(command).returncode == 0
    done = subprocess.run([*command, f"-L{stand_ins}"], capture_output=True, text=True)
    assert done.returncode != 0 and "closefrom" in done.stderr


def test_a_cross_build_is_told_compiler_machine_and_suffix():
    machine = platform.machine()
    other = "aarch64" if machine == "x86_64" else "x86_64"
    told = wheels.cross_environment(other, f".cpython-311-{machine}-linux-gnu.so")
    assert told["CXX"] == f"{other}-linux-gnu-g++" and told["_PYTHON_HOST_PLATFORM"] == f"linux-{other}"
    assert told["SETUPTOOLS_EXT_SUFFIX"] == f".cpython-311-{other}-linux-gnu.so"
    assert wheels.cross_environment(machine, ".so") == {}


@pytest.mark.slow
def test_a_wheel_without_the_native_library_is_built_and_says_so(tmp_path):
    shutil.copytree(ROOT, tmp_path / "peft_ext", ignore=shutil.ignore_patterns(*NOT_SHIPPED, "tests", "docs"))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-build-isolation", "--no-deps",
         "-w", tmp_path, tmp_path / "peft_ext"],
        env={**os.environ, "PEFT_EXT_PURE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wheel = tmp_path / f"peft_ext-{peft_ext.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert wheels.misplaced(archive.namelist()) == [] and not any(".so" in name for name in archive.namelist())
        archive.extractall(tmp_path / "site")
    environment = {name: value for name, value in os.environ.items() if name != "PEFT_EXT_REQUIRE"}
    (tmp_path / "program.py").write_text(wheel_trial.PROGRAM)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py", tmp_path / "site", "pure"],
        env={**environment, "PYTHONPATH": str(tmp_path / "site")}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "is not in the installed wheel" in done.stdout and "--no-binary peft_ext" in done.stdout


def test_the_report_keeps_the_rows_of_files_that_were_not_built(tmp_path):
    path = tmp_path / "sizes.tsv"
    wheels.write_report(path, {"wheel cp311 x86_64": (5, ""), "_kernels in cp311 x86_64": (3, "GLIBC 2.27")})
    wheels.write_report(path, {"wheel cp311 x86_64": (6, ""), "source distribution": (4, "")})
    assert path.read_text().splitlines() == [
        "file\tbytes\tneeds", "_kernels in cp311 x86_64\t3\tGLIBC 2.27", "source distribution\t4",
        "wheel cp311 x86_64\t6",
    ]  # fmt: skip
    assert wheels.wheel_kind("peft_ext-0.1.0-cp314-cp314-manylinux_2_28_aarch64.whl") == "cp314 aarch64"
    assert wheels.wheel_kind("peft_ext-0.1.0-py3-none-any.whl") == "py3 any"


@pytest.mark.parametrize(
    ("fused", "layers", "ok", "native", "says"),
    [
        (15, 15, True, True, ""),
        (14, 15, True, True, "14 of 15 layers run on kernels, wanted all"),
        (0, 15, True, False, ""),
        (1, 15, True, False, "wanted none"),
        (0, 0, True, True, "0 of 0 layers"),
        (15, 15, False, True, "the check is"),
    ],
)
def test_a_trial_s_run_must_finish_on_kernels(fused, layers, ok, native, says):
    report = {"fused": {"fused": fused, "layers": layers}, "finished": True, "check": {"ok": ok}}
    found = wheel_trial.run_faults(report, native)
    assert says in found and bool(found) == bool(says)


# --- release ----------------------------------------------------------------------------------------------------------

CHANGELOG = "# Changelog\n\n## [1.2.3] - 2026-05-01\n\n- x\n\n## [1.2.2] - 2026-04-01\n"


@pytest.mark.parametrize(
    ("tag", "release", "changelog", "problem"),
    [
        ("v1.2.3", "1.2.3", CHANGELOG, None),
        ("1.2.3", "1.2.3", CHANGELOG, "the tag is 1.2.3, wanted v1.2.3"),
        ("v1.2.2", "1.2.3", CHANGELOG, "the tag is v1.2.2, wanted v1.2.3"),
        ("v1.2.4", "1.2.4", CHANGELOG, "CHANGELOG.md begins with 1.2.3, wanted 1.2.4"),
        ("v1.2.3", "1.2.3", CHANGELOG.replace("2026-05-01", "unreleased"), "has unreleased as the date of 1.2.3"),
        ("v1.2.3", "1.2.3", CHANGELOG.replace(" - 2026-05-01", ""), "has nothing as the date of 1.2.3"),
        ("v1.2.3", "1.2.3", "# Changelog\n", "CHANGELOG.md begins with no entry, wanted 1.2.3"),
    ],
    ids=["good", "no v", "old tag", "old changelog", "unreleased", "no date", "no entry"],
)
def test_a_tag_that_is_not_the_release_is_found(tag, release, changelog, problem):
    found = release_check.problems(tag, release, changelog)
    assert found == [] if problem is None else len(found) == 1 and problem in found[0]


def test_a_release_of_other_files_is_found():
    wanted = release_check.wanted_files("1.2.3", ["3.10", "3.14"])
    assert wanted == {
        "peft_ext-1.2.3.tar.gz", "peft_ext-1.2.3-py3-none-any.whl",
        *(f"peft_ext-1.2.3-{tag}-{tag}-manylinux_2_28_{machine}.whl"
          for tag in ("cp310", "cp314") for machine in ("x86_64", "aarch64")),
    }  # fmt: skip
    assert release_check.file_problems(wanted, wanted) == []
    names = wanted - {"peft_ext-1.2.3-py3-none-any.whl"} | {"peft_ext-1.2.2.tar.gz"}
    found = ["missing: peft_ext-1.2.3-py3-none-any.whl", "not of this release: peft_ext-1.2.2.tar.gz"]
    assert release_check.file_problems(names, wanted) == found


def test_the_classifiers_name_the_pythons_from_the_oldest_on():
    versions = release_check.pythons((ROOT / "pyproject.toml").read_text())
    minors = [int(version.removeprefix("3.")) for version in versions]
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}"
    assert minors == list(range(minors[0], minors[-1] + 1)) and len(minors) >= 5


def test_the_release_workflow_builds_tries_and_publishes_all():
    path = ROOT / ".github/workflows/release.yml"
    if not path.exists():
        pytest.skip("not a checkout")
    workflow = pytest.importorskip("yaml").safe_load(path.read_text())
    jobs, versions = workflow["jobs"], release_check.pythons((ROOT / "pyproject.toml").read_text())
    # YAML 1.1 reads the key `on` as true.
    assert workflow[True]["push"]["tags"] == ["v*"]
    # Every step is an action of the forge, a package of the system, or a make target.
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for step in (step for job in jobs.values() for step in job["steps"] if "uses" not in step):
        command = step["run"].split()
        assert command[:2] == ["sudo", "apt-get"] or (command[0] == "make" and command[1] in targets), step
    (build,) = (step["run"] for step in jobs["build"]["steps"] if "make wheels" in step.get("run", ""))
    (setup,) = (step["with"] for step in jobs["build"]["steps"] if "setup-python" in step.get("uses", ""))
    assert sorted(setup["python-version"].split()) == sorted(versions)
    own = setup["python-version"].split()[-1]
    assert {f"python{version}" for version in versions if version != own} == set(re.findall(r"python3\.\d+", build))
    assert all(machine in build for machine in old_runtime.LOADERS)
    matrix = jobs["try"]["strategy"]["matrix"]
    floor = ".".join(map(str, stable_abi.TARGET))
    assert matrix["python"] == versions and matrix["torch"] == [f"torch=={floor}.*", "torch"]
    assert matrix["exclude"] == [{"python": "3.15", "torch": f"torch=={floor}.*"}]  # torch 2.11 ends at Python 3.14
    publish = jobs["publish"]
    assert publish["if"] == jobs["tag"]["if"] == "github.ref_type == 'tag'"
    assert set(publish["needs"]) == jobs.keys() - {"publish"}
    assert publish["permissions"]["id-token"] == "write" and workflow["permissions"] == {"contents": "read"}
    assert "release-check" in publish["steps"][-2]["run"] and "pypi-publish" in publish["steps"][-1]["uses"]


def test_make_wheels_installs_what_its_programs_import(tmp_path):
    """A fresh clone runs `make wheels` without `make setup`, so that .venv has no other packages."""
    command = ["make", "--no-print-directory", "-n", "wheels", f"VENV={tmp_path}/venv", "WHEEL_PYTHONS=python3.12"]
    recipe = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    installed = set(re.findall(r"[\w-]+", "\n".join(re.findall(r"venv/bin/pip install (.*)", recipe))))
    programs = [path for path in map(Path, re.findall(r"tools/\w+\.py", recipe)) if path.name != "system_needs.py"]
    assert {"limit.py", "wheels.py"} <= {path.name for path in programs}
    own = {path.stem for path in (ROOT / "tools").glob("*.py")}
    texts = [(ROOT / path).read_text() for path in programs]
    imported = {module for text in texts for module in re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)}
    assert imported - own - sys.stdlib_module_names <= installed


# --- licences and tools -----------------------------------------------------------------------------------------------


def test_every_direct_dependency_has_its_licence_listed():
    listed = licenses.listed(licenses.PAGE.read_text())
    assert licenses.direct().keys() <= listed.keys(), licenses.direct().keys() - listed.keys()
    assert {"torch", "pybind11", "peft", "ruff"} <= licenses.direct().keys()
    assert [name for name, licence in listed.items() if licence in ("", "not stated", "UNKNOWN")] == []


def test_the_tools_of_ci_are_pinned_once():
    lines = (ROOT / "tools/constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    built_with = {name for name, sources in licenses.direct().items() if "build" in sources}
    assert pinned.keys() >= {*licenses.TOOLS, *built_with, "pytest"}
    assert all(re.fullmatch(r"\d+(\.\d+)*", version) for version in pinned.values()), pinned
    for place in ("Makefile", ".ci/run"):
        if (ROOT / place).exists():  # a source distribution has no .ci
            for name, version in re.findall(r"([\w-]+)==([\d.]+\*?)", (ROOT / place).read_text()):
                assert name == "torch" or fnmatch(pinned.get(name, ""), version), f"{place} pins {name}=={version}"


def test_an_extra_is_what_its_names_ask_for():
    import extra

    found = list(extra.requirements("examples"))
    assert any(text.startswith("trl>=") for text in found) and any(text.startswith("transformers>=") for text in found)
    assert not any("peft_ext" in text for text in found)


def test_the_requirements_are_read_where_peft_ext_is_not_installed(tmp_path, monkeypatch):
    """`make wheels` tries a wheel for 64-bit Arm from an environment without peft_ext."""
    import extra

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extra, "requires", not_installed)
    monkeypatch.setattr(extra, "ROOT", tmp_path)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        extra.declared()
    of_sdist = tmp_path / "peft_ext.egg-info"
    of_sdist.mkdir()
    (of_sdist / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: peft_ext\nVersion: 1.0\n")
    (of_sdist / "requires.txt").write_text("torch>=2.11\n\n[hf]\npeft>=0.21\n\n[demo]\npeft_ext[hf]\n")
    assert extra.declared()[0] == "torch>=2.11"
    assert list(extra.requirements("demo")) == ["peft>=0.21"]
