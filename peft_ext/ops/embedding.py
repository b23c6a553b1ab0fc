"""LoRA over a frozen embedding, dense or packed.

    S = A[:, i]ᵀ         Y = W[i] + s · S Bᵀ

Backward: ``P = s · dY B``, ``dA[:, v] = Σ P[t]`` over the t with ``i[t] = v``, ``dB = s · dYᵀ S``. Saved for the
backward: the indices i, lora_A and lora_B.

Source: LoRA (arXiv 2106.09685), in the form of PEFT's ``lora.Embedding``.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from ..reference import embedding as reference
from ..weights.packed import PackedWeight
from . import checks
from .library import NAMESPACE, WEIGHT, by_reference, define, is_eager, proof, public, register_autograd
from .nf4 import refuse_double_backward

__all__ = ["lora_embedding"]

_ops = getattr(torch.ops, NAMESPACE)
_NO_PADDING = -1


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _padding(padding_idx):
    return None if padding_idx == _NO_PADDING else padding_idx


def _reference(indices, *args):
    *weight, lora_A, lora_B, scaling, padding_idx, dtype = args
    weight = checks.unpack_weight(*weight, dtype)
    return reference.lora_embedding(
        indices, weight, lora_A, lora_B, scaling=scaling, padding_idx=_padding(padding_idx)
    ).contiguous()


def _fake(indices, weight, part1, part2, part3, part4, layout, shape, lora_A, lora_B, scaling, padding_idx, dtype):
    return indices.new_empty((*indices.shape, shape[1]), dtype=dtype)


def _backward_reference(grad, indices, lora_A, lora_B, scaling, padding_idx, needs_grad_A, needs_grad_B):
    grad_a, grad_b = reference.lora_embedding_backward(grad, indices, lora_A, lora_B, scaling, _padding(padding_idx))
    return grad_a if needs_grad_A else lora_A.new_empty(0), grad_b if needs_grad_B else lora_B.new_empty(0)


def _backward_fake(grad, indices, lora_A, lora_B, scaling, padding_idx, needs_grad_A, needs_grad_B):
    return lora_A.new_empty(lora_A.shape if needs_grad_A else 0), lora_B.new_empty(lora_B.shape if needs_grad_B else 0)


# In the schema, padding_idx is -1 if there is no padding index, and is not negative otherwise. The argument dtype is
# the dtype of a dense weight, or the dtype to which a packed weight is decoded.
define(
    "lora_embedding",
    f"(Tensor indices, {WEIGHT}, Tensor lora_A, Tensor lora_B, float scaling, int padding_idx, ScalarType dtype)"
    " -> Tensor",
    reference=_reference,
    fake=_fake,
    family="embedding",
    cuda=False,
)
define(
    "lora_embedding_backward",
    "(Tensor grad, Tensor indices, Tensor lora_A, Tensor lora_B, float scaling, int padding_idx, bool needs_grad_A, "
    "bool needs_grad_B) -> (Tensor grad_A, Tensor grad_B)",
    reference=_backward_reference,
    fake=_backward_fake,
    family="embedding",
    cuda=False,
)


@proof("embedding")
def _proof(inputs):
    n, k, dtype = inputs.n, inputs.k, inputs.dtype
    indices = inputs.integers(0, n, 2, inputs.t)
    a, b = inputs.draw(16, n, of=torch.float32), inputs.draw(k, 16, of=torch.float32, scale=0.25)
    for weight, padding_idx in ((inputs.dense, _NO_PADDING), (inputs.nf4, 3)):
        yield "lora_embedding", (indices, *weight, a, b, 0.5, padding_idx, dtype)
        grad = inputs.draw(2, inputs.t, k)
        yield "lora_embedding_backward", (grad, indices, a, b, 0.5, padding_idx, True, True)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    indices, *_weight, lora_A, lora_B, ctx.scaling, ctx.padding_idx, _dtype = inputs
    ctx.save_for_backward(indices, lora_A, lora_B)


def _backward(ctx, grad):
    refuse_double_backward("lora_embedding")
    needs = ctx.needs_input_grad[8:10]
    grad_a, grad_b = _ops.lora_embedding_backward(grad, *ctx.saved_tensors, ctx.scaling, ctx.padding_idx, *needs)
    return (*[None] * 8, grad_a if needs[0] else None, grad_b if needs[1] else None, None, None, None)


_lora_embedding = register_autograd("lora_embedding", _backward, setup_context=_setup_context)


# --- public -----------------------------------------------------------------------------------------------------------


def _check(op: str, indices: Tensor, weight: Union[Tensor, PackedWeight], lora_A: Tensor, lora_B: Tensor) -> None:
    if not isinstance(indices, Tensor):
        raise TypeError(f"{op}: indices is {type(indices).__name__}, wanted a Tensor")
    if indices.dtype not in (torch.int32, torch.int64) or indices.layout is not torch.strided:
        raise TypeError(f"{op}: indices is {str(indices.dtype).removeprefix('torch.')}, {indices.layout}, wanted a "
                        "strided Tensor of int32 or int64")  # fmt: skip
    checks.check_weight(op, weight)
    held = weight.parts[0] if isinstance(weight, PackedWeight) else weight
    if indices.device != held.device:
        raise ValueError(f"{op}: indices is on {indices.device}, weight is on {held.device}")
    checks.check_low_rank(op, (weight.shape[1], weight.shape[0]), held, "weight", lora_A, lora_B)
    # The indices on a GPU are not checked, because the host would have to wait for the GPU. In a compiled call the CPU
    # kernel checks the indices.
    if indices.device.type == "cpu" and indices.numel() and is_eager(indices) and not checks.under_a_transform():
        for index in map(int, indices.aminmax()):
            if not 0 <= index < weight.shape[0]:
                raise IndexError(f"{op}: indices has {index}, wanted 0 to {weight.shape[0] - 1}")


@public("lora_embedding", "lora_embedding_backward")
def lora_embedding(
    indices: Tensor,
    weight: Union[Tensor, PackedWeight],
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    padding_idx: Optional[int] = None,
) -> Tensor:
    """``Y = W[i] + scaling · A[:, i]ᵀ Bᵀ``: LoRA over a frozen embedding, as PEFT's ``lora.Embedding`` computes it.

    Args:
        indices: i ``[...]``, int32 or int64, each from 0 to V - 1.
        weight: W, a frozen table ``[V, N]``: dense float32, bfloat16 or float16, or a PackedWeight. The CPU kernel
            decodes only the rows of a PackedWeight that indices name (of NF4, the blocks that hold a part of these
            rows).
        lora_A: ``[R, V]``; lora_B: ``[N, R]``; each of any float dtype.
        scaling: the factor of the low-rank term, a finite number: ``alpha / R`` (rsLoRA: ``alpha / sqrt(R)``).
        padding_idx: an index, from -V to V - 1, whose column of lora_A gets no gradient, as in
            :func:`torch.nn.functional.embedding`. padding_idx does not change Y.

    Returns: ``[..., N]`` of the weight's dtype, contiguous. Sums are computed in float32, and the result is rounded
    once. Gradients flow to lora_A and lora_B; the gradients are dense tensors of the dtypes of lora_A and lora_B. The
    CPU kernel sums the gradients of repeated indices in order, so that the bits are the same for any number of threads.
    Saved for backward: indices, lora_A and lora_B. Autocast changes nothing. peft_ext has no kernel of lora_embedding
    for a GPU: PyTorch's operators run, which sum the gradient of lora_A in no fixed order.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected. On a CPU, an
    index out of range raises IndexError, or RuntimeError in a compiled call.

    Source: LoRA (arXiv 2106.09685).
    """
    op = "lora_embedding"
    _check(op, indices, weight, lora_A, lora_B)
    checks.check_scale(op, scaling)
    entries = weight.shape[0]
    if padding_idx is not None and not (type(padding_idx) is int and -entries <= padding_idx < entries):
        raise ValueError(f"{op}: padding_idx is {padding_idx!r}, wanted {-entries} to {entries - 1}, or None")
    dense = None if isinstance(weight, PackedWeight) else weight
    if indices.is_cuda or checks.wants_reference(dense, lora_A, lora_B) or weight.dtype == torch.float64:
        return by_reference(reference.lora_embedding, indices, weight, lora_A, lora_B, scaling=scaling,
                            padding_idx=padding_idx)  # fmt: skip
    padding = _NO_PADDING if padding_idx is None else padding_idx % entries
    args = (lora_A, lora_B, float(scaling), padding, weight.dtype)
    return _lora_embedding(indices.long(), *checks.weight_args(weight), *args)
