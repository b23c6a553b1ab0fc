"""RMSNorm and LayerNorm over the last dimension, in float32. The forward reads each row from memory once.

    x̂ = (x - μ) r      r = 1/√(mean (x - μ)² + eps)      y = x̂ ∘ (w + offset) + b       RMSNorm: μ is 0, no b

Backward: ``g = dY ∘ (w + offset)``, ``dX = r (g - mean g - x̂ mean (g ∘ x̂))`` (RMSNorm: without mean g),
``dw = Σ_t dY ∘ x̂`` if the weight is trained, ``db = Σ_t dY`` if the bias is trained.
Saved for the backward: x, the weight, and in float32 for each row the factor r, and for LayerNorm also the mean μ. No
float32 copy of x is saved.

Sources: RMSNorm (arXiv 1910.07467), LayerNorm (arXiv 1607.06450).
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..reference import norm as reference
from ..reference.common import sum_dtype
from . import checks
from .library import NAMESPACE, by_reference, define, proof, public, register_autograd, tokens
from .nf4 import refuse_double_backward

__all__ = ["layer_norm", "rms_norm"]

_ops = getattr(torch.ops, NAMESPACE)


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _of_rows(x):
    return x.new_empty(tokens(x), dtype=sum_dtype(x.dtype))


def _rms_fake(x, weight, eps, offset, round_before_weight):
    return x.new_empty(x.shape, dtype=reference.rms_norm_dtype(x, weight, round_before_weight)), _of_rows(x)


def _like_weight(x, weight, needed):
    return (x.new_empty(0, dtype=sum_dtype(x.dtype)) if weight is None
            else weight.new_empty(weight.shape if needed else 0))  # fmt: skip


def _rms_backward_reference(grad, x, weight, rstd, offset, needs_x, needs_weight):
    grad_x, grad_weight = reference.rms_norm_backward(grad, x, weight, rstd, offset)
    return grad_x if needs_x else x.new_empty(0), grad_weight if needs_weight else _like_weight(x, weight, False)


def _rms_backward_fake(grad, x, weight, rstd, offset, needs_x, needs_weight):
    return x.new_empty(x.shape if needs_x else 0), _like_weight(x, weight, needs_weight)


def _layer_fake(x, weight, bias, eps):
    return x.new_empty(x.shape), _of_rows(x), _of_rows(x)


def _layer_backward_reference(grad, x, weight, mean, rstd, needs_x, needs_weight, needs_bias):
    grad_x, grad_weight, grad_bias = reference.layer_norm_backward(grad, x, weight, mean, rstd)
    return (
        grad_x if needs_x else x.new_empty(0),
        grad_weight if needs_weight else _like_weight(x, weight, False),
        grad_bias if needs_bias else grad_bias.new_empty(0),
    )


def _layer_backward_fake(grad, x, weight, mean, rstd, needs_x, needs_weight, needs_bias):
    grad_bias = rstd.new_empty(x.shape[-1] if needs_bias else 0)
    return x.new_empty(x.shape if needs_x else 0), _like_weight(x, weight, needs_weight), grad_bias


define(
    "rms_norm",
    "(Tensor x, Tensor? weight, float eps, float offset, bool round_before_weight) -> (Tensor y, Tensor rstd)",
    reference=reference.rms_norm_forward,
    fake=_rms_fake,
    family="norm",
)
define(
    "rms_norm_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor rstd, float offset, bool needs_grad_x, bool needs_grad_weight)"
    " -> (Tensor grad_x, Tensor grad_weight)",
    reference=_rms_backward_reference,
    fake=_rms_backward_fake,
    family="norm",
)
define(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    reference=reference.layer_norm_forward,
    fake=_layer_fake,
    family="norm",
)
define(
    "layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool needs_grad_x, bool needs_grad_weight, "
    "bool needs_grad_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    reference=_layer_backward_reference,
    fake=_layer_backward_fake,
    family="norm",
)


@proof("norm")
def _proof(inputs):
    x, t, k, draw = inputs.x, inputs.t, inputs.k, inputs.draw
    w, b = inputs.vector(k), draw(k, of=torch.float32)
    yield "rms_norm", (x, w, 1e-6, 0.0, True)
    rstd = reference.rms_norm_forward(x, w, 1e-6, 0.0, True)[1]
    yield "rms_norm_backward", (draw(t, k, of=torch.float32), x, w, rstd, 0.0, True, True)
    yield "layer_norm", (x, w, b, 1e-5)
    mean, rstd = reference.layer_norm_forward(x, w, b, 1e-5)[1:]
    yield "layer_norm_backward", (draw(t, k), x, w, mean, rstd, True, True, True)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _rms_setup_context(ctx, inputs, output):
    x, weight, _eps, ctx.offset, _round = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, rstd)


def _rms_backward(ctx, grad, _grad_rstd):
    refuse_double_backward("rms_norm")
    needs = ctx.needs_input_grad
    grad_x, grad_weight = _ops.rms_norm_backward(grad, *ctx.saved_tensors, ctx.offset, needs[0], needs[1])
    return grad_x if needs[0] else None, grad_weight if needs[1] else None, None, None, None


def _layer_setup_context(ctx, inputs, output):
    x, weight, bias, _eps = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, mean, rstd)


def _layer_backward(ctx, grad, _grad_mean, _grad_rstd):
    refuse_double_backward("layer_norm")
    needs = ctx.needs_input_grad
    grad_x, grad_weight, grad_bias = _ops.layer_norm_backward(grad, *ctx.saved_tensors, *needs[:3])
    return (grad_x if needs[0] else None, grad_weight if needs[1] else None,
            grad_bias.to(ctx.bias_dtype) if needs[2] else None, None)  # fmt: skip


_rms_norm = register_autograd("rms_norm", _rms_backward, setup_context=_rms_setup_context)
_layer_norm = register_autograd("layer_norm", _layer_backward, setup_context=_layer_setup_context)


# --- public -----------------------------------------------------------------------------------------------------------


def _check(op: str, x: Tensor, eps: float, **vectors: Optional[Tensor]) -> None:
    checks.check_float(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x has shape (), wanted [..., K]")
    for argument, value in vectors.items():
        if value is not None:
            checks.check_vector(op, argument, value, x, (x.shape[-1],))
    checks.check_scale(op, eps, argument="eps")
    if eps < 0:
        raise ValueError(f"{op}: eps is {eps!r}, wanted 0 or more")


@public("rms_norm", "rms_norm_backward")
def rms_norm(
    x: Tensor, weight: Optional[Tensor], eps: float, *, offset: float = 0.0, round_before_weight: bool = True
) -> Tensor:
    """``y = x / √(mean x² + eps) ∘ (w + offset)``, the mean over the last dimension.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16. weight: w ``[K]`` of any float dtype, or None: 1.
        offset: 0 as in Llama, or 1 as in Gemma, whose factor is 1 plus the weight.
        round_before_weight: True: x̂ is rounded to x's dtype before x̂ is multiplied with the weight, as in
            transformers' Llama: ``weight * x̂.to(x.dtype)``; False: only the product of x̂ and the factor is rounded,
            as in Gemma: ``(x̂ * (1 + w)).to(x.dtype)``.

    Returns: ``[..., K]`` of x's dtype, or, with ``round_before_weight``, of the dtype of PyTorch's product of w and x:
    float32 for a float32 weight (as PEFT's ``prepare_model_for_kbit_training`` makes) and 16-bit x. Sums are in
    float32. A CPU kernel adds the squares to four vectors of partial sums in turn; on a GPU, each thread sums eight
    columns at a time, and the sums of the threads are added. If the kernel's sum of squares has the same bits as
    transformers' sum, the result has the same bits as transformers' result. Gradients flow to x and weight, in their
    own dtypes; saved for backward: x, weight and one float32 number for each row. Autocast changes nothing.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Source: RMSNorm (arXiv 1910.07467).
    """
    op = "rms_norm"
    _check(op, x, eps, weight=weight)
    checks.check_scale(op, offset, argument="offset")
    if checks.wants_reference(x, weight):
        return by_reference(reference.rms_norm, x, weight, eps, offset=offset, round_before_weight=round_before_weight)
    return _rms_norm(x, weight, float(eps), float(offset), bool(round_before_weight))[0]


@public("layer_norm", "layer_norm_backward")
def layer_norm(x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], eps: float) -> Tensor:
    """``y = (x - μ) / √(mean (x - μ)² + eps) ∘ w + b``: ``F.layer_norm`` over the last dimension.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16. weight: w ``[K]`` or None: 1. bias: b ``[K]`` or None: 0. weight
            and bias may have any float dtypes.

    Returns: ``[..., K]`` of x's dtype. The arithmetic is in float32, the variance is the mean of (x - μ)², and the
    result is rounded once. Gradients flow to x, weight and bias, in their own dtypes; saved for backward: x, weight and
    two float32 numbers for each row. Autocast changes nothing, although ``F.layer_norm`` may return float32 under
    autocast.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Source: LayerNorm (arXiv 1607.06450).
    """
    op = "layer_norm"
    _check(op, x, eps, weight=weight, bias=bias)
    if checks.wants_reference(x, weight, bias):
        return by_reference(reference.layer_norm, x, weight, bias, eps)
    return _layer_norm(x, weight, bias, float(eps))[0]
