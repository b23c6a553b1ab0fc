"""LoRA over a frozen weight, dense or packed, for a mixed batch, in which each sample has its own adapter or none.

    S_i = x_i A_gᵀ  [tokens, R_g]      Y_i = x_i Wᵀ + s_g S_i B_gᵀ + b  [tokens, N]      g = adapters[i];  -1: none

Backward: for each adapter the backward of :func:`peft_ext.ops.lora_linear` on the adapter's samples. Saved for the
backward: x and S = x Aᵀ, besides the frozen weight and the adapters' A and B.

Source: LoRA (arXiv 2106.09685); many adapters in one batch: Punica (arXiv 2310.18547).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Optional, Union

import torch
from torch import Tensor

from ..reference import common
from ..reference import grouped_lora as reference
from ..weights.packed import PackedWeight
from . import checks
from .library import NAMESPACE, WEIGHT, by_reference, define, proof, public, tokens
from .nf4 import refuse_double_backward, sum_rows

__all__ = ["grouped_lora_linear"]

_ops = getattr(torch.ops, NAMESPACE)


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _forward_reference(x, *args):
    *weight, bias, lora_A, lora_B, scaling, adapters = args
    return reference.grouped_lora_linear_forward(
        x, checks.unpack_weight(*weight, x.dtype), bias, lora_A, lora_B, scaling, adapters
    )


def _forward_fake(x, *args):
    *weight, _bias, lora_A, _lora_B, _scaling, _adapters = args
    s = x.new_empty((tokens(x), max(a.shape[0] for a in lora_A)), dtype=common.sum_dtype(x.dtype))
    return x.new_empty((*x.shape[:-1], weight[-1][0])), s


define(
    "grouped_lora_linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, int[] adapters)"
    " -> (Tensor y, Tensor s)",
    reference=_forward_reference,
    fake=_forward_fake,
    family="grouped_lora",
)


@proof("grouped_lora")
def _proof(inputs):
    t, k, n = inputs.t, inputs.k, inputs.n
    a2, b2 = inputs.draw(40, k, of=torch.float32, scale=k**-0.5), inputs.draw(n, 40, of=torch.float32, scale=0.25)
    groups = [inputs.a, a2], [inputs.b, b2], [0.5, 2.0]
    yield "grouped_lora_linear", (inputs.x.view(2, t // 2, k), *inputs.dense, inputs.bias, *groups, [1, 0])
    few = inputs.draw(3, 1, k)
    for weight in (inputs.dense, inputs.nf4):
        yield "grouped_lora_linear", (few, *weight, inputs.bias, *groups, [1, 0, -1])


# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    x, *weight, _bias, lora_A, lora_B, scaling, adapters = inputs
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    ctx.blocksize_shape = weight[5:]
    ctx.scaling, ctx.adapters = scaling, adapters
    ctx.save_for_backward(x, s, *weight[:5], *lora_A, *lora_B)


def _backward(ctx, grad, _grad_s):
    refuse_double_backward("grouped_lora_linear")
    count, adapters = len(ctx.scaling), ctx.adapters
    x, s, *saved = ctx.saved_tensors
    weight, lora_A, lora_B = (*saved[:5], *ctx.blocksize_shape), saved[5 : 5 + count], saved[5 + count :]
    needs = ctx.needs_input_grad
    grad_a, grad_b = [None] * count, [None] * count
    grad_x = grad_bias = None
    # PyTorch flattens the lists of arguments and of gradients. An empty list has no element, so its gradient is an
    # empty list and not None.
    rest = (None, adapters if not adapters else None)
    if grad is None:
        return (None,) * 9 + (grad_a, grad_b, *rest)
    if needs[0]:
        grad_x = torch.zeros_like(x)
    s = s.view(*x.shape[:-1], s.shape[-1])
    for group in sorted(set(adapters)):
        wanted = group >= 0 and (needs[9][group] or needs[10][group])
        if not (needs[0] or wanted):
            continue
        index = _index(reference.samples_of(adapters, group), x.device)
        part = grad[index]
        if group < 0:
            part_x = _frozen_backward(part, weight)
        else:
            a, b = lora_A[group], lora_B[group]
            rank_s = s[index][..., : a.shape[0]].reshape(-1, a.shape[0])
            part_x, found_a, found_b, _ = _ops.lora_linear_backward(
                part, x[index], *weight, a, b, None, rank_s, ctx.scaling[group], 0.0, None, needs[0]
            )
            grad_a[group] = found_a if needs[9][group] else None
            grad_b[group] = found_b if needs[10][group] else None
        if needs[0]:
            grad_x[index] = part_x
    for group in range(count):  # the gradients of an adapter that no sample uses are zeros
        if needs[9][group] and grad_a[group] is None:
            grad_a[group] = torch.zeros_like(lora_A[group])
        if needs[10][group] and grad_b[group] is None:
            grad_b[group] = torch.zeros_like(lora_B[group])
    if needs[8]:
        grad_bias = sum_rows(grad)
    return (grad_x, *(None,) * 7, grad_bias, grad_a, grad_b, *rest)


def _index(samples: list[int], device: torch.device) -> Union[slice, Tensor]:
    """Returns an index that selects ``samples`` from a batch: for neighbouring samples a slice, which needs no copy to
    the device; for other samples a tensor on ``device``."""
    if samples[-1] - samples[0] + 1 == len(samples):
        return slice(samples[0], samples[-1] + 1)
    return torch.tensor(samples, device=device)


def _frozen_backward(grad: Tensor, weight: tuple) -> Tensor:
    """Returns ``dX = dY W``, the gradient of x through the frozen weight W, for ``grad``, which is dY."""
    if weight[1] is not None:
        return _ops.nf4_linear_backward(grad, *weight)
    with torch.autocast(grad.device.type, enabled=False):
        return grad @ weight[0]


torch.library.register_autograd(f"{NAMESPACE}::grouped_lora_linear", _backward, setup_context=_setup_context)


# --- public -----------------------------------------------------------------------------------------------------------


@public("grouped_lora_linear", "lora_linear_backward")
def grouped_lora_linear(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    adapters: Sequence[int],
    bias: Optional[Tensor] = None,
    *,
    scaling: Sequence[float] = (),
) -> Tensor:
    """``Y_i = x_i Wᵀ + s_g · x_i A_gᵀ B_gᵀ + b`` with ``g = adapters[i]``, over a frozen weight.

    Args:
        x: ``[samples, ..., K]``, float32, bfloat16 or float16.
        weight: frozen ``[N, K]``: a dense tensor of x's dtype, or a PackedWeight.
        lora_A: a list with ``[R_g, K]`` for each adapter g. lora_B: a list with ``[N, R_g]`` for each adapter g. The
            tensors of lora_A and lora_B may have any float dtypes, and the adapters' ranks may differ.
        adapters: for each sample the index of its adapter, or -1 for a sample without an adapter. Neighbouring samples
            of one adapter are multiplied together; on a GPU, all samples of one adapter are multiplied together. For
            ``torch.compile`` the indices are constants: a call with other indices compiles another graph.
        bias: the layer's bias b ``[N]`` of x's dtype, or None.
        scaling: for each adapter the factor of its low-rank term, a finite number; default: ones.

    Returns: ``[samples, ..., N]`` of x's dtype. Products are summed in float32. Gradients flow to x, lora_A, lora_B and
    bias, in their own dtypes; saved for backward, besides the weight and the adapters' A and B: x and ``S = x Aᵀ``
    ``[T, max R]`` in float32. Under autocast x, bias and a dense weight are cast to the autocast dtype, and the
    adapters are not cast.

    An infinity or a NaN in an adapter changes only the results of the samples with this adapter.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Source: LoRA (arXiv 2106.09685); many adapters in one batch: Punica (arXiv 2310.18547).
    """
    op = "grouped_lora_linear"
    checks.check_float(op, "x", x)
    x, weight, bias = checks.cast_for_autocast(x, weight, bias)
    checks.check_linear(op, x, weight)
    for argument, value in (("lora_A", lora_A), ("lora_B", lora_B), ("scaling", scaling)):
        if not isinstance(value, Sequence):
            raise TypeError(f"{op}: {argument} is {type(value).__name__}, wanted a list, one element for each adapter")
    lora_A, lora_B, scaling = list(lora_A), list(lora_B), list(scaling) or [1.0] * len(lora_A)
    if not lora_A or len(lora_B) != len(lora_A) or len(scaling) != len(lora_A):
        raise ValueError(f"{op}: {len(lora_A)} of lora_A, {len(lora_B)} of lora_B and {len(scaling)} of scaling, "
                         "wanted as many, and at least 1")  # fmt: skip
    for a, b, s in zip(lora_A, lora_B, scaling, strict=True):
        checks.check_lora(op, weight, a, b)
        checks.check_scale(op, s)
    checks.check_bias(op, bias, x, weight.shape[0])
    adapters = _checked_adapters(op, adapters, x, len(lora_A))
    if checks.wants_reference(x, *lora_A, *lora_B):
        return by_reference(reference.grouped_lora_linear, x, weight, lora_A, lora_B, adapters, bias, scaling=scaling)
    args = (bias, lora_A, lora_B, [float(s) for s in scaling], adapters)
    return _ops.grouped_lora_linear(x, *checks.weight_args(weight), *args)[0]


def _checked_adapters(op: str, adapters: Sequence[int], x: Tensor, count: int) -> list[int]:
    try:
        adapters = list(adapters)
    except TypeError:
        raise TypeError(f"{op}: adapters is {type(adapters).__name__}, wanted a list of integers") from None
    if x.dim() < 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, wanted [samples, ..., K]")
    if len(adapters) != x.shape[0]:
        raise ValueError(f"{op}: adapters has {len(adapters)} elements, wanted {x.shape[0]}, one for each sample of x")
    found = []
    for group in adapters:
        try:
            found.append(operator.index(group))
        # operator.index of a tensor that is no integer raises TypeError in some versions of torch and RuntimeError in
        # others.
        except (TypeError, RuntimeError):
            raise ValueError(f"{op}: adapters has {group!r}, wanted -1 to {count - 1}") from None
        if not -1 <= found[-1] < count:
            raise ValueError(f"{op}: adapters has {group!r}, wanted -1 to {count - 1}")
    return found
