"""Rotary position embedding of queries and keys, in plain PyTorch.

    y = x ∘ cos + rotate_half(x) ∘ sin        rotate_half((x₁, x₂)) = (-x₂, x₁), where x₁, x₂ are halves of a head

Source: RoFormer (arXiv 2104.09864), in the form of transformers' Llama, which rotates halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import sum_dtype

__all__ = ["rotary_embedding", "rotary_embedding_backward", "rotated_like"]


def rotated_like(x: Tensor) -> Tensor:
    """Returns an uninitialized tensor of x's shape: ``torch.empty_like(x)`` if the last stride of this tensor is 1,
    else a contiguous tensor.
    """
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 else x.new_empty(x.shape)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _rotate_half_back(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((second, -first), -1)


def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`peft_ext.ops.rotary_embedding`; gradients come from PyTorch's autograd."""
    wide = sum_dtype(q.dtype)
    cos, sin = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    q_embed, k_embed = ((x.to(wide) * cos + _rotate_half(x.to(wide)) * sin).to(x.dtype) for x in (q, k))
    return q_embed, k_embed


def rotary_embedding_backward(grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of q and k: ``dY ∘ cos + rotate_half⁻¹(dY ∘ sin)``, with
    ``rotate_half⁻¹((y₁, y₂)) = (y₂, -y₁)``."""
    wide = sum_dtype(grad_q.dtype)
    cos, sin = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    grads = ((y.to(wide) * cos + _rotate_half_back(y.to(wide) * sin)).to(y.dtype) for y in (grad_q, grad_k))
    back_q, back_k = grads
    return back_q, back_k
