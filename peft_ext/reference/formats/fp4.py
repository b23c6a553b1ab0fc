"""Decodes bitsandbytes' FP4 in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from ...weights.fp4 import FP4_CODE


def fp4(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> Tensor:
    packed, absmax, nested_absmax, nested_code, nested_offset = parts
    elements = shape[0] * shape[1]
    if nested_absmax is not None:
        factors = nested_absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = nested_code[absmax.reshape(-1).long()] * factors + nested_offset
    packed = packed.reshape(-1)
    codes = torch.stack((packed >> 4, packed & 15), -1).reshape(-1)[:elements]
    values = torch.tensor(FP4_CODE, device=packed.device)[codes.long()]
    return (values * absmax.reshape(-1).repeat_interleave(group)[:elements]).reshape(shape)
