"""Cases of NF4: quantizing, decoding, merging, and the linear layer over a frozen weight without an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from op_case import Case, Options, Sample, randn, with_errors
from op_errors import errors
from torch import Tensor

from peft_ext import NF4Weight, ops, reference
from peft_ext.weights import PackedWeight


def nf4_weight(n: int, k: int, dtype: torch.dtype, blocksize: int, double_quant: bool) -> NF4Weight:
    """Returns a weight that the reference quantized, so that no fault of the quantize kernel hides another fault."""
    return reference.nf4_quantize(randn(n, k, dtype=dtype, scale=0.05), blocksize, double_quant)


def quantize_case(blocksize: int, double_quant: bool) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        _, k, n, _ = shape
        weight = randn(n, k, dtype=dtype)
        flat = weight.view(-1)
        flat[: min(flat.numel(), blocksize)] = 0.0  # The first block is all zeros.
        # The second block has ties: values on a threshold between two codes, with a scale of one.
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
    """Returns the dense weight that a kernel computes with: a packed weight is decoded to ``dtype``."""
    return reference.nf4_dequantize(weight, dtype) if isinstance(weight, PackedWeight) else weight


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


def frozen_linear_case(with_bias: bool = False) -> Case:
    """Returns a case of frozen_linear over a dense weight. Over an NF4 weight ``frozen_linear`` is ``nf4_linear``."""

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, _ = shape
        inputs = {"x": randn(*tokens, k, dtype=dtype), "weight": randn(n, k, dtype=dtype, scale=0.05)}
        inputs["bias"] = randn(n, dtype=dtype) if with_bias else None
        return Sample(inputs, ("x", "bias") if with_bias else ("x",))

    return Case("frozen_linear" + "-bias" * with_bias, "nf4", make, ops.frozen_linear, F.linear)


def merge_case(double_quant: bool) -> Case:
    """Returns a case of nf4_merge, which must have the bits of W + s B A, quantized again.

    The factors are small whole numbers, so that the float32 product is exact.
    """

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        _, k, n, r = shape
        factors = {name: torch.randint(-2, 3, size).float() for name, size in (("lora_A", (r, k)), ("lora_B", (n, r)))}
        return Sample({"nf4": nf4_weight(n, k, dtype, 64, double_quant), **factors})

    def call(nf4: NF4Weight, lora_A: Tensor, lora_B: Tensor, scaling: float = 0.5) -> Tensor:
        merged, _ = ops.nf4_merge(nf4, lora_A, lora_B, scaling=scaling)
        return merged.dequantize(torch.float32)

    def oracle(nf4: NF4Weight, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        dense = reference.nf4_dequantize(nf4, torch.float32) + 0.5 * (lora_B @ lora_A)
        return reference.nf4_dequantize(reference.nf4_quantize(dense, 64, double_quant), torch.float32)

    return Case("nf4_merge" + "-nested" * double_quant, "nf4", make, call, oracle, exact=True)


# --- what is tested --------------------------------------------------------------------------------------------------

ERRORS = {
    "nf4_quantize": errors(
        "nf4_quantize",
        integers=({"weight": torch.zeros(4, 4, dtype=torch.int32)}, TypeError,
                  "weight is int32, wanted one of float32"),
    ),
    "nf4_dequantize": errors(
        "nf4_dequantize", "dense",
        integer_dtype=({"dtype": torch.int8}, TypeError, "dtype is torch.int8, wanted"),
    ),
    "nf4_linear": errors(
        "nf4_linear", "columns", "bias size", "dense",
        integer_x=({"x": torch.zeros(2, 64, dtype=torch.int64)}, TypeError, "x is int64, wanted"),
        bias_dtype=({"bias": torch.zeros(96, dtype=torch.float64)}, TypeError, "bias is float64, x is float32"),
    ),
    "frozen_linear": errors("frozen_linear", "columns", "weight dtype", "weight of 3 dims", "bias size"),
    "nf4_merge": errors(
        "nf4_merge", "dense", "A columns", "ranks",
        scaling=({"scaling": float("inf")}, ValueError, "scaling is inf, wanted a finite number"),
    ),
}  # fmt: skip

CASES = with_errors(
    ERRORS,
    quantize_case(64, False),
    quantize_case(32, False),
    quantize_case(64, True),
    quantize_case(4096, True),
    dequantize_case(64, False),
    dequantize_case(32, True),
    dequantize_case(256, True),
    nf4_linear_case(False, False),
    nf4_linear_case(True, True),
    frozen_linear_case(),
    frozen_linear_case(True),
    merge_case(False),
    merge_case(True),
)


def drawn(o: Options) -> dict[str, Callable[[], Case]]:
    """Returns, by public operator, a function that makes a random case for the sweep."""
    return {
        "nf4_quantize": lambda: quantize_case(o.blocksize, o.nested),
        "nf4_dequantize": lambda: dequantize_case(o.blocksize, o.nested),
        "nf4_linear": lambda: nf4_linear_case(o.nested, o.maybe(), o.blocksize),
    }
