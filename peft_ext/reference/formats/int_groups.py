"""Decodes formats of integers in groups in plain PyTorch: compressed-tensors, GPTQ, AWQ and HQQ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from ...weights.int_groups import AWQ_SHIFTS, HQQ_AXIS0, INT_ONE_SCALE, INT_PLAIN, V1
from ...weights.packed import SCALE_TYPES


def fields(words: Tensor, bits: int) -> Tensor:
    """Returns the codes ``[..., n * 32 / bits]`` of int32 words ``[..., n]``, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


def _bits(option: int) -> int:
    return option >> 4 & 15


def _groups(columns: int, group: int, g_idx: Optional[Tensor], device: torch.device) -> Tensor:
    """Returns an int64 tensor with an element for each column of a weight: the number of the column's group."""
    if g_idx is not None:
        return g_idx.reshape(-1).long()
    return torch.arange(columns, device=device) // (group or max(1, columns))


def int_rows(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> Tensor:
    codes, scales, zero_points, g_idx = parts
    (rows, columns), bits, flags = shape, _bits(option), option >> 8
    at = _groups(columns, group, g_idx, codes.device)
    count = -(-columns // group) if group else 1
    if flags & INT_PLAIN:
        q = codes.reshape(rows, columns).int()
    else:
        q = fields(codes.reshape(rows, -1), bits)[:, :columns] - (1 << bits - 1)
    scales = scales.reshape(1, 1).expand(rows, count) if flags & INT_ONE_SCALE else scales.reshape(rows, count)
    if zero_points is None:
        return q.float() * scales.float()[:, at]
    if not flags & INT_PLAIN:
        zeros = fields(zero_points.reshape(-1, count).T, bits).T[:rows] - (1 << bits - 1)
    elif flags & INT_ONE_SCALE:
        zeros = zero_points.int().reshape(1, 1).expand(rows, count)
    else:
        zeros = zero_points.int().reshape(rows, count)
    return (q - zeros[:, at]).float() * scales.float()[:, at]


def gptq(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> Tensor:
    qweight, scales, qzeros, g_idx = parts
    (rows, columns), bits = shape, _bits(option)
    at = _groups(columns, group, g_idx, qweight.device)
    scales = scales.reshape(-1, rows).T.float()
    qzeros = qzeros.reshape(scales.shape[1], -1)
    if option >> 8 & V1:
        # The addition wraps at 32 bits, as an addition of int32 tensors does.
        qzeros = qzeros + (2**32 - 1) // (2**bits - 1)
    zeros = fields(qzeros.int(), bits)[:, :rows].T
    q = fields(qweight.reshape(-1, rows).T, bits)[:, :columns]
    return scales[:, at] * (q - zeros[:, at]).float()


def awq(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> Tensor:
    qweight, scales, qzeros = parts
    rows, columns = shape
    at = _groups(columns, group, None, qweight.device)
    shifts = torch.tensor(AWQ_SHIFTS, dtype=torch.int32, device=qweight.device)
    scales = scales.reshape(-1, rows).T.float()
    q, zeros = ((w.reshape(-1, rows // 8, 1) >> shifts & 15).flatten(1).T for w in (qweight, qzeros))
    return (q - zeros[:, at]).float() * scales[:, at]


def hqq(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> Tensor:
    codes, scale, zero = parts
    codes = codes.reshape(-1)
    if _bits(option) == 4:
        codes = torch.cat((codes >> 4, codes & 15))
    groups = (group, -1) if option >> 8 & HQQ_AXIS0 else (-1, group)
    each = (1, -1) if option >> 8 & HQQ_AXIS0 else (-1, 1)
    q = codes.reshape(groups).float()
    difference = (q - zero.reshape(each).float()).to(SCALE_TYPES[option & 15]).float()
    return (difference * scale.reshape(each).float()).reshape(shape)
