"""Wrong arguments of operators with the expected errors. A test puts the wrong arguments into a sample of
``SHAPES[0]``."""

from __future__ import annotations

from typing import Any

import torch

Error = tuple[str, dict[str, Any], type, str]  # Name of the fault, wrong arguments, class and message of the error.
Wrong = tuple[dict[str, Any], type, str]  # Wrong arguments, class of the error, message after the operator's name.

# Faults that several operators report in equal words, by the name of the fault.
_ALIKE: dict[str, Wrong] = {
    "columns": ({"x": torch.zeros(2, 3)}, ValueError, r"x has shape \(2, 3\), wanted \[\.\.\., 64\]"),
    "weight dtype": ({"weight": torch.zeros(96, 64, dtype=torch.bfloat16)}, TypeError,
                     "weight is bfloat16, x is float32"),
    "weight of 3 dims": ({"weight": torch.zeros(2, 96, 64)}, ValueError,
                         r"weight has shape \(2, 96, 64\), wanted \[N, K\]"),
    "trainable weight": ({"weight": torch.zeros(96, 64, requires_grad=True)}, ValueError,
                         "weight requires grad, wanted a frozen"),
    "bias size": ({"bias": torch.zeros(3)}, ValueError, r"bias has shape \(3,\), wanted \(96,\)"),
    "A columns": ({"lora_A": torch.zeros(16, 63)}, ValueError, r"lora_A has shape \(16, 63\), wanted \[R, 64\]"),
    "B rows": ({"lora_B": torch.zeros(95, 16)}, ValueError, r"lora_B has shape \(95, 16\), wanted \[96, R\]"),
    "ranks": ({"lora_B": torch.zeros(96, 8)}, ValueError, "lora_B has rank 8, lora_A has rank 16"),
    "dropout 1": ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0, wanted 0 <= p < 1"),
    "seed": ({"seed": torch.zeros(3)}, ValueError, r"seed is float32 \(3,\), wanted int64 \(2,\)"),
    "residual shape": ({"residual": torch.zeros(32, 96)}, ValueError,
                       r"residual has shape \(32, 96\), wanted \(4, 8, 96\)"),
    "residual dtype": ({"residual": torch.zeros(4, 8, 96, dtype=torch.bfloat16)}, TypeError,
                       "residual is bfloat16, x is float32"),
    "dense": ({"nf4": torch.zeros(4, 4)}, TypeError, "nf4 is Tensor, wanted an NF4Weight"),
}  # fmt: skip


def errors(operator: str, *alike: str, **own: Wrong) -> tuple[Error, ...]:
    """Returns the errors of an operator: the faults of _ALIKE that ``alike`` names, and the faults ``own``."""
    wrong = {**{name: _ALIKE[name] for name in alike}, **own}
    return tuple((about, arguments, kind, f"{operator}: {text}") for about, (arguments, kind, text) in wrong.items())
