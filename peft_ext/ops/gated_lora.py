"""LoRA on the gated activation of an MLP, over a frozen weight, dense or packed: the last layer of a gated MLP.

    h = act(gate) ∘ up  [T, F]      x̃ = dropout(h)      S = x̃ Aᵀ  [T, R]      Y = h Wᵀ + (S∘ρ) Bᵀ + b  [T, N]

ρ = s · rank_scale [R]. Backward: dh, and the gradients of lora_A, lora_B, rank_scale and b, are those of :mod:`.lora`
with h in the place of x; ``dgate = dh ∘ up ∘ act'(gate)``; ``dup = dh ∘ act(gate)``. Saved for the backward: gate, up,
S and the dropout's seed, besides the frozen weight, lora_A, lora_B and rank_scale. The backward computes h and the
dropout mask again.

On a GPU, one pass computes h and S, and one pass computes dgate, dup and the gradient of lora_A, if gate and up have 16
bits, if their rows can be read in vectors of eight, and if the rank is at most 32. These passes do not run in a forward
of few tokens over a packed weight, because the kernels for few tokens compute this product, and not in a backward in
which neither gate nor up needs a gradient. In all other calls, and on the CPU, the kernel of :func:`gated_activation`
computes h first.

Sources: gated units (arXiv 2002.05202), LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from ..reference import common
from ..reference import gated_lora as reference
from ..reference.activations import ACTIVATIONS
from ..weights.packed import PackedWeight
from . import checks
from .activations import activation_number
from .library import NAMESPACE, WEIGHT, by_reference, define, proof, public, register_autograd, tokens
from .nf4 import refuse_double_backward, sum_rows

__all__ = ["gated_lora_linear"]

_ops = getattr(torch.ops, NAMESPACE)
_INPUT = "Tensor gate, Tensor? up, int activation"
_ADAPTER = "Tensor lora_A, Tensor lora_B, Tensor? rank_scale"
_SCALE = "float scaling, float dropout_p, Tensor? seed"


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _forward_reference(gate, up, activation, *args):
    *weight, bias, lora_A, lora_B, rank_scale, scaling, dropout_p, seed = args
    return reference.gated_lora_linear_forward(
        gate, up, ACTIVATIONS[activation], checks.unpack_weight(*weight, gate.dtype), bias, lora_A, lora_B, rank_scale,
        scaling, dropout_p, seed,
    )  # fmt: skip


def _forward_fake(gate, up, _activation, *args):
    *weight, _bias, lora_A, _lora_B, _rank_scale, _scaling, _dropout_p, _seed = args
    s = gate.new_empty((tokens(gate), lora_A.shape[0]), dtype=common.sum_dtype(gate.dtype))
    return gate.new_empty((*gate.shape[:-1], weight[-1][0])), s


def _backward_reference(grad, gate, up, activation, *args):
    *weight, lora_A, lora_B, rank_scale, s, scaling, dropout_p, seed, needs_grad_gate = args
    grad_gate, grad_up, grad_a, grad_b, grad_scale = reference.gated_lora_linear_backward(
        grad, gate, up, ACTIVATIONS[activation], checks.unpack_weight(*weight, gate.dtype), lora_A, lora_B, rank_scale,
        s, scaling, dropout_p, seed,
    )  # fmt: skip
    grad_scale = s.new_empty(0, dtype=torch.float32) if rank_scale is None else grad_scale
    if not needs_grad_gate:
        return gate.new_empty(0), gate.new_empty(0), grad_a, grad_b, grad_scale
    return grad_gate.contiguous(), gate.new_empty(0) if up is None else grad_up.contiguous(), grad_a, grad_b, grad_scale


def _backward_fake(grad, gate, up, _activation, *args):
    *_weight, lora_A, lora_B, rank_scale, s, _scaling, _dropout_p, _seed, needs_grad_gate = args
    grad_gate = gate.new_empty(gate.shape) if needs_grad_gate else gate.new_empty(0)
    grad_up = gate.new_empty(up.shape) if needs_grad_gate and up is not None else gate.new_empty(0)
    grad_scale = s.new_empty(0, dtype=torch.float32) if rank_scale is None else rank_scale.new_empty(rank_scale.shape)
    return grad_gate, grad_up, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape), grad_scale


define(
    "gated_lora_linear",
    f"({_INPUT}, {WEIGHT}, Tensor? bias, {_ADAPTER}, {_SCALE}) -> (Tensor y, Tensor s)",
    reference=_forward_reference,
    fake=_forward_fake,
    family="gated_lora",
)
define(
    "gated_lora_linear_backward",
    f"(Tensor grad, {_INPUT}, {WEIGHT}, {_ADAPTER}, Tensor s, {_SCALE}, bool needs_grad_gate)"
    " -> (Tensor grad_gate, Tensor grad_up, Tensor grad_A, Tensor grad_B, Tensor grad_rank_scale)",
    reference=_backward_reference,
    fake=_backward_fake,
    family="gated_lora",
)


@proof("gated_lora")
def _proof(inputs):
    a, b, grad = inputs.a, inputs.b, inputs.grad
    both = inputs.draw(inputs.t, 2 * inputs.k)
    gate, up = both.chunk(2, -1)
    for weight, p, given in ((inputs.dense, 0.1, (gate, up, 3)), (inputs.nf4, 0.0, (both, None, 0))):
        scale = (0.5, p, inputs.seed if p else None)
        yield "gated_lora_linear", (*given, *weight, inputs.bias, a, b, None, *scale)
        s = _forward_reference(*given, *weight, inputs.bias, a, b, None, *scale)[1]
        yield "gated_lora_linear_backward", (grad, *given, *weight, a, b, None, s, *scale, True)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    gate, up, ctx.activation, *weight, _bias, lora_A, lora_B, rank_scale, scaling, dropout_p, seed = inputs
    ctx.set_materialize_grads(False)
    ctx.blocksize_shape = weight[5:]
    ctx.scale = (scaling, dropout_p)
    ctx.save_for_backward(gate, up, *weight[:5], lora_A, lora_B, rank_scale, output[1], seed)


def _backward(ctx, grad, *_):
    refuse_double_backward("gated_lora_linear")
    if grad is None:
        return (None,) * 17
    gate, up, *weight, lora_A, lora_B, rank_scale, s, seed = ctx.saved_tensors
    needs = ctx.needs
    needs_gate = needs[0] or needs[1]
    grad_gate = grad_up = grad_a = grad_b = grad_scale = None
    if needs_gate or any(needs[11:14]):
        grad_gate, grad_up, grad_a, grad_b, grad_scale = _ops.gated_lora_linear_backward(
            grad, gate, up, ctx.activation, *weight, *ctx.blocksize_shape, lora_A, lora_B, rank_scale, s, *ctx.scale,
            seed, needs_gate,
        )  # fmt: skip
    grad_bias = sum_rows(grad) if needs[10] else None
    found = (
        grad_gate, grad_up, None, None, None, None, None, None, None, None, grad_bias, grad_a, grad_b, grad_scale,
        None, None, None,
    )  # fmt: skip
    return tuple(value if need else None for value, need in zip(found, needs, strict=True))


_gated_lora_linear = register_autograd(
    "gated_lora_linear", _backward, setup_context=_setup_context, trained=(0, 1, 10, 11, 12, 13)
)


# --- public -----------------------------------------------------------------------------------------------------------


@public("gated_lora_linear", "gated_lora_linear_backward")
def gated_lora_linear(
    gate: Tensor,
    up: Optional[Tensor],
    activation: str,
    weight: Union[Tensor, PackedWeight],
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Optional[Tensor] = None,
    *,
    rank_scale: Optional[Tensor] = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Optional[Tensor] = None,
) -> Tensor:
    """``Y = h Wᵀ + scaling · (dropout(h) Aᵀ ∘ rank_scale) Bᵀ + b`` with ``h = act(gate) ∘ up``, over a frozen weight.

    Args:
        gate: ``[..., F]``, float32, bfloat16 or float16.
        up: ``[..., F]`` of gate's dtype, or None if gate is a tensor ``[..., 2F]`` that holds both halves, first gate
            and then up.
        activation: "gelu" (with erf), "gelu_tanh", "relu", "silu" or "relu2" (relu(u)²).
        weight: frozen ``[N, F]``: a dense tensor of gate's dtype, or a PackedWeight.
        lora_A: ``[R, F]``; lora_B: ``[N, R]``; each of any float dtype.
        bias, rank_scale, scaling, dropout_p, training, seed: as in :func:`lora_linear`.

    Returns: ``[..., N]`` of gate's dtype: the result of :func:`lora_linear` for the result h of
    :func:`gated_activation`, which is rounded to gate's dtype. Gradients flow to gate, up, lora_A, lora_B, rank_scale
    and bias; saved for backward, besides the weight and the adapter: gate, up, ``S = dropout(h) Aᵀ`` ``[T, R]`` in
    float32 and the seed; the backward computes h again. Under autocast gate, up, bias and a dense weight are cast to
    the autocast dtype, and the adapter is not cast.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Sources: gated units (arXiv 2002.05202), LoRA (arXiv 2106.09685).
    """
    op = "gated_lora_linear"
    checks.check_gated(op, gate, up)
    kind = activation_number(op, activation)
    if (dtype := checks.autocast_dtype(gate)) is not None:
        gate, up = gate.to(dtype), checks.cast(up, dtype)
    h = gate if up is not None else gate[..., : gate.shape[-1] // 2]  # a tensor of h's shape, dtype and device
    adapter, name = (lora_A, lora_B, bias, scaling, dropout_p), "act(gate) * up"
    _, weight, bias = checks.adapted_operands(op, h, weight, *adapter, name)
    if rank_scale is not None:
        checks.check_vector(op, "rank_scale", rank_scale, h, (lora_A.shape[0],), (lora_A.shape[0], 1), name=name)
    checks.check_seed(op, seed, h)
    if checks.wants_reference(gate, lora_A, lora_B, rank_scale):
        return by_reference(reference.gated_lora_linear, gate, up, activation, weight, lora_A, lora_B, bias,
                          rank_scale=rank_scale, scaling=scaling, dropout_p=dropout_p, training=training,
                          seed=seed)  # fmt: skip
    p = float(dropout_p) if training else 0.0
    seed = common.dropout_seed(seed, p, True, gate.device)
    args = (bias, lora_A, lora_B, rank_scale, float(scaling), p, seed)
    return _gated_lora_linear(gate, up, kind, *checks.weight_args(weight), *args)
