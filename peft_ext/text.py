"""Formats sizes in bytes, and dtypes, as text for people."""

from __future__ import annotations

from typing import Any, Optional

_BINARY = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_DECIMAL = ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"))


def format_bytes(size: Optional[float], *, binary: bool = True) -> str:
    """Returns a size in bytes as text with a unit, rounded to about three digits: "2.28 GiB"; "–" for None.

    With ``binary``, the units are binary (for memory); with ``binary=False``, decimal (for files): "19.6 MB".
    """
    if size is None:
        return "–"
    unit, name = next((pair for pair in (_BINARY if binary else _DECIMAL) if size >= pair[0]), (1, "bytes"))
    value = size / unit
    return f"{value:,.0f} {name}" if value >= 100 or unit == 1 else f"{value:#.3g} {name}"


def gigabytes(size: float) -> str:
    """Returns a size as text in the "GB" of graphics cards, of 2³⁰ bytes each: "23.1 GB"."""
    return f"{size / 2**30:.1f} GB"


def dtype_name(dtype: Any) -> str:
    """Returns PyTorch's name of a dtype: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
