"""LoRA over a frozen weight, dense or packed. The operators of this module also compute the adapter's dropout.

    x̃ = dropout(x)      S = x̃ Aᵀ  [T, R]      Y = x Wᵀ + (S∘ρ) Bᵀ + b  [T, N]      ρ = s · rank_scale  [R]

Backward: ``P = dY (B∘ρ)``; ``dB = ρ ∘ dYᵀ S``; ``dA = Pᵀ x̃``; ``dX = dY W + mask/(1-p) ∘ (P A)``; ``db = Σ dY``;
``d rank_scale = s · Σ_n B ∘ dYᵀ S``. Saved for the backward: x, S = x̃ Aᵀ and the dropout's seed, besides the frozen
weight, lora_A, lora_B and rank_scale. The backward computes the dropout mask again.

``lora_residual`` adds the low-rank term to the result of a base layer of any kind: ``Y = residual + (S∘ρ) Bᵀ``;
``dresidual = dY``.

Sources: LoRA (arXiv 2106.09685), QLoRA (arXiv 2305.14314); rank_scale: AdaLoRA (arXiv 2303.10512).
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from ..reference import common
from ..reference import lora as reference
from ..weights.packed import PackedWeight
from . import checks
from .library import NAMESPACE, WEIGHT, by_reference, define, proof, public, register_autograd, tokens
from .nf4 import refuse_double_backward, sum_rows

__all__ = ["lora_linear", "lora_residual"]

_ops = getattr(torch.ops, NAMESPACE)
_ADAPTER = "Tensor lora_A, Tensor lora_B, Tensor? rank_scale"
_SCALE = "float scaling, float dropout_p, Tensor? seed"


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _forward_reference(x, *args):
    *weight, bias, lora_A, lora_B, rank_scale, scaling, dropout_p, seed = args
    return reference.lora_linear_forward(
        x, checks.unpack_weight(*weight, x.dtype), bias, lora_A, lora_B, rank_scale, scaling, dropout_p, seed
    )


def _forward_fake(x, *args):
    *weight, _bias, lora_A, _lora_B, _rank_scale, _scaling, _dropout_p, _seed = args
    s = x.new_empty((tokens(x), lora_A.shape[0]), dtype=common.sum_dtype(x.dtype))
    return x.new_empty((*x.shape[:-1], weight[-1][0])), s


def _backward_reference(grad, x, *args):
    *weight, lora_A, lora_B, rank_scale, s, scaling, dropout_p, seed, needs_grad_x = args
    grad_x, grad_a, grad_b, grad_scale = reference.lora_linear_backward(
        grad, x, checks.unpack_weight(*weight, x.dtype), lora_A, lora_B, rank_scale, s, scaling, dropout_p, seed
    )
    grad_scale = s.new_empty(0, dtype=torch.float32) if rank_scale is None else grad_scale
    return grad_x if needs_grad_x else grad_x.new_empty(0), grad_a, grad_b, grad_scale


def _backward_fake(grad, x, *args):
    *_weight, lora_A, lora_B, rank_scale, s, _scaling, _dropout_p, _seed, needs_grad_x = args
    grad_x = x.new_empty(x.shape) if needs_grad_x else x.new_empty(0)
    grad_scale = s.new_empty(0, dtype=torch.float32) if rank_scale is None else rank_scale.new_empty(rank_scale.shape)
    return grad_x, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape), grad_scale


def _residual_fake(x, residual, lora_A, *_args):
    s = x.new_empty((tokens(x), lora_A.shape[0]), dtype=common.sum_dtype(x.dtype))
    return residual.new_empty(residual.shape), s


def _residual_backward_reference(grad, x, *args):
    *args, needs_grad_x = args
    grad_x, grad_a, grad_b, grad_scale = reference.lora_residual_backward(grad, x, *args)
    grad_scale = args[3].new_empty(0, dtype=torch.float32) if args[2] is None else grad_scale
    return grad_x if needs_grad_x else grad_x.new_empty(0), grad_a, grad_b, grad_scale


define(
    "lora_linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, {_ADAPTER}, {_SCALE}) -> (Tensor y, Tensor s)",
    reference=_forward_reference,
    fake=_forward_fake,
    family="lora",
)
define(
    "lora_linear_backward",
    f"(Tensor grad, Tensor x, {WEIGHT}, {_ADAPTER}, Tensor s, {_SCALE}, bool needs_grad_x)"
    " -> (Tensor grad_x, Tensor grad_A, Tensor grad_B, Tensor grad_rank_scale)",
    reference=_backward_reference,
    fake=_backward_fake,
    family="lora",
)
define(
    "lora_residual",
    f"(Tensor x, Tensor residual, {_ADAPTER}, {_SCALE}) -> (Tensor y, Tensor s)",
    reference=reference.lora_residual_forward,
    fake=_residual_fake,
    family="lora",
)
define(
    "lora_residual_backward",
    f"(Tensor grad, Tensor x, {_ADAPTER}, Tensor s, {_SCALE}, bool needs_grad_x)"
    " -> (Tensor grad_x, Tensor grad_A, Tensor grad_B, Tensor grad_rank_scale)",
    reference=_residual_backward_reference,
    fake=_backward_fake,
    family="lora",
)


@proof("lora")
def _proof(inputs):
    x, grad, a, b = inputs.x, inputs.grad, inputs.a, inputs.b
    for weight, p in ((inputs.dense, 0.1), (inputs.nf4, 0.0)):
        scale = (0.5, p, inputs.seed if p else None)
        yield "lora_linear", (x, *weight, inputs.bias, a, b, None, *scale)
        s = _forward_reference(x, *weight, inputs.bias, a, b, None, *scale)[1]
        yield "lora_linear_backward", (grad, x, *weight, a, b, None, s, *scale, True)
    yield "lora_residual", (x, grad, a, b, None, 0.5, 0.0, None)
    yield "lora_residual_backward", (grad, x, a, b, None, s, 0.5, 0.0, None, True)
    yield "lora_linear", (x, *inputs.dense, None, a, b, inputs.vector(16), 0.5, 0.1, inputs.seed.to(inputs.device))


# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    x, *weight, _bias, lora_A, lora_B, rank_scale, scaling, dropout_p, seed = inputs
    _, s = output
    ctx.set_materialize_grads(False)
    ctx.blocksize_shape = weight[5:]
    ctx.scale = (scaling, dropout_p)
    ctx.save_for_backward(x, *weight[:5], lora_A, lora_B, rank_scale, s, seed)


def _backward(ctx, grad, *_):
    refuse_double_backward("lora_linear")
    if grad is None:
        return (None,) * 15
    x, *weight, lora_A, lora_B, rank_scale, s, seed = ctx.saved_tensors
    needs = ctx.needs
    grad_x = grad_a = grad_b = grad_scale = grad_bias = None
    if needs[0] or needs[9] or needs[10] or needs[11]:
        grad_x, grad_a, grad_b, grad_scale = _ops.lora_linear_backward(
            grad, x, *weight, *ctx.blocksize_shape, lora_A, lora_B, rank_scale, s, *ctx.scale, seed, needs[0]
        )
    if needs[8]:
        grad_bias = sum_rows(grad)
    return (
        grad_x if needs[0] else None, None, None, None, None, None, None, None, grad_bias,
        grad_a if needs[9] else None, grad_b if needs[10] else None, grad_scale if needs[11] else None,
        None, None, None,
    )  # fmt: skip


def _residual_setup_context(ctx, inputs, output):
    x, _residual, lora_A, lora_B, rank_scale, scaling, dropout_p, seed = inputs
    _, s = output
    ctx.set_materialize_grads(False)
    ctx.scale = (scaling, dropout_p)
    ctx.save_for_backward(x, lora_A, lora_B, rank_scale, s, seed)


def _residual_backward(ctx, grad, *_):
    refuse_double_backward("lora_residual")
    if grad is None:
        return (None,) * 8
    x, lora_A, lora_B, rank_scale, s, seed = ctx.saved_tensors
    needs = ctx.needs
    grad_x = grad_a = grad_b = grad_scale = None
    if needs[0] or any(needs[2:5]):
        grad_x, grad_a, grad_b, grad_scale = _ops.lora_residual_backward(
            grad, x, lora_A, lora_B, rank_scale, s, *ctx.scale, seed, needs[0]
        )
    found = (grad_x, grad, grad_a, grad_b, grad_scale, None, None, None)
    return tuple(value if need else None for value, need in zip(found, needs, strict=True))


_lora_linear = register_autograd("lora_linear", _backward, setup_context=_setup_context, trained=(0, 8, 9, 10, 11))
_lora_residual = register_autograd(
    "lora_residual", _residual_backward, setup_context=_residual_setup_context, trained=range(5)
)


# --- public -----------------------------------------------------------------------------------------------------------


@public("lora_linear", "lora_linear_backward")
def lora_linear(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Optional[Tensor] = None,
    *,
    rank_scale: Optional[Tensor] = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Optional[Tensor] = None,
) -> Tensor:
    """``Y = x Wᵀ + scaling · (dropout(x) Aᵀ ∘ rank_scale) Bᵀ + b`` over a frozen weight.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16.
        weight: frozen ``[N, K]``: a dense tensor of x's dtype, or a PackedWeight.
        lora_A: ``[R, K]``; lora_B: ``[N, R]``; each of any float dtype, for example float32 with a bfloat16 weight.
        bias: the layer's bias b ``[N]`` of x's dtype, or None.
        rank_scale: ``[R]`` or ``[R, 1]``, of any float dtype: one factor per rank (AdaLoRA); default: ones.
        scaling: the factor of the low-rank term, a finite number: ``alpha / R`` (rsLoRA: ``alpha / sqrt(R)``).
        dropout_p: probability to drop an element of x in the low-rank term, ``0 <= p < 1``, rounded to a multiple of
            2^-16.
        training: True: the dropout acts; False: no element of x is dropped.
        seed: int64 ``[2]`` on x's device or on the CPU for the dropout mask; default: drawn from PyTorch's generator of
            the device, so that ``torch.manual_seed`` and the RNG state that checkpointing preserves give the same mask
            again. A CUDA graph that was captured with a CPU seed has the same mask in each replay.

    Returns: ``[..., N]`` of x's dtype. Products are summed in float32. Gradients flow to x, lora_A, lora_B,
    rank_scale and bias, in their own shapes and dtypes; saved for backward, besides the weight and the adapter: x,
    ``S = dropout(x) Aᵀ`` ``[T, R]`` in float32 and the seed. Under autocast x, bias and a dense weight are cast to the
    autocast dtype, and the adapter is not cast.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Sources: LoRA (arXiv 2106.09685), QLoRA (arXiv 2305.14314), AdaLoRA (arXiv 2303.10512);
    dropout: :mod:`peft_ext.reference.philox`.
    """
    op = "lora_linear"
    x, weight, bias = checks.adapted_operands(op, x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    if rank_scale is not None:
        checks.check_vector(op, "rank_scale", rank_scale, x, (lora_A.shape[0],), (lora_A.shape[0], 1))
    checks.check_seed(op, seed, x)
    if checks.wants_reference(x, lora_A, lora_B, rank_scale):
        return by_reference(reference.lora_linear, x, weight, lora_A, lora_B, bias, rank_scale=rank_scale,
                          scaling=scaling, dropout_p=dropout_p, training=training, seed=seed)  # fmt: skip
    p = float(dropout_p) if training else 0.0
    return checked_lora_linear(x, weight, bias, lora_A, lora_B, rank_scale, float(scaling), p, seed)


def checked_lora_linear(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    bias: Optional[Tensor],
    lora_A: Tensor,
    lora_B: Tensor,
    rank_scale: Optional[Tensor],
    scaling: float,
    dropout_p: float,
    seed: Optional[Tensor] = None,
) -> Tensor:
    """Computes :func:`lora_linear` for arguments that are known to pass its checks, without checking the arguments.

    The function has no argument ``training``: a dropout acts if ``dropout_p`` is above 0.
    """
    seed = common.dropout_seed(seed, dropout_p, True, x.device)
    args = (bias, lora_A, lora_B, rank_scale, scaling, dropout_p, seed)
    return _lora_linear(x, *checks.weight_args(weight), *args)


@public("lora_residual", "lora_residual_backward")
def lora_residual(
    x: Tensor,
    residual: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    rank_scale: Optional[Tensor] = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Optional[Tensor] = None,
) -> Tensor:
    """``Y = residual + scaling · (dropout(x) Aᵀ ∘ rank_scale) Bᵀ``: LoRA on the result of a base layer of any kind.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16: the base layer's input.
        residual: ``[..., N]`` of x's dtype: the base layer's result.
        lora_A, lora_B, rank_scale, scaling, dropout_p, training, seed: as in :func:`lora_linear`.

    Returns: ``[..., N]`` of x's dtype, a new tensor. Sums are computed in float32, and the result is rounded once.
    Gradients flow to x, residual, lora_A, lora_B and rank_scale; saved for backward, besides the adapter: x, ``S =
    dropout(x) Aᵀ`` ``[T, R]`` in float32 and the seed. Under autocast x and residual are cast to the autocast dtype,
    and the adapter is not cast.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Sources: as :func:`lora_linear`.
    """
    op = "lora_residual"
    checks.check_float(op, "x", x)
    checks.check_float(op, "residual", residual)
    if (dtype := checks.autocast_dtype(x)) is not None:
        x, residual = x.to(dtype), checks.cast(residual, dtype)
    checks.check_residual(op, x, residual, lora_B, "lora_B")
    checks.check_low_rank(op, (residual.shape[-1], x.shape[-1]), x, "x", lora_A, lora_B)
    if rank_scale is not None:
        checks.check_vector(op, "rank_scale", rank_scale, x, (lora_A.shape[0],), (lora_A.shape[0], 1))
    checks.check_scale(op, scaling, dropout_p)
    checks.check_seed(op, seed, x)
    if checks.wants_reference(x, lora_A, lora_B, rank_scale):
        return by_reference(reference.lora_residual, x, residual, lora_A, lora_B, rank_scale=rank_scale,
                            scaling=scaling, dropout_p=dropout_p, training=training, seed=seed)  # fmt: skip
    seed = common.dropout_seed(seed, dropout_p, training, x.device)
    return _lora_residual(x, residual, lora_A, lora_B, rank_scale, float(scaling), float(dropout_p), seed)
