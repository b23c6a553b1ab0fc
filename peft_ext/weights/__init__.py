"""Frozen weights, stored as codes and scales.

A :class:`~peft_ext.weights.packed.PackedWeight` is a weight in one format. Each family of formats is defined in one
module, for example FP8 in ``fp8``.
"""

from . import fp4, fp8, gguf, int_groups, mx, nf4
from .packed import FORMATS, Format, PackedWeight

__all__ = ["FORMATS", "Format", "PackedWeight", "fp4", "fp8", "gguf", "int_groups", "mx", "nf4"]
