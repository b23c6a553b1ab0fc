"""Dropout on a CPU. The kernel does not store the dropout's mask: the forward and the backward each compute the mask.

    y = mask ∘ x / (1 - p)        dX = mask ∘ dY / (1 - p)

Whether an element of x is dropped depends only on p, on the seed and on the element's index
(:mod:`peft_ext.reference.philox`). Saved for the backward: the seed.

Source: Dropout (Srivastava et al., JMLR 2014).
"""

from __future__ import annotations

from typing import Optional

import torch.nn.functional as F
from torch import Tensor

from ..reference import common
from ..reference import dropouts as reference
from . import checks
from .library import by_reference, define, proof, public, register_autograd

__all__ = ["dropout"]


def _reference(x, dropout_p, seed):
    return reference.dropout(x, dropout_p, seed).contiguous()


def _fake(x, dropout_p, seed):
    return x.new_empty(x.shape)


define(
    "dropout",
    "(Tensor x, float dropout_p, Tensor seed) -> Tensor",
    reference=_reference,
    fake=_fake,
    family="dropouts",
    cuda=False,
)


@proof("dropouts")
def _proof(inputs):
    yield "dropout", (inputs.x, 0.1, inputs.seed)


def _setup_context(ctx, inputs, output):
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _backward(ctx, grad):
    return _dropout(grad, ctx.p, *ctx.saved_tensors), None, None


_dropout = register_autograd("dropout", _backward, setup_context=_setup_context)


@public("dropout")
def dropout(x: Tensor, dropout_p: float = 0.5, training: bool = True, *, seed: Optional[Tensor] = None) -> Tensor:
    """``mask ∘ x / (1 - p)``, as :func:`torch.nn.functional.dropout`.

    Args:
        x: of any shape, float32, bfloat16 or float16.
        dropout_p: probability to drop an element of x, ``0 <= p < 1``, which the kernels round to a multiple of 2^-16.
        training: False, or dropout_p 0: x itself is returned.
        seed: int64 ``[2]`` on x's device or on the CPU; default: drawn from PyTorch's generator, so that
            ``torch.manual_seed`` and the RNG state that checkpointing preserves give the same mask again.

    Returns: a tensor of x's shape and dtype; x itself if training is False or dropout_p is 0. Each element is rounded
    once. On a CPU, or with a seed, a result other than x itself is contiguous. The gradient flows to x, and the
    gradient can be differentiated again. Saved for backward: the seed. Autocast changes nothing. On a GPU without a
    seed, PyTorch's dropout runs, with PyTorch's mask.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Source: Dropout (Srivastava et al., JMLR 2014).
    """
    op = "dropout"
    checks.check_float(op, "x", x)
    checks.check_scale(op, 1.0, dropout_p)
    checks.check_seed(op, seed, x)
    if x.is_cuda and seed is None and not checks.wants_reference(x):
        return F.dropout(x, float(dropout_p), bool(training))
    if (seed := common.dropout_seed(seed, dropout_p, training, x.device)) is None:
        return x
    if checks.wants_reference(x):
        return by_reference(reference.dropout, x, float(dropout_p), seed).contiguous()
    return _dropout(x, float(dropout_p), seed)
