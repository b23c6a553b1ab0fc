"""Frozen weights, stored as codes and scales: :class:`PackedWeight`, and one module for each family of formats."""

from .packed import FORMATS, Format, PackedWeight

__all__ = ["FORMATS", "Format", "PackedWeight"]
