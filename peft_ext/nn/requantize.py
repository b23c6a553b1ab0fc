"""Quantizes the merged weight of a frozen packed layer again, in the layout that the layer's weight had."""

from __future__ import annotations

from typing import Any, Union

from torch import Tensor

from ..weights.nf4 import NF4Weight
from ..weights.packed import PackedWeight
from ..weights.quantizers import quantized_like
from .nf4 import NF4Linear, quantization_error
from .nf4 import requantized as requantized_nf4
from .packed import PackedLinear

Frozen = Union[Tensor, PackedWeight]


def frozen_weight(base: Any) -> Frozen:
    """Returns the weight of a linear layer without a copy: a PackedWeight, or the dense parameter."""
    return base.nf4 if isinstance(base, NF4Linear) else base.packed if isinstance(base, PackedLinear) else base.weight


def set_frozen_weight(base: Any, weight: PackedWeight, error: Union[Tensor, float, None] = None) -> None:
    """Makes ``weight`` the weight of an NF4Linear or of a PackedLinear with the same layout, without a copy.

    ``error``: the relative error of requantizing, which becomes ``base.merge_error``; None: no adapter is merged.
    """
    if isinstance(base, NF4Linear):
        base.set_nf4(weight) if error is None else base.set_merged(weight, error)
        return
    base.hold_parts(weight.parts)
    base.__dict__.pop("merge_error", None)
    if error is not None:
        base.merge_error = float(error)


def requantized(merged: Tensor, weight: PackedWeight) -> tuple[PackedWeight, Tensor]:
    """Returns the float32 weight ``merged`` in the layout of ``weight``, and the relative error of quantizing.

    The error ``‖Q − W'‖ / ‖W'‖`` of the quantized weight Q is a float64 tensor.

    Raises: RuntimeError if there is no quantizer for the layout of ``weight``.
    """
    if isinstance(weight, NF4Weight):
        return requantized_nf4(merged, weight)
    if (found := quantized_like(merged, weight)) is None:
        raise RuntimeError(
            f"merge: the base weight is packed ({weight.format.name}, groups of {weight.group or 'all'} columns), for "
            "which there is no quantizer; wanted mxfp4, nvfp4, fp8 or int4 as peft_ext.quantize_packed makes them, or "
            "a type of GGUF that peft_ext.weights.gguf_quantize makes. Call peft_ext.dequantize_packed(model) before "
            "merging, or save the adapter and merge it by peft-ext merge"
        )
    return found, quantization_error(found, merged)
