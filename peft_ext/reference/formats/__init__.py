"""Decoders of packed weights in plain PyTorch, one module for each family of formats.

A decoder has the arguments ``(parts, shape, group, option)`` of one weight ``[N, K]``, and returns the values in
float32. A decoder calls no operator of peft_ext.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...weights.packed import PackedWeight
from . import fp4, fp8, gguf, int_groups, mx

__all__ = ["DECODERS", "decoded"]

DECODERS = {
    "fp4": fp4.fp4,
    "mxfp4": mx.mxfp4,
    "nvfp4": mx.nvfp4,
    "fp8": fp8.fp8,
    "int": int_groups.int_rows,
    "gptq": int_groups.gptq,
    "awq": int_groups.awq,
    "hqq": int_groups.hqq,
    **gguf.DECODERS,
}


def decoded(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Returns the decoded weight ``[N, K]`` or ``[E, N, K]``, rounded once from float32 to ``dtype``."""
    if weight.stacked:
        return torch.stack([decoded(weight.expert(i), dtype) for i in range(weight.shape[0])])
    return DECODERS[weight.format.name](weight.parts, weight.shape, weight.group, weight.option).to(dtype)
