"""Quantizes to GGUF's types with searched scales: Q2_K to Q6_K, IQ4_NL and IQ4_XS, in plain PyTorch.

For a group of 16 or 32 columns, a few trial scales give codes, and a least-squares fit to these codes gives a scale, or
a scale and an offset. Of the fits of all trial scales, the fit with the least weighted error gives the scale and the
offset of the group. For Q3_K, single codes of one trial scale are changed while the error falls. In blocks of 256
columns, the scales of the groups are then rounded to 4 to 8 bits, and the codes are rounded again for the rounded
scales.

Layout: the float32 tensor ``x[n, G]`` has one group in each of its G columns, so that one PyTorch operation handles all
groups. All sums over the n elements of a group run in order, in float32, so that the bits are those of llama.cpp on a
processor without fused multiply-add.

Source: llama.cpp ggml-quants.c (``quantize_row_*_ref``, ``quantize_iq4_nl``, ``quantize_iq4_xs``), without importance
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# For Q3_K, Q6_K, IQ4_NL and IQ4_XS, a group whose largest absolute value is below _LEAST counts as zeros.
_LEAST = 1e-15
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


# --- arithmetic of llama.cpp ------------------------------------------------------------------------------------------


def _rounded(values: Tensor) -> Tensor:
    """Returns the nearest integers, int32, ties to even, for absolute values below 2²².

    Adding 1.5 · 2²³ puts the integer plus 2²² into the lowest 23 bits of the float32. The result for larger absolute
    values is wrong in the same way as in llama.cpp: it wraps around.
    """
    return ((values + 12582912.0).view(torch.int32) & 0x7FFFFF) - 0x400000


def _codes(values: Tensor, low: int, high: int) -> Tensor:
    return _rounded(values).clamp_(low, high).float()


def _summed(terms: Tensor) -> Tensor:
    """Returns the sums over dimension 0, added in order."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def _over(number: float, values: Tensor) -> Tensor:
    """Returns ``number / values``, rounded once; PyTorch's own ``number / values`` multiplies with ``1 / values``."""
    return torch.tensor(number, dtype=torch.float32) / values


def _steps(start: float, step: float, count: int, add: int) -> list[float]:
    """Returns ``start + step · i + add`` for i from 0 to ``count``, each operation rounded to float32."""
    step = _float32(step)
    return [_float32(_float32(_float32(start) + _float32(step * i)) + add) for i in range(count + 1)]


def _first_largest(values: Tensor) -> Tensor:
    """Returns, over dimension 0, the value with the largest absolute value; if several are equal, the first one."""
    return values.gather(0, values.abs().argmax(0, keepdim=True))[0]


def _largest_above_zero(values: Tensor) -> Tensor:
    """Returns the largest values over dimension 1, or +0 where no value is positive."""
    largest = values.amax(1)
    return torch.where(largest > 0, largest, 0.0)


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values != 0, _over(1, values), 0.0)


# --- the search for scales --------------------------------------------------------------------------------------------


class _Searched(NamedTuple):
    """The found scales ``[G]``, offsets ``[G]`` and codes float ``[n, G]`` of G groups: ``x ≈ scale · code −
    offset``."""

    scale: Tensor
    offset: Tensor
    codes: Tensor


def _search_offset(x: Tensor, weights: Tensor, most: int, start: float, count: int, absolute: bool) -> _Searched:
    """Searches for each group the scale and the ``offset >= 0`` of ``x ≈ scale · code − offset`` with codes 0 to
    ``most``.

    Each trial scale gives codes, and linear regression gives the scale and the offset with the least weighted square
    error for these codes. The scale and the offset that give the smallest value the code 0 and the largest value the
    code ``most`` are a trial, too. If the smallest value of a group is above 0, the search uses 0 in place of the
    smallest value. The function returns the result of the trial with the least error.

    Args:
        weights: ``[n, G]``, the factor of each number's error in the sum of a group's errors.
        start: the first trial scale is ``(largest − smallest) / (most + start)``; each next trial scale adds 0.1 to
            ``start``, and ``smallest`` is replaced by ``−offset`` of the best trial so far.
        count: number of trial scales after the first.
        absolute: whether absolute errors are compared, instead of squares.
    """

    def error(scale: Tensor, codes: Tensor, low: Tensor) -> Tensor:
        difference = (scale * codes).add_(low).sub_(x)
        difference = difference.abs_() if absolute else difference.square_()
        return _summed(difference.mul_(weights))

    low, high = x.amin(0).clamp(max=0), x.amax(0)
    sum_w, sum_x = _summed(weights), _summed(weights * x)
    flat = high == low
    inverse = _over(most, high - low)
    scale = _over(1, inverse)
    used, used_low = inverse, low  # 1 / scale and −offset of the trial with the best codes
    best = error(scale, _codes(inverse * (x - low), 0, most), low)
    for numerator in _steps(start, 0.1, count, most):
        inverse = _over(numerator, high - low)
        codes = _codes((x - low).mul_(inverse), 0, most)
        weighted = weights * codes
        sum_l, sum_xl = _summed(weighted), _summed(weighted * x)
        sum_l2 = _summed(weighted.mul_(codes))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = new_low > 0
        new_scale = torch.where(above, sum_xl / sum_l2, new_scale)
        new_low = torch.where(above, 0.0, new_low)
        found = error(new_scale, codes, new_low)
        better = (determinant > 0) & (found < best) & ~flat
        used, used_low = torch.where(better, inverse, used), torch.where(better, low, used_low)
        best, scale, low = (torch.where(better, new, old) for new, old in
                            ((found, best), (new_scale, scale), (new_low, low)))  # fmt: skip
    codes = _codes(used * (x - used_low), 0, most)
    return _Searched(torch.where(flat, 0.0, scale), -low, torch.where(flat, 0.0, codes))


def _search_scale(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Searches for each group the scale of ``x ≈ scale · (code − most)`` with codes from 0 to ``2 · most − 1`` and
    errors weighted by x².

    The trial scales are near the scale with which the value with the largest absolute value has the code 0. Returns
    scales ``[G]`` and codes ``[n, G]``, as floats, of G groups of n values.
    """
    largest = _first_largest(x)
    zero = largest.abs() < _LEAST
    weights = x * x
    weighted = weights * x

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        codes = _codes(inverse * x, -most, most - 1)
        return _summed(weighted * codes), _summed((weights * codes).mul_(codes))

    used = _over(-most, largest)
    sum_lx, sum_l2 = sums(used)
    scale = torch.where(sum_l2 != 0, sum_lx / sum_l2, 0.0)
    best = scale * sum_lx
    for step in range(-9, 10):
        if step == 0:
            continue
        inverse = _over(-_float32(most + _float32(_float32(0.1) * step)), largest)
        sum_lx, sum_l2 = sums(inverse)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        found = sum_lx / sum_l2
        used, scale = torch.where(better, inverse, used), torch.where(better, found, scale)
        best = torch.where(better, found * sum_lx, best)
    codes = _codes(used * x, -most, most - 1) + most
    return torch.where(zero, 0.0, scale), torch.where(zero, 0.0, codes)


def _descend_scale(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Searches the scale of ``x ≈ scale · (code − most)``, like :func:`_search_scale`, in at most 5 rounds over the
    codes.

    A round tries a new value for one code after another, and keeps the value if the error with the best scale for all
    codes is then lower.
    """
    largest = _first_largest(x)
    zero = largest.abs() < _LEAST
    weights = x * x
    weighted = weights * x
    codes = _codes(_over(-most, largest) * x, -most, most - 1)
    sum_lx, sum_l2 = _summed(weighted * codes), _summed(weights * codes * codes)
    for _ in range(5):
        changed = False
        for w, wx, column, code in zip(weights, weighted, x, codes, strict=True):
            other_lx, other_l2 = sum_lx - wx * code, sum_l2 - w * code * code
            new = _codes(column * other_l2 / other_lx, -most, most - 1)
            new_lx, new_l2 = other_lx + wx * new, other_l2 + w * new * new
            better = (other_lx > 0) & (new != code) & (new_l2 > 0)
            better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            if better.any():
                changed = True
                code.copy_(torch.where(better, new, code))
                sum_lx, sum_l2 = torch.where(better, new_lx, sum_lx), torch.where(better, new_l2, sum_l2)
        if not changed:
            break
    scale = torch.where(sum_l2 > 0, sum_lx / sum_l2, 0.0)
    return torch.where(zero, 0.0, scale), torch.where(zero, 0.0, codes + most)


def _nearest_iq4() -> tuple[Tensor, Tensor]:
    """Returns tables ``[512]`` of the nearest code and value of ``_IQ4``; the index for a number x is ``floor(2 · x) +
    256``.

    The table of codes is uint8, the table of values float32. The borders between the codes are multiples of 1/2, so
    that all numbers x with the same index have the same nearest code. If two values are equally near, the tables have
    the larger value.
    """
    table = torch.tensor(_IQ4, dtype=torch.float32)
    codes = torch.bucketize(torch.arange(-256, 256) / 2, (table[1:] + table[:-1]) / 2, right=True)
    return codes.to(torch.uint8), table[codes]


_IQ4_CODES, _IQ4_VALUES = _nearest_iq4()


def _looked_up(values: Tensor, table: Tensor) -> Tensor:
    places = (values * 2).floor_().to(torch.int32).clamp_(-256, 255).add_(256)
    return table.index_select(0, places.view(-1)).view(values.shape)


def _search_iq4(x: Tensor) -> Tensor:
    """Searches the scales ``[G]`` of ``x ≈ scale · table[code]``, with errors weighted by x²."""
    largest = _first_largest(x)
    weights = x * x

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        values = _looked_up(inverse * x, _IQ4_VALUES)
        weighted = weights * values
        return _summed(weighted * x), _summed(weighted.mul_(values))

    sum_qx, sum_q2 = sums(_over(1, -largest / _IQ4[0]))
    scale = torch.where(sum_q2 > 0, sum_qx / sum_q2, 0.0)
    best = scale * sum_qx
    for step in range(-7, 8):
        sum_qx, sum_q2 = sums(_over(step + _IQ4[0], largest))
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        found = sum_qx / sum_q2
        scale, best = torch.where(better, found, scale), torch.where(better, found * sum_qx, best)
    return torch.where(largest.abs() < _LEAST, 0.0, scale)


# --- bytes ------------------------------------------------------------------------------------------------------------


def _grouped(rows: Tensor, size: int) -> Tensor:
    """Returns rows ``[..., K]`` as G groups of ``size`` neighbouring columns, ``[size, G]``."""
    return rows.reshape(-1, size).t().contiguous()


def _blocks(codes: Tensor) -> Tensor:
    """Returns codes float ``[n, G]`` as uint8 ``[B, 256]``, with one block in each row."""
    return codes.t().reshape(-1, 256).to(torch.uint8)


def _half_bytes(values: Tensor) -> Tensor:
    """Returns values ``[B]``, rounded to float16, as uint8 ``[B, 2]``."""
    return values.half()[:, None].view(torch.uint8)


def _rounded_to_half(values: Tensor) -> Tensor:
    return values.half().float()


def _two_bits(codes: Tensor) -> Tensor:
    """Returns codes 0 to 3 ``[B, 256]`` as bytes ``[B, 64]``: four codes 32 columns apart share a byte."""
    a, b, c, d = codes.view(-1, 2, 4, 32).unbind(2)
    return (a | b << 2 | c << 4 | d << 6).flatten(1)


def _four_bits(codes: Tensor, apart: int) -> Tensor:
    """Returns codes 0 to 15 ``[B, 256]`` as bytes ``[B, 128]``: two codes ``apart`` columns apart share a byte."""
    low, high = codes.view(len(codes), -1, 2, apart).unbind(2)
    return (low | high << 4).flatten(1)


def _bytes_of_scales(scales: Tensor, offsets: Tensor) -> Tensor:
    """Returns 6-bit scales and 6-bit offsets, each uint8 ``[B, 8]``, as the 12 bytes in which a block of Q4_K or Q5_K
    stores its scales and offsets.

    The first eight of a block's 12 bytes have the first four scales and the first four offsets in their lower six bits,
    and the upper two bits of the last four scales and offsets in their upper two bits. The last four of the 12 bytes
    have the lower four bits of the last four scales and offsets.
    """
    first, last, first_offset, last_offset = scales[:, :4], scales[:, 4:], offsets[:, :4], offsets[:, 4:]
    return torch.cat([first | last >> 4 << 6, first_offset | last_offset >> 4 << 6,
                      last & 15 | (last_offset & 15) << 4], 1)  # fmt: skip


# --- types ------------------------------------------------------------------------------------------------------------


def _q2_k(rows: Tensor) -> Tensor:
    x = _grouped(rows, 16)
    found = _search_offset(x, x.abs(), 3, -0.5, 15, absolute=True)
    scales, offsets = found.scale.view(-1, 16), found.offset.view(-1, 16)
    most, most_offset = _largest_above_zero(scales), _largest_above_zero(offsets)
    four = _rounded(torch.where(most > 0, _over(15, most), 0.0)[:, None] * scales)
    four_offset = _rounded(torch.where(most_offset > 0, _over(15, most_offset), 0.0)[:, None] * offsets)
    held = (four | four_offset << 4).to(torch.uint8)
    d, d_offset = most / 15, most_offset / 15
    scale = (_rounded_to_half(d)[:, None] * (held & 15)).view(-1)
    offset = (_rounded_to_half(d_offset)[:, None] * (held >> 4)).view(-1)
    codes = torch.where(scale != 0, _codes((x + offset) / scale, 0, 3), found.codes)
    return torch.cat([held, _two_bits(_blocks(codes)), _half_bytes(d), _half_bytes(d_offset)], 1)


def _q3_k(rows: Tensor) -> Tensor:
    x = _grouped(rows, 16)
    scales, codes = _descend_scale(x, 4)
    scales = scales.view(-1, 16)
    largest = _first_largest(scales.t())
    inverse = _over(-32, largest)
    six = torch.where(largest[:, None] != 0, _codes(inverse[:, None] * scales, -32, 31), -32.0)
    d = torch.where(largest != 0, _over(1, inverse), 0.0)
    scale = (_rounded_to_half(d)[:, None] * six).view(-1)
    codes = torch.where(scale != 0, _codes(x / scale, -4, 3) + 4, codes)
    # A 6-bit scale s from -32 to 31 is stored as s + 32. If all scales of a block are 0, each is stored as 0 instead of
    # 32.
    six = (six + 32).to(torch.uint8)
    packed = _blocks(codes)
    bits = (packed > 3).to(torch.uint8).view(-1, 8, 32)
    high = (bits << torch.arange(8, dtype=torch.uint8)[:, None]).sum(1, dtype=torch.uint8)
    low_scales = six[:, :8] & 15 | (six[:, 8:] & 15) << 4
    uppers = (six >> 4).view(-1, 4, 4) << torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    return torch.cat([high, _two_bits(packed & 3), low_scales, uppers.sum(1, dtype=torch.uint8), _half_bytes(d)], 1)


def _with_offsets(rows: Tensor, most: int, start: float, count: int) -> tuple[Tensor, Tensor]:
    """Returns the codes uint8 ``[B, 256]``, and the first 16 bytes of the blocks, of Q4_K and Q5_K."""
    x = _grouped(rows, 32)
    # A square root in float64 is rounded correctly to float32; PyTorch's square roots in float32 are not always rounded
    # correctly.
    mean = (_summed(x * x) / 32).double().sqrt().float()
    found = _search_offset(x, mean + x.abs(), most, start, count, absolute=False)
    scales, offsets = found.scale.view(-1, 8), found.offset.view(-1, 8)
    most_scale, most_offset = _largest_above_zero(scales), _largest_above_zero(offsets)

    def six_bits(values: Tensor, largest: Tensor) -> Tensor:
        inverse = torch.where(largest > 0, _over(63, largest), 0.0)[:, None]
        return _rounded(inverse * values).to(torch.uint8)

    six, six_offset = six_bits(scales, most_scale), six_bits(offsets, most_offset)
    d, d_offset = most_scale / 63, most_offset / 63
    scale = (_rounded_to_half(d)[:, None] * six).view(-1)
    offset = (_rounded_to_half(d_offset)[:, None] * six_offset).view(-1)
    codes = torch.where(scale != 0, _codes((x + offset) / scale, 0, most), found.codes)
    return _blocks(codes), torch.cat([_half_bytes(d), _half_bytes(d_offset), _bytes_of_scales(six, six_offset)], 1)


def _q4_k(rows: Tensor) -> Tensor:
    codes, head = _with_offsets(rows, 15, -1.0, 20)
    return torch.cat([head, _four_bits(codes, 32)], 1)


def _q5_k(rows: Tensor) -> Tensor:
    codes, head = _with_offsets(rows, 31, -0.5, 15)
    fifth = (codes >> 4).view(-1, 8, 32) << torch.arange(8, dtype=torch.uint8)[:, None]
    return torch.cat([head, fifth.sum(1, dtype=torch.uint8), _four_bits(codes & 15, 32)], 1)


def _q6_k(rows: Tensor) -> Tensor:
    x = _grouped(rows, 16)
    scales, codes = _search_scale(x, 32)
    scales = scales.view(-1, 16)
    largest = _first_largest(scales.t())
    zero = largest.abs() < _LEAST
    inverse = _over(-128, largest)
    d = torch.where(zero, 0.0, _over(1, inverse))
    eight = torch.where(zero[:, None], 0, _rounded(inverse[:, None] * scales).clamp(max=127)).to(torch.int8)
    scale = (_rounded_to_half(d)[:, None] * eight).view(-1)
    codes = torch.where(scale != 0, _codes(x / scale, -32, 31) + 32, codes)
    packed = torch.where(zero[:, None], 0, _blocks(codes))
    low = _four_bits(packed & 15, 64)
    return torch.cat([low, _two_bits(packed >> 4), eight.view(torch.uint8), _half_bytes(d)], 1)


def _iq4_nl(rows: Tensor) -> Tensor:
    x = _grouped(rows, 32)
    scale = _search_iq4(x)
    codes = _looked_up(_inverse(scale) * x, _IQ4_CODES).t()
    return torch.cat([_half_bytes(scale), codes[:, :16] | codes[:, 16:] << 4], 1)


def _iq4_xs(rows: Tensor) -> Tensor:
    x = _grouped(rows, 32)
    scales = _search_iq4(x).view(-1, 8)
    d = -_first_largest(scales.t()) / 32
    six = _codes(_inverse(d)[:, None] * scales, -32, 31)
    codes = _looked_up(_inverse(d[:, None] * six).view(-1) * x, _IQ4_CODES)
    six = (six + 32).to(torch.int32)
    low = (six[:, 0::2] & 15 | (six[:, 1::2] & 15) << 4).to(torch.uint8)
    high = (six >> 4 << torch.arange(0, 16, 2, dtype=torch.int32)).sum(1, dtype=torch.int32)
    high = torch.stack([high & 255, high >> 8], 1).to(torch.uint8)
    return torch.cat([_half_bytes(d), high, low, _four_bits(_blocks(codes), 16)], 1)


# Maps the name of a type to the function that quantizes float32 rows [N, K] to the bytes of the blocks, uint8 [N · K /
# columns, bytes].
QUANTIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip
