"""Tests that CUDA kernels are proved at their first use on a card, and that wrong kernels are dropped.

The emulator stands in for the card.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Optional

import pytest
import torch
from cuda_kernels import emulated_ops

from peft_ext import _native, ops
from peft_ext.integrations.adapter_layers import reasons
from peft_ext.ops import prove
from peft_ext.ops.library import OPERATORS, cuda_families

pytestmark = pytest.mark.slow  # the emulated library has to be built

CARD = "a card"


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., Any]]:
    """Returns a dict of replacements of operators' kernels, by name; all other operators run emulated CUDA kernels."""
    kernels, planted = emulated_ops(), {}
    monkeypatch.setattr(prove, "_native_op", lambda name: planted.get(name) or getattr(kernels, name))
    return planted


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    """Simulates a process that has proved no kernel, with a card and an own cache, and restores dropped kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PEFT_EXT_PROVE", raising=False)
    for name, value in {"_done": False, "_found": {}, "_overriding": []}.items():
        monkeypatch.setattr(prove, name, value)
    monkeypatch.setattr(_native.STATE, "cuda_loaded", True)
    for name, value in {
        "is_available": True, "device_count": 1, "get_device_name": CARD, "get_device_capability": (9, 0),
        "current_device": 0, "is_current_stream_capturing": False,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    before = dict(prove.DROPPED)
    yield
    for library in prove._overriding:
        library._destroy()
    prove.DROPPED.clear()
    prove.DROPPED.update(before)


def test_the_kernels_agree(emulated: dict) -> None:
    assert prove.prove(torch.device("cpu"), timed=False) == dict.fromkeys(cuda_families(), "")


def test_so_do_the_cpu_s() -> None:
    assert prove.prove(torch.device("cpu"), timed=False) == dict.fromkeys(cuda_families(), "")


@pytest.mark.parametrize("family", cuda_families())
def test_what_is_timed_is_a_call_that_agrees(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(prove, "_seconds", lambda calls, *_: asked.append(1) or [1.0] * len(calls))
    assert prove._prove_family(family, torch.device("cpu"), True) == "" and asked == [1]


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta"), torch.enable_grad])
def test_whatever_the_caller_has_set(mode: Callable[[], Any]) -> None:
    with mode():
        found = prove.prove(torch.device("cpu"), timed=False)
    assert found == dict.fromkeys(cuda_families(), "")


def test_products_are_in_full_precision_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(prove, "_prove_family", lambda *_: seen.append(torch.backends.cuda.matmul.fp32_precision) or "")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        prove.prove(torch.device("cpu"))
        assert set(seen) == {"ieee"} and torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_every_operator_with_a_cuda_kernel_is_called() -> None:
    called = {
        name
        for family in cuda_families()
        for name, _ in prove.calls(family, torch.device("cpu"), torch.float32, prove.SMALL)
    }
    assert called == {op.name for op in OPERATORS.values() if op.cuda}


def no_mask(*arguments: Any) -> Any:
    """Computes lora_linear_backward without the dropout mask."""
    *rest, p, _seed, needs = arguments
    return torch.ops.peft_ext.lora_linear_backward(*rest, p, None, needs)


def other_codes(weight: torch.Tensor, blocksize: int) -> Any:
    packed, absmax = torch.ops.peft_ext.nf4_quantize(weight, blocksize)
    return packed ^ 1, absmax


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name", "fault", "says"),
    [
        ("lora", "lora_linear_backward", no_mask, "lora_linear_backward in float32 is off by .* of result 0"),
        ("nf4", "nf4_quantize", other_codes, "nf4_quantize .*differs"),
        ("ia3", "ia3_scale", lambda x, scale: x * float("nan"), "ia3_scale .* is off by nan"),
        ("dora", "dora_linear", lambda *_: 1 / 0, "ZeroDivisionError: division by zero"),
        ("bottleneck", "bottleneck_adapter", lambda x, *_: (x[:1], x[:1]), r"gives .* \(1, 192\) as result 0"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found_in_its_family_alone(
    emulated: dict, family: str, name: str, fault: Callable, says: str
) -> None:
    emulated[name] = fault
    found = prove.prove(torch.device("cpu"), timed=False)
    wrong = {family: why for family, why in found.items() if why}
    assert list(wrong) == [family]
    assert re.search(says, wrong[family])


def test_a_slow_family_is_dropped(emulated: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = OPERATORS["ia3_linear"].reference
    monkeypatch.setattr(prove, "_seconds", lambda calls, *_: [1.0 if call is plain else 1.3 for call in calls])
    assert prove._prove_family("ia3", torch.device("cpu"), True) == "ia3_linear takes 1.3 times the reference's time"
    assert prove._prove_family("ia3", torch.device("cpu"), False) == ""


def test_what_is_wrong_is_dropped_once_and_said(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    wrong = dict.fromkeys(cuda_families(), "") | {"lora": "it is off"}
    monkeypatch.setattr(prove, "prove", lambda device, **_: asked.append(device) or wrong)
    monkeypatch.setattr(reasons, "KERNELS", {op: {"cuda": True, "cpu": True} for op in reasons.KERNELS})
    with pytest.warns(RuntimeWarning, match="lora: its CUDA kernels were dropped on a card: it is off. The reference"):
        assert reasons.kernel_reason("lora_linear", "cuda") == "its CUDA kernels were dropped on a card: it is off"
    assert reasons.kernel_reason("ia3_linear", "cuda") is None
    assert reasons.kernel_reason("lora_linear", "cpu") is None
    assert reasons.kernel_reason("grouped_lora_linear", "cuda")  # grouped_lora_linear uses lora_linear's backward
    assert len(asked) == 1 and prove.report() == {CARD: wrong}


def next_process(monkeypatch: pytest.MonkeyPatch, asked: Optional[str] = None) -> None:
    monkeypatch.setattr(prove, "_done", False)
    monkeypatch.setattr(prove, "_found", {})
    if asked is not None:
        monkeypatch.setenv("PEFT_EXT_PROVE", asked)
    prove.first_use()


def test_agreement_is_remembered_and_nothing_else(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    agrees = dict.fromkeys(cuda_families(), "")
    asked: list[torch.device] = []
    found = [agrees | {"dora": "slower today"}, agrees]
    monkeypatch.setattr(prove, "prove", lambda device, **_: asked.append(device) or found.pop(0))
    with pytest.warns(RuntimeWarning, match="dora: .* slower today"):
        prove.first_use()
    next_process(monkeypatch)
    assert len(asked) == 2 and prove.report() == {CARD: agrees}
    next_process(monkeypatch)
    assert len(asked) == 2 and prove.report() == {CARD: agrees}
    next_process(monkeypatch, "0")
    assert len(asked) == 2 and prove.report() == {}
    found.append(agrees)
    next_process(monkeypatch, "always")
    assert len(asked) == 3
    # The stored result of another build's proof does not count for this build.
    monkeypatch.setattr(prove, "__version__", "0.0.0")
    found.append(agrees)
    next_process(monkeypatch, "1")
    assert len(asked) == 4
    with pytest.raises(ValueError, match="PEFT_EXT_PROVE is 'yes', wanted 0, 1 or always"):
        next_process(monkeypatch, "yes")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), RuntimeError("CUDA out of memory. peft_ext wanted 5 elements more")]
)
def test_no_memory_is_no_verdict(
    fresh: None, emulated: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, error: Exception
) -> None:
    def full(*_: Any) -> None:
        raise error

    emulated["ia3_scale"] = full
    on_cpu = prove.prove
    monkeypatch.setattr(prove, "prove", lambda _, **__: on_cpu(torch.device("cpu"), timed=False))
    prove.first_use()
    assert prove.report() == {} and not list(tmp_path.iterdir()) and "ia3_scale" not in prove.DROPPED


def test_a_dropped_family_runs_the_reference(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    plain = OPERATORS["lora_linear"].reference
    counted = replace(OPERATORS["lora_linear"], reference=lambda *a: called.append(1) or plain(*a))
    monkeypatch.setitem(OPERATORS, "lora_linear", counted)
    x, weight, a, b = torch.randn(5, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    ours = ops.lora_linear(x, weight, a, b)
    assert not called
    with pytest.warns(RuntimeWarning, match="lora: for a test"):
        prove.drop(["lora"], "for a test", "CPU")
    torch.testing.assert_close(ops.lora_linear(x, weight, a, b), ours)
    assert called == [1]


def test_nothing_is_proved_with_fake_tensors_or_under_capture(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "prove", lambda *_, **__: pytest.fail("proved"))
    with torch._subclasses.FakeTensorMode():
        prove.first_use()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    prove.first_use()
    assert not prove._done


def test_a_home_that_cannot_be_written_is_no_error(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(prove, "prove", lambda *_, **__: dict.fromkeys(cuda_families(), ""))
    prove.first_use()
    assert prove._done and not prove.DROPPED


def test_a_card_without_kernels_is_known_at_once(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "prove", lambda *_, **__: pytest.fail("proved"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    for asked in ("1", "0"):
        with pytest.warns(RuntimeWarning, match="nf4, .*lora, .*: their CUDA kernels .* capability is 7.5") as said:
            next_process(monkeypatch, asked)
        assert len(said) == 1 and set(prove.report()[CARD]) == set(cuda_families())


def test_the_card_in_use_is_the_first_and_of_its_kind_the_only_one(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proof on another card would make every training process hold half a GB of the other card for a context."""
    proved: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(
        prove, "prove", lambda device, **_: proved.append(device.index) or dict.fromkeys(cuda_families(), "")
    )
    prove.first_use()
    assert proved == [2]
    entered: list[int] = []
    monkeypatch.setattr(torch.cuda, "device", lambda index: entered.append(index) or torch.no_grad())
    next_process(monkeypatch)
    assert proved == [2] and not entered


@pytest.mark.slow
def test_what_faults_ends_one_process_alone(fresh: None, emulated: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def lost(_: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    on_cpu = prove.prove
    monkeypatch.setattr(prove, "prove", lambda _, faulted: on_cpu(torch.device("cpu"), timed=False, faulted=faulted))
    emulated["ia3_linear"] = fault
    monkeypatch.setattr(prove, "_wait", lost)
    with pytest.raises(prove.KernelFault, match="ia3's kernels faulted on cpu, which no process survives: Runtime"):
        prove.first_use()
    with pytest.warns(RuntimeWarning, match="ia3: .* they faulted in an earlier process: RuntimeError: an illegal"):
        next_process(monkeypatch)
    assert [family for family, why in prove.report()[CARD].items() if why] == ["ia3"]
    with pytest.raises(prove.KernelFault):
        next_process(monkeypatch, "always")
