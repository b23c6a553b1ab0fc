"""The inputs on which every operator is tested: the cases of all ``*_cases.py`` beside this file.

A case says how to draw inputs, how to call the public op, and what plain PyTorch and the float64 oracle compute from
the same inputs. ``test_ops.py`` runs its tests for each case. To test a new operator, add a case.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from op_case import DTYPES, SEED, SHAPES, Case, Sample, randn, wide

__all__ = ["CASES", "DTYPES", "MODULES", "SAVED_OUTPUT", "SEED", "SHAPES", "Case", "Sample", "randn", "wide"]

MODULES = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("*_cases.py"))]

CASES: tuple[Case, ...] = tuple(case for module in MODULES for case in module.CASES)

SAVED_OUTPUT: tuple[Case, ...] = tuple(case for module in MODULES for case in getattr(module, "SAVED_OUTPUT", ()))
