"""NF4 quantization, dequantization and merging, and the linear layer over a frozen weight, dense or packed.

    w_i = code[q_i] · absmax[i // blocksize]          Y = X Wᵀ + b          dX = dY W

The docstring of :class:`peft_ext.NF4Weight` describes the layout, and the docstring of ``nf4_quantize`` describes the
rounding. Sources: QLoRA (arXiv 2305.14314), bitsandbytes' format.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from ..reference import common
from ..reference import nf4 as reference
from ..weights.nf4 import NestedAbsmax, NF4Weight
from ..weights.packed import PackedWeight
from . import checks
from .library import NAMESPACE, WEIGHT, by_reference, define, proof, public, register_autograd

__all__ = ["frozen_linear", "nf4_dequantize", "nf4_linear", "nf4_merge", "nf4_quantize"]

_ops = getattr(torch.ops, NAMESPACE)


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _quantize_fake(weight, blocksize):
    n = weight.numel()
    packed = weight.new_empty(((n + 1) // 2, 1), dtype=torch.uint8)
    return packed, weight.new_empty((n + blocksize - 1) // blocksize, dtype=torch.float32)


def _quantize_absmax_fake(centred, code):
    n = centred.numel()
    return centred.new_empty(n, dtype=torch.uint8), centred.new_empty((n + 255) // 256)


def _dequantize_fake(weight, *args):
    return weight.new_empty(args[5], dtype=args[-1])


def _dequantize_reference(weight, *args):
    return common.dense(checks.unpack_weight(weight, *args), args[-1])


def _merged_reference(weight, *args):
    *decode, lora_A, lora_B, row_scale, scaling, dtype = args
    dense = common.dense(checks.unpack_weight(weight, *decode, torch.float32), torch.float32)
    return reference.merged_of(dense, lora_A, lora_B, row_scale, scaling).to(dtype)


def _linear_reference(x, *args):
    *weight, bias = args
    return torch.nn.functional.linear(x, common.dense(checks.unpack_weight(*weight, x.dtype), x.dtype), bias)


def _linear_fake(x, *args):
    return x.new_empty((*x.shape[:-1], args[6][0]))


def _linear_backward_reference(grad, *weight):
    return grad @ common.dense(checks.unpack_weight(*weight, grad.dtype), grad.dtype)


def _merge_fake(weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape, *rest):
    count = shape[0] * shape[1]
    absmax = weight.new_empty((count + blocksize - 1) // blocksize, dtype=torch.float32)
    return weight.new_empty(((count + 1) // 2, 1)), absmax, weight.new_empty(2, dtype=torch.float64)


def _linear_backward_fake(grad, *args):
    return grad.new_empty((*grad.shape[:-1], args[-1][1]))


define(
    "nf4_quantize",
    "(Tensor weight, int blocksize) -> (Tensor packed, Tensor absmax)",
    reference=reference.quantize,
    fake=_quantize_fake,
    family="nf4",
)
# nf4_scale_mean has no CUDA kernel: on a GPU the reference runs, which sums with PyTorch's operators.
define(
    "nf4_scale_mean",
    "(Tensor absmax) -> Tensor",
    reference=reference.scale_mean,
    fake=lambda absmax: absmax.new_empty(()),
    family="nf4",
    cuda=False,
)
define(
    "nf4_quantize_absmax",
    "(Tensor centred, Tensor code) -> (Tensor codes, Tensor absmax)",
    reference=reference.quantize_absmax,
    fake=_quantize_absmax_fake,
    family="nf4",
)
define(
    "nf4_dequantize",
    f"({WEIGHT}, ScalarType dtype) -> Tensor",
    reference=_dequantize_reference,
    fake=_dequantize_fake,
    family="nf4",
)
# nf4_dequantize_merged returns g ∘ (W + s·B A) for a weight W [N, K], rounded once. lora_A [R, K], lora_B [N, R] and
# row_scale g [N] may have any float dtypes. nf4_dequantize_merged has no gradient.
define(
    "nf4_dequantize_merged",
    f"({WEIGHT}, Tensor lora_A, Tensor lora_B, Tensor? row_scale, float scaling, ScalarType dtype) -> Tensor",
    reference=_merged_reference,
    fake=_dequantize_fake,
    family="nf4",
)
# nf4_merge quantizes W' = g ∘ (W + s·B A) to Q with the block size of W. The result `error` is the float64 tensor
# (Σ (Q - W')², Σ W'²). nf4_merge has no gradient.
define(
    "nf4_merge",
    f"({WEIGHT}, Tensor lora_A, Tensor lora_B, Tensor? row_scale, float scaling)"
    " -> (Tensor packed, Tensor absmax, Tensor error)",
    reference=reference.merge,
    fake=_merge_fake,
    family="nf4",
)
# The weight of nf4_linear may also have another packed format, or be a dense tensor of x's dtype.
define(
    "nf4_linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias) -> Tensor",
    reference=_linear_reference,
    fake=_linear_fake,
    family="nf4",
)
define(
    "nf4_linear_backward",
    f"(Tensor grad, {WEIGHT}) -> Tensor",
    reference=_linear_backward_reference,
    fake=_linear_backward_fake,
    family="nf4",
)


@proof("nf4")
def _proof(inputs):
    x, nf4, k, n, dtype = inputs.x, inputs.nf4, inputs.k, inputs.n, inputs.dtype
    # lora_A and lora_B have small integers times 1/8, whose products have exact sums in every precision and order, so
    # that the kernel and the reference of a merge give equal codes.
    a, b = (inputs.integers(-4, 5, *size).float() * 0.125 for size in ((16, k), (n, 16)))
    factors = (a, b, None, 0.5)
    few = inputs.draw(3, k)
    yield "nf4_linear", (x, *nf4, inputs.bias)
    yield "nf4_linear", (few, *nf4, inputs.bias)
    yield "nf4_linear_backward", (inputs.grad, *nf4)
    yield "nf4_dequantize", (*nf4, dtype)
    yield "nf4_dequantize_merged", (*nf4, *factors, dtype)
    yield "nf4_merge", (*nf4, *factors)
    yield "nf4_quantize", (inputs.draw(n, k), 64)
    absmax = inputs.draw(n * k // 64, of=torch.float32)
    yield "nf4_quantize_absmax", (absmax, reference.dynamic_code().to(inputs.device))
    yield "nf4_scale_mean", (absmax,)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _linear_setup_context(ctx, inputs, output):
    x, *weight, bias = inputs
    tensors, ctx.blocksize_shape = weight[:5], weight[5:]
    ctx.save_for_backward(*tensors)


def _linear_backward(ctx, grad):
    refuse_double_backward("nf4_linear")
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _ops.nf4_linear_backward(grad, *ctx.saved_tensors, *ctx.blocksize_shape)
    if ctx.needs_input_grad[8]:
        grad_bias = sum_rows(grad)
    return grad_x, None, None, None, None, None, None, None, grad_bias


def refuse_double_backward(op: str) -> None:
    """Raises RuntimeError if a gradient of a gradient may be needed (create_graph=True). Backward operators have no
    gradients, and autograd would silently treat their results as constants."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: the gradient of a gradient (create_graph=True) is not supported")


def sum_rows(grad: Tensor) -> Tensor:
    """Returns a bias's gradient: the sum over all dimensions but the last, which PyTorch accumulates in float32."""
    return grad.reshape(-1, grad.shape[-1]).sum(0)


_nf4_linear = register_autograd("nf4_linear", _linear_backward, setup_context=_linear_setup_context)


# --- public -----------------------------------------------------------------------------------------------------------


@public("nf4_quantize", "nf4_quantize_absmax")
def nf4_quantize(weight: Tensor, blocksize: int = 64, double_quant: bool = False) -> NF4Weight:
    """Quantizes a weight to NF4: the 4-bit codes and the float32 scales have the bits of bitsandbytes' result.

    ``absmax_b = max |w|`` over each block of the flat tensor. Each element gets the code, of the 16 NF4 codes, that is
    nearest to ``w · (1 / max(absmax, 1e-38))`` (in an incomplete last block, to ``w / max(absmax, 1e-38)``); if two
    codes are equally near, the element gets the lower code. With ``double_quant`` the scales, minus their mean, are
    quantized to 8 bits in blocks of 256.

    Args:
        weight: any shape, float32, bfloat16, float16 (or float64, through float32); gradients do not flow.
        blocksize: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        double_quant: True: the scales are quantized too, so that an element of the weight takes 4.127 bits instead of
            4.5 at blocksize 64.

    Raises:
        TypeError: weight is no Tensor, or has a dtype or layout that is not supported. ValueError: blocksize is not one
            of the listed sizes.

    Source: QLoRA, arXiv 2305.14314. Each 8-bit code of double quantization is the nearest code, as in bitsandbytes on
    CUDA. On a CPU, bitsandbytes rounds about 0.2% of the 8-bit codes to another neighbour.
    """
    checks.check_float("nf4_quantize", "weight", weight)
    checks.check_blocksize("nf4_quantize", blocksize)
    weight = weight.detach()
    packed, absmax = _ops.nf4_quantize(weight, blocksize)
    absmax, nested = _nested(absmax) if double_quant else (absmax, None)
    return NF4Weight(packed, absmax, weight.shape, weight.dtype, blocksize, nested)


@public("nf4_merge")
def nf4_merge(
    nf4: NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    row_scale: Optional[Tensor] = None,
) -> tuple[NF4Weight, Tensor]:
    """Quantizes ``W' = row_scale ∘ (W + scaling · B A)`` to NF4 with W's block size, and returns the relative error.

    Args:
        nf4: the frozen weight W, of shape ``(N, K)``.
        lora_A: ``[R, K]``; lora_B: ``[N, R]``; row_scale: ``[N]`` (DoRA's ``m / ‖W + s·B A‖``); of any float dtype.
        scaling: the factor of B A, a finite number.

    Returns: the merged weight Q, double-quantized where ``nf4`` is, and the error ``‖Q − W'‖ / ‖W'‖`` (Frobenius) as a
    float64 tensor of no dimensions. The error is not finite where W' is not finite, and 0 where W' is 0. The arithmetic
    is in float32, and no gradient flows. The error is that of the 4-bit codes alone; double quantization of the scales
    adds an error of some 0.1% of W'.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.
    """
    op = "nf4_merge"
    if not isinstance(nf4, NF4Weight):
        raise TypeError(f"{op}: nf4 is {type(nf4).__name__}, wanted an NF4Weight")
    checks.check_weight(op, nf4)
    checks.check_lora(op, nf4, lora_A, lora_B)
    checks.check_scale(op, scaling)
    if row_scale is not None:
        checks.check_vector(op, "row_scale", row_scale, nf4.packed, (nf4.shape[0],))
    factors = [None if value is None else _no_wider(value.detach()) for value in (lora_A, lora_B, row_scale)]
    packed, absmax, (moved, whole) = _ops.nf4_merge(*nf4.op_args(), *factors, float(scaling))
    absmax, nested = _nested(absmax) if nf4.nested is not None else (absmax, None)
    error = torch.where(whole == 0, 0.0, (moved / whole).sqrt())
    return NF4Weight(packed, absmax, nf4.shape, nf4.dtype, nf4.blocksize, nested), error


def _nested(absmax: Tensor) -> tuple[Tensor, NestedAbsmax]:
    return reference.nested(absmax, _ops.nf4_scale_mean, _ops.nf4_quantize_absmax)


def _no_wider(value: Tensor) -> Tensor:
    return value.float() if value.dtype is torch.float64 else value


@public("nf4_dequantize")
def nf4_dequantize(nf4: NF4Weight, dtype: Optional[torch.dtype] = None) -> Tensor:
    """``code[q] · absmax`` in float32, rounded once to ``dtype``. Double-quantized scales are decoded first.

    Args:
        nf4: the quantized weight. dtype: dtype of the result; default: the dtype from which the weight was quantized.

    Returns: a dense tensor of ``nf4.shape``. No gradient flows, because the weight is frozen.

    Raises: TypeError if ``nf4`` is no NF4Weight, or if ``dtype`` is no supported float dtype.
    """
    if not isinstance(nf4, NF4Weight):
        raise TypeError(f"nf4_dequantize: nf4 is {type(nf4).__name__}, wanted an NF4Weight")
    return nf4.dequantize(dtype)


@public("nf4_linear", "nf4_linear_backward")
def nf4_linear(x: Tensor, nf4: NF4Weight, bias: Optional[Tensor] = None) -> Tensor:
    """``Y = X Wᵀ + b`` over a frozen NF4 weight. W is rounded to x's dtype, as :func:`nf4_dequantize` rounds.

    For few tokens in 16 bits, a kernel may round the code values instead of the weights, and multiply sums of products
    by the scales. With either rounding, the weight that is multiplied differs from code · scale by at most half a unit
    in the last place of x's dtype.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16. nf4: the frozen weight W, of shape ``(N, K)``. bias: the layer's
            bias b ``[N]`` of x's dtype, or None.

    Returns: ``[..., N]`` of x's dtype. Gradients flow to x (``dX = dY W``) and bias; saved for backward: the NF4 weight
    alone. Under autocast x and bias are cast to the autocast dtype.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.
    """
    if not isinstance(nf4, NF4Weight):
        raise TypeError(f"nf4_linear: nf4 is {type(nf4).__name__}, wanted an NF4Weight")
    checks.check_float("nf4_linear", "x", x)
    x, nf4, bias = checks.cast_for_autocast(x, nf4, bias)
    checks.check_linear("nf4_linear", x, nf4)
    checks.check_bias("nf4_linear", bias, x, nf4.shape[0])
    if checks.wants_reference(x):
        return by_reference(reference.nf4_linear, x, nf4, bias)
    return _nf4_linear(x, *nf4.op_args(), bias)


@public("nf4_linear", "nf4_linear_backward")
def frozen_linear(x: Tensor, weight: Union[Tensor, PackedWeight], bias: Optional[Tensor] = None) -> Tensor:
    """``Y = X Wᵀ + b`` over a frozen weight, dense or packed, computed by the operator ``peft_ext::nf4_linear``.

    On a CPU without instructions for products in 16 bits, where PyTorch's own product with a 16-bit weight may be a
    plain, slow loop, the kernel widens a dense 16-bit weight to float32, one panel of rows at a time. Y is rounded
    once.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16. weight: ``(N, K)``: a dense tensor of x's dtype, or a
            PackedWeight. bias: the layer's bias b ``[N]`` of x's dtype, or None.

    Returns: ``[..., N]`` of x's dtype. Gradients flow to x (``dX = dY W``) and bias; saved for backward: the weight
    alone. Under autocast x, a dense weight and bias are cast to the autocast dtype.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected; also if a
    dense weight requires a gradient.
    """
    op = "frozen_linear"
    checks.check_float(op, "x", x)
    checks.check_weight(op, weight)
    x, weight, bias = checks.cast_for_autocast(x, weight, bias)
    checks.check_linear(op, x, weight)
    checks.check_bias(op, bias, x, weight.shape[0])
    if checks.wants_reference(x):
        return by_reference(reference.frozen_linear, x, weight, bias)
    return _nf4_linear(x, *checks.weight_args(weight), bias)
