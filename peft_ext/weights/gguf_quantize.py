"""Quantizes float32 weights to GGUF's types, as bytes of the file."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .._imports import required
from .gguf import TYPES, dense_dtype, type_number
from .gguf_k_quants import QUANTIZERS

__all__ = ["QUANTIZED_BY_GGUF", "can_quantize", "is_finite", "quantize_gguf"]

# Types to which quantize_gguf quantizes with the package gguf.
QUANTIZED_BY_GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
_CHUNK = 1 << 19  # number of elements that are quantized at a time, so that a chunk's tensors stay in a core's cache


def can_quantize(type: int | str) -> bool:
    """Returns whether :func:`quantize_gguf` can quantize to the type."""
    number = type_number(type)
    return number not in TYPES or TYPES[number].name in (*QUANTIZED_BY_GGUF, *QUANTIZERS)


def quantize_gguf(values: Tensor, type: int | str) -> Tensor:
    """Returns a float weight ``[..., N, K]`` in a type of GGUF: the bytes of the file, uint8 ``[..., N, bytes]``.

    Args:
        values: finite values, which are converted to float32. K must be a multiple of the number of columns of a block
            of the type.
        type: ggml's type, as a number or a name: a type for which :func:`can_quantize` is True. F32, F16, BF16 and F64
            round to the nearest value.

    Raises:
        TypeError: ``values`` is not a float tensor.
        ValueError: there is no quantizer for the type, ``values`` has no elements, K is not a multiple of the type's
            block, or a value is NaN or infinite.

    Sources: for the types in ``QUANTIZED_BY_GGUF``, ``quantize`` in gguf's ``quants.py``; for the other quantized
    types, llama.cpp, with equal bits, see ``peft_ext.weights.gguf_k_quants``.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        came = values.dtype if isinstance(values, Tensor) else values.__class__.__name__
        raise TypeError(f"quantize_gguf: values is {came}, wanted a float tensor")
    number = type_number(type)
    if not can_quantize(number):
        raise ValueError(f"quantize_gguf: there is no quantizer for {TYPES[number].name}, wanted for example Q8_0")
    columns = TYPES[number].columns if number in TYPES else 1
    if values.dim() < 1 or not values.numel() or values.shape[-1] % columns:
        raise ValueError(
            f"quantize_gguf: values has shape {tuple(values.shape)}, wanted rows of a multiple of {columns} columns"
        )
    if not is_finite(values):
        raise ValueError("quantize_gguf: values has a NaN or an infinity, wanted finite values")
    values = values.detach().to("cpu", torch.float32)
    if number not in TYPES:
        return values.to(dense_dtype(number)).contiguous().view(torch.uint8)
    rows = values.reshape(-1, values.shape[-1])
    step = max(1, _CHUNK // rows.shape[1])
    quantize = QUANTIZERS.get(TYPES[number].name) or partial(_by_gguf, number=number)
    done = torch.cat([quantize(rows[start : start + step]).view(-1) for start in range(0, len(rows), step)])
    return done.view(*values.shape[:-1], -1)


def is_finite(values: Tensor) -> bool:
    """Returns whether no value is NaN or infinite, in one pass over the values."""
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())


def _by_gguf(rows: Tensor, number: int) -> Tensor:
    with required("gguf", "quantizing to GGUF's types"):
        import numpy
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

    with numpy.errstate(all="ignore"):
        found = quantize(rows.contiguous().numpy(), GGMLQuantizationType(number))
    return torch.from_numpy(found)
