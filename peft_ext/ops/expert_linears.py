"""Linear layers with rows of their own as one operator, each with LoRA or without: a mixture's experts that are modules
of their own.

    x̃_t = mask_i/(1-p_i) ∘ x_t      S_t = x̃_t A_iᵀ      Y_t = x_t W_iᵀ + (S_t∘ρ_i) B_iᵀ + b_i        t a row of layer i

Backward: as in :mod:`.lora`, of each layer over its own rows. Saved: x, each S and seed. The weights stay where they
are: nothing is copied into a stack of them, as :mod:`.experts` has it.

On the CPU one loop over the layers, on all threads. On other devices one after the other.

Source: LoRA (arXiv 2106.09685); mixtures of experts (arXiv 1701.06538).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

import torch
from torch import Tensor

from ..reference import common
from ..reference import expert_linears as reference
from ..weight import NF4Weight
from .layer_lists import (
    LAYERS,
    NUMBERS,
    adapters_need,
    listed,
    no_rank,
    one_by_one,
    own_gradients,
    places,
    unpack_layers,
)
from .library import NAMESPACE, below_autograd, by_reference, define, records_graph
from .nf4 import refuse_double_backward, sum_rows

__all__ = ["lora_expert_linears"]

_ops = getattr(torch.ops, NAMESPACE)
_OPERATOR = f"Tensor x, SymInt[] rows, {LAYERS}"


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _forward(x, rows, tensors, sizes, numbers):
    ys, ss = [], []
    for own, layer in zip(x.split(list(rows)), one_by_one(tensors, sizes, numbers), strict=True):
        y, s = _ops.lora_linears(own, *layer)
        ys.append(y)
        ss.append(s)
    return [torch.cat(ys), *ss]


def _forward_fake(x, rows, tensors, sizes, numbers):
    layers = unpack_layers(tensors, sizes, numbers)
    ss = [no_rank(x) if lora_A is None else x.new_empty((count, lora_A.shape[0]), dtype=common.sum_dtype(x.dtype))
          for count, (_, _, lora_A, *_) in zip(rows, layers, strict=True)]  # fmt: skip
    (*_, (out, _)), *_ = layers[0]
    return [x.new_empty(x.shape[0], out), *ss]


def _backward_reference(grad, x, rows, tensors, sizes, numbers, s, needs_grad_x):
    grads_x, own = [], []
    parts = (grad.split(list(rows)), x.split(list(rows)), one_by_one(tensors, sizes, numbers), s)
    for own_grad, own_x, layer, own_s in zip(*parts, strict=True):
        grad_x, *found = _ops.lora_linears_backward([own_grad], own_x, *layer, [own_s], needs_grad_x)
        grads_x.append(grad_x)
        own += found
    return [torch.cat(grads_x), *own]


def _backward_fake(_grad, x, _rows, tensors, sizes, numbers, _s, needs_grad_x):
    own = []
    for _, _, lora_A, lora_B, rank_scale, *_ in unpack_layers(tensors, sizes, numbers):
        own += [no_rank(x) if value is None else value.new_empty(value.shape) for value in (lora_A, lora_B, rank_scale)]
    return [x.new_empty(x.shape) if needs_grad_x else x.new_empty(0), *own]


define("lora_expert_linears", f"({_OPERATOR}) -> Tensor[]", reference=_forward, fake=_forward_fake, cuda=False)
define(
    "lora_expert_linears_backward",
    f"(Tensor grad, {_OPERATOR}, Tensor[] s, bool needs_grad_x) -> Tensor[]",
    reference=_backward_reference,
    fake=_backward_fake,
    cuda=False,
)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    x, ctx.rows, tensors, ctx.sizes, ctx.numbers = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *tensors, *output[1:])


def _gradients(ctx, grad, needs_x, needs):
    """Returns the gradients of x and of the tensors."""
    refuse_double_backward("lora_expert_linears")
    if grad is None:
        return None, [None] * len(needs)
    count, layers = len(ctx.numbers) // NUMBERS, places(ctx.sizes)
    x, *saved = ctx.saved_tensors
    grad_x = gradients = None
    if needs_x or any(adapters_need(needs, layers)):
        grad_x, *gradients = _ops.lora_expert_linears_backward(
            grad, x, ctx.rows, saved[:-count], ctx.sizes, ctx.numbers, saved[-count:], needs_x
        )
    parts = grad.split(list(ctx.rows))
    found = own_gradients(needs, layers, [True] * count, gradients, lambda i: sum_rows(parts[i]))
    return grad_x if needs_x else None, found


def _backward(ctx, grads):
    needs_x, _, needs, *_ = ctx.needs_input_grad
    grad_x, found = _gradients(ctx, grads[0], needs_x, needs)
    return grad_x, None, found, None, None


_kernel = below_autograd(_ops.lora_expert_linears.default)


class _LoraExpertLinears(torch.autograd.Function):
    """The same of eager calls, see :func:`.library.register_autograd`."""

    @staticmethod
    def forward(ctx, rows, sizes, numbers, x, *tensors):
        output = _kernel(x, rows, list(tensors), sizes, numbers)
        _setup_context(ctx, (x, rows, tensors, sizes, numbers), output)
        return tuple(output)

    @staticmethod
    def backward(ctx, grad, *_):
        needs_x, *needs = ctx.needs_input_grad[3:]
        grad_x, found = _gradients(ctx, grad, needs_x, needs)
        return None, None, None, grad_x, *found


torch.library.register_autograd(f"{NAMESPACE}::lora_expert_linears", _backward, setup_context=_setup_context)


# --- public -----------------------------------------------------------------------------------------------------------


def lora_expert_linears(
    x: Tensor,
    rows: Sequence[int],
    weights: Sequence[Union[Tensor, NF4Weight]],
    lora_As: Sequence[Optional[Tensor]],
    lora_Bs: Sequence[Optional[Tensor]],
    biases: Optional[Sequence[Optional[Tensor]]] = None,
    *,
    rank_scales: Optional[Sequence[Optional[Tensor]]] = None,
    scalings: Union[float, Sequence[float]] = 1.0,
    dropout_ps: Union[float, Sequence[float]] = 0.0,
    training: bool = False,
    seeds: Optional[Sequence[Optional[Tensor]]] = None,
) -> Tensor:
    """``Y_t = x_t W_iᵀ + scaling_i · (dropout_i(x_t) A_iᵀ ∘ rank_scale_i) B_iᵀ + b_i`` for every row t of layer i:
    :func:`lora_linear` of each layer over its own rows.

    Args:
        x: ``[S, K]``, float32, bfloat16 or float16: the rows of the first layer, those of the second, and so on.
        rows: how many are each layer's, 0 or more; their sum is S.
        weights: frozen ``[N, K]`` each, all of one shape: a dense tensor of x's dtype, or an NF4Weight.
        lora_As, lora_Bs, biases, rank_scales, scalings, dropout_ps, training, seeds: as :func:`lora_linears`. A layer's
            mask is of its own rows.

    Returns: ``[S, N]`` of x's dtype. Products are summed in float32. Gradients flow to x, lora_As, lora_Bs, rank_scales
    and biases, in their own dtypes, zeros for a layer without rows; saved for backward: x, S ``[S, R]`` float32 and the
    seeds. Under autocast x, biases and dense weights are cast to the autocast dtype; the adapters keep theirs.

    Raises: TypeError or ValueError that names the argument, what came and what was wanted.

    Sources: LoRA (arXiv 2106.09685), QLoRA (arXiv 2305.14314); mixtures of experts (arXiv 1701.06538).
    """
    op = "lora_expert_linears"
    call = listed(op, x, weights, lora_As, lora_Bs, biases, rank_scales, scalings, dropout_ps, training, seeds)
    x, (tensors, sizes, numbers), options, is_wide = call
    rows = _checked_rows(op, x, rows, weights)
    if is_wide:
        return by_reference(reference.lora_expert_linears, x, rows, weights, lora_As, lora_Bs, training=training,
                          **options)  # fmt: skip
    if records_graph(x):
        return _LoraExpertLinears.apply(rows, sizes, numbers, x, *tensors)[0]
    return _ops.lora_expert_linears(x, rows, tensors, sizes, numbers)[0]


def _checked_rows(op: str, x: Tensor, rows: Sequence[int], weights: Sequence[Union[Tensor, NF4Weight]]) -> list[int]:
    if x.dim() != 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, wanted [S, {weights[0].shape[1]}]")
    for weight in weights:
        if weight.shape != weights[0].shape:
            raise ValueError(
                f"{op}: weights have shapes {tuple(weights[0].shape)} and {tuple(weight.shape)}, wanted one for all"
            )
    rows = list(rows)
    if len(rows) != len(weights):
        raise ValueError(f"{op}: rows has {len(rows)} entries, wanted {len(weights)}, as weights")
    if any(count < 0 for count in rows) or sum(rows) != x.shape[0]:
        raise ValueError(f"{op}: rows are {rows}, wanted counts that sum to {x.shape[0]}, x's rows")
    return rows
