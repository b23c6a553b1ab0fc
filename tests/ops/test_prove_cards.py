"""Tests of the proof of kernels with several cards, after earlier faults, with full memory, and in process groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_ext import _native
from peft_ext.files import cache_folder
from peft_ext.ops import prove

if _native.STATE.module is None:
    pytest.skip("the native library is not built", allow_module_level=True)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "current", "wanted"),
    [
        ([(9, 0), (6, 1)], 0, ["card 0"]),  # an old card of a display
        ([(9, 0), (6, 1)], 1, ["card 1", "card 0"]),  # the work is on the old card
        ([(6, 1), (8, 0), (9, 0)], 2, ["card 2", "card 1"]),
        ([(6, 1)], 0, ["card 0"]),
    ],
)
def test_an_old_card_beside_the_current_one_is_left_out(capabilities, current, wanted, monkeypatch):
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: len(capabilities),
        "current_device": lambda: current,
        "get_device_name": lambda index: f"card {index}",
        "get_device_capability": lambda index: capabilities[index],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert [place.model for place in prove._places("CUDA")] == wanted


@pytest.mark.parametrize(
    "text",
    [  # of device_empty and of raise_reason in csrc/cuda
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
