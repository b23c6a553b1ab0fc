"""The table of known forms: the code of models, mostly forwards, that peft_ext may replace by fused code.

The file ``forms.tsv``, which tools/forms.py writes, has one row per form, with the columns digest, kind, formula,
example, classes and since. :func:`row_of` returns the row and the form of a class or of a function, or the reason why
there is no row.

The key of a row is the digest of the code (:mod:`.digest`), not the name of a class. Except for nn.Dropout, a row whose
formula replaces a computation is in the table only if the formula gave the same values and gradients as the code of a
class with the form, for extreme inputs and in each dtype (see :mod:`peft_ext.verification.proof`). Code that has no row
in the table, and was not registered with ``register_form``, runs unchanged.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from .digest import Form, Unknown, form_of

__all__ = ["Form", "KINDS", "Row", "Unknown", "form_of", "holds_for", "read_rows", "row_of"]

# Maps each kind of form (for example a norm, an MLP or an attention) to the names of the values that the formula of a
# row of this kind may have.
KINDS: dict[str, tuple[str, ...]] = {
    "rms_norm": ("weight", "eps", "offset", "rounds", "mixed", "needs"),
    "layer_norm": (),
    "float_layer_norm": ("weight", "eps", "shape", "mixed"),
    "dropout": (),
    "mlp": ("inner", "out", "act", "gated", "drop", "needs"),
    "activation": ("function", "inner", "approximate", "needs", "dtypes"),
    "gate": ("act",),
    "attention": ("inputs", "interface", "forward", "norms", "o", "cache", "options"),
    "projections": ("inputs",),
    "decoder_layer": ("norms", "posts", "attention", "mlp", "passes"),
    "cache": (),
    "cache_layer": (),
    "sliding_cache_layer": (),
    "sdpa": ("bias",),
    "causal_loss": (),
}
TABLE = Path(__file__).with_name("forms.tsv")
HEADER = ("digest", "kind", "formula", "example", "classes", "since")


@dataclass(frozen=True)
class Row:
    """One known form.

    ``formula``: pairs of a name and a value, which say what the code computes; KINDS lists the names for each ``kind``.
    ``classes``: number of classes with this form in the newest release of transformers that has the form, of the
    releases that the table was drawn from. ``since``: the oldest release of transformers, of those that the table was
    drawn from, that has the form.
    """

    digest: str
    kind: str
    formula: tuple[tuple[str, str], ...] = ()
    example: str = ""
    classes: int = 0
    since: str = ""

    def get(self, name: str) -> str:
        """Returns the value ``name`` of the formula; "" if the formula has no such value."""
        return dict(self.formula).get(name, "")

    def names(self, name: str) -> tuple[str, ...]:
        """Returns the value ``name`` of the formula, which is a comma-separated list, as a tuple of strings."""
        return tuple(part for part in self.get(name).split(",") if part)

    def line(self) -> str:
        formula = " ".join(f"{name}={value}" for name, value in self.formula)
        return "\t".join((self.digest, self.kind, formula, self.example, str(self.classes), self.since))


def read_rows(text: str) -> dict[str, Row]:
    """Returns the rows of a table's text as a dict from digest to row."""
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


def row_of(subject: Any, method: str = "forward") -> Union[tuple[Row, Form], str]:
    """Returns the row in the table of known forms, and the form, of the current code of a class's method (by default
    the forward) or of a Python function; or the reason why the code has no row."""
    try:
        form = form_of(subject, method)
    except Unknown as unknown:
        return f"its forward has no form: {unknown}"
    row = REGISTERED.get(form.digest) or _table().get(form.digest)
    if row is None:
        return (
            f"its forward is none of the known forms ({form.digest}); for a norm or an MLP, this command looks for a "
            f"formula: {command(subject)}"
        )
    return row, form


def holds_for(row: Row, dtype: Any) -> bool:
    """Returns whether a row's formula holds for a dtype. A row that names no dtypes holds for every dtype."""
    names = row.names("dtypes")
    return not names or str(dtype).removeprefix("torch.") in names


def command(subject: Any) -> str:
    """Returns the shell command that looks for a formula that computes the same as a class's forward."""
    return f"python -m peft_ext.verification {subject.__module__}:{subject.__qualname__}"
