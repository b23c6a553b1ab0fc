"""Tells whether the forward of a class is a known form, and if not, looks for a formula for ``peft_ext.register_form``.

python -m peft_ext.verification my_package.my_model:MyRMSNorm
"""

from __future__ import annotations

import importlib
import os
import sys

from ..integrations.forms import Unknown, row_of
from .proof import proposed


def main() -> int:
    """Prints whether the class that the command line names has a known form, or which formula passes the proof.

    :func:`.proof.proposed` proposes the formulas. Returns 0 if the class has a known form or if a proposed formula
    passes the proof for the class, 1 if not, and 2 for wrong arguments.
    """
    module, _, name = sys.argv[1].partition(":") if len(sys.argv) == 2 else ("", "", "")
    if not module or not name:
        print(__doc__, file=sys.stderr)
        return 2
    sys.path.insert(0, os.getcwd())
    cls = importlib.import_module(module)
    for part in name.split("."):
        cls = getattr(cls, part)
    found = row_of(cls)
    if not isinstance(found, str):
        print(f"{name}: a known form, {found[0].kind}, {dict(found[0].formula)}, as {found[0].example}")
        return 0
    try:
        row, why = proposed(cls)
    except Unknown as unknown:
        print(f"{name}: its forward has no form: {unknown}")
        return 1
    if row is None:
        print(f"{name}: none of the known forms, and no formula passes the proof: {why}")
        return 1
    formula = "".join(f", {key}={value!r}" for key, value in row.formula)
    print(f"{name}: passes the proof. Before accelerate(model):\n\n"
          f"    from {module} import {name}\n    peft_ext.register_form({name}, {row.kind!r}{formula})")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
