"""Counter-based dropout: Philox4x32-7 with one 16-bit draw per element.

Element ``i`` (flat, row-major) uses draw ``i % 8`` of the block with counter
``(g mod 2^32, g div 2^32, offset mod 2^32, offset div 2^32)``, ``g = i // 8``, and key
``(seed mod 2^32, seed div 2^32)``. Draw ``j`` is the low half (``j`` even) or the high half (``j`` odd) of 32-bit word
``j // 2`` of the block. Dropout keeps the element if ``draw >= round(p * 65536)``. The mask is a function of (seed,
offset, p, i), so that the backward can compute the mask again, and the forward need not save the mask.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): seven rounds are the fewest of
Philox4x32 that pass BigCrush.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ROUNDS", "dropout_keep_mask", "dropout_threshold", "philox4x32"]

ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def dropout_threshold(p: float) -> int:
    """Returns the smallest draw that dropout keeps: ``round(p * 65536)``, rounded half to even."""
    return round(p * 65536)


def _mul_hi_lo(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Returns the high and low 32 bits of ``a * multiplier``, from 16-bit halves, because int64 products are signed."""
    low = a * (multiplier & 0xFFFF)
    high = a * (multiplier >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Returns one block of Philox4x32 with ``ROUNDS`` (7) rounds. Each tensor of ``counter``, ``key`` and the result is
    int64 and holds 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        hi0, lo0 = _mul_hi_lo(c0, _MULTIPLIERS[0])
        hi1, lo1 = _mul_hi_lo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def dropout_keep_mask(seed: Tensor, p: float, shape: torch.Size) -> Tensor:
    """Returns a bool tensor of ``shape``: True where dropout keeps the element.

    Args:
        seed: int64 ``[2]``: (seed, offset), each read as an unsigned 64-bit integer.
        p: probability that an element is dropped, ``0 <= p < 1``, rounded to a multiple of 2^-16.
    """
    numel = 1
    for size in shape:
        numel *= size
    group = torch.arange((numel + 7) // 8, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(group)
    words = [part & _MASK32 for part in (seed[0], seed[0] >> 32, seed[1], seed[1] >> 32)]
    counter = (group & _MASK32, group >> 32, zero + words[2], zero + words[3])
    drawn = torch.stack(philox4x32(counter, (words[0], words[1])), dim=1)
    halves = torch.stack((drawn & 0xFFFF, drawn >> 16), dim=2).reshape(-1)[:numel]
    return (halves >= dropout_threshold(p)).view(shape)
