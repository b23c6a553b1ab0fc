"""Microscaling floats: MXFP4, 4-bit floats (e2m1) with a power of two for each 32 columns.

Source: OCP Microscaling Formats 1.0; the layout of files is transformers' ``integrations/mxfp4.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from .packed import Format, PackedWeight, register

__all__ = ["MXFP4", "mxfp4"]

_GROUP = 32


def _check(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> None:
    rows, columns = shape
    if columns % _GROUP:
        raise ValueError(f"PackedWeight: mxfp4 has {columns} columns, wanted a multiple of {_GROUP}")
    for name, part, count in zip(MXFP4.parts, parts, (rows * columns // 2, rows * columns // _GROUP), strict=True):
        if part is None or part.element_size() != 1 or part.numel() != count:
            came = "None" if part is None else f"{part.dtype} with {part.numel()} elements"
            raise ValueError(f"PackedWeight: {name} of mxfp4 is {came}, wanted {count} bytes for shape {tuple(shape)}")


MXFP4 = register(Format("mxfp4", 2, ("blocks", "scales"), _check, "transformers integrations/mxfp4.py"))


def mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
    """Returns an MXFP4 weight: ``W[n, k] = e2m1(code) · 2^(scale - 127)``.

    Args:
        blocks: uint8 ``[..., K/32, 16]`` or ``[..., K/2]``, two codes per byte, the low nibble first.
        scales: uint8 or float8_e8m0fnu ``[..., K/32]``. With three dimensions ``[E, N, K/32]`` the weight is stacked.
    """
    shape = (*scales.shape[:-1], scales.shape[-1] * _GROUP)
    return PackedWeight(MXFP4, (blocks, scales), shape, dtype, group=_GROUP, stacked=len(shape) == 3)
