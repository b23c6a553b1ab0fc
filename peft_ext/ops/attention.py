"""Scaled dot-product attention on a CPU, forward and backward. Each thread of the CPU kernels holds the scores of one
block of queries and keys at a time. In a forward of at most 8 queries per head, without dropout and bias, a thread
holds the scores of up to four queries and all keys.

    S = scale q kᵀ + bias      P = softmax(S) over the keys that a query may see      out = (D ∘ P) v
    lse = ln Σ exp(S)      D = 1, or with dropout 1 / (1 - p) for the keys that a query keeps, else 0

The backward computes the scores S, the probabilities P and the dropout's factors D again from q, k, the mask, the bias,
lse and the seed: ``dV = (D ∘ P)ᵀ dO``, ``dS = P ∘ (D ∘ (dO vᵀ) - Σ dO ∘ out)``, ``dQ = scale dS k``, ``dK = scale dSᵀ
q``. Saved for the backward: q, k, v, the mask, the bias, the result out, the logarithm lse of the sum of exp(scores)
(one float32 for each query and head) and the seed.

Source: Attention Is All You Need (arXiv 1706.03762); the backward: FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import attention as reference
from ..reference import common
from ..reference.rotary import rotated_like
from . import checks
from .library import NAMESPACE, by_reference, define, is_eager, proof, public, register_autograd
from .nf4 import refuse_double_backward

__all__ = ["scaled_dot_product_attention"]

_ops = getattr(torch.ops, NAMESPACE)
_HOW = "Tensor? mask, bool is_causal, float scale, float dropout_p, Tensor? seed, Tensor? bias"


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _out_like(q: Tensor, v: Tensor) -> Tensor:
    """Returns an uninitialized tensor for the result ``[B, H, T, Dv]``, stored as ``[B, T, H, Dv]``, so that the output
    projection reads the result without a copy."""
    batch, heads, queries, _ = q.shape
    size = v.shape[3]
    strides = (queries * heads * size, size, heads * size, 1)
    return q.new_empty_strided((batch, heads, queries, size), strides)


def _reference(q, k, v, *how):
    out, lse = reference.scaled_dot_product_attention(q, k, v, *how)
    return _out_like(q, v).copy_(out), lse.float()


def _backward_reference(grad, q, k, v, out, lse, *how):
    grads = reference.scaled_dot_product_attention_backward(grad, q, k, v, out, lse, *how)
    return tuple(rotated_like(x).copy_(value) for x, value in zip((q, k, v), grads, strict=True))


def _fake(q, k, v, mask, is_causal, scale, dropout_p, seed, bias):
    return _out_like(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward_fake(grad, q, k, v, out, lse, mask, is_causal, scale, dropout_p, seed, bias):
    return rotated_like(q), rotated_like(k), rotated_like(v)


define(
    "scaled_dot_product_attention",
    f"(Tensor q, Tensor k, Tensor v, {_HOW}) -> (Tensor out, Tensor lse)",
    reference=_reference,
    fake=_fake,
    family="attention",
    cuda=False,
)
define(
    "scaled_dot_product_attention_backward",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_HOW}) -> (Tensor q, Tensor k, Tensor v)",
    reference=_backward_reference,
    fake=_backward_fake,
    family="attention",
    cuda=False,
)


@proof("attention")
def _proof(inputs):
    size, draw = 32, inputs.draw
    q, k, v = (draw(2, 17, heads, size).transpose(1, 2) for heads in (4, 2, 2))
    for how in ((None, True, 0.2, 0.0, None, None), (None, False, 0.2, 0.1, inputs.seed, None)):
        yield "scaled_dot_product_attention", (q, k, v, *how)
        out, lse = _reference(q, k, v, *how)
        grad = draw(*out.shape)
        yield "scaled_dot_product_attention_backward", (grad, q, k, v, out, lse, *how)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    q, k, v, mask, *ctx.how, seed, bias = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, mask, seed, bias)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_lse):
    refuse_double_backward("scaled_dot_product_attention")
    if grad is None:
        return (None,) * 9
    *saved, seed, bias = ctx.saved_tensors
    grads = _ops.scaled_dot_product_attention_backward(grad, *saved, *ctx.how, seed, bias)
    wanted = [value if needs else None for value, needs in zip(grads, ctx.needs_input_grad[:3], strict=True)]
    return *wanted, *(None,) * 6


_attention = register_autograd("scaled_dot_product_attention", _backward, setup_context=_setup_context)


def _near_zero(q: Tensor, k: Tensor, mask: Optional[Tensor], is_causal: bool, bias: Tensor) -> Tensor:
    """Returns the bias, changed as follows: if the largest entry of a row, among the keys that the query sees, is
    finite and beyond ±1,024, this entry is subtracted from all entries of the row.

    Softmax does not change if one number is added to all scores of a row. The backward computes ``P = exp(S - lse)``
    from S and lse in float32. If all entries of a row are about -1e9, as in a row in which a finite mask hides all
    keys, lse, a float32 number near -1e9, is too coarse to also hold the logarithm of the sum of the exponentials.
    """
    # Eager code returns a changed copy of the bias only if the largest entry of some row is beyond ±1,024. Compiled
    # code always makes the copy, because a graph does not branch on the values of a tensor.
    may_ask = not torch.compiler.is_compiling()
    if bias.shape[-1] == 0 or (may_ask and not (is_eager(bias) and _has_far(bias))):
        return bias
    visible = bias
    if mask is not None or is_causal:
        visible = bias.masked_fill(~reference.seen(q, k, mask, is_causal), float("-inf"))
    largest = visible.amax(-1, keepdim=True)
    far = (largest.abs() > 1024) & largest.isfinite()
    if may_ask and not far.any():
        return bias
    return bias - largest.masked_fill(~far, 0.0)


def _has_far(bias: Tensor) -> bool:
    """Returns whether the bias has a finite entry whose absolute value is above 1,024."""
    return bool(((bias.abs() > 1024) & bias.isfinite()).any())


def _as_one(q: Tensor, k: Tensor, mask: Optional[Tensor], is_causal: bool, bias: Tensor) -> Tensor:
    """Returns the bias, the mask and is_causal as one additive mask for PyTorch's ``scaled_dot_product_attention``."""
    seen = reference.seen(q, k, mask, is_causal)
    return bias.to(q.dtype).masked_fill(~seen, float("-inf"))


# --- public -----------------------------------------------------------------------------------------------------------


@public("scaled_dot_product_attention", "scaled_dot_product_attention_backward")
def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Optional[Tensor] = None,
    *,
    is_causal: bool = False,
    scale: Optional[float] = None,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
) -> Tensor:
    """``dropout(softmax(scale q kᵀ + bias)) v``, as :func:`torch.nn.functional.scaled_dot_product_attention`.

    Args:
        q: ``[B, H, T, D]``, float32, bfloat16 or float16. k: ``[B, Hkv, S, D]``, v: ``[B, Hkv, S, Dv]``, of q's dtype.
            H is a multiple of Hkv: each head of k and v serves H / Hkv heads of q. The kernel reads q, k and v without
            a contiguous copy if their last dimension is contiguous, as in ``[B, T, H, D].transpose(1, 2)``.
        mask: bools ``[B or 1, H or 1, T or 1, S or 1]``, True where a query sees a key; None: no mask hides a key. On a
            CPU, the result of a query that sees no key is zero.
        is_causal: True: query i sees only the keys j <= i. If is_causal is True, mask must be None.
        scale: a number above 0; None: 1 / √D.
        dropout_p: probability that a query drops a key, ``0 <= p < 1``, which the kernels round to a multiple of 2^-16.
        training: True: keys are dropped with ``dropout_p``; False: no key is dropped.
        seed: int64 ``[2]`` on q's device or on the CPU for the dropout's mask; default: drawn from PyTorch's generator,
            so that ``torch.manual_seed`` and the RNG state that checkpointing preserves give the same mask again.
        bias: ``[B or 1, H or 1, T or 1, S or 1]``, of any float dtype, added to the scores of the keys that a query
            sees, as T5 adds relative positions. bias gets no gradient: while gradients are enabled, a bias that
            requires a gradient is an error. Where bias is -inf, a query does not see the key.

    Returns: ``[B, H, T, Dv]`` of q's dtype. The CPU kernel stores the result as ``[B, T, H, Dv]``. On an x86-64 CPU
    with AVX512-BF16, most calls multiply bfloat16 operands in bfloat16, after the probabilities are rounded to
    bfloat16; a forward of at most 8 queries per head, without dropout and bias, and other dtypes and CPUs multiply in
    float32. Sums are in float32. Gradients flow to q, k and v. On a GPU PyTorch's ``scaled_dot_product_attention``
    computes the result, with PyTorch's dropout mask; with a dropout and a ``seed``, the reference computes the result
    on a GPU.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Source: Attention Is All You Need (arXiv 1706.03762); the backward: FlashAttention-2 (arXiv 2307.08691).
    """
    op = "scaled_dot_product_attention"
    for argument, value in (("q", q), ("k", k), ("v", v)):
        checks.check_float(op, argument, value)
    if (dtype := checks.autocast_dtype(q)) is not None:
        q, k, v = (checks.cast(value, dtype) for value in (q, k, v))
    checks.check_attention(op, q, k, v, mask, is_causal, scale, bias)
    checks.check_scale(op, 1.0, dropout_p)
    checks.check_seed(op, seed, q)
    scale = 1 / math.sqrt(max(q.shape[3], 1)) if scale is None else scale
    p = float(dropout_p) if training else 0.0
    if q.is_cuda and not checks.wants_reference(q) and not (p and seed is not None):
        if bias is not None:
            mask, is_causal = _as_one(q, k, mask, is_causal, bias), False
        # With a mask and enable_gqa, PyTorch's attention would store all scores.
        if mask is not None and k.shape[1] != q.shape[1]:
            k, v = (value.repeat_interleave(q.shape[1] // value.shape[1], 1) for value in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, p, is_causal, scale=scale, enable_gqa=True)
    seed = common.dropout_seed(seed, dropout_p, training, q.device)
    if bias is not None and torch.is_grad_enabled() and any(value.requires_grad for value in (q, k, v)):
        bias = _near_zero(q, k, mask, is_causal, bias)
    how = (is_causal, scale, float(dropout_p) if seed is not None else 0.0, seed, bias)
    if checks.wants_reference(q):
        return by_reference(reference.scaled_dot_product_attention, q, k, v, mask, *how)[0]
    return _attention(q, k, v, mask, *how)[0]
