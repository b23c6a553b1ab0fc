"""Cases of the operators that have no product: norms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from op_case import SHAPES, Case, Sample, case_name, randn

from peft_ext import ops

# --- norms ------------------------------------------------------------------------------------------------------------

# A row of one column has the gradient 0, but for eps: the difference of two that are not.
_ROWS = tuple(shape for shape in SHAPES if shape[1] > 1)


def _of_x(dtype: torch.dtype, shape: tuple) -> tuple[torch.dtype, tuple]:
    return dtype, (*shape[0], shape[1])


def rms_norm_case(kind: str = "llama", *, weight_dtype: Any = None, weighted: bool = True) -> Case:
    """``kind``: "llama" or "gemma", and what transformers' layer of that name computes."""
    gemma = kind == "gemma"

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        weight = randn(shape[1], dtype=torch.float64, scale=0.3) + (0.0 if gemma else 1.0)
        inputs = {"x": randn(*shape[0], shape[1], dtype=dtype, scale=3.0)}
        inputs["weight"] = weight.to(weight_dtype or dtype) if weighted else None
        return Sample(inputs, ("x", "weight") if weighted else ("x",))

    def call(x, weight, eps=1e-6, offset=1.0 if gemma else 0.0):
        return ops.rms_norm(x, weight, eps, offset=offset, round_before_weight=not gemma)

    def plain(x, weight):
        wide = torch.promote_types(x.dtype, torch.float32)
        h = x.to(wide)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        if gemma:
            return (h * (1.0 + weight.to(wide))).type_as(x)
        return h.to(x.dtype) if weight is None else weight * h.to(x.dtype)

    def result(dtype: torch.dtype, shape: tuple) -> tuple[torch.dtype, tuple]:
        mixed = weight_dtype is not None and not gemma
        return torch.promote_types(dtype, weight_dtype) if mixed else dtype, (*shape[0], shape[1])

    name = case_name("rms_norm", kind, 0.0, weight_dtype, alone=not weighted)
    return Case(name, "norm", make, call, plain, result=result, shapes=_ROWS)


def layer_norm_case(vectors: str = "weight bias", vector_dtype: Any = None) -> Case:
    """``vectors``: those that there are."""
    names = vectors.split()

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        inputs = {"x": randn(*shape[0], shape[1], dtype=dtype, scale=3.0) + 1, "weight": None, "bias": None}
        for name in names:
            inputs[name] = randn(shape[1], dtype=vector_dtype or dtype)
        return Sample(inputs, ("x", *names))

    def call(x, weight, bias, eps=1e-5):
        return ops.layer_norm(x, weight, bias, eps)

    def plain(x, weight, bias):
        weight, bias = (value if value is None else value.to(x.dtype) for value in (weight, bias))
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    name = case_name("layer_norm", vectors.replace(" ", "_") or "alone", 0.0, vector_dtype)
    return Case(name, "norm", make, call, plain, result=_of_x, shapes=_ROWS)
