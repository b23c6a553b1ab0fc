"""Computes an activation, alone or multiplied with a second input, in one pass and in float32.

    y = act(gate) ∘ up        y = act(x)

Backward: ``d gate = dY ∘ up ∘ act'(gate)``, ``d up = dY ∘ act(gate)``. The forward saves only its inputs for the
backward, and the backward computes act(gate) again.

Sources: gated units (arXiv 2002.05202), GELU (arXiv 1606.08415), squared ReLU (arXiv 2109.08668).
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..reference import activations as reference
from . import checks
from .library import NAMESPACE, by_reference, define, proof, public, register_autograd
from .nf4 import refuse_double_backward

__all__ = ["activation", "gated_activation"]

_ops = getattr(torch.ops, NAMESPACE)


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _gated_reference(gate, up, activation):
    return reference.gated_activation_forward(gate, up, reference.ACTIVATIONS[activation]).contiguous()


def _gated_fake(gate, up, activation):
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


def _gated_backward_reference(grad, gate, up, activation):
    grad_gate, grad_up = reference.gated_activation_backward(grad, gate, up, reference.ACTIVATIONS[activation])
    return grad_gate.contiguous(), gate.new_empty(0) if grad_up is None else grad_up.contiguous()


def _gated_backward_fake(grad, gate, up, activation):
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)


def _reference(x, activation):
    return reference.activation(x, reference.ACTIVATIONS[activation]).contiguous()


def _fake(x, activation):
    return x.new_empty(x.shape)


def _backward_reference(grad, x, activation):
    return reference.activation_backward(grad, x, reference.ACTIVATIONS[activation]).contiguous()


def _backward_fake(grad, x, activation):
    return x.new_empty(x.shape)


define(
    "gated_activation",
    "(Tensor gate, Tensor? up, int activation) -> Tensor",
    reference=_gated_reference,
    fake=_gated_fake,
    family="activations",
)
define(
    "gated_activation_backward",
    "(Tensor grad, Tensor gate, Tensor? up, int activation) -> (Tensor grad_gate, Tensor grad_up)",
    reference=_gated_backward_reference,
    fake=_gated_backward_fake,
    family="activations",
)
define("activation", "(Tensor x, int activation) -> Tensor", reference=_reference, fake=_fake, family="activations")
define(
    "activation_backward",
    "(Tensor grad, Tensor x, int activation) -> Tensor",
    reference=_backward_reference,
    fake=_backward_fake,
    family="activations",
)


@proof("activations")
def _proof(inputs):
    x, t, k, draw = inputs.x, inputs.t, inputs.k, inputs.draw
    gate, up = draw(t, 2 * k).chunk(2, -1)
    yield "gated_activation", (gate, up, 3)
    yield "gated_activation_backward", (draw(t, k), gate, up, 3)
    for kind in range(len(reference.ACTIVATIONS)):
        yield "activation", (x, kind)
        yield "activation_backward", (draw(t, k), x, kind)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _gated_setup_context(ctx, inputs, output):
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _gated_backward(ctx, grad):
    refuse_double_backward("gated_activation")
    needs = ctx.needs_input_grad
    grad_gate, grad_up = _ops.gated_activation_backward(grad, *ctx.saved_tensors, ctx.activation)
    return grad_gate if needs[0] else None, grad_up if needs[1] else None, None


def _setup_context(ctx, inputs, output):
    x, ctx.activation = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad):
    refuse_double_backward("activation")
    return _ops.activation_backward(grad, *ctx.saved_tensors, ctx.activation), None


_gated_activation = register_autograd("gated_activation", _gated_backward, setup_context=_gated_setup_context)
_activation = register_autograd("activation", _backward, setup_context=_setup_context)


# --- public -----------------------------------------------------------------------------------------------------------


def activation_number(op: str, activation: str) -> int:
    """Returns the number of an activation in ``reference.ACTIVATIONS``. Operators take this number in place of the
    name, because PyTorch's stable ABI leaks each string argument."""
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}, wanted one of {reference.ACTIVATIONS}")
    return reference.ACTIVATIONS.index(activation)


@public("gated_activation", "gated_activation_backward")
def gated_activation(gate: Tensor, up: Optional[Tensor], activation: str) -> Tensor:
    """``y = act(gate) ∘ up`` in float32, rounded once.

    Args:
        gate: ``[..., F]``, float32, bfloat16 or float16.
        up: ``[..., F]`` of gate's dtype, or None if gate holds both halves. gate and up are not copied if their last
            dimension is contiguous and all neighbouring rows have the same distance, as in the halves of one contiguous
            ``[..., 2F]`` tensor (``gate_up.chunk(2, -1)``). With up None, gate is a tensor ``[..., 2F]``, whose first
            half is the gate and whose second half is up. With up None, the backward writes the gradients of both halves
            into one tensor, which PyTorch would make by a concatenation.
        activation: "gelu" (with erf), "gelu_tanh", "relu", "silu" or "relu2" (relu(u)²).

    Returns: ``[..., F]`` of gate's dtype, contiguous. Gradients flow to gate and up; saved for backward: gate and up
    alone. Unlike PyTorch, this operator does not round act(gate) before the multiplication by up. Autocast changes
    nothing.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Source: gated units (arXiv 2002.05202).
    """
    op = "gated_activation"
    checks.check_gated(op, gate, up)
    kind = activation_number(op, activation)
    if checks.wants_reference(gate):
        return by_reference(reference.gated_activation, gate, up, activation)
    return _gated_activation(gate, up, kind)


@public("activation", "activation_backward")
def activation(x: Tensor, activation: str) -> Tensor:
    """``y = act(x)`` in float32, rounded once.

    Args:
        x: ``[..., F]``, float32, bfloat16 or float16.
        activation: "gelu" (with erf), "gelu_tanh", "relu", "silu" or "relu2" (relu(u)²).

    Returns: ``[..., F]`` of x's dtype, contiguous. The gradient flows to x; saved for backward: x alone.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.
    """
    op = "activation"
    checks.check_float(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x has shape (), wanted [..., F]")
    kind = activation_number(op, activation)
    if checks.wants_reference(x):
        return by_reference(reference.activation, x, activation)
    return _activation(x, kind)
