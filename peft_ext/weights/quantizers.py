"""Quantizes dense weights to packed formats, chosen by the format's name or by a packed weight whose layout is
wanted."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from .fp8 import FP8, block_size, quantize_fp8
from .gguf import ggml_type, gguf_weight
from .gguf_quantize import can_quantize, quantize_gguf
from .int4_quantize import quantize_int4
from .int_groups import INT, SCALES
from .mx import MXFP4, NVFP4, quantize_mxfp4, quantize_nvfp4
from .packed import PackedWeight

# Names of the formats that quantize_packed accepts. finetune and estimate_memory accept the names in PACKED_FORMATS and
# some others, such as "nf4".
PACKED_FORMATS = ("mxfp4", "nvfp4", "fp8", "int4")

# Values of the option --quant of peft-ext's commands. With the value "checkpoint", the weights stay packed as the
# checkpoint stores them.
QUANTIZATIONS = ("nf4", *PACKED_FORMATS, "checkpoint", "none")


def quantized(weight: Tensor, format: str) -> PackedWeight:
    """Quantizes a weight ``[N, K]``, or the weights ``[E, N, K]`` of experts, to ``format``, one of ``PACKED_FORMATS``.

    For a weight on the meta device, the packed weight is on the meta device, too.
    """
    weight = weight.detach()
    if weight.dim() == 3:
        return PackedWeight.stack([quantized(one, format) for one in weight])
    if format == "int4":
        return quantize_int4(weight, int4_group(weight.shape[1]) or weight.shape[1])
    return {"mxfp4": quantize_mxfp4, "nvfp4": quantize_nvfp4, "fp8": quantize_fp8}[format](weight)


def int4_group(columns: int) -> int:
    """Returns the largest number of columns of 128, 64 and 32 that divides ``columns``; 0 if none does."""
    return next((group for group in (128, 64, 32) if columns % group == 0), 0)


def quantized_like(weight: Tensor, like: PackedWeight) -> Optional[PackedWeight]:
    """Quantizes a float weight ``[N, K]`` to the layout of ``like``: its format, its groups, and the dtypes of its
    tensors.

    Returns None if no quantizer makes this layout.
    """
    format, found, held = like.format, None, like.tensors()
    if format is MXFP4:
        found = quantize_mxfp4(weight)
    elif format is NVFP4:
        found = quantize_nvfp4(weight)
    elif format is FP8:
        found = quantize_fp8(weight, *block_size(like))
    elif format is INT and "g_idx" not in held and held["scales"].dtype in SCALES:
        found = quantize_int4(weight, like.group, "zero_points" not in held, scale_dtype=held["scales"].dtype)
    elif (number := ggml_type(like)) is not None and can_quantize(number):
        found = gguf_weight(quantize_gguf(weight, number).to(weight.device), number)
    if found is None or found.layout != like.layout:
        return None
    parts = [None if part is None or wanted is None else part.view(wanted.dtype).view(wanted.shape)
             for part, wanted in zip(found.parts, like.parts, strict=True)]  # fmt: skip
    return like.replaced(parts)
