"""What the references of the adapted linear layers share."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from ..weight import NF4Weight
from .nf4 import nf4_dequantize
from .philox import dropout_keep_mask

# Where an output's scale is smaller, the output holds too little of what was scaled (in float16 it may be subnormal,
# or 0): the backward computes that from x again.
SMALLEST_SCALE = 2.0**-6


def dense(weight: Union[Tensor, NF4Weight], dtype: torch.dtype) -> Tensor:
    """Returns the weight that a product in ``dtype`` takes: NF4 is rounded to it once, a dense one is of it already."""
    return nf4_dequantize(weight, dtype) if isinstance(weight, NF4Weight) else weight


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Products are summed in float32, or in float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def rows(value: Tensor) -> Tensor:
    """Returns ``[..., F]`` as ``[T, F]``."""
    return value.reshape(-1, value.shape[-1])


def dropped(x: Tensor, p: float, seed: Optional[Tensor]) -> Tensor:
    """Returns ``mask ∘ x / (1 - p)``, or ``x`` where there is no seed."""
    if seed is None:
        return x
    return torch.where(dropout_keep_mask(seed, p, x.shape), x * (1.0 / (1.0 - p)), 0.0)


def dropout_seed(
    seed: Optional[Tensor], dropout_p: float, training: bool, device: torch.device | str
) -> Optional[Tensor]:
    """Returns the seed of an active dropout, drawn from PyTorch's generator where none is given; None: no dropout."""
    if not training or dropout_p == 0.0:
        return None
    if seed is None:
        seed = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)
    return seed
