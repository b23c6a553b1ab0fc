"""The proof of the kernels that decode packed weights, with one family of kernels for each packed format that kernels
decode, except NF4.

The proof of a format's family calls the kernels that decode the format: the kernel that decodes a whole weight, and the
kernels of linear layers for few and for many tokens, forward and backward. All operators on weights of a format use the
kernels of the format's family. If the proof of a format fails, every operator computes calls with weights of this
format by the reference, and calls with other weights still by the kernels. See :mod:`.prove`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..weights import fp4, fp8, gguf, int_groups, mx
from ..weights.nf4 import NESTED_BLOCKSIZE, NestedAbsmax
from ..weights.packed import PackedWeight, format_of
from .library import NAMESPACE
from .proof_inputs import ProofInputs

__all__ = ["CALLED", "FAMILIES", "families_in", "family_of", "listed", "takes_weights"]

CALLED = ["nf4_dequantize", "nf4_linear", "nf4_linear_backward"]  # the operators that a format's proof calls

# Least numbers of rows and columns of a weight in a proof: more rows than the 64 that a CPU kernel for GPTQ and AWQ
# computes together, and as many columns as two of the largest blocks of a format.
ROWS, COLUMNS = 72, 512
# Number of columns beyond a multiple of 32 that one weight of a proof has, for formats that allow numbers of columns
# that are no multiple of 32.
RAGGED = 6

Make = Callable[[ProofInputs, int, int], PackedWeight]


# --- random weights ---------------------------------------------------------------------------------------------------


def _bits(inputs: ProofInputs, *size: int, of: torch.dtype = torch.uint8) -> Tensor:
    """Returns random integers of the dtype ``of``."""
    kind = torch.iinfo(of)
    return inputs.integers(kind.min, kind.max + 1, *size).to(of)


def _scales(inputs: ProofInputs, *size: int, of: torch.dtype = torch.float32) -> Tensor:
    """Returns random scales from 2^-7 to 2^-6, which float32, bfloat16 and float16 represent exactly."""
    return ((inputs.integers(8, 16, *size).float()) * 2.0**-10).to(of)


def _fp4(inputs: ProofInputs, n: int, k: int, nested: bool = False) -> PackedWeight:
    packed, blocks = _bits(inputs, -(-n * k // 2)), -(-n * k // 64)
    if not nested:
        return fp4.fp4(packed, _scales(inputs, blocks), (n, k))
    state = NestedAbsmax(_scales(inputs, -(-blocks // NESTED_BLOCKSIZE)), inputs.draw(256, of=torch.float32),
                         _scales(inputs, 1))  # fmt: skip
    return fp4.fp4(packed, _bits(inputs, blocks), (n, k), nested=state)


def _mxfp4(inputs: ProofInputs, n: int, k: int) -> PackedWeight:
    return mx.mxfp4(_bits(inputs, n, k // 2), inputs.integers(119, 124, n, k // 32).to(torch.uint8))


def _nvfp4(inputs: ProofInputs, n: int, k: int, *totals: float, reciprocal: bool = False) -> PackedWeight:
    scales = inputs.integers(40, 72, n, k // 16).to(torch.uint8).view(torch.float8_e4m3fn)
    total = torch.tensor(totals, device=inputs.device)
    return mx.nvfp4(_bits(inputs, n, k // 2), scales, total, reciprocal=reciprocal)


def _fp8(inputs: ProofInputs, n: int, k: int, block: tuple[int, int], of: torch.dtype) -> PackedWeight:
    codes = _bits(inputs, n, k)
    codes = (codes & 0x80 | (codes & 0x7F).clamp(max=0x7E)).view(torch.float8_e4m3fn)  # no NaN
    grid = [-(-size // of_block) if of_block else 1 for size, of_block in zip((n, k), block, strict=True)]
    if of is torch.float8_e8m0fnu:
        return fp8.fp8(codes, inputs.integers(119, 124, *grid).to(torch.uint8).view(of), block)
    return fp8.fp8(codes, _scales(inputs, *grid, of=of), block)


def _int(inputs: ProofInputs, n: int, k: int, bits: int, zeros: bool, ordered: bool = False) -> PackedWeight:
    def words(count: int, *more: int) -> tuple[int, ...]:
        return (-(-count * bits // 32), *more)

    zero_points = _bits(inputs, *words(n, k // 32), of=torch.int32) if zeros else None
    g_idx = inputs.integers(0, k // 32, k).int() if ordered else None
    return int_groups.int_rows(_bits(inputs, n, *words(k), of=torch.int32),
                               _scales(inputs, n, k // 32, of=torch.bfloat16), (n, k), bits=bits,
                               zero_points=zero_points, g_idx=g_idx)  # fmt: skip


def _int8(inputs: ProofInputs, n: int, k: int, one_scale: bool) -> PackedWeight:
    scales = _scales(inputs, *((1,) if one_scale else (n, 1)))
    zero_points = _bits(inputs, *scales.shape, of=torch.int8) if one_scale else None
    return int_groups.int_rows(_bits(inputs, n, k, of=torch.int8), scales, (n, k), bits=8, zero_points=zero_points)


def _gptq(inputs: ProofInputs, n: int, k: int, bits: int, v1: bool = False, ordered: bool = False) -> PackedWeight:
    groups, codes = -(-k // 64), 32 // bits
    return int_groups.gptq(
        _bits(inputs, -(-k // codes), n, of=torch.int32), _bits(inputs, groups, -(-n // codes), of=torch.int32),
        _scales(inputs, groups, n, of=torch.float16), bits=bits, group=64, v1=v1, in_features=k,
        g_idx=inputs.integers(0, groups, k).int() if ordered else None,
    )  # fmt: skip


def _awq(inputs: ProofInputs, n: int, k: int) -> PackedWeight:
    words = [_bits(inputs, rows, n // 8, of=torch.int32) for rows in (k, k // 32)]
    return int_groups.awq(*words, _scales(inputs, k // 32, n, of=torch.float16))


def _hqq(inputs: ProofInputs, n: int, k: int, bits: int, axis: int) -> PackedWeight:
    groups = n * k // 64
    scale, zero = _scales(inputs, groups, of=torch.bfloat16), inputs.integers(0, 15, groups).bfloat16()
    return int_groups.hqq(_bits(inputs, n * k * bits // 8), scale, zero, (n, k), bits=bits, axis=axis)


# For each type of GGUF that kernels decode: the offsets, in bytes, of the float16 scales in a block. A block of MXFP4
# has no float16 scale: byte 0 is a scale in e8m0.
_PLACES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ2_0": (64,), "MXFP4": (),
}  # fmt: skip


def _gguf(inputs: ProofInputs, n: int, k: int, type: str) -> PackedWeight:
    _, columns, size, _ = gguf.TYPES[gguf.type_number(type)]
    blocks = _bits(inputs, n, k // columns, size)
    for place in _PLACES[type]:
        scales = _scales(inputs, n, k // columns, 1, of=torch.float16)
        blocks[..., place : place + 2] = scales.view(torch.uint8)
    if type == "MXFP4":
        blocks[..., 0] = inputs.integers(119, 124, n, k // columns).to(torch.uint8)
    return gguf.gguf_weight(blocks.flatten(1), type, (n, k))


def _ragged(make: Make) -> Make:
    return lambda inputs, n, k: make(inputs, n, k + RAGGED)


_FP8 = functools.partial(_fp8, block=(128, 128), of=torch.float32)
_GPTQ = functools.partial(_gptq, bits=4)
# Maps the name of each packed format to the functions that make the weights of the format's proof.
_WEIGHTS: dict[str, list[Make]] = {
    "fp4": [_fp4, functools.partial(_fp4, nested=True), _ragged(_fp4)],
    "mxfp4": [_mxfp4],
    "nvfp4": [
        lambda inputs, n, k: _nvfp4(inputs, n, k, 1 / 37),
        lambda inputs, n, k: _nvfp4(inputs, n, k, 37.0, reciprocal=True),
        # Two global scales of a merged gate and up: one for the rows of gate, one for the rows of up.
        lambda inputs, n, k: _nvfp4(inputs, n, k, 1 / 37, 1 / 90),
    ],
    "fp8": [_FP8, functools.partial(_fp8, block=(1, 0), of=torch.bfloat16), _ragged(_FP8),
            functools.partial(_fp8, block=(128, 128), of=torch.float8_e8m0fnu)],
    "int": [
        *(functools.partial(_int, bits=bits, zeros=True) for bits in (2, 4, 8)),
        functools.partial(_int, bits=4, zeros=False),
        functools.partial(_int, bits=4, zeros=False, ordered=True),
        *(functools.partial(_int8, one_scale=of) for of in (False, True)),
        _ragged(functools.partial(_int8, one_scale=False)),
    ],
    "gptq": [_GPTQ, functools.partial(_gptq, bits=4, v1=True, ordered=True), functools.partial(_gptq, bits=8),
             functools.partial(_gptq, bits=2), _ragged(_GPTQ)],
    "awq": [_awq],
    "hqq": [functools.partial(_hqq, bits=bits, axis=axis) for bits in (4, 8) for axis in (0, 1)],
    **{f"gguf_{type.lower()}": [functools.partial(_gguf, type=type)] for type in _PLACES},
}  # fmt: skip


# --- the families -----------------------------------------------------------------------------------------------------


def family_of(format: str) -> str:
    """Returns the name of the family of the kernels that decode a packed format, such as "format fp8"."""
    return f"format {format}"


def _calls(format: str, inputs: ProofInputs) -> Iterator[tuple[str, tuple]]:
    n, k = inputs.n + ROWS // 9 * 4, max(inputs.k, COLUMNS)
    for make in _WEIGHTS[format]:
        weight = make(inputs, n, k)
        *parts, layout, shape = weight.op_args()
        # The proof widens float tensors to float64, except a weight's scales, which the proof recognizes by their one
        # dimension.
        args = (*(None if part is None else part.flatten() for part in parts), layout, shape)
        yield "nf4_dequantize", (*args, inputs.dtype)
        x = inputs.draw(inputs.t, shape[1])
        for tokens in (1, 4, 8, inputs.t):
            yield "nf4_linear", (x[:tokens], *args, None)
        yield "nf4_linear_backward", (inputs.draw(inputs.t, n), *args)


# Maps the family of each packed format to the function that yields the calls of the family's proof. ``library.PROOFS``
# has the proofs of the operators' families.
FAMILIES = {family_of(name): functools.partial(_calls, name) for name in _WEIGHTS}


def listed(families: list[str]) -> str:
    """Returns the names of families as text.

    If more than three of the families are formats, the text has the number of the formats instead of their names.
    """
    formats = [family for family in families if family in FAMILIES]
    if len(formats) <= 3:
        return ", ".join(families)
    return ", ".join(
        [*(family for family in families if family not in FAMILIES), f"{len(formats)} formats of packed weights"]
    )


def takes_weights(operator: str) -> bool:
    """Returns whether an operator can have packed weights: whether ``library.WEIGHT`` or ``layer_lists.LAYERS`` is part
    of its schema."""
    schema = getattr(getattr(torch.ops, NAMESPACE), operator).default._schema
    return any(argument.name in ("layout", "sizes") for argument in schema.arguments)


def families_in(args: tuple) -> set[str]:
    """Returns a set with the names of the families of those kernels that decode the packed weights, other than NF4,
    among an operator's arguments."""
    numbers = [value for arg in args for value in (arg if isinstance(arg, (list, tuple)) else (arg,))
               if type(value) is int and value >> 32]  # fmt: skip
    return {family_of(name) for number in numbers if (name := format_of(number)) is not None}
