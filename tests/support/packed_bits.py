"""Compares the values of packed weights with the reference's, bit for bit, on every CPU path."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from peft_ext import _native
from peft_ext.reference.formats import decoded
from peft_ext.weights import PackedWeight

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def same_bits(got: Tensor, want: Tensor) -> None:
    """Asserts that dtypes, shapes and bits of two tensors are equal. All NaNs count as equal."""
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[want.element_size()]
    bits = [torch.where(value.isnan(), 0.0, value).contiguous().view(kind) for value in (got, want)]
    assert (wrong := (bits[0] != bits[1]).sum().item()) == 0, f"{wrong} of {want.numel()} elements differ"


@pytest.fixture
def set_path() -> Iterator[Callable[[str], None]]:
    module = _native.STATE.module
    before = module.isa()
    yield module.set_isa
    module.set_isa(before)


def check_paths(weight: PackedWeight, set_path: Callable[[str], None],
                dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:  # fmt: skip
    """Asserts that ``weight.dequantize`` has the reference's bits on every CPU path."""
    for dtype in dtypes:
        want = decoded(weight, dtype)
        for path in _native.STATE.module.isas():
            set_path(path)
            same_bits(weight.dequantize(dtype), want)
