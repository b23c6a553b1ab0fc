"""IA3: a learned factor for each output or input feature of a linear layer over a frozen weight, dense or packed.

    output:  Z = x Wᵀ + b,  Y = l∘Z,  l [N]       feedforward:  Y = (l∘x) Wᵀ + b,  l [K]       scale:  Y = l∘x,  l [K]

Backward: output: ``dX = (l∘dY) W``, ``dl = Σ_t dY∘Z``, ``db = l∘Σ dY``; feedforward: ``U = dY W``, ``dX = l∘U``,
``dl = Σ_t x∘U``, ``db = Σ dY``; scale: ``dX = l∘dY``, ``dl = Σ_t x∘dY``.
The forward saves x, the weight W, the bias b and the factors l for the backward. If l scales the output and needs a
gradient, the forward also saves Z = x Wᵀ + b. On a CPU, the forward saves the result Y instead of Z (``Z = Y/l``) for a
caller that promises not to change Y.

Source: IA3 (arXiv 2205.05638).
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from ..reference import ia3 as reference
from ..weights.packed import PackedWeight
from . import checks
from .library import NAMESPACE, WEIGHT, by_reference, define, proof, public, register_autograd, tokens
from .nf4 import refuse_double_backward, sum_rows

__all__ = ["ia3_linear", "ia3_scale"]

_ops = getattr(torch.ops, NAMESPACE)
_NEEDS = "bool needs_grad_x, bool needs_grad_l"
_GRADS = "(Tensor grad_x, Tensor grad_l)"


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _linear_reference(x, *args):
    *weight, bias, ia3_l, feedforward, want_z = args
    flat = ia3_l.reshape(-1)
    y, z = reference.ia3_linear_forward(x, checks.unpack_weight(*weight, x.dtype), bias, flat, feedforward)
    return y, z if want_z else x.new_empty(0)


def _linear_fake(x, *args):
    *weight, _bias, _ia3_l, _feedforward, want_z = args
    z = x.new_empty((tokens(x), weight[-1][0]) if want_z else 0)
    return x.new_empty((*x.shape[:-1], weight[-1][0])), z


def _linear_backward_reference(grad, x, *args):
    *weight, bias, ia3_l, z, z_is_scaled, feedforward, needs_x, needs_l = args
    grad_x, grad_l = reference.ia3_linear_backward(
        grad, x, checks.unpack_weight(*weight, x.dtype), bias, ia3_l.reshape(-1), z, z_is_scaled, feedforward
    )
    return grad_x if needs_x else x.new_empty(0), grad_l.view(ia3_l.shape) if needs_l else ia3_l.new_empty(0)


def _linear_backward_fake(grad, x, *args):
    *_, ia3_l, _z, _z_is_scaled, _feedforward, needs_x, needs_l = args
    return x.new_empty(x.shape if needs_x else 0), ia3_l.new_empty(ia3_l.shape if needs_l else 0)


def _scale_fake(x, ia3_l):
    return x.new_empty(x.shape)


def _scale_backward_reference(grad, x, ia3_l, needs_x, needs_l):
    grad_x, grad_l = reference.ia3_scale_backward(grad, x, ia3_l.reshape(-1))
    return grad_x if needs_x else x.new_empty(0), grad_l.view(ia3_l.shape) if needs_l else ia3_l.new_empty(0)


def _scale_backward_fake(grad, x, ia3_l, needs_x, needs_l):
    return x.new_empty(x.shape if needs_x else 0), ia3_l.new_empty(ia3_l.shape if needs_l else 0)


define(
    "ia3_linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, Tensor ia3_l, bool feedforward, bool want_z) -> (Tensor y, Tensor z)",
    reference=_linear_reference,
    fake=_linear_fake,
    family="ia3",
)
define(
    "ia3_linear_backward",
    f"(Tensor grad, Tensor x, {WEIGHT}, Tensor? bias, Tensor ia3_l, Tensor? z, bool z_is_scaled, bool feedforward,"
    f" {_NEEDS}) -> {_GRADS}",
    reference=_linear_backward_reference,
    fake=_linear_backward_fake,
    family="ia3",
)
define("ia3_scale", "(Tensor x, Tensor ia3_l) -> Tensor", reference=reference.ia3_scale, fake=_scale_fake, family="ia3")
define(
    "ia3_scale_backward",
    f"(Tensor grad, Tensor x, Tensor ia3_l, {_NEEDS}) -> {_GRADS}",
    reference=_scale_backward_reference,
    fake=_scale_backward_fake,
    family="ia3",
)


@proof("ia3")
def _proof(inputs):
    x, dense, bias = inputs.x, inputs.dense, inputs.bias
    l_out, l_in = inputs.vector(inputs.n), inputs.vector(inputs.k)
    forward = (x, *dense, bias, l_out, False, True)
    yield "ia3_linear", forward
    z = _linear_reference(*forward)[1]
    yield "ia3_linear_backward", (inputs.grad, x, *dense, bias, l_out, z, False, False, True, True)
    yield "ia3_scale", (x, l_in)
    yield "ia3_scale_backward", (inputs.draw(inputs.t, inputs.k), x, l_in, True, True)
    yield "ia3_linear", (x, *inputs.nf4, bias, l_in, True, True)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _linear_setup_context(ctx, inputs, output):
    x, *weight, bias, ia3_l, feedforward, want_z = inputs
    y, z = output
    ctx.set_materialize_grads(False)
    ctx.blocksize_shape = weight[5:]
    ctx.feedforward = feedforward
    ctx.z_is_scaled = not want_z
    held = (z if want_z else y) if ctx.needs[9] and not feedforward else None
    ctx.save_for_backward(x, *weight[:5], bias, ia3_l, held)


def _linear_backward(ctx, grad, *_):
    refuse_double_backward("ia3_linear")
    if grad is None:
        return (None,) * 12
    x, *weight, bias, ia3_l, z = ctx.saved_tensors
    needs = ctx.needs
    grad_x = grad_l = grad_bias = None
    if needs[0] or needs[9]:
        z = z if z is None or z.dim() == 2 else z.reshape(-1, z.shape[-1])
        grad_x, grad_l = _ops.ia3_linear_backward(
            grad, x, *weight, *ctx.blocksize_shape, bias, ia3_l, z, ctx.z_is_scaled, ctx.feedforward, needs[0], needs[9]
        )
    if needs[8]:
        grad_bias = sum_rows(grad)
        grad_bias = grad_bias if ctx.feedforward else (grad_bias * ia3_l.reshape(-1)).to(grad.dtype)
    return (grad_x if needs[0] else None, *(None,) * 7, grad_bias, grad_l if needs[9] else None, None, None)


def _scale_setup_context(ctx, inputs, output):
    x, ia3_l = inputs
    ctx.save_for_backward(x, ia3_l)


def _scale_backward(ctx, grad):
    refuse_double_backward("ia3_scale")
    needs = ctx.needs_input_grad
    grad_x, grad_l = _ops.ia3_scale_backward(grad, *ctx.saved_tensors, *needs)
    return grad_x if needs[0] else None, grad_l if needs[1] else None


_ia3_linear = register_autograd("ia3_linear", _linear_backward, setup_context=_linear_setup_context, trained=(0, 8, 9))
_ia3_scale = register_autograd("ia3_scale", _scale_backward, setup_context=_scale_setup_context)


# --- public -----------------------------------------------------------------------------------------------------------


@public("ia3_linear", "ia3_linear_backward")
def ia3_linear(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    ia3_l: Tensor,
    bias: Optional[Tensor] = None,
    *,
    feedforward: bool = False,
    save_output: bool = False,
) -> Tensor:
    """``Y = l ∘ (x Wᵀ + b)`` over a frozen weight; with ``feedforward`` ``Y = (l ∘ x) Wᵀ + b``.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16.
        weight: frozen ``[N, K]``: a dense tensor of x's dtype, or a PackedWeight.
        ia3_l: the learned factors l: ``[N]`` or ``[N, 1]``; with ``feedforward`` ``[K]`` or ``[1, K]``; of any float
            dtype.
        bias: the layer's bias b ``[N]`` of x's dtype, or None.
        save_output: True: the caller promises not to change the result in place. With save_output, the forward on a CPU
            saves Y instead of ``Z = x Wᵀ + b`` if ia3_l scales the output and needs a gradient. Because the caller
            holds the result Y anyway, saving Y instead of Z takes T·N elements less memory. If Y was saved, the
            backward computes Z again for outputs with ``|ia3_l| < 2^-60`` (in float16 ``|ia3_l| < 2^-6``).

    Returns: ``[..., N]`` of x's dtype. Products are summed in float32. Gradients flow to x, ia3_l and bias, in their
    own shapes and dtypes; saved for backward, besides the weight, the bias and ia3_l: x and, where ia3_l scales the
    output and needs a gradient, ``Z = x Wᵀ + b`` ``[T, N]`` of x's dtype (with save_output on a CPU, Y instead of Z).
    Under autocast x, bias and a dense weight are cast to the autocast dtype.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Source: IA3 (arXiv 2205.05638).
    """
    op = "ia3_linear"
    if not checks.fits_linear(x, weight, bias):
        checks.check_float(op, "x", x)
        x, weight, bias = checks.cast_for_autocast(x, weight, bias)
        checks.check_linear(op, x, weight)
        checks.check_bias(op, bias, x, weight.shape[0])
    out_features, in_features = weight.shape
    shapes = ((in_features,), (1, in_features)) if feedforward else ((out_features,), (out_features, 1))
    checks.check_vector(op, "ia3_l", ia3_l, x, *shapes)
    if checks.wants_reference(x, ia3_l):
        return by_reference(reference.ia3_linear, x, weight, ia3_l, bias, feedforward=feedforward)
    return checked_ia3_linear(x, weight, bias, ia3_l, bool(feedforward), save_output and x.device.type == "cpu")


def checked_ia3_linear(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    bias: Optional[Tensor],
    ia3_l: Tensor,
    feedforward: bool,
    saves_y: bool = False,
) -> Tensor:
    """Computes :func:`ia3_linear` for arguments that are known to pass its checks, without checking the arguments."""
    want_z = not feedforward and not saves_y and ia3_l.requires_grad and torch.is_grad_enabled()
    return _ia3_linear(x, *checks.weight_args(weight), bias, ia3_l, feedforward, want_z)


@public("ia3_scale", "ia3_scale_backward")
def ia3_scale(x: Tensor, ia3_l: Tensor) -> Tensor:
    """``Y = l ∘ x`` in float32, rounded once to x's dtype.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16. ia3_l: ``[K]``, ``[1, K]`` or ``[K, 1]``, of any float dtype.

    Returns: ``[..., K]`` of x's dtype. Gradients flow to x and ia3_l, in their own shapes and dtypes; saved for
    backward: x and ia3_l alone.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Source: IA3 (arXiv 2205.05638).
    """
    op = "ia3_scale"
    checks.check_float(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x has shape (), wanted [..., K]")
    features = x.shape[-1]
    checks.check_vector(op, "ia3_l", ia3_l, x, (features,), (1, features), (features, 1))
    if checks.wants_reference(x, ia3_l):
        return by_reference(reference.ia3_scale, x, ia3_l)
    return _ia3_scale(x, ia3_l)
