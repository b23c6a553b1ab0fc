"""What all charts share: one look, colours that the colour-blind tell apart, the same bytes for the same numbers.

::

    with look():
        figure = new_figure("title", width, height)
        axes = figure.subplots()
        ...
        data = render(figure, ".svg", description)

The panel is white and opaque, so that a chart reads on a light and on a dark page alike; texts are outlines, so that it
looks the same wherever its fonts are not installed. Nothing of the user's matplotlibrc acts, no window is opened, and
no date is written. matplotlib is imported where it is used.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "MUTED",
    "TEXT",
    "bars",
    "beside",
    "caption",
    "gid",
    "hide_frame",
    "look",
    "new_figure",
    "patch",
    "render",
]

# Of Okabe and Ito's palette for what is compared, greys for what stands beside it: they differ in lightness too.
COLOURS = {
    "ours": "#0072B2",
    "stock": "#E69F00",
    "torch eager": "#767676",
    "torch.compile": "#BDBDBD",
    "frozen": "#767676",
    "other": "#009E73",
}
TEXT, MUTED = "#222222", "#5F5F5F"
_STYLE = {
    "svg.hashsalt": "peft_ext",
    "svg.fonttype": "path",
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.labelcolor": TEXT,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "savefig.dpi": 160.0,
    "savefig.facecolor": "white",
}
_FONT = 6.5


@contextlib.contextmanager
def look() -> Iterator[None]:
    """matplotlib as charts here want it, for what is drawn and rendered inside; its remarks are not printed."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        yield


def new_figure(title: str, width: float, height: float, legend: Sequence[Artist] = (), columns: int = 6) -> Figure:
    """An empty figure of ``width`` x ``height`` inches; its title and ``legend``'s handles stand above all axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    lines = math.ceil(len(legend) / columns)
    top = 0.33 + 0.17 * lines
    figure.text(0.01, 1 - 0.07 / height, title, va="top", fontsize=10.5, fontweight="bold", gid="title")
    if legend:
        figure.legend(handles=legend, loc="upper left", bbox_to_anchor=(0.008, 1 - 0.27 / height), ncols=columns,
                      handlelength=1.0, handleheight=0.8, handletextpad=0.5, columnspacing=1.8, borderaxespad=0,
                      borderpad=0.2)  # fmt: skip
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - top / height), h_pad=0.05, w_pad=0.06, wspace=0.03, hspace=0.04)
    return figure


def patch(colour: str, label: str) -> Artist:
    """A legend's handle for bars and lines of a colour."""
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def caption(figure: Figure, *paragraphs: str) -> None:
    """Small text under the chart; empty paragraphs are left out."""
    columns = int(20.5 * figure.get_figwidth())
    text = "\n".join(textwrap.fill(paragraph, columns) for paragraph in paragraphs if paragraph)
    figure.supxlabel(text, x=0.01, ha="left", fontsize=_FONT, color=MUTED, linespacing=1.35)


def hide_frame(axes: Axes, *sides: str) -> None:
    axes.spines[list(sides)].set_visible(False)


def gid(*parts: str) -> str:
    """An artist's name in the SVG, where tests find it."""
    return ":".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-") for part in parts)


def bars(
    axes: Axes,
    groups: list[tuple[str, dict[str, float]]],
    names: dict[str, str],
    *,
    name: str,
    form: str = "{:.2f}",
    absent: str = "not measured",
) -> None:
    """Horizontal bars from zero, a group of them for each ``(label, {contender: value})``, the first group on top.

    Args:
        groups: values by contender; one that is not there gets no bar, but the word ``absent``.
        names: the contenders, from top to bottom, and their keys in :data:`COLOURS`.
        name: the first part of each bar's gid; label and contender follow.
        form: of the value beside a bar.
    """
    middle, height = (len(names) - 1) / 2, 0.8 / max(3, len(names))
    for place, (label, values) in enumerate(groups):
        if not values:
            beside(axes, 0.0, place, absent, color=MUTED)
            continue
        for turn, (contender, colour) in enumerate(names.items()):
            y = place + height * (turn - middle)
            if contender not in values:
                beside(axes, 0.0, y, absent, color=MUTED)
                continue
            value = values[contender]
            axes.barh(y, value, 0.88 * height, color=COLOURS[colour], gid=gid(name, label, contender))
            beside(axes, value, y, form.format(value), fontweight="bold" if colour == "ours" else "normal")
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_yticks(range(len(groups)), [label for label, _ in groups])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    hide_frame(axes, "top", "right", "left")


def beside(axes: Axes, x: Any, y: float, text: str, **kwargs: Any) -> Any:
    """``text`` to the right of a bar's end, on white, so that no line runs through it."""
    kwargs = {"xytext": (3, 0), "textcoords": "offset points", "va": "center_baseline", "fontsize": _FONT, **kwargs}
    return axes.annotate(text, (x, y), bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4}, **kwargs)


def render(figure: Figure, suffix: str, description: str = "", source: str = "") -> bytes:
    """The figure as ``.svg`` or ``.png``: the same bytes for the same numbers and the same matplotlib.

    ``description`` and ``source`` are what an SVG says of itself, beside the version of matplotlib.
    """
    about: dict[str, Any] = {}
    if suffix == ".svg":
        title = next(text.get_text() for text in figure.texts if text.get_gid() == "title")
        about = {"Date": None, "Title": title, "Description": description or title, "Source": source or None}
    file = io.BytesIO()
    figure.savefig(file, format=suffix.removeprefix("."), metadata=about)
    return file.getvalue()
