"""Layers of one input as one operator: LoRA, or none, over frozen weights, dense or NF4.

    x̃_i = mask_i/(1-p_i) ∘ x      S_i = x̃_i A_iᵀ      Y_i = x W_iᵀ + (S_i∘ρ_i) B_iᵀ + b_i

Backward: ``dX = Σ_i (dY_i W_i + mask_i/(1-p_i) ∘ (P_i A_i))``, written once, and each layer's own gradients as in
:mod:`.lora`. Saved: x, each S and seed.

On the CPU x is packed once for all W, and the sum of dX is in float32 as far as the panels of all W fit a core's cache,
but of few tokens, where each layer's is added to dX. On a GPU the forward is that of :func:`lora_linear` layer by
layer, and the terms behind all dropouts are written once, onto which the products go.

Source: LoRA (arXiv 2106.09685); the projections of one input in a transformer (arXiv 1706.03762).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import common
from ..reference import siblings as reference
from ..weight import NF4Weight
from . import checks
from .library import NAMESPACE, below_autograd, define, in_float64, records_graph, tokens
from .nf4 import refuse_double_backward, sum_rows

__all__ = ["lora_linears"]

_ops = getattr(torch.ops, NAMESPACE)

# Of each layer, in a row: those of weight, absmax, nested_absmax, nested_code, nested_offset, bias, lora_A, lora_B,
# rank_scale, seed that it has (autograd knows lists without a None alone); which these are, as bits from the first on,
# blocksize, N, K; scaling, dropout_p. Without lora_A the layer has no adapter.
_TENSORS, _SIZES, _NUMBERS = 10, 4, 2
_LAYERS = "Tensor[] tensors, SymInt[] sizes, float[] numbers"
_BIAS, _LORA_A = 5, 6


def _places(sizes: Sequence) -> list[list[Optional[int]]]:
    """Returns of each layer where in the list each of its ten tensors is; None: it has none."""
    found, at = [], 0
    for i in range(0, len(sizes), _SIZES):
        places: list[Optional[int]] = []
        for j in range(_TENSORS):
            has = bool(sizes[i] >> j & 1)
            places.append(at if has else None)
            at += has
        found.append(places)
    return found


def _layers(tensors: Sequence, sizes: Sequence, numbers: Sequence) -> list[tuple]:
    """Returns of each layer the weight as a schema takes it, bias, lora_A, lora_B, rank_scale, seed, scaling, p."""
    found = []
    for i, places in enumerate(_places(sizes)):
        *weight, bias, lora_A, lora_B, rank_scale, seed = (None if at is None else tensors[at] for at in places)
        _, blocksize, *shape = sizes[i * _SIZES : (i + 1) * _SIZES]
        weight = (*weight, blocksize, shape)
        found.append((weight, bias, lora_A, lora_B, rank_scale, seed, *numbers[i * _NUMBERS : (i + 1) * _NUMBERS]))
    return found


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _no_rank(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=common.sum_dtype(x.dtype))


def _forward(x, tensors, sizes, numbers):
    ys, ss = [], []
    for weight, bias, lora_A, lora_B, rank_scale, seed, scaling, p in _layers(tensors, sizes, numbers):
        if lora_A is not None:
            y, s = _ops.lora_linear(x, *weight, bias, lora_A, lora_B, rank_scale, scaling, p, seed)
        else:
            dense = weight[1] is None
            y, s = F.linear(x, weight[0], bias) if dense else _ops.nf4_linear(x, *weight, bias), _no_rank(x)
        ys.append(y)
        ss.append(s)
    return [*ys, *ss]


def _forward_fake(x, tensors, sizes, numbers):
    layers = _layers(tensors, sizes, numbers)
    ys = [x.new_empty((*x.shape[:-1], weight[-1][0])) for weight, *_ in layers]
    ss = [_no_rank(x) if lora_A is None else x.new_empty((tokens(x), lora_A.shape[0]), dtype=common.sum_dtype(x.dtype))
          for _, _, lora_A, *_ in layers]  # fmt: skip
    return [*ys, *ss]


def _backward_reference(grads, x, tensors, sizes, numbers, s, needs_grad_x):
    sum_x, own = None, []
    for grad, (weight, _, lora_A, lora_B, rank_scale, seed, scaling, p), low in zip(
        grads, _layers(tensors, sizes, numbers), s, strict=True
    ):
        part_x, found = None, [_no_rank(x) for _ in range(3)]
        if grad is not None and lora_A is not None:
            part_x, *found = _ops.lora_linear_backward(
                grad, x, *weight, lora_A, lora_B, rank_scale, low, scaling, p, seed, needs_grad_x
            )
        elif grad is not None and needs_grad_x:
            part_x = grad @ weight[0] if weight[1] is None else _ops.nf4_linear_backward(grad, *weight)
        own += found
        if needs_grad_x and part_x is not None:
            sum_x = part_x if sum_x is None else sum_x.add_(part_x)
    if needs_grad_x and sum_x is None:
        sum_x = torch.zeros_like(x)
    return [sum_x if needs_grad_x else x.new_empty(0), *own]


def _backward_fake(grads, x, tensors, sizes, numbers, _s, needs_grad_x):
    own = []
    for grad, (_, _, lora_A, lora_B, rank_scale, *_) in zip(grads, _layers(tensors, sizes, numbers), strict=True):
        for value in (lora_A, lora_B, rank_scale):
            own.append(_no_rank(x) if grad is None or value is None else value.new_empty(value.shape))
    return [x.new_empty(x.shape) if needs_grad_x else x.new_empty(0), *own]


define(
    "lora_linears",
    f"(Tensor x, {_LAYERS}) -> Tensor[]",
    reference=_forward,
    fake=_forward_fake,
)
define(
    "lora_linears_backward",
    f"(Tensor?[] grads, Tensor x, {_LAYERS}, Tensor[] s, bool needs_grad_x) -> Tensor[]",
    reference=_backward_reference,
    fake=_backward_fake,
)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    x, tensors, ctx.sizes, ctx.numbers = inputs
    s = output[len(output) // 2 :]
    ctx.mark_non_differentiable(*s)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *tensors, *s)


def _gradients(ctx, grads, needs_x, needs):
    """Returns the gradients of x and of the tensors."""
    refuse_double_backward("lora_linears")
    count = len(ctx.numbers) // _NUMBERS
    x, *saved = ctx.saved_tensors
    tensors, s = saved[:-count], saved[-count:]
    grads, found, places = grads[:count], [None] * len(tensors), _places(ctx.sizes)
    adapters = [[at for at in layer[_LORA_A : _LORA_A + 3] if at is not None] for layer in places]
    wanted = [needs_x or any(needs[at] for at in own) for own in adapters]
    given = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    grad_x = None
    if any(grad is not None for grad in given):
        grad_x, *gradients = _ops.lora_linears_backward(given, x, tensors, ctx.sizes, ctx.numbers, s, needs_x)
        for i, own in enumerate(adapters):
            for at, gradient in zip(own, gradients[i * 3 : i * 3 + len(own)], strict=True):
                found[at] = gradient if needs[at] and given[i] is not None else None
    for grad, layer in zip(grads, places, strict=True):
        if (at := layer[_BIAS]) is not None and needs[at] and grad is not None:
            found[at] = sum_rows(grad)
    return grad_x if needs_x else None, found


def _backward(ctx, grads):
    return *_gradients(ctx, grads, *ctx.needs_input_grad[:2]), None, None


_kernel = below_autograd(_ops.lora_linears.default)


class _LoraLinears(torch.autograd.Function):
    """The same of eager calls, see :func:`.library.register_autograd`."""

    @staticmethod
    def forward(ctx, sizes, numbers, x, *tensors):
        output = _kernel(x, list(tensors), sizes, numbers)
        _setup_context(ctx, (x, tensors, sizes, numbers), output)
        return tuple(output)

    @staticmethod
    def backward(ctx, *grads):
        needs_x, *needs = ctx.needs_input_grad[2:]
        grad_x, found = _gradients(ctx, grads, needs_x, needs)
        return None, None, grad_x, *found


torch.library.register_autograd(f"{NAMESPACE}::lora_linears", _backward, setup_context=_setup_context)


# --- public -----------------------------------------------------------------------------------------------------------


def lora_linears(
    x: Tensor,
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
) -> tuple[Tensor, ...]:
    """``Y_i = x W_iᵀ + scaling_i · (dropout_i(x) A_iᵀ ∘ rank_scale_i) B_iᵀ + b_i``: :func:`lora_linear` of each layer.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16.
        weights: frozen ``[N_i, K]`` each: a dense tensor of x's dtype, or an NF4Weight.
        lora_As: ``[R_i, K]`` each; lora_Bs: ``[N_i, R_i]``; of any float dtype; None for both of a layer without one.
        biases: ``[N_i]`` of x's dtype, or None.
        rank_scales: ``[R_i]`` of any float dtype, or None: ones.
        scalings, dropout_ps: of each layer, or one number for all.
        training: dropout acts only when True, with a mask of each layer's own.
        seeds: int64 ``[2]`` each, or None: drawn from PyTorch's generator, in the order of the layers.

    Returns: a tuple of ``[..., N_i]`` of x's dtype. Gradients flow to x, lora_As, lora_Bs, rank_scales and biases; a
    layer whose result is not used costs nothing in the backward. Under autocast x, biases and dense weights are cast to
    the autocast dtype, the adapters keep theirs.

    Raises: TypeError or ValueError that names the argument, what came and what was wanted.

    Sources: as :func:`lora_linear`.
    """
    op, count = "lora_linears", len(weights)
    if count == 0:
        raise ValueError(f"{op}: weights is empty, wanted a weight for each layer")
    checks.check_float(op, "x", x)
    nones: list[None] = [None] * count
    biases, rank_scales, seeds = biases or nones, rank_scales or nones, seeds or nones
    scalings = [scalings] * count if isinstance(scalings, (int, float)) else list(scalings)
    dropout_ps = [dropout_ps] * count if isinstance(dropout_ps, (int, float)) else list(dropout_ps)
    given = {"lora_As": lora_As, "lora_Bs": lora_Bs, "biases": biases, "rank_scales": rank_scales,
             "scalings": scalings, "dropout_ps": dropout_ps, "seeds": seeds}  # fmt: skip
    for argument, values in given.items():
        if len(values) != count:
            raise ValueError(f"{op}: {argument} has {len(values)} entries, wanted {count}, as weights")
    tensors: list[Any] = []
    sizes: list[Any] = []
    numbers: list[float] = []
    wide = checks.any_float64(x, *lora_As, *lora_Bs, *rank_scales)
    if (dtype := checks.autocast_dtype(x)) is not None:
        x = x.to(dtype)
    for weight, bias, lora_A, lora_B, rank_scale, scaling, p, seed in zip(
        weights, biases, lora_As, lora_Bs, rank_scales, scalings, dropout_ps, seeds, strict=True
    ):
        _, weight, bias = checks.cast_for_autocast(x, weight, bias)
        checks.check_linear(op, x, weight)
        checks.check_bias(op, bias, x, weight.shape[0])
        if (lora_A is None) != (lora_B is None):
            raise TypeError(f"{op}: of a layer's lora_A and lora_B one is None, wanted both or none")
        if lora_A is not None:
            checks.check_lora(op, weight, lora_A, lora_B)
        if rank_scale is not None:
            if lora_A is None:
                raise ValueError(f"{op}: rank_scale is given for a layer without lora_A, wanted None")
            checks.check_vector(op, "rank_scale", rank_scale, x, (lora_A.shape[0],))
        checks.check_scale(op, scaling, p)
        checks.check_seed(op, seed, x)
        drops = lora_A is not None and not wide
        seed = common.dropout_seed(seed, p, training, x.device) if drops else None
        *held, blocksize, shape = checks.weight_args(weight)
        layer = [*held, bias, lora_A, lora_B, rank_scale, seed]
        tensors += [value for value in layer if value is not None]
        sizes += [sum(1 << j for j, value in enumerate(layer) if value is not None), blocksize, *shape]
        numbers += [float(scaling), float(p)]
    if wide:
        return in_float64(reference.lora_linears, x, weights, lora_As, lora_Bs, biases, rank_scales=rank_scales,
                          scalings=scalings, dropout_ps=dropout_ps, training=training, seeds=seeds)  # fmt: skip
    if records_graph(x):
        return _LoraLinears.apply(sizes, numbers, x, *tensors)[:count]
    return tuple(_ops.lora_linears(x, tensors, sizes, numbers)[:count])
