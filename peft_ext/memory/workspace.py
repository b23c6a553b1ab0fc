"""Bounds the scratch memory that operators allocate in addition to their outputs, and which a trace does not see.

The bounds are upper bounds, but leave out a few MB of scratch memory in each thread. Partial sums of an adapter's
gradients are counted for a loss, and on CUDA for experts, but for no other operator. docs/glossary.md explains path,
tile, strip and panel.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import _cpu
from .._native import STATE, TILE_PATHS
from ..ops.cross_entropy import default_chunk
from ..weights.packed import format_of

LOSS = torch.ops.peft_ext.linear_cross_entropy.default
_SIBLINGS = (torch.ops.peft_ext.lora_linears.default, torch.ops.peft_ext.lora_linears_backward.default)
_GATED = (torch.ops.peft_ext.gated_lora_linear.default, torch.ops.peft_ext.gated_lora_linear_backward.default)
_EXPERTS = (
    torch.ops.peft_ext.lora_experts.default,
    torch.ops.peft_ext.lora_experts_backward.default,
    torch.ops.peft_ext.dora_experts_weight_norm.default,
)

_WIDE_PANEL = 1024  # number of rows of W that a kernel converts to float32 at a time
_SUMMED_TOKENS = 64  # least number of tokens over which a kernel computes a partial sum of an adapter's gradient
# Largest number of parts into which a kernel divides the tokens for partial sums of an adapter's gradient.
_MOST_PARTS = 32
_MOST_SUMS = 2**22  # largest number of float32 elements in all partial sums that exist at once


def workspace_bytes(func: Any, args: Any, device: str) -> int:
    """Returns the scratch bytes of one call of an operator of peft_ext.

    The scratch of a linear layer is the scratch of its product, see :func:`_of_product`. In the backward of a layer
    that scales its output or its input, and on CUDA in the forward of a layer that scales its input, the scratch also
    has the scaled tensor. :func:`_of_loss`, :func:`_of_siblings`, :func:`_of_gated` and :func:`_of_experts` compute the
    scratch of a loss, of siblings, of a layer whose input is a gated activation, and of experts. Any other operator
    that has no argument ``shape``, or neither ``x`` nor ``grad``, counts as 0 bytes.
    """
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}
    if func is LOSS:
        return _of_loss(given, device)
    if func in _SIBLINGS:
        return _of_siblings(given, device)
    if func in _EXPERTS:
        return _of_experts(given, device)
    if func in _GATED:
        return _of_gated(given, device)
    by = given.get("grad", given.get("x"))
    if by is None or "shape" not in given:
        return 0
    backward = "grad" in given
    size = _of_product(given, by.dtype, by.numel() // max(1, by.shape[-1]), device, backward)
    if backward and ("ia3_l" in given or "out_scale" in given):
        feedforward = bool(given.get("feedforward"))
        # For a feed-forward layer of IA3 in 16 bits on the CPU, _of_product has counted the scaled tensor, or the tile
        # kernels scale without such a tensor (case 1 of _of_product).
        if not (feedforward and device == "cpu" and by.element_size() == 2):
            size += given["x" if feedforward else "grad"].numel() * by.element_size()
    elif device != "cpu" and given.get("feedforward"):
        size += by.numel() * by.element_size()
    return size


def _of_product(given: dict[str, Any], dtype: torch.dtype, rows: int, device: str, backward: bool) -> int:
    """Returns the scratch bytes of the product ``[rows, K] Wᵀ``, or of ``[rows, N] W`` in the backward.

    On CUDA, and on the CPU in float32, the scratch is a packed weight decoded to the activations' dtype, or nothing for
    a dense weight. If PEFT's DoRA dropout acts on the base layer's term, on the CPU in float32, the scratch also has
    x after the dropout or the scaled dY, the partial result to which the product is added, and a panel of the weight.
    With PEFT's DoRA dropout on the base layer's term, on CUDA, the scratch of the forward also has x after the dropout,
    and the product of this tensor if the operator does not return the product; the scratch of the backward also has the
    two terms of dX.

    On the CPU in 16 bits, one of the four cases below gives the scratch. In cases 1, 2 and 4 of the list, a dropout of
    the base layer's term doubles the tensors of activations, products and float32 panels.

    1. On a path with tiles, in bfloat16, over a packed weight or a contiguous dense weight, the scratch is the
       activations packed into strips.
    2. On a path with tiles, in bfloat16, over a dense weight that is not contiguous, the scratch is a 16-bit and a
       float32 copy of the result if the input or the output is scaled, else nothing.
    3. On the scalar path, without scaling and without a dropout of the base layer's term, the scratch is a packed
       weight decoded to 16 bits, or nothing for a dense weight.
    4. In all other calls in 16 bits on the CPU, the scratch is the activations, the product and a panel of the weight
       in float32, and over a packed weight also the panel in 16 bits. If the weight has several panels, the scratch of
       the backward also has the gradient's columns that belong to one panel, in float32.
    """
    out_features, in_features = given["shape"]
    drops = bool(given.get("drop_base")) and given.get("seed") is not None
    is_packed, panel_rows = bool(given.get("layout")), min(_WIDE_PANEL, out_features)
    if device != "cpu" or dtype.itemsize != 2:
        size = out_features * in_features * dtype.itemsize if is_packed else 0
        # With PEFT's DoRA dropout on the CPU, the scratch also has x after the dropout or the scaled dY, the sum to
        # which the product is added, and a panel of W.
        if device == "cpu" and drops:
            size += 4 * (rows * (out_features + in_features) + panel_rows * in_features)
        elif drops:
            columns = 2 * in_features if backward else in_features + (0 if given["want_z"] else out_features)
            size += dtype.itemsize * rows * columns
        return size
    products = 2 if drops else 1
    if STATE.isa in TILE_PATHS and dtype is torch.bfloat16:
        if is_packed or given["weight"].is_contiguous():
            return products * 2 * rows * (out_features if backward else in_features)
        # On a path with tiles, PyTorch multiplies by a weight that is not contiguous. A scaled product exists in 16
        # bits and in float32.
        return products * 6 * rows * (in_features if backward else out_features) if _scales(given) else 0
    # On the scalar path PyTorch multiplies in 16 bits, and the other terms are added to PyTorch's product.
    if STATE.isa == "scalar" and products == 1 and not _scales(given):
        return out_features * in_features * 2 if is_packed else 0
    # number of elements of a float32 panel of W; a packed W is first decoded to 16 bits
    panel = panel_rows * in_features
    size = products * 4 * (rows * (out_features + in_features) + panel) + (2 * panel if is_packed else 0)
    # If W has more rows than one panel, the backward copies the gradient's columns that belong to a panel.
    return size + (4 * rows * panel_rows if backward and out_features > _WIDE_PANEL else 0)


def _scales(given: dict[str, Any]) -> bool:
    """Returns whether the operator's call scales its input or its output by a vector, as in IA3 and DoRA."""
    return given.get("ia3_l") is not None or given.get("out_scale") is not None


def _of_gated(given: dict[str, Any], device: str) -> int:
    """Returns the scratch bytes of a layer whose input h is a gated activation.

    The forward holds h and the scratch of the product. The backward first holds at most h, the gradient of h and the
    scratch of the product, and later the gradient of h and the gradients of gate and up, which are results. The
    gradients of gate and up are as large as h and the gradient of h together, so that the scratch in addition to the
    results is at most the larger of h and the scratch of the product. A backward that needs no gradient of gate and up
    holds h and the scratch of the product.
    """
    gate, backward = given["gate"], "grad" in given
    rows = gate.numel() // max(1, gate.shape[-1])
    h = rows * given["shape"][1] * gate.element_size()
    product = _of_product(given, gate.dtype, rows, device, backward)
    return max(h, product) if backward and given["needs_grad_gate"] else h + product


def _of_loss(given: dict[str, Any], device: str) -> int:
    """Returns the scratch bytes of a loss: the logits of a chunk of tokens, and the scratch of the head's two products.

    With an adapter on the head, the scratch also has a second copy of the logits, the float32 sums of the adapter's
    gradients over all chunks, and the gradients of one chunk; on the CPU also S, lora_A or lora_B in float32, and the
    partial sums of one chunk's gradients. A product by peft_ext's kernel allocates its result while the logits of the
    chunk before are still alive.
    """
    hidden, (vocab, features) = given["hidden"], given["shape"]
    dtype, tokens = hidden.dtype, given["labels"].numel()
    row = vocab * dtype.itemsize
    rows = min(given["chunk"] or default_chunk(tokens, row, device), tokens)
    logits, several = rows * row, rows < tokens
    in_place = not given["layout"] and not (device == "cpu" and dtype in _cpu.widened_dtypes())
    forward = backward = 0
    if not in_place:
        forward, backward = (_of_product(given, dtype, rows, device, back) for back in (False, True))
        backward += 2 * rows * features * dtype.itemsize  # the scratch also has dX, and an empty tensor of dX's size
    elif device == "cpu" and _packs_weight(dtype):
        forward = vocab * features * dtype.itemsize
    if given["lora_A"] is None:
        return logits + max(forward + (logits if several and not in_place else 0), backward)
    held, adds, partial = _of_low_rank(given, rows, several, device)
    base = logits if in_place else 0  # bytes of the tensor into which every chunk's product is written
    product = (base or logits) + forward + (logits if several else 0)
    return held + max(product, 2 * logits + adds, base + logits + max(backward, partial))


def _packs_weight(dtype: torch.dtype) -> bool:
    """Returns whether PyTorch's product with Wᵀ copies the whole weight into another layout.

    Measured on 512 x 1024 @ 1024 x 50000: on a CPU with AVX-512 and without bfloat16 instructions, oneDNN's bfloat16
    product (``gemm:jit``) copies the whole weight into another layout, in the forward only. oneDNN's kernel with
    bfloat16 instructions copies one block of the weight on each thread. On a CPU without AVX-512, PyTorch multiplies
    bfloat16 in a plain loop. No measured float16 product copied the whole weight.
    """
    return dtype is torch.bfloat16 and not _cpu.multiplies(dtype) and bool(_cpu.capabilities().get("avx512_f"))


def _of_low_rank(given: dict[str, Any], rows: int, several: bool, device: str) -> tuple[int, int, int]:
    """Returns three numbers of scratch bytes of a loss with an adapter on the head: the bytes of gradients that are
    held from chunk to chunk; the bytes that are needed while the low-rank term is added to a chunk's logits; and the
    bytes that are needed while the adapter's gradients of one chunk are computed."""
    lora_A, lora_B, hidden = given["lora_A"], given["lora_B"], given["hidden"]
    part = lora_A.numel() * lora_A.element_size() + lora_B.numel() * lora_B.element_size()
    low = rows * hidden.shape[-1] * hidden.element_size() if given["needs_grad_hidden"] else 0
    if not (low or given["needs_grad_adapter"]):
        held = part = 0
    else:  # while the gradients of a chunk are computed, the gradients of the chunk before still exist
        held = 4 * (lora_A.numel() + lora_B.numel()) * given["needs_grad_adapter"] + several * (part + low)
    if device != "cpu":
        return held, 0, part + low
    rank = lora_A.shape[0]
    narrow, wide = 4 * rank * hidden.shape[-1], 4 * rank * lora_B.shape[0]  # bytes of lora_A and lora_B in float32
    s = 4 * rank * rows
    if part == 0:
        return held, wide + s, 0
    parts = -(-rows // max(_SUMMED_TOKENS, -(-rows // _MOST_PARTS)))

    def sums(size: int) -> int:
        """Returns the bytes of a gradient of ``size`` bytes and of its partial sums that exist at once."""
        return size * (1 if parts == 1 else 1 + min(parts, max(1, _MOST_SUMS * 4 // max(4, size))))

    return held, wide + s, 2 * s + max(wide + sums(wide) + sums(narrow) + part, part + low + narrow)


def _of_experts(given: dict[str, Any], device: str) -> int:
    """Returns the scratch bytes of the operators of experts.

    On a CPU the scratch is contiguous copies of the adapters that are not contiguous, and in the backward as many bytes
    again for gradients. On a GPU the scratch is the bfloat16 matrices whose sums approximate the adapters (up to six
    bytes for each element), in the backward partial sums of the adapters' gradients, and the weights of all experts,
    decoded, if the weights are packed in another format than NF4.
    """
    held = [given[name] for name in ("lora_A", "lora_B") if given[name] is not None]
    if device == "cuda":
        size = sum(6 * value.numel() for value in held)
        if format_of(given["layout"]) not in (None, "nf4"):
            dtype = given["x"].dtype if "x" in given else given["dtype"]
            size += math.prod(given["shape"]) * dtype.itemsize
        return size + sum(4 * value.numel() for value in held) if "grad" in given else size
    # The scratch of one expert is small compared with the copies, and is not counted.
    size = sum(value.numel() * value.element_size() for value in held if not value.is_contiguous())
    return size * (2 if "grad" in given else 1)


def _of_siblings(given: dict[str, Any], device: str) -> int:
    """Returns the scratch bytes of siblings, which are layers of one input.

    On a CPU path with tiles, in bfloat16, the scratch of the forward is one copy of x in strips, and the scratch of the
    backward is a copy in strips of the output gradient of each layer. In all other cases the scratch is that of the
    layer with the most outputs.
    """
    x, sizes = given["x"], given["sizes"]
    packed = [grad for grad in given.get("grads", [x]) if grad is not None]
    if device == "cpu" and x.dtype is torch.bfloat16 and STATE.isa in TILE_PATHS:
        return sum(2 * value.numel() for value in packed)
    largest, inputs = max(sizes[2::4]), sizes[3]
    if device == "cpu" and x.element_size() == 2 and STATE.isa != "scalar":
        rows = x.numel() // max(1, inputs)
        return 4 * (rows * (largest + inputs) + min(_WIDE_PANEL, largest) * inputs)
    return largest * inputs * x.element_size() if any(sizes[1::4]) else 0
