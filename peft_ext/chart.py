"""Draws SVG pictures of bars and curves with only Python's standard library.

The report of a fine-tuning run (``peft_ext.run.report``) uses only the scales and paths of this module.

::

    picture = Picture("Milliseconds of a step", legend=[("ours", "peft_ext"), ("stock", "PEFT")])
    (panel,) = picture.panels(1, height=90, left=80, x=Scale(0, 9), y=rows_scale(2), x_label="ms")
    panel.row_labels(["LoRA", "DoRA"])
    panel.bars([{"ours": 3.1, "stock": 5.0}, {"ours": 4.2}], {"ours": "ours", "stock": "stock"}, ["lora", "dora"])
    picture.caption("Medians of five rounds.")
    data = picture.svg()

A picture is one self-contained file. Text is stored as SVG text elements, which the reader's system shows in a font of
its own. A picture has colours for light pages and colours for dark pages, and a background, so that the picture is
legible on any page. Two pictures that are drawn by equal calls have equal bytes. Each bar, and each curve and reference
line that gets a name, has an ``id``, by which tests find the element.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Optional

Point = tuple[float, float]


# --- numbers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """A function that maps ``low`` to 0 and ``high`` to 1: linearly, or by logarithms if ``log`` is True."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 5, whole: bool = False) -> list[float]:
        """Returns about ``most`` round numbers within the scale. On a linear scale with ``whole``, returns integers."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for multiples in ((1, 2, 5), (1,)):
                ticks = [float(f"{m}e{d}") for d in decades for m in multiples]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) <= most + 1:
                    break
            if len(ticks) > 1:
                return ticks
        rough = (self.high - self.low) / most
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * (1 - 1e-9))
        if whole:
            step = max(1, round(step))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def rows_scale(rows: int) -> Scale:
    """Returns the vertical scale of a bar chart with ``rows`` rows, the first row on top."""
    return Scale(rows - 0.5, -0.5)


def span(values: Sequence[float], zero: bool) -> Scale:
    """Returns a scale a little wider than the values; if ``zero`` is True and no value is negative, low is 0."""
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(0.0, high + pad) if zero and low >= 0 else Scale(low - pad, high + pad)


def path(points: Iterable[Optional[Point]], digits: int = 1) -> str:
    """Returns the data of an SVG path through ``points``, with a gap at each None. A point between two gaps becomes a
    line of length 0."""
    parts, run = [], []
    for point in [*points, None]:
        if point is not None:
            run.append(f"{point[0]:.{digits}f} {point[1]:.{digits}f}")
        elif run:
            parts.append(f"M{run[0]}" + ("".join(f"L{p}" for p in run[1:]) if len(run) > 1 else "h0"))
            run = []
    return "".join(parts)


# --- a picture --------------------------------------------------------------------------------------------------------

# _COLOURS maps a look, which is a CSS class, to its colours on a light page and on a dark page. On a light page "ours",
# "stock" and "other" have colours of Okabe and Ito's palette for colour-blind readers. "eager" and "compiled" are
# greys. The colours of bars differ in lightness too, for readers who do not see the hue.
_COLOURS = {
    "card": ("#ffffff", "#0d1117"),
    "ink": ("#1f2328", "#e6edf3"),
    "soft": ("#59636e", "#9da7b3"),
    "rule": ("#dfe3e8", "#30363d"),
    "ours": ("#0072b2", "#3f9fe0"),
    "stock": ("#e69f00", "#e69f00"),
    "other": ("#009e73", "#2bb58c"),
    "eager": ("#767676", "#99a1ab"),
    "compiled": ("#bdbdbd", "#5d6670"),
}
_FONT = "-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,'DejaVu Sans',sans-serif"
_RULES = f"""svg{{font:12px {_FONT}}}text{{fill:currentColor}}.title{{font-size:16px}}.small{{font-size:11px}}
.title,.bold{{font-weight:600}}.after{{font-weight:400}}.card,.bar{{fill:currentColor}}
.line{{fill:none;stroke:currentColor;stroke-width:1.2}}.thick{{stroke-width:3.5}}.rule{{stroke-width:.8}}
.dash{{stroke-dasharray:5 3}}.dot{{stroke-dasharray:1 2}}
.halo{{paint-order:stroke;stroke:#fff;stroke-width:3px;stroke-linejoin:round}}"""
_DARK = f".halo{{stroke:{_COLOURS['card'][1]}}}"

_MARGIN, _LINE = 16, 15  # margin of a picture and height of a line of small text, in pixels


def identifier(*parts: str) -> str:
    """Returns an id of an SVG element: the names ``parts``, joined by ":", with "-" in place of special characters."""
    return ":".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-") for part in parts)


def text_width(text: str, size: float = 12) -> float:
    """Returns an estimate of the width of a text in pixels, in the widest font of :data:`_FONT`."""
    wide = {"narrow": 0.36, "upper": 0.72, "broad": 0.95}
    kinds = {**dict.fromkeys(" .,:;|!'()[]/-ijlftrI", "narrow"), **dict.fromkeys("mwMW%", "broad")}
    return size * sum(wide.get(kinds.get(c, "upper" if c.isupper() else ""), 0.62) for c in text)


def _wrapped(text: str, width: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}", 11) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _number(value: float, digits: int = 2) -> str:
    text = f"{value:.{digits}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


class Picture:
    """An SVG picture, filled from top to bottom: title, legend, then rows of :meth:`panels`, then a :meth:`caption`.

    Args:
        title: text of one line at the top.
        legend: ``(look, label)`` of each coloured square of the legend; a look is a key of :data:`_COLOURS`.
        width: width of the picture in pixels. GitHub shows a picture of 860 pixels in a README without scaling.
    """

    def __init__(self, title: str, legend: Sequence[tuple[str, str]] = (), width: int = 860) -> None:
        self.title, self.width, self.below = title, width, 44.0
        self._parts: list[str] = []
        self._said: list[str] = []
        self.text(_MARGIN, 30, title, "title")
        x = float(_MARGIN)
        for place, (look, label) in enumerate(legend):
            wide = 18 + text_width(label)
            if place and x + wide > width - _MARGIN:
                x, self.below = _MARGIN, self.below + 18
            self.add(f'<path class="bar {look}" d="M{_number(x)} {_number(self.below + 1)}h12v12h-12z"/>')
            self.text(x + 18, self.below + 11, label)
            x += wide + 16
        self.below += 24 if legend else 0

    def add(self, element: str) -> None:
        self._parts.append(element)

    def text(self, x: float, y: float, text: str, look: str = "", anchor: str = "start", after: str = "") -> None:
        """Adds the lines of ``text`` to the picture. ``y`` is the base line of the first line; ``after`` is grey text
        that follows each line."""
        where = "" if anchor == "start" else f' text-anchor="{anchor}"'
        kind = f' class="{look}"' if look else ""
        rest = f'<tspan class="small soft after" dx="5">{escape(after)}</tspan>' if after else ""
        for line in text.split("\n"):
            self.add(f'<text x="{_number(x)}" y="{_number(y)}"{kind}{where}>{escape(line)}{rest}</text>')
            y += _LINE - 1

    def line(self, name: str, points: Iterable[Optional[Point]], look: str) -> None:
        called = f' id="{name}"' if name else ""
        self.add(f'<path{called} class="line {look}" d="{path(points, 3 if name else 1)}"/>')

    def panels(
        self, count: int, *, height: float, x: Scale, y: Scale, columns: int = 0, left: float = 40, gap: float = 24,
        titles: Sequence[str] = (), x_label: str = "",
    ) -> list[Panel]:  # fmt: skip
        """Returns ``count`` panels with the same scales, in rows of ``columns`` (0: all in one row).

        Args:
            height: height of a panel in pixels.
            left: room to the left of each row of panels, in pixels.
            gap: room between two neighbouring panels in pixels.
            x_label: text under the lowest panel of each column.
        """
        columns = columns or count
        wide = (self.width - 2 * _MARGIN - left - gap * (columns - 1)) / columns
        made = []
        for place in range(count):
            if place and place % columns == 0:
                self.below += height + 28
            if place % columns == 0:
                self.below += 24 if titles else 8
            at = _MARGIN + left + (wide + gap) * (place % columns)
            panel = Panel(self, at, self.below, wide, height, x, y)
            if titles:
                self.text(at, self.below - 8, titles[place], "bold")
            if x_label and place + columns >= count:
                self.text(at + wide / 2, self.below + height + 32, x_label, "small", "middle")
            made.append(panel)
        self.below += height + (40 if x_label else 22)
        return made

    def caption(self, *paragraphs: str) -> None:
        """Adds small text at the bottom of the picture. Empty paragraphs are left out."""
        self.below += 16
        for paragraph in filter(None, paragraphs):
            self._said.append(paragraph)
            for line in _wrapped(paragraph, self.width - 2 * _MARGIN):
                self.text(_MARGIN, self.below, line, "small soft")
                self.below += _LINE

    def svg(self) -> bytes:
        light, dark = ("".join(f".{look}{{color:{pair[i]}}}" for look, pair in _COLOURS.items()) for i in (0, 1))
        size = f'width="{self.width}" height="{_number(self.below)}"'
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {_number(self.below)}" {size} '
            'class="ink" role="img" aria-labelledby="title description">',
            f'<title id="title">{escape(self.title)}</title>',
            f'<desc id="description">{escape(" ".join(self._said) or self.title)}</desc>',
            f"<style>{_RULES}\n{light}\n@media(prefers-color-scheme:dark){{{dark}{_DARK}}}</style>",
            f'<rect class="card" {size} rx="6"/>',
            *self._parts,
            "</svg>\n",
        ]).encode()  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """An area of a picture with a scale in each direction. ``left`` and ``top`` are pixels in the picture."""

    picture: Picture
    left: float
    top: float
    width: float
    height: float
    x: Scale
    y: Scale

    def at(self, x: float, y: float) -> Point:
        return self.left + self.width * self.x(x), self.top + self.height * (1 - self.y(y))

    def x_axis(self, whole: bool = False) -> None:
        """Draws a vertical line at each tick of the x scale, and the tick's number under the line."""
        bottom, parts = self.top + self.height, []
        for tick in self.x.ticks(whole=whole):
            x = self.left + self.width * self.x(tick)
            parts += [(x, self.top), (x, bottom), None]
            self.picture.text(x, bottom + 16, f"{tick:g}", "small", "middle")
        self.picture.line("", parts, "rule")

    def y_axis(self, labels: bool = True) -> None:
        """Draws a horizontal line at each tick of the y scale, and with ``labels`` the number beside each line."""
        parts = []
        for tick in self.y.ticks():
            y = self.top + self.height * (1 - self.y(tick))
            parts += [(self.left, y), (self.left + self.width, y), None]
            if labels:
                self.picture.text(self.left - 6, y + 4, f"{tick:g}", "small", "end")
        self.picture.line("", parts, "rule")

    def row_labels(self, labels: Sequence[str]) -> None:
        """Writes a label of one or more lines to the left of each row of bars."""
        for row, label in enumerate(labels):
            y = self.at(self.x.low, row)[1] + 4 - 7 * label.count("\n")
            self.picture.text(self.left - 8, y, label, anchor="end")

    def bar(self, name: str, row: float, value: float, thick: float, look: str) -> None:
        """Draws a bar from 0 to ``value``; ``thick`` is the bar's height divided by the row's height."""
        (start, y), (end, _) = self.at(0, row), self.at(value, row)
        high = thick * self.height / abs(self.y.high - self.y.low)
        self.picture.add(f'<rect id="{name}" class="bar {look}" x="{_number(start)}" y="{_number(y - high / 2)}" '
                         f'width="{_number(end - start, 3)}" height="{_number(high)}"/>')  # fmt: skip

    def beside(self, row: float, value: float, text: str, look: str = "", after: str = "") -> None:
        """Writes text to the right of a bar's end, with a rim of the background's colour that hides lines behind the
        text."""
        x, y = self.at(value, row)
        self.picture.text(x + 4, y + 4, text, f"small halo {look}".rstrip(), after=after)

    def bars(
        self, groups: Sequence[Mapping[str, float]], looks: Mapping[str, str], names: Sequence[str],
        form: str = "{:.2f}",
    ) -> None:  # fmt: skip
        """Draws a group of bars in each row, one bar for each contender (a key of ``looks``).

        A contender without a value in a row, and a row without values, gets the words "not measured".

        Args:
            groups: for each row, a dict from contenders to values.
            looks: dict from contenders to looks, in the order of a row's bars from top to bottom. The value of a bar
                with the look "ours" is in bold.
            names: name of each row, which becomes a part of the ids of the row's bars. The id of a bar is made of the
                row's name and the contender's name.
        """
        middle, thick = (len(looks) - 1) / 2, 0.8 / max(3, len(looks))
        for place, (values, name) in enumerate(zip(groups, names, strict=True)):
            if not values:
                self.beside(place, 0.0, "not measured", "soft")
            for turn, (contender, look) in enumerate(looks.items() if values else ()):
                row = place + thick * (turn - middle)
                if contender not in values:
                    self.beside(row, 0.0, "not measured", "soft")
                    continue
                value = values[contender]
                self.bar(f"{name}:{identifier(contender)}", row, value, 0.88 * thick, look)
                self.beside(row, value, form.format(value), "bold" if look == "ours" else "")

    def reference(self, name: str, x: float, look: str = "ink dash") -> None:
        """Draws a vertical line at ``x`` from the top to the bottom of the panel."""
        at = self.left + self.width * self.x(x)
        self.picture.line(name, [(at, self.top), (at, self.top + self.height)], look)

    def curve(self, name: str, points: Iterable[Point], look: str) -> None:
        self.picture.line(name, [self.at(*point) for point in points], look)
