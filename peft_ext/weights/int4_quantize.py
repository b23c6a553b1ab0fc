"""Quantizes a weight to 4-bit integers in groups, with compressed-tensors' min-max rule, in plain PyTorch."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .int_groups import SCALES, int_rows
from .packed import PackedWeight

_CHUNK = 1 << 22  # number of elements of a weight that quantize_int4 converts to float32 at a time


def quantize_int4(weight: Tensor, group: int = 128, symmetric: bool = True,
                  scale_dtype: Optional[torch.dtype] = None) -> PackedWeight:  # fmt: skip
    """Quantizes a weight ``[N, K]`` to 4-bit integers with compressed-tensors' min-max rule.

    With the smallest value ``lo <= 0`` and the largest value ``hi >= 0`` of a group, the scale is
    ``max(-lo, hi) / 7.5`` (symmetric) or ``(hi - lo) / 15`` (not symmetric). The zero point ``zero`` is 0 (symmetric)
    or ``round(clamp(-8 - lo / scale, -8, 7))`` (not symmetric). The code is ``round(clamp(w / scale + zero, -8, 7))``.
    The arithmetic is in float32. The scale of a group is rounded to ``scale_dtype`` before the codes are computed, and
    a scale of 0 is replaced by the dtype's epsilon. The function quantizes the rows in chunks, to save memory.

    Args:
        weight: float ``[N, K]``; K must be a multiple of ``group``.
        group: number of columns that share a scale; 0: all columns of a row.
        symmetric: whether all zero points are 0.
        scale_dtype: float32, bfloat16 or float16; default: the weight's dtype, or float32 for a float64 weight.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"quantize_int4: weight is {weight.dtype} {tuple(weight.shape)}, wanted a float [N, K]")
    rows, columns = weight.shape
    if not columns or group < 0 or (group and columns % group):
        raise ValueError(f"quantize_int4: group is {group}, wanted 0 or a divisor of the {columns} columns")
    size = group or columns
    if scale_dtype is None:
        scale_dtype = weight.dtype if weight.dtype in SCALES else torch.float32
    codes = torch.empty(rows, -(-columns // 8), dtype=torch.int32, device=weight.device)
    scales = torch.empty(rows, columns // size, dtype=scale_dtype, device=weight.device)
    zeros = torch.zeros(rows, columns // size, dtype=torch.int32, device=weight.device)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        chunk = weight[start : start + step].detach().float().unflatten(1, (-1, size))
        at = slice(start, start + len(chunk))
        low, high = chunk.amin(-1).clamp(max=0), chunk.amax(-1).clamp(min=0)
        scale = torch.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15
        if not symmetric:
            zeros[at] = (-8 - low / scale).clamp(-8, 7).nan_to_num(0).round().int()
        rounded = scale.to(scale_dtype)
        scales[at] = rounded.masked_fill(rounded == 0, torch.finfo(scale_dtype).eps)
        q = chunk / scales[at].float()[..., None]
        if not symmetric:
            q += zeros[at][..., None]
        codes[at] = _pack4(q.clamp(-8, 7).round().int().flatten(1) + 8)
    zero_points = None if symmetric else _pack4(zeros.T + 8).T.contiguous()
    return int_rows(codes, scales, (rows, columns), bits=4, zero_points=zero_points)


def _pack4(codes: Tensor) -> Tensor:
    """Returns codes from 0 to 15 ``[R, C]`` in int32 words ``[R, ceil(C / 8)]``, the lowest bits first."""
    words = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    return (words << shifts).sum(-1, dtype=torch.int32)
