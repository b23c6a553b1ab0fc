"""Tests of the compilation of CUDA kernels at run time, and of the cache. Tests that compile need NVRTC, and no GPU."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import shutil
import stat
import sys
import threading
import time
from pathlib import Path

import pytest

from peft_ext import _native, device_code
from peft_ext.device_code import Image

ROOT = Path(__file__).resolve().parents[2]

sys.path.insert(0, str(ROOT / "tools"))
parameters = pytest.importorskip("parameters", reason="tools/ is not here: not a checkout")

if _native.STATE.module is None:
    pytest.skip("the native library is not built", allow_module_level=True)

needs_nvrtc = pytest.mark.skipif(device_code.missing() is not None, reason=str(device_code.missing()))
KERNEL, FILE = "peft_ext::bottleneck_kernel<false>", "csrc/bottleneck/bottleneck.cuh"


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Replaces NVRTC by a function that returns text. Returns the list of the calls, each (kernel, file, arch)."""
    calls: list[tuple[str, str, str]] = []

    def compile_kernel(kernel: str, file: str, arch: str, *options: str) -> tuple[Image, str]:
        calls.append((kernel, file, arch))
        return Image(b"_Zname", b"\0code\0of\0" + kernel.encode()), ""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PEFT_EXT_NVRTC_FLAGS", raising=False)
    monkeypatch.setattr(device_code, "missing", lambda: None)
    monkeypatch.setattr(device_code, "compile_kernel", compile_kernel)
    monkeypatch.setattr(device_code, "version", lambda: "13.0")
    monkeypatch.setattr(device_code, "architecture", lambda capability: f"sm_{capability}")
    return calls


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.image"))


# --- sources ----------------------------------------------------------------------------------------------------------


def test_every_kernel_of_csrc_starts_with_the_macro_that_names_it():
    for path in sorted((ROOT / "csrc").rglob("*.cuh")):
        text = re.sub(r"//[^\n]*", "", path.read_text())
        for body in text.split("__global__")[1:]:
            opening = re.search(r"\)\s*\{\s*(\S+)", body)
            assert opening and opening[1] == "PEFT_EXT_KERNEL;", f"{path}: {body[:100]}"


def test_the_library_carries_the_sources_of_this_checkout():
    sources = _native.STATE.module.sources()
    assert len(sources) > 30
    for name, text in sources.items():
        assert text == (ROOT / "csrc" / name).read_text(), f"{name} changed after the build: make setup"


def test_every_kernel_has_its_source_in_the_library():
    sources, kernels = _native.STATE.module.sources(), device_code.kernels()
    assert len(kernels) == len(set(kernels)) > 400
    for kernel, file in kernels:
        name = re.match(r"peft_ext::(\w+)", kernel)[1]
        assert re.search(rf"\b{name}\(", sources[file.rpartition("csrc/")[2]]), (kernel, file)


def test_every_kernel_that_csrc_defines_is_launched_by_an_operator():
    defined = set()
    for text in _native.STATE.module.sources().values():
        defined |= set(re.findall(r"(\w+_kernel)\((?=[^;{]*\{\s*PEFT_EXT_KERNEL)", text))
    assert {re.match(r"peft_ext::(\w+)", kernel)[1] for kernel, _ in device_code.kernels()} == defined


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_kernel_is_compiled_once_for_an_architecture(compiled, tmp_path):
    first = device_code.image(KERNEL, FILE, 90)
    assert device_code.image(KERNEL, FILE, 90) == first == (b"_Zname", b"\0code\0of\0" + KERNEL.encode())
    device_code.image(KERNEL, FILE, 80)
    assert compiled == [(KERNEL, FILE, "sm_90"), (KERNEL, FILE, "sm_80")]
    assert len(files(tmp_path / "peft_ext/kernels")) == 2


@pytest.mark.parametrize("change", ["compiler", "option", "source", "header"])
def test_another_compiler_or_source_is_compiled_anew(compiled, monkeypatch, change):
    device_code.image(KERNEL, FILE, 90)
    if change == "compiler":
        monkeypatch.setattr(device_code, "version", lambda: "13.1")
    elif change == "option":
        monkeypatch.setenv("PEFT_EXT_NVRTC_FLAGS", "-lineinfo")
    elif change == "source":
        changed = _native.STATE.module.sources() | {"rotary/rotary.cuh": "other"}
        monkeypatch.setattr(device_code, "_sources", lambda: changed)
    else:
        monkeypatch.setitem(device_code.HEADERS, "math.h", "other")
    device_code.image(KERNEL, FILE, 90)
    assert len(compiled) == 2
    device_code.image(KERNEL, FILE, 90)
    assert len(compiled) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "other"])
def test_a_damaged_file_is_compiled_anew_and_replaced(compiled, tmp_path, damage):
    first = device_code.image(KERNEL, FILE, 90)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-1], "empty": b"", "flipped": whole[:-1] + b"!", "other": b"text"}[damage])
    assert device_code.image(KERNEL, FILE, 90) == first and len(compiled) == 2
    assert path.read_bytes() == whole


def test_a_cache_that_is_a_file_is_no_cache(compiled, monkeypatch, tmp_path):
    (tmp_path / "peft_ext").write_text("not a folder")
    assert device_code.image(KERNEL, FILE, 90) == device_code.image(KERNEL, FILE, 90)
    assert len(compiled) == 2


def test_other_users_read_the_folder_and_do_not_write_it(compiled, tmp_path):
    """A container is built by one user and run by another."""
    before = os.umask(0)
    try:
        device_code.image(KERNEL, FILE, 90)
    finally:
        os.umask(before)
    (path,) = files(tmp_path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755


def test_an_error_of_the_compiler_leaves_nothing(compiled, monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("NVRTC does not compile")

    with monkeypatch.context() as patched:
        patched.setattr(device_code, "compile_kernel", fails)
        with pytest.raises(RuntimeError, match="NVRTC does not compile"):
            device_code.image(KERNEL, FILE, 90)
    assert files(tmp_path) == []
    device_code.image(KERNEL, FILE, 90)
    assert len(files(tmp_path)) == 1


def test_threads_wait_for_the_one_that_compiles(compiled, monkeypatch):
    quick = device_code.compile_kernel
    monkeypatch.setattr(device_code, "compile_kernel", lambda *args: (time.sleep(0.3), quick(*args))[1])
    found: list[Image] = []
    threads = [threading.Thread(target=lambda: found.append(device_code.image(KERNEL, FILE, 90))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(set(found)) == 1 and len(compiled) == 1


def _rank(folder: str, log: str, barrier) -> None:
    os.environ["XDG_CACHE_HOME"] = folder

    def compile_kernel(kernel: str, file: str, arch: str) -> tuple[Image, str]:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return Image(b"_Zname", b"code"), ""

    device_code.missing = lambda: None
    device_code.compile_kernel = compile_kernel
    device_code.version = lambda: "13.0"
    device_code.architecture = lambda capability: f"sm_{capability}"
    barrier.wait()
    assert device_code.image(KERNEL, FILE, 90) == (b"_Zname", b"code")


def test_ranks_wait_for_the_one_that_compiles(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    ranks = [context.Process(target=_rank, args=(str(tmp_path), str(tmp_path / "log"), barrier)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_lock_that_nobody_gives_back_is_not_waited_for_for_ever(compiled, monkeypatch, tmp_path):
    from filelock import FileLock

    monkeypatch.setattr(device_code, "LOCK_SECONDS", 0.2)
    device_code.image(KERNEL, FILE, 90)
    (path,) = files(tmp_path)
    path.unlink()
    with FileLock(path.with_suffix(".lock")):
        device_code.image(KERNEL, FILE, 90)
    assert len(compiled) == 2


@pytest.mark.slow
def test_warm_compiles_every_kernel(compiled, tmp_path):
    seen = []
    count = device_code.warm(90, lambda items, length: (seen.append(length), items)[1])
    assert count == len(device_code.kernels()) == len(compiled) == len(files(tmp_path))
    assert seen == [count]
    assert device_code.warm(90) == count and len(compiled) == count


def test_warm_fails_where_the_kernels_are_not_kept(compiled, monkeypatch, tmp_path):
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(device_code, "kernels", lambda: [(KERNEL, FILE)])
    monkeypatch.setattr(device_code, "atomic_file", full)
    with pytest.raises(OSError, match=f"1 of 1 compiled kernels could not be written into the folder {tmp_path}"):
        device_code.warm(90)


@pytest.mark.parametrize("cores", [2, device_code.WARM_CORES])
def test_many_cores_compile_the_kernels_of_any_model_at_the_first_proof(compiled, monkeypatch, cores):
    common = [kernel for kernel in device_code.kernels() if "::packed_" not in kernel[0]]
    wanted = len(common) if cores == device_code.WARM_CORES else 0
    assert 400 < len(common) < len(device_code.kernels())
    said: list[str] = []
    monkeypatch.setattr(device_code.os, "sched_getaffinity", lambda _: set(range(cores)))
    device_code.prepare(90, said.append)
    assert len(compiled) == wanted
    assert said == [f"peft_ext: compiling {wanted} CUDA kernels for sm_90 on {cores} cores, once"] * (wanted > 0)
    device_code.prepare(90, said.append)
    assert len(compiled) == wanted and len(said) == (wanted > 0)


def test_the_kernels_of_packed_weights_make_no_fma_of_a_product_and_a_sum(monkeypatch):
    asked: list[bytes] = []

    class Nvrtc:
        nvrtcResult = type("Result", (), {"NVRTC_SUCCESS": 0})

        def nvrtcCompileProgram(self, program, count, options):
            asked.extend(options)
            return (0,)

        def nvrtcGetCUBINSize(self, program):
            return (0, 1)

        def nvrtcGetProgramLogSize(self, program):
            return (0, 1)

        def __getattr__(self, name):
            return lambda *args: (0, b"program")

    monkeypatch.setattr(device_code, "_nvrtc", Nvrtc)
    for kernel, file in device_code.kernels():
        if "::packed_" in kernel or kernel == KERNEL:
            asked.clear()
            device_code.compile_kernel(kernel, file, "sm_90", "--last")
            assert (b"--fmad=false" in asked) == ("::packed_" in kernel) and asked[-1] == b"--last"


def test_nothing_is_compiled_for_a_cache_that_can_t_be_written(compiled, monkeypatch, tmp_path):
    (tmp_path / "peft_ext").write_text("not a folder")
    monkeypatch.setattr(device_code.os, "sched_getaffinity", lambda _: set(range(64)))
    device_code.prepare(90, lambda line: pytest.fail(line))
    assert compiled == []


def test_a_kernel_without_a_compiler_is_an_error_that_says_what_to_install(compiled, monkeypatch):
    monkeypatch.setattr(
        device_code, "missing", lambda: "the package cuda-bindings is missing: pip install cuda-bindings"
    )
    with pytest.raises(RuntimeError, match="pip install cuda-bindings"):
        device_code.image(KERNEL, FILE, 90)


# --- the compiler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda, named", [("13.0", '"cuda-bindings==13.*"'), ("12.8", '"cuda-bindings==12.*"'),
                                         (None, "cuda-bindings")])  # fmt: skip
def test_a_missing_package_is_named(cuda, named, monkeypatch):
    monkeypatch.setattr(device_code.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(device_code.torch.version, "cuda", cuda)
    assert device_code.missing() == f"the package cuda-bindings is missing: pip install {named}"


@pytest.mark.parametrize(
    ("file", "text"),
    [("cuda.py", "raise SystemExit(3)"), ("cuda/__init__.py", ""), ("cuda/__init__.py", "raise KeyError('a flag')")],
)
def test_a_module_of_the_user_s_named_cuda_is_named(file, text, monkeypatch, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert f"{path} hides the package cuda of cuda-bindings: rename this module." in device_code.missing()
    finally:
        sys.modules.pop("cuda", None)


@pytest.fixture
def nvrtc_of(monkeypatch):
    """Returns a function with which NVRTC supports only the given architectures."""

    def known(*archs: int) -> None:
        monkeypatch.setattr(device_code, "_known_architectures", lambda: list(archs))
        monkeypatch.setattr(device_code, "version", lambda: "13.0")

    device_code.architecture.cache_clear()
    yield known
    device_code.architecture.cache_clear()


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [(80, "sm_80"), (90, "sm_90"), (103, "compute_100"), (110, "compute_100"), (121, "sm_121"), (130, "compute_121")],
)
def test_a_gpu_that_nvrtc_does_not_know_gets_ptx(nvrtc_of, capability, wanted):
    nvrtc_of(75, 80, 86, 89, 90, 100, 120, 121)
    assert device_code.architecture(capability) == wanted


def test_a_gpu_older_than_nvrtc_is_refused(nvrtc_of):
    nvrtc_of(75, 80)
    with pytest.raises(RuntimeError, match="NVRTC 13.0 has no architecture for compute capability 7.0"):
        device_code.architecture(70)


@functools.cache
def one_of_each() -> list[tuple[str, str]]:
    """Returns the first instance of every kernel."""
    return list({re.match(r"[\w:]+", kernel)[0]: (kernel, file) for kernel, file in device_code.kernels()}.values())


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_an_instance_of_every_kernel_compiles(arch):
    """All instances are compiled by tools/cuda_check.py."""
    if int(arch.removeprefix("sm_")) not in device_code._known_architectures():
        pytest.skip(f"NVRTC {device_code.version()} does not know {arch}")
    for kernel, file in one_of_each():
        image, log = device_code.compile_kernel(kernel, file, arch)
        assert image.code.startswith(b"\x7fELF") and image.symbol in image.code, kernel
        assert log == "", kernel


@needs_nvrtc
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ not found")
@pytest.mark.parametrize("part", ["some", pytest.param("each", marks=pytest.mark.slow)])
def test_a_launch_passes_parameters_of_the_layout_that_the_machine_code_has(part):
    """tools/cuda_check.py compares all instances."""
    wanted = one_of_each()[:: 1 if part == "each" else 10]
    host = parameters.on_host(wanted)
    for kernel, file in wanted:
        image, _ = device_code.compile_kernel(kernel, file, "sm_90")
        assert parameters.differences(kernel, image.code, image.symbol.decode(), host[kernel]) == []
    assert host[wanted[0][0]]


@needs_nvrtc
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ not found")
def test_another_layout_of_a_parameter_is_found(tmp_path, monkeypatch):
    """A struct whose last member is packed by the machine code's compiler and not on the host."""
    text = """#pragma once
#include "cuda/ptx.cuh"
namespace peft_ext {
struct Work { int64_t count; uint8_t tail SIZE; };
template <int kN>
__global__ void odd_kernel(const float* x, Work work, bool flag) { PEFT_EXT_KERNEL; }
}
"""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("*.cpp"))
    (tmp_path / "csrc/odd.cuh").write_text(text.replace("SIZE", "[1]"))
    monkeypatch.setattr(parameters, "ROOT", tmp_path)
    host = parameters.on_host([("peft_ext::odd_kernel<3>", "csrc/odd.cuh")])["peft_ext::odd_kernel<3>"]
    assert host == [(0, 8), (8, 16), (24, 1)]
    for size, wanted in {"[1]": True, "[9]": False}.items():
        sources = _native.STATE.module.sources() | {"odd.cuh": text.replace("SIZE", size)}
        monkeypatch.setattr(device_code, "_sources", lambda sources=sources: sources)
        image, _ = device_code.compile_kernel("peft_ext::odd_kernel<3>", "csrc/odd.cuh", "sm_90")
        found = parameters.differences("odd_kernel<3>", image.code, image.symbol.decode(), host)
        assert (found == []) is wanted, found


@needs_nvrtc
def test_nvrtc_gives_machine_code_and_ptx():
    kernel, file = one_of_each()[0]
    image, _ = device_code.compile_kernel(kernel, file, "compute_90")
    assert b".target sm_90" in image.code and b".entry " + image.symbol in image.code
    assert device_code.architecture(90) == "sm_90" and device_code.version().startswith(("12", "13"))


@needs_nvrtc
def test_what_does_not_compile_is_told_with_nvrtcs_messages():
    with pytest.raises(RuntimeError, match=r"NVRTC does not compile peft_ext::no_kernel for sm_90:\n.*no_kernel"):
        device_code.compile_kernel("peft_ext::no_kernel", FILE, "sm_90")


@needs_nvrtc
def test_options_reach_nvrtc(monkeypatch):
    kernel, file = one_of_each()[0]
    plain, _ = device_code.compile_kernel(kernel, file, "sm_90")
    monkeypatch.setenv("PEFT_EXT_NVRTC_FLAGS", "-lineinfo")
    lines, _ = device_code.compile_kernel(kernel, file, "sm_90")
    assert len(lines.code) > len(plain.code) and b"debug_line" in lines.code
