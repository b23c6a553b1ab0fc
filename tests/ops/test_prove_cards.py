"""Tests of the proof of kernels with several cards, after earlier faults, with full memory, and in process groups."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from peft_ext import _native
from peft_ext.files import cache_folder
from peft_ext.ops import cards, prove

if _native.STATE.module is None:
    pytest.skip("the native library is not built", allow_module_level=True)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "current", "wanted"),
    [
        ([(9, 0), (6, 1)], 0, ["card 0"]),  # An old card drives the display.
        ([(9, 0), (6, 1)], 1, ["card 0"]),  # The old card is the current card.
        ([(6, 1), (8, 0), (9, 0)], 2, ["card 2", "card 1"]),
        ([(6, 1)], 0, ["card 0"]),
        ([(6, 1), (7, 5)], 1, ["card 1", "card 0"]),
    ],
)
def test_an_old_card_decides_only_if_there_is_no_newer_one(capabilities, current, wanted, monkeypatch):
    have_cards(monkeypatch, capabilities, current)
    assert [place.model for place in prove._places("CUDA")] == wanted
    mixed = max(capabilities) >= (8, 0)
    old = [index for index, capability in enumerate(capabilities) if mixed and capability < (8, 0)]
    assert sorted(cards.OLD) == old
    for index in range(len(capabilities)):
        why = cards.why_old(torch.device("cuda", index))
        assert (f"the reference runs on cuda:{index}, an old GPU beside a newer one" in (why or "")) == (index in old)
    assert (cards.why_old(torch.device("cuda")) is not None) == (current in old) and cards.why_old(CPU) is None


def have_cards(monkeypatch, capabilities, current):
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: len(capabilities),
        "current_device": lambda: current,
        "get_device_name": lambda index: f"card {index}",
        "get_device_capability": lambda index: capabilities[index],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cards, "OLD", {})


@pytest.fixture
def two_cards(monkeypatch):
    """Simulates a process with a new and an old card, whose kernels return the texts "kernel" and "reference".

    Returns a function that settles a family and calls an operator by PyTorch's registration for the key CUDA.
    """
    have_cards(monkeypatch, [(9, 0), (6, 1)], 1)
    registered = {}

    class Library:
        def __init__(self, *_: object) -> None: ...

        def impl(self, name: str, function: object, key: str, **_: object) -> None:
            registered[name] = function

    class OnCard(torch.Tensor):
        is_cuda = True

    def on(index: int) -> torch.Tensor:
        tensor = torch.ones(3).as_subclass(OnCard)
        tensor.__dict__["card"] = index
        return tensor

    OnCard.device = property(lambda self: torch.device("cuda", self.__dict__["card"]))
    monkeypatch.setenv("PEFT_EXT_PROVE", "0")
    monkeypatch.delenv("PEFT_EXT_REQUIRE", raising=False)
    monkeypatch.setattr(prove, "_gates", {"CPU": {}, "CUDA": dict.fromkeys(prove.families("CUDA"))})
    monkeypatch.setattr(prove, "_found", {key: {} for key in prove.KEYS})
    monkeypatch.setattr(prove, "_overriding", [])
    monkeypatch.setattr(prove, "DROPPED", {})
    monkeypatch.setattr(prove.device_code, "missing", lambda: None)
    monkeypatch.setattr(torch.library, "Library", Library)
    monkeypatch.setattr(prove, "native_op", lambda key, name: lambda *args: "kernel")
    operators = {
        name: dataclasses.replace(op, reference=lambda *_: "reference") for name, op in prove.OPERATORS.items()
    }
    monkeypatch.setattr(prove, "OPERATORS", operators)

    def called(name: str, index: int) -> str:
        gate = prove._gate("CUDA", prove.OPERATORS[name].family, name)
        first = gate(on(index), [torch.ones(1), on(index)])
        assert registered[name]([torch.ones(1), on(index)], 3) == first
        return first

    return called


@pytest.mark.parametrize("name", ["ia3_scale", "lora_linear"])
def test_an_old_card_beside_a_newer_one_runs_the_reference(name, two_cards, monkeypatch):
    for _ in range(2):
        assert [two_cards(name, index) for index in (0, 1)] == ["kernel", "reference"]
    assert not prove.DROPPED and not any(prove.report("CUDA").values())
    with pytest.warns(RuntimeWarning, match="it is off"):
        prove.drop([prove.OPERATORS[name].family], "it is off")
    assert prove.DROPPED["CUDA", name] == "it is off"


def test_a_format_that_fails_leaves_the_old_card_on_the_reference(two_cards):
    with pytest.warns(RuntimeWarning, match="it is off"):
        prove.drop([next(iter(prove.format_proofs.FAMILIES))], "it is off")
    assert [two_cards("lora_linear", index) for index in (0, 1)] == ["kernel", "reference"]


def test_a_rank_on_an_old_card_makes_all_ranks_run_the_reference(two_cards, monkeypatch):
    sent = []
    monkeypatch.setenv("PEFT_EXT_PROVE", "1")
    monkeypatch.setattr(prove, "_world", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(prove, "_exchange", lambda own: sent.append(own) or [])
    monkeypatch.setattr(prove, "prove", lambda _, wanted, **__: dict.fromkeys(wanted, ""))
    monkeypatch.setattr(prove, "_of_place", lambda place, wanted, asked: dict.fromkeys(wanted, ""))
    prove.agree(lambda: prove.settle("CUDA"))
    assert sent[0]["CUDA"]["lora"] == "its compute capability is 6.1, wanted 8.0 or more" and not prove.DROPPED
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    prove.agree(lambda: prove.settle("CUDA"))
    assert sent[1]["CUDA"] == {}


def test_machines_without_an_old_card_pay_nothing(two_cards, monkeypatch):
    have_cards(monkeypatch, [(9, 0), (8, 0)], 1)
    with pytest.raises(KeyError):  # nothing is registered in front of the kernel
        two_cards("ia3_scale", 1)


@pytest.mark.parametrize(
    "text",
    [  # messages of device_empty and of raise_reason in csrc/cuda
        "CUDA out of memory. peft_ext wanted 9 bytes more",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)` (in a call of peft_ext)",
        'CUDA out of memory. peft_ext: torch_call_dispatcher( "aten::contiguous", "") API call failed at ops.h',
    ],
)
def test_a_lack_of_memory_is_no_fault_of_the_kernels(text, monkeypatch):
    def lacks(*_: object) -> object:
        raise RuntimeError(text)

    monkeypatch.setattr(prove, "native_op", lambda *_: lacks)
    with pytest.raises(torch.OutOfMemoryError):
        prove.prove(CPU, ["ia3"])


def test_a_fault_of_other_kernels_is_not_a_family_s(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PEFT_EXT_PROVE", raising=False)

    def lost(_: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(prove, "_wait", lost)
    place = prove.Place("CPU", "a card", CPU)
    with pytest.raises(RuntimeError, match="^CUDA error") as raised:
        prove._of_place(place, ["ia3"], "1")
    assert not isinstance(raised.value, prove.KernelFault)
    assert not (tmp_path / "peft_ext/proved.json").exists()


def test_an_exchange_never_reads_an_earlier_group_s_values(monkeypatch):
    """A process group that is made again may get the store of the group before."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(prove, "_world", lambda: 1)
    first, second = {"CPU": {"ia3": "wrong"}, "CUDA": {}}, {"CPU": {}, "CUDA": {}}
    assert prove._exchange(first) == [first]
    assert prove._exchange(second) == [second]


def test_a_user_without_a_home_keeps_nothing(monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    place = prove.Place("CPU", "a CPU", CPU, "scalar")
    prove._save(place, ["ia3"])
    assert prove._recall(place) == {}
    with pytest.raises(OSError):
        cache_folder().mkdir(parents=True)
