"""Weights in packed formats other than NF4, drawn at random, for tests on the CPU and on CUDA.

A format is added by a function ``(n, k, draw, wild) -> PackedWeight`` and a :class:`Kind` in ``KINDS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from peft_ext.weights import fp4, fp8, gguf, int_groups, mx
from peft_ext.weights.nf4 import NESTED_BLOCKSIZE, NestedAbsmax
from peft_ext.weights.packed import PackedWeight


class Draw:
    """Random tensors from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Returns integers from ``low`` to ``high`` - 1."""
        return torch.randint(low, high, shape, generator=self.generator, dtype=torch.int64).to(dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)


@dataclass(frozen=True)
class Kind:
    """A kind of weight: a format with one choice of its options.

    Attributes:
        make: returns a weight ``[n, k]``. With ``wild``, the scales have any bits: zero, subnormal, infinite and NaN.
        rows: number of which N must be a multiple.
        columns: number of which K must be a multiple.
    """

    make: Callable[[int, int, Draw, bool], PackedWeight]
    rows: int = 1
    columns: int = 1


def _floats(draw: Draw, wild: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns scales: from 2^-8 to 2^-5, or, with ``wild``, also 0, subnormal, infinite and NaN."""
    scales = draw.uniform(2.0**-8, 2.0**-5, *shape)
    if wild:
        odd = torch.tensor([0.0, -0.0, 1e-40, 3e-8, 6e4, 3e38, math.inf, -math.inf, math.nan, -1.5])
        odd = odd[draw.integers(0, len(odd), *shape, dtype=torch.int64)]
        scales = torch.where(draw.uniform(0.0, 1.0, *shape) < 0.3, odd, scales)
    return scales.to(dtype)


def _fp4(n: int, k: int, draw: Draw, wild: bool, nested: bool = False) -> PackedWeight:
    packed, blocks = draw.integers(0, 256, -(-n * k // 2)), -(-n * k // 64)
    if not nested:
        return fp4.fp4(packed, _floats(draw, wild, blocks), (n, k))
    groups = -(-blocks // NESTED_BLOCKSIZE)
    state = NestedAbsmax(_floats(draw, wild, groups), draw.uniform(-1.0, 1.0, 256), draw.uniform(0.01, 0.02, 1))
    return fp4.fp4(packed, draw.integers(0, 256, blocks), (n, k), nested=state)


def _mxfp4(n: int, k: int, draw: Draw, wild: bool) -> PackedWeight:
    low, high = (0, 256) if wild else (119, 124)  # 2^-8 to 2^-4
    return mx.mxfp4(draw.integers(0, 256, n, k // 2), draw.integers(low, high, n, k // 32))


def _nvfp4(n: int, k: int, draw: Draw, wild: bool, reciprocal: bool = False, two: bool = False) -> PackedWeight:
    low, high = (0, 256) if wild else (40, 72)  # 0.25 to 4
    scales = draw.integers(low, high, n, k // 16).view(torch.float8_e4m3fn)
    total = torch.tensor([37.0 if reciprocal else 1 / 37, 31.0][: 1 + two])
    return mx.nvfp4(draw.integers(0, 256, n, k // 2), scales, total, reciprocal=reciprocal)


def _fp8(n: int, k: int, draw: Draw, wild: bool, block: tuple[int, int] = (128, 128),
         dtype: torch.dtype = torch.float32) -> PackedWeight:  # fmt: skip
    codes = draw.integers(0, 256, n, k)
    if not wild:
        codes = codes & 0x80 | (codes & 0x3F) + 8  # 0 to 2 and a sign
    rows, columns = (-(-size // of) if of else 1 for size, of in zip((n, k), block, strict=True))
    return fp8.fp8(codes.view(torch.float8_e4m3fn), _floats(draw, wild, rows, columns, dtype=dtype), block)


def _words(draw: Draw, *shape: int) -> Tensor:
    return draw.integers(-(2**31), 2**31, *shape, dtype=torch.int32)


def _int(n: int, k: int, draw: Draw, wild: bool, bits: int = 4, group: int = 32, zeros: bool = True) -> PackedWeight:
    scales, words = _floats(draw, wild, n, k // group, dtype=torch.bfloat16) / 4, _words(draw, n, -(-k * bits // 32))
    zero_points = _words(draw, -(-n * bits // 32), k // group) if zeros else None
    return int_groups.int_rows(words, scales, (n, k), bits=bits, zero_points=zero_points)


def _int8(n: int, k: int, draw: Draw, wild: bool, scales: int = 0, zeros: bool = False) -> PackedWeight:
    """``scales``: number of scales; 0: a scale for each row."""
    codes = draw.integers(-128, 128, n, k, dtype=torch.int8)
    scale = _floats(draw, wild, scales) if scales else _floats(draw, wild, n, 1)
    zero_points = draw.integers(-128, 128, *scale.shape, dtype=torch.int8) if zeros else None
    return int_groups.int_rows(codes, scale / 64, (n, k), bits=8, zero_points=zero_points)


def _gptq(n: int, k: int, draw: Draw, wild: bool, bits: int = 4, ordered: bool = False,
          v1: bool = False) -> PackedWeight:  # fmt: skip
    groups, codes = -(-k // 64), 32 // bits
    g_idx = draw.integers(0, groups, k, dtype=torch.int32) if ordered else None
    return int_groups.gptq(
        _words(draw, -(-k // codes), n), _words(draw, groups, -(-n // codes)),
        _floats(draw, wild, groups, n, dtype=torch.float16) / 4, bits=bits, group=64, g_idx=g_idx, in_features=k,
        v1=v1,
    )  # fmt: skip


def _awq(n: int, k: int, draw: Draw, wild: bool) -> PackedWeight:
    return int_groups.awq(_words(draw, k, n // 8), _words(draw, k // 32, n // 8),
                          _floats(draw, wild, k // 32, n, dtype=torch.float16) / 4)  # fmt: skip


def _hqq(n: int, k: int, draw: Draw, wild: bool, axis: int = 1) -> PackedWeight:
    groups = n * k // 64
    zeros = draw.uniform(0.0, 15.0, groups).bfloat16()
    return int_groups.hqq(draw.integers(0, 256, n * k // 2), _floats(draw, wild, groups, dtype=torch.bfloat16), zeros,
                          (n, k), axis=axis)  # fmt: skip


# The columns and the bytes of a block of each type of GGUF, and the places of its float16 scales.
_GGUF = {
    "Q4_0": (32, 18, (0,)), "Q4_1": (32, 20, (0, 2)), "Q5_0": (32, 22, (0,)), "Q5_1": (32, 24, (0, 2)),
    "Q8_0": (32, 34, (0,)), "Q2_K": (256, 84, (80, 82)), "Q3_K": (256, 110, (108,)), "Q4_K": (256, 144, (0, 2)),
    "Q5_K": (256, 176, (0, 2)), "Q6_K": (256, 210, (208,)), "IQ4_NL": (32, 18, (0,)), "IQ4_XS": (256, 136, (0,)),
    "TQ2_0": (256, 66, (64,)),
}  # fmt: skip


def _gguf(n: int, k: int, draw: Draw, wild: bool, type: str) -> PackedWeight:
    columns, size, places = _GGUF[type]
    blocks = draw.integers(0, 256, n, k // columns, size)
    for place in places:
        scales = _floats(draw, wild, n, k // columns, dtype=torch.float16) / (1 if columns == 32 else 32)
        blocks[..., place : place + 2] = scales.view(torch.uint8).view(n, k // columns, 2)
    return gguf.gguf_weight(blocks.flatten(1), type, (n, k))


KINDS: dict[str, Kind] = {
    "fp4": Kind(_fp4),
    "fp4-nested": Kind(partial(_fp4, nested=True)),
    "mxfp4": Kind(_mxfp4, columns=32),
    "nvfp4": Kind(_nvfp4, columns=16),
    "nvfp4-reciprocal": Kind(partial(_nvfp4, reciprocal=True), columns=16),
    "fp8": Kind(_fp8),
    "fp8-rows": Kind(partial(_fp8, block=(1, 0), dtype=torch.bfloat16)),
    "int4": Kind(_int, columns=32),
    "int4-symmetric": Kind(partial(_int, zeros=False), columns=32),
    "int8-rows": Kind(_int8),
    "gptq": Kind(_gptq),
    "gptq-ordered": Kind(partial(_gptq, ordered=True, v1=True)),
    "gptq-8": Kind(partial(_gptq, bits=8)),
    "awq": Kind(_awq, rows=8, columns=32),
    "hqq": Kind(_hqq, rows=2, columns=64),
    **{type: Kind(partial(_gguf, type=type), columns=columns) for type, (columns, *_) in _GGUF.items()},
    "hqq-axis0": Kind(partial(_hqq, axis=0), rows=2, columns=64),
    "gptq-v1": Kind(partial(_gptq, v1=True)),
    "gptq-8-v1": Kind(partial(_gptq, bits=8, v1=True)),
    "int8": Kind(partial(_int, bits=8), columns=32),
    "int8-zeros": Kind(partial(_int8, zeros=True)),
    "int8-one-scale": Kind(partial(_int8, scales=1, zeros=True)),
    "fp8-e8m0": Kind(partial(_fp8, dtype=torch.float8_e8m0fnu)),
    "nvfp4-two-scales": Kind(partial(_nvfp4, reciprocal=True, two=True), rows=2, columns=16),
}


def packed_weight(
    kind: str, n: int, k: int, generator: torch.Generator, *, wild: bool = False, dtype: torch.dtype | None = None
) -> PackedWeight:
    """Returns a weight ``[n, k]`` with random codes and scales. N and K must be multiples of the kind's ``rows`` and
    ``columns``. Without ``wild``, the values are finite and in the range of a model's weights. ``dtype``: the weight's
    dtype; default: that of the kind."""
    weight = KINDS[kind].make(n, k, Draw(generator), wild)
    return PackedWeight(weight.format, weight.parts, weight.shape, dtype or weight.dtype, group=weight.group,
                        option=weight.option)  # fmt: skip


def fitting(kind: str, n: int, k: int) -> tuple[int, int]:
    """Returns N and K, rounded up to the multiples that the kind needs."""
    rows, columns = KINDS[kind].rows, KINDS[kind].columns
    return -(-n // rows) * rows, -(-k // columns) * columns


def stacked(weights: list[PackedWeight]) -> PackedWeight:
    """Returns the weights ``[E, N, K]`` of experts: each part holds the experts' parts, one after the other."""
    first = weights[0]
    parts = [
        None if part is None else torch.stack([weight.parts[i] for weight in weights])
        for i, part in enumerate(first.parts)
    ]
    return PackedWeight(first.format, parts, (len(weights), *first.shape), first.dtype, group=first.group,
                        option=first.option, stacked=True)  # fmt: skip


def shifted(part: Tensor, offset: int = 1) -> Tensor:
    """Returns a copy of a tensor whose first element is ``offset`` elements after an aligned address."""
    moved = torch.empty(part.numel() + offset, dtype=part.dtype)[offset:].view(part.shape)
    return moved.copy_(part)
