"""Rotary position embedding of queries and keys, in one call.

    y = x ∘ cos + rotate_half(x) ∘ sin        rotate_half((x₁, x₂)) = (-x₂, x₁), halves of a head

Backward: ``dX = dY ∘ cos + rotate_half⁻¹(dY ∘ sin)``; the two halves of cos, and the two halves of sin, may differ.
Saved for the backward: cos and sin.

Source: RoFormer (arXiv 2104.09864), in the form of transformers' Llama, which rotates the halves of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import rotary as reference
from . import checks
from .library import NAMESPACE, by_reference, define, proof, public, register_autograd
from .nf4 import refuse_double_backward

__all__ = ["rotary_embedding"]

_ops = getattr(torch.ops, NAMESPACE)


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _laid_out(values, like):
    return tuple(reference.rotated_like(x).copy_(value) for value, x in zip(values, like, strict=True))


def _reference(q, k, cos, sin):
    return _laid_out(reference.rotary_embedding(q, k, cos, sin), (q, k))


def _backward_reference(grad_q, grad_k, cos, sin):
    return _laid_out(reference.rotary_embedding_backward(grad_q, grad_k, cos, sin), (grad_q, grad_k))


def _fake(q, k, cos, sin):
    return reference.rotated_like(q), reference.rotated_like(k)


define(
    "rotary_embedding",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor q_embed, Tensor k_embed)",
    reference=_reference,
    fake=_fake,
    family="rotary",
)
define(
    "rotary_embedding_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin) -> (Tensor q, Tensor k)",
    reference=_backward_reference,
    fake=_fake,
    family="rotary",
)


@proof("rotary")
def _proof(inputs):
    t, k, draw, size = inputs.t, inputs.k, inputs.draw, 64
    heads = [draw(2, t // 2, k // size, size).transpose(1, 2), draw(2, t // 2, 1, size).transpose(1, 2)]
    angles = draw(1, t // 2, size, of=torch.float32)
    cos, sin = angles.cos().to(inputs.dtype), angles.sin().to(inputs.dtype)
    yield "rotary_embedding", (*heads, cos, sin)
    yield "rotary_embedding_backward", (*heads, cos, sin)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    _q, _k, cos, sin = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad_q, grad_k):
    refuse_double_backward("rotary_embedding")
    needs = ctx.needs_input_grad
    grads = _ops.rotary_embedding_backward(grad_q, grad_k, *ctx.saved_tensors)
    return grads[0] if needs[0] else None, grads[1] if needs[1] else None, None, None


_rotary_embedding = register_autograd("rotary_embedding", _backward, setup_context=_setup_context)


# --- public -----------------------------------------------------------------------------------------------------------


@public("rotary_embedding", "rotary_embedding_backward")
def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``x ∘ cos + rotate_half(x) ∘ sin`` of queries and keys, as transformers' ``apply_rotary_pos_emb`` of Llama.

    Args:
        q: ``[B, H, T, D]``, float32, bfloat16 or float16, D even. k: ``[B, Hkv, T, D]`` of q's dtype. q and k are not
            copied if their last dimension is contiguous, as in ``[B, T, H, D].transpose(1, 2)``.
        cos: ``[B, T, D]`` or ``[1, T, D]`` of q's dtype. sin: a tensor of cos's shape and dtype. cos and sin are
            constants, without a gradient.

    Returns: ``(q, k)``, of the arguments' shapes and dtype, with the arguments' order of dimensions in memory, or
    contiguous if the argument's last dimension is not the innermost one in memory. The arithmetic is in float32 and the
    result is rounded once, while PyTorch rounds the two products and their sum.
    Gradients flow to q and k; saved for backward: cos and sin.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Source: RoFormer (arXiv 2104.09864), in the form of transformers' Llama, which rotates the halves of a head.
    """
    checks.check_rotary("rotary_embedding", q, k, cos, sin)
    if checks.wants_reference(q):
        return by_reference(reference.rotary_embedding, q, k, cos, sin)
    return _rotary_embedding(q, k, cos, sin)
