"""Cases of a mixture's linear layers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from linear_cases import base_weight, dequantized, nf4_weight, plain_norm, seed_beside, shrink_some
from op_case import SEED, Case, Sample, case_name, randn
from torch import Tensor

from peft_ext import NF4Weight, ops, reference

# --- experts ----------------------------------------------------------------------------------------------------------

_EXPERTS = 5  # of which the second and the last get nothing


def _ends(rows: int) -> list[int]:
    """Where each expert's rows end; some are no expert's."""
    first, third = rows // 4, rows // 4 + (rows + 1) // 2
    last = max(third, rows - rows // 8)
    return [first, first, third, last, last]


def _experts_weight(base: str, n: int, k: int, dtype: torch.dtype) -> Any:
    if base == "dense":
        return randn(_EXPERTS, n, k, dtype=dtype, scale=0.05)
    if base == "transposed":
        return randn(_EXPERTS, k, n, dtype=dtype, scale=0.05).transpose(1, 2)
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
        # As PEFT keeps it: the ranks before the experts.
        "lora_B": randn(n, r, _EXPERTS, dtype=adapters, scale=0.1).permute(2, 0, 1),
    }


def _dropped_rows(rows: Tensor, expert: int, dropout_p: float) -> Tensor:
    """The rows of an expert, which has a mask of its own."""
    seed = SEED + torch.tensor([0, expert])
    kept = torch.where(reference.dropout_keep_mask(seed, dropout_p, rows.shape), rows / (1 - dropout_p), 0.0)
    return kept if dropout_p else rows


def _by_expert(x: Tensor, weight: Any, offsets: Tensor, run: Any) -> Tensor:
    """run(its weight, its rows, its number) of each expert, and zeros in the rows of none."""
    parts, begin = [], 0
    for expert, end in enumerate(offsets.tolist()):
        own, rows, begin = (
            weight.expert(expert) if isinstance(weight, NF4Weight) else weight[expert],
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
    )  # fmt: skip


def lora_expert_linears_case(
    base: str, *, with_bias: bool = False, dropout_p: float = 0.0, adapter_dtype: Any = None, rank_scale: bool = False
) -> Case:
    """Four layers: two adapters of other ranks and masks, one that gets no rows, and a layer without an adapter."""
    rank_of = (lambda r: r, lambda r: r // 2 + 1, lambda r: 2)
    scalings = (0.75, -0.5, 2.0, 1.0)

    def counts(rows: int) -> list[int]:
        first, last = rows // 3, rows // 5
        return [first, rows - first - last, 0, last]

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, r = shape
        adapters, rows = adapter_dtype or dtype, math.prod(tokens)
        inputs: dict[str, Any] = {"x": randn(rows, k, dtype=dtype), "compute": dtype}
        for i in range(4):
            inputs[f"weight{i}"] = base_weight(base, n, k, dtype)
        names = ["x"]
        for i, rank in enumerate(rank_of):
            inputs |= {f"A{i}": randn(rank(r), k, dtype=adapters, scale=0.1),
                       f"B{i}": randn(n, rank(r), dtype=adapters, scale=0.1)}  # fmt: skip
            names += [f"A{i}", f"B{i}"]
        inputs["rank_scale"] = randn(r, dtype=adapters) if rank_scale else None
        inputs |= {f"bias{i}": randn(n, dtype=dtype) if with_bias else None for i in (0, 3)}
        names += [*(("bias0", "bias3") if with_bias else ()), *(("rank_scale",) if rank_scale else ())]
        return Sample(inputs, names)

    def call(x, compute, rank_scale, bias0, bias3, **i):
        seeds = [seed_beside(x), seed_beside(x) + 1, seed_beside(x), None]
        return ops.lora_expert_linears(
            x, counts(x.shape[0]), [i[f"weight{e}"] for e in range(4)], [i["A0"], i["A1"], i["A2"], None],
            [i["B0"], i["B1"], i["B2"], None], [bias0, None, None, bias3], rank_scales=[rank_scale, None, None, None],
            scalings=scalings, dropout_ps=dropout_p, training=True, seeds=seeds,
        )  # fmt: skip

    def plain(x, compute, rank_scale, bias0, bias3, **i):
        parts = []
        for e, rows in enumerate(x.split(counts(x.shape[0]))):
            bias = bias0 if e == 0 else bias3 if e == 3 else None
            y = F.linear(rows, dequantized(i[f"weight{e}"], compute).to(x.dtype), bias)
            if e < 3:
                a = i[f"A{e}"].to(x.dtype)
                a = a * rank_scale.to(x.dtype)[:, None] if e == 0 and rank_scale is not None else a
                kept = torch.where(reference.dropout_keep_mask(SEED + (e == 1), dropout_p, rows.shape),
                                   rows / (1 - dropout_p), 0.0) if dropout_p else rows  # fmt: skip
                y = y + F.linear(F.linear(kept, a), i[f"B{e}"].to(x.dtype)) * scalings[e]
            parts.append(y)
        return torch.cat(parts)

    name = case_name("lora_expert_linears", base, dropout_p, adapter_dtype, bias=with_bias, rank_scale=rank_scale)
    return Case(name, "lora", make, call, plain,
                result=lambda dtype, shape: (dtype, (math.prod(shape[0]), shape[2])))  # fmt: skip


def _plain_experts_norm(
    weight: Any, lora_A: Tensor, lora_B: Tensor, compute: torch.dtype, dtype: torch.dtype
) -> Tensor:
    own = [weight.expert(e) if isinstance(weight, NF4Weight) else weight[e] for e in range(_EXPERTS)]
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
    return Case(name, "dora", make, call, plain, result=lambda dtype, shape: (torch.float32, (_EXPERTS, shape[2])))


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
    )  # fmt: skip
