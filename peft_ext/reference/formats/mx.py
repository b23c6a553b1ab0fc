"""Decodes MXFP4 and NVFP4 in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def low_nibble_first(codes: Tensor) -> Tensor:
    """Returns the codes ``[..., 2 n]`` of bytes ``[..., n]``: the low nibble is the code with the even index."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def _values(packed: Tensor, shape: torch.Size) -> Tensor:
    codes = low_nibble_first(packed.reshape(shape[0], shape[1] // 2).view(torch.uint8))
    return torch.tensor(E2M1, device=codes.device)[codes.long()]


def mxfp4(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> Tensor:
    """Decodes MXFP4. The product is in float64, where 2^(scale - 127) is normal for all 256 values of a scale byte."""
    blocks, scales = parts
    bits = scales.reshape(shape[0], -1).view(torch.uint8).long() + (1023 - 127) << 52
    factors = bits.view(torch.float64).repeat_interleave(group, 1)
    return (_values(blocks, shape).double() * factors).float()


def nvfp4(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> Tensor:
    packed, scales, total = parts
    scales = scales.reshape(shape[0], -1).view(torch.float8_e4m3fn).float()
    reciprocal = option >> 8 & 1
    # a weight has one or two global scales
    total = total.reshape(-1).repeat_interleave(shape[0] // total.numel())[:, None]
    factors = scales / total if reciprocal else scales * total
    values = _values(packed, shape)
    if not reciprocal:
        values = values + 0.0  # -0 + 0 is +0: ModelOpt decodes code 8 to +0
    return values * factors.repeat_interleave(group, 1)
