"""Computes the curves of a report: the paths of an inline SVG, and the data of the page's script.

A curve of at most :data:`MOST_POINTS` steps is drawn point by point. A longer curve is drawn as the means of bins of
steps, usually over a band from the least to the greatest value of each bin.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

from ...chart import Scale, path, span
from .figures import short

MOST_POINTS = 1000  # number of points of the longest curve that is drawn point by point
_BINS = 400
WIDTH, HEIGHT = 1000, 300  # size of a plot in SVG units; the page stretches the plot


@dataclass(frozen=True)
class Series:
    """A curve. The numbers ``x`` of the points are ascending; ``y`` has None where a point has no finite value.

    Attributes:
        look: CSS class of the curve.
        dots: whether each point has a mark.
        band: whether a curve of bins has a band from the least to the greatest value of each bin.
    """

    name: str
    look: str
    x: Sequence[float]
    y: Sequence[Optional[float]]
    dots: bool = False
    band: bool = True


def _binned(series: Series) -> dict[str, Any]:
    """Returns a curve's data for script.js: its points, or each bin's mean, least and greatest value."""
    about = {"look": series.look, "last": series.x[-1]}
    if len(series.x) <= MOST_POINTS:
        return {"x": list(series.x), "y": list(series.y), "low": None, "high": None, "width": 1, **about}
    width = math.ceil(len(series.x) / _BINS)
    starts = range(0, len(series.x), width)
    bins = [[v for v in series.y[i : i + width] if v is not None] for i in starts]
    low, high = ([f(b) if b else None for b in bins] if series.band else None for f in (min, max))
    return {"x": [series.x[i] for i in starts], "y": [sum(b) / len(b) if b else None for b in bins], "low": low,
            "high": high, "width": width, **about}  # fmt: skip


def draw_chart(
    name: str, heading: str, unit: str, series: Sequence[Series], *, zero: bool, steps: int
) -> dict[str, Any]:
    """Returns a figure's data for the template page.html: notes, legend, paths, labels.

    With ``zero`` the y axis begins at 0, unless a value is negative.
    """
    series = [s for s in series if any(v is not None for v in s.y)]
    drawn = [_binned(s) for s in series]
    chart: dict[str, Any] = {
        "name": name, "heading": heading, "series": [], "binned": any(d["width"] > 1 for d in drawn),
    }  # fmt: skip
    if not series:
        return chart
    values = [v for d in drawn for column in (d["y"], d["low"] or [], d["high"] or []) for v in column if v is not None]
    last = max(s.x[-1] for s in series)
    across, up = Scale(0, max(steps, 1, last)), span(values, zero)

    def place(x: float, y: Optional[float]) -> Optional[tuple[float, float]]:
        return None if y is None else (WIDTH * across(x), HEIGHT * (1 - up(y)))

    y_ticks = up.ticks()
    marks = [("rule", path([(0, HEIGHT * (1 - up(t))), (WIDTH, HEIGHT * (1 - up(t)))])) for t in y_ticks]
    for s, d in zip(series, drawn, strict=True):
        middle = [x + (min(d["width"], s.x[-1] - x + 1) - 1) / 2 for x in d["x"]]
        points = [place(x, y) for x, y in zip(middle, d["y"], strict=True)]
        if d["low"] is not None:
            edges = [[place(x, y) for x, y in zip(middle, d[edge], strict=True) if y is not None]
                     for edge in ("high", "low")]  # fmt: skip
            marks.append((f"band {s.look}", f"{path(edges[0] + edges[1][::-1])}Z"))
        marks.append((f"line {s.look}", path(points)))
        if s.dots:
            marks.append((f"dots {s.look}", "".join(path([p]) for p in points if p)))
    rounded = [d | {name: d[name] and [None if v is None else float(f"{v:.5g}") for v in d[name]]
                    for name in ("y", "low", "high")} for d in drawn]  # fmt: skip
    data = {"x": [across.low, across.high], "y": [up.low, up.high], "s": rounded}
    notes = [unit] + ([] if up.low == 0 else [f"the axis begins at {short(up.low, 3)}"])
    if (width := max(d["width"] for d in drawn)) > 1:
        notes.append(f"each point is the mean of {width} steps, the band their least and greatest")
    if missing := sum(v is None for v in series[0].y):
        notes.append(f"{missing:,} without a finite value are left out")
    return {
        **chart, "marks": marks, "data": json.dumps(data, separators=(",", ":")), "last": f"{last:,.0f}",
        "series": [(s.look, s.name, _last(s, last)) for s in series], "notes": "; ".join(notes),
        "told": "; ".join(_told(s) for s in series),
        "y_labels": [(f"{100 * (1 - up(t)):.2f}", short(t)) for t in y_ticks],
        "x_labels": [(f"{100 * across(t):.2f}", f"{t:,.0f}") for t in across.ticks(whole=True)],
    }  # fmt: skip


def _last(series: Series, step: float) -> str:
    x, y = next((x, y) for x, y in zip(reversed(series.x), reversed(series.y), strict=True) if y is not None)
    return short(y) if x == step else f"{short(y)} at {x:,.0f}"


def _told(series: Series) -> str:
    """Returns the first, last, least and greatest value of a curve in words."""
    found = [(x, y) for x, y in zip(series.x, series.y, strict=True) if y is not None]
    least, most = (f(found, key=lambda point: point[1]) for f in (min, max))
    (first_x, first), (last_x, last) = found[0], found[-1]
    return (
        f"{series.name}: {short(first)} at step {first_x:,.0f}, {short(last)} at step {last_x:,.0f}, "
        f"least {short(least[1])} at {least[0]:,.0f}, greatest {short(most[1])} at {most[0]:,.0f}"
    )


def smoothed(values: Sequence[Optional[float]], over: int) -> list[Optional[float]]:
    """Returns ``m_t = Σ_i b^(t−i) v_i / Σ_i b^(t−i)``, summed over the finite ``v_i`` with i ≤ t; b = 1 − 1/over.

    ``m_t`` is None where ``v_t`` is None.
    """
    decay, total, weight = 1 - 1 / over, 0.0, 0.0
    smooth: list[Optional[float]] = []
    for value in values:
        total, weight = decay * total, decay * weight
        if value is not None:
            total, weight = total + value, weight + 1
        smooth.append(total / weight if value is not None else None)
    return smooth
