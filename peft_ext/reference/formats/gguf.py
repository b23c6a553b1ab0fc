"""Decodes GGUF's quantized types in plain PyTorch, in the order of operations of gguf's ``quants.py``.

A decoder of a type takes the blocks uint8 ``[n, bytes of a block]``, and returns the values float32
``[n, columns of a block]``. The types that have no kernel are decoded by the package gguf itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Optional

import torch
from torch import Tensor

from ...weights.gguf import TYPES, decoded_by_gguf

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_TWICE_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # in ggml, code 8 decodes to +0


def _half(blocks: Tensor, at: int) -> Tensor:
    """Returns the float16 at byte ``at`` of each block, as float32 ``[n, 1]``."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _fields(data: Tensor, bits: int, width: int) -> Tensor:
    """Returns the codes of ``bits`` bits, int32 ``[n, codes]``.

    ``width`` bytes hold ``width * 8 / bits`` codes: first the lowest bits of all these bytes, then the next bits.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=data.device)[:, None]
    return (data.int().reshape(len(data), -1, 1, width) >> shifts & ((1 << bits) - 1)).flatten(1)


def _scaled(scales: Tensor, codes: Tensor, offsets: Optional[Tensor] = None) -> Tensor:
    """Returns ``scales · codes``, or ``scales · codes + offsets``: each scale belongs to an equal number of
    neighbouring codes.
    """
    values = scales[..., None] * codes.float().reshape(len(codes), scales.shape[1], -1)
    return (values if offsets is None else values + offsets[..., None]).flatten(1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """Returns the fifth bits of each block's 32 codes, each times 16: the bits of the four bytes at ``at``, the lowest
    bit first."""
    return _fields(blocks[:, at : at + 4], 1, 1) << 4


def q4_0(blocks: Tensor) -> Tensor:
    return _scaled(_half(blocks, 0), _fields(blocks[:, 2:], 4, 16) - 8)


def q4_1(blocks: Tensor) -> Tensor:
    return _scaled(_half(blocks, 0), _fields(blocks[:, 4:], 4, 16), _half(blocks, 2))


def q5_0(blocks: Tensor) -> Tensor:
    return _scaled(_half(blocks, 0), (_fields(blocks[:, 6:], 4, 16) | _fifth_bits(blocks, 2)) - 16)


def q5_1(blocks: Tensor) -> Tensor:
    return _scaled(_half(blocks, 0), _fields(blocks[:, 8:], 4, 16) | _fifth_bits(blocks, 4), _half(blocks, 2))


def q8_0(blocks: Tensor) -> Tensor:
    return _scaled(_half(blocks, 0), blocks[:, 2:].view(torch.int8))


def tq2_0(blocks: Tensor) -> Tensor:
    return _scaled(_half(blocks, 64), _fields(blocks[:, :64], 2, 32) - 1)


def q2_k(blocks: Tensor) -> Tensor:
    scales = _half(blocks, 80) * (blocks[:, :16] & 15).float()
    minima = _half(blocks, 82) * (blocks[:, :16] >> 4).float()
    return _scaled(scales, _fields(blocks[:, 16:80], 2, 32), -minima)


def q3_k(blocks: Tensor) -> Tensor:
    low, high = _fields(blocks[:, 96:104], 4, 8), _fields(blocks[:, 104:108], 2, 4)
    scales = _half(blocks, 108) * ((low | high << 4) - 32).float()
    return _scaled(scales, (_fields(blocks[:, 32:96], 2, 32) | _fields(blocks[:, :32], 1, 32) << 2) - 4)


def _scales_and_offsets(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the eight scales and the eight negative minima of a block of Q4_K or Q5_K, each float32 ``[n, 8]``."""
    low, middle, high = blocks[:, 4:16].int().unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat((low & 63, (high & 15) | (low >> 2 & 48)), 1)
    minima = torch.cat((middle & 63, high >> 4 | (middle >> 2 & 48)), 1)
    return _half(blocks, 0) * scales.float(), -(_half(blocks, 2) * minima.float())


def q4_k(blocks: Tensor) -> Tensor:
    scales, offsets = _scales_and_offsets(blocks)
    return _scaled(scales, _fields(blocks[:, 16:], 4, 32), offsets)


def q5_k(blocks: Tensor) -> Tensor:
    scales, offsets = _scales_and_offsets(blocks)
    return _scaled(scales, _fields(blocks[:, 48:], 4, 32) | _fields(blocks[:, 16:48], 1, 32) << 4, offsets)


def q6_k(blocks: Tensor) -> Tensor:
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return _scaled(scales, (_fields(blocks[:, :128], 4, 64) | _fields(blocks[:, 128:192], 2, 32) << 4) - 32)


def _looked_up(table: Sequence[int], codes: Tensor) -> Tensor:
    return torch.tensor(table, device=codes.device)[codes]


def iq4_nl(blocks: Tensor) -> Tensor:
    return _scaled(_half(blocks, 0), _looked_up(_IQ4, _fields(blocks[:, 2:], 4, 16)))


def iq4_xs(blocks: Tensor) -> Tensor:
    low, high = _fields(blocks[:, 4:8], 4, 1), _fields(blocks[:, 2:4], 2, 1)
    scales = _half(blocks, 0) * ((low | high << 4) - 32).float()
    return _scaled(scales, _looked_up(_IQ4, _fields(blocks[:, 8:], 4, 16)))


def mxfp4(blocks: Tensor) -> Tensor:
    """Returns ``2 · e2m1(code) · 2^(e - 128)``, for every exponent byte e, 255 included."""
    exponents = blocks[:, :1].int()
    bits = torch.where(exponents < 2, 0x00200000 << exponents.clamp(max=1), (exponents - 1) << 23)
    return _scaled(bits.view(torch.float32), _looked_up(_TWICE_E2M1, _fields(blocks[:, 1:], 4, 16)))


_DECODERS: dict[int, Callable[[Tensor], Tensor]] = {
    2: q4_0, 3: q4_1, 6: q5_0, 7: q5_1, 8: q8_0, 10: q2_k, 11: q3_k, 12: q4_k, 13: q5_k, 14: q6_k, 20: iq4_nl,
    23: iq4_xs, 35: tq2_0, 39: mxfp4,
}  # fmt: skip


def _decoded(number: int, parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> Tensor:
    if number not in _DECODERS:
        return decoded_by_gguf(number, parts, shape)
    return _DECODERS[number](parts[0].reshape(-1, TYPES[number].bytes)).reshape(shape)


DECODERS = {f"gguf_{type.name.lower()}": partial(_decoded, number) for number, type in TYPES.items()}
