"""Tests of the build and the loading: stable ABI, layout of the sources, imports, messages."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
import warnings
from pathlib import Path

import pytest

import peft_ext
from peft_ext import _native
from peft_ext._source_digest import has_changed, source_digest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(peft_ext.__file__).parent

sys.path.insert(0, str(ROOT / "tools"))
stable_abi = pytest.importorskip("stable_abi", reason="tools/ is not here: not a checkout")
import arm_loop  # noqa: E402
import include_check  # noqa: E402
import wheels  # noqa: E402


@pytest.fixture(scope="module")
def native():
    try:
        return importlib.import_module("peft_ext._C")
    except ImportError as error:
        pytest.skip(f"the native library is not built: {error}")


# An editable install of peft_ext would find the checkout's native library for every package called peft_ext.
WITHOUT_EDITABLE_INSTALLS = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")]
"""


def python(code: str, path: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter, with the package in ``path``, without PEFT_EXT_ settings and without a GPU."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PEFT_EXT_")}
    place = str(path or PACKAGE.parent)  # also the working directory, which Python searches before PYTHONPATH
    clean |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": place} | env
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_EDITABLE_INSTALLS + code], env=clean, cwd=place, capture_output=True, text=True
    )


@pytest.fixture
def bare_package(tmp_path):
    """Makes a copy of the package without native libraries."""
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "peft_ext", ignore=ignore)
    return tmp_path


IMPORT_AND_PRINT_WARNINGS = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft_ext
for warning in caught:
    if "peft_ext" in str(warning.message):
        print(warning.category.__name__, str(warning.message).replace(chr(10), " "))
"""


# --- stable ABI -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm not found")
def test_the_library_needs_only_the_stable_abi_of_the_target():
    library = PACKAGE / "_kernels.so"
    if not library.exists():
        pytest.skip("the native library is not built")
    symbols = stable_abi.undefined_symbols(library)
    assert any(symbol.startswith("torch_library_impl") for symbol in symbols), "registers no kernel"
    assert stable_abi.violations(symbols, stable_abi.torch_include()) == []


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm not found")
def test_the_library_needs_nothing_of_python_nor_of_cuda():
    """One file serves every Python, and builds of torch with and without CUDA."""
    library = PACKAGE / "_kernels.so"
    if not library.exists():
        pytest.skip("the native library is not built")
    symbols = stable_abi.undefined_symbols(library)
    assert [symbol for symbol in symbols if symbol.startswith(("Py", "_Py", "cu", "aoti_torch_cuda"))] == []


@pytest.mark.skipif(any(shutil.which(tool) is None for tool in ("nm", "readelf")), reason="binutils not found")
@pytest.mark.skipif(sys.platform != "linux", reason="of ELF libraries")
def test_libraries_export_their_functions_alone_and_are_hardened():
    """The built libraries have none of the ``wheels.faults``; tests/native/test_packaging.py has libraries with each
    fault.
    """
    found = sorted(PACKAGE.glob("_*.so"))
    if not found:
        pytest.skip("no native library is built")
    assert {library.name: wheels.faults(library) for library in found} == {library.name: [] for library in found}


def test_symbols_outside_the_stable_abi_are_found():
    include = stable_abi.torch_include()
    bad = ["at::_ops::add::call(at::Tensor const&)", "c10::Error::what() const", "aoti_torch_no_such_function"]
    assert len(stable_abi.violations(bad, include)) == 3
    assert stable_abi.violations(["torch_library_impl", "memcpy@GLIBC_2.14"], include) == []


def test_version_guards_of_shim_headers_are_read():
    header = """
    #ifdef __cplusplus
    AOTITorchError torch_old(int x);
    #if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_12_0
    AOTITorchError torch_new(int x);
    #ifdef USE_CUDA
    AOTITorchError torch_new_cuda(int x);
    #endif
    #else
    AOTITorchError torch_until(int x);
    #endif
    #endif
    """
    assert stable_abi.declared_since(header) == {
        "torch_old": (0, 0),
        "torch_new": (2, 12),
        "torch_new_cuda": (2, 12),
        "torch_until": (0, 0),
    }


LISTING = """
   0:\tcmp\tx1, x4
   4:\tb.eq\t20 <multiply_pairs+0x20>  // b.none
   8:\tldp\tq27, q28, [x0]
   c:\tbfmmla\tv0.4s, v27.8h, v28.8h
  10:\tcmp\tx6, x0
  14:\tb.ne\t8 <multiply_pairs+0x8>  // b.any
  18:\tadd\tx8, x8, #0x8
  1c:\tb.ne\t0 <multiply_pairs>  // b.any
"""


def test_the_inner_loop_is_the_shortest_around_a_product():
    assert arm_loop.inner_loop(LISTING) == ["ldp\tq27, q28, [x0]", "bfmmla\tv0.4s, v27.8h, v28.8h", "cmp\tx6, x0"]


def test_build_info(native):
    info = native.build_info()
    assert set(info) == {"version", "torch", "torch_target", "compiler", "sources", "isas"}
    assert info["sources"] == native._sources != ""
    assert info["version"] == peft_ext.__version__
    assert info["torch_target"] == ".".join(map(str, stable_abi.TARGET))
    assert "scalar" in native.isas() and set(native.isas()) <= set(info["isas"])
    assert native.isa() in native.isas()


# --- sources ----------------------------------------------------------------------------------------------------------


def test_includes_run_one_way():
    assert include_check.faults(include_check.includes(ROOT / "csrc")) == []


@pytest.mark.parametrize(
    "graph, said",
    [
        ({"common/a.h": ["lora/b.h"], "lora/b.h": []}, "common/a.h includes lora/b.h, which is not below it"),
        ({"lora/a.cpp": ["dora/b.h"], "dora/b.h": []}, "lora/a.cpp includes dora/b.h, which is not below it"),
        ({"linear/cuda/a.cuh": ["cpu/b.h"], "cpu/b.h": []},
         "linear/cuda/a.cuh includes cpu/b.h, which is for the other device"),
        ({"cpu/a.h": ["cpu/b.h"]}, "cpu/a.h includes cpu/b.h, which is not in csrc/"),
        ({"cpu/a.h": ["cpu/b.h"], "cpu/b.h": ["cpu/a.h"]}, "a circle: cpu/a.h -> cpu/b.h -> cpu/a.h"),
    ],
)  # fmt: skip
def test_an_include_that_runs_the_wrong_way_is_found(graph, said):
    assert include_check.faults(graph) == [said]


def test_every_op_has_its_file_in_every_tree():
    ops = {path.stem for path in (ROOT / "peft_ext/ops").glob("[!_]*.py")}
    ops -= {"cards", "checks", "format_proofs", "layer_lists", "library", "proof_inputs", "prove"}
    # Several files of operators share the folders in FLOORS; only nf4 is also the name of a file of operators.
    shared = {folder for floor in include_check.FLOORS for folder in floor} - {"nf4"}
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    assert folders - shared == ops
    # The reference of decoder_layer calls other operators, and benchmarks/llama_speed.py measures decoder_layer in a
    # whole model.
    ops.remove("decoder_layer")
    # philox is the random generator that operators share. float8 is the reference of a layer without its own operator.
    references = {path.stem for path in (ROOT / "peft_ext/reference").glob("[!_]*.py")}
    assert references - {"philox", "common", "float8"} == ops
    benchmarks = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert ops <= benchmarks, f"no benchmarks/bench_<op>.py for {sorted(ops - benchmarks)}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump not found")
def test_wide_registers_stay_in_their_translation_units():
    objects = [path for path in ROOT.glob("build/temp*/**/*.o") if "csrc" in path.parts]
    if not objects:
        pytest.skip("no objects under build/temp*: they are there after python setup.py build_ext --inplace")
    if not any(path.stem.endswith("_avx512") for path in objects):
        pytest.skip("no AVX-512 objects: not an x86-64 build")
    using = {}
    for path in objects:
        code = subprocess.run(["objdump", "-d", str(path)], check=True, capture_output=True, text=True).stdout
        using[path.stem] = {register for register in ("zmm", "ymm") if f"%{register}" in code}
    wide = {stem for stem, registers in using.items() if "zmm" in registers}
    assert wide and all(stem.endswith(("_avx512", "_amx")) for stem in wide), wide
    assert all(stem.endswith(("_avx512", "_amx", "_avx2")) for stem, registers in using.items() if registers), using


# --- import -----------------------------------------------------------------------------------------------------------


def test_import_needs_torch_alone():
    blocked = ["transformers", "peft", "bitsandbytes", "accelerate", "datasets", "rich", "typer"]
    code = f"sys.modules.update(dict.fromkeys({blocked})); import peft_ext, peft_ext.ops, peft_ext.nn"
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_missing_library_warns_once_and_names_the_mend(bare_package):
    done = python(IMPORT_AND_PRINT_WARNINGS + "print(peft_ext.__file__)", bare_package)
    *warned, file = done.stdout.splitlines()
    assert file.startswith(str(bare_package)), done.stderr
    assert len(warned) == 1 and warned[0].startswith("RuntimeWarning "), warned
    assert "was not built" in warned[0] and "To mend: pip install " in warned[0]


def test_missing_library_is_an_error_where_required(bare_package):
    done = python("import peft_ext", bare_package, PEFT_EXT_REQUIRE="1")
    assert done.returncode != 0
    assert "ImportError: peft_ext: the native library was not built" in done.stderr
    assert "To mend: pip install " in done.stderr


STUB = """
build_info = lambda: {"version": "0.0.0", "torch": "2.11.0", "torch_target": "2.11"}
isa = lambda: "scalar"
isas = lambda: ["scalar"]
def set_isa(name): ...
def register_operators(key, namespace): ...
"""


@pytest.mark.slow
def test_library_of_another_version_warns_once(bare_package, native):
    shutil.copy(PACKAGE / "_kernels.so", bare_package / "peft_ext")
    (bare_package / "peft_ext/_C.py").write_text(STUB)
    warned = python(IMPORT_AND_PRINT_WARNINGS, bare_package).stdout.splitlines()
    assert len(warned) == 1 and warned[0].startswith("RuntimeWarning "), warned
    assert "does not match" in warned[0] and "peft_ext 0.0.0" in warned[0] and peft_ext.__version__ in warned[0]
    assert python("import peft_ext", bare_package, PEFT_EXT_REQUIRE="1").returncode != 0


# --- sources of the library -------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path) -> Path:
    """Returns a folder with sources that are a day old."""
    folder = tmp_path / "csrc"
    (folder / "cpu").mkdir(parents=True)
    for name, text in {"api.cpp": "one", "cpu/isa.h": "two", "cpu/.isa.h.swp": "3"}.items():
        (folder / name).write_text(text)
        os.utime(folder / name, (1e9, 1e9))
    return folder


CHANGES = {
    "nothing": lambda folder: None,
    "a time": lambda folder: (folder / "api.cpp").touch(),
    "an editor's file": lambda folder: (folder / "cpu/.isa.h.swp").write_text("4444"),
    "a size": lambda folder: ((folder / "api.cpp").write_text("one1"), os.utime(folder / "api.cpp", (1e9, 1e9))),
    "a letter": lambda folder: (folder / "cpu/isa.h").write_text("twO"),
    "a name": lambda folder: (folder / "cpu/isa.h").rename(folder / "cpu/isb.h"),
    "a new file": lambda folder: (folder / "new.cuh").write_text(""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_source_is_noticed(change, sources):
    digest, changed = source_digest(sources), change not in ("nothing", "a time", "an editor's file")
    CHANGES[change](sources)
    assert has_changed(sources, digest, built=1e9 + 10) is changed
    assert (source_digest(sources) == digest) is not changed
    assert has_changed(sources, "", built=1e9 + 10)  # a library without a digest is older than the digests


@pytest.fixture
def checkout(sources, monkeypatch):
    """Returns a function that loads a stand-in for the native library, in a checkout with the folder ``sources``, and
    returns the warnings. The stand-in has the sources' digest unless ``built_from`` is another digest."""
    package = sources.parent / "peft_ext"
    package.mkdir()
    (sources.parent / "setup.py").touch()
    for name in ("_native.py", "_kernels.so", "_C.py"):
        (package / name).touch()
    digest = source_digest(sources)
    monkeypatch.setattr(_native, "__file__", str(package / "_native.py"))
    monkeypatch.delenv("PEFT_EXT_CPU_ISA", raising=False)
    monkeypatch.delenv("PEFT_EXT_REQUIRE", raising=False)

    def load(built_from: str = digest, **attributes) -> list[str]:
        info = {"version": peft_ext.__version__, "torch": "2.11.0", "torch_target": "2.11", "sources": built_from}
        module = {"__file__": "_C.so", "build_info": lambda: info, "register_operators": lambda *_: None,
                  "_sources": built_from}  # fmt: skip
        given = {name: value for name, value in (module | attributes).items() if value is not None}
        monkeypatch.setitem(sys.modules, "peft_ext._C", types.SimpleNamespace(**given))
        monkeypatch.setattr(_native, "STATE", _native.NativeState())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _native._load_cpu()
        return [str(warning.message) for warning in caught]

    return load


def test_a_library_of_the_checkout_s_sources_does_not_warn(checkout):
    assert checkout() == [] and _native.STATE.module is not None and _native.STATE.cpu_error is None


def test_a_library_that_is_older_than_the_checkout_warns_and_is_not_proved(checkout, sources, monkeypatch):
    checkout()
    before = _native.build_identity()
    (sources / "api.cpp").write_text("of a later commit")
    monkeypatch.setenv("PEFT_EXT_REQUIRE", "1")  # a developer who has edited a comment can still run the tests
    (warned,) = checkout()
    assert f"the sources in {sources} have changed since the library was built" in warned
    assert f"To mend: pip install -e {sources.parent}" in warned and "make setup" in warned
    assert _native.STATE.module is not None and _native.STATE.cpu_error in warned
    assert _native.build_identity() != before, "what was proved before the change counts as proved"
    (again,) = checkout(built_from="", _sources=None)
    assert again == warned, "a library from the time before the digests is not noticed"


def test_the_sources_of_another_package_do_not_count(checkout, sources):
    (sources.parent / "setup.py").unlink()
    (sources / "api.cpp").write_text("of another package")
    assert checkout() == []


def test_a_module_of_other_sources_than_the_library_warns(checkout, monkeypatch):
    (warned,) = checkout(_sources="another", __file__="/x/_C.cpython-312.so")
    assert "the module _C.cpython-312.so was built from other sources than _kernels.so" in warned
    monkeypatch.setenv("PEFT_EXT_REQUIRE", "1")
    with pytest.raises(ImportError, match="built from other sources"):
        checkout(_sources="another")


@pytest.mark.parametrize("lacking", ["build_info", "register_operators"])
def test_a_module_without_a_function_is_a_library_that_does_not_load(lacking, checkout):
    (warned,) = checkout(**{lacking: None})
    assert "does not load" in warned and lacking in warned and "To mend: pip install -e " in warned
    assert _native.STATE.module is None


@pytest.mark.slow
def test_the_digest_of_the_build_is_that_of_the_sources(bare_package, native):
    """A copy of the built library loads without a warning, and warns after a change of the copied sources."""
    for path in PACKAGE.glob("_*.so"):
        shutil.copy2(path, bare_package / "peft_ext")
    shutil.copytree(ROOT / "csrc", bare_package / "csrc")
    shutil.copy(ROOT / "setup.py", bare_package)
    assert python(IMPORT_AND_PRINT_WARNINGS, bare_package).stdout == ""
    with (bare_package / "csrc/api.cpp").open("a") as file:
        file.write("// changed\n")
    assert "have changed since the library was built" in python(IMPORT_AND_PRINT_WARNINGS, bare_package).stdout


# --- the command that mends -------------------------------------------------------------------------------------------

INDEX = f"peft_ext=={peft_ext.__version__}"


@pytest.mark.parametrize(
    ("direct_url", "wanted"),
    [
        (None, INDEX),
        ({"url": "file:///a%20b/peft_ext", "dir_info": {"editable": True}}, "-e '/a b/peft_ext'"),
        ({"url": "file:///src/peft_ext", "dir_info": {}}, "/src/peft_ext"),
        ({"url": "https://host/peft_ext-1.tar.gz", "archive_info": {}}, "https://host/peft_ext-1.tar.gz"),
        ({"url": "file:///dist/peft_ext-1-cp311-cp311-linux_x86_64.whl", "archive_info": {}},
         "/dist/peft_ext-1-cp311-cp311-linux_x86_64.whl"),
        ({"url": "https://host/peft_ext.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
         "'peft_ext @ git+https://host/peft_ext.git@abc'"),
    ],
    ids=["index", "editable", "folder", "archive", "wheel", "git"],
)  # fmt: skip
def test_the_remedy_installs_from_the_place_of_the_installation(direct_url, wanted, monkeypatch, tmp_path):
    files = {"direct_url.json": "" if direct_url is None else json.dumps(direct_url), "WHEEL": ""}
    monkeypatch.setattr(_native, "_installed", files.__getitem__)
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "peft_ext/_native.py"))
    assert _native.mend() == f"pip install --force-reinstall --no-deps {wanted}"


@pytest.mark.parametrize("has_sources", [False, True])
def test_the_remedy_of_a_wheel_without_library_is_the_source_distribution(has_sources, monkeypatch, tmp_path):
    url = f"file://{tmp_path}/peft_ext-{peft_ext.__version__}-py3-none-any.whl"
    files = {"direct_url.json": json.dumps({"url": url, "archive_info": {}}), "WHEEL": "Root-Is-Purelib: true"}
    monkeypatch.setattr(_native, "_installed", files.__getitem__)
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "peft_ext/_native.py"))
    archive = tmp_path / f"peft_ext-{peft_ext.__version__}.tar.gz"
    if has_sources:
        archive.touch()
    assert f" --no-binary peft_ext {archive if has_sources else INDEX}   (needs a C++ compiler)" in _native.mend()


@pytest.mark.parametrize("version", ["2.10.1+cpu", "2.9.0.dev20251001", "1.13"])
def test_an_old_torch_is_to_be_replaced(version, checkout, monkeypatch):
    monkeypatch.setattr(_native, "torch", types.SimpleNamespace(__version__=version))
    (warned,) = checkout()
    assert f"torch is {version}, wanted 2.11 or newer" in warned and 'To mend: pip install "torch>=2.11"' in warned
    assert _native.STATE.module is None and _native.mend() == 'pip install "torch>=2.11"'


def test_the_bindings_declare_that_they_need_no_global_lock():
    """A Python without free threading ignores the declaration, so that this test reads the source."""
    assert "PYBIND11_MODULE(_C, m, py::mod_gil_not_used())" in (ROOT / "csrc/bindings.cpp").read_text()


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a global lock")
def test_a_free_threaded_python_keeps_its_lock_off(native):
    done = python("import sys, torch; before = sys._is_gil_enabled()\n"
                  "import peft_ext._C; print(before, sys._is_gil_enabled())")  # fmt: skip
    before, after = done.stdout.split()
    assert before == after, done.stderr


@pytest.mark.slow
def test_unknown_isa_is_an_error_that_names_the_known(native):
    done = python("import peft_ext", PEFT_EXT_CPU_ISA="mmx")
    assert done.returncode != 0
    assert "PEFT_EXT_CPU_ISA is 'mmx'" in done.stderr and ", ".join(native.isas()) in done.stderr


def test_isa_is_forced_by_the_environment(native):
    done = python("import peft_ext, peft_ext._C as native; print(native.isa())", PEFT_EXT_CPU_ISA="scalar")
    assert done.stdout.strip() == "scalar", done.stderr


def test_no_two_types_of_headers_have_one_name():
    """The linker keeps one copy of an inline function of peft_ext::X, such as a destructor, and of a function of
    std::vector<X>. If the CPU's code and CUDA's code have different types of the name X, one of them would call the
    other's function. Types in a source file are in an unnamed namespace."""
    held: dict[str, set[str]] = {".h": set(), ".cuh": set()}
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in held and "emulator" not in path.parts:
            text = re.sub(r"//[^\n]*", "", path.read_text())
            if "namespace {" not in text:
                held[path.suffix] |= set(re.findall(r"^(?:struct|class) (\w+)[^;()]*\{", text, re.M))
    assert "LinearSizes" in held[".h"] and "DeviceSizes" in held[".cuh"]
    assert not held[".h"] & held[".cuh"]
