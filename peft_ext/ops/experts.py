"""The linear layers of a mixture of experts over rows that are sorted by expert, with LoRA for each expert or without.

    x̃_t = mask/(1-p) ∘ x_t      S_t = x̃_t A_eᵀ      Y_t = x_t W_eᵀ + s · S_t B_eᵀ + b_e        t a row of expert e

Backward, over the rows of each expert: ``P = s · dY B_e``; ``dX = dY W_e + mask/(1-p) ∘ (P A_e)``; ``dA_e = Pᵀ x̃``;
``dB_e = s · dYᵀ S``; ``db_e = Σ dY``. Saved: x, S and the seed. No weight but its own is read for a row, no sum
W + s B A is made, and an expert without rows costs nothing.

On the CPU one loop over the experts, on all threads. On a GPU one product for all experts, which decodes an NF4 weight
on its way and takes the low-rank term and the bias before its one rounding; how many rows an expert has is read on the
device alone, so that nothing waits for it.

Sources: LoRA (arXiv 2106.09685); mixtures of experts (arXiv 1701.06538).
"""

from __future__ import annotations

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import common
from ..reference import experts as reference
from ..weight import NF4Weight
from . import checks
from .library import NAMESPACE, WEIGHT, define, in_float64, register_autograd
from .nf4 import refuse_double_backward

__all__ = ["experts_linear", "lora_experts"]

_ops = getattr(torch.ops, NAMESPACE)
_ADAPTERS = "Tensor offsets, Tensor? lora_A, Tensor? lora_B"
_SCALE = "float scaling, float dropout_p, Tensor? seed"


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _forward(x, *args):
    *weight, bias, offsets, lora_A, lora_B, scaling, dropout_p, seed = args
    held = checks.unpack_weight(*weight, x.dtype)
    y = x.new_zeros(x.shape[0], weight[-1][1])
    s = x.new_zeros(0 if lora_A is None else (x.shape[0], lora_A.shape[1]), dtype=common.sum_dtype(x.dtype))
    for expert, rows in reference.runs(offsets):
        own, b = reference.weight_of(held, expert), None if bias is None else bias[expert]
        if lora_A is not None:
            y[rows], s[rows] = _ops.lora_linear(
                x[rows], *checks.weight_args(own), b, lora_A[expert].contiguous(), lora_B[expert].contiguous(), None,
                scaling, dropout_p, reference.seed_of(seed, expert),
            )  # fmt: skip
        elif isinstance(own, NF4Weight):
            y[rows] = _ops.nf4_linear(x[rows], *own.op_args(), b)
        else:
            y[rows] = F.linear(x[rows], own, b)
    return y, s


def _forward_fake(x, *args):
    *weight, _bias, _offsets, lora_A, _lora_B, _scaling, _dropout_p, _seed = args
    s = x.new_empty(0 if lora_A is None else (x.shape[0], lora_A.shape[1]), dtype=common.sum_dtype(x.dtype))
    return x.new_empty(x.shape[0], weight[-1][1]), s


def _backward_reference(grad, x, *args):
    *weight, offsets, lora_A, lora_B, s, scaling, dropout_p, seed, needs_grad_x = args
    held = checks.unpack_weight(*weight, x.dtype)
    grad_x = torch.zeros_like(x) if needs_grad_x else x.new_empty(0)
    none = x.new_empty(0, dtype=torch.float32)
    grads = [none.clone() if value is None else torch.zeros_like(value) for value in (lora_A, lora_B)]
    for expert, rows in reference.runs(offsets):
        own = reference.weight_of(held, expert)
        if lora_A is not None:
            found, grads[0][expert], grads[1][expert], _ = _ops.lora_linear_backward(
                grad[rows], x[rows], *checks.weight_args(own), lora_A[expert].contiguous(),
                lora_B[expert].contiguous(), None, s[rows], scaling, dropout_p, reference.seed_of(seed, expert),
                needs_grad_x,
            )  # fmt: skip
        elif isinstance(own, NF4Weight):
            found = _ops.nf4_linear_backward(grad[rows], *own.op_args())
        else:
            found = grad[rows] @ own
        if needs_grad_x:
            grad_x[rows] = found
    return grad_x, *grads


def _backward_fake(_grad, x, *args):
    *_weight, _offsets, lora_A, lora_B, _s, _scaling, _dropout_p, _seed, needs_grad_x = args
    none = x.new_empty(0, dtype=torch.float32)
    grads = [none.new_empty(0) if value is None else torch.empty_like(value) for value in (lora_A, lora_B)]
    return x.new_empty(x.shape) if needs_grad_x else x.new_empty(0), *grads


define(
    "lora_experts",
    f"(Tensor x, {WEIGHT}, Tensor? bias, {_ADAPTERS}, {_SCALE}) -> (Tensor y, Tensor s)",
    reference=_forward,
    fake=_forward_fake,
)
define(
    "lora_experts_backward",
    f"(Tensor grad, Tensor x, {WEIGHT}, {_ADAPTERS}, Tensor s, {_SCALE}, bool needs_grad_x)"
    " -> (Tensor grad_x, Tensor grad_A, Tensor grad_B)",
    reference=_backward_reference,
    fake=_backward_fake,
)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    x, *weight, bias, offsets, lora_A, lora_B, scaling, dropout_p, seed = inputs
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    ctx.blocksize_shape = weight[5:]
    ctx.scale = (scaling, dropout_p)
    ctx.save_for_backward(x, *weight[:5], offsets, lora_A, lora_B, s, seed)


def _backward(ctx, grad, _grad_s):
    refuse_double_backward("lora_experts")
    if grad is None:
        return (None,) * 15
    x, *weight, offsets, lora_A, lora_B, s, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_x = grad_a = grad_b = grad_bias = None
    if needs[0] or any(needs[10:12]):
        grad_x, grad_a, grad_b = _ops.lora_experts_backward(
            grad, x, *weight, *ctx.blocksize_shape, offsets, lora_A, lora_B, s, *ctx.scale, seed, needs[0]
        )
    if needs[8]:
        grad_bias = _sums(grad, offsets)
    found = (grad_x, *(None,) * 7, grad_bias, None, grad_a, grad_b, None, None, None)
    return tuple(value if need else None for value, need in zip(found, needs, strict=True))


def _sums(grad: Tensor, offsets: Tensor) -> Tensor:
    """Returns the sum of each expert's rows ``[E, N]``, in float32 before it is rounded."""
    ends = torch.arange(grad.shape[0], device=grad.device)
    expert = torch.searchsorted(offsets.contiguous(), ends, right=True)
    sums = grad.new_zeros(offsets.shape[0] + 1, grad.shape[1], dtype=common.sum_dtype(grad.dtype))
    return sums.index_add_(0, expert, grad.to(sums.dtype))[:-1].to(grad.dtype)


_lora_experts = register_autograd("lora_experts", _backward, setup_context=_setup_context)


# --- public -----------------------------------------------------------------------------------------------------------


def lora_experts(
    x: Tensor,
    weight: Union[Tensor, NF4Weight],
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Optional[Tensor] = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Optional[Tensor] = None,
) -> Tensor:
    """``Y_t = x_t W_eᵀ + scaling · (dropout(x_t) A_eᵀ) B_eᵀ + b_e`` for every row t of expert e, over frozen weights.

    Args:
        x: ``[S, K]``, float32, bfloat16 or float16: a row for each token and expert that it goes to, sorted by expert.
        weight: frozen ``[E, N, K]``: a dense tensor of x's dtype and of any strides (one that is stored ``[E, K, N]``
            comes transposed), or an NF4Weight of that shape, see :meth:`peft_ext.NF4Weight.stack`.
        offsets: int32 or int64 ``[E]`` on x's device: where each expert's rows end, ascending. Rows behind the last
            are no expert's: they give zeros and get none.
        lora_A: ``[E, R, K]``; lora_B: ``[E, N, R]``; each of any float dtype and of any strides.
        bias: ``[E, N]`` of x's dtype.
        scaling: a finite number.
        dropout_p: probability to drop an element of x on the low-rank path, ``0 <= p < 1``, in steps of 2^-16.
        training: dropout acts only when True.
        seed: int64 ``[2]`` on x's device for the masks; default: drawn from PyTorch's generator. Expert e's mask is of
            its own rows, with e added to the seed's second number.

    Returns: ``[S, N]`` of x's dtype. Products are summed in float32. Gradients flow to x, lora_A, lora_B and bias, in
    their own dtypes, zeros for an expert without rows; saved for backward: x, S ``[S, R]`` float32 and the seed. Under
    autocast x, bias and a dense weight are cast to the autocast dtype; the adapters keep theirs.

    Raises: TypeError or ValueError that names the argument, what came and what was wanted.

    Sources: LoRA (arXiv 2106.09685), QLoRA (arXiv 2305.14314); mixtures of experts (arXiv 1701.06538).
    """
    return _call("lora_experts", x, weight, offsets, lora_A, lora_B, bias, scaling, dropout_p, training, seed)


def experts_linear(
    x: Tensor, weight: Union[Tensor, NF4Weight], offsets: Tensor, bias: Optional[Tensor] = None
) -> Tensor:
    """``Y_t = x_t W_eᵀ + b_e`` for every row t of expert e, over frozen weights: :func:`lora_experts` without adapters.

    Args, gradients and sources as there. Raises: TypeError or ValueError that names the argument, what came and what
    was wanted.
    """
    return _call("experts_linear", x, weight, offsets, None, None, bias, 1.0, 0.0, False, None)


def _call(op, x, weight, offsets, lora_A, lora_B, bias, scaling, dropout_p, training, seed):
    checks.check_float(op, "x", x)
    x, weight, bias = checks.cast_for_autocast(x, weight, bias)
    checks.check_experts(op, x, weight, offsets, bias)
    if op == "lora_experts":
        checks.check_experts_lora(op, x, weight, lora_A, lora_B)
    checks.check_scale(op, scaling, dropout_p)
    checks.check_seed(op, seed, x)
    offsets = offsets.long()
    if checks.any_float64(x, lora_A, lora_B):
        return in_float64(reference.lora_experts, x, weight, offsets, lora_A, lora_B, bias, scaling=scaling,
                          dropout_p=dropout_p, training=training, seed=seed)  # fmt: skip
    seed = common.dropout_seed(seed, dropout_p, training, x.device)
    args = (bias, offsets, lora_A, lora_B, float(scaling), float(dropout_p), seed)
    return _lora_experts(x, *checks.weight_args(weight), *args)[0]
