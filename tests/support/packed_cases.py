"""Weights in packed formats other than NF4, drawn at random, for tests on the CPU and on CUDA.

A format is added by a function ``(n, k, draw, wild) -> PackedWeight`` and a :class:`Kind` in ``KINDS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_ext.weights import mx
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


def _mxfp4(n: int, k: int, draw: Draw, wild: bool) -> PackedWeight:
    low, high = (0, 256) if wild else (119, 124)  # 2^-8 to 2^-4
    return mx.mxfp4(draw.integers(0, 256, n, k // 2), draw.integers(low, high, n, k // 32))


KINDS: dict[str, Kind] = {
    "mxfp4": Kind(_mxfp4, columns=32),
}


def packed_weight(kind: str, n: int, k: int, generator: torch.Generator, *, wild: bool = False) -> PackedWeight:
    """Returns a weight ``[n, k]`` with random codes and scales. N and K must be multiples of the kind's ``rows`` and
    ``columns``. Without ``wild``, the values are finite and in the range of a model's weights."""
    return KINDS[kind].make(n, k, Draw(generator), wild)


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
