"""Computes several linear layers of one input in one operator, over frozen weights, dense or packed, each with LoRA or
without an adapter.

    x̃_i = mask_i/(1-p_i) ∘ x      S_i = x̃_i A_iᵀ      Y_i = x W_iᵀ + (S_i∘ρ_i) B_iᵀ + b_i

Backward: ``dX = Σ_i (dY_i W_i + mask_i/(1-p_i) ∘ (P_i A_i))``, and each layer's own gradients as in :mod:`.lora`.
Saved for the backward: x, the product S_i = x̃_i A_iᵀ of each layer, and the seeds, besides the weights and the
adapters.

On the CPU paths whose kernels multiply tiles of bfloat16 (``avx512_bf16``, ``amx``), x is rearranged into tiles once
for all weights that the tile kernels multiply. The layers' terms of dX are summed in float32 and rounded once if the
tile kernels multiply all weights, the call has at most 8 layers, and the panels of the weights fit into a core's cache
together; otherwise the dX of some layers is added to the sum of the dX of preceding layers, which is rounded already.
On a GPU, layers with equal ranks of at most 32 can share their passes over a 16-bit x (see
csrc/linear/cuda/siblings_pass_cuda.cpp): one pass computes the products S_i = x̃_i A_iᵀ of these layers, and one pass
the gradients of their A_i. The backward on a GPU writes the low-rank terms of dX first, and adds the products with the
weights to these terms.

Source: LoRA (arXiv 2106.09685); the projections of one input in a transformer (arXiv 1706.03762).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import common
from ..reference import siblings as reference
from ..weights.packed import PackedWeight
from .layer_lists import LAYERS, NUMBERS, adapters_need, listed, no_rank, own_gradients, places, unpack_layers
from .library import NAMESPACE, below_autograd, by_reference, define, is_dense, proof, public, records_graph, tokens
from .nf4 import refuse_double_backward, sum_rows

__all__ = ["lora_linears"]

_ops = getattr(torch.ops, NAMESPACE)

# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _forward(x, tensors, sizes, numbers):
    ys, ss = [], []
    for weight, bias, lora_A, lora_B, rank_scale, seed, scaling, p in unpack_layers(tensors, sizes, numbers):
        if lora_A is not None:
            y, s = _ops.lora_linear(x, *weight, bias, lora_A, lora_B, rank_scale, scaling, p, seed)
        else:
            y, s = F.linear(x, weight[0], bias) if is_dense(weight) else _ops.nf4_linear(x, *weight, bias), no_rank(x)
        ys.append(y)
        ss.append(s)
    return [*ys, *ss]


def _forward_fake(x, tensors, sizes, numbers):
    layers = unpack_layers(tensors, sizes, numbers)
    ys = [x.new_empty((*x.shape[:-1], weight[-1][0])) for weight, *_ in layers]
    ss = [no_rank(x) if lora_A is None else x.new_empty((tokens(x), lora_A.shape[0]), dtype=common.sum_dtype(x.dtype))
          for _, _, lora_A, *_ in layers]  # fmt: skip
    return [*ys, *ss]


def _backward_reference(grads, x, tensors, sizes, numbers, s, needs_grad_x):
    sum_x, own = None, []
    for grad, (weight, _, lora_A, lora_B, rank_scale, seed, scaling, p), low in zip(
        grads, unpack_layers(tensors, sizes, numbers), s, strict=True
    ):
        part_x, found = None, [no_rank(x) for _ in range(3)]
        if grad is not None and lora_A is not None:
            part_x, *found = _ops.lora_linear_backward(
                grad, x, *weight, lora_A, lora_B, rank_scale, low, scaling, p, seed, needs_grad_x
            )
        elif grad is not None and needs_grad_x:
            part_x = grad @ weight[0] if is_dense(weight) else _ops.nf4_linear_backward(grad, *weight)
        own += found
        if needs_grad_x and part_x is not None:
            sum_x = part_x if sum_x is None else sum_x.add_(part_x)
    if needs_grad_x and sum_x is None:
        sum_x = torch.zeros_like(x)
    return [sum_x if needs_grad_x else x.new_empty(0), *own]


def _backward_fake(grads, x, tensors, sizes, numbers, _s, needs_grad_x):
    own = []
    for grad, (_, _, lora_A, lora_B, rank_scale, *_) in zip(grads, unpack_layers(tensors, sizes, numbers), strict=True):
        for value in (lora_A, lora_B, rank_scale):
            own.append(no_rank(x) if grad is None or value is None else value.new_empty(value.shape))
    return [x.new_empty(x.shape) if needs_grad_x else x.new_empty(0), *own]


define(
    "lora_linears",
    f"(Tensor x, {LAYERS}) -> Tensor[]",
    reference=_forward,
    fake=_forward_fake,
    family="siblings",
)
define(
    "lora_linears_backward",
    f"(Tensor?[] grads, Tensor x, {LAYERS}, Tensor[] s, bool needs_grad_x) -> Tensor[]",
    reference=_backward_reference,
    fake=_backward_fake,
    family="siblings",
)


@proof("siblings")
def _proof(inputs):
    x, grad, a, b = inputs.x, inputs.grad, inputs.a, inputs.b
    (w, *_), (packed, absmax, nested, code, offset, blocksize, shape) = inputs.dense, inputs.nf4
    of_nf4 = [tensor for tensor in (packed, absmax, nested, code, offset) if tensor is not None]
    held = [w, inputs.bias, a, b, inputs.seed, *of_nf4, a, b, w]
    sizes = [0b1011100001, 0, *shape, 0b11000011 | (0b11100 if nested is not None else 0), blocksize, *shape, 1,
             0, *shape]  # fmt: skip
    layers = (held, sizes, [0.5, 0.1, 0.5, 0.0, 1.0, 0.0])
    yield "lora_linears", (x, *layers)
    s = _forward(x, *layers)[3:]
    yield "lora_linears_backward", ([grad, grad, grad], x, *layers, s, True)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    x, tensors, ctx.sizes, ctx.numbers = inputs
    s = output[len(output) // 2 :]
    ctx.mark_non_differentiable(*s)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *tensors, *s)


def _gradients(ctx, grads, needs_x, needs):
    """Returns the gradient of x (None if x needs none), and a list with the gradient, or None, of each tensor in the
    operator's list ``tensors``."""
    refuse_double_backward("lora_linears")
    count = len(ctx.numbers) // NUMBERS
    x, *saved = ctx.saved_tensors
    tensors, s = saved[:-count], saved[-count:]
    grads = grads[:count]
    layers = places(ctx.sizes)
    wanted = [needs_x or need for need in adapters_need(needs, layers)]
    given = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    grad_x = gradients = None
    if any(grad is not None for grad in given):
        grad_x, *gradients = _ops.lora_linears_backward(given, x, tensors, ctx.sizes, ctx.numbers, s, needs_x)
    has_grad = [grad is not None for grad in grads]
    found = own_gradients(needs, layers, has_grad, gradients, lambda i: sum_rows(grads[i]))
    return grad_x if needs_x else None, found


def _backward(ctx, grads):
    return *_gradients(ctx, grads, *ctx.needs_input_grad[:2]), None, None


_kernel = below_autograd(_ops.lora_linears.default)


class _LoraLinears(torch.autograd.Function):
    """The autograd Function of eager calls of lora_linears while gradients are enabled."""

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


@public("lora_linears", "lora_linears_backward")
def lora_linears(
    x: Tensor,
    weights: Sequence[Union[Tensor, PackedWeight]],
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
        weights: frozen ``[N_i, K]`` each: a dense tensor of x's dtype, or a PackedWeight.
        lora_As: ``[R_i, K]`` each; lora_Bs: ``[N_i, R_i]`` each; of any float dtype. For a layer without an adapter,
            the entries of lora_As and lora_Bs are None.
        biases: ``[N_i]`` of x's dtype each, or None.
        rank_scales: ``[R_i]`` of any float dtype each, or None: ones.
        scalings, dropout_ps: a number for each layer, or one number for all layers.
        training: True: the dropouts act, each layer's with its own mask; False: no element of x is dropped.
        seeds: int64 ``[2]`` on x's device or on the CPU each, or None: drawn from PyTorch's generator, in the order of
            the layers.

    Returns: a tuple of ``[..., N_i]`` of x's dtype. Gradients flow to x, lora_As, lora_Bs, rank_scales and biases. The
    backward computes nothing for a layer whose result is not used. Under autocast x, biases and dense weights are cast
    to the autocast dtype, and the adapters are not cast.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Sources: as :func:`lora_linear`.
    """
    call = listed("lora_linears", x, weights, lora_As, lora_Bs, biases, rank_scales, scalings, dropout_ps, training,
                  seeds)  # fmt: skip
    x, (tensors, sizes, numbers), options, is_wide = call
    if is_wide:
        return by_reference(reference.lora_linears, x, weights, lora_As, lora_Bs, training=training, **options)
    count = len(weights)
    if records_graph(x):
        return _LoraLinears.apply(sizes, numbers, x, *tensors)[:count]
    return tuple(_ops.lora_linears(x, tensors, sizes, numbers)[:count])
