"""Linear layers of a mixture of experts over rows that are sorted by expert, in plain PyTorch.

    Y_t = x_t W_eᵀ + s · (dropout(x_t) A_eᵀ) B_eᵀ + b_e        for every row t of expert e
    DoRA multiplies all terms except b_e by g_e = magnitude_e / ‖W_e + s · B_e A_e‖

The adapter is LoRA, DoRA or none.

Sources: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353); mixtures of experts (arXiv 1701.06538).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights.packed import PackedWeight
from .common import dense, dropout_seed, sum_dtype
from .dora import dora_linear, dora_linear_backward, dora_linear_forward, dora_weight_norm
from .lora import lora_linear, lora_linear_backward, lora_linear_forward

__all__ = [
    "dora_experts",
    "dora_experts_weight_norm",
    "lora_experts",
    "lora_experts_backward",
    "lora_experts_forward",
    "runs",
    "seed_of",
    "wanted_experts",
    "weight_of",
]


def runs(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Yields, for each expert that has rows, a tuple of the expert's number and the slice of the expert's rows. Raises
    ValueError if offsets do not ascend."""
    begin = 0
    for expert, end in enumerate(offsets.tolist()):
        if end < begin:
            raise ValueError(f"offsets has {end} after {begin}, wanted the ends of experts' rows in ascending order")
        if end > begin:
            yield expert, slice(begin, end)
        begin = end


def wanted_experts(offsets: Optional[Tensor], count: int) -> Iterable[int]:
    """Returns the numbers of the experts that have rows, or of all ``count`` experts if ``offsets`` is None."""
    return range(count) if offsets is None else (expert for expert, _ in runs(offsets))


def weight_of(weight: Union[Tensor, PackedWeight], expert: int) -> Union[Tensor, PackedWeight]:
    """Returns the weight ``[N, K]`` of an expert, which shares the memory of ``weight``."""
    return weight.expert(expert) if isinstance(weight, PackedWeight) else weight[expert]


def _of(values: Optional[Tensor], expert: Union[int, slice]) -> Optional[Tensor]:
    return None if values is None else values[expert]


def seed_of(seed: Optional[Tensor], expert: int) -> Optional[Tensor]:
    """Returns the dropout seed of an expert: ``seed`` with the expert's number added to the second number of ``seed``.

    Element 0 of an expert's dropout mask is the first element of the first row of this expert.
    """
    return None if seed is None else seed + torch.tensor([0, expert], device=seed.device)


def lora_experts_forward(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    bias: Optional[Tensor],
    offsets: Tensor,
    lora_A: Optional[Tensor],
    lora_B: Optional[Tensor],
    scaling: float,
    dropout_p: float,
    seed: Optional[Tensor],
    out_scale: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(Y [T, N], S [T, R], Z [T, N])`` for T rows of x. The results of rows that belong to no expert are
    zeros.

    S is ``dropout(x_t) A_eᵀ``, and Z is the value that DoRA's g multiplies. With out_scale, which is DoRA's g
    ``[E, N]``, the adapters are DoRA adapters. S (the product with A) is empty without adapters, and Z (the value
    before g) is empty without out_scale.
    """
    wide = sum_dtype(x.dtype)
    y = x.new_zeros(x.shape[0], weight.shape[1])
    s = x.new_zeros(0 if lora_A is None else (x.shape[0], lora_A.shape[1]), dtype=wide)
    z = x.new_zeros(0 if out_scale is None else y.shape)
    for expert, rows in runs(offsets):
        own, b = weight_of(weight, expert), _of(bias, expert)
        scale = (scaling, dropout_p, seed_of(seed, expert))
        if lora_A is None or lora_B is None:
            y[rows] = F.linear(x[rows], dense(own, x.dtype), b)
        elif out_scale is None:
            y[rows], s[rows] = lora_linear_forward(x[rows], own, b, lora_A[expert], lora_B[expert], None, *scale)
        else:
            y[rows], s[rows], z[rows] = dora_linear_forward(
                x[rows], own, b, lora_A[expert], lora_B[expert], out_scale[expert], *scale, False
            )
    return y, s, z


def lora_experts_backward(
    grad: Tensor,
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    offsets: Tensor,
    lora_A: Optional[Tensor],
    lora_B: Optional[Tensor],
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Optional[Tensor],
    out_scale: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, lora_A, lora_B and out_scale, which is DoRA's g.

    The adapter of an expert without rows has zeros as gradients. The gradient of an argument that is None is empty,
    ``[0]``.
    """
    grad_x = torch.zeros_like(x)
    grads = [x.new_zeros(0) if value is None else torch.zeros_like(value) for value in (lora_A, lora_B, out_scale)]
    for expert, rows in runs(offsets):
        own = weight_of(weight, expert)
        scale = (scaling, dropout_p, seed_of(seed, expert))
        if lora_A is None or lora_B is None:
            grad_x[rows] = grad[rows] @ dense(own, x.dtype)
            continue
        adapter = (lora_A[expert], lora_B[expert])
        if out_scale is None:
            found = lora_linear_backward(grad[rows], x[rows], own, *adapter, None, s[rows], *scale)
        else:
            found = dora_linear_backward(grad[rows], x[rows], own, *adapter, out_scale[expert], s[rows],
                                         _of(z, rows), False, *scale, False)  # fmt: skip
            if z is not None:
                grads[2][expert] = found[3]
        grad_x[rows], grads[0][expert], grads[1][expert] = found[:3]
    return grad_x, grads[0], grads[1], grads[2]


def lora_experts(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    offsets: Tensor,
    lora_A: Optional[Tensor] = None,
    lora_B: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Optional[Tensor] = None,
) -> Tensor:
    """See :func:`peft_ext.ops.lora_experts`; gradients come from PyTorch's autograd."""
    seed = dropout_seed(seed, dropout_p, training, x.device)
    parts, end = [], 0
    for expert, rows in runs(offsets):
        own, b, end = weight_of(weight, expert), _of(bias, expert), rows.stop
        if lora_A is None or lora_B is None:
            parts.append(F.linear(x[rows], dense(own, x.dtype), b))
        else:
            parts.append(lora_linear(x[rows], own, lora_A[expert], lora_B[expert], b, scaling=scaling,
                                     dropout_p=dropout_p, training=training, seed=seed_of(seed, expert)))  # fmt: skip
    # The last tensor that is concatenated gives zeros for the rows that belong to no expert. If no expert has a row,
    # this tensor also connects the result with x in the autograd graph.
    return torch.cat([*parts, x[end:, :1] * x.new_zeros(weight.shape[1])])


def dora_experts_weight_norm(
    weight: Union[Tensor, PackedWeight],
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    *,
    offsets: Optional[Tensor] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """See :func:`peft_ext.ops.dora_experts_weight_norm`."""
    dtype = dtype or weight.dtype
    norm = lora_A.new_zeros(weight.shape[:2], dtype=sum_dtype(dtype))
    with torch.no_grad():
        for expert in wanted_experts(offsets, weight.shape[0]):
            own = weight_of(weight, expert)
            norm[expert] = dora_weight_norm(own, lora_A[expert], lora_B[expert], scaling, dtype=dtype)
    return norm


def dora_experts(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Optional[Tensor] = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    weight_norm: Optional[Tensor] = None,
    seed: Optional[Tensor] = None,
) -> Tensor:
    """See :func:`peft_ext.ops.dora_experts`; gradients come from PyTorch's autograd."""
    seed = dropout_seed(seed, dropout_p, training, x.device)
    parts, end = [], 0
    for expert, rows in runs(offsets):
        own, b, end = weight_of(weight, expert), _of(bias, expert), rows.stop
        parts.append(dora_linear(x[rows], own, lora_A[expert], lora_B[expert], magnitude[expert], b, scaling=scaling,
                                 dropout_p=dropout_p, training=training, weight_norm=_of(weight_norm, expert),
                                 seed=seed_of(seed, expert)))  # fmt: skip
    return torch.cat([*parts, x[end:, :1] * x.new_zeros(weight.shape[1])])
