"""Cross entropy of a linear layer's outputs. Only the logits of one chunk of tokens are in memory at a time.

    z = softcap(a · (h Wᵀ + s · h̃ Aᵀ Bᵀ + b))  [T, V]        softcap(z) = c tanh(z / c)
    loss_t = (1 - ε)(lse_t - z_t[label]) + ε (lse_t - mean z_t)        lse_t = log Σ_v exp z_t[v]

The adapter's input h̃ is h, the hidden states, or another tensor such as h after a dropout. For the reductions "mean"
and "sum", the forward also computes the gradients, chunk by chunk: the forward overwrites the logits of a chunk with
their gradient, and multiplies this gradient by W. Of the gradients of h, h̃, the bias, lora_A and lora_B, the forward
keeps those that the backward needs. For the reduction "none", the forward keeps the inputs, and the backward computes
the logits again.

Sources: transformers' causal loss, which converts the logits to float32 first; cut cross entropy (arXiv 2411.09009) and
Liger (arXiv 2410.10989) for the loss without the logits; Gemma 2 (arXiv 2408.00118) for the cap.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from .. import _cpu
from ..reference import common
from ..reference import cross_entropy as reference
from ..weights.packed import PackedWeight
from . import checks
from .library import NAMESPACE, WEIGHT, by_reference, define, is_dense, proof, public, register_autograd, tokens
from .nf4 import refuse_double_backward

__all__ = ["linear_cross_entropy"]

_ops = getattr(torch.ops, NAMESPACE)
_REDUCTIONS = ("mean", "sum", "none")
# Maps a device type to the most bytes that the logits of one chunk take by default, apart from rounding up to whole
# tokens. Chunks of CHUNK_BYTES have enough tokens for an efficient product, and take little of a training step's
# memory.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}


def default_chunk(count: int, row: int, device: str) -> int:
    """Returns the default number of tokens in a chunk, for ``count`` tokens whose logits take ``row`` bytes each.

    The tokens are divided into the fewest equal chunks whose logits take at most ``CHUNK_BYTES`` of the device type.
    """
    chunks = -(-count * row // CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]))
    return max(1, -(-count // max(1, chunks)))


# --- schema, forward, fake --------------------------------------------------------------------------------------------


def _forward(hidden, *args):
    *weight, bias, lora_input, lora_A, lora_B, scaling, labels, row_weight = args[:14]
    *loss, chunk, summed = args[14:20]
    needs_hidden, needs_adapter, needs_bias = needs = args[20:]
    x, count = common.rows(hidden), tokens(hidden)
    chunk = chunk or default_chunk(count, weight[-1][0] * hidden.element_size(), hidden.device.type)
    low = x if lora_input is None else common.rows(lora_input)
    apart = lora_input is not None
    losses = x.new_empty(count, dtype=common.sum_dtype(x.dtype))
    grads = _empty_grads(hidden, bias, lora_input, lora_A, lora_B, *needs)
    grad_x, grad_low = (grad.view(grad.numel() // x.shape[1], x.shape[1]) for grad in grads[:2])
    sum_a, sum_b, sum_bias = sums = [torch.zeros_like(grad, dtype=losses.dtype) for grad in grads[2:]]
    memory = None
    for begin in range(0, count, chunk):
        part = slice(begin, min(count, begin + chunk))
        if _plain_product(x, weight):
            memory = x.new_empty((chunk, weight[-1][0])) if memory is None else memory
            logits = torch.mm(x[part], weight[0].t(), out=memory[: part.stop - begin])
            logits = logits if bias is None else logits.add_(bias)
        else:
            logits = _ops.nf4_linear(x[part], *weight, bias)
        s = None
        if lora_A is not None:
            logits, s = _ops.lora_residual(low[part], logits, lora_A, lora_B, None, scaling, 0.0, None)
        row = None if row_weight is None else row_weight[part]
        losses[part] = _ops.cross_entropy_rows(logits, labels[part], row, *loss, any(needs))
        if needs_bias:
            sum_bias += logits.sum(0, dtype=sum_bias.dtype)
        if needs_hidden and _plain_product(x, weight):
            torch.mm(logits, weight[0], out=grad_x[part])
        elif needs_hidden:
            grad_x[part] = _ops.nf4_linear_backward(logits, *weight)
        if lora_A is not None and (needs_hidden or needs_adapter):
            part_low, part_a, part_b, _ = _ops.lora_residual_backward(
                logits, low[part], lora_A, lora_B, None, s, scaling, 0.0, None, needs_hidden
            )
            if needs_adapter:
                sum_a += part_a
                sum_b += part_b
            if needs_hidden and apart:
                grad_low[part] = part_low
            elif needs_hidden:
                grad_x[part] += part_low
    for grad, total in zip(grads[2:], sums, strict=True):
        grad.copy_(total)
    if summed:
        losses = (losses if row_weight is None else losses * row_weight).sum()
    return losses, *grads


def _plain_product(x, weight):
    """Returns whether PyTorch's product, and not peft_ext's kernel, computes the logits.

    PyTorch multiplies with a dense weight, except on a CPU if x has a 16-bit dtype of ``_cpu.widened_dtypes()``, for
    which peft_ext's product replaces PyTorch's.
    """
    return is_dense(weight) and not (x.device.type == "cpu" and x.dtype in _cpu.widened_dtypes())


def _empty_grads(hidden, bias, lora_input, lora_A, lora_B, needs_hidden, needs_adapter, needs_bias):
    """Returns uninitialized tensors for the gradients, in the order of the operator's results. The tensor of a gradient
    that is not needed has no elements.

    The gradient of the bias is float32 (float64 for float64). For float16 inputs the forward sums the bias's gradient
    over all tokens, and only the backward divides the sum by the number of items, so the sum may exceed float16's
    range.
    """
    wanted = ((hidden, needs_hidden), (lora_input, needs_hidden), (lora_A, needs_adapter), (lora_B, needs_adapter))
    grads = [value.new_empty(value.shape) if want and value is not None else hidden.new_empty(0)
             for value, want in wanted]  # fmt: skip
    dtype = common.sum_dtype(hidden.dtype)
    has_bias = needs_bias and bias is not None
    return [*grads, bias.new_empty(bias.shape, dtype=dtype) if has_bias else hidden.new_empty(0, dtype=dtype)]


def _forward_fake(hidden, *args):
    losses = hidden.new_empty(() if args[19] else (tokens(hidden),), dtype=common.sum_dtype(hidden.dtype))
    return losses, *_empty_grads(hidden, *args[7:11], *args[20:])


def _rows_fake(logits, *_args):
    return logits.new_empty(logits.shape[0], dtype=common.sum_dtype(logits.dtype))


# cross_entropy_rows returns the loss of each row of a chunk of logits. With needs_grad, cross_entropy_rows also
# overwrites the logits with row_weight ∘ d loss/d logits.
define(
    "cross_entropy_rows",
    "(Tensor(a!) logits, Tensor labels, Tensor? row_weight, float logit_scale, float softcap, float label_smoothing, "
    "int ignore_index, bool needs_grad) -> Tensor",
    reference=reference.cross_entropy_rows,
    fake=_rows_fake,
    family="cross_entropy",
)
# linear_cross_entropy returns the losses [T] or, with summed, Σ row_weight · loss, and those gradients of Σ row_weight
# · loss that are needed. On every device, linear_cross_entropy calls other operators and has no kernel of its own. With
# chunk 0, linear_cross_entropy chooses the size of a chunk at run time: if torch.compile traced this choice, each
# number of tokens would need a graph of its own.
define(
    "linear_cross_entropy",
    f"(Tensor hidden, {WEIGHT}, Tensor? bias, Tensor? lora_input, Tensor? lora_A, Tensor? lora_B, float scaling, "
    "Tensor labels, Tensor? row_weight, float logit_scale, float softcap, float label_smoothing, int ignore_index, "
    "int chunk, bool summed, bool needs_grad_hidden, bool needs_grad_adapter, bool needs_grad_bias)"
    " -> (Tensor losses, Tensor grad_hidden, Tensor grad_lora_input, Tensor grad_A, Tensor grad_B, Tensor grad_bias)",
    reference=_forward,
    fake=_forward_fake,
    family="cross_entropy",
    composed=True,
)


@proof("cross_entropy")
def _proof(inputs):
    labels = inputs.integers(0, inputs.n, inputs.t)
    labels[::7] = -100
    row_weight = inputs.draw(inputs.t, of=torch.float32)
    for loss in ((1.0, 0.0, 0.0), (0.5, 30.0, 0.1)):
        yield "cross_entropy_rows", (inputs.grad, labels, row_weight, *loss, -100, True)
    adapter = (None, inputs.a, inputs.b, 0.5)
    how = (labels, row_weight, 1.0, 0.0, 0.0, -100, 64, True, True, True, True)
    yield "linear_cross_entropy", (inputs.x, *inputs.dense, inputs.bias, *adapter, *how)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    *grads, summed = *output[1:], inputs[20]
    ctx.mark_non_differentiable(*grads)
    ctx.set_materialize_grads(False)
    ctx.rest = None if summed else (inputs[6:8], inputs[12:13], inputs[15:20])
    tensors = (*inputs[:6], *inputs[8:12], inputs[13])
    ctx.save_for_backward(*(grads if ctx.rest is None else tensors))


def _backward(ctx, grad, *_):
    refuse_double_backward("linear_cross_entropy")
    if grad is None:
        return (None,) * 24
    needs = ctx.needs_input_grad
    if ctx.rest is None:
        grad_hidden, grad_low, grad_a, grad_b, grad_bias = (_scaled(value, grad) for value in ctx.saved_tensors)
    else:
        *operands, labels = ctx.saved_tensors
        blocksize_shape, scaling, loss = ctx.rest
        wanted = (needs[0] or needs[9], needs[10] or needs[11], needs[8])
        _, grad_hidden, grad_low, grad_a, grad_b, grad_bias = _ops.linear_cross_entropy(
            *operands[:6], *blocksize_shape, *operands[6:], *scaling, labels, grad.contiguous(), *loss, True, *wanted
        )
    found = (grad_hidden, *(None,) * 7, grad_bias, grad_low, grad_a, grad_b, *(None,) * 12)
    return tuple(value if need else None for value, need in zip(found, needs, strict=True))


def _scaled(value: Tensor, grad: Tensor) -> Tensor:
    """Returns ``value`` times ``grad``; ``grad`` is one number, the gradient of the loss.

    A zero in ``value`` stays a zero, also if ``grad`` is infinite. If the loss is divided by 0 items, ``grad`` is
    infinite, and zero times infinity would be NaN. If all tokens are ignored, PyTorch's cross entropy, too, gives each
    token the gradient 0.
    """
    scaled = value.to(grad.dtype) * grad
    return scaled.masked_fill_(value == 0, 0.0).to(value.dtype)


_linear_cross_entropy = register_autograd("linear_cross_entropy", _backward, setup_context=_setup_context)


# --- public -----------------------------------------------------------------------------------------------------------


@public("cross_entropy_rows")
def linear_cross_entropy(
    hidden: Tensor,
    weight: Union[Tensor, PackedWeight],
    labels: Tensor,
    bias: Optional[Tensor] = None,
    *,
    lora_A: Optional[Tensor] = None,
    lora_B: Optional[Tensor] = None,
    lora_input: Optional[Tensor] = None,
    scaling: float = 1.0,
    logit_scale: float = 1.0,
    softcap: Optional[float] = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Union[Tensor, int, None] = None,
    chunk: Optional[int] = None,
) -> Tensor:
    """The cross entropy of ``z = softcap(logit_scale · (h Wᵀ + scaling · h Aᵀ Bᵀ + b))`` and the labels.

    The logits are rounded to hidden's dtype, as a linear layer rounds its result, and then widened to float32, as in
    transformers' loss. The logits of at most ``chunk`` tokens are in memory at once.

    Args:
        hidden: ``[..., K]``, float32, bfloat16 or float16.
        weight: the frozen head ``[V, K]``: a dense tensor of hidden's dtype, or a PackedWeight.
        labels: int64 ``[...]``, 0 to V - 1, or ``ignore_index``. The loss and the gradient of a token with the label
            ``ignore_index`` are 0. The function does not shift the labels: each label belongs to the row of hidden at
            the same position.
        bias: the head's bias b ``[V]`` of hidden's dtype, or None.
        lora_A: ``[R, K]``; lora_B: ``[V, R]``; of any float dtype. Either both lora_A and lora_B are given, or neither
            of them is.
        lora_input: ``[..., K]``, converted to hidden's dtype: the adapter's input instead of hidden, such as
            ``dropout(hidden)``.
        scaling: the adapter's factor, a finite number. logit_scale: the logits' factor, a finite number.
        softcap: c > 0 of ``c tanh(z / c)``; None: no cap.
        label_smoothing: the ε of the loss, from 0 to 1.
        reduction: "mean" over the labels that are not ``ignore_index``, "sum", or "none".
        num_items_in_batch: the divisor of the sum of losses with the reductions "mean" and "sum", for gradient
            accumulation; default: for "mean" the number of labels that are not ``ignore_index``, for "sum" 1. With the
            reduction "none", num_items_in_batch must be None.
        chunk: number of tokens whose logits are computed together; default: the tokens are divided into the fewest
            equal chunks with at most 64 MiB of logits on a CPU, 256 MiB on a GPU, and the chunk is rounded up to whole
            tokens.

    Returns: the loss, float32, of no dimensions, or ``[...]`` where reduction is "none". Gradients flow to hidden,
    lora_input, lora_A, lora_B and bias. Saved for backward: the gradients of hidden, lora_input, lora_A, lora_B and
    bias, which the backward only multiplies by the gradient of the loss; with the reduction "none", the arguments, from
    which the backward computes the logits again. Under autocast hidden, lora_input, bias and a dense weight are cast to
    the autocast dtype.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected. A label out
    of range raises RuntimeError on a CPU. On a GPU a label out of range stops the kernel, as in PyTorch's cross
    entropy: the next call that waits for the GPU raises an error of CUDA, and the process can't use the GPU any more.

    Sources: transformers' causal loss; Gemma 2 (arXiv 2408.00118); cut cross entropy (arXiv 2411.09009).
    """
    op = "linear_cross_entropy"
    checks.check_float(op, "hidden", hidden)
    hidden, weight, bias = checks.cast_for_autocast(hidden, weight, bias)
    checks.check_linear(op, hidden, weight, "hidden")
    checks.check_bias(op, bias, hidden, weight.shape[0], "hidden")
    _check_labels(op, labels, hidden)
    if (lora_A is None) != (lora_B is None):
        raise TypeError(f"{op}: of lora_A and lora_B one is None, wanted both or none")
    if lora_A is not None:
        checks.check_lora(op, weight, lora_A, lora_B)
    if lora_input is not None:
        checks.check_vector(op, "lora_input", lora_input, hidden, tuple(hidden.shape))
        lora_input = lora_input.to(hidden.dtype) if lora_A is not None else None
    softcap = 0.0 if softcap is None else softcap
    _check_loss(op, scaling, logit_scale, softcap, label_smoothing, reduction, num_items_in_batch)
    if chunk is not None:
        checks.check_count(op, "chunk", chunk)
    if checks.wants_reference(hidden, lora_A, lora_B):
        return by_reference(reference.linear_cross_entropy, hidden, weight, labels, bias, lora_A=lora_A, lora_B=lora_B,
                          lora_input=lora_input, scaling=scaling, logit_scale=logit_scale, softcap=softcap,
                          label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction,
                          num_items_in_batch=num_items_in_batch)  # fmt: skip
    summed = reduction != "none"
    needs = [torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in values)
             for values in ((hidden, lora_input), (lora_A, lora_B), (bias,))]  # fmt: skip
    if not summed:
        # With the reduction "none", the backward computes the gradients, because only the backward receives the factor
        # of each token's loss.
        needs = [False] * 3
    # For float16, the gradients of lora_A and lora_B are computed in float32: they are sums over all tokens, which only
    # the backward divides by the number of items, and such a sum may exceed float16's range.
    if hidden.dtype is torch.float16:
        lora_A, lora_B = (value if value is None else value.float() for value in (lora_A, lora_B))
    labels, row_weight = labels.contiguous(), None
    items = num_items_in_batch if num_items_in_batch is not None else (labels != ignore_index).sum()
    divides = reduction == "mean" or num_items_in_batch is not None
    # The forward divides by the number of items, except in float16, where the divided gradients could underflow.
    inside = divides and hidden.dtype is not torch.float16
    if inside:
        row_weight = torch.ones(labels.numel(), dtype=torch.float32, device=hidden.device) / items
    losses = _linear_cross_entropy(
        hidden, *checks.weight_args(weight), bias, lora_input, lora_A, lora_B, float(scaling), labels.view(-1),
        row_weight, float(logit_scale), float(softcap), float(label_smoothing), ignore_index, chunk or 0, summed,
        *needs,
    )[0]  # fmt: skip
    if not summed:
        return losses.view(labels.shape)
    if divides and not torch.compiler.is_compiling() and labels.numel() == 0:
        inside = False  # without tokens, the division below gives NaN (0 / 0), as in PyTorch, if items is 0
    return losses / items if divides and not inside else losses


def _check_labels(op: str, labels: object, hidden: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.dtype is not torch.int64:
        came = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{op}: labels is {came}, wanted a tensor of int64")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"{op}: labels has shape {tuple(labels.shape)}, wanted {tuple(hidden.shape[:-1])}")
    if labels.device != hidden.device:
        raise ValueError(f"{op}: labels is on {labels.device}, hidden is on {hidden.device}")


def _check_loss(
    op: str, scaling: float, logit_scale: float, softcap: float, smoothing: float, reduction: str,
    items: Union[Tensor, int, None],
) -> None:  # fmt: skip
    for argument, value in (("scaling", scaling), ("logit_scale", logit_scale), ("softcap", softcap),
                            ("label_smoothing", smoothing)):  # fmt: skip
        checks.check_scale(op, value, argument=argument)
    if softcap < 0:
        raise ValueError(f"{op}: softcap is {softcap}, wanted more than 0, or None")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing is {smoothing}, wanted 0 to 1")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}, wanted one of {_REDUCTIONS}")
    if reduction == "none" and items is not None:
        raise ValueError(f"{op}: num_items_in_batch is {items}, wanted None with reduction 'none'")
