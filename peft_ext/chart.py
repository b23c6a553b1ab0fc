"""Draws pictures: SVG of bars, curves and points. What a run's page draws has its scales and paths from here too.

::

    picture = Picture("Milliseconds of a step", legend=[("ours", "peft_ext"), ("stock", "PEFT")])
    (panel,) = picture.panels(1, height=90, left=80, x=Scale(0, 9), y=rows_scale(2), x_label="ms")
    panel.bars(["LoRA", "DoRA"], [{"ours": 3.1, "stock": 5.0}, {"ours": 4.2}], {"ours": "ours", "stock": "stock"}, "ms")
    picture.caption("Medians of five rounds.")
    data = picture.svg()

A picture is one file that needs nothing else: text is text, in the reader's own font, and two sets of colours stand in
its style, for light and for dark pages, each on a card of its own, so that it reads where a page's colours are unknown.
The same numbers give the same bytes. What stands for a number has a name, its ``id``, by which tests find it.
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
    """Maps ``low`` to 0 and ``high`` to 1, evenly or, where ``log`` is set, by logarithms."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 5, whole: bool = False) -> list[float]:
        """Returns round numbers within the scale, ``most`` or one more; ``whole`` keeps them integers."""
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
    """Returns the scale of a bar chart's rows, the first on top."""
    return Scale(rows - 0.5, -0.5)


def span(values: Sequence[float], zero: bool) -> Scale:
    """Returns a scale a little wider than the values; from 0 where ``zero`` is set and they allow it."""
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(0.0, high + pad) if zero and low >= 0 else Scale(low - pad, high + pad)


def path(points: Iterable[Optional[Point]], digits: int = 1) -> str:
    """Returns an SVG path, broken where a point is missing; a point on its own is a line of no length, round capped."""
    parts, run = [], []
    for point in [*points, None]:
        if point is not None:
            run.append(f"{point[0]:.{digits}f} {point[1]:.{digits}f}")
        elif run:
            parts.append(f"M{run[0]}" + ("".join(f"L{p}" for p in run[1:]) if len(run) > 1 else "h0"))
            run = []
    return "".join(parts)


# --- a picture --------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours for what is compared, greys for what stands beside it: they differ in lightness too. By look:
# on a light page, on a dark one.
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
.line{{fill:none;stroke:currentColor;stroke-width:1.2}}.thick{{stroke-width:3.5}}.rule,.thin{{stroke-width:.8}}
.dash{{stroke-dasharray:5 3}}.dot{{stroke-dasharray:1 2}}
.mark{{fill:currentColor;stroke:#fff;stroke-width:.6}}.open{{fill:#fff;stroke:currentColor;stroke-width:1.4}}
.halo{{paint-order:stroke;stroke:#fff;stroke-width:3px;stroke-linejoin:round}}"""
_DARK = ".mark,.halo{{stroke:{0}}}.open{{fill:{0}}}".format(_COLOURS["card"][1])

MARKS = {  # by name, around the origin
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M-3.6-3.6h7.2v7.2h-7.2z",
    "up": "M0-4.6 4.4 3.4h-8.8z",
    "down": "M0 4.6 4.4-3.4h-8.8z",
    "diamond": "M0-5 4.2 0 0 5-4.2 0z",
    "plus": "M-1.6-4.6h3.2v3h3v3.2h-3v3h-3.2v-3h-3v-3.2h3z",
    "cross": "M-4.4-2.2-2.2-4.4 0-2.2 2.2-4.4 4.4-2.2 2.2 0 4.4 2.2 2.2 4.4 0 2.2-2.2 4.4-4.4 2.2-2.2 0z",
    "star": "M0-5 1.5-1.6 5-1.4 2.3.9 3.2 4.5 0 2.5-3.2 4.5-2.3.9-5-1.4-1.5-1.6z",
}
_MARGIN, _LINE = 16, 15  # pixels: around a picture, of a line of small text


def identifier(*parts: str) -> str:
    """Returns the id of what stands for a number."""
    return ":".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-") for part in parts)


def text_width(text: str, size: float = 12) -> float:
    """Returns about how wide a text is in pixels, in the widest of the fonts that a reader may have."""
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
    """An SVG that grows downwards: title, legend, then rows of :meth:`panels`, then a :meth:`caption`.

    Args:
        title: one line on top.
        legend: ``(look, label)`` or ``(look, label, mark)``; a look is one of the colours, a mark one of
            :data:`MARKS` or "line", else the key is a square of the colour. A look ``open soft`` is a mark with a
            border alone.
        width: in pixels; a README shows 860 as they are.
    """

    def __init__(self, title: str, legend: Sequence[Sequence[str]] = (), width: int = 860) -> None:
        self.title, self.width, self.below = title, width, 44.0
        self._parts: list[str] = []
        self._marks: set[str] = set()
        self._said: list[str] = []
        self.text(_MARGIN, 30, title, "title")
        x = float(_MARGIN)
        for place, (look, label, *mark) in enumerate(legend):
            wide = 18 + text_width(label)
            if place and x + wide > width - _MARGIN:
                x, self.below = _MARGIN, self.below + 18
            if mark == ["line"]:
                self.line("", [(x - 1, self.below + 7), (x + 13, self.below + 7)], look)
            elif mark:
                self.mark("", mark[0], x + 6, self.below + 7, look)
            else:
                self.add(f'<path class="bar {look}" d="M{_number(x)} {_number(self.below + 1)}h12v12h-12z"/>')
            self.text(x + 18, self.below + 11, label)
            x += wide + 16
        self.below += 24 if legend else 0

    def add(self, element: str) -> None:
        self._parts.append(element)

    def text(self, x: float, y: float, text: str, look: str = "", anchor: str = "start", after: str = "") -> None:
        """Adds a text for each line; ``y`` is the first one's base line. ``after`` follows in small, soft letters."""
        where = "" if anchor == "start" else f' text-anchor="{anchor}"'
        kind = f' class="{look}"' if look else ""
        rest = f'<tspan class="small soft after" dx="5">{escape(after)}</tspan>' if after else ""
        for line in text.split("\n"):
            self.add(f'<text x="{_number(x)}" y="{_number(y)}"{kind}{where}>{escape(line)}{rest}</text>')
            y += _LINE - 1

    def line(self, name: str, points: Iterable[Optional[Point]], look: str) -> None:
        called = f' id="{name}"' if name else ""
        self.add(f'<path{called} class="line {look}" d="{path(points, 3 if name else 1)}"/>')

    def mark(self, name: str, mark: str, x: float, y: float, look: str) -> None:
        self._marks.add(mark)
        called = f' id="{name}"' if name else ""
        kind = look if "open" in look else f"mark {look}"
        self.add(f'<use{called} class="{kind}" href="#{mark}" x="{_number(x)}" y="{_number(y)}"/>')

    def panels(
        self, count: int, *, height: float, x: Scale, y: Scale, columns: int = 0, left: float = 40, gap: float = 24,
        titles: Sequence[str] = (), x_label: str = "",
    ) -> list[Panel]:  # fmt: skip
        """Returns ``count`` areas of the same scales in rows of ``columns``; ``left``: room beside each row's first.

        The lowest of each column has ``x_label``.
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
        """Adds small text under all else; empty paragraphs are left out."""
        self.below += 16
        for paragraph in filter(None, paragraphs):
            self._said.append(paragraph)
            for line in _wrapped(paragraph, self.width - 2 * _MARGIN):
                self.text(_MARGIN, self.below, line, "small soft")
                self.below += _LINE

    def svg(self) -> bytes:
        light, dark = ("".join(f".{look}{{color:{pair[i]}}}" for look, pair in _COLOURS.items()) for i in (0, 1))
        marks = "".join(f'<path id="{mark}" d="{MARKS[mark]}"/>' for mark in sorted(self._marks))
        size = f'width="{self.width}" height="{_number(self.below)}"'
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {_number(self.below)}" {size} '
            'class="ink" role="img" aria-labelledby="title description">',
            f'<title id="title">{escape(self.title)}</title>',
            f'<desc id="description">{escape(" ".join(self._said) or self.title)}</desc>',
            f"<style>{_RULES}\n{light}\n@media(prefers-color-scheme:dark){{{dark}{_DARK}}}</style>",
            *([f"<defs>{marks}</defs>"] if marks else []),
            f'<rect class="card" {size} rx="6"/>',
            *self._parts,
            "</svg>\n",
        ]).encode()  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """An area of a picture with a scale each way, in pixels from its upper left corner."""

    picture: Picture
    left: float
    top: float
    width: float
    height: float
    x: Scale
    y: Scale

    def at(self, x: float, y: float) -> Point:
        return self.left + self.width * self.x(x), self.top + self.height * (1 - self.y(y))

    def x_axis(self, form: str = "{:g}", whole: bool = False) -> None:
        """Draws a line at each round number, and the number under it."""
        bottom, parts = self.top + self.height, []
        for tick in self.x.ticks(whole=whole):
            x = self.left + self.width * self.x(tick)
            parts += [(x, self.top), (x, bottom), None]
            self.picture.text(x, bottom + 16, form.format(tick), "small", "middle")
        self.picture.line("", parts, "rule")

    def y_axis(self, form: str = "{:g}", unit: float = 1.0, labels: bool = True) -> None:
        """Draws a line at each round number, and with ``labels`` the number in ``unit`` beside it."""
        parts = []
        for tick in self.y.ticks():
            y = self.top + self.height * (1 - self.y(tick))
            parts += [(self.left, y), (self.left + self.width, y), None]
            if labels:
                self.picture.text(self.left - 6, y + 4, form.format(tick / unit), "small", "end")
        self.picture.line("", parts, "rule")

    def row_labels(self, labels: Sequence[str]) -> None:
        """Writes a label of one or more lines beside each row of bars."""
        for row, label in enumerate(labels):
            y = self.at(self.x.low, row)[1] + 4 - 7 * label.count("\n")
            self.picture.text(self.left - 8, y, label, anchor="end")

    def bar(self, name: str, row: float, value: float, thick: float, look: str) -> None:
        """Draws a bar from 0; ``thick``: of a row's height."""
        (start, y), (end, _) = self.at(0, row), self.at(value, row)
        high = thick * self.height / abs(self.y.high - self.y.low)
        self.picture.add(f'<rect id="{name}" class="bar {look}" x="{_number(start)}" y="{_number(y - high / 2)}" '
                         f'width="{_number(end - start, 3)}" height="{_number(high)}"/>')  # fmt: skip

    def beside(self, row: float, value: float, text: str, look: str = "", after: str = "") -> None:
        """Writes to the right of a bar's end, with a rim, so that no line runs through it."""
        x, y = self.at(value, row)
        self.picture.text(x + 4, y + 4, text, f"small halo {look}".rstrip(), after=after)

    def bars(
        self, groups: Sequence[Mapping[str, float]], looks: Mapping[str, str], names: Sequence[str], *,
        form: str = "{:.2f}", absent: str = "not measured",
    ) -> None:  # fmt: skip
        """Draws a group of bars a row, ``{contender: value}``; one that has no value gets the word ``absent``.

        Args:
            looks: the contenders from top to bottom, and their colours; the value of ``ours`` is in bold.
            names: of each row; with the contender's name it makes the bar's id.
        """
        middle, thick = (len(looks) - 1) / 2, 0.8 / max(3, len(looks))
        for place, (values, name) in enumerate(zip(groups, names, strict=True)):
            if not values:
                self.beside(place, 0.0, absent, "soft")
            for turn, (contender, look) in enumerate(looks.items() if values else ()):
                row = place + thick * (turn - middle)
                if contender not in values:
                    self.beside(row, 0.0, absent, "soft")
                    continue
                value = values[contender]
                self.bar(f"{name}:{identifier(contender)}", row, value, 0.88 * thick, look)
                self.beside(row, value, form.format(value), "bold" if look == "ours" else "")

    def reference(self, name: str, x: float, look: str = "ink dash") -> None:
        """Draws a line from top to bottom."""
        at = self.left + self.width * self.x(x)
        self.picture.line(name, [(at, self.top), (at, self.top + self.height)], look)

    def curve(self, name: str, points: Iterable[Point], look: str) -> None:
        self.picture.line(name, [self.at(*point) for point in points], look)

    def mark(self, name: str, mark: str, x: float, y: float, look: str) -> None:
        self.picture.mark(name, mark, *self.at(x, y), look)
