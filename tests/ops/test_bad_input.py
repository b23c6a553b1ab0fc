"""Tests wrong arguments one by one: the error must have the operator, the argument, the given value and the wanted
value.

The tables below have the error of each wrong argument. ``op_db.CASES`` has more errors of single operators.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peft_ext
from peft_ext import NestedAbsmax, NF4Weight, ops, reference
from peft_ext.ops import checks

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("the checks are the same on every device")]

T, K, N, R, M = 5, 64, 96, 4, 8
FLOATS = "float32, bfloat16, float16, float64"


def _calls() -> dict[str, tuple[Callable, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b = (torch.randn(*s, generator=generator) for s in ((T, K), (N, K), (R, K), (N, R)))
    down, up = torch.randn(M, K, generator=generator), torch.randn(K, M, generator=generator)
    nf4, norm, bias = reference.nf4_quantize(weight), weight.norm(dim=1), torch.zeros(N)
    lora = {"lora_A": a, "lora_B": b}
    heads = torch.randn(2, 3, T, 8, generator=generator)
    return {
        "nf4_quantize": (ops.nf4_quantize, {"weight": weight}),
        "nf4_dequantize": (ops.nf4_dequantize, {"nf4": nf4}),
        "nf4_linear": (ops.nf4_linear, {"x": x, "nf4": nf4, "bias": bias}),
        "nf4_merge": (ops.nf4_merge, {"nf4": nf4, **lora, "row_scale": norm}),
        "lora_linear": (
            ops.lora_linear, {"x": x, "weight": weight, **lora, "bias": bias, "rank_scale": torch.ones(R)}
        ),
        "lora_residual": (
            ops.lora_residual, {"x": x, "residual": torch.zeros(T, N), **lora, "rank_scale": torch.ones(R)}
        ),
        "dora_linear": (
            ops.dora_linear, {"x": x, "weight": weight, **lora, "magnitude": norm, "bias": bias, "weight_norm": norm}
        ),
        "dora_weight_norm": (ops.dora_weight_norm, {"weight": weight, **lora}),
        "ia3_linear": (ops.ia3_linear, {"x": x, "weight": weight, "ia3_l": torch.ones(N), "bias": bias}),
        "ia3_scale": (ops.ia3_scale, {"x": x, "ia3_l": torch.ones(K)}),
        "bottleneck_adapter": (
            ops.bottleneck_adapter,
            {"x": x, "down_weight": down, "down_bias": torch.zeros(M), "up_weight": up, "up_bias": torch.zeros(K),
             "residual": x},
        ),
        "rotary_embedding": (ops.rotary_embedding, {"q": heads, "k": heads, "cos": heads[:, 0], "sin": heads[:, 0]}),
        "gated_activation": (ops.gated_activation, {"gate": x, "up": x, "activation": "silu"}),
        "gated_lora_linear": (
            ops.gated_lora_linear,
            {"gate": x, "up": x, "activation": "silu", "weight": weight, **lora, "bias": bias,
             "rank_scale": torch.ones(R)},
        ),
        "activation": (ops.activation, {"x": x, "activation": "silu"}),
        "rms_norm": (ops.rms_norm, {"x": x, "weight": torch.ones(K), "eps": 1e-6}),
        "layer_norm": (ops.layer_norm, {"x": x, "weight": torch.ones(K), "bias": torch.zeros(K), "eps": 1e-5}),
        "grouped_lora_linear": (
            ops.grouped_lora_linear,
            {"x": x.expand(2, T, K), "weight": weight, "lora_A": [a, a], "lora_B": [b, b], "bias": bias,
             "adapters": [0, 1]},
        ),
    }  # fmt: skip


CALLS = _calls()
_OPTIONAL = ("bias", "row_scale", "rank_scale", "weight_norm", "down_bias", "up_bias", "residual", "up")
_NORMS = ("rms_norm", "layer_norm")  # operators whose weight may be None and may be trained

# An operator compares the devices of its arguments with the device of x, except for the arguments in _BESIDE: _BESIDE
# maps such an argument to the argument with whose device it is compared. _FIRST maps an operator to the argument whose
# device is compared first.
_BESIDE = {"lora_A": "weight", "lora_B": "weight", "up": "gate", "k": "q", "cos": "q", "sin": "q"}
_ALONE = ("nf4_quantize", "activation")  # operators with a single tensor, whose device is compared with no other
_FIRST = {"lora_residual": "residual", "ia3_scale": "ia3_l", "bottleneck_adapter": "down_weight"}


def _nested(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor([tensor, tensor])


# Values that operators refuse in place of a tensor: a function that makes the value from a tensor, and the type of the
# error and its text after "op: argument ".
_KINDS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "None": (lambda t: None, TypeError, "is NoneType, wanted a Tensor"),
    "list": (lambda t: t.tolist(), TypeError, "is list, wanted a Tensor"),
    "numpy": (lambda t: t.numpy(), TypeError, "is ndarray, wanted a Tensor"),
    "number": (lambda t: 1.0, TypeError, "is float, wanted a Tensor"),
    "integers": (lambda t: t.long(), TypeError, f"is int64, wanted one of {FLOATS}"),
    "bools": (lambda t: t > 0, TypeError, f"is bool, wanted one of {FLOATS}"),
    "complex": (lambda t: t.to(torch.complex64), TypeError, f"is complex64, wanted one of {FLOATS}"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), TypeError, f"is float8_e4m3fn, wanted one of {FLOATS}"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8), TypeError,
                  f"is quint8, wanted one of {FLOATS}"),
    "sparse": (lambda t: t.to_sparse(), TypeError, "has layout torch.sparse_coo, wanted torch.strided"),
    "mkldnn": (lambda t: t.to_mkldnn(), TypeError, "has layout torch._mkldnn, wanted torch.strided"),
    "nested": (_nested, TypeError, "is a nested tensor, wanted torch.strided"),
    "jagged": (lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged), TypeError,
               "is a nested tensor, wanted torch.strided"),
    "meta": (lambda t: t.to("meta"), ValueError, ""),
}  # fmt: skip


def _tensors(wanted: type = Tensor) -> Iterator[Any]:
    for op, (_, arguments) in CALLS.items():
        for name, value in arguments.items():
            first = value[0] if isinstance(value, list) else value
            if isinstance(first, wanted):
                yield pytest.param(op, name, id=f"{op}-{name}")


@contextlib.contextmanager
def exactly(kind: type[Exception], message: str) -> Iterator[None]:
    """Asserts that the block raises an error of exactly this type and with exactly this message."""
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind and str(caught.value) == message


def _refused(op: str, wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    function, arguments = CALLS[op]
    with exactly(kind, f"{op}: {message}"):
        function(**{**arguments, **wrong})


@pytest.mark.parametrize(("op", "name"), list(_tensors()))
def test_what_is_no_tensor_that_the_operators_take(op: str, name: str) -> None:
    value = CALLS[op][1][name]
    for about, (make, kind, text) in _KINDS.items():
        if (about == "None" and name in _OPTIONAL) or (about == "meta" and op in _ALONE):
            continue
        if about == "None" and name == "weight" and op in _NORMS:
            continue
        if about == "jagged" and value[0].dim() == 0:
            continue
        wrong = [make(value[0]), *value[1:]] if isinstance(value, list) else make(value)
        message = f"{name} {text}"
        if about == "meta":
            beside = _BESIDE.get(name, "act(gate) * up" if op == "gated_lora_linear" else "x")
            beside = "x" if op == "lora_residual" else beside
            message = f"{name} is on meta, {beside} is on cpu"
            if name in ("gate", "q"):
                message = f"{'up' if name == 'gate' else 'k'} is on cpu, {name} is on meta"
            elif name == "x" or (op == "dora_weight_norm" and name == "weight"):
                message = f"{_FIRST.get(op, 'lora_A' if name == 'weight' else 'weight')} is on cpu, {name} is on meta"
        _refused(op, {name: wrong}, kind, message)


@pytest.mark.parametrize(("op", "name"), list(_tensors(NF4Weight)))
def test_what_is_no_nf4_weight(op: str, name: str) -> None:
    for wrong in (None, torch.zeros(N, K), {}, 1):
        _refused(op, {name: wrong}, TypeError, f"{name} is {type(wrong).__name__}, wanted an NF4Weight")


@pytest.mark.parametrize("op", [op for op, (_, arguments) in CALLS.items() if "x" in arguments and op != "ia3_scale"])
def test_under_autocast_the_errors_are_the_same(op: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name in ("x", "weight", "bias", "residual"):
            if name in CALLS[op][1]:
                _refused(op, {name: [1.0]}, TypeError, f"{name} is list, wanted a Tensor")


_SHAPES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("nf4_linear", {"x": torch.zeros(())}, f"x has shape (), wanted [..., {K}] for weight ({N}, {K})"),
    ("nf4_linear", {"x": torch.zeros(K, T)}, f"x has shape ({K}, {T}), wanted [..., {K}] for weight ({N}, {K})"),
    ("nf4_linear", {"bias": torch.zeros(N, 1)}, f"bias has shape ({N}, 1), wanted ({N},)"),
    ("nf4_merge", {"lora_A": torch.zeros(K)}, f"lora_A has shape ({K},), wanted 2 dimensions"),
    ("nf4_merge", {"row_scale": torch.zeros(K)}, f"row_scale has shape ({K},), wanted ({N},)"),
    ("lora_linear", {"weight": torch.zeros(K)}, f"weight has shape ({K},), wanted [N, K]"),
    ("lora_linear", {"weight": torch.zeros(())}, "weight has shape (), wanted [N, K]"),
    ("lora_linear", {"lora_B": torch.zeros(1, N, R)}, f"lora_B has shape (1, {N}, {R}), wanted 2 dimensions"),
    ("lora_linear", {"rank_scale": torch.zeros(())}, f"rank_scale has shape (), wanted ({R},) or ({R}, 1)"),
    ("lora_residual", {"residual": torch.zeros(N)}, f"residual has shape ({N},), wanted ({T}, {N})"),
    ("lora_residual", {"x": torch.zeros(())}, "x has shape (), wanted [..., K]"),
    ("lora_residual", {"lora_B": torch.zeros(())}, f"residual has shape ({T}, {N}), wanted ({T}, 0)"),
    ("dora_linear", {"magnitude": torch.zeros(1, N)}, f"magnitude has shape (1, {N}), wanted ({N},)"),
    ("dora_weight_norm", {"lora_B": torch.zeros(R, N)}, f"lora_B has shape ({R}, {N}), wanted [{N}, R]"),
    ("ia3_linear", {"ia3_l": torch.zeros(N, 1, 1)}, f"ia3_l has shape ({N}, 1, 1), wanted ({N},) or ({N}, 1)"),
    ("bottleneck_adapter", {"down_weight": torch.zeros(M)}, f"down_weight has shape ({M},), wanted [M, K]"),
    ("bottleneck_adapter", {"up_weight": torch.zeros(K, M + 1)},
     f"up_weight has shape ({K}, {M + 1}), wanted [N, {M}] for down_weight ({M}, {K})"),
    ("bottleneck_adapter", {"down_weight": torch.zeros(0, K), "up_weight": torch.zeros(K, 0)},
     f"down_weight has shape (0, {K}), wanted at least 1 row and 1 column"),
    ("bottleneck_adapter", {"down_bias": torch.zeros(M, 1)}, f"down_bias has shape ({M}, 1), wanted ({M},)"),
    ("bottleneck_adapter", {"residual": torch.zeros(T, 1)}, f"residual has shape ({T}, 1), wanted ({T}, {K})"),
    ("grouped_lora_linear", {"x": torch.zeros(K)}, f"x has shape ({K},), wanted [samples, ..., K]"),
    ("grouped_lora_linear", {"lora_A": [torch.zeros(R, 3)] * 2}, f"lora_A has shape ({R}, 3), wanted [R, {K}]"),
)  # fmt: skip


@pytest.mark.parametrize(("op", "wrong", "message"), _SHAPES)
def test_shapes(op: str, wrong: dict[str, Any], message: str) -> None:
    _refused(op, wrong, ValueError, message)


_FINITE, _DROPOUT = "wanted a finite number", "wanted 0 <= p < 1"
_WRONG_SCALES = (float("nan"), float("inf"), -float("inf"), "1", None, True, 1j, [1.0], 10**400)


@pytest.mark.parametrize("op", ["nf4_merge", "lora_linear", "lora_residual", "dora_linear", "dora_weight_norm"])
def test_scaling_and_dropout(op: str) -> None:
    for wrong in _WRONG_SCALES:
        _refused(op, {"scaling": wrong}, ValueError, f"scaling is {wrong!r}, {_FINITE}")
    if op in ("nf4_merge", "dora_weight_norm"):
        return
    for wrong in (-1e-9, -1, 1, 1.0, 2, float("nan"), float("inf"), "0", None, True, 10**400):
        _refused(op, {"dropout_p": wrong}, ValueError, f"dropout_p is {wrong!r}, {_DROPOUT}")


def test_a_scale_may_be_a_tensor_nowhere() -> None:
    _refused("lora_linear", {"scaling": torch.ones(())}, ValueError, f"scaling is tensor(1.), {_FINITE}")
    _refused("bottleneck_adapter", {"scale": True}, ValueError, f"scale is True, {_FINITE}")


_SIZES = str(peft_ext.weights.nf4.BLOCKSIZES)
_LIST = "wanted a list, one element for each adapter"
_META_SEED = torch.zeros(2, dtype=torch.int64, device="meta")
_OTHERS: tuple[tuple[str, dict[str, Any], type[Exception], str], ...] = (
    *(("nf4_quantize", {"blocksize": size}, ValueError, f"blocksize is {size}, wanted one of {_SIZES}")
      for size in (0, -64, 48, 8192, 64.0, True, None, [64], 2**70)),
    *((op, {"dtype": dtype}, TypeError,
       f"dtype is {dtype}, wanted one of torch.float32, torch.bfloat16, torch.float16, torch.float64")
      for op in ("nf4_dequantize", "dora_weight_norm") for dtype in (0, [], "float32", torch.uint8, torch.complex64)),
    *((op, {"seed": seed}, ValueError, f"seed is {came}, wanted int64 (2,)")
      for op in ("lora_linear", "lora_residual", "dora_linear")
      for seed, came in ((3, "int"), ([1, 2], "list"), (torch.zeros(2), "float32 (2,)"),
                         (torch.zeros(2, 1, dtype=torch.int64), "int64 (2, 1)"))),
    ("lora_linear", {"seed": torch.zeros(2, dtype=torch.int64).to_sparse()}, TypeError,
     "seed has layout torch.sparse_coo, wanted torch.strided"),
    ("lora_linear", {"seed": _META_SEED}, ValueError, "seed is on meta, x is on cpu"),
    ("dora_linear", {"dropout_mode": ["lora"]}, ValueError, "dropout_mode is ['lora'], wanted 'lora' or 'peft'"),
    ("bottleneck_adapter", {"activation": 3}, ValueError,
     "activation is 3, wanted one of ('gelu', 'gelu_tanh', 'relu', 'silu')"),
    *(("grouped_lora_linear", {name: None}, TypeError, f"{name} is NoneType, {_LIST}")
      for name in ("lora_A", "lora_B", "scaling")),
    ("grouped_lora_linear", {"lora_A": torch.zeros(R, K)}, TypeError,
     f"lora_A is Tensor, {_LIST}"),
    ("grouped_lora_linear", {"scaling": 1.0}, TypeError, f"scaling is float, {_LIST}"),
    ("grouped_lora_linear", {"scaling": [1.0, True]}, ValueError, f"scaling is True, {_FINITE}"),
    ("grouped_lora_linear", {"adapters": None}, TypeError, "adapters is NoneType, wanted a list of integers"),
    ("grouped_lora_linear", {"adapters": 1}, TypeError, "adapters is int, wanted a list of integers"),
    *(("grouped_lora_linear", {"adapters": [0, wrong]}, ValueError, f"adapters has {wrong!r}, wanted -1 to 1")
      for wrong in (2, -2, 10**30, 0.0, "0", None)),
    ("grouped_lora_linear", {"adapters": [0]}, ValueError,
     "adapters has 1 elements, wanted 2, one for each sample of x"),
    ("grouped_lora_linear", {"lora_A": [], "lora_B": []}, ValueError,
     "0 of lora_A, 0 of lora_B and 0 of scaling, wanted as many, and at least 1"),
)  # fmt: skip


@pytest.mark.parametrize(("op", "wrong", "kind", "message"), _OTHERS)
def test_other_arguments(op: str, wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    _refused(op, wrong, kind, message)


@pytest.mark.parametrize(
    "op", [op for op, (_, arguments) in CALLS.items() if "weight" in arguments and op not in _NORMS]
)
def test_a_weight_that_trains(op: str) -> None:
    function, arguments = CALLS[op]
    wrong = {"weight": nn.Parameter(arguments["weight"].clone())}
    if op == "nf4_quantize":
        assert function(**wrong).packed.requires_grad is False
        return
    wanted = "weight requires grad, wanted a frozen weight (call weight.requires_grad_(False))"
    _refused(op, wrong, ValueError, wanted)
    with torch.no_grad():
        function(**{**arguments, **wrong})


@pytest.mark.parametrize(
    ("op", "name"), [entry for entry in _tensors() if entry.values[1] not in ("weight",)], ids=lambda value: value
)
def test_tensors_of_another_kind_that_are_taken(op: str, name: str) -> None:
    """Operators accept subclasses of Tensor, conjugate and negative views, and tensors made in inference mode."""

    class Own(Tensor):
        pass

    function, arguments = CALLS[op]
    value = arguments[name]
    first = value[0] if isinstance(value, list) else value
    wanted = function(**arguments)
    with torch.inference_mode():
        inferred = first.clone()
    lazy = torch.complex(torch.zeros_like(first), -first).conj().imag
    assert lazy.is_neg()
    for other in (first.as_subclass(Own), lazy, inferred):
        found = function(**{**arguments, name: [other, *value[1:]] if isinstance(value, list) else other})
        for got, want in zip(*((y if isinstance(y, tuple) else (y,)) for y in (found, wanted)), strict=True):
            if isinstance(got, NF4Weight):
                got, want = got.packed, want.packed
            assert torch.equal(got.as_subclass(Tensor), want)


def test_an_inference_tensor_is_not_saved_for_a_backward() -> None:
    function, arguments = CALLS["lora_linear"]
    with torch.inference_mode():
        x = arguments["x"].clone()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        function(**{**arguments, "x": x, "lora_B": arguments["lora_B"].clone().requires_grad_()})


@pytest.mark.parametrize("op", CALLS)
def test_on_the_meta_device_there_are_shapes_alone(op: str) -> None:
    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        return value.to("meta") if isinstance(value, (Tensor, NF4Weight)) else value

    function, arguments = CALLS[op]
    wanted, found = function(**arguments), function(**{name: moved(value) for name, value in arguments.items()})
    for got, want in zip(*((y if isinstance(y, tuple) else (y,)) for y in (found, wanted)), strict=True):
        got, want = (y.packed if isinstance(y, NF4Weight) else y for y in (got, want))
        assert got.is_meta and got.shape == want.shape and got.dtype == want.dtype


# One element, which is expanded to sizes that do not fit into memory or into 64 bits.
_HUGE = torch.zeros(1)
_TOO_LARGE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("nf4_quantize", {"weight": _HUGE.expand(2**40, 2**20)}),
    ("nf4_linear", {"x": _HUGE.expand(2**52, K)}),
    ("nf4_merge", {"lora_A": _HUGE.expand(2**40, K), "lora_B": _HUGE.expand(N, 2**40)}),
    ("lora_linear", {"x": _HUGE.expand(2**56, K)}),
    ("lora_linear", {"lora_A": _HUGE.expand(2**56, K), "lora_B": _HUGE.expand(N, 2**56), "rank_scale": None}),
    ("lora_linear", {"weight": _HUGE.expand(2**40, K), "lora_B": _HUGE.expand(2**40, R), "bias": None}),
    ("dora_weight_norm", {"lora_A": _HUGE.expand(2**40, K), "lora_B": _HUGE.expand(N, 2**40)}),
    ("ia3_linear", {"weight": _HUGE.expand(2**56, K), "ia3_l": _HUGE.expand(2**56), "bias": None}),
    ("ia3_scale", {"x": _HUGE.expand(2**55, K)}),
    ("bottleneck_adapter", {"x": _HUGE.expand(2**55, K), "residual": None}),
    ("rms_norm", {"x": _HUGE.expand(2**55, K)}),
    ("activation", {"x": _HUGE.expand(2**55, K)}),
    ("gated_activation", {"gate": _HUGE.expand(2**55, K), "up": _HUGE.expand(2**55, K)}),
    ("layer_norm", {"x": _HUGE.expand(2**55, K)}),
)


@pytest.mark.parametrize(("op", "wrong"), _TOO_LARGE)
def test_sizes_beyond_any_memory_are_errors(op: str, wrong: dict[str, Any]) -> None:
    function, arguments = CALLS[op]
    with pytest.raises((RuntimeError, MemoryError)):
        function(**{**arguments, **wrong})


def test_no_tokens_and_no_outputs_are_no_error() -> None:
    function, arguments = CALLS["lora_linear"]
    assert function(**{**arguments, "x": torch.zeros(0, 7, K)}).shape == (0, 7, N)
    assert function(torch.zeros(2, 0), torch.zeros(3, 0), torch.zeros(1, 0), torch.zeros(3, 1)).shape == (2, 3)


# - NF4Weight -

_DTYPES = ", ".join(map(str, peft_ext.weights.nf4.FLOATS))
_NF4 = reference.nf4_quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(0)), 64, True)


def _nested_with(**wrong: Any) -> NestedAbsmax:
    held = {"absmax": _NF4.nested.absmax, "code": _NF4.nested.code, "offset": _NF4.nested.offset}
    return NestedAbsmax(**{**held, **wrong})


_OF = f"for shape ({N}, {K}) and blocksize 64"
_WEIGHTS: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    *(({"blocksize": size}, ValueError, f"blocksize is {size!r}, wanted one of {_SIZES}")
      for size in (0, -64, 65, 64.0, "64", None, True, [64], 2**64)),
    *(({"dtype": dtype}, TypeError, f"dtype is {dtype!r}, wanted one of {_DTYPES}")
      for dtype in (torch.uint8, torch.float8_e4m3fn, "float32", None)),
    *(({"shape": shape}, TypeError, f"shape is {shape!r}, wanted integers")
      for shape in (None, 5.0, "96", (96.0, 64), (True, 64), [[96], [64]])),
    *(({"shape": shape}, ValueError, f"shape is {shape}, wanted sizes of 0 or more")
      for shape in ((-N, -K), (-1, K), (2**63, 1), (10**30, 1))),
    ({"shape": torch.Size((-N, -K))}, ValueError, f"shape is (-{N}, -{K}), wanted sizes of 0 or more"),
    # Sizes whose product overflows to 0 in 64 bits.
    ({"shape": (2**32, 2**32)}, ValueError,
     f"packed is torch.uint8 with {N * K // 2} elements, wanted torch.uint8 with {2**63} for "
     f"shape ({2**32}, {2**32}) and blocksize 64"),
    ({"shape": (2**62, 4), "packed": torch.zeros(0, dtype=torch.uint8)}, ValueError,
     f"packed is torch.uint8 with 0 elements, wanted torch.uint8 with {2**63} for shape ({2**62}, 4) and blocksize 64"),
    *(({name: wrong}, TypeError, f"{name} is {type(wrong).__name__}, wanted a Tensor")
      for name in ("packed", "absmax") for wrong in (None, [1], np.zeros(3))),
    *(({"nested": wrong}, TypeError, f"nested is {type(wrong).__name__}, wanted a NestedAbsmax or None")
      for wrong in ([1, 2, 3], {})),
    *(({"nested": _nested_with(**{name: 1.0})}, TypeError, f"nested.{name} is float, wanted a Tensor")
      for name in ("absmax", "code", "offset")),
    ({"packed": _NF4.packed[:-1]}, ValueError,
     f"packed is torch.uint8 with {N * K // 2 - 1} elements, wanted torch.uint8 with {N * K // 2} {_OF}"),
    ({"packed": _NF4.packed.char()}, ValueError,
     f"packed is torch.int8 with {N * K // 2} elements, wanted torch.uint8 with {N * K // 2} {_OF}"),
    ({"nested": None}, ValueError, f"absmax is torch.uint8 with {N} elements, wanted torch.float32 with {N} {_OF}"),
    ({"absmax": _NF4.absmax[1:]}, ValueError,
     f"absmax is torch.uint8 with {N - 1} elements, wanted torch.uint8 with {N} {_OF}"),
    ({"nested": _nested_with(code=torch.zeros(16))}, ValueError,
     f"nested.code is torch.float32 with 16 elements, wanted torch.float32 with 256 {_OF}"),
    ({"packed": _NF4.packed.to_sparse()}, ValueError, "packed has layout torch.sparse_coo, wanted torch.strided"),
    ({"nested": _nested_with(code=_NF4.nested.code.to_sparse())}, ValueError,
     "nested.code has layout torch.sparse_coo, wanted torch.strided"),
    ({"absmax": _NF4.absmax.to("meta")}, ValueError, "absmax is on meta, packed is on cpu"),
    ({"packed": _NF4.packed.to("meta")}, ValueError, "absmax is on cpu, packed is on meta"),
    ({"nested": _nested_with(absmax=_NF4.nested.absmax.to("meta"))}, ValueError,
     "nested.absmax is on meta, packed is on cpu"),
)  # fmt: skip


@pytest.mark.parametrize(("wrong", "kind", "message"), _WEIGHTS)
def test_nf4_weight(wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    held = {name: getattr(_NF4, name) for name in ("packed", "absmax", "shape", "dtype", "blocksize", "nested")}
    with exactly(kind, f"NF4Weight: {message}"):
        NF4Weight(**{**held, **wrong})


def test_an_offset_on_the_cpu_goes_where_the_codes_are() -> None:
    held = [tensor.to("meta") for tensor in (_NF4.packed, _NF4.absmax, _NF4.nested.absmax, _NF4.nested.code)]
    nested = NestedAbsmax(*held[2:], _NF4.nested.offset)
    nf4 = NF4Weight(*held[:2], _NF4.shape, _NF4.dtype, 64, nested)
    assert nf4.nested.offset.is_meta and not nested.offset.is_meta


@pytest.mark.parametrize("name", ["absmax", "nested_absmax", "nested_code", "nested_offset"])
def test_scales_that_no_quantizing_gives(name: str) -> None:
    plain = reference.nf4_quantize(torch.ones(2, K))
    nf4 = plain if name == "absmax" else _NF4.map(torch.clone)
    nf4.check_scales()
    scales = nf4.tensors()[name].view(-1)
    before = scales[-1].item()
    for wrong in (float("nan"), float("inf"), -float("inf")):
        scales[-1] = wrong
        with exactly(ValueError, f"NF4Weight: {name} has values that are not finite"):
            nf4.check_scales()
    scales[-1] = -abs(before) - 2
    if name == "nested_offset":
        nf4.check_scales()
        return
    wanted = "nested_code does not ascend" if name == "nested_code" else f"{name} has values below 0"
    with exactly(ValueError, f"NF4Weight: {wanted}"):
        nf4.check_scales()


# - counts -


def test_counts() -> None:
    checks.check_count("op", "r", 1)
    for wrong in (True, 2.0, "8", None, torch.ones(())):
        with exactly(TypeError, f"op: r is {wrong!r}, wanted an integer"):
            checks.check_count("op", "r", wrong)
    for wrong, wanted in ((0, "at least 1"), (-1, "at least 1"), (2**63, "less than 2**63")):
        with exactly(ValueError, f"op: r is {wrong}, wanted {wanted}"):
            checks.check_count("op", "r", wrong)


# - modules -

_LOW_RANK = (peft_ext.nn.LoRALinear, peft_ext.nn.DoRALinear, peft_ext.nn.AdaLoRALinear)
_FLOAT_DTYPES = "wanted one of torch.float32, torch.bfloat16, torch.float16, torch.float64"
_VIRTUAL_TOKENS = (0, -1, 2.5, "4", None, True)
_MODULES: tuple[tuple[Callable[[], Any], type[Exception], str], ...] = (
    *((lambda kind=kind, r=r: kind(K, N, r), ValueError, f"{kind.__name__}: r is {r}, wanted at least 1")
      for kind in _LOW_RANK for r in (0, -1)),
    *((lambda kind=kind, p=p: kind(K, N, lora_dropout=p), ValueError,
       f"{kind.__name__}: lora_dropout is {p}, wanted 0 <= p < 1")
      for kind in _LOW_RANK for p in (-0.1, 1, 1.0, float("nan"))),
    *((lambda size=size: peft_ext.nn.BottleneckAdapter(K, size), ValueError,
       f"BottleneckAdapter: bottleneck is {size}, wanted at least 1") for size in (0, -1)),
    *((lambda factor=factor: peft_ext.nn.BottleneckAdapter(K, reduction_factor=factor), ValueError,
       f"BottleneckAdapter: reduction_factor is {factor}, wanted more than 0") for factor in (0, -1, float("nan"))),
    *((lambda make=make, size=size: make(size), ValueError,
       f"{name}: num_virtual_tokens is {size!r}, wanted an integer of at least 1")
      for name, make in (("PromptEmbedding", lambda size: peft_ext.nn.PromptEmbedding(size, K)),
                         ("PrefixEncoder", lambda size: peft_ext.nn.PrefixEncoder(2, 2, 8, size)))
      for size in _VIRTUAL_TOKENS),
    *((lambda kind=kind, r=r: kind(K, N, r), TypeError, f"{kind.__name__}: r is {r!r}, wanted an integer")
      for kind in _LOW_RANK for r in (True, 2.5, "8", None)),
    *((lambda kind=kind: kind(K, N, 10**30), ValueError, f"{kind.__name__}: r is {10**30}, wanted less than 2**63")
      for kind in _LOW_RANK),
    *((lambda kind=kind, alpha=alpha: kind(K, N, lora_alpha=alpha), ValueError,
       f"{kind.__name__}: lora_alpha is {alpha!r}, wanted a finite number")
      for kind in _LOW_RANK for alpha in (float("nan"), float("inf"), "16", None, True)),
    *((lambda kind=kind: kind(K, N, adapter_dtype=torch.int8), TypeError,
       f"{kind.__name__}: dtype is torch.int8, {_FLOAT_DTYPES}") for kind in (*_LOW_RANK, peft_ext.nn.IA3Linear)),
    *((lambda kind=kind, layer=layer: kind.from_linear(layer), TypeError,
       f"{kind.__name__}: linear is {type(layer).__name__}, wanted an nn.Linear, an NF4Linear or a PackedLinear")
      for kind in (*_LOW_RANK, peft_ext.nn.IA3Linear) for layer in (None, nn.Conv2d(3, 3, 1), nn.Sequential())),
    *((lambda size=size: peft_ext.nn.BottleneckAdapter(K, size), TypeError,
       f"BottleneckAdapter: bottleneck is {size!r}, wanted an integer") for size in (True, 2.5, "8")),
    *((lambda scale=scale: peft_ext.nn.BottleneckAdapter(K, scale=scale), ValueError,
       f"BottleneckAdapter: scale is {scale!r}, wanted a finite number") for scale in (float("nan"), "1", True)),
    (lambda: peft_ext.nn.BottleneckAdapter(0), ValueError, "BottleneckAdapter: features is 0, wanted at least 1"),
    *((lambda size=size: peft_ext.nn.NF4Linear(size, N), ValueError,
       f"NF4Linear: in_features is {size!r}, wanted an integer of 0 or more") for size in (-1, True, 2.5, "64", None)),
    (lambda: peft_ext.nn.NF4Linear(2**32, 2**32), ValueError,
     f"NF4Linear: {2**32} x {2**32} elements, wanted less than 2**63"),
    *((lambda size=size: peft_ext.nn.NF4Linear(K, N, blocksize=size), ValueError,
       f"NF4Linear: blocksize is {size}, wanted one of {_SIZES}") for size in (48, 64.0, True)),
    (lambda: peft_ext.nn.NF4Linear.from_linear(None), TypeError, "NF4Linear: linear is NoneType, wanted an nn.Linear"),
    (lambda: peft_ext.nn.NF4Linear.from_nf4(None), TypeError, "NF4Linear: nf4 is NoneType, wanted an NF4Weight"),
    (lambda: peft_ext.nn.NF4Linear.from_nf4(reference.nf4_quantize(torch.zeros(2, 3, 4))), ValueError,
     "NF4Linear: nf4 has shape (2, 3, 4), wanted (N, K)"),
)  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "message"), _MODULES)
def test_modules(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with exactly(kind, message):
        make()


@pytest.mark.parametrize("kind", ["LoRALinear", "DoRALinear", "AdaLoRALinear", "IA3Linear"])
def test_a_module_names_the_operator_that_its_input_is_wrong_for(kind: str) -> None:
    layer = getattr(peft_ext.nn, kind)(K, N)
    op = {"DoRALinear": "dora_linear", "IA3Linear": "ia3_linear"}.get(kind, "lora_linear")
    for x, error, message in (
        (torch.zeros(2, K + 1), ValueError, f"x has shape (2, {K + 1}), wanted [..., {K}] for weight ({N}, {K})"),
        (torch.zeros(2, K, dtype=torch.int32), TypeError, None),
        (torch.zeros(2, K, device="meta"), ValueError, "weight is on cpu, x is on meta"),
    ):
        with pytest.raises(error) as caught:
            layer(x)
        assert message is None or str(caught.value) == f"{op}: {message}"


# - models -

_TREE = (peft_ext.accelerate, peft_ext.restore, peft_ext.explain, peft_ext.quantize_nf4, peft_ext.dequantize_nf4)


@pytest.mark.parametrize("function", _TREE, ids=lambda function: function.__name__)
def test_what_is_no_module(function: Callable) -> None:
    for wrong in (None, torch.zeros(3), {}, nn.Linear):
        with exactly(TypeError, f"{function.__name__}: model is {type(wrong).__name__}, wanted an nn.Module"):
            function(wrong)


_RECOMMENDED: tuple[tuple[dict[str, Any], str], ...] = (
    *(({"model_size_b": size}, f"model_size_b is {size!r}, wanted a number above 0")
      for size in (0, -1, float("nan"))),
    *(({"model_size_b": size}, f"model_size_b is {size!r:.60}, wanted at most 1000000 billion parameters")
      for size in (10**400, 1e300)),
    *(({"gpu_memory_gb": size}, f"gpu_memory_gb is {size!r}, wanted a number above 0")
      for size in (0, -1, float("nan"), float("inf"), True, "24", None, 10**400)),
    ({"batch_size": 2**62},
     f"batch_size times sequence_length is {2**62}, wanted at most {2**40}"),
    ({"batch_size": 2**20, "sequence_length": 2**21},
     f"batch_size times sequence_length is {2**41}, wanted at most {2**40}"),
    ({"sequence_length": True}, "sequence_length is True, wanted a positive integer"),
    ({"headroom": float("nan")}, "headroom is nan, wanted 0 <= headroom < 1"),
    ({"prefer": ["quality"]}, "prefer is ['quality'], wanted one of ('balanced', 'quality')"),
)  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), _RECOMMENDED)
def test_recommendations(wrong: dict[str, Any], message: str) -> None:
    pytest.importorskip("transformers")
    with exactly(ValueError, f"recommend_peft_method: {message}"):
        peft_ext.recommend_peft_method(**{"model_size_b": 0.5, "gpu_memory_gb": 24, **wrong})


def test_estimates() -> None:
    pytest.importorskip("peft")
    model = nn.Linear(4, 4)
    for wrong, text in (
        ({"batch_size": 2**40, "sequence_length": 2}, f"batch_size times sequence_length is {2**41}, wanted at most"),
        ({"batch_size": 0, "sequence_length": 1}, "batch_size is 0, wanted a positive integer"),
        ({"batch_size": 1, "sequence_length": 1, "optimizer": ["adamw"]}, r"optimizer is \['adamw'\], wanted one of"),
        ({"batch_size": 1, "sequence_length": 1, "blocksize": 64.0}, "blocksize is 64.0, wanted one of"),
    ):
        with pytest.raises(ValueError, match=f"^estimate_memory: {text}"):
            peft_ext.estimate_memory(model, **wrong)
