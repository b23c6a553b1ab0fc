"""Values that the tests of operators share: names of parameters, whether the CPU path multiplies with tiles, and
strided tensors."""

from __future__ import annotations

import pytest
import torch
from op_db import CASES, Case
from torch import Tensor

from peft_ext import _native

LINEAR = [case for case in CASES if not case.exact]
# Whether the CPU path in use multiplies bfloat16 with peft_ext's tiles.
TILES = _native.STATE.isa in _native.TILE_PATHS
SAVES = [False, pytest.param(True, marks=pytest.mark.cpu_only("elsewhere the promise changes nothing"))]


def ids(case: Case) -> str:
    return case.name


def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def strided(value: Tensor) -> Tensor:
    """Returns the values in a tensor that is not contiguous; a tensor without dimensions stays as it is."""
    if value.dim() == 0:
        return value
    if value.dim() > 1 and 1 not in value.shape:
        value = value.transpose(0, -1).contiguous().transpose(0, -1)
    else:
        value = value.flatten().repeat_interleave(2)[::2].view(value.shape)
    assert not value.is_contiguous()
    return value
