"""Cross entropy of a linear layer's outputs, in plain PyTorch, with the logits of all tokens in memory at once.

    z = softcap(a · (h Wᵀ + s · h̃ Aᵀ Bᵀ + b))        softcap(z) = c tanh(z / c)
    loss_t = (1 - ε)(lse_t - z_t[label]) + ε (lse_t - mean z_t)        lse_t = log Σ_v exp z_t[v]

Sources: transformers' causal loss, which casts the logits to float32 first; for softcap, Gemma 2 (arXiv 2408.00118).
"""

from __future__ import annotations

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights.packed import PackedWeight
from .common import dense, rows, sum_dtype
from .lora import lora_residual_forward

__all__ = ["cross_entropy_rows", "linear_cross_entropy"]


def capped(logits: Tensor, scale: float, softcap: float) -> Tensor:
    """Returns ``c tanh(a x / c)`` for the logits x, the factor a and the cap c, or ``a x`` if c is 0, in float32 or
    float64."""
    z = logits.to(sum_dtype(logits.dtype)) * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def cross_entropy_rows(
    logits: Tensor,
    labels: Tensor,
    row_weight: Optional[Tensor],
    scale: float,
    softcap: float,
    smoothing: float,
    ignore_index: int,
    needs_grad: bool,
) -> Tensor:
    """Returns the loss of each row, ``[T]``.

    With ``needs_grad`` the function overwrites ``logits`` with the gradient ``row_weight ∘ d loss / d logits``.
    """
    wide = logits.detach().clone() if needs_grad else logits
    with torch.enable_grad():
        if needs_grad:
            wide.requires_grad_()
        losses = F.cross_entropy(capped(wide, scale, softcap), labels, ignore_index=ignore_index, reduction="none",
                                 label_smoothing=smoothing)  # fmt: skip
        if needs_grad:
            weight = torch.ones_like(losses) if row_weight is None else row_weight
            logits.copy_(torch.autograd.grad(losses, wide, weight.to(losses.dtype))[0])
    return losses.detach()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Union[Tensor, PackedWeight],
    labels: Tensor,
    bias: Optional[Tensor] = None,
    *,
    lora_A: Optional[Tensor] = None,
    lora_B: Optional[Tensor] = None,
    lora_input: Optional[Tensor] = None,
    scaling: float = 1.0,
    logit_scale: float = 1.0,
    softcap: Optional[float] = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Union[Tensor, int, None] = None,
) -> Tensor:
    """See :func:`peft_ext.ops.linear_cross_entropy`; gradients come from PyTorch's autograd."""
    logits = F.linear(rows(hidden), dense(weight, hidden.dtype), bias)
    if lora_A is not None:
        low = rows(hidden if lora_input is None else lora_input)
        logits = lora_residual_forward(low, logits, lora_A, lora_B, None, scaling, 0.0, None)[0]
    losses = F.cross_entropy(capped(logits, logit_scale, softcap or 0.0), labels.reshape(-1), ignore_index=ignore_index,
                             reduction="none", label_smoothing=label_smoothing)  # fmt: skip
    return reduced(losses, labels, ignore_index, reduction, num_items_in_batch)


def reduced(
    losses: Tensor, labels: Tensor, ignore_index: int, reduction: str, num_items_in_batch: Union[Tensor, int, None]
) -> Tensor:
    """Returns the losses of all tokens for reduction "none", else their sum, divided by num_items_in_batch if given.

    Without num_items_in_batch, "mean" divides the sum by the number of labels that are not ignored.
    """
    if reduction == "none":
        return losses.view(labels.shape)
    if num_items_in_batch is not None:
        return losses.sum() / num_items_in_batch
    return losses.sum() / (labels != ignore_index).sum() if reduction == "mean" else losses.sum()
