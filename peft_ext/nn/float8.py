"""A linear layer over a frozen FP8 weight that also quantizes its input to FP8 (e4m3).

    Y = x̂ Wᵀ + b        dX = dY W        x̂ = σ · e4m3(x / σ)

:mod:`peft_ext.reference.float8` has the formula of the scales σ, one for each token and block of columns. The gradient
of x is that of a layer without the quantization (a straight-through estimate). Between forward and backward only the
weight is kept.

Two ways lead to Y. ``torch._scaled_mm`` multiplies the codes of x with the codes of W if the GPU, the weight and the
call allow this (:meth:`Float8Linear.decoded_reason`, :func:`_takes`). Otherwise x̂ is rounded to x's dtype, and the
operator of :func:`peft_ext.ops.frozen_linear` multiplies x̂ with the decoded W. The two results differ by rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from .._ops import NAMESPACE
from ..ops import checks
from ..ops.library import by_reference, tokens
from ..ops.nf4 import refuse_double_backward, sum_rows
from ..reference import float8 as reference
from ..weights.fp8 import FP8, block_size, fp8
from ..weights.packed import SCALE_TYPES, PackedWeight
from .packed import PackedLinear

__all__ = ["Float8Linear"]

_ops = getattr(torch.ops, NAMESPACE)

# Blocks of a weight, (rows, columns), for which torch._scaled_mm has a scaling: one scale for the weight, a scale for
# each row, and DeepSeek's blocks. 0 stands for all rows or columns.
_ONE, _ROWS, _SQUARES = (0, 0), (1, 0), (128, 128)


# --- torch._scaled_mm -------------------------------------------------------------------------------------------------


def _takes(x: Tensor, blocks: tuple[int, int]) -> bool:
    """Returns whether ``torch._scaled_mm`` takes the input x, if ``torch._scaled_mm`` takes the weight.

    Only bfloat16 results exist on each GPU for each scaling. For blocks of 128 x 128, cuBLAS needs a number of tokens
    that is a multiple of 4.
    """
    return x.dtype is torch.bfloat16 and x.numel() > 0 and (blocks != _SQUARES or tokens(x) % 4 == 0)


def _sizes_reason(shape: Sequence[int], blocks: tuple[int, int]) -> Optional[str]:
    """Returns why ``torch._scaled_mm`` does not take a weight of the shape ``(N, K)``; None if it does.

    Each scaling needs multiples of 16. For blocks of 128 x 128, cuBLAS reads rows of K / 128 scales whose length is a
    multiple of 4, and PyTorch's own tests have no incomplete blocks.
    """
    steps = (128, 512) if blocks == _SQUARES else (16, 16)
    if all(size and size % step == 0 for size, step in zip(shape, steps, strict=True)):
        return None
    return f"its weight is {tuple(shape)}, wanted multiples of {steps}"


def _scales_of(weight: PackedWeight) -> Tensor:
    """Returns the scales of W as ``torch._scaled_mm`` takes the scales of its second factor Wᵀ: float32 ``[1, N]``, or
    ``[K / 128, N / 128]`` with the stride 1 along K for blocks of 128 x 128."""
    n, k = weight.shape
    scales, dtype = weight.parts[1], SCALE_TYPES[weight.option & 15]
    scales = (scales.view(dtype) if dtype.itemsize == 1 else scales).float()
    if block_size(weight) == _SQUARES:
        return scales.reshape(n // 128, k // 128).t()
    return scales.reshape(1, -1).expand(1, n).contiguous()


def _scaled_mm(codes: Tensor, scales: Tensor, of_weight: Tensor, scales_of_weight: Tensor) -> Tensor:
    """Returns x̂ Wᵀ, bfloat16 ``[T, N]``, for the codes ``[T, K]`` and the scales of x, and the codes ``[N, K]`` and the
    scales of W."""
    scales = scales.t().contiguous().t()  # scales of blocks need the stride 1 along the tokens
    return torch._scaled_mm(codes, of_weight.t(), scales, scales_of_weight, out_dtype=torch.bfloat16)


@torch.compiler.assume_constant_result  # torch.compile runs the function and does not trace it
def scaled_mm_reason(device: torch.device, blocks: tuple[int, int]) -> Optional[str]:
    """Returns why ``torch._scaled_mm`` can't run on ``device`` for weights with a scale for each ``blocks`` (rows,
    columns); None if it can.

    The first call for a device and a size of blocks compares a small product of ``torch._scaled_mm`` with PyTorch's
    product of the decoded factors. The result is kept for the process, also if ``torch._scaled_mm`` failed.
    """
    return _tried(device, blocks)


@functools.cache
def _tried(device: torch.device, blocks: tuple[int, int]) -> Optional[str]:
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return f"it is on {device.type}, wanted an NVIDIA GPU"
    if blocks not in (_ONE, _ROWS, _SQUARES):
        return f"torch._scaled_mm has no scaling for blocks of {blocks[0]} x {blocks[1]}"
    capability, cuda, wanted = torch.cuda.get_device_capability(device), torch.version.cuda or "0.0", ""
    if capability < (8, 9):
        wanted = "8.9 or higher"
    elif blocks == _SQUARES and (capability[0] != 9 or tuple(map(int, cuda.split("."))) < (12, 9)):
        wanted = "9.0 and CUDA 12.9 or newer"
    if wanted:
        return f"its GPU has compute capability {'.'.join(map(str, capability))} with CUDA {cuda}, wanted {wanted}"
    try:
        # no public name for it
        from torch.utils._python_dispatch import _disable_current_modes  # noqa: PLC2701

        with _disable_current_modes():  # the trial needs real tensors also while a call runs on fake tensors
            return _trial(device, blocks)
    # A version of PyTorch or cuBLAS that lacks the scaling raises one of these errors.
    except (RuntimeError, ValueError, TypeError, ImportError) as error:
        return f"torch._scaled_mm fails: {str(error).partition(chr(10))[0]}"


def _trial(device: torch.device, blocks: tuple[int, int]) -> Optional[str]:
    """Returns how a small product of ``torch._scaled_mm`` differs from the product in float64; None if they agree."""
    # The values come from sin and not from a random generator, whose state must not change.
    real: dict[str, Any] = {"device": device, "dtype": torch.float32}
    sizes = torch.arange(1, 65, **real)  # each token and block has another scale
    x = (torch.arange(64 * 128, **real).sin().view(64, 128) * sizes[:, None]).view(16, 512).to(torch.bfloat16)
    codes = (torch.arange(128 * 512, **real).sin() * 300).view(128, 512).to(torch.float8_e4m3fn)
    count = {_ONE: 1, _ROWS: 128, _SQUARES: 4}[blocks]
    weight = fp8(codes, torch.linspace(0.5, 2.0, count, **real), blocks)
    with torch.no_grad():
        found = _scaled_mm(*reference.quantize_tokens(x, weight.group), codes, _scales_of(weight)).double()
        wanted = reference.float8_linear(x.double(), weight)
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return None if error <= 2.0**-6 else f"torch._scaled_mm differs from the product of the decoded factors by {error}"


# --- the layer --------------------------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """``x̂ Wᵀ + b``, with the gradients ``dX = dY W`` and ``db = Σ dY``.

    ``columns``: number of columns of x that share a scale; 0: all. ``scales_of_weight``: None, or the scales of W for
    ``torch._scaled_mm``, which then multiplies. ``weight``: W as arguments of an operator, see PackedWeight.op_args.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Optional[Tensor], columns: int, scales_of_weight: Optional[Tensor], *weight: Any
    ) -> Tensor:
        ctx.rest = weight[5:]
        ctx.save_for_backward(*weight[:5])
        codes, scales = reference.quantize_tokens(x, columns)
        if scales_of_weight is None:
            return _ops.nf4_linear(reference.decode_tokens(codes, scales, columns, x.dtype), *weight, bias)
        n, k = weight[-1]
        of_weight = weight[0].view(torch.float8_e4m3fn).reshape(n, k)
        y = _scaled_mm(
            codes.reshape(-1, k).contiguous(), scales.reshape(-1, scales.shape[-1]), of_weight, scales_of_weight
        )
        return (y if bias is None else y + bias).view(*x.shape[:-1], n)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        refuse_double_backward("Float8Linear")
        needs_x, needs_bias = ctx.needs_input_grad[:2]
        grad_x = _ops.nf4_linear_backward(grad, *ctx.saved_tensors, *ctx.rest) if needs_x else None
        return (grad_x, sum_rows(grad) if needs_bias else None, *[None] * 9)


class Float8Linear(PackedLinear):
    """``Y = x̂ Wᵀ + b`` with W frozen in FP8 and x quantized to FP8 (e4m3) in each call: the function that the Triton
    kernel of transformers' ``FP8Linear`` and compressed-tensors compute for checkpoints with dynamic activations. ::

        σ[t, j] = max(max_{k in block j} |x[t, k]| / 448, 1e-12)        x̂[t, k] = e4m3(x[t, k] / σ[t, j]) · σ[t, j]

    Block j has the columns that share a scale in W: 128 columns for blocks of 128 x 128, and all columns for a weight
    with a scale for each row or with one scale. A :class:`PackedLinear` over the same weight computes ``x Wᵀ + b``.

    The backward treats the quantization as the identity, a straight-through estimate: ``dX = dY W``, with W decoded.
    Between forward and backward only the weight is kept. If x has an infinity or a NaN, all outputs of its token are
    NaN.

    A LoRA adapter over a Float8Linear reads x itself, not x̂. PEFT's DoRA with dropout multiplies W with the unquantized
    x, too. After a merge, the adapter's part of W is multiplied with x̂.

    On CUDA, ``torch._scaled_mm`` multiplies x in bfloat16 if K and N are multiples of 16: on GPUs from compute
    capability 8.9 on with a scale for each row of W or with one scale; on Hopper with CUDA 12.9 or newer with blocks of
    128 x 128 if K is a multiple of 512, N of 128, and the number of tokens of 4. The first call on a GPU compares
    ``torch._scaled_mm`` with the product of the decoded factors. In every other call, the operator of
    :func:`peft_ext.ops.frozen_linear` multiplies x̂, rounded to x's dtype, with W, which takes longer than the call of a
    PackedLinear. :func:`peft_ext.explain` says which layers decode W in all calls, and why; it does not know the dtype
    and the number of tokens of a call.

    To get a Float8Linear, call :meth:`from_packed` with an FP8 weight, or load a checkpoint with
    ``peft_ext.PackedConfig(activation_scheme="dynamic")``.

    Raises: ``from_packed`` raises ValueError if the weight's format is not FP8, and TypeError or ValueError as
    PackedLinear does. A call raises TypeError or ValueError if x does not fit.
    """

    def describe(self, weight: PackedWeight, names: Sequence[Optional[str]], extra: Iterable[str]) -> None:
        if weight.format is not FP8:
            raise ValueError(f"Float8Linear: weight has the format {weight.format.name}, wanted fp8")
        super().describe(weight, names, extra)
        blocks = f" and {weight.group} columns" if weight.group else ""
        self.note = f"its input is quantized to 8-bit floats (e4m3), with a scale for each token{blocks}"

    def decoded_reason(self) -> Optional[str]:
        """Returns why W is decoded in each call of the layer; None if ``torch._scaled_mm`` multiplies x in bfloat16."""
        blocks = block_size(self._template)
        return scaled_mm_reason(self.weight.device, blocks) or _sizes_reason(self._template.shape, blocks)

    def forward(self, x: Tensor) -> Tensor:
        op, weight, bias = "Float8Linear", self.packed, self.bias
        checks.check_float(op, "x", x)
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        x, _, bias = checks.cast_for_autocast(x, weight, bias)
        checks.check_linear(op, x, weight)
        if checks.wants_reference(x):
            return by_reference(reference.float8_linear, x, weight, bias)
        multiplies_codes = _takes(x, block_size(weight)) and self.decoded_reason() is None
        scales = _scales_of(weight) if multiplies_codes else None
        return _Product.apply(x, bias, weight.group, scales, *weight.op_args())
