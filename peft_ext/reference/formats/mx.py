"""Decodes MXFP4 in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def low_nibble_first(codes: Tensor) -> Tensor:
    """Returns the codes ``[..., 2 n]`` of bytes ``[..., n]``: the low nibble is the even element."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def mxfp4(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> Tensor:
    blocks, scales = parts
    rows, columns = shape
    codes = low_nibble_first(blocks.reshape(rows, columns // 2).view(torch.uint8))
    values = torch.tensor(E2M1, device=codes.device)[codes.long()]
    factors = scales.reshape(rows, -1).view(torch.float8_e8m0fnu).float()
    return values * factors.repeat_interleave(group, 1)
