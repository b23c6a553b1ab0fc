"""Tests untrusted NF4 states that are broken or absurd: as a state dict, in a layer, and as bitsandbytes' objects.

peft_ext must refuse a bad state with a one-line error that names the fault: no crash, no traceback of the command
line, no endless wait, no partial output and no wrong numbers. ``tests/fuzz`` searches for further bad files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")

from torch import nn

import peft_ext
from peft_ext import NF4Weight
from peft_ext.weights.nf4 import QUANT_STATE, read_nf4

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("files are read on the CPU")]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return peft_ext.nn.NF4Linear.from_linear(nn.Linear(64, 32)).state_dict()


def _bytes(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


def _about(state: dict[str, torch.Tensor], **changes: Any) -> dict[str, Any]:
    about = json.loads(bytes(state[QUANT_STATE].tolist()))
    return {**state, QUANT_STATE: _bytes(json.dumps({**about, **changes}).encode())}


def test_a_whole_state_is_read(state: dict[str, torch.Tensor]) -> None:
    layer = peft_ext.nn.NF4Linear(64, 32)
    layer.load_state_dict(state)
    assert torch.equal(read_nf4(state).dequantize(), layer.dequantize())


_STATES = (
    (b"", "is not JSON: Expecting value"),
    (b'{"quant_type": "nf4"', "is not JSON: Expecting ',' delimiter"),
    (b"\xff{}", "is not JSON: 'utf-8' codec can't decode byte 0xff in position 0"),
    (b"[" * 100_000, "is not JSON: nested too deep"),
    (b'{"blocksize": ' + b"1" * 5000 + b"}", "is not JSON: Exceeds the limit"),
    (b"[1]", "is a JSON list, wanted an object"),
    (b"null", "is a JSON NoneType, wanted an object"),
    (b" " * (1 << 20) + b"{}", f"has {(1 << 20) + 2} bytes, wanted at most {1 << 20}"),
)


@pytest.mark.parametrize(("data", "message"), _STATES, ids=range(len(_STATES)))
def test_quant_state_bytes(state: dict[str, torch.Tensor], data: bytes, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_nf4({**state, QUANT_STATE: _bytes(data)})
    assert str(caught.value).startswith(f"{QUANT_STATE} {message}")


@pytest.mark.parametrize(("held", "came"), [
    (None, "NoneType"), ([1], "list"), (torch.zeros(3), r"torch.float32 \(3,\) on cpu"),
    (torch.zeros(2, 2, dtype=torch.uint8), r"torch.uint8 \(2, 2\) on cpu"),
    (torch.zeros(3, dtype=torch.uint8, device="meta"), r"torch.uint8 \(3,\) on meta"),
])  # fmt: skip
def test_a_quant_state_that_is_no_bytes(state: dict[str, torch.Tensor], held: Any, came: str) -> None:
    with pytest.raises(ValueError, match=f"is {came}, wanted the bytes of JSON"):
        read_nf4({**state, QUANT_STATE: held})


_SIZES = re.escape(str(peft_ext.weights.nf4.BLOCKSIZES))


@pytest.mark.parametrize(("changes", "message"), [
    *(({"blocksize": size}, f"blocksize is {re.escape(repr(size))}, wanted one of {_SIZES}")
      for size in (0, -64, 65, "64", 64.7, float("inf"), None, True, [64])),
    ({"blocksize": 10**30}, "blocksize is 10+, wanted one of"),
    *(({"shape": shape}, f"shape is {re.escape(repr(shape))}, wanted a list of sizes") for shape in (None, 5, "x", {})),
    ({"shape": [-32, -64]}, r"shape is \(-32, -64\), wanted sizes of 0 or more"),
    ({"shape": [32.0, 64]}, r"shape is \[32.0, 64\], wanted integers"),
    ({"shape": [10**30, 1]}, "wanted sizes of 0 or more"),
    ({"shape": [2**32, 2**32]}, f"packed is torch.uint8 with 1024 elements, wanted torch.uint8 with {2**63}"),
    ({"shape": [32]}, r"packed is torch.uint8 with 1024 elements, wanted torch.uint8 with 16 for shape \(32,\)"),
    *(({"dtype": dtype}, f"dtype is {re.escape(repr(dtype))}, wanted one of float32, bfloat16")
      for dtype in ("int8", "evil", "nn", "load", 5, None, ["float32"])),
    *(({"quant_type": kind}, f"quant_type is {re.escape(repr(kind))}, wanted 'nf4'")
      for kind in ("fp4", None, ["nf4"])),
    *(({"nested_offset": offset}, f"nested_offset is {re.escape(repr(offset))}, wanted a finite number")
      for offset in ("x", None, float("inf"), float("nan"), 1e39, [1])),
    *(({"nested_blocksize": size}, f"nested_blocksize is {re.escape(repr(size))}, wanted 256")
      for size in (128, "256", None)),
])  # fmt: skip
def test_quant_state_fields(state: dict[str, torch.Tensor], changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        read_nf4(_about(state, **changes))


@pytest.mark.parametrize("name", ["weight", "weight.absmax", "weight.nested_absmax", "weight.nested_quant_map"])
def test_tensors_of_a_state(state: dict[str, torch.Tensor], name: str) -> None:
    tensor = state[name]
    for wrong, message in (
        (None, f"{name} is NoneType, wanted a Tensor"),
        (tensor.numpy(), f"{name} is ndarray, wanted a Tensor"),
        (tensor.to_sparse(), f"{name} has layout torch.sparse_coo, wanted torch.strided"),
        (tensor.flatten()[:-1], "elements, wanted"),
        (tensor.to(torch.complex64), "is torch.complex64 with"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            read_nf4({**state, name: wrong})
    if name.startswith("weight.nested"):
        with pytest.raises(ValueError, match=f"{name} is missing, wanted it because"):
            read_nf4({key: value for key, value in state.items() if key != name})


def test_wrong_bits_in_scales_and_tables_are_seen(state: dict[str, torch.Tensor]) -> None:
    for name, place, value, message in (
        ("weight.nested_absmax", 0, float("nan"), "nested_absmax has values that are not finite"),
        ("weight.nested_absmax", 0, -1.0, "nested_absmax has values below 0"),
        ("weight.nested_quant_map", 200, float("inf"), "nested_code has values that are not finite"),
        ("weight.nested_quant_map", 200, -0.9, "nested_code does not ascend"),
        ("weight.quant_map", 3, 0.5, "weight.quant_map is not NF4's table of codes"),
    ):
        held = state[name].clone()
        held[place] = value
        with pytest.raises(ValueError, match=message):
            read_nf4({**state, name: held})


def test_a_table_that_was_cast_is_still_nf4s(state: dict[str, torch.Tensor]) -> None:
    read_nf4({**state, "weight.quant_map": state["weight.quant_map"].bfloat16()})


@pytest.mark.parametrize(("data", "message"), _STATES, ids=range(len(_STATES)))
def test_the_layer_refuses_the_same(state: dict[str, torch.Tensor], data: bytes, message: str) -> None:
    layer = peft_ext.nn.NF4Linear(64, 32)
    before = layer.state_dict()
    with pytest.raises(RuntimeError, match=re.escape(f"NF4Linear '': {QUANT_STATE} {message}")):
        layer.load_state_dict({**state, QUANT_STATE: _bytes(data)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items() if name != "bias")


@pytest.mark.parametrize(("name", "wrong", "message"), [
    ("weight", None, "weight is NoneType, wanted a Tensor"),
    ("weight", torch.zeros(1024, 1, dtype=torch.uint8).to_sparse(), "weight has layout torch.sparse_coo, wanted"),
    ("weight.nested_absmax", torch.full((1,), float("nan")), "nested_absmax has values that are not finite"),
    ("weight.quant_map", torch.zeros(16), "weight.quant_map is not NF4's table of codes"),
    ("bias", torch.zeros(31), r"bias has shape \(31,\), wanted \(32,\)"),
    ("bias", torch.zeros(32, dtype=torch.int64), "bias is torch.int64 with layout torch.strided, wanted floats with"),
    ("bias", torch.zeros(32, device="meta"), "bias is on the meta device, where there is no data"),
])  # fmt: skip
def test_the_layer_refuses_tensors(state: dict[str, torch.Tensor], name: str, wrong: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        peft_ext.nn.NF4Linear(64, 32).load_state_dict({**state, name: wrong})


@pytest.fixture
def params4bit():
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    return peft_ext.ops.nf4_quantize(torch.randn(32, 64), double_quant=True).to_bitsandbytes()


@pytest.mark.parametrize(("change", "kind", "message"), [
    (lambda q: setattr(q, "blocksize", 48), ValueError, "NF4Weight: blocksize is 48, wanted one of"),
    (lambda q: setattr(q, "shape", (-32, -64)), ValueError, r"NF4Weight: shape is \(-32, -64\), wanted sizes of"),
    (lambda q: setattr(q, "shape", None), TypeError, "NF4Weight: shape is None, wanted integers"),
    (lambda q: setattr(q, "dtype", torch.int8), TypeError, "NF4Weight: dtype is torch.int8, wanted one of"),
    (lambda q: setattr(q, "absmax", None), TypeError, "NF4Weight: absmax is NoneType, wanted a Tensor"),
    (lambda q: setattr(q, "offset", None), TypeError, "NF4Weight: nested.offset is NoneType, wanted a Tensor"),
    (lambda q: setattr(q, "state2", None), ValueError, "from_bitsandbytes: the nested blocksize is None, wanted 256"),
    (lambda q: setattr(q, "code", torch.zeros(16)), ValueError, "the quant_state's table of codes is not NF4's"),
    (lambda q: q.state2.absmax.fill_(float("nan")), ValueError, "nested_absmax has values that are not finite"),
])  # fmt: skip
def test_from_bitsandbytes(params4bit, change: Callable, kind: type[Exception], message: str) -> None:
    change(params4bit.quant_state)
    with pytest.raises(kind, match=message):
        NF4Weight.from_bitsandbytes(params4bit)


def test_from_bitsandbytes_of_what_is_none(params4bit) -> None:
    with pytest.raises(TypeError, match="from_bitsandbytes: weight is NoneType, wanted a Tensor"):
        NF4Weight.from_bitsandbytes(None, params4bit.quant_state)
    with pytest.raises(ValueError, match="from_bitsandbytes: quant_type is None, wanted 'nf4'"):
        NF4Weight.from_bitsandbytes(params4bit, "nf4")
