"""IA3: a learned factor per output, or per input, of a linear layer over a frozen weight, dense or NF4.

    output:  Y = l∘(x Wᵀ + b),  l [N]           feedforward:  Y = (l∘x) Wᵀ + b,  l [K]           scale:  Y = l∘x,  l [K]

Backward: output: ``dX = (l∘dY) W``, ``dl = Σ_t dY∘(Y/l)``, ``db = l∘Σ dY``; feedforward: ``U = dY W``, ``dX = l∘U``,
``dl = Σ_t x∘U``, ``db = Σ dY``; scale: ``dX = l∘dY``, ``dl = Σ_t x∘dY``.
Saved: x and, for the output's dl alone, Y (where l is near 0, ``Y/l`` is computed again from x).

Source: IA3 (arXiv 2205.05638).
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from ..reference import ia3 as reference
from ..weight import NF4Weight
from . import _checks as checks
from ._library import NAMESPACE, WEIGHT, define, in_float64
from .nf4 import refuse_double_backward, sum_rows

__all__ = ["ia3_linear", "ia3_scale"]

_ops = getattr(torch.ops, NAMESPACE)
_NEEDS = "bool needs_grad_x, bool needs_grad_l"
_GRADS = "(Tensor grad_x, Tensor grad_l)"


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _linear_reference(x, *args):
    *weight, bias, ia3_l, feedforward = args
    return reference.ia3_linear_forward(x, checks.unpack_weight(*weight, x.dtype), bias, ia3_l, feedforward)


def _linear_fake(x, *args):
    *weight, _bias, _ia3_l, _feedforward = args
    return x.new_empty((*x.shape[:-1], weight[-1][0]))


def _linear_backward_reference(grad, x, *args):
    *weight, bias, ia3_l, y, feedforward, needs_x, needs_l = args
    grad_x, grad_l = reference.ia3_linear_backward(
        grad, x, checks.unpack_weight(*weight, x.dtype), bias, ia3_l, y, feedforward
    )
    return grad_x if needs_x else x.new_empty(0), grad_l if needs_l else ia3_l.new_empty(0)


def _linear_backward_fake(grad, x, *args):
    *_, ia3_l, _y, _feedforward, needs_x, needs_l = args
    return x.new_empty(x.shape if needs_x else 0), ia3_l.new_empty(ia3_l.shape if needs_l else 0)


def _scale_fake(x, ia3_l):
    return x.new_empty(x.shape)


def _scale_backward_reference(grad, x, ia3_l, needs_x, needs_l):
    grad_x, grad_l = reference.ia3_scale_backward(grad, x, ia3_l)
    return grad_x if needs_x else x.new_empty(0), grad_l if needs_l else ia3_l.new_empty(0)


def _scale_backward_fake(grad, x, ia3_l, needs_x, needs_l):
    return x.new_empty(x.shape if needs_x else 0), ia3_l.new_empty(ia3_l.shape if needs_l else 0)


define(
    "ia3_linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, Tensor ia3_l, bool feedforward) -> Tensor",
    reference=_linear_reference,
    fake=_linear_fake,
)
define(
    "ia3_linear_backward",
    f"(Tensor grad, Tensor x, {WEIGHT}, Tensor? bias, Tensor ia3_l, Tensor? y, bool feedforward, {_NEEDS}) -> {_GRADS}",
    reference=_linear_backward_reference,
    fake=_linear_backward_fake,
)
define("ia3_scale", "(Tensor x, Tensor ia3_l) -> Tensor", reference=reference.ia3_scale_forward, fake=_scale_fake)
define(
    "ia3_scale_backward",
    f"(Tensor grad, Tensor x, Tensor ia3_l, {_NEEDS}) -> {_GRADS}",
    reference=_scale_backward_reference,
    fake=_scale_backward_fake,
)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _linear_setup_context(ctx, inputs, output):
    x, *weight, bias, ia3_l, feedforward = inputs
    ctx.blocksize_shape = weight[5:]
    ctx.feedforward = feedforward
    y = output if ctx.needs_input_grad[9] and not feedforward else None
    ctx.save_for_backward(x, *weight[:5], bias, ia3_l, y)


def _linear_backward(ctx, grad):
    refuse_double_backward("ia3_linear")
    x, *weight, bias, ia3_l, y = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_x = grad_l = grad_bias = None
    if needs[0] or needs[9]:
        grad_x, grad_l = _ops.ia3_linear_backward(
            grad, x, *weight, *ctx.blocksize_shape, bias, ia3_l, y, ctx.feedforward, needs[0], needs[9]
        )
    if needs[8]:
        grad_bias = sum_rows(grad)
        grad_bias = grad_bias if ctx.feedforward else (grad_bias * ia3_l).to(grad.dtype)
    return (grad_x if needs[0] else None, *(None,) * 7, grad_bias, grad_l if needs[9] else None, None)


def _scale_setup_context(ctx, inputs, output):
    x, ia3_l = inputs
    ctx.save_for_backward(x, ia3_l)


def _scale_backward(ctx, grad):
    refuse_double_backward("ia3_scale")
    needs = ctx.needs_input_grad
    grad_x, grad_l = _ops.ia3_scale_backward(grad, *ctx.saved_tensors, *needs)
    return grad_x if needs[0] else None, grad_l if needs[1] else None


torch.library.register_autograd(f"{NAMESPACE}::ia3_linear", _linear_backward, setup_context=_linear_setup_context)
torch.library.register_autograd(f"{NAMESPACE}::ia3_scale", _scale_backward, setup_context=_scale_setup_context)


# --- public -----------------------------------------------------------------------------------------------------------


def ia3_linear(
    x: Tensor,
    weight: Union[Tensor, NF4Weight],
    ia3_l: Tensor,
    bias: Optional[Tensor] = None,
    *,
    feedforward: bool = False,
) -> Tensor:
    """``Y = l ∘ (x Wᵀ + b)`` over a frozen weight; with ``feedforward`` ``Y = (l ∘ x) Wᵀ + b``.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16.
        weight: frozen ``[N, K]``: a dense tensor of x's dtype, or an NF4Weight.
        ia3_l: ``[N]`` or ``[N, 1]``; with ``feedforward`` ``[K]`` or ``[1, K]``; of any float dtype.
        bias: ``[N]`` of x's dtype.

    Returns: ``[..., N]`` of x's dtype. Products are summed in float32. Gradients flow to x, ia3_l and bias, in their
    own shapes and dtypes; saved for backward: x and, where ia3_l scales the output and needs a gradient, Y itself (so
    don't change it in place). Under autocast x, bias and a dense weight are cast to the autocast dtype.

    Raises: TypeError or ValueError that names the argument, what came and what was wanted.

    Source: IA3 (arXiv 2205.05638).
    """
    op = "ia3_linear"
    checks.check_float(op, "x", x)
    x, weight, bias = checks.cast_for_autocast(x, weight, bias)
    checks.check_linear(op, x, weight)
    out_features, in_features = weight.shape
    shapes = ((in_features,), (1, in_features)) if feedforward else ((out_features,), (out_features, 1))
    checks.check_vector(op, "ia3_l", ia3_l, x, *shapes)
    checks.check_bias(op, bias, x, out_features)
    if checks.any_float64(x, ia3_l):
        return in_float64(reference.ia3_linear, x, weight, ia3_l, bias, feedforward=feedforward)
    return _ops.ia3_linear(x, *checks.weight_args(weight), bias, ia3_l.reshape(-1), bool(feedforward))


def ia3_scale(x: Tensor, ia3_l: Tensor) -> Tensor:
    """``Y = l ∘ x`` in float32, rounded once to x's dtype.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16. ia3_l: ``[K]``, ``[1, K]`` or ``[K, 1]``, of any float dtype.

    Returns: ``[..., K]`` of x's dtype. Gradients flow to both, in their own shapes and dtypes; saved for backward:
    the inputs alone.

    Raises: TypeError or ValueError that names the argument, what came and what was wanted.

    Source: IA3 (arXiv 2205.05638).
    """
    op = "ia3_scale"
    checks.check_float(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x has shape (), wanted [..., K]")
    features = x.shape[-1]
    checks.check_vector(op, "ia3_l", ia3_l, x, (features,), (1, features), (features, 1))
    if checks.any_float64(x, ia3_l):
        return in_float64(reference.ia3_scale, x, ia3_l)
    return _ops.ia3_scale(x, ia3_l.reshape(-1))
