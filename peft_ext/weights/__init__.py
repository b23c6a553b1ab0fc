"""Frozen weights, stored as codes and scales: :class:`PackedWeight`, and one module for each family of formats."""

from . import fp4, fp8, gguf, int_groups, mx, nf4
from .packed import FORMATS, Format, PackedWeight

__all__ = ["FORMATS", "Format", "PackedWeight", "fp4", "fp8", "gguf", "int_groups", "mx", "nf4"]
