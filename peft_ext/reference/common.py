"""Functions that several modules of ``peft_ext.reference`` use."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from ..weights.packed import PackedWeight
from .nf4 import nf4_dequantize
from .philox import dropout_keep_mask

# If the scale of an output is smaller than SMALLEST_SCALE, dividing the output by the scale would lose precision (a
# float16 output may be subnormal or 0). For an output with a scale below SMALLEST_SCALE, the backward computes the
# unscaled output again from x.
SMALLEST_SCALE = 2.0**-6


def dense(weight: Union[Tensor, PackedWeight], dtype: torch.dtype) -> Tensor:
    """Returns a dense weight unchanged, and a packed weight decoded and rounded once to ``dtype``."""
    return nf4_dequantize(weight, dtype) if isinstance(weight, PackedWeight) else weight


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which products are summed: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def rows(value: Tensor) -> Tensor:
    """Returns ``value [..., F]`` reshaped to ``[T, F]``, where T is the product of the leading sizes."""
    return value.reshape(-1, value.shape[-1])


def dropped(x: Tensor, p: float, seed: Optional[Tensor]) -> Tensor:
    """Returns ``mask ∘ x / (1 - p)``, or ``x`` itself if ``seed`` is None."""
    if seed is None:
        return x
    return torch.where(dropout_keep_mask(seed, p, x.shape), x * (1.0 / (1.0 - p)), 0.0)


def dropout_seed(
    seed: Optional[Tensor], dropout_p: float, training: bool, device: torch.device | str
) -> Optional[Tensor]:
    """Returns ``seed``, or a seed that PyTorch's generator draws if ``seed`` is None. Returns None if no dropout is
    active."""
    if not training or dropout_p == 0.0:
        return None
    if seed is None:
        seed = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)
    return seed


def drawn_seeds(count: int, device: torch.device | str) -> tuple[Tensor, ...]:
    """Returns ``count`` seeds that PyTorch's generator of the device draws, with one kernel launch on a GPU. On a CPU
    the seeds equal those that ``count`` calls of :func:`dropout_seed` would draw one after another.
    """
    return torch.randint(0, 2**63 - 1, (count, 2), dtype=torch.int64, device=device).unbind(0)
