"""A linear layer over a frozen FP8 weight that quantizes its input to 8-bit floats (e4m3), in plain PyTorch.

    σ[t, j] = max(max_{k in block j} |x[t, k]| / 448, 1e-12)        q[t, k] = e4m3(x[t, k] / σ[t, j])
    x̂[t, k] = q[t, k] · σ[t, j]                                     Y = x̂ Wᵀ + b

Block j has the columns of x that share a scale in W: all columns for a weight with a scale for each row or with one
scale. σ and q are computed in float32 for every dtype of x; e4m3 rounds to nearest, ties to even.

Sources: DeepSeek-V3 (arXiv 2412.19437); transformers' finegrained_fp8 (blocks); compressed-tensors' float-quantized
format with dynamic activations of the strategies "token" and "group".
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights.packed import PackedWeight
from .nf4 import nf4_dequantize

_MAX = torch.finfo(torch.float8_e4m3fn).max
# The least scale of transformers' kernel. A token of zeros has this scale.
_LEAST = 1e-12


def quantize_tokens(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Quantizes ``x [..., K]`` to e4m3, with a scale for each token and block of ``columns`` columns (0: all columns).

    Returns: the codes q, float8_e4m3fn ``[..., K]``, and the scales σ, float32 ``[..., ceil(K / columns)]``. A block
    with an infinity or a NaN decodes to NaN.
    """
    k = x.shape[-1]
    width = min(columns or k, k) or 1
    x = x.float() if x.dtype is torch.float64 else x
    blocks = F.pad(x, (0, -k % width)).unflatten(-1, ((k + width - 1) // width, width))
    scales = (blocks.abs().amax(-1).float() / _MAX).clamp(min=_LEAST)
    codes = (blocks / scales.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return codes.flatten(-2)[..., :k], scales


def decode_tokens(codes: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Returns ``x̂ [..., K]``: the products of codes and scales in float32 (in float64 if ``dtype`` is float64), rounded
    to ``dtype``. ``columns`` is as in :func:`quantize_tokens`."""
    k = codes.shape[-1]
    # Each dtype holds the codes exactly, and PyTorch multiplies with the float32 scales in float32 at least.
    return (codes.to(dtype) * scales.repeat_interleave(min(columns or k, k) or 1, -1)[..., :k]).to(dtype)


def quantized_input(x: Tensor, columns: int) -> Tensor:
    """Returns x̂ in x's dtype. The gradient of x̂ becomes the gradient of x (a straight-through estimate)."""
    quantized = decode_tokens(*quantize_tokens(x.detach(), columns), columns, x.dtype)
    return quantized + (x - x.detach())  # the difference is 0 and carries the gradient


def float8_linear(x: Tensor, weight: PackedWeight, bias: Optional[Tensor] = None) -> Tensor:
    """See :class:`peft_ext.nn.Float8Linear`. For a float64 x, σ and q are those of x rounded to float32, and the
    products are computed in float64. The gradient of x is ``dX = dY W``."""
    return F.linear(quantized_input(x, weight.group), nf4_dequantize(weight, x.dtype), bias)
