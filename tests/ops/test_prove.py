"""Tests that kernels are proved before their first use on a machine, and that wrong kernels are dropped.

The tests of a GPU simulate a card: the kernels are the CPU's or, for the emulator, the CUDA kernels on CPU tensors.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from cuda_kernels import emulated_ops
from torch.utils._python_dispatch import TorchDispatchMode

from peft_ext import _native, ops
from peft_ext.integrations.adapter_layers import reasons
from peft_ext.ops import prove
from peft_ext.ops.library import OPERATORS
from peft_ext.ops.prove import families

pytestmark = pytest.mark.cpu_only("the tests simulate a card")

CPU, CARD = torch.device("cpu"), "a card"
AGREES = dict.fromkeys(families("CUDA"), "")
ROOT = Path(__file__).parents[2]


class Opened:
    """Stands for the gates of a family of CUDA kernels, which a CPU build of PyTorch does not have."""

    def _destroy(self) -> None: ...


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., Any]]:
    """Returns a dict of replacements of kernels, by operator; other operators run the CPU's kernel or the reference."""
    found, native = {}, prove.native_op

    def kernel(_: str, name: str) -> Callable[..., Any]:
        own = native("CPU", name) if ("CPU", name) in prove._kernels else OPERATORS[name].reference
        return found.get(name, own)

    monkeypatch.setattr(prove, "native_op", kernel)
    return found


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    """Simulates a process that has proved no kernel, with a card and an own cache, and restores dropped kernels."""
    prove.settle("CPU")  # after the test, this process must have proved its CPU kernels
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("PEFT_EXT_PROVE", "PEFT_EXT_REQUIRE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(prove, "_found", {key: {} for key in prove.KEYS})
    monkeypatch.setattr(prove, "_gates", {"CPU": {}, "CUDA": {family: Opened() for family in families("CUDA")}})
    monkeypatch.setattr(prove, "_overriding", [])
    monkeypatch.setattr(prove, "DROPPED", {})
    monkeypatch.setattr(prove.device_code, "prepare", lambda *_: None)
    monkeypatch.setattr(prove.device_code, "missing", lambda: None)
    monkeypatch.setattr(prove.device_code, "architecture", lambda number: f"sm_{number}")
    monkeypatch.setattr(prove.device_code, "folder", Path)
    for family, names in families("CPU").items():
        prove._arm_family("CPU", family, names)
    for name, value in {
        "is_available": True, "device_count": 1, "get_device_name": CARD, "get_device_capability": (9, 0),
        "current_device": 0, "is_current_stream_capturing": False, "synchronize": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    yield
    for library in [*prove._overriding, *prove._gates["CPU"].values()]:
        library._destroy()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.device, str]]:
    """Returns the list of the proofs that ran, as (device, family). Every family passes, and no kernel runs."""
    found: list[tuple[torch.device, str]] = []

    def passes(device: torch.device, wanted: list[str], **_: Any) -> dict[str, str]:
        found.extend((device, family) for family in wanted)
        return dict.fromkeys(wanted, "")

    monkeypatch.setattr(prove, "prove", passes)
    return found


def fails(monkeypatch: pytest.MonkeyPatch, family: str, why: str) -> None:
    """Makes the proof of one family fail, and all other proofs pass, without running a kernel."""
    monkeypatch.setattr(prove, "prove", lambda _, wanted, **__: {name: why * (name == family) for name in wanted})


def next_process(monkeypatch: pytest.MonkeyPatch, asked: Optional[str] = None, key: str = "CUDA") -> None:
    """Settles all families as another process does that shares the cache."""
    monkeypatch.setattr(prove, "_found", {key: {} for key in prove.KEYS})
    monkeypatch.setitem(prove._gates, key, {family: Opened() for family in families(key)})
    if asked is not None:
        monkeypatch.setenv("PEFT_EXT_PROVE", asked)
    prove.settle(key)


# --- the proof --------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # the emulated library has to be built
def test_the_cuda_kernels_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = emulated_ops()
    monkeypatch.setattr(prove, "native_op", lambda _, name: getattr(kernels, name))
    assert prove.prove(CPU, key="CUDA", large=False) == AGREES


@pytest.mark.parametrize("isa", _native.STATE.module.isas() if _native.STATE.module else [])
def test_the_cpu_s_kernels_agree_on_each_path(isa: str) -> None:
    before = _native.STATE.isa
    try:
        _native.STATE.module.set_isa(isa)
        assert prove.prove(CPU) == dict.fromkeys(families("CPU"), "")
    finally:
        _native.STATE.module.set_isa(before)


@pytest.mark.parametrize("family", families("CUDA"))
def test_large_inputs_are_proved_too(family: str, planted: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    calls = prove.calls
    monkeypatch.setattr(prove, "LARGE", (258, 256, 136))
    monkeypatch.setattr(prove, "calls", lambda *args: shapes.append(args[3]) or calls(*args))
    assert prove.prove(CPU, [family], key="CUDA") == {family: ""}
    assert shapes == [prove.SMALL["CUDA"]] * 3 + [(258, 256, 136)]
    shapes.clear()
    prove.prove(CPU, [family])
    assert shapes == [prove.SMALL["CPU"]] * 3


@contextmanager
def medium() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode, lambda: torch.device("meta"), torch.enable_grad,
        lambda: torch.autocast("cpu", torch.bfloat16), medium,
    ],
    ids=["inference_mode", "meta", "enable_grad", "autocast", "medium"],
)  # fmt: skip
def test_the_caller_s_modes_have_no_influence(mode: Callable[[], Any]) -> None:
    with mode():
        found = prove.prove(CPU)
    assert found == dict.fromkeys(families("CPU"), "")


class Products(TorchDispatchMode):
    """Records the dtypes of the operands of matrix products."""

    def __init__(self, seen: set[torch.dtype]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        if func._opname in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv"):
            self.seen.update(arg.dtype for arg in args if isinstance(arg, torch.Tensor))
        return func(*args, **(kwargs or {}))


def test_no_reference_multiplies_in_a_precision_that_the_process_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[torch.dtype]] = {}
    called = prove._called

    def watched(function: Callable, name: str, arguments: tuple) -> list[torch.Tensor]:
        if function is not OPERATORS[name].reference:
            return called(function, name, arguments)
        with Products(seen.setdefault(name, set())):
            return called(function, name, arguments)

    monkeypatch.setattr(prove, "_called", watched)
    prove.prove(CPU)
    exact = {"nf4_merge", "nf4_dequantize_merged"}  # with factors that are small integers, these products are exact
    assert set().union(*(dtypes for name, dtypes in seen.items() if name not in exact)) == {torch.float64}
    assert torch.float32 in seen["nf4_merge"]


def test_nothing_of_the_process_changes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> list[Any]:
        found: list[Any] = []

        def look() -> None:
            found.extend([
                torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision,
                torch.backends.mkldnn.matmul.fp32_precision, torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"), torch.get_default_device(), torch.get_default_dtype(),
                torch.get_num_threads(), list(warnings.filters), torch.get_rng_state().tolist(),
            ])  # fmt: skip

        thread = threading.Thread(target=look)  # another thread does not see the settings of this thread alone
        thread.start()
        thread.join()
        return found

    seen, differs = [], prove._differs
    monkeypatch.setattr(prove, "_differs", lambda *args: seen.append(state()) or differs(*args))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        wanted = state()
        prove.prove(CPU, ["lora", "ia3"])
        assert seen and all(found == wanted for found in seen) and state() == wanted
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("key", prove.KEYS)
def test_every_operator_with_a_kernel_is_called(key: str) -> None:
    shape = prove.SMALL[key]
    called = {name for family in families(key) for name, _ in prove.calls(family, CPU, torch.float32, shape, key)}
    assert called == {name for names in families(key).values() for name in names}


def no_mask(*arguments: Any) -> Any:
    """Computes lora_linear_backward without the dropout mask."""
    *rest, p, _seed, needs = arguments
    return prove._kernels["CPU", "lora_linear_backward"].call_boxed(
        torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *rest, p, None, needs
    )


def other_codes(weight: torch.Tensor, blocksize: int) -> Any:
    packed, absmax = OPERATORS["nf4_quantize"].reference(weight, blocksize)
    return packed ^ 1, absmax


@pytest.mark.parametrize(
    ("family", "name", "fault", "says"),
    [
        ("lora", "lora_linear_backward", no_mask, "lora_linear_backward in float32 is off by .* of result 0"),
        ("nf4", "nf4_quantize", other_codes, "nf4_quantize .*differs"),
        ("ia3", "ia3_scale", lambda x, scale: x * float("nan"), "ia3_scale .* is off by nan"),
        ("dora", "dora_linear", lambda *_: 1 / 0, "ZeroDivisionError: division by zero"),
        ("bottleneck", "bottleneck_adapter", lambda x, *_: (x[:1], x[:1]), r"gives .* \(1, 64\) as result 0"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found_in_its_family_alone(
    planted: dict, family: str, name: str, fault: Callable, says: str
) -> None:
    planted[name] = fault
    found = prove.prove(CPU)
    wrong = {family: why for family, why in found.items() if why}
    assert list(wrong) == [family]
    assert re.search(says, wrong[family])


def test_a_slow_kernel_passes(planted: dict) -> None:
    plain = OPERATORS["ia3_scale"].reference
    planted["ia3_scale"] = lambda *args: time.sleep(0.2) or plain(*args)
    assert prove.prove(CPU, ["ia3"]) == {"ia3": ""}


# --- gates ------------------------------------------------------------------------------------------------------------


def test_a_first_call_proves_its_family_alone_and_opens_its_gates(fresh: None, asked: list) -> None:
    x, scale = torch.randn(4, 8), torch.randn(8)
    torch.testing.assert_close(torch.ops.peft_ext.ia3_scale(x, scale), x * scale)
    torch.ops.peft_ext.ia3_scale_backward(x, x, scale, True, True)
    assert asked == [(CPU, "ia3")] and "ia3" not in prove._gates["CPU"] and "lora" in prove._gates["CPU"]


def test_compiled_code_proves_when_it_runs(fresh: None, asked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # Dynamo would read the card's random generator
    scaled = torch.compile(lambda x, scale: ops.ia3_scale(x, scale) + 1, backend="aot_eager", fullgraph=True)
    x, scale = torch.randn(4, 8), torch.randn(8, requires_grad=True)
    y = scaled(x, scale)
    torch.testing.assert_close(y, x * scale + 1)
    y.sum().backward()
    assert asked == [(CPU, "ia3")]


def test_a_check_of_a_layer_proves(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, "lora", "it is off")
    with pytest.warns(RuntimeWarning, match=r"lora: its CPU kernels were dropped on .*: it is off. The reference"):
        why = reasons.kernel_reason("lora_linear", "cpu")
    assert why is not None and why.endswith("it is off")
    assert reasons.kernel_reason("ia3_linear", "cpu") is None
    assert reasons.kernel_reason("grouped_lora_linear", "cpu")  # grouped_lora_linear uses lora_linear's backward
    (place,) = prove.report("CPU")
    assert place.endswith(f"({_native.STATE.isa})") and prove.report("CPU")[place]["lora"] == "it is off"


def test_a_check_with_fake_tensors_proves_nothing(fresh: None, asked: list) -> None:
    with torch._subclasses.FakeTensorMode():
        assert reasons.kernel_reason("lora_linear", "cpu") is None
        ops.ia3_scale(torch.randn(4, 8), torch.randn(8))
    assert not asked and "ia3" in prove._gates["CPU"]


def test_a_family_that_fails_runs_the_reference_from_the_first_call_on(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    called, plain = [], OPERATORS["lora_linear"].reference
    counted = replace(OPERATORS["lora_linear"], reference=lambda *a: called.append(1) or plain(*a))
    monkeypatch.setitem(OPERATORS, "lora_linear", counted)
    fails(monkeypatch, "lora", "it is off")
    x, weight, a, b = torch.randn(5, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    wanted = x @ weight.T + x @ a.T @ b.T
    with pytest.warns(RuntimeWarning, match="lora: .* it is off"):
        torch.testing.assert_close(ops.lora_linear(x, weight, a, b), wanted)
    assert called == [1]
    torch.testing.assert_close(ops.lora_linear(x, weight, a, b), wanted)
    assert called == [1, 1] and ("CPU", "lora_linear_backward") in prove.DROPPED


def test_a_family_that_fails_is_an_error_where_the_kernels_are_required(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch, "ia3", "it is off")
    monkeypatch.setenv("PEFT_EXT_REQUIRE", "1")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="ia3: its CPU kernels failed: it is off .PEFT_EXT_REQUIRE is set"):
            ops.ia3_scale(torch.randn(4, 8), torch.randn(8))


def test_other_threads_wait_for_the_proof(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    proofs, kernels, done = [], [], threading.Event()
    native = prove.native_op

    def slow(_: torch.device, wanted: list[str], **__: Any) -> dict[str, str]:
        proofs.append(1)
        time.sleep(0.3)
        done.set()
        return dict.fromkeys(wanted, "")

    def kernel(key: str, name: str) -> Callable[..., Any]:
        kernels.append(done.is_set())
        return native(key, name)

    monkeypatch.setattr(prove, "prove", slow)
    monkeypatch.setattr(prove, "native_op", kernel)
    x, scale = torch.randn(4, 8), torch.randn(8)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: torch.ops.peft_ext.ia3_scale(x, scale), range(4)))
    # A thread that comes after the proof calls the operator's kernel, and does not ask native_op for the kernel.
    assert proofs == [1] and kernels and all(kernels)
    assert all(torch.equal(y, x * scale) for y in found)


FORKS = """
import os, threading, torch, peft_ext
from peft_ext.ops import prove
held = threading.Event()
def hold():
    with prove._lock:
        held.set()
        threading.Event().wait(100)
threading.Thread(target=hold, daemon=True).start()
held.wait()
if (child := os.fork()) == 0:
    torch.set_num_threads(1)
    peft_ext.ops.ia3_scale(torch.ones(2, 8), torch.ones(8))
    os._exit(0)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
def test_a_forked_process_does_not_wait_for_a_thread_that_it_lacks() -> None:
    subprocess.run([sys.executable, "-c", FORKS], check=True, cwd=ROOT, timeout=120)


def test_a_capture_that_meets_an_unproved_family_is_an_error(
    fresh: None, asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="lora: its kernels are unproved on a card, .* before the capture"):
        prove.settle("CUDA", ["lora"])
    assert not asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    prove.settle("CUDA", ["lora"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    prove.settle("CUDA", ["lora"])
    next_process(monkeypatch, key="CPU")
    with pytest.raises(RuntimeError, match="ia3: its kernels"):
        prove.settle("CUDA", ["ia3"])


# --- places and what is saved -----------------------------------------------------------------------------------------


def test_agreement_is_saved_by_family_and_nothing_else(
    fresh: None, asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = prove.prove
    fails(monkeypatch, "dora", "it is off")
    with pytest.warns(RuntimeWarning, match="dora: .* it is off"):
        prove.settle("CUDA")
    monkeypatch.setattr(prove, "prove", passes)
    next_process(monkeypatch)
    assert [family for _, family in asked] == ["dora"] and prove.report("CUDA") == {CARD: AGREES}
    next_process(monkeypatch)
    assert len(asked) == 1 and prove.report("CUDA") == {CARD: AGREES}
    next_process(monkeypatch, "0")
    assert len(asked) == 1 and prove.report("CUDA") == {} and not prove._gates["CUDA"]
    next_process(monkeypatch, "always")
    assert len(asked) == 1 + len(AGREES)
    # The saved results of another build do not count for this build.
    monkeypatch.setattr(_native, "build_identity", lambda: "another")
    next_process(monkeypatch, "1")
    assert len(asked) == 1 + 2 * len(AGREES)
    with pytest.raises(ValueError, match="PEFT_EXT_PROVE is 'yes', wanted 0, 1 or always"):
        next_process(monkeypatch, "yes")


def test_a_cpu_path_has_results_of_its_own(fresh: None, asked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _native.STATE.isa
    next_process(monkeypatch, key="CPU")
    count = len(asked)
    next_process(monkeypatch, key="CPU")
    assert count == len(asked) == len(families("CPU"))
    try:
        _native.STATE.module.set_isa("scalar")
        next_process(monkeypatch, key="CPU")
        assert len(asked) == 2 * count and [place[-8:] for place in prove.report("CPU")] == ["(scalar)"]
    finally:
        _native.STATE.module.set_isa(before)


def test_the_build_s_identity_is_of_the_libraries_that_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    found = [_native.build_identity()]
    for name in ("_kernels.so", "_C.cpython-311-x86_64-linux-gnu.so", "_C_cuda.so"):
        (tmp_path / name).write_bytes(b"1")
        found.append(_native.build_identity())
    (tmp_path / "_kernels.so").write_bytes(b"12")
    found.append(_native.build_identity())
    assert len(set(found)) == 5 and _native.build_identity() == found[-1]


def test_two_processes_lose_no_result_of_one_another(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    held = prove._held
    monkeypatch.setattr(prove, "_held", lambda: (held(), time.sleep(0.1))[0])
    places = [prove.Place("CPU", f"model {number}", CPU, "scalar") for number in range(4)]
    threads = [threading.Thread(target=prove._save, args=(place, ["lora"])) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [prove._recall(place) for place in places] == [{"lora": ""}] * 4


@contextmanager
def audited(events: tuple[str, ...]) -> Iterator[list[tuple[str, str]]]:
    """Yields the names and first arguments of the events that Python reports to audit hooks in this thread."""
    seen: Optional[list[tuple[str, str]]] = []
    found, thread = seen, threading.get_ident()

    def hook(event: str, args: tuple) -> None:
        if seen is not None and event in events and threading.get_ident() == thread:
            seen.append((event, str(args[0])))

    sys.addaudithook(hook)  # Python can't remove the hook
    try:
        yield found
    finally:
        seen = None


def test_a_start_opens_the_file_of_saved_results_and_nothing_else(fresh: None, asked: list) -> None:
    place = prove._places("CPU")[0]
    prove._save(place, families("CPU"))
    with audited(("open", "subprocess.Popen", "os.posix_spawn", "os.system")) as events:
        assert len(prove._of_place(prove._places("CPU")[0], ["lora"], "1")) == len(families("CPU"))
    assert [event for event in events if event != ("open", "/proc/cpuinfo")] == [("open", str(prove._cache()))]
    assert len(events) <= 2 and not asked


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), RuntimeError("CUDA out of memory. peft_ext wanted 5 elements more")]
)
def test_no_memory_is_no_verdict(fresh: None, planted: dict, tmp_path: Path, error: Exception) -> None:
    def full(*_: Any) -> None:
        raise error

    planted["ia3_scale"] = full
    with pytest.raises(torch.OutOfMemoryError):
        prove.settle("CPU", ["ia3"])
    assert "ia3" in prove._gates["CPU"] and not prove.DROPPED and not list(tmp_path.iterdir())


def test_a_home_that_cannot_be_written_is_no_error(
    fresh: None, asked: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    prove.settle("CUDA")
    assert not prove._gates["CUDA"] and not prove.DROPPED


@pytest.mark.parametrize("text", ["[]", "{", '{"%s": 3, "%s | faults": []}', "\\x00"])
def test_a_damaged_file_is_no_result(fresh: None, asked: list, text: str) -> None:
    place = prove._places("CPU")[0]
    prove._cache().parent.mkdir()
    prove._cache().write_text(text.replace("%s", prove._key(place)))
    prove.settle("CPU", ["ia3"])
    assert asked == [(CPU, "ia3")] and prove._recall(place) == {"ia3": ""}


def test_a_card_without_kernels_is_known_at_once(fresh: None, asked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    for value in ("1", "0"):
        with pytest.warns(RuntimeWarning, match="lora, .*: their CUDA kernels .* capability is 7.5") as said:
            next_process(monkeypatch, value)
        assert len(said) == 1 and set(prove.report("CUDA")[CARD]) == set(AGREES)
    assert not asked


def test_a_machine_without_a_compiler_is_known_at_once(
    fresh: None, asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove.device_code, "missing", lambda: "the package cuda-bindings is missing")
    with pytest.warns(RuntimeWarning, match="lora, .*: their CUDA kernels .* cuda-bindings is missing") as said:
        prove.settle("CUDA", ["ia3"])
    assert len(said) == 1 and set(prove.report("CUDA")[CARD]) == set(AGREES)
    assert not asked


def test_the_card_in_use_is_the_first_and_of_its_kind_the_only_one(
    fresh: None, asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proof on another card would make every training process hold half a GB of the other card for a context."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    prove.settle("CUDA", ["lora"])
    assert asked == [(torch.device("cuda", 2), "lora")]


def test_a_family_is_proved_on_each_model_of_card(fresh: None, asked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    prove._save(prove.Place("CUDA", "card 0", torch.device("cuda", 0)), ["lora", "ia3"])
    prove._save(prove.Place("CUDA", "card 1", torch.device("cuda", 1)), ["lora"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    prove.settle("CUDA", ["nf4"])
    assert asked == [(torch.device("cuda", index), "nf4") for index in range(2)]
    assert "lora" not in prove._gates["CUDA"] and "ia3" in prove._gates["CUDA"]
    prove.settle("CUDA", ["ia3"])
    assert asked[2:] == [(torch.device("cuda", 1), "ia3")]


def test_what_faults_ends_one_process_alone(fresh: None, planted: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any) -> None:
        lost.append(1)
        raise RuntimeError("an illegal memory access was encountered")

    on_cpu, lost = prove.prove, []
    monkeypatch.setattr(prove, "prove", lambda _, wanted: on_cpu(CPU, wanted))
    planted["ia3_linear"] = fault
    monkeypatch.setattr(prove, "_wait", lambda _: fault() if lost else None)
    with pytest.raises(prove.KernelFault, match="ia3's kernels faulted on cpu, which no process survives: Runtime"):
        prove.settle("CUDA", ["ia3"])
    lost.clear()
    with pytest.warns(RuntimeWarning, match="ia3: .* they faulted in an earlier process: RuntimeError: an illegal"):
        next_process(monkeypatch)
    assert [family for family, why in prove.report("CUDA")[CARD].items() if why] == ["ia3"]
    with pytest.raises(prove.KernelFault):
        next_process(monkeypatch, "always")


def test_a_new_card_s_proof_says_what_it_proves_and_a_cpu_s_only_if_it_is_long(
    fresh: None, asked: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prove.settle("CPU")
    assert capsys.readouterr() == ("", "")
    prove.settle("CUDA", ["lora", "ia3"])
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "peft_ext: proving lora's kernels on a card, once (1 of 2)" and len(said) == 2
    next_process(monkeypatch)
    assert len(capsys.readouterr().err.splitlines()) == len(AGREES) - 2
    monkeypatch.setattr(prove, "QUIET_SECONDS", -1.0)
    next_process(monkeypatch, "always", "CPU")
    assert len(capsys.readouterr().err.splitlines()) == len(families("CPU"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    next_process(monkeypatch, "always")
    assert capsys.readouterr().err == ""
