"""LoRA over a frozen embedding, dense or packed, in plain PyTorch.

    S = A[:, i]ᵀ         Y = W[i] + s · S Bᵀ

Source: LoRA (arXiv 2106.09685), in the form of PEFT's ``lora.Embedding``.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights.nf4 import NESTED_BLOCKSIZE, NF4Weight, nf4_code
from ..weights.packed import PackedWeight
from .common import dense, rows, sum_dtype

__all__ = ["embedding_rows", "lora_embedding", "lora_embedding_backward"]


def embedding_rows(indices: Tensor, weight: Union[Tensor, PackedWeight]) -> Tensor:
    """Returns the rows ``W[i]``, ``[..., N]``. Of an NF4 weight, only the rows that ``indices`` names are decoded; a
    weight in another packed format is decoded whole."""
    columns = weight.shape[1]
    if not isinstance(weight, PackedWeight):
        return F.embedding(indices, weight)
    if not isinstance(weight, NF4Weight):
        return F.embedding(indices, dense(weight, weight.dtype))
    packed, absmax, nested_absmax, nested_table, nested_offset, blocksize, _ = weight.op_args()
    flat = indices.long()[..., None] * columns + torch.arange(columns, device=indices.device)
    byte, block = packed.reshape(-1)[flat // 2], flat // blocksize
    nibble = torch.where(flat % 2 == 0, byte >> 4, byte & 15)
    scale = absmax[block]
    if nested_absmax is not None:
        scale = nested_table[scale.int()] * nested_absmax[block // NESTED_BLOCKSIZE] + nested_offset
    return (nf4_code(packed.device)[nibble.int()] * scale).to(weight.dtype)


def lora_embedding(
    indices: Tensor,
    weight: Union[Tensor, PackedWeight],
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    padding_idx: Optional[int] = None,
) -> Tensor:
    """See :func:`peft_ext.ops.lora_embedding`."""
    base = embedding_rows(indices, weight)
    wide = sum_dtype(torch.promote_types(base.dtype, torch.promote_types(lora_A.dtype, lora_B.dtype)))
    s = F.embedding(indices, lora_A.t(), padding_idx=padding_idx).to(wide)
    return (base.to(wide) + scaling * F.linear(s, lora_B.to(wide))).to(base.dtype)


def lora_embedding_backward(
    grad: Tensor, indices: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, padding_idx: Optional[int] = None
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of lora_A and lora_B.

    With ``P = s · dY B``: ``dA[:, v] = Σ P[t]`` over all t with ``i[t] = v``, and 0 where v is ``padding_idx``;
    ``dB = s · dYᵀ S``.
    """
    wide = sum_dtype(torch.promote_types(grad.dtype, torch.promote_types(lora_A.dtype, lora_B.dtype)))
    g, flat = rows(grad).to(wide), indices.reshape(-1).long()
    p = scaling * (g @ lora_B.to(wide))
    if padding_idx is not None:
        p = p.masked_fill((flat == padding_idx % lora_A.shape[1])[:, None], 0.0)
    grad_a = p.new_zeros(lora_A.shape[1], lora_A.shape[0]).index_add_(0, flat, p)
    grad_b = scaling * (g.t() @ lora_A.to(wide).t()[flat])
    return grad_a.t().to(lora_A.dtype).contiguous(), grad_b.to(lora_B.dtype)
