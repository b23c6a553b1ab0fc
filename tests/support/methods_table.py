"""The table of docs/methods.md: cells that tests fill in, drawn as Markdown."""

from __future__ import annotations

import functools
import re
import textwrap
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest

__all__ = ["Cell", "Table", "cells_of", "split"]

# Libraries whose versions may change a cell: the number of graph breaks, or the text of an error of PEFT.
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
_VERSIONS = "Drawn with "
_NONE = "—"


@dataclass(frozen=True)
class Cell:
    """A cell of the table: a ``text`` of a few words, and footnotes. Cells with equal notes share a footnote."""

    text: str
    notes: tuple[str, ...] = ()

    @classmethod
    def none(cls, *reasons: str) -> Cell:
        """Returns a cell with a dash and with ``reasons`` as footnotes. Raises ValueError if no reason is given."""
        if not reasons or not all(reasons):
            raise ValueError(f"Cell.none: reasons are {reasons}, wanted at least one")
        return cls(_NONE, reasons)

    def __post_init__(self) -> None:
        for text in (self.text, *self.notes):
            if not text or "\n" in text or "|" in self.text:
                raise ValueError(f"Cell: {text!r} can't stand in a table, wanted one line, and no | outside of notes")


@dataclass
class Table:
    """Rows by name, columns by title, and a cell for each pair.

    Args:
        introduction: the paragraph above the table.
        command: the command that draws the table again, shown below the introduction.
        columns: by a column's title, a description of its tests; each test adds its column as it is defined.
    """

    introduction: str
    command: str
    rows: tuple[str, ...]
    columns: dict[str, str] = field(default_factory=dict)
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)

    def __setitem__(self, place: tuple[str, str], cell: Cell) -> None:
        row, column = place
        if row not in self.rows or column not in self.columns:
            raise KeyError(f"Table: {place} is no place, wanted one of {self.rows} and one of {tuple(self.columns)}")
        if not isinstance(cell, Cell):
            raise TypeError(f"Table: {place} is given a {type(cell).__name__}, wanted a Cell")
        self.cells[place] = cell

    def missing(self) -> list[tuple[str, str]]:
        """Returns the pairs of row and column that have no cell yet."""
        return [(row, column) for row in self.rows for column in self.columns if (row, column) not in self.cells]

    def draw(self) -> str:
        """Returns the document as Markdown. Raises ValueError where a cell is missing."""
        if missing := self.missing():
            raise ValueError(f"Table: {len(missing)} cells are missing, the first is {missing[0]}")
        numbers: dict[str, int] = {}  # numbers of footnotes, by their text, in reading order

        def drawn(cell: Cell) -> str:
            marks = [f"[^{numbers.setdefault(note, len(numbers) + 1)}]" for note in cell.notes]
            return cell.text + "".join(marks)

        rows = [["method", *self.columns]]
        rows += [[row, *(drawn(self.cells[row, column]) for column in self.columns)] for row in self.rows]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "|" + "---|" * len(rows[0]))
        table = "\n".join(lines)
        about = "\n".join(_filled(f"- **{title}**: {text}", "  ") for title, text in self.columns.items())
        notes = "\n".join(_filled(f"[^{number}]: {note}", "    ") for note, number in numbers.items())
        command = f"```bash\n{self.command}\n```"
        title = "# What the tests see of each method"
        parts = [title, _filled(self.introduction), command, table, about, notes, self.drawn_with()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def compare(self, place: tuple[str, str], document: Path) -> None:
        """Asserts that the document has the cell. Skips the test if the document has another cell and was drawn with
        other versions of the libraries.
        """
        cells, drawn_with = _read(document)
        if cells[place] != self.cells[place] and drawn_with != self.drawn_with():
            pytest.skip(f"{self.cells[place]} is not in {document.name}, which is of other libraries: {drawn_with}")
        assert cells[place] == self.cells[place], f"{document.name} is out of date; draw it: {self.command}"

    @staticmethod
    def drawn_with() -> str:
        """Returns the document's last line."""
        # The version has no local part such as +cpu, so that every build of a release gives an equal table.
        return _VERSIONS + ", ".join(f"{name} {version(name).partition('+')[0]}" for name in _LIBRARIES) + "."


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


@functools.cache
def _read(document: Path) -> tuple[dict[tuple[str, str], Cell], str]:
    """Returns the cells of the document, and the line with the versions that the document was drawn with."""
    text = document.read_text()
    return cells_of(text), split(text)[1]


def split(document: str) -> tuple[str, str]:
    """Splits a drawn document into the text and the last line, which has the versions of the libraries."""
    body, _, last = document.rstrip("\n").rpartition("\n\n")
    if not last.startswith(_VERSIONS):
        raise ValueError(f"split: the document ends in {last[:60]!r}, wanted a line that starts with {_VERSIONS!r}")
    return body, last


def cells_of(document: str) -> dict[tuple[str, str], Cell]:
    """Returns the cells of a drawn document, by row and column. Raises ValueError where a footnote is missing."""
    noted = re.findall(r"^\[\^(\d+)\]: (.+?)(?=\n\[\^|\n\n|\Z)", document, re.MULTILINE | re.DOTALL)
    notes = {number: " ".join(text.split()) for number, text in noted}
    table = [line.strip("| ").split(" | ") for line in document.splitlines() if line.startswith("| ")]
    cells = {}
    for row, *texts in table[1:]:
        for column, text in zip(table[0][1:], texts, strict=True):
            marks = re.findall(r"\[\^(\d+)\]", text)
            if missing := set(marks) - notes.keys():
                raise ValueError(f"cells_of: {row}, {column} has the footnotes {sorted(missing)}, which are missing")
            cells[row, column] = Cell(re.sub(r"\[\^\d+\]", "", text), tuple(notes[mark] for mark in marks))
    return cells
