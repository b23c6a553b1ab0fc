"""Cases of LoRA over an embedding. K is the size of the vocabulary, and N is the number of columns of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from linear_cases import base_weight
from nf4_cases import dequantized
from op_case import Case, Options, Sample, case_name, randn, with_errors
from op_errors import errors

from peft_ext import ops

_PADDING = -1  # index of the padding entry: the last entry


def lora_embedding_case(base: str, *, adapter_dtype: Any = None, padding: bool = False, int32: bool = False) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, entries, n, r = shape
        adapters = adapter_dtype or dtype
        indices = torch.randint(0, entries, tokens)
        if indices.numel() > 2:
            indices.view(-1)[::3] = entries - 1  # every third index is the last entry
        inputs = {
            "indices": indices.int() if int32 else indices,
            "weight": base_weight(base, entries, n, dtype),
            "lora_A": randn(r, entries, dtype=adapters),
            "lora_B": randn(n, r, dtype=adapters, scale=0.1),
            "compute": dtype,
        }
        return Sample(inputs, ("lora_A", "lora_B"))

    def call(indices, weight, lora_A, lora_B, compute, scaling=0.75, padding_idx=_PADDING if padding else None):
        return ops.lora_embedding(indices, weight, lora_A, lora_B, scaling=scaling, padding_idx=padding_idx)

    def plain(indices, weight, lora_A, lora_B, compute, column=None):
        # PEFT computes two embeddings, a product and a sum, and rounds each result.
        if padding:  # The column of lora_A at the padding index gets no gradient.
            column = lora_A.detach()[:, -1:] if column is None else column.to(lora_A.dtype)
            lora_A = torch.cat([lora_A[:, :-1], column], dim=1)
        base_rows = F.embedding(indices, dequantized(weight, compute))
        y = base_rows + F.linear(F.embedding(indices, lora_A.t()), lora_B) * 0.75
        return y if lora_A.dtype == torch.float64 else y.to(compute)

    name = case_name("lora_embedding", base, 0.0, adapter_dtype, padding=padding, int32=int32)
    return Case(
        name, "embedding", make, call, plain,
        held=lambda sample: {"column": sample.inputs["lora_A"].detach()[:, -1:].clone()} if padding else {},
        saved=lambda t, k, n, r: t * 8 if int32 else 0,  # the call saves the indices as int64
    )  # fmt: skip


ERRORS = {
    "lora_embedding-dense": errors(
        "lora_embedding", "A columns", "B rows", "ranks",
        no_tensor=({"indices": [1]}, TypeError, "indices is list, wanted a Tensor"),
        floats=({"indices": torch.zeros(4)}, TypeError,
                "indices is float32, torch.strided, wanted a strided Tensor of int32 or int64"),
        too_large=({"indices": torch.tensor([[3, 64]])}, IndexError, "indices has 64, wanted 0 to 63"),
        negative=({"indices": torch.tensor(-1)}, IndexError, "indices has -1, wanted 0 to 63"),
        elsewhere=({"indices": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError,
                   "indices is on meta, weight is on cpu"),
        trainable=({"weight": torch.zeros(64, 96, requires_grad=True)}, ValueError, "weight requires grad, wanted"),
        vector=({"weight": torch.zeros(64)}, ValueError, r"weight has shape \(64,\), wanted"),
        scaling=({"scaling": float("nan")}, ValueError, "scaling is nan, wanted a finite number"),
        padding=({"padding_idx": 64}, ValueError, "padding_idx is 64, wanted -64 to 63, or None"),
    ),
}  # fmt: skip

CASES = with_errors(
    ERRORS,
    lora_embedding_case("dense"),
    lora_embedding_case("dense", adapter_dtype=torch.float32, padding=True),
    lora_embedding_case("nf4", adapter_dtype=torch.bfloat16, int32=True),
    lora_embedding_case("nested", adapter_dtype=torch.float32, padding=True),
)


def drawn(o: Options) -> dict[str, Callable[[], Case]]:
    """Returns, by public operator, a function that makes a random case for the sweep."""
    return {
        "lora_embedding": lambda: lora_embedding_case(
            o.base, adapter_dtype=o.adapters, padding=o.maybe(0.3), int32=o.maybe(0.3)
        )
    }
