"""Tests of the loading and launching of CUDA kernels, against a stand-in for NVIDIA's driver."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent / "driver"
BUILD = ROOT / "build/driver"  # has a folder for each torch, because several environments may use one checkout

sys.path.insert(0, str(ROOT / "tools"))
native_build = pytest.importorskip("native_build", reason="tools/ is not here: not a checkout")

# Runs in a process of its own: a process opens the driver once.
PROGRAM = """
import ctypes, json, sys
library = ctypes.CDLL(sys.argv[1])
for name in ("test_launch", "test_fault", "peft_ext_kernel_name", "peft_ext_kernel_file"):
    getattr(library, name).restype = ctypes.c_char_p
library.test_launch.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_int, ctypes.c_int]
class Image(ctypes.Structure):
    _fields_ = [("symbol", ctypes.c_char_p), ("data", ctypes.c_char_p), ("error", ctypes.c_char_p)]
asked, broken, kept = [], {}, []
@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(Image))
def source(name, file, capability, image):
    asked.append([name.decode(), file.decode(), capability])
    symbol = name.split(b"::")[1].split(b"<")[0]
    answer = image.contents
    answer.symbol, answer.data = symbol, broken.get("data", b"code of " + symbol)
    answer.error = broken.get("error")
    kept.append(answer)  # the structure keeps the bytes that it points to
def driver():
    fake = ctypes.CDLL("libcuda.so.1")
    fake.fake_calls.restype = ctypes.c_char_p
    return fake
def calls():
    return driver().fake_calls().decode().splitlines()
def launch(which, device=0, first=2**40, last=7, shared=0):
    error = library.test_launch(which, device, first, last, shared)
    return error and error.decode()
def show(*values):
    print(json.dumps(values))
"""


@pytest.fixture(scope="module")
def built() -> tuple[Path, Path]:
    if sys.platform != "linux":
        pytest.skip("the driver is opened on Linux alone")
    if why := native_build.missing_tools():
        pytest.skip(why)
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch not found")
    common = "-O1 -g1 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wno-unknown-pragmas"
    flags, libraries = native_build.torch_flags()
    folder = BUILD / hashlib.sha256(f"{flags} {libraries}".encode()).hexdigest()[:16]
    fake = native_build.build(
        folder / "libcuda.so.1", [native_build.Group("-O1 -std=c++17 -fPIC", [HERE / "fake_cuda.cpp"])]
    )
    sources = [ROOT / "csrc/cuda/driver.cpp", HERE / "kernels.cpp"]
    group = native_build.Group(f"{common} {shlex.quote(f'-I{ROOT}/csrc')} {flags}", sources)
    return native_build.build(folder / "libkernels.so", [group], f"-ldl {libraries}"), fake


@pytest.fixture
def run(built):
    def run(code: str, driver: bool = True) -> list:
        library, fake = built
        environment = os.environ | ({"LD_LIBRARY_PATH": str(fake.parent)} if driver else {})
        command = [sys.executable, "-c", PROGRAM + code, str(library)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


WITH_SOURCE = "library.peft_ext_set_image_source(source)\n"


def test_a_launch_reaches_the_driver_with_all_its_arguments(run):
    errors, calls = run(WITH_SOURCE + "show([launch(0), launch(0, first=-3, last=9)], calls())")
    assert errors == [None, None]
    shape = "grid 2 3 4 block 64 1 1 shared 0 stream 0x77"
    assert calls == [
        "init",
        "context of 0",
        "current 0x1000",
        "load full_kernel in mode 2",
        f"launch full_kernel {shape} first {2**40} last 7 extra (nil)",
        f"launch full_kernel {shape} first -3 last 9 extra (nil)",
    ]


def test_a_kernel_is_asked_for_by_its_expression_once_a_device(run):
    (asked,) = run(WITH_SOURCE + "[launch(which, device) for device in (0, 1, 0) for which in (0, 1, 2)]\nshow(asked)")
    names = [
        "peft_ext::full_kernel<peft_ext::bf16, true, 3, (peft_ext::Kind)1>",
        "peft_ext::numbered_kernel<-1>",
        "peft_ext::plain_kernel",
    ]
    assert [row[0] for row in asked] == 2 * names
    assert [row[2] for row in asked] == [90] * 3 + [80] * 3
    assert all(row[1].endswith("tests/native/driver/kernels.cpp") for row in asked)


def test_all_kernels_are_listed_before_a_launch(run):
    (names,) = run(
        "show(sorted(library.peft_ext_kernel_name(i).decode() for i in range(library.peft_ext_kernel_count())))"
    )
    assert [name.partition("<")[0].removeprefix("peft_ext::") for name in names] == [
        "full_kernel", "numbered_kernel", "plain_kernel",
    ]  # fmt: skip


def test_dynamic_shared_memory_is_asked_for(run):
    (calls,) = run(WITH_SOURCE + "launch(1, shared=100000)\nshow(calls())")
    assert "attribute 8 = 100000 of numbered_kernel" in calls and " shared 100000 " in calls[-1]


def test_the_limit_of_dynamic_shared_memory_is_raised_and_never_lowered(run):
    errors, calls = run(
        WITH_SOURCE
        + """
sizes = [60000, 100000, 60000, 100000]
errors = [launch(1, device, shared=shared) for device in (0, 1) for shared in sizes]
driver().fake_fail(b"attribute")
errors.append(launch(1, shared=101000))
driver().fake_fail(b"")
errors.append(launch(1, shared=101000))
show(errors, calls())
"""
    )
    assert errors[:8] == [None] * 8 and "shared memory of" in errors[8] and errors[9] is None
    raised = [int(call.split()[3]) for call in calls if call.startswith("attribute")]
    assert raised == [60000, 100000, 60000, 100000, 101000, 101000]


def test_threads_that_launch_a_kernel_with_different_sizes_do_not_disturb_each_other(run):
    (errors,) = run(
        WITH_SOURCE
        + """
import threading
errors = set()
def many(shared):
    errors.update(launch(1, shared=shared) for _ in range(5000))
threads = [threading.Thread(target=many, args=(shared,)) for shared in (60000, 100000)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
show(list(errors))
"""
    )
    assert errors == [None]


def test_the_capture_mode_is_as_before_after_a_load(run):
    (modes,) = run(
        WITH_SOURCE
        + """
mode = ctypes.c_int(1)
launch(0)
driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
show(mode.value)
"""
    )
    assert modes == 0


def test_threads_that_launch_a_kernel_at_once_get_one_handle(run):
    errors, calls = run(
        WITH_SOURCE
        + """
import threading
errors = []
threads = [threading.Thread(target=lambda: errors.append(launch(0))) for _ in range(8)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
show(errors, calls())
"""
    )
    assert errors == [None] * 8
    loads, unloads = (sum(call.startswith(kind) for call in calls) for kind in ("load", "unload"))
    assert loads - unloads == 1 and sum(call.startswith("launch") for call in calls) == 8


def test_a_thread_without_a_context_gets_that_of_the_device(run):
    (calls,) = run(
        WITH_SOURCE
        + """
import threading
launch(0)
calls()
thread = threading.Thread(target=lambda: (launch(0), launch(0)))
thread.start(); thread.join()
show(calls())
"""
    )
    assert [call.split()[0] for call in calls] == ["current", "launch", "launch"] and calls[0] == "current 0x1000"


def test_a_thread_with_a_context_of_another_library_gets_it_back(run):
    """The launch, and the load of a kernel, need the primary context, in which PyTorch's memory and streams are."""
    errors, calls = run(
        WITH_SOURCE
        + """
driver().fake_context(5)
errors = [launch(0), launch(0), launch(0, device=1)]
driver().fake_fail(b"launch")
errors.append(launch(0))
show(errors, calls())
"""
    )
    assert errors[:3] == [None] * 3 and "unspecified launch failure" in errors[3]
    own = "current 0x2005"
    assert [call for call in calls if call.startswith("current")] == [
        "current 0x1000", own, "current 0x1000", own, "current 0x1001", own, "current 0x1000", own,
    ]  # fmt: skip
    assert [call.split()[0] for call in calls].count("context") == 2  # each primary context is retained once


def test_errors_say_what_failed(run):
    (errors,) = run("""
errors = [launch(0)]
library.peft_ext_set_image_source(source)
broken["error"] = b"the compiler is gone"
errors.append(launch(0))
del broken["error"]
broken["data"] = b"no code"
errors.append(launch(0))
del broken["data"]
driver().fake_fail(b"load")
errors.append(launch(0))
driver().fake_fail(b"launch")
errors.append(launch(0))
driver().fake_fail(b"attribute")
errors.append(launch(0, shared=1 << 20))
errors.append(launch(0, device=64))
driver().fake_fail(b"stream")
errors.append(library.test_fault().decode())
driver().fake_fail(b"capture")
errors.append(library.test_fault().decode())
driver().fake_fail(b"")
errors += [launch(0), library.test_fault().decode()]
show(errors)
""")
    name = "peft_ext::full_kernel<peft_ext::bf16, true, 3, (peft_ext::Kind)1>"
    wanted = [
        f"no machine code of {name}: Python's part is not loaded",
        f"no machine code of {name}: the compiler is gone",
        f"CUDA error: device kernel image is invalid (peft_ext: loading of {name})",
        f"CUDA out of memory. peft_ext: loading of {name}",
        f"CUDA error: unspecified launch failure (peft_ext: launch of {name})",
        f"(peft_ext: shared memory of {name})",
        "GPU number 64, wanted less than 64",
        "unspecified launch failure",
        "",
        None,
        "",
    ]
    assert len(errors) == len(wanted)
    assert all(want == got or (want and got and want in got) for want, got in zip(wanted, errors, strict=True)), errors


def test_the_search_for_a_fault_leaves_a_capture_valid(run):
    """An allocation may fail while a CUDA graph is captured; the search for an earlier fault runs in relaxed mode."""
    (fault, calls) = run("fault = library.test_fault().decode()\nshow([fault, calls()])")[0]
    assert fault == "" and [call for call in calls if call.startswith("query")] == ["query in mode 2"]


def test_the_search_for_a_fault_leaves_the_capture_of_a_blocking_stream_valid(run):
    (found,) = run("""
driver().fake_blocking_capture(1)
found = [library.test_fault().decode(), driver().fake_invalidated()]
driver().fake_blocking_capture(0)
driver().fake_fail(b"stream")
found.append(library.test_fault().decode())
show(found)
""")
    assert found == ["", 0, "unspecified launch failure"]


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has NVIDIA's driver")
def test_without_a_driver_the_error_names_it(run):
    (error,) = run(WITH_SOURCE + "show(launch(0))", driver=False)
    assert "NVIDIA's driver can't be opened: libcuda.so.1" in error
