"""The known forms: which forwards of models this package has a forward of its own for.

    forms.tsv   digest, kind, formula, example, classes, since      one row a form, drawn by tools/forms.py
    row_of      a class or a function -> its row, or the reason for which it has none

The key is the digest of the code (:mod:`.digest`), never the name of a class. A row is there because its formula gave
the values and gradients of each class that has the form, at extremes and in each dtype (:mod:`.proof`; the tests do it
again). Code that has no row runs as its author wrote it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from .digest import Form, Unknown, form_of

__all__ = ["Form", "KINDS", "Row", "Rows", "Unknown", "form_of", "holds_for", "read_rows", "row_of"]

# The kinds, and what the formula of each names.
KINDS: dict[str, tuple[str, ...]] = {
    "rms_norm": ("weight", "eps", "offset", "rounds", "mixed", "needs"),
    "layer_norm": (),
    "dropout": (),
    "mlp": ("inner", "out", "act", "gated", "drop", "needs"),
    "activation": ("function", "inner", "approximate", "needs", "dtypes"),
    "gate": ("act",),
    "attention": ("inputs", "interface", "forward", "norms", "o", "cache", "options"),
    "projections": ("inputs",),
    "sdpa": ("bias",),
    "causal_loss": (),
}
TABLE = Path(__file__).with_name("forms.tsv")
HEADER = ("digest", "kind", "formula", "example", "classes", "since")


@dataclass(frozen=True)
class Row:
    """One known form. ``formula``: names and values, see KINDS; ``classes``: how many have it in the newest release
    that the table was drawn from; ``since``: the oldest one."""

    digest: str
    kind: str
    formula: tuple[tuple[str, str], ...] = ()
    example: str = ""
    classes: int = 0
    since: str = ""

    def get(self, name: str) -> str:
        """Returns a value of the formula; "" where the row has none."""
        return dict(self.formula).get(name, "")

    def names(self, name: str) -> tuple[str, ...]:
        """Returns a value of the formula that lists names."""
        return tuple(part for part in self.get(name).split(",") if part)

    def line(self) -> str:
        formula = " ".join(f"{name}={value}" for name, value in self.formula)
        return "\t".join((self.digest, self.kind, formula, self.example, str(self.classes), self.since))


def read_rows(text: str) -> dict[str, Row]:
    """Returns the rows of a table by their digests."""
    rows = {}
    for line in text.splitlines()[1:]:
        digest, kind, formula, example, classes, since = line.split("\t")
        pairs = tuple(tuple(part.split("=", 1)) for part in formula.split())
        rows[digest] = Row(digest, kind, pairs, example, int(classes), since)
    return rows


@functools.cache
def _table() -> dict[str, Row]:
    return read_rows(TABLE.read_text())


REGISTERED: dict[str, Row] = {}


class Rows:
    """What the classes of a model are, each looked up once: as their code is now, and not as it was at another time."""

    def __init__(self) -> None:
        self._found: dict[Any, Union[tuple[Row, Form], str]] = {}

    def of(self, subject: Any, method: str = "forward") -> Union[tuple[Row, Form], str]:
        """As :func:`row_of`."""
        if (subject, method) not in self._found:
            self._found[subject, method] = row_of(subject, method)
        return self._found[subject, method]


def row_of(subject: Any, method: str = "forward") -> Union[tuple[Row, Form], str]:
    """Returns the row and form of a class's forward, or of another method, or of a Python function, as they are now; or
    the reason for which it has none."""
    try:
        form = form_of(subject, method)
    except Unknown as unknown:
        return f"its forward has no form: {unknown}"
    row = REGISTERED.get(form.digest) or _table().get(form.digest)
    if row is None:
        return f"its forward is none of the known forms ({form.digest}); to propose it: {command(subject)}"
    return row, form


def holds_for(row: Row, dtype: Any) -> bool:
    """Returns whether a row holds for a dtype; where it names none, for float32, bfloat16 and float16."""
    names = row.names("dtypes")
    return not names or str(dtype).removeprefix("torch.") in names


def command(subject: Any) -> str:
    """Returns the command that tries which known formula a class computes."""
    return f"python -m peft_ext.integrations.model_blocks {subject.__module__}:{subject.__qualname__}"
