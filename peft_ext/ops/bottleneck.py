"""A bottleneck adapter: down projection, activation, up projection, scale and residual as one operator.

    U = x Dᵀ + b_d  [T, M]      H = act(U)      Y = residual + s · (H Vᵀ + b_v)  [T, N]

Backward: ``P = s · dY V``; ``dV = s · dYᵀ H``; ``db_v = s · Σ dY``; ``dU = P ∘ act'(U)``; ``dD = dUᵀ x``;
``db_d = Σ dU``; ``dX = dU D``, plus dY where x is the residual. For the backward, the forward saves x, the down
projection's result U (float32), and the weights D (down) and V (up).

Sources: Houlsby and others (arXiv 1902.00751); Pfeiffer and others (arXiv 2005.00247); for the parallel adapter, He
and others (arXiv 2110.04366).
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..reference import bottleneck as reference
from ..reference import common
from . import checks
from .library import NAMESPACE, by_reference, define, proof, public, register_autograd, tokens
from .nf4 import refuse_double_backward

__all__ = ["bottleneck_adapter"]

_ops = getattr(torch.ops, NAMESPACE)


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _fake(x, residual, down_weight, down_bias, up_weight, up_bias, scale, activation):
    u = x.new_empty((tokens(x), down_weight.shape[0]), dtype=common.sum_dtype(x.dtype))
    return x.new_empty((*x.shape[:-1], up_weight.shape[0])), u


def _reference(x, residual, down_weight, down_bias, up_weight, up_bias, scale, activation):
    weights = down_weight, down_bias, up_weight, up_bias
    return reference.bottleneck_adapter_forward(x, residual, *weights, scale, reference.ACTIVATIONS[activation])


def _backward_reference(grad, x, u, down_weight, up_weight, scale, activation, own, needs_grad_x):
    grads = reference.bottleneck_adapter_backward(
        grad, x, u, down_weight, up_weight, scale, reference.ACTIVATIONS[activation], own
    )
    return (grads[0] if needs_grad_x else x.new_empty(0), *grads[1:])


def _backward_fake(grad, x, u, down_weight, up_weight, scale, activation, own, needs_grad_x):
    return (
        x.new_empty(x.shape if needs_grad_x else 0),
        down_weight.new_empty(down_weight.shape),
        u.new_empty(down_weight.shape[0]),
        up_weight.new_empty(up_weight.shape),
        u.new_empty(up_weight.shape[0]),
    )


define(
    "bottleneck_adapter",
    "(Tensor x, Tensor? residual, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
    "float scale, int activation) -> (Tensor y, Tensor u)",
    reference=_reference,
    fake=_fake,
    family="bottleneck",
)
define(
    "bottleneck_adapter_backward",
    "(Tensor grad, Tensor x, Tensor u, Tensor down_weight, Tensor up_weight, float scale, int activation, bool own, "
    "bool needs_grad_x) -> (Tensor grad_x, Tensor grad_down_weight, Tensor grad_down_bias, Tensor grad_up_weight, "
    "Tensor grad_up_bias)",
    reference=_backward_reference,
    fake=_backward_fake,
    family="bottleneck",
)


@proof("bottleneck")
def _proof(inputs):
    x, k, draw = inputs.x, inputs.k, inputs.draw
    down, up = draw(24, k, of=torch.float32, scale=k**-0.5), draw(k, 24, of=torch.float32, scale=0.2)
    down_bias, up_bias = draw(24, of=torch.float32), draw(k, of=torch.float32)
    forward = (x, x, down, down_bias, up, up_bias, 0.5, 0)
    yield "bottleneck_adapter", forward
    u = _reference(*forward)[1]
    yield "bottleneck_adapter_backward", (draw(inputs.t, k), x, u, down, up, 0.5, 0, True, True)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    x, residual, down_weight, down_bias, up_weight, up_bias, ctx.scale, ctx.activation = inputs
    _, u = output
    ctx.own = residual is None
    ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (down_bias, up_bias)]
    ctx.mark_non_differentiable(u)
    ctx.save_for_backward(x, u, down_weight, up_weight)


def _backward(ctx, grad, _grad_u):
    refuse_double_backward("bottleneck_adapter")
    needs = ctx.needs_input_grad
    grad_x = down = down_bias = up = up_bias = None
    if needs[0] or any(needs[2:6]):
        grad_x, down, down_bias, up, up_bias = _ops.bottleneck_adapter_backward(
            grad, *ctx.saved_tensors, ctx.scale, ctx.activation, ctx.own, needs[0]
        )
        down_bias = down_bias.to(ctx.bias_dtypes[0]) if needs[3] else None
        up_bias = up_bias.to(ctx.bias_dtypes[1]) if needs[5] else None
    return (grad_x if needs[0] else None, grad if needs[1] else None, down if needs[2] else None, down_bias,
            up if needs[4] else None, up_bias, None, None)  # fmt: skip


_bottleneck_adapter = register_autograd("bottleneck_adapter", _backward, setup_context=_setup_context)


# --- public -----------------------------------------------------------------------------------------------------------


@public("bottleneck_adapter", "bottleneck_adapter_backward")
def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Optional[Tensor],
    up_weight: Tensor,
    up_bias: Optional[Tensor],
    *,
    scale: float = 1.0,
    activation: str = "gelu",
    residual: Optional[Tensor] = None,
) -> Tensor:
    """``Y = residual + s · (act(x Dᵀ + b_d) Vᵀ + b_v)``.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16.
        down_weight: the weight D ``[M, K]`` of the down projection. down_bias: the down projection's bias b_d ``[M]``,
            or None. up_weight: the weight V ``[N, M]`` of the up projection. up_bias: the up projection's bias b_v
            ``[N]``, or None. Each of the weights and biases may have a float dtype of its own, so that float32 adapters
            over 16-bit activations need no cast.
        scale: s. activation: "gelu" (with erf), "gelu_tanh", "relu" or "silu".
        residual: ``[..., N]`` of x's dtype; None: the residual is x itself, and N must be K. For an adapter after a
            sublayer, x and residual are the sublayer's output. For a parallel adapter, x is the sublayer's input and
            residual is the sublayer's output.

    Returns: ``[..., N]`` of x's dtype. Sums are in float32, and the result is rounded once, except in the following
    calls on a CPU: if x, D and V have one 16-bit dtype in which the CPU path multiplies, and x has more than two
    tokens, then x Dᵀ (with b_d, if b_d has this dtype), s · act(x Dᵀ + b_d) and residual + s b_v are rounded to this
    dtype too.
    Gradients flow to x, the weights, the biases and residual, in their own dtypes; saved for backward: x, x Dᵀ + b_d in
    float32, and the two weights. Under autocast x is cast to the autocast dtype, and ``s · (act(x Dᵀ + b_d) Vᵀ + b_v)``
    is rounded to the autocast dtype. A float32 residual (x itself, if no residual is given) is not cast, and Y is
    float32 then, as in plain PyTorch.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Sources: Houlsby and others (arXiv 1902.00751); Pfeiffer and others (arXiv 2005.00247); for the parallel adapter, He
    and others (arXiv 2110.04366).
    """
    op = "bottleneck_adapter"
    checks.check_float(op, "x", x)
    kept = x if residual is None else residual
    is_wide = False
    if (dtype := checks.autocast_dtype(x)) is not None:
        is_wide = isinstance(kept, Tensor) and kept.is_floating_point() and kept.dtype.itemsize > dtype.itemsize
        x = x.to(dtype)
        # Zeros of x's dtype replace a residual that is wider than x: the operator takes no wider residual, and the sum
        # with the wide residual is computed after the operator.
        if residual is not None:
            residual = torch.zeros_like(residual, dtype=dtype) if is_wide else checks.cast(residual, dtype)
    checks.check_bottleneck(op, x, down_weight, down_bias, up_weight, up_bias, residual)
    checks.check_scale(op, scale, argument="scale")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}, wanted one of {reference.ACTIVATIONS}")
    if is_wide:
        weights = down_weight, down_bias, up_weight, up_bias
        zeros = torch.zeros_like(x) if residual is None else residual
        return kept + bottleneck_adapter(x, *weights, scale=scale, activation=activation, residual=zeros)
    if checks.wants_reference(x, down_weight, down_bias, up_weight, up_bias):
        return by_reference(
            reference.bottleneck_adapter, x, down_weight, down_bias, up_weight, up_bias,
            scale=float(scale), activation=activation, residual=residual,
        )  # fmt: skip
    # The operator takes the activation's number, because PyTorch's stable ABI leaks each string argument.
    kind = reference.ACTIVATIONS.index(activation)
    return _bottleneck_adapter(x, residual, down_weight, down_bias, up_weight, up_bias, float(scale), kind)[0]
