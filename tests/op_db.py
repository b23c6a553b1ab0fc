"""The one list of operators and the inputs they are tested on.

A case says how to draw inputs, how to call the public op, and what plain PyTorch and the float64 oracle compute from
the same inputs. ``test_ops.py`` runs the whole battery over every case; adding an operator is adding a case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ext import NF4Weight, ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (tokens shape, K, N, R): odd, prime, one, empty, wider than a panel, and a multiple of everything.
SHAPES: tuple[tuple[tuple[int, ...], int, int, int], ...] = (
    ((4, 8), 64, 96, 16),
    ((3, 7), 65, 33, 5),
    ((1,), 1, 1, 1),
    ((), 48, 40, 3),
    ((0,), 32, 16, 4),
    ((2, 0, 3), 32, 16, 4),
    ((131,), 515, 70, 8),
    ((17,), 36, 1031, 33),
    ((300,), 96, 64, 17),
    ((5,), 192, 70, 8),
    ((16,), 128, 33, 4),
    ((1,), 4160, 130, 2),
)


@dataclass
class Sample:
    """Inputs of one call. ``grads`` names those that get a gradient; ``call`` takes the inputs and nothing else."""

    inputs: dict[str, Any]
    grads: Sequence[str] = ()


@dataclass(frozen=True)
class Case:
    """One operator in one configuration.

    Attributes:
        name: test id. op: stem of the operator's files. make: draws a sample for (dtype, shape).
        call: the public op. plain: the same in eager PyTorch, in the dtype a user would run it in; the yardstick.
        oracle: the same in float64, differentiable by autograd. exact: the result must have the oracle's bits.
    """

    name: str
    op: str
    make: Callable[[torch.dtype, tuple], Sample]
    call: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    exact: bool = False
    dtypes: Sequence[torch.dtype] = DTYPES
    errors: Sequence[tuple[str, dict[str, Any], type, str]] = field(default=())


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def wide(value: Any) -> Any:
    """An input as the oracle takes it: float64 of the very same value."""
    if isinstance(value, NF4Weight):
        return value
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


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

    return Case(
        name=f"nf4_quantize-{blocksize}{'-nested' if double_quant else ''}",
        op="nf4",
        make=make,
        call=packed(ops.nf4_quantize),
        plain=packed(reference.nf4_quantize),
        oracle=packed(reference.nf4_quantize),
        exact=True,
        errors=(("integers", {"weight": torch.zeros(4, 4, dtype=torch.int32)}, TypeError,
                 "nf4_quantize: weight is int32, wanted one of float32"),),
    )  # fmt: skip


def _dequantize_case(blocksize: int, double_quant: bool) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        _, k, n, _ = shape
        return Sample({"nf4": nf4_weight(n, k, dtype, blocksize, double_quant), "dtype": dtype})

    return Case(
        name=f"nf4_dequantize-{blocksize}{'-nested' if double_quant else ''}",
        op="nf4",
        make=make,
        call=ops.nf4_dequantize,
        plain=reference.nf4_dequantize,
        oracle=reference.nf4_dequantize,
        exact=True,
        errors=(
            ("dense", {"nf4": torch.zeros(4, 4)}, TypeError, "nf4_dequantize: nf4 is Tensor, wanted an NF4Weight"),
            ("integer dtype", {"dtype": torch.int8}, TypeError, "nf4_dequantize: dtype is torch.int8, wanted"),
        ),
    )


def _dequantized(weight: Any, dtype: torch.dtype) -> Tensor:
    """The dense weight that a kernel computes with, in its compute dtype."""
    return reference.nf4_dequantize(weight, dtype) if isinstance(weight, NF4Weight) else weight


def _nf4_linear_case(double_quant: bool, with_bias: bool) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, _ = shape
        inputs = {"x": randn(*tokens, k, dtype=dtype), "nf4": nf4_weight(n, k, dtype, 64, double_quant)}
        inputs["bias"] = randn(n, dtype=dtype) if with_bias else None
        inputs["compute"] = dtype
        return Sample(inputs, ("x", "bias") if with_bias else ("x",))

    def call(x: Tensor, nf4: NF4Weight, bias: Optional[Tensor], compute: torch.dtype) -> Tensor:
        return ops.nf4_linear(x, nf4, bias)

    def plain(x: Tensor, nf4: NF4Weight, bias: Optional[Tensor], compute: torch.dtype) -> Tensor:
        return F.linear(x, _dequantized(nf4, compute).to(x.dtype), bias)

    return Case(
        name=f"nf4_linear{'-nested' if double_quant else ''}{'-bias' if with_bias else ''}",
        op="nf4",
        make=make,
        call=call,
        plain=plain,
        oracle=plain,
        errors=(
            ("columns", {"x": torch.zeros(2, 3)}, ValueError,
             r"nf4_linear: x has shape \(2, 3\), wanted \[\.\.\., 64\]"),
            ("integer x", {"x": torch.zeros(2, 64, dtype=torch.int64)}, TypeError, "nf4_linear: x is int64, wanted"),
            ("bias size", {"bias": torch.zeros(3)}, ValueError, r"nf4_linear: bias has shape \(3,\), wanted \(96,\)"),
            ("bias dtype", {"bias": torch.zeros(96, dtype=torch.float64)}, TypeError,
             "nf4_linear: bias is float64, x is float32"),
            ("dense weight", {"nf4": torch.zeros(4, 4)}, TypeError, "nf4_linear: nf4 is Tensor, wanted an NF4Weight"),
        ),
    )  # fmt: skip


# --- lora -------------------------------------------------------------------------------------------------------------

SEED = torch.tensor([0x1234_5678_9ABC_DEF0, -0x0FED_CBA9_8765_4321], dtype=torch.int64)


def _lora_case(base: str, *, with_bias: bool = False, dropout_p: float = 0.0, adapter_dtype: Any = None) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, r = shape
        adapters = adapter_dtype or dtype
        weight = randn(n, k, dtype=dtype, scale=0.05) if base == "dense" else nf4_weight(n, k, dtype, 64, base != "nf4")
        inputs = {
            "x": randn(*tokens, k, dtype=dtype),
            "weight": weight,
            "lora_A": randn(r, k, dtype=adapters, scale=0.1),
            "lora_B": randn(n, r, dtype=adapters, scale=0.1),
            "bias": randn(n, dtype=dtype) if with_bias else None,
            "compute": dtype,
        }
        return Sample(inputs, ("x", "lora_A", "lora_B", *(("bias",) if with_bias else ())))

    def call(x, weight, lora_A, lora_B, bias, compute, scaling=0.75, dropout_p=dropout_p, training=True, seed=SEED):
        return ops.lora_linear(
            x, weight, lora_A, lora_B, bias, scaling=scaling, dropout_p=dropout_p, training=training, seed=seed
        )

    def plain(x, weight, lora_A, lora_B, bias, compute):
        # As PEFT does it where all is of one dtype: dropout, two projections, a product, a sum, each rounded.
        dropped = x
        if dropout_p:
            dropped = torch.where(reference.dropout_keep_mask(SEED, dropout_p, x.shape), x / (1 - dropout_p), 0.0)
        y = F.linear(x, _dequantized(weight, compute).to(x.dtype), bias)
        return y + F.linear(F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype)) * 0.75

    traits = [base, *(["bias"] if with_bias else []), *([f"dropout{dropout_p}"] if dropout_p else [])]
    if adapter_dtype is not None:
        traits.append(f"adapters_{str(adapter_dtype).removeprefix('torch.')}")
    trainable = torch.zeros(96, 64, requires_grad=True)
    return Case(
        name="lora_linear-" + "-".join(traits),
        op="lora",
        make=make,
        call=call,
        plain=plain,
        oracle=plain,
        errors=(
            ("columns", {"x": torch.zeros(2, 3)}, ValueError,
             r"lora_linear: x has shape \(2, 3\), wanted \[\.\.\., 64\]"),
            ("no tensor", {"x": [1.0]}, TypeError, "lora_linear: x is list, wanted a Tensor"),
            ("sparse", {"x": torch.zeros(4, 64).to_sparse()}, TypeError, "lora_linear: x has layout torch.sparse_coo"),
            ("weight dtype", {"weight": torch.zeros(96, 64, dtype=torch.bfloat16)}, TypeError,
             "lora_linear: weight is bfloat16, x is float32"),
            ("trainable weight", {"weight": trainable}, ValueError,
             "lora_linear: weight requires grad, wanted a frozen"),
            ("weight of 3 dims", {"weight": torch.zeros(2, 96, 64)}, ValueError,
             r"lora_linear: weight has shape \(2, 96, 64\), wanted \[N, K\]"),
            ("A columns", {"lora_A": torch.zeros(16, 63)}, ValueError,
             r"lora_linear: lora_A has shape \(16, 63\), wanted \[R, 64\]"),
            ("B rows", {"lora_B": torch.zeros(95, 16)}, ValueError,
             r"lora_linear: lora_B has shape \(95, 16\), wanted \[96, R\]"),
            ("ranks", {"lora_B": torch.zeros(96, 8)}, ValueError, "lora_linear: lora_B has rank 8, lora_A has rank 16"),
            ("rank 0", {"lora_A": torch.zeros(0, 64), "lora_B": torch.zeros(96, 0)}, ValueError,
             "lora_linear: lora_A has rank 0, wanted at least 1"),
            ("A device", {"lora_A": torch.zeros(16, 64, device="meta")}, ValueError,
             "lora_linear: lora_A is on meta, x is on cpu"),
            ("scaling", {"scaling": float("inf")}, ValueError, "lora_linear: scaling is inf, wanted a finite number"),
            ("dropout 1", {"dropout_p": 1.0}, ValueError, "lora_linear: dropout_p is 1.0, wanted 0 <= p < 1"),
            ("dropout -1", {"dropout_p": -0.5}, ValueError, "lora_linear: dropout_p is -0.5, wanted 0 <= p < 1"),
            ("seed", {"seed": torch.zeros(3)}, ValueError, r"lora_linear: seed is float32 \(3,\), wanted int64 \(2,\)"),
        ) if base == "dense" and not traits[1:] else (),
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
)
