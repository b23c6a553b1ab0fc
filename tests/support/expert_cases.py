"""Cases of the operators over the experts of a mixture."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from linear_cases import plain_norm, seed_beside, shrink_some
from nf4_cases import dequantized, nf4_weight
from op_case import SEED, Case, Options, Sample, case_name, nothing, randn, shrunk_bytes, with_errors
from op_errors import errors
from packed_weights import KINDS, packed_weight
from torch import Tensor

from peft_ext import NF4Weight, ops, reference
from peft_ext.weights import PackedWeight

# --- experts ----------------------------------------------------------------------------------------------------------

_EXPERTS = 5  # number of experts; the second and the last expert get no rows


def _ends(rows: int) -> list[int]:
    """Returns, for each expert, the index after its last row. Some rows belong to no expert."""
    first, third = rows // 4, rows // 4 + (rows + 1) // 2
    last = max(third, rows - rows // 8)
    return [first, first, third, last, last]


def _experts_weight(base: str, n: int, k: int, dtype: torch.dtype) -> Any:
    if base == "dense":
        return randn(_EXPERTS, n, k, dtype=dtype, scale=0.05)
    if base == "transposed":
        return randn(_EXPERTS, k, n, dtype=dtype, scale=0.05).transpose(1, 2)
    if base in KINDS:
        return PackedWeight.stack(
            [packed_weight(base, n, k, torch.default_generator, dtype=dtype) for _ in range(_EXPERTS)]
        )
    return NF4Weight.stack([nf4_weight(n, k, dtype, 64, base == "nested") for _ in range(_EXPERTS)])


def _experts_inputs(base: str, dtype: torch.dtype, shape: tuple, adapters: torch.dtype) -> dict[str, Any]:
    tokens, k, n, r = shape
    rows = math.prod(tokens)
    return {
        "x": randn(rows, k, dtype=dtype),
        "weight": _experts_weight(base, n, k, dtype),
        "offsets": torch.tensor(_ends(rows)),
        "compute": dtype,
        "lora_A": randn(_EXPERTS, r, k, dtype=adapters, scale=0.1),
        # PEFT's layout of lora_B has the experts as the innermost dimension.
        "lora_B": randn(n, r, _EXPERTS, dtype=adapters, scale=0.1).permute(2, 0, 1),
    }


def _dropped_rows(rows: Tensor, expert: int, dropout_p: float) -> Tensor:
    """Returns the rows of an expert after dropout with the expert's own mask."""
    seed = SEED + torch.tensor([0, expert])
    kept = torch.where(reference.dropout_keep_mask(seed, dropout_p, rows.shape), rows / (1 - dropout_p), 0.0)
    return kept if dropout_p else rows


def _by_expert(x: Tensor, weight: Any, offsets: Tensor, run: Any) -> Tensor:
    """Returns the results of ``run(weight, rows, index)`` for all experts, concatenated, with zeros for rows that
    belong to no expert."""
    parts, begin = [], 0
    for expert, end in enumerate(offsets.tolist()):
        own, rows, begin = (
            weight.expert(expert) if isinstance(weight, PackedWeight) else weight[expert],
            x[begin:end],
            end,
        )
        parts.append(run(own, rows, expert))
    return torch.cat([*parts, x.new_zeros(x.shape[0] - begin, weight.shape[1])])


def lora_experts_case(
    base: str, *, with_bias: bool = False, dropout_p: float = 0.0, adapter_dtype: Any = None, lora: bool = True
) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        inputs = _experts_inputs(base, dtype, shape, adapter_dtype or dtype)
        inputs["bias"] = randn(_EXPERTS, shape[2], dtype=dtype) if with_bias else None
        if not lora:
            del inputs["lora_A"], inputs["lora_B"]
        return Sample(inputs, ("x", *(("lora_A", "lora_B") if lora else ()), *(("bias",) if with_bias else ())))

    def call(x, weight, offsets, bias, compute, lora_A=None, lora_B=None, scaling=0.75, dropout_p=dropout_p,
             training=True, seed=None):  # fmt: skip
        if not lora:
            return ops.experts_linear(x, weight, offsets, bias)
        seed = seed_beside(x) if seed is None else seed
        return ops.lora_experts(x, weight, offsets, lora_A, lora_B, bias, scaling=scaling, dropout_p=dropout_p,
                                training=training, seed=seed)  # fmt: skip

    def plain(x, weight, offsets, bias, compute, lora_A=None, lora_B=None):
        def run(own: Any, rows: Tensor, expert: int) -> Tensor:
            y = F.linear(rows, dequantized(own, compute).to(x.dtype), None if bias is None else bias[expert])
            if lora_A is None:
                return y
            low = F.linear(_dropped_rows(rows, expert, dropout_p), lora_A[expert].to(x.dtype))
            return y + F.linear(low, lora_B[expert].to(x.dtype)) * 0.75

        return _by_expert(x, weight, offsets, run)

    name = case_name("lora_experts" if lora else "experts_linear", base, dropout_p, adapter_dtype, bias=with_bias)
    return Case(
        name, "lora", make, call, plain,
        result=lambda dtype, shape: (dtype, (math.prod(shape[0]), shape[2])),
        saved=shrunk_bytes(dropout_p) if lora else nothing,
    )  # fmt: skip


def _plain_experts_norm(
    weight: Any, lora_A: Tensor, lora_B: Tensor, compute: torch.dtype, dtype: torch.dtype
) -> Tensor:
    own = [weight.expert(e) if isinstance(weight, PackedWeight) else weight[e] for e in range(_EXPERTS)]
    return torch.stack([plain_norm(dequantized(one, compute).to(dtype), a, b)
                        for one, a, b in zip(own, lora_A, lora_B, strict=True)])  # fmt: skip


def dora_experts_norm_case(base: str, *, adapter_dtype: Any = None) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        inputs = _experts_inputs(base, dtype, shape, adapter_dtype or dtype)
        return Sample({k: v for k, v in inputs.items() if k not in ("x", "offsets")}, ())

    def call(weight, lora_A, lora_B, compute, scaling=0.75, dtype=None, offsets=None):
        return ops.dora_experts_weight_norm(weight, lora_A, lora_B, scaling, dtype=dtype, offsets=offsets)

    def plain(weight, lora_A, lora_B, compute):
        return _plain_experts_norm(weight, lora_A, lora_B, compute, torch.promote_types(compute, lora_A.dtype))

    name = case_name("dora_experts_weight_norm", base, 0.0, adapter_dtype)
    return Case(name, "dora", make, call, plain, result=lambda dtype, shape: (torch.float32, (_EXPERTS, shape[2])),
                saved=nothing)  # fmt: skip


def dora_experts_case(base: str, *, with_bias: bool = False, dropout_p: float = 0.0, adapter_dtype: Any = None) -> Case:
    def norm(inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
        return _plain_experts_norm(*(inputs[key] for key in ("weight", "lora_A", "lora_B", "compute")), dtype)

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        adapters = adapter_dtype or dtype
        inputs = _experts_inputs(base, dtype, shape, adapters)
        inputs["bias"] = randn(_EXPERTS, shape[2], dtype=dtype) if with_bias else None
        scale = 1.0 + randn(_EXPERTS, shape[2], dtype=torch.float64, scale=0.2)
        shrink_some(scale[0])
        inputs["magnitude"] = (norm(inputs, torch.float64) * scale).to(adapters)
        return Sample(inputs, ("x", "lora_A", "lora_B", "magnitude", *(("bias",) if with_bias else ())))

    def call(x, weight, offsets, bias, compute, lora_A, lora_B, magnitude, scaling=0.75, dropout_p=dropout_p,
             training=True, seed=None, weight_norm=None):  # fmt: skip
        seed = seed_beside(x) if seed is None else seed
        return ops.dora_experts(x, weight, offsets, lora_A, lora_B, magnitude, bias, scaling=scaling,
                                dropout_p=dropout_p, training=training, weight_norm=weight_norm, seed=seed)  # fmt: skip

    def plain(x, weight, offsets, bias, compute, lora_A, lora_B, magnitude, weight_norm=None):
        if weight_norm is None:
            weight_norm = _plain_experts_norm(weight, lora_A, lora_B, compute, x.dtype).detach()
        g = magnitude.to(x.dtype) / weight_norm.to(x.dtype)

        def run(own: Any, rows: Tensor, expert: int) -> Tensor:
            z = F.linear(rows, dequantized(own, compute).to(x.dtype))
            low = F.linear(_dropped_rows(rows, expert, dropout_p), lora_A[expert].to(x.dtype))
            y = g[expert] * (z + F.linear(low, lora_B[expert].to(x.dtype)) * 0.75)
            return y if bias is None else y + bias[expert]

        return _by_expert(x, weight, offsets, run)

    name = case_name("dora_experts", base, dropout_p, adapter_dtype, bias=with_bias)
    return Case(
        name, "dora", make, call, plain,
        from_product=("magnitude",),
        result=lambda dtype, shape: (dtype, (math.prod(shape[0]), shape[2])),
        held=lambda sample: {"weight_norm": norm(sample.inputs, torch.float64).detach()},
        # The call saves S, Z, and for each expert g and the norm.
        saved=lambda t, k, n, r: shrunk_bytes(dropout_p)(t, k, n, r) + t * n * 2 + 2 * _EXPERTS * n * 4,
    )  # fmt: skip


# --- what is tested --------------------------------------------------------------------------------------------------

ERRORS = {
    "lora_experts-dense-bias-dropout0.1": errors(
        "lora_experts", "dropout 1", "seed",
        columns=({"x": torch.zeros(2, 3)}, ValueError, r"x has shape \(2, 3\), wanted \[S, 64\]"),
        matrix=({"weight": torch.zeros(96, 64)}, ValueError, r"weight has shape \(96, 64\), wanted \[E, N, K\]"),
        weight_dtype=({"weight": torch.zeros(5, 96, 64, dtype=torch.bfloat16)}, TypeError,
                      "weight is bfloat16, x is float32"),
        trainable=({"weight": torch.zeros(5, 96, 64, requires_grad=True)}, ValueError, "weight requires grad, wanted"),
        offsets_dtype=({"offsets": torch.zeros(5)}, TypeError, "offsets is float32, wanted int32 or int64"),
        offsets_size=({"offsets": torch.zeros(4, dtype=torch.int64)}, ValueError,
                      r"offsets has shape \(4,\), wanted \(5,\)"),
        bias_size=({"bias": torch.zeros(96)}, ValueError, r"bias has shape \(96,\), wanted \(5, 96\)"),
        A_columns=({"lora_A": torch.zeros(5, 16, 63)}, ValueError,
                   r"lora_A has shape \(5, 16, 63\), wanted \(5, 16, 64\)"),
        ranks=({"lora_B": torch.zeros(5, 96, 8)}, ValueError, r"lora_B has shape \(5, 96, 8\), wanted \(5, 96, 16\)"),
        scaling=({"scaling": float("inf")}, ValueError, "scaling is inf, wanted a finite number"),
    ),
    "experts_linear-dense-bias": errors(
        "experts_linear",
        columns=({"x": torch.zeros(2, 3)}, ValueError, r"x has shape \(2, 3\), wanted \[S, 64\]"),
        matrix=({"weight": torch.zeros(96, 64)}, ValueError, r"weight has shape \(96, 64\), wanted \[E, N, K\]"),
        offsets_dtype=({"offsets": torch.zeros(5)}, TypeError, "offsets is float32, wanted int32 or int64"),
    ),
    "dora_experts-dense-bias-dropout0.1": errors(
        "dora_experts", "dropout 1", "seed",
        columns=({"x": torch.zeros(2, 3)}, ValueError, r"x has shape \(2, 3\), wanted \[S, 64\]"),
        offsets_size=({"offsets": torch.zeros(4, dtype=torch.int64)}, ValueError,
                      r"offsets has shape \(4,\), wanted \(5,\)"),
        ranks=({"lora_B": torch.zeros(5, 96, 8)}, ValueError, r"lora_B has shape \(5, 96, 8\), wanted \(5, 96, 16\)"),
        magnitude_size=({"magnitude": torch.zeros(96)}, ValueError, r"magnitude has shape \(96,\), wanted \(5, 96\)"),
        no_magnitude=({"magnitude": None}, TypeError, "magnitude is NoneType, wanted a Tensor"),
        norm_size=({"weight_norm": torch.zeros(5, 95)}, ValueError,
                   r"weight_norm has shape \(5, 95\), wanted \(5, 96\)"),
        scaling=({"scaling": float("nan")}, ValueError, "scaling is nan, wanted a finite number"),
    ),
    "dora_experts_weight_norm-dense": errors(
        "dora_experts_weight_norm",
        matrix=({"weight": torch.zeros(96, 64)}, ValueError, r"weight has shape \(96, 64\), wanted \[E, N, K\]"),
        A_columns=({"lora_A": torch.zeros(5, 16, 63)}, ValueError,
                   r"lora_A has shape \(5, 16, 63\), wanted \(5, 16, 64\)"),
        offsets_dtype=({"offsets": torch.zeros(5)}, TypeError, "offsets is float32, wanted int32 or int64"),
        offsets_size=({"offsets": torch.zeros(4, dtype=torch.int64)}, ValueError,
                      r"offsets has shape \(4,\), wanted \(5,\)"),
        dense_dtype=({"dtype": torch.bfloat16}, TypeError, "dtype is torch.bfloat16, wanted a dense weight's own"),
        scaling=({"scaling": float("inf")}, ValueError, "scaling is inf, wanted a finite number"),
    ),
}  # fmt: skip

CASES = with_errors(
    ERRORS,
    lora_experts_case("dense", with_bias=True, dropout_p=0.1),
    lora_experts_case("transposed", adapter_dtype=torch.float32),
    lora_experts_case("nf4", adapter_dtype=torch.bfloat16, dropout_p=0.5),
    lora_experts_case("nested", adapter_dtype=torch.float32),
    lora_experts_case("dense", with_bias=True, lora=False),
    dora_experts_norm_case("dense"),
    dora_experts_norm_case("transposed", adapter_dtype=torch.float32),
    dora_experts_norm_case("nested", adapter_dtype=torch.float32),
    dora_experts_case("dense", with_bias=True, dropout_p=0.1),
    dora_experts_case("transposed", adapter_dtype=torch.float32),
    dora_experts_case("nf4", adapter_dtype=torch.bfloat16, dropout_p=0.5),
    dora_experts_case("nested", adapter_dtype=torch.float32),
)


def drawn(o: Options) -> dict[str, Callable[[], Case]]:
    """Returns no functions, since the sweep draws no calls over experts."""
    return {}
