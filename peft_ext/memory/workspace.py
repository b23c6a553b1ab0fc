"""What this package's operators take for themselves beside their results, at most: a trace can't see it.

A few MB a thread, and the partial sums of an adapter's gradients outside a loss, are not counted.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import _cpu
from .._native import STATE, TILE_PATHS
from ..ops.cross_entropy import CHUNK_BYTES

LOSS = torch.ops.peft_ext.linear_cross_entropy.default
_SIBLINGS = (torch.ops.peft_ext.lora_linears.default, torch.ops.peft_ext.lora_linears_backward.default)
_EXPERTS = (torch.ops.peft_ext.lora_experts.default, torch.ops.peft_ext.lora_experts_backward.default)

# As the CPU's kernels have them: rows of W that are widened together; ranks that are padded to a multiple; tokens whose
# part of an adapter's gradient is summed together, and how many float32 sums of such parts are there at once.
_WIDE_PANEL = 1024
_RANK_STEP = 16
_SUMMED_TOKENS = 64
_MOST_PARTS = 32
_MOST_SUMS = 2**22


def workspace_bytes(func: Any, args: Any, device: str) -> int:
    """Returns what a call of one of this package's operators takes for itself, in bytes.

    Of a linear layer its product, see :func:`_of_product`; in the backward of one that scales its output, or its
    input, the scaled gradient as well. Of a loss, of layers of one input and of experts: see the functions below.
    """
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}
    if func is LOSS:
        return _of_loss(given, device)
    if func in _SIBLINGS:
        return _of_siblings(given, device)
    if func in _EXPERTS:
        return _of_experts(given, device)
    by = given.get("grad", given.get("x"))
    if by is None or "shape" not in given:
        return 0
    backward = "grad" in given
    size = _of_product(given, by.dtype, by.numel() // max(1, by.shape[-1]), device, backward)
    if backward and ("ia3_l" in given or "out_scale" in given):
        feedforward = bool(given.get("feedforward"))
        if not (feedforward and device == "cpu" and by.element_size() == 2):  # of the product above
            size += given["x" if feedforward else "grad"].numel() * by.element_size()
    return size


def _of_product(given: dict[str, Any], dtype: torch.dtype, rows: int, device: str, backward: bool) -> int:
    """Returns the same of ``[rows, K] Wᵀ``, or of ``[rows, N] W`` in the backward.

    On CUDA, and on the CPU in float32, an NF4 weight in the dtype of what it is multiplied with. On the CPU in 16 bits
    the activations as they are multiplied: packed into strips where the package's own tiles multiply, which read the
    weight as it lies; else they, the product and a panel of the weight in float32.
    """
    out_features, in_features = given["shape"]
    drops = bool(given.get("drop_base")) and given.get("seed") is not None
    is_nf4, panel_rows = given.get("absmax") is not None, min(_WIDE_PANEL, out_features)
    if device != "cpu" or dtype.itemsize != 2:
        size = out_features * in_features * dtype.itemsize if is_nf4 else 0
        if device == "cpu" and drops:  # the dropped x, or dY scaled; what is added to the product; W's columns
            size += 4 * (rows * (out_features + in_features) + panel_rows * in_features)
        return size
    products = 2 if drops else 1
    if STATE.isa in TILE_PATHS and dtype is torch.bfloat16:
        if is_nf4 or given["weight"].is_contiguous():
            return products * 2 * rows * (out_features if backward else in_features)
        # PyTorch's product, in 16 bits and then in float32
        return products * 6 * rows * (in_features if backward else out_features) if _scales(given) else 0
    if STATE.isa == "scalar" and products == 1 and not _scales(given):  # PyTorch's own product, onto the other terms
        return out_features * in_features * 2 if is_nf4 else 0
    panel = panel_rows * in_features  # of W, widened; of NF4 decoded to 16 bits first
    size = products * 4 * (rows * (out_features + in_features) + panel) + (2 * panel if is_nf4 else 0)
    # The gradient's columns of a panel, where they are not all.
    return size + (4 * rows * panel_rows if backward and out_features > _WIDE_PANEL else 0)


def _scales(given: dict[str, Any]) -> bool:
    """Returns whether a call's input or output is scaled."""
    return given.get("ia3_l") is not None or given.get("out_scale") is not None


def _of_loss(given: dict[str, Any], device: str) -> int:
    """Returns the same of a loss: of a chunk of tokens the logits, and what their two products take.

    Where an adapter adds to them the logits twice, its gradients' float32 sums over the chunks, a chunk's own part of
    them, and on the CPU lora_B in float32 and the sums that part is made of. A product that is not PyTorch's makes its
    result anew, while the logits of the chunk before are there still.
    """
    hidden, (vocab, features) = given["hidden"], given["shape"]
    dtype, tokens = hidden.dtype, given["labels"].numel()
    row = vocab * dtype.itemsize
    rows = min(given["chunk"] if device == "cpu" else max(1, CHUNK_BYTES[device] // max(1, row)), tokens)
    logits, several = rows * row, rows < tokens
    in_place = given["absmax"] is None and not (device == "cpu" and dtype in _cpu.widened_dtypes())
    forward = backward = 0
    if not in_place:
        forward, backward = (_of_product(given, dtype, rows, device, back) for back in (False, True))
        backward += 2 * rows * features * dtype.itemsize  # dX, and as much in the place of the X that is not given
    elif device == "cpu" and _packs_weight(dtype):
        forward = vocab * features * dtype.itemsize
    if given["lora_A"] is None:
        return logits + max(forward + (logits if several and not in_place else 0), backward)
    held, adds, partial = _of_low_rank(given, rows, several, device)
    base = logits if in_place else 0  # where the product is written, chunk after chunk
    product = (base or logits) + forward + (logits if several else 0)
    return held + max(product, 2 * logits + adds, base + logits + max(backward, partial))


def _packs_weight(dtype: torch.dtype) -> bool:
    """Returns whether PyTorch's product with Wᵀ packs the whole weight.

    Measured on 512 x 1024 @ 1024 x 50000: oneDNN's of bfloat16 does on an AVX-512 without instructions for it (its
    ``gemm:jit``), forward alone. Its kernel that has the instructions packs a block a thread, a CPU without AVX-512
    multiplies in a plain loop, and float16 is either of these.
    """
    return dtype is torch.bfloat16 and not _cpu.multiplies(dtype) and bool(_cpu.capabilities().get("avx512_f"))


def _of_low_rank(given: dict[str, Any], rows: int, several: bool, device: str) -> tuple[int, int, int]:
    """Returns what a loss holds for its adapter's gradients all the time; then what it takes beside that where the
    low-rank term is added to a chunk's logits, and where the chunk's part of the gradients is made."""
    lora_A, lora_B, hidden = given["lora_A"], given["lora_B"], given["hidden"]
    part = lora_A.numel() * lora_A.element_size() + lora_B.numel() * lora_B.element_size()
    low = rows * hidden.shape[-1] * hidden.element_size() if given["needs_grad_hidden"] else 0
    if not (low or given["needs_grad_adapter"]):
        held = part = 0
    else:  # the part before is there while the next one is made
        held = 4 * (lora_A.numel() + lora_B.numel()) * given["needs_grad_adapter"] + several * (part + low)
    if device != "cpu":
        return held, 0, part + low
    ranks = -(-lora_A.shape[0] // _RANK_STEP) * _RANK_STEP
    wide = 4 * ranks * lora_B.shape[0]  # lora_B, and as much each of its gradient's sums
    s = 4 * ranks * rows
    if part == 0:
        return held, wide + s, 0
    parts = -(-rows // max(_SUMMED_TOKENS, -(-rows // _MOST_PARTS)))
    beside = 0 if parts == 1 else min(parts, max(1, _MOST_SUMS * 4 // max(4, wide)))
    return held, wide + s, 2 * s + max(2 * wide + max(wide * beside, part), part + low + 4 * ranks * hidden.shape[-1])


def _of_experts(given: dict[str, Any], device: str) -> int:
    """Returns the same of experts: the adapters in one piece, and their gradients; on a GPU the adapters' terms, of up
    to six bytes an element, and the partial sums of their gradients."""
    held = [given[name] for name in ("lora_A", "lora_B") if given[name] is not None]
    if device == "cuda":
        size = sum(6 * value.numel() for value in held)
        return size + sum(4 * value.numel() for value in held) if "grad" in given else size
    # An expert's own part is small beside them.
    size = sum(value.numel() * value.element_size() for value in held if not value.is_contiguous())
    return size * (2 if "grad" in given else 1)


def _of_siblings(given: dict[str, Any], device: str) -> int:
    """Returns the same of layers that are computed together: on the CPU's tiles x once, or the gradients of all; else
    what the largest of them takes."""
    x, sizes = given["x"], given["sizes"]
    packed = [grad for grad in given.get("grads", [x]) if grad is not None]
    if device == "cpu" and x.dtype is torch.bfloat16 and STATE.isa in TILE_PATHS:
        return sum(2 * value.numel() for value in packed)
    largest, inputs = max(sizes[2::4]), sizes[3]
    if device == "cpu" and x.element_size() == 2 and STATE.isa != "scalar":
        rows = x.numel() // max(1, inputs)
        return 4 * (rows * (largest + inputs) + min(_WIDE_PANEL, largest) * inputs)
    return largest * inputs * x.element_size() if any(sizes[1::4]) else 0
