"""Cases of the operators over a frozen weight: NF4, and the linear layer with each adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from op_case import SEED, SHAPES, Case, Sample, case_name, randn
from torch import Tensor

from peft_ext import NF4Weight, ops, reference

# --- nf4 --------------------------------------------------------------------------------------------------------------


def nf4_weight(n: int, k: int, dtype: torch.dtype, blocksize: int, double_quant: bool) -> NF4Weight:
    """Returns a weight quantized by the reference: an error of the quantize kernel can't hide another error."""
    return reference.nf4_quantize(randn(n, k, dtype=dtype, scale=0.05), blocksize, double_quant)


def quantize_case(blocksize: int, double_quant: bool) -> Case:
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


def dequantize_case(blocksize: int, double_quant: bool) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        _, k, n, _ = shape
        return Sample({"nf4": nf4_weight(n, k, dtype, blocksize, double_quant), "dtype": dtype})

    name = f"nf4_dequantize-{blocksize}{'-nested' if double_quant else ''}"
    return Case(name, "nf4", make, ops.nf4_dequantize, reference.nf4_dequantize, exact=True)


def dequantized(weight: Any, dtype: torch.dtype) -> Tensor:
    """Returns the dense weight with which a kernel computes, in the compute dtype."""
    return reference.nf4_dequantize(weight, dtype) if isinstance(weight, NF4Weight) else weight


def nf4_linear_case(double_quant: bool, with_bias: bool, blocksize: int = 64) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, _ = shape
        inputs = {"x": randn(*tokens, k, dtype=dtype), "nf4": nf4_weight(n, k, dtype, blocksize, double_quant)}
        inputs["bias"] = randn(n, dtype=dtype) if with_bias else None
        inputs["compute"] = dtype
        return Sample(inputs, ("x", "bias") if with_bias else ("x",))

    def call(x: Tensor, nf4: NF4Weight, bias: Optional[Tensor], compute: torch.dtype) -> Tensor:
        return ops.nf4_linear(x, nf4, bias)

    def plain(x: Tensor, nf4: NF4Weight, bias: Optional[Tensor], compute: torch.dtype) -> Tensor:
        return F.linear(x, dequantized(nf4, compute).to(x.dtype), bias)

    return Case(
        f"nf4_linear{'-nested' if double_quant else ''}{'-bias' if with_bias else ''}"
        + (f"-{blocksize}" if blocksize != 64 else ""), "nf4", make, call, plain,
    )  # fmt: skip


# --- lora -------------------------------------------------------------------------------------------------------------


def seed_beside(x: Any) -> Tensor:
    return SEED.to(x.device) if isinstance(x, Tensor) else SEED


def base_weight(base: str, n: int, k: int, dtype: torch.dtype) -> Any:
    """Returns a frozen weight: "dense", "nf4" or "nested" (double quantization), with ":blocksize" (default 64)."""
    kind, _, blocksize = base.partition(":")
    if kind == "dense":
        return randn(n, k, dtype=dtype, scale=0.05)
    return nf4_weight(n, k, dtype, int(blocksize or 64), kind == "nested")


def dropped(x: Tensor, p: float) -> Tensor:
    return torch.where(reference.dropout_keep_mask(SEED, p, x.shape), x / (1 - p), 0.0) if p else x


def low_rank_inputs(base: str, dtype: torch.dtype, shape: tuple, adapters: torch.dtype, with_bias: bool) -> dict:
    tokens, k, n, r = shape
    return {
        "x": randn(*tokens, k, dtype=dtype),
        "weight": base_weight(base, n, k, dtype),
        "lora_A": randn(r, k, dtype=adapters, scale=0.1),
        "lora_B": randn(n, r, dtype=adapters, scale=0.1),
        "bias": randn(n, dtype=dtype) if with_bias else None,
        "compute": dtype,
    }


def lora_case(
    base: str, *, with_bias: bool = False, dropout_p: float = 0.0, adapter_dtype: Any = None, rank_scale: bool = False
) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        adapters = adapter_dtype or dtype
        inputs = low_rank_inputs(base, dtype, shape, adapters, with_bias)
        inputs["rank_scale"] = randn(shape[3], dtype=adapters) if rank_scale else None
        optional = (("bias",) if with_bias else ()) + (("rank_scale",) if rank_scale else ())
        return Sample(inputs, ("x", "lora_A", "lora_B", *optional))

    def call(x, weight, lora_A, lora_B, bias, compute, rank_scale, scaling=0.75, dropout_p=dropout_p, training=True,
             seed=None):  # fmt: skip
        seed = seed_beside(x) if seed is None else seed
        return ops.lora_linear(x, weight, lora_A, lora_B, bias, rank_scale=rank_scale, scaling=scaling,
                               dropout_p=dropout_p, training=training, seed=seed)  # fmt: skip

    def plain(x, weight, lora_A, lora_B, bias, compute, rank_scale):
        # As PEFT does with a single dtype: dropout, two projections, a product, a sum, each rounded.
        y = F.linear(x, dequantized(weight, compute).to(x.dtype), bias)
        lora_A = lora_A.to(x.dtype) if rank_scale is None else lora_A.to(x.dtype) * rank_scale.to(x.dtype)[:, None]
        return y + F.linear(F.linear(dropped(x, dropout_p), lora_A), lora_B.to(x.dtype)) * 0.75

    name = case_name("lora_linear", base, dropout_p, adapter_dtype, bias=with_bias, rank_scale=rank_scale)
    return Case(name, "lora", make, call, plain)


_OTHER_SEED = SEED + 1


def lora_linears_case(
    base: str, *, with_bias: bool = False, dropout_p: float = 0.0, adapter_dtype: Any = None, rank_scale: bool = False
) -> Case:
    """Two layers with adapters of different ranks and masks, and a layer without an adapter; results concatenated."""

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, r = shape
        adapters, second = adapter_dtype or dtype, r // 2 + 1
        inputs = low_rank_inputs(base, dtype, shape, adapters, with_bias)
        inputs["rank_scale"] = randn(r, dtype=adapters) if rank_scale else None
        inputs |= {"weight2": base_weight(base, n, k, dtype), "weight3": base_weight(base, n, k, dtype),
                   "A2": randn(second, k, dtype=adapters, scale=0.1), "B2": randn(n, second, dtype=adapters, scale=0.1),
                   "bias3": randn(n, dtype=dtype) if with_bias else None}  # fmt: skip
        optional = (("bias", "bias3") if with_bias else ()) + (("rank_scale",) if rank_scale else ())
        return Sample(inputs, ("x", "lora_A", "lora_B", "A2", "B2", *optional))

    def call(x, weight, lora_A, lora_B, bias, compute, rank_scale, weight2, weight3, A2, B2, bias3):
        seeds = [seed_beside(x), seed_beside(x) + 1, None]
        ys = ops.lora_linears(
            x, [weight, weight2, weight3], [lora_A, A2, None], [lora_B, B2, None], [bias, None, bias3],
            rank_scales=[rank_scale, None, None], scalings=[0.75, -0.5, 1.0], dropout_ps=dropout_p, training=True,
            seeds=seeds,
        )  # fmt: skip
        return torch.cat(ys, dim=-1)

    def plain(x, weight, lora_A, lora_B, bias, compute, rank_scale, weight2, weight3, A2, B2, bias3):
        a = lora_A.to(x.dtype) if rank_scale is None else lora_A.to(x.dtype) * rank_scale.to(x.dtype)[:, None]
        first, second, third = (dequantized(w, compute).to(x.dtype) for w in (weight, weight2, weight3))
        kept = torch.where(reference.dropout_keep_mask(_OTHER_SEED, dropout_p, x.shape), x / (1 - dropout_p), 0.0)
        other = kept if dropout_p else x
        return torch.cat([
            F.linear(x, first, bias) + F.linear(F.linear(dropped(x, dropout_p), a), lora_B.to(x.dtype)) * 0.75,
            F.linear(x, second) + F.linear(F.linear(other, A2.to(x.dtype)), B2.to(x.dtype)) * -0.5,
            F.linear(x, third, bias3),
        ], dim=-1)  # fmt: skip

    name = case_name("lora_linears", base, dropout_p, adapter_dtype, bias=with_bias, rank_scale=rank_scale)
    return Case(name, "lora", make, call, plain, result=lambda dtype, shape: (dtype, (*shape[0], 3 * shape[2])))


def lora_residual_case(*, dropout_p: float = 0.0, adapter_dtype: Any = None, rank_scale: bool = False) -> Case:
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
        seed = seed_beside(x) if seed is None else seed
        return ops.lora_residual(x, residual, lora_A, lora_B, rank_scale=rank_scale, scaling=scaling,
                                 dropout_p=dropout_p, training=training, seed=seed)  # fmt: skip

    def plain(x, residual, lora_A, lora_B, rank_scale):
        lora_A = lora_A.to(x.dtype) if rank_scale is None else lora_A.to(x.dtype) * rank_scale.to(x.dtype)[:, None]
        return residual + F.linear(F.linear(dropped(x, dropout_p), lora_A), lora_B.to(x.dtype)) * 0.75

    name = case_name("lora_residual", "any", dropout_p, adapter_dtype, rank_scale=rank_scale)
    return Case(name, "lora", make, call, plain)


# --- several adapters in one batch ------------------------------------------------------------------------------------

# Runs of one adapter, alternating ones, none, and one that has no sample.
_PATTERN = (0, 0, 0, -1, 1, 2, 1, -1, 2, 2, 0)


def grouped_lora_case(base: str, *, with_bias: bool = False, adapter_dtype: Any = None) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, r = shape
        adapters = adapter_dtype or dtype
        inputs = low_rank_inputs(base, dtype, shape, adapters, with_bias)
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
        # As PEFT does: the base on all samples, then each adapter on its own samples.
        y = F.linear(x, dequantized(weight, compute).to(x.dtype), bias)
        for group, (a, b) in enumerate(((A0, B0), (A1, B1), (A2, B2), (A3, B3))):
            index = torch.tensor([i for i, adapter in enumerate(adapters) if adapter == group], dtype=torch.int64)
            part = F.linear(F.linear(x[index], a.to(x.dtype)), b.to(x.dtype)) * scaling[group]
            y = y.index_add(0, index, part)
        return y

    name = case_name("grouped_lora_linear", base, 0.0, adapter_dtype, bias=with_bias)
    return Case(name, "grouped_lora", make, call, plain, shapes=[shape for shape in SHAPES if shape[0]])


# --- dora -------------------------------------------------------------------------------------------------------------


def plain_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Returns the norm as PEFT computes it: of the dense sum, in the weight's dtype."""
    return torch.linalg.norm(weight + 0.75 * (lora_B.to(weight.dtype) @ lora_A.to(weight.dtype)), dim=1)


def dora_norm_case(base: str, *, adapter_dtype: Any = None) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        inputs = low_rank_inputs(base, dtype, shape, adapter_dtype or dtype, False)
        return Sample({k: v for k, v in inputs.items() if k not in ("x", "bias")}, ("lora_A", "lora_B"))

    def call(weight, lora_A, lora_B, compute, scaling=0.75, dtype=None):
        return ops.dora_weight_norm(weight, lora_A, lora_B, scaling, dtype=dtype)

    def plain(weight, lora_A, lora_B, compute):
        return plain_norm(dequantized(weight, compute).to(torch.promote_types(compute, lora_A.dtype)), lora_A, lora_B)

    name = case_name("dora_weight_norm", base, 0.0, adapter_dtype)
    return Case(name, "dora", make, call, plain, result=lambda dtype, shape: (torch.float32, (shape[2],)))


def dora_case(
    base: str, *, with_bias: bool = False, dropout_p: float = 0.0, adapter_dtype: Any = None,
    dropout_mode: str = "lora", norm_grad: bool = False, save_output: bool = False,
) -> Case:  # fmt: skip
    def norm(inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
        return plain_norm(dequantized(inputs["weight"], inputs["compute"]).to(dtype), inputs["lora_A"],
                           inputs["lora_B"])  # fmt: skip

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        adapters = adapter_dtype or dtype
        inputs = low_rank_inputs(base, dtype, shape, adapters, with_bias)
        scale = 1.0 + randn(shape[2], dtype=torch.float64, scale=0.2)
        shrink_some(scale)
        inputs["magnitude"] = (norm(inputs, torch.float64) * scale).to(adapters)
        return Sample(inputs, ("x", "lora_A", "lora_B", "magnitude", *(("bias",) if with_bias else ())))

    def call(x, weight, lora_A, lora_B, bias, compute, magnitude, scaling=0.75, dropout_p=dropout_p, training=True,
             seed=None, dropout_mode=dropout_mode, weight_norm=None):  # fmt: skip
        seed = seed_beside(x) if seed is None else seed
        return ops.dora_linear(
            x, weight, lora_A, lora_B, magnitude, bias, scaling=scaling, dropout_p=dropout_p, training=training,
            dropout_mode=dropout_mode, norm_grad=norm_grad, weight_norm=weight_norm, seed=seed, save_output=save_output,
        )  # fmt: skip

    def plain(x, weight, lora_A, lora_B, bias, compute, magnitude, weight_norm=None):
        dense, low_a, low_b = dequantized(weight, compute).to(x.dtype), lora_A.to(x.dtype), lora_B.to(x.dtype)
        if weight_norm is None:
            weight_norm = plain_norm(dense, low_a, low_b)
            weight_norm = weight_norm if norm_grad else weight_norm.detach()
        g = magnitude.to(x.dtype) / weight_norm
        low_rank = F.linear(F.linear(dropped(x, dropout_p), low_a), low_b) * 0.75
        y = F.linear(x, dense, bias)
        # As PEFT does: without dropout PEFT scales the result minus the bias, else a product with the dropped x.
        if dropout_mode == "peft" and dropout_p:
            return y + ((g - 1) * F.linear(dropped(x, dropout_p), dense) + g * low_rank)
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


def shrink_some(scale: Tensor) -> None:
    """Scales some outputs to zero or nearly to zero: their results say little about the product."""
    for first, factor in ((3, 0.0), (5, 1e-4), (6, 1e-30)):
        scale[first::16] *= factor


def _ia3_vector(n: int, dtype: torch.dtype) -> Tensor:
    scale = 1.0 + randn(n, dtype=torch.float64, scale=0.2)
    shrink_some(scale)
    return scale.to(dtype)


def ia3_case(
    base: str, *, feedforward: bool = False, with_bias: bool = False, adapter_dtype: Any = None, matrix: bool = False,
    save_output: bool = False,
) -> Case:  # fmt: skip
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, _ = shape
        ia3_l = _ia3_vector(k if feedforward else n, adapter_dtype or dtype)
        inputs = {
            "x": randn(*tokens, k, dtype=dtype),
            "weight": base_weight(base, n, k, dtype),
            "ia3_l": ia3_l.view((1, -1) if feedforward else (-1, 1)) if matrix else ia3_l,
            "bias": randn(n, dtype=dtype) if with_bias else None,
            "compute": dtype,
        }
        return Sample(inputs, ("x", "ia3_l", *(("bias",) if with_bias else ())))

    def call(x, weight, ia3_l, bias, compute):
        return ops.ia3_linear(x, weight, ia3_l, bias, feedforward=feedforward, save_output=save_output)

    def plain(x, weight, ia3_l, bias, compute):
        dense, ia3_l = dequantized(weight, compute).to(x.dtype), ia3_l.to(x.dtype).flatten()
        return F.linear(x * ia3_l, dense, bias) if feedforward else F.linear(x, dense, bias) * ia3_l

    name = case_name("ia3_linear", base, 0.0, adapter_dtype, bias=with_bias, feedforward=feedforward, matrix=matrix,
                      save_output=save_output)  # fmt: skip
    return Case(name, "ia3", make, call, plain, from_product=("ia3_l",))


def ia3_scale_case(adapter_dtype: Any = None) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, _, n, _ = shape
        inputs = {"x": randn(*tokens, n, dtype=dtype), "ia3_l": _ia3_vector(n, adapter_dtype or dtype).view(1, n)}
        return Sample(inputs, ("x", "ia3_l"))

    def plain(x, ia3_l):
        return x * ia3_l.to(x.dtype).flatten()

    return Case(case_name("ia3_scale", "x", 0.0, adapter_dtype), "ia3", make, ops.ia3_scale, plain)
