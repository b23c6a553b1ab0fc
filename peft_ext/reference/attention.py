"""Scaled dot-product attention, in plain PyTorch.

    S = scale q kᵀ + bias      P = softmax(S) over the keys that a query may see      out = (D ∘ P) v
    lse = ln Σ exp(S)      D = 1 / (1 - p) for the keys that dropout keeps, 0 for dropped keys; D = 1 without dropout

Sources: Attention Is All You Need (arXiv 1706.03762); for the backward from lse, FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .common import dropped, sum_dtype

__all__ = ["scaled_dot_product_attention", "scaled_dot_product_attention_backward"]


def seen(q: Tensor, k: Tensor, mask: Optional[Tensor], is_causal: bool) -> Tensor:
    """Returns a bool tensor ``[B or 1, H or 1, T, S]``: True where a query may attend to a key."""
    queries, keys = q.shape[2], k.shape[2]
    found = torch.ones((1, 1, queries, keys), dtype=torch.bool, device=q.device)
    if is_causal:
        found = found.tril()
    return found if mask is None else found & mask


def _scores(
    q: Tensor, k: Tensor, mask: Optional[Tensor], is_causal: bool, scale: float, bias: Optional[Tensor]
) -> Tensor:
    scores = (q @ k.mT) * scale
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return scores.masked_fill(~seen(q, k, mask, is_causal), float("-inf"))


def _dropped(x: Tensor, p: float, seed: Optional[Tensor]) -> Tensor:
    """Returns D ∘ x for ``x [B, H, T, S]``; D is 1 / (1 - p) for a key that dropout keeps, and 0 for a dropped key. The
    elements of the dropout's mask are numbered in the order of the transposed layout ``[B, H, S, T]``."""
    return dropped(x.mT, p, seed).mT


def _per_head(x: Tensor, heads: int, wide: torch.dtype) -> Tensor:
    return x.to(wide).repeat_interleave(heads // x.shape[1] if x.shape[1] else 1, 1)


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Optional[Tensor],
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """Returns ``(out, lse [B, H, T])`` of :func:`peft_ext.ops.scaled_dot_product_attention`.

    For a query that may attend to no key, out and lse are 0. Gradients come from PyTorch's autograd.
    """
    wide, heads = sum_dtype(q.dtype), q.shape[1]
    wide_k, wide_v = (_per_head(x, heads, wide) for x in (k, v))
    scores = _scores(q.to(wide), wide_k, mask, is_causal, scale, bias)
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    probabilities = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_zeros(scores.shape[:3])
    return (_dropped(probabilities, dropout_p, seed) @ wide_v).to(q.dtype), lse.masked_fill(blind[..., 0], 0)


def scaled_dot_product_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Optional[Tensor],
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v: ``dV = (D ∘ P)ᵀ dO``, ``dS = P ∘ (D ∘ (dO vᵀ) - Σ dO ∘ out)``, ``dQ = scale
    dS k``, ``dK = scale dSᵀ q``. The probabilities P are computed from the scores S and their log-sum-exp lse. The
    gradients of k and v are summed over the query heads that share a key head.
    """
    wide, heads = sum_dtype(q.dtype), q.shape[1]
    wide_k, wide_v = (_per_head(x, heads, wide) for x in (k, v))
    wide_q, wide_grad = q.to(wide), grad.to(wide)
    scores = _scores(wide_q, wide_k, mask, is_causal, scale, bias)
    probabilities = (scores - lse.to(wide).unsqueeze(-1)).exp()
    delta = (wide_grad * out.to(wide)).sum(-1, keepdim=True)
    of_scores = probabilities * (_dropped(wide_grad @ wide_v.mT, dropout_p, seed) - delta)

    def of_groups(x: Tensor) -> Tensor:
        return x.unflatten(1, (k.shape[1], -1)).sum(2) if k.shape[1] else x

    grad_q = scale * (of_scores @ wide_k)
    grad_k = scale * of_groups(of_scores.mT @ wide_q)
    return (
        grad_q.to(q.dtype),
        grad_k.to(k.dtype),
        of_groups(_dropped(probabilities, dropout_p, seed).mT @ wide_grad).to(v.dtype),
    )
