"""NF4 quantization in plain PyTorch.

The codes and scales have the same bits as those of bitsandbytes; :func:`quantize_absmax` and :func:`scale_mean` name
the exceptions.

Sources: QLoRA (arXiv 2305.14314) for the format; bitsandbytes' ``create_dynamic_map()`` for the table of double
quantization. The 16 codes are in :mod:`peft_ext.weights.nf4`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights.nf4 import NESTED_BLOCKSIZE, NF4_CODE, NestedAbsmax, NF4Weight, nf4_code
from ..weights.packed import PackedWeight
from .formats import decoded

__all__ = [
    "NF4_CODE",
    "decode_absmax",
    "dequantize",
    "dequantize_merged",
    "dynamic_code",
    "frozen_linear",
    "merge",
    "nested",
    "nf4_code",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "quantize",
    "quantize_absmax",
    "scale_mean",
]

_SMALLEST_ABSMAX = 1e-38


def dynamic_code(device: torch.device | str = "cpu") -> Tensor:
    """Returns the 256 values of the signed dynamic 8-bit map (arXiv 1511.04561), ascending, float32.

    The values are computed in float64 and float32 in bitsandbytes' order of operations, so that they have the bits of
    bitsandbytes' table.
    """
    return torch.tensor(_dynamic_values(), dtype=torch.float32, device=device)


@functools.cache
def _dynamic_values() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        means = (edges[:-1] + edges[1:]) / 2.0
        scale = 10 ** (exponent - 6)
        values += (scale * means).tolist()
        values += (-scale * means).tolist()
    return tuple(sorted(values))


def _thresholds(code: Tensor) -> Tensor:
    return (code[:-1] + code[1:]) / 2


def quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Returns ``(packed, absmax)`` of the flat weight.

    An element that is equally near to two codes gets the lower code. All elements of a block with a NaN get code 15.

    A full block is multiplied by ``1 / max(absmax, 1e-38)``. An incomplete last block is divided by ``max(absmax,
    1e-38)``, and this number is stored as the absmax of the block.
    """
    flat = weight.detach().reshape(-1).float()
    full = flat.numel() // blocksize * blocksize
    head = flat[:full].view(-1, blocksize)
    absmax = head.abs().amax(dim=1)
    scaled = (head * (1.0 / absmax.clamp(min=_SMALLEST_ABSMAX))[:, None]).clamp(-1, 1).reshape(-1)
    if full < flat.numel():
        tail = flat[full:]
        tail_absmax = tail.abs().amax().clamp(min=_SMALLEST_ABSMAX)
        absmax = torch.cat([absmax, tail_absmax[None]])
        scaled = torch.cat([scaled, (tail / tail_absmax).clamp(-1, 1)])
    if scaled.numel() % 2:
        scaled = F.pad(scaled, (0, 1))
    codes = torch.bucketize(scaled, _thresholds(nf4_code(weight.device))).to(torch.uint8)
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1), absmax


def quantize_absmax(centred: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Returns 8-bit codes and float32 scales of ``centred = absmax - offset``, in blocks of 256 elements.

    Each element gets the exactly nearest value of ``code``, as in bitsandbytes' CUDA kernel; an element that is equally
    near to two values gets the lower code. bitsandbytes' CPU kernel looks an element up in 65,536 bins, and finds
    another code for about 0.2% of the elements.
    """
    flat = centred.detach().float()
    blocks = -(-flat.numel() // NESTED_BLOCKSIZE)
    padded = F.pad(flat, (0, blocks * NESTED_BLOCKSIZE - flat.numel())).view(blocks, NESTED_BLOCKSIZE)
    absmax = padded.abs().amax(dim=1) if blocks else flat.new_empty(0)
    scaled = padded * (1.0 / absmax.clamp(min=_SMALLEST_ABSMAX))[:, None]
    codes = torch.bucketize(scaled, _thresholds(code)).to(torch.uint8)
    return codes.reshape(-1)[: flat.numel()], absmax


def decode_absmax(
    absmax: Tensor, nested_absmax: Optional[Tensor], nested_code: Optional[Tensor], nested_offset: Optional[Tensor]
) -> Tensor:
    """Returns the scales of an NF4 weight in float32. A double-quantized scale is ``code * nested_absmax + offset``,
    each step rounded."""
    if nested_absmax is None:
        return absmax
    scale = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    return nested_code[absmax.int()] * scale + nested_offset


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Optional[Tensor],
    nested_code: Optional[Tensor],
    nested_offset: Optional[Tensor],
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Returns the dense weight: ``code[nibble] * absmax`` in float32, rounded once to ``dtype``."""
    numel = 1
    for size in shape:
        numel *= size
    byte = packed.reshape(-1)
    nibbles = torch.stack((byte >> 4, byte & 15), dim=1).reshape(-1)[:numel]
    scale = decode_absmax(absmax, nested_absmax, nested_code, nested_offset).repeat_interleave(blocksize)[:numel]
    return (nf4_code(packed.device)[nibbles.int()] * scale).to(dtype).view(shape)


def dequantize_merged(*args: Any) -> Tensor:
    """Returns ``g ∘ (W + s · B A)``, where g scales the rows, computed in float32 and rounded once to ``dtype``.

    The order of the steps is: ``B A``, times s, plus the dequantized W, times g. The arguments after the weight are
    ``lora_A [R, K]``, ``lora_B [N, R]``, ``row_scale`` (g ``[N]``, or None for ones), ``scaling`` (s) and ``dtype``.
    """
    *weight, lora_A, lora_B, row_scale, scaling, dtype = args
    return merged_of(dequantize(*weight, torch.float32), lora_A, lora_B, row_scale, scaling).to(dtype)


def merged_of(merged: Tensor, lora_A: Tensor, lora_B: Tensor, row_scale: Optional[Tensor], scaling: float) -> Tensor:
    """Returns ``g ∘ (W + s · B A)`` in float32, computed in the memory of ``merged``, which holds W in float32."""
    merged += scaling * (lora_B.float() @ lora_A.float())
    if row_scale is not None:
        merged *= row_scale.float()[:, None]
    return merged


def merge(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes ``W' = g ∘ (W + s · B A)`` to Q. Returns packed, absmax and ``(Σ (Q - W')², Σ W'²)`` in float64."""
    *_, blocksize, shape, _lora_A, _lora_B, _row_scale, _scaling = args
    merged = dequantize_merged(*args, torch.float32)
    codes, scales = quantize(merged, blocksize)
    moved = dequantize(codes, scales, None, None, None, blocksize, shape, torch.float32) - merged
    return codes, scales, torch.stack([moved.double().square().sum(), merged.double().square().sum()])


def scale_mean(absmax: Tensor) -> Tensor:
    """Returns the mean of the scales, float32, 0-d, with equal bits for every number of threads and every device.

    The scales are summed as integers, so that the order of the sum does not change the result. The unit of the integers
    is at most 2⁻⁴⁰ of the largest scale if there are fewer than 2²¹ scales. PyTorch's mean, which bitsandbytes uses,
    depends on the number of threads, so the last bit of bitsandbytes' mean may differ.
    """
    if absmax.numel() == 0:
        return absmax.new_zeros(())
    largest = absmax.amax()
    mantissa, _ = torch.frexp(largest.double())
    unit = torch.where(mantissa == 0, 1.0, largest.double() / mantissa)  # the next power of two above the largest scale
    units = 2.0 ** (62 - absmax.numel().bit_length())
    total = absmax.double().mul_(units / unit).long().sum()
    mean = (total.double() / units * unit / absmax.numel()).float()
    return torch.where(largest.isfinite(), mean, largest)


def nested(
    absmax: Tensor,
    mean: Callable[[Tensor], Tensor] = scale_mean,
    quantized: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = quantize_absmax,
) -> tuple[Tensor, NestedAbsmax]:
    """Returns the scales minus their mean as 8-bit codes in blocks of 256, and the state that decodes the codes."""
    offset = mean(absmax)
    code = dynamic_code(absmax.device)
    codes, nested_absmax = quantized(absmax - offset, code)
    return codes, NestedAbsmax(nested_absmax, code, offset)


def nf4_quantize(weight: Tensor, blocksize: int = 64, double_quant: bool = False) -> NF4Weight:
    """See :func:`peft_ext.ops.nf4_quantize`."""
    packed, absmax = quantize(weight, blocksize)
    absmax, state = nested(absmax) if double_quant else (absmax, None)
    return NF4Weight(packed, absmax, weight.shape, weight.dtype, blocksize, state)


def nf4_dequantize(nf4: PackedWeight, dtype: Optional[torch.dtype] = None) -> Tensor:
    """See :func:`peft_ext.ops.nf4_dequantize`. This function also decodes packed weights of other formats than NF4."""
    dtype = dtype or nf4.dtype
    return dequantize(*nf4.op_args(), dtype) if isinstance(nf4, NF4Weight) else decoded(nf4, dtype)


def nf4_linear(x: Tensor, nf4: NF4Weight, bias: Optional[Tensor] = None) -> Tensor:
    """See :func:`peft_ext.ops.nf4_linear`."""
    return F.linear(x, nf4_dequantize(nf4, x.dtype), bias)


def frozen_linear(x: Tensor, weight: Union[Tensor, PackedWeight], bias: Optional[Tensor] = None) -> Tensor:
    """See :func:`peft_ext.ops.frozen_linear`."""
    return F.linear(x, nf4_dequantize(weight, x.dtype) if isinstance(weight, PackedWeight) else weight, bias)
