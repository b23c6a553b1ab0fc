"""The one list of operators and the inputs they are tested on.

A case says how to draw inputs, how to call the public op, and what plain PyTorch and the float64 oracle compute from
the same inputs. ``test_ops.py`` runs the whole battery over every case; adding an operator is adding a case.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from op_case import DTYPES, SEED, SHAPES, Case, Sample, case_name, randn, wide
from row_cases import (
    activation_case,
    attention_case,
    dropout_case,
    gated_activation_case,
    layer_norm_case,
    rms_norm_case,
    rotary_case,
)
from torch import Tensor

from peft_ext import NF4Weight, ops, reference

__all__ = ["CASES", "DTYPES", "SAVED_OUTPUT", "SEED", "SHAPES", "Case", "Sample", "randn", "wide"]


# --- nf4 --------------------------------------------------------------------------------------------------------------


def nf4_weight(n: int, k: int, dtype: torch.dtype, blocksize: int, double_quant: bool) -> NF4Weight:
    """Quantized by the reference, so that a fault of the quantize kernel does not hide one of another's."""
    return reference.nf4_quantize(randn(n, k, dtype=dtype, scale=0.05), blocksize, double_quant)


def _quantize_case(blocksize: int, double_quant: bool) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        _, k, n, _ = shape
        weight = randn(n, k, dtype=dtype)
        flat = weight.view(-1)
        flat[: min(flat.numel(), blocksize)] = 0.0  # an all-zero block
        # Values on a threshold between two codes, in a block whose scale is one: ties.
        code = reference.nf4_code()
        if flat.numel() >= 2 * blocksize:
            ties = torch.cat([(code[1:] + code[:-1]) / 2, torch.ones(1)]).to(dtype)
            flat[blocksize : blocksize + 16] = ties
            flat[blocksize + 16 : 2 * blocksize] = 0.5
        return Sample({"weight": weight})

    def packed(quantize: Callable[..., NF4Weight]) -> Callable[..., Tensor]:
        def run(weight: Tensor) -> Tensor:
            parts = quantize(weight, blocksize, double_quant).tensors().values()
            return torch.cat([part.reshape(-1).double() for part in parts])

        return run

    name = f"nf4_quantize-{blocksize}{'-nested' if double_quant else ''}"
    return Case(name, "nf4", make, packed(ops.nf4_quantize), packed(reference.nf4_quantize), exact=True)


def _dequantize_case(blocksize: int, double_quant: bool) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        _, k, n, _ = shape
        return Sample({"nf4": nf4_weight(n, k, dtype, blocksize, double_quant), "dtype": dtype})

    name = f"nf4_dequantize-{blocksize}{'-nested' if double_quant else ''}"
    return Case(name, "nf4", make, ops.nf4_dequantize, reference.nf4_dequantize, exact=True)


def _dequantized(weight: Any, dtype: torch.dtype) -> Tensor:
    """The dense weight that a kernel computes with, in its compute dtype."""
    return reference.nf4_dequantize(weight, dtype) if isinstance(weight, NF4Weight) else weight


def _nf4_linear_case(double_quant: bool, with_bias: bool, blocksize: int = 64) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, _ = shape
        inputs = {"x": randn(*tokens, k, dtype=dtype), "nf4": nf4_weight(n, k, dtype, blocksize, double_quant)}
        inputs["bias"] = randn(n, dtype=dtype) if with_bias else None
        inputs["compute"] = dtype
        return Sample(inputs, ("x", "bias") if with_bias else ("x",))

    def call(x: Tensor, nf4: NF4Weight, bias: Optional[Tensor], compute: torch.dtype) -> Tensor:
        return ops.nf4_linear(x, nf4, bias)

    def plain(x: Tensor, nf4: NF4Weight, bias: Optional[Tensor], compute: torch.dtype) -> Tensor:
        return F.linear(x, _dequantized(nf4, compute).to(x.dtype), bias)

    return Case(
        f"nf4_linear{'-nested' if double_quant else ''}{'-bias' if with_bias else ''}"
        + (f"-{blocksize}" if blocksize != 64 else ""), "nf4", make, call, plain,
    )  # fmt: skip


# --- lora -------------------------------------------------------------------------------------------------------------


def _seed_beside(x: Any) -> Tensor:
    return SEED.to(x.device) if isinstance(x, Tensor) else SEED


def _base_weight(base: str, n: int, k: int, dtype: torch.dtype) -> Any:
    """A frozen weight: "dense", "nf4", or "nested" (NF4 with double quantization), and ":" and a blocksize, or 64."""
    kind, _, blocksize = base.partition(":")
    if kind == "dense":
        return randn(n, k, dtype=dtype, scale=0.05)
    return nf4_weight(n, k, dtype, int(blocksize or 64), kind == "nested")


def _dropped(x: Tensor, p: float) -> Tensor:
    return torch.where(reference.dropout_keep_mask(SEED, p, x.shape), x / (1 - p), 0.0) if p else x


def _low_rank_inputs(base: str, dtype: torch.dtype, shape: tuple, adapters: torch.dtype, with_bias: bool) -> dict:
    tokens, k, n, r = shape
    return {
        "x": randn(*tokens, k, dtype=dtype),
        "weight": _base_weight(base, n, k, dtype),
        "lora_A": randn(r, k, dtype=adapters, scale=0.1),
        "lora_B": randn(n, r, dtype=adapters, scale=0.1),
        "bias": randn(n, dtype=dtype) if with_bias else None,
        "compute": dtype,
    }


def _lora_case(
    base: str, *, with_bias: bool = False, dropout_p: float = 0.0, adapter_dtype: Any = None, rank_scale: bool = False
) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        adapters = adapter_dtype or dtype
        inputs = _low_rank_inputs(base, dtype, shape, adapters, with_bias)
        inputs["rank_scale"] = randn(shape[3], dtype=adapters) if rank_scale else None
        optional = (("bias",) if with_bias else ()) + (("rank_scale",) if rank_scale else ())
        return Sample(inputs, ("x", "lora_A", "lora_B", *optional))

    def call(x, weight, lora_A, lora_B, bias, compute, rank_scale, scaling=0.75, dropout_p=dropout_p, training=True,
             seed=None):  # fmt: skip
        seed = _seed_beside(x) if seed is None else seed
        return ops.lora_linear(x, weight, lora_A, lora_B, bias, rank_scale=rank_scale, scaling=scaling,
                               dropout_p=dropout_p, training=training, seed=seed)  # fmt: skip

    def plain(x, weight, lora_A, lora_B, bias, compute, rank_scale):
        # As PEFT does it where all is of one dtype: dropout, two projections, a product, a sum, each rounded.
        y = F.linear(x, _dequantized(weight, compute).to(x.dtype), bias)
        lora_A = lora_A.to(x.dtype) if rank_scale is None else lora_A.to(x.dtype) * rank_scale.to(x.dtype)[:, None]
        return y + F.linear(F.linear(_dropped(x, dropout_p), lora_A), lora_B.to(x.dtype)) * 0.75

    name = case_name("lora_linear", base, dropout_p, adapter_dtype, bias=with_bias, rank_scale=rank_scale)
    return Case(name, "lora", make, call, plain)


_OTHER_SEED = SEED + 1


def _lora_linears_case(
    base: str, *, with_bias: bool = False, dropout_p: float = 0.0, adapter_dtype: Any = None, rank_scale: bool = False
) -> Case:
    """Two adapters of other ranks, the second one's mask another, and a layer without; the results side by side."""

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, r = shape
        adapters, second = adapter_dtype or dtype, r // 2 + 1
        inputs = _low_rank_inputs(base, dtype, shape, adapters, with_bias)
        inputs["rank_scale"] = randn(r, dtype=adapters) if rank_scale else None
        inputs |= {"weight2": _base_weight(base, n, k, dtype), "weight3": _base_weight(base, n, k, dtype),
                   "A2": randn(second, k, dtype=adapters, scale=0.1), "B2": randn(n, second, dtype=adapters, scale=0.1),
                   "bias3": randn(n, dtype=dtype) if with_bias else None}  # fmt: skip
        optional = (("bias", "bias3") if with_bias else ()) + (("rank_scale",) if rank_scale else ())
        return Sample(inputs, ("x", "lora_A", "lora_B", "A2", "B2", *optional))

    def call(x, weight, lora_A, lora_B, bias, compute, rank_scale, weight2, weight3, A2, B2, bias3):
        seeds = [_seed_beside(x), _seed_beside(x) + 1, None]
        ys = ops.lora_linears(
            x, [weight, weight2, weight3], [lora_A, A2, None], [lora_B, B2, None], [bias, None, bias3],
            rank_scales=[rank_scale, None, None], scalings=[0.75, -0.5, 1.0], dropout_ps=dropout_p, training=True,
            seeds=seeds,
        )  # fmt: skip
        return torch.cat(ys, dim=-1)

    def plain(x, weight, lora_A, lora_B, bias, compute, rank_scale, weight2, weight3, A2, B2, bias3):
        a = lora_A.to(x.dtype) if rank_scale is None else lora_A.to(x.dtype) * rank_scale.to(x.dtype)[:, None]
        first, second, third = (_dequantized(w, compute).to(x.dtype) for w in (weight, weight2, weight3))
        kept = torch.where(reference.dropout_keep_mask(_OTHER_SEED, dropout_p, x.shape), x / (1 - dropout_p), 0.0)
        other = kept if dropout_p else x
        return torch.cat([
            F.linear(x, first, bias) + F.linear(F.linear(_dropped(x, dropout_p), a), lora_B.to(x.dtype)) * 0.75,
            F.linear(x, second) + F.linear(F.linear(other, A2.to(x.dtype)), B2.to(x.dtype)) * -0.5,
            F.linear(x, third, bias3),
        ], dim=-1)  # fmt: skip

    name = case_name("lora_linears", base, dropout_p, adapter_dtype, bias=with_bias, rank_scale=rank_scale)
    return Case(name, "lora", make, call, plain, result=lambda dtype, shape: (dtype, (*shape[0], 3 * shape[2])))


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


def _lora_experts_case(
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
        seed = _seed_beside(x) if seed is None else seed
        return ops.lora_experts(x, weight, offsets, lora_A, lora_B, bias, scaling=scaling, dropout_p=dropout_p,
                                training=training, seed=seed)  # fmt: skip

    def plain(x, weight, offsets, bias, compute, lora_A=None, lora_B=None):
        def run(own: Any, rows: Tensor, expert: int) -> Tensor:
            y = F.linear(rows, _dequantized(own, compute).to(x.dtype), None if bias is None else bias[expert])
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


def _plain_experts_norm(
    weight: Any, lora_A: Tensor, lora_B: Tensor, compute: torch.dtype, dtype: torch.dtype
) -> Tensor:
    own = [weight.expert(e) if isinstance(weight, NF4Weight) else weight[e] for e in range(_EXPERTS)]
    return torch.stack([_plain_norm(_dequantized(one, compute).to(dtype), a, b)
                        for one, a, b in zip(own, lora_A, lora_B, strict=True)])  # fmt: skip


def _dora_experts_norm_case(base: str, *, adapter_dtype: Any = None) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        inputs = _experts_inputs(base, dtype, shape, adapter_dtype or dtype)
        return Sample({k: v for k, v in inputs.items() if k not in ("x", "offsets")}, ())

    def call(weight, lora_A, lora_B, compute, scaling=0.75, dtype=None, offsets=None):
        return ops.dora_experts_weight_norm(weight, lora_A, lora_B, scaling, dtype=dtype, offsets=offsets)

    def plain(weight, lora_A, lora_B, compute):
        return _plain_experts_norm(weight, lora_A, lora_B, compute, torch.promote_types(compute, lora_A.dtype))

    name = case_name("dora_experts_weight_norm", base, 0.0, adapter_dtype)
    return Case(name, "dora", make, call, plain, result=lambda dtype, shape: (torch.float32, (_EXPERTS, shape[2])))


def _dora_experts_case(
    base: str, *, with_bias: bool = False, dropout_p: float = 0.0, adapter_dtype: Any = None
) -> Case:
    def norm(inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
        return _plain_experts_norm(*(inputs[key] for key in ("weight", "lora_A", "lora_B", "compute")), dtype)

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        adapters = adapter_dtype or dtype
        inputs = _experts_inputs(base, dtype, shape, adapters)
        inputs["bias"] = randn(_EXPERTS, shape[2], dtype=dtype) if with_bias else None
        scale = 1.0 + randn(_EXPERTS, shape[2], dtype=torch.float64, scale=0.2)
        _shrink_some(scale[0])
        inputs["magnitude"] = (norm(inputs, torch.float64) * scale).to(adapters)
        return Sample(inputs, ("x", "lora_A", "lora_B", "magnitude", *(("bias",) if with_bias else ())))

    def call(x, weight, offsets, bias, compute, lora_A, lora_B, magnitude, scaling=0.75, dropout_p=dropout_p,
             training=True, seed=None, weight_norm=None):  # fmt: skip
        seed = _seed_beside(x) if seed is None else seed
        return ops.dora_experts(x, weight, offsets, lora_A, lora_B, magnitude, bias, scaling=scaling,
                                dropout_p=dropout_p, training=training, weight_norm=weight_norm, seed=seed)  # fmt: skip

    def plain(x, weight, offsets, bias, compute, lora_A, lora_B, magnitude, weight_norm=None):
        if weight_norm is None:
            weight_norm = _plain_experts_norm(weight, lora_A, lora_B, compute, x.dtype).detach()
        g = magnitude.to(x.dtype) / weight_norm.to(x.dtype)

        def run(own: Any, rows: Tensor, expert: int) -> Tensor:
            z = F.linear(rows, _dequantized(own, compute).to(x.dtype))
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


# --- dora -------------------------------------------------------------------------------------------------------------


def _plain_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """As PEFT does it: the sum is formed, everything in the weight's dtype."""
    return torch.linalg.norm(weight + 0.75 * (lora_B.to(weight.dtype) @ lora_A.to(weight.dtype)), dim=1)


def _dora_norm_case(base: str, *, adapter_dtype: Any = None) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        inputs = _low_rank_inputs(base, dtype, shape, adapter_dtype or dtype, False)
        return Sample({k: v for k, v in inputs.items() if k not in ("x", "bias")}, ("lora_A", "lora_B"))

    def call(weight, lora_A, lora_B, compute, scaling=0.75, dtype=None):
        return ops.dora_weight_norm(weight, lora_A, lora_B, scaling, dtype=dtype)

    def plain(weight, lora_A, lora_B, compute):
        return _plain_norm(_dequantized(weight, compute).to(torch.promote_types(compute, lora_A.dtype)), lora_A, lora_B)

    name = case_name("dora_weight_norm", base, 0.0, adapter_dtype)
    return Case(name, "dora", make, call, plain, result=lambda dtype, shape: (torch.float32, (shape[2],)))


def _dora_case(
    base: str, *, with_bias: bool = False, dropout_p: float = 0.0, adapter_dtype: Any = None,
    dropout_mode: str = "lora", norm_grad: bool = False, save_output: bool = False,
) -> Case:  # fmt: skip
    def norm(inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
        return _plain_norm(_dequantized(inputs["weight"], inputs["compute"]).to(dtype), inputs["lora_A"],
                           inputs["lora_B"])  # fmt: skip

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        adapters = adapter_dtype or dtype
        inputs = _low_rank_inputs(base, dtype, shape, adapters, with_bias)
        scale = 1.0 + randn(shape[2], dtype=torch.float64, scale=0.2)
        _shrink_some(scale)
        inputs["magnitude"] = (norm(inputs, torch.float64) * scale).to(adapters)
        return Sample(inputs, ("x", "lora_A", "lora_B", "magnitude", *(("bias",) if with_bias else ())))

    def call(x, weight, lora_A, lora_B, bias, compute, magnitude, scaling=0.75, dropout_p=dropout_p, training=True,
             seed=None, dropout_mode=dropout_mode, weight_norm=None):  # fmt: skip
        seed = _seed_beside(x) if seed is None else seed
        return ops.dora_linear(
            x, weight, lora_A, lora_B, magnitude, bias, scaling=scaling, dropout_p=dropout_p, training=training,
            dropout_mode=dropout_mode, norm_grad=norm_grad, weight_norm=weight_norm, seed=seed, save_output=save_output,
        )  # fmt: skip

    def plain(x, weight, lora_A, lora_B, bias, compute, magnitude, weight_norm=None):
        dense, low_a, low_b = _dequantized(weight, compute).to(x.dtype), lora_A.to(x.dtype), lora_B.to(x.dtype)
        if weight_norm is None:
            weight_norm = _plain_norm(dense, low_a, low_b)
            weight_norm = weight_norm if norm_grad else weight_norm.detach()
        g = magnitude.to(x.dtype) / weight_norm
        low_rank = F.linear(F.linear(_dropped(x, dropout_p), low_a), low_b) * 0.75
        y = F.linear(x, dense, bias)
        # As PEFT does it: without dropout it scales the result less the bias, else a product with the dropped x.
        if dropout_mode == "peft" and dropout_p:
            return y + ((g - 1) * F.linear(_dropped(x, dropout_p), dense) + g * low_rank)
        unbiased = y if bias is None else y - bias
        return y + ((g - 1) * unbiased + g * low_rank)

    name = case_name("dora_linear", base, dropout_p, adapter_dtype, bias=with_bias, peft=dropout_mode == "peft",
                      norm_grad=norm_grad, save_output=save_output)  # fmt: skip
    return Case(
        name, "dora", make, call, plain,
        from_product=("magnitude", "lora_A", "lora_B") if norm_grad else ("magnitude",),
        # Of a single column the norm takes the sign alone: the whole gradient is 0, the sum of two that are not.
        shapes=[shape for shape in SHAPES if shape[1] > 1] if norm_grad else SHAPES,
        held=lambda sample: {} if norm_grad else {"weight_norm": norm(sample.inputs, torch.float64).detach()},
    )  # fmt: skip


# --- ia3 --------------------------------------------------------------------------------------------------------------


def _shrink_some(scale: Tensor) -> None:
    """Some outputs are scaled away, or nearly: of those the result tells little of the product."""
    for first, factor in ((3, 0.0), (5, 1e-4), (6, 1e-30)):
        scale[first::16] *= factor


def _ia3_vector(n: int, dtype: torch.dtype) -> Tensor:
    scale = 1.0 + randn(n, dtype=torch.float64, scale=0.2)
    _shrink_some(scale)
    return scale.to(dtype)


def _ia3_case(
    base: str, *, feedforward: bool = False, with_bias: bool = False, adapter_dtype: Any = None, matrix: bool = False,
    save_output: bool = False,
) -> Case:  # fmt: skip
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, _ = shape
        ia3_l = _ia3_vector(k if feedforward else n, adapter_dtype or dtype)
        inputs = {
            "x": randn(*tokens, k, dtype=dtype),
            "weight": _base_weight(base, n, k, dtype),
            "ia3_l": ia3_l.view((1, -1) if feedforward else (-1, 1)) if matrix else ia3_l,
            "bias": randn(n, dtype=dtype) if with_bias else None,
            "compute": dtype,
        }
        return Sample(inputs, ("x", "ia3_l", *(("bias",) if with_bias else ())))

    def call(x, weight, ia3_l, bias, compute):
        return ops.ia3_linear(x, weight, ia3_l, bias, feedforward=feedforward, save_output=save_output)

    def plain(x, weight, ia3_l, bias, compute):
        dense, ia3_l = _dequantized(weight, compute).to(x.dtype), ia3_l.to(x.dtype).flatten()
        return F.linear(x * ia3_l, dense, bias) if feedforward else F.linear(x, dense, bias) * ia3_l

    name = case_name("ia3_linear", base, 0.0, adapter_dtype, bias=with_bias, feedforward=feedforward, matrix=matrix,
                      save_output=save_output)  # fmt: skip
    return Case(name, "ia3", make, call, plain, from_product=("ia3_l",))


def _ia3_scale_case(adapter_dtype: Any = None) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, _, n, _ = shape
        inputs = {"x": randn(*tokens, n, dtype=dtype), "ia3_l": _ia3_vector(n, adapter_dtype or dtype).view(1, n)}
        return Sample(inputs, ("x", "ia3_l"))

    def plain(x, ia3_l):
        return x * ia3_l.to(x.dtype).flatten()

    return Case(case_name("ia3_scale", "x", 0.0, adapter_dtype), "ia3", make, ops.ia3_scale, plain)


# --- bottleneck -------------------------------------------------------------------------------------------------------


def _bottleneck_case(
    activation: str = "gelu", *, own: bool = False, biases: bool = True, adapter_dtype: Any = None, scale: float = 0.75
) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, m = shape
        n, adapters = k if own else n, adapter_dtype or dtype
        inputs = {
            "x": randn(*tokens, k, dtype=dtype),
            "down_weight": randn(m, k, dtype=adapters, scale=k**-0.5),
            "down_bias": randn(m, dtype=adapters) if biases else None,
            "up_weight": randn(n, m, dtype=adapters, scale=m**-0.5),
            "up_bias": randn(n, dtype=adapters) if biases else None,
            "residual": None if own else randn(*tokens, n, dtype=dtype),
        }
        return Sample(inputs, [name for name, value in inputs.items() if value is not None])

    def call(x, down_weight, down_bias, up_weight, up_bias, residual, activation=activation, scale=scale):
        return ops.bottleneck_adapter(
            x, down_weight, down_bias, up_weight, up_bias, scale=scale, activation=activation, residual=residual
        )

    def plain(x, down_weight, down_bias, up_weight, up_bias, residual):
        down_weight, down_bias, up_weight, up_bias = (
            value if value is None else value.to(x.dtype) for value in (down_weight, down_bias, up_weight, up_bias)
        )
        u = F.linear(x, down_weight, down_bias)
        if activation in ("relu", "silu"):
            h = getattr(F, activation)(u)
        else:
            h = F.gelu(u, approximate="tanh" if activation == "gelu_tanh" else "none")
        return (x if residual is None else residual) + scale * F.linear(h, up_weight, up_bias)

    name = "-".join(["bottleneck", activation, *(["own"] if own else []), *([] if biases else ["no_biases"]),
                     *([f"{adapter_dtype}".removeprefix("torch.")] if adapter_dtype else [])])  # fmt: skip
    return Case(
        name, "bottleneck", make, call, plain,
        # One element alone is cancellation near a zero of the activation's slope, and plain PyTorch may be lucky.
        shapes=[shape for shape in SHAPES if shape[1] > 1],
        result=lambda dtype, shape: (dtype, (*shape[0], shape[1] if own else shape[2])),
    )  # fmt: skip


def _lora_residual_case(*, dropout_p: float = 0.0, adapter_dtype: Any = None, rank_scale: bool = False) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, r = shape
        adapters = adapter_dtype or dtype
        inputs = {
            "x": randn(*tokens, k, dtype=dtype),
            "residual": randn(*tokens, n, dtype=dtype),
            "lora_A": randn(r, k, dtype=adapters, scale=0.1),
            "lora_B": randn(n, r, dtype=adapters, scale=0.1),
            "rank_scale": randn(r, dtype=adapters) if rank_scale else None,
        }
        return Sample(inputs, tuple(name for name, value in inputs.items() if value is not None))

    def call(x, residual, lora_A, lora_B, rank_scale, scaling=0.75, dropout_p=dropout_p, training=True, seed=None):
        seed = _seed_beside(x) if seed is None else seed
        return ops.lora_residual(x, residual, lora_A, lora_B, rank_scale=rank_scale, scaling=scaling,
                                 dropout_p=dropout_p, training=training, seed=seed)  # fmt: skip

    def plain(x, residual, lora_A, lora_B, rank_scale):
        lora_A = lora_A.to(x.dtype) if rank_scale is None else lora_A.to(x.dtype) * rank_scale.to(x.dtype)[:, None]
        return residual + F.linear(F.linear(_dropped(x, dropout_p), lora_A), lora_B.to(x.dtype)) * 0.75

    name = case_name("lora_residual", "any", dropout_p, adapter_dtype, rank_scale=rank_scale)
    return Case(name, "lora", make, call, plain)


# --- several adapters in one batch ------------------------------------------------------------------------------------

# Runs of one adapter, alternating ones, none, and one that has no sample.
_PATTERN = (0, 0, 0, -1, 1, 2, 1, -1, 2, 2, 0)


def _grouped_lora_case(base: str, *, with_bias: bool = False, adapter_dtype: Any = None) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, r = shape
        adapters = adapter_dtype or dtype
        inputs = _low_rank_inputs(base, dtype, shape, adapters, with_bias)
        inputs = {name: inputs[name] for name in ("x", "weight", "bias", "compute")}
        names = []
        for group, rank in enumerate((r, max(1, r // 2), r + 1, 2)):
            inputs[f"A{group}"] = randn(rank, k, dtype=adapters, scale=0.1)
            inputs[f"B{group}"] = randn(n, rank, dtype=adapters, scale=0.1)
            names += [f"A{group}", f"B{group}"]
        inputs["adapters"] = [_PATTERN[i % len(_PATTERN)] for i in range(tokens[0])]
        return Sample(inputs, ("x", *names, *(("bias",) if with_bias else ())))

    scaling = (0.75, -0.5, 2.0, 1.0)

    def call(x, weight, bias, compute, adapters, A0, A1, A2, A3, B0, B1, B2, B3, scaling=scaling):
        groups = ([A0, A1, A2, A3], [B0, B1, B2, B3])
        return ops.grouped_lora_linear(x, weight, *groups, adapters, bias, scaling=scaling)

    def plain(x, weight, bias, compute, adapters, A0, A1, A2, A3, B0, B1, B2, B3):
        # As PEFT does it: the base on all samples, then each adapter on its own.
        y = F.linear(x, _dequantized(weight, compute).to(x.dtype), bias)
        for group, (a, b) in enumerate(((A0, B0), (A1, B1), (A2, B2), (A3, B3))):
            index = torch.tensor([i for i, adapter in enumerate(adapters) if adapter == group], dtype=torch.int64)
            part = F.linear(F.linear(x[index], a.to(x.dtype)), b.to(x.dtype)) * scaling[group]
            y = y.index_add(0, index, part)
        return y

    name = case_name("grouped_lora_linear", base, 0.0, adapter_dtype, bias=with_bias)
    return Case(name, "grouped_lora", make, call, plain, shapes=[shape for shape in SHAPES if shape[0]])


# --- cross entropy ----------------------------------------------------------------------------------------------------


def _cross_entropy_case(
    base: str, *, with_bias: bool = False, adapter_dtype: Any = None, own_input: bool = False, reduction: str = "sum",
    **options: float,
) -> Case:  # fmt: skip
    """N is the vocabulary. Some labels are ignored; ``own_input``: the adapter has an input of its own."""

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, _ = shape
        inputs = _low_rank_inputs(base, dtype, shape, adapter_dtype or dtype, with_bias)
        inputs["hidden"] = inputs.pop("x")
        inputs["labels"] = torch.randint(0, n, tokens)
        if inputs["labels"].numel() > 1:
            inputs["labels"].view(-1)[::5] = -100
        inputs["lora_input"] = randn(*tokens, k, dtype=dtype) if own_input else None
        if adapter_dtype is None:
            inputs["lora_A"] = inputs["lora_B"] = None
        trained = ("hidden", "bias", "lora_A", "lora_B", "lora_input")
        return Sample(inputs, [name for name in trained if inputs[name] is not None])

    def call(hidden, weight, labels, bias, lora_A, lora_B, lora_input, compute, chunk=100, **more):
        return ops.linear_cross_entropy(
            hidden, weight, labels, bias, lora_A=lora_A, lora_B=lora_B, lora_input=lora_input, scaling=0.75,
            reduction=reduction, chunk=chunk, **{**options, **more},
        )  # fmt: skip

    def plain(hidden, weight, labels, bias, lora_A, lora_B, lora_input, compute):
        # As transformers does it: a linear layer in hidden's dtype, PEFT's adapter on it, all in float32 from there on.
        logits = F.linear(hidden, _dequantized(weight, compute).to(hidden.dtype), bias)
        if lora_A is not None:
            low = hidden if lora_input is None else lora_input
            logits = logits + F.linear(F.linear(low, lora_A.to(low.dtype)), lora_B.to(low.dtype)) * 0.75
        z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * options.get("logit_scale", 1.0)
        if cap := options.get("softcap"):
            z = cap * torch.tanh(z / cap)
        found = F.cross_entropy(z.reshape(-1, z.shape[-1]), labels.reshape(-1), reduction=reduction,
                                label_smoothing=options.get("label_smoothing", 0.0))  # fmt: skip
        return found.view(labels.shape) if reduction == "none" else found

    name = case_name("linear_cross_entropy", base, 0.0, adapter_dtype, bias=with_bias, own_input=own_input,
                      **dict.fromkeys([reduction, *options], True))  # fmt: skip
    # The mean of no labels is not a number, and the gradient of one token's adapter is a sum that may cancel.
    shapes = [shape for shape in SHAPES if reduction != "mean" or torch.Size(shape[0]).numel() > 1]
    return Case(
        name, "cross_entropy", make, call, plain, shapes=shapes, from_product=("y", "bias", "lora_A", "lora_B"),
        result=lambda dtype, shape: (torch.float32, shape[0] if reduction == "none" else ()),
    )  # fmt: skip


CASES: tuple[Case, ...] = (
    _quantize_case(64, False),
    _quantize_case(32, False),
    _quantize_case(64, True),
    _quantize_case(4096, True),
    _dequantize_case(64, False),
    _dequantize_case(32, True),
    _dequantize_case(256, True),
    _nf4_linear_case(False, False),
    _nf4_linear_case(True, True),
    _lora_case("dense"),
    _lora_case("dense", with_bias=True, dropout_p=0.1),
    _lora_case("dense", adapter_dtype=torch.float32, dropout_p=0.5),
    _lora_case("nf4", adapter_dtype=torch.bfloat16),
    _lora_case("nested", adapter_dtype=torch.float32, dropout_p=0.05, with_bias=True),
    _lora_case("dense", rank_scale=True),
    _lora_linears_case("dense", with_bias=True, dropout_p=0.1, rank_scale=True),
    _lora_linears_case("dense", adapter_dtype=torch.float32),
    _lora_linears_case("nf4", adapter_dtype=torch.bfloat16, dropout_p=0.5),
    _lora_linears_case("nested", adapter_dtype=torch.float32, dropout_p=0.05, with_bias=True),
    _lora_experts_case("dense", with_bias=True, dropout_p=0.1),
    _lora_experts_case("transposed", adapter_dtype=torch.float32),
    _lora_experts_case("nf4", adapter_dtype=torch.bfloat16, dropout_p=0.5),
    _lora_experts_case("nested", adapter_dtype=torch.float32),
    _lora_experts_case("dense", with_bias=True, lora=False),
    _dora_experts_norm_case("dense"),
    _dora_experts_norm_case("transposed", adapter_dtype=torch.float32),
    _dora_experts_norm_case("nested", adapter_dtype=torch.float32),
    _dora_experts_case("dense", with_bias=True, dropout_p=0.1),
    _dora_experts_case("transposed", adapter_dtype=torch.float32),
    _dora_experts_case("nf4", adapter_dtype=torch.bfloat16, dropout_p=0.5),
    _dora_experts_case("nested", adapter_dtype=torch.float32),
    _lora_case("nested", rank_scale=True, adapter_dtype=torch.float32, dropout_p=0.1, with_bias=True),
    _lora_residual_case(),
    _lora_residual_case(dropout_p=0.1, adapter_dtype=torch.float32),
    _lora_residual_case(rank_scale=True, dropout_p=0.5),
    _grouped_lora_case("dense"),
    _grouped_lora_case("dense", with_bias=True, adapter_dtype=torch.float32),
    _grouped_lora_case("nf4", adapter_dtype=torch.bfloat16),
    _grouped_lora_case("nested", with_bias=True, adapter_dtype=torch.float32),
    _dora_norm_case("dense"),
    _dora_norm_case("dense", adapter_dtype=torch.float32),
    _dora_norm_case("nf4"),
    _dora_norm_case("nested", adapter_dtype=torch.float32),
    _dora_case("dense"),
    _dora_case("dense", with_bias=True, dropout_p=0.1),
    _dora_case("dense", with_bias=True, dropout_p=0.1, dropout_mode="peft"),
    _dora_case("dense", dropout_mode="peft", adapter_dtype=torch.float32),
    _dora_case("dense", norm_grad=True),
    _dora_case("nf4", adapter_dtype=torch.bfloat16, dropout_p=0.5),
    _dora_case("nf4", adapter_dtype=torch.float32, with_bias=True, dropout_p=0.5, dropout_mode="peft"),
    _dora_case("nested", adapter_dtype=torch.float32, dropout_p=0.05, dropout_mode="peft"),
    _dora_case("nested", adapter_dtype=torch.float32, with_bias=True, norm_grad=True),
    _ia3_case("dense"),
    _ia3_case("dense", feedforward=True, with_bias=True),
    _ia3_case("dense", with_bias=True, adapter_dtype=torch.float32, matrix=True),
    _ia3_case("nf4", adapter_dtype=torch.float32),
    _ia3_case("nested", feedforward=True, adapter_dtype=torch.float32, matrix=True),
    _ia3_scale_case(),
    _ia3_scale_case(torch.float32),
    _bottleneck_case(),
    _bottleneck_case(own=True, adapter_dtype=torch.float32),
    _bottleneck_case("gelu_tanh", own=True),
    _bottleneck_case("relu", biases=False),
    _bottleneck_case("silu", own=True, adapter_dtype=torch.float32, biases=False),
    _cross_entropy_case("dense"),
    _cross_entropy_case("dense", with_bias=True, adapter_dtype=torch.float32, reduction="mean", label_smoothing=0.1),
    _cross_entropy_case("nested", reduction="none", softcap=3.0, logit_scale=0.5),
    _cross_entropy_case("dense", adapter_dtype=torch.bfloat16, own_input=True, reduction="none"),
    rms_norm_case(),
    rms_norm_case(weight_dtype=torch.float32),
    rms_norm_case("gemma"),
    rms_norm_case("gemma", weight_dtype=torch.float16),
    rms_norm_case(weighted=False),
    layer_norm_case(),
    layer_norm_case(vector_dtype=torch.float32),
    layer_norm_case("weight"),
    layer_norm_case("bias"),
    layer_norm_case(""),
    gated_activation_case("silu"),
    gated_activation_case("silu", "views"),
    gated_activation_case("silu", "halves"),
    gated_activation_case("gelu", "halves"),
    gated_activation_case("gelu_tanh"),
    gated_activation_case("relu"),
    gated_activation_case("relu2"),
    activation_case("gelu"),
    activation_case("gelu_tanh"),
    activation_case("relu"),
    activation_case("silu"),
    activation_case("relu2"),
    dropout_case(),
    dropout_case(0.5),
    rotary_case(),
    rotary_case(2, 2, one_cos=True),
    rotary_case(5, 2, contiguous=True),
    attention_case(),
    attention_case(3, 1, "causal"),
    attention_case(2, 2, "causal", odd=True, contiguous=True),
    attention_case(sees="padding"),
    attention_case(sees="documents", other_values=3),
    attention_case(sees="bits", more_keys=37, contiguous=True),
    attention_case(6, 1, "causal", more_keys=5),
    attention_case(3, 1, "causal", dropout_p=0.2),
    attention_case(sees="padding", dropout_p=0.1, more_keys=7, odd=True),
)

# Of a caller that promises not to change the result: on a GPU the promise changes nothing.
SAVED_OUTPUT: tuple[Case, ...] = (
    _dora_case("dense", save_output=True),
    _dora_case("nested", adapter_dtype=torch.float32, dropout_p=0.1, save_output=True),
    _ia3_case("dense", save_output=True),
    _ia3_case("nf4", with_bias=True, adapter_dtype=torch.float32, save_output=True),
)
