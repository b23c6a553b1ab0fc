"""Decodes FP8 (e4m3) with scales of blocks in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from ...weights.packed import SCALE_TYPES


def fp8(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> Tensor:
    weight, scales = parts
    rows, columns = shape
    row_shift, width = option >> 8 & 63, group or max(1, columns)
    dtype = SCALE_TYPES[option & 15]
    scales = (scales.view(dtype) if dtype.itemsize == 1 else scales).float().reshape(-1, -(-columns // width))
    values = weight.view(torch.float8_e4m3fn).float().reshape(rows, columns)
    by_row = scales[torch.arange(rows, device=values.device) >> row_shift]
    return values * by_row.repeat_interleave(width, 1)[:, :columns]
