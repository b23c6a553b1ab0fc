"""Tests of what is shipped: one version, equal minimum versions, a complete source distribution, a wheel with only the
package's files, hardened libraries, licences.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
from email import message_from_string
from pathlib import Path

import pytest

import peft_ext

ROOT = Path(__file__).resolve().parents[2]

sys.path.insert(0, str(ROOT / "tools"))
stable_abi = pytest.importorskip("stable_abi", reason="tools/ is not here: not a checkout")
import licenses  # noqa: E402
import wheels  # noqa: E402

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.cpu_only("packaging is the same for every device")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Names in a checkout that no source distribution holds: build outputs, benchmarks/results, .ci and .gitignore.
NOT_SHIPPED = (".git", ".ci", ".gitignore", ".venv*", "build", "dist", "outputs", "data", "*.egg-info", "__pycache__",
               "*.pyc", "*.so", "*.o", ".*_cache", "_build", "results")  # fmt: skip


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


MODULE = "void *PyInit__C(void) { return 0; }\n"
SCRIPT = "-Wl,--version-script=exports.map"


@pytest.mark.skipif(any(shutil.which(tool) is None for tool in ("gcc", "nm", "readelf")), reason="no binutils")
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
        (MODULE + 'const char *file = "/build/place/csrc/nf4.cpp";', [SCRIPT, "-Wl,--no-gc-sections"],
         "holds the path /build/place/csrc/nf4.cpp"),
    ],
    ids=["good", "export", "stack", "relro", "lazy", "rpath", "openmp", "path"],
)  # fmt: skip
def test_faults_of_a_library_are_found(tmp_path, source, flags, fault):
    assert wheels.faults(compiled(tmp_path, source, *flags)) == ([] if fault is None else [fault])


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
            for name, version in re.findall(r"([\w-]+)==([\d.]+)", (ROOT / place).read_text()):
                assert name == "torch" or pinned.get(name) == version, f"{place} pins {name}=={version}"


def test_an_extra_is_what_its_names_ask_for():
    import extra

    found = list(extra.requirements("examples"))
    assert any(text.startswith("trl>=") for text in found) and any(text.startswith("transformers>=") for text in found)
    assert not any("peft_ext" in text for text in found)
