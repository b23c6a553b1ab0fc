"""Scaled dot-product attention of a CPU, forward and backward, scores never whole.

    S = scale q kᵀ      P = softmax(S) over the keys that a query may see      out = P v      lse = ln Σ exp(S)

Backward, S and P made again from q, k and lse: ``dV = Pᵀ dO``, ``dS = P ∘ (dO vᵀ - Σ dO ∘ out)``, ``dQ = scale dS k``,
``dK = scale dSᵀ q``. Saved: q, k, v, out, and lse, one float32 a query and head.

Source: Attention Is All You Need (arXiv 1706.03762); the backward: FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import attention as reference
from ..reference.rotary import rotated_like
from . import checks
from .library import NAMESPACE, define, in_float64, register_autograd
from .nf4 import refuse_double_backward

__all__ = ["scaled_dot_product_attention"]

_ops = getattr(torch.ops, NAMESPACE)


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _out_like(q: Tensor, v: Tensor) -> Tensor:
    """Returns memory of the result, in the order in which the next layer takes it."""
    batch, heads, queries, _ = q.shape
    return q.new_empty((batch, queries, heads, v.shape[3])).transpose(1, 2)


def _reference(q, k, v, mask, is_causal, scale):
    out, lse = reference.scaled_dot_product_attention(q, k, v, mask, is_causal, scale)
    return _out_like(q, v).copy_(out), lse.float()


def _backward_reference(grad, q, k, v, out, lse, mask, is_causal, scale):
    grads = reference.scaled_dot_product_attention_backward(grad, q, k, v, out, lse, mask, is_causal, scale)
    return tuple(rotated_like(x).copy_(value) for x, value in zip((q, k, v), grads, strict=True))


def _fake(q, k, v, mask, is_causal, scale):
    return _out_like(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward_fake(grad, q, k, v, out, lse, mask, is_causal, scale):
    return rotated_like(q), rotated_like(k), rotated_like(v)


define(
    "scaled_dot_product_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale) -> (Tensor out, Tensor lse)",
    reference=_reference,
    fake=_fake,
    cuda=False,
)
define(
    "scaled_dot_product_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask, bool is_causal, float scale) "
    "-> (Tensor q, Tensor k, Tensor v)",
    reference=_backward_reference,
    fake=_backward_fake,
    cuda=False,
)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    q, k, v, mask, ctx.is_causal, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, mask)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_lse):
    refuse_double_backward("scaled_dot_product_attention")
    if grad is None:
        return None, None, None, None, None, None
    q, k, v, out, lse, mask = ctx.saved_tensors
    grads = _ops.scaled_dot_product_attention_backward(grad, q, k, v, out, lse, mask, ctx.is_causal, ctx.scale)
    wanted = [value if needs else None for value, needs in zip(grads, ctx.needs_input_grad[:3], strict=True)]
    return *wanted, None, None, None


_attention = register_autograd("scaled_dot_product_attention", _backward, setup_context=_setup_context)


# --- public -----------------------------------------------------------------------------------------------------------


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Optional[Tensor] = None,
    *,
    is_causal: bool = False,
    scale: Optional[float] = None,
) -> Tensor:
    """``softmax(scale q kᵀ) v``, as :func:`torch.nn.functional.scaled_dot_product_attention` without dropout.

    Args:
        q: ``[B, H, T, D]``, float32, bfloat16 or float16. k: ``[B, Hkv, S, D]``, v: ``[B, Hkv, S, Dv]``, of q's dtype;
            H is a multiple of Hkv, whose heads serve so many of q's. All are read where they lie if each head is in one
            piece, as in ``[B, T, H, D].transpose(1, 2)``.
        mask: bools ``[B or 1, H or 1, T or 1, S or 1]``, True where a query sees a key; None: it sees them all. A query
            that sees nothing gives zeros.
        is_causal: query i sees the keys j <= i; without a mask.
        scale: above 0; None: 1 / √D.

    Returns: ``[B, H, T, Dv]`` of q's dtype, ``[B, T, H, Dv]`` in memory. Products of bfloat16 where the CPU multiplies
    it, with the probabilities rounded to it, else in float32; sums in float32. Gradients flow to q, k and v. On a GPU
    it is PyTorch's own.

    Raises: TypeError or ValueError that names the argument, what came and what was wanted.

    Source: Attention Is All You Need (arXiv 1706.03762); the backward: FlashAttention-2 (arXiv 2307.08691).
    """
    op = "scaled_dot_product_attention"
    for argument, value in (("q", q), ("k", k), ("v", v)):
        checks.check_float(op, argument, value)
    if (dtype := checks.autocast_dtype(q)) is not None:
        q, k, v = (value.to(dtype) for value in (q, k, v))
    checks.check_attention(op, q, k, v, mask, is_causal, scale)
    scale = 1 / math.sqrt(max(q.shape[3], 1)) if scale is None else scale
    if checks.any_float64(q):
        return in_float64(reference.scaled_dot_product_attention, q, k, v, mask, is_causal, scale)[0]
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=True)
    return _attention(q, k, v, mask, is_causal, scale)[0]
