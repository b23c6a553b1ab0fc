"""Formats the numbers and texts of a report. Most values to format come from a run.json and may be of any type."""

from __future__ import annotations

import math
from typing import Any, Optional

_MOST_TEXT = 4000  # most characters of a text that the report shows
NONE = "–"


def number(value: Any) -> Optional[float]:
    """Returns ``value`` as a float; None where ``value`` is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def clip(value: Any) -> str:
    """Returns ``value`` as a text, cut after 4,000 characters with a note on the number of other characters."""
    text = str(value)
    if len(text) > _MOST_TEXT:
        text = f"{text[:_MOST_TEXT]} … ({len(text) - _MOST_TEXT:,} characters more)"
    return text


def short(value: Any, digits: int = 4) -> str:
    """Returns a number as text with ``digits`` significant digits; "–" for no finite number.

    The function ``short`` of script.js returns the same texts for four digits, except for a number halfway between two
    texts, which script.js rounds up.
    """
    if (value := number(value)) is None:
        return NONE
    size = abs(value)
    if size == 0 or 1e-3 <= size < 1e6:
        text = f"{size:.{digits}g}" if size < 10**digits - 0.5 else f"{size:.0f}"
    else:
        mantissa, _, exponent = f"{size:.{digits - 1}e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"−{text}" if value < 0 else text


def count(value: Any) -> str:
    """Returns a number, rounded to an integer, as text with commas; "–" for no finite number."""
    found = number(value)
    return NONE if found is None else f"{found:,.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def duration(seconds: float) -> str:
    """Returns a number of seconds as text, such as "4.2 s", "1 min 15 s" or "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
