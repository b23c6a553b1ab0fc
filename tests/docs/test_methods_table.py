"""Tests that the table of docs/methods.md is read as it is drawn."""

from __future__ import annotations

import pytest
from methods_table import Cell, Table, cells_of

pytestmark = pytest.mark.cpu_only("documents are the same for every device")


def test_a_cell_is_read_as_it_is_drawn() -> None:
    table = Table("Each cell.", "make", ("a", "b"), {"one": "of one", "two": "of two"})
    long = "A reason that is longer than a line. " * 8
    cells = {("a", "one"): Cell("x", (long.strip(), "no")), ("b", "one"): Cell.none("no"),
             ("a", "two"): Cell("`y`"), ("b", "two"): Cell("z, with 3", (long.strip(),))}  # fmt: skip
    for place, cell in cells.items():
        table[place] = cell
    assert cells_of(table.draw()) == cells
    with pytest.raises(ValueError, match=r"a, one has the footnotes \['2'\], which are missing"):
        cells_of(table.draw().replace("[^2]: no", ""))
