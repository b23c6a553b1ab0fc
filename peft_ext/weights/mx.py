"""Microscaling floats: 4-bit floats (e2m1) with a scale for each 32 or 16 columns.

* MXFP4: a scale that is a power of two for each 32 columns. Source: OCP Microscaling Formats 1.0; the layout of files
  is that of transformers' ``integrations/mxfp4.py``.
* NVFP4: an e4m3 scale for each 16 columns, and one float32 scale for the weight, or for each half of its rows. Sources:
  compressed-tensors' ``compressors/nvfp4``, ModelOpt's ``qtensor/nvfp4_tensor.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from .packed import Format, PackedWeight, option_of, register

_MXFP4_GROUP, _NVFP4_GROUP = 32, 16
_RECIPROCAL, _TWO_GLOBALS = 1, 2  # Flags of NVFP4, as kReciprocal and kTwoGlobals in csrc/weight/formats/nvfp4.h.
_CHUNK = 1 << 22  # Number of elements of a weight that a quantizer holds in float32 at a time.
_LARGEST = 6.0  # Largest value of an e2m1 float.


def _check_parts(
    format: Format, parts: Sequence[Optional[Tensor]], shape: torch.Size, wanted: Sequence[tuple[torch.dtype, int]]
) -> None:
    for name, part, (dtype, count) in zip(format.parts, parts, wanted, strict=True):
        fits = part is not None and part.numel() == count
        if fits and part is not None:
            fits = part.dtype is dtype or (part.dtype is torch.uint8 and dtype.itemsize == 1)
        if not fits:
            came = "None" if part is None else f"{part.dtype} with {part.numel()} elements"
            raise ValueError(
                f"PackedWeight: {name} of {format.name} is {came}, wanted {dtype} with {count} elements for shape "
                f"{tuple(shape)}"
            )


def _check_columns(format: Format, shape: torch.Size, group: int, wanted: int) -> None:
    if group != wanted or shape[1] % wanted:
        raise ValueError(
            f"PackedWeight: {format.name} has {shape[1]} columns and group {group}, wanted a multiple of {wanted} "
            f"columns and group {wanted}"
        )


# --- MXFP4 ------------------------------------------------------------------------------------------------------------


def _check_mxfp4(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> None:
    _check_columns(MXFP4, shape, group, _MXFP4_GROUP)
    elements = shape[0] * shape[1]
    wanted = ((torch.uint8, elements // 2), (torch.float8_e8m0fnu, elements // _MXFP4_GROUP))
    _check_parts(MXFP4, parts, shape, wanted)


MXFP4 = register(Format("mxfp4", 2, ("blocks", "scales"), _check_mxfp4, "transformers integrations/mxfp4.py"))


def mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
    """Returns an MXFP4 weight: ``W[n, k] = e2m1(code) · 2^(scale - 127)``.

    The weight has the layout of gpt-oss's checkpoints: rows are output features. transformers'
    ``convert_moe_packed_tensors`` returns the transposed weights ``[E, K, N]``, because gpt-oss multiplies activations
    with ``[K, N]``. The scale byte 255 is 2^128, as in transformers; the specification makes this byte a NaN, and
    :func:`quantize_mxfp4` does not write this byte.

    Args:
        blocks: uint8 ``[..., K/32, 16]`` or ``[..., K/2]``, two codes per byte, the low nibble first. In gpt-oss's
            checkpoints, for example, ``gate_up_proj_blocks`` has the shape ``[E, 2 I, K/32, 16]``. transformers' FP8
            checkpoints with 4-bit experts declare the bytes of the codes as int8 ``[N, K/2]``: ``blocks`` is then
            ``weight.view(torch.uint8)``.
        scales: uint8 or float8_e8m0fnu ``[..., K/32]``, one scale for each 32 columns of a row. With three dimensions
            ``[E, N, K/32]`` the weight is stacked.
        dtype: dtype that transformers decodes the weight to.

    Raises:
        TypeError: ``blocks`` is not a tensor, or ``dtype`` is not a float dtype.
        ValueError: a size or a tensor's dtype does not fit.
    """
    shape = (*scales.shape[:-1], scales.shape[-1] * _MXFP4_GROUP)
    return PackedWeight(MXFP4, (blocks, scales), shape, dtype, group=_MXFP4_GROUP, stacked=len(shape) == 3)


# --- NVFP4 ------------------------------------------------------------------------------------------------------------


def _check_nvfp4(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> None:
    _check_columns(NVFP4, shape, group, _NVFP4_GROUP)
    known = [_nvfp4_option(flags) for flags in range(4)]
    if option not in known:
        raise ValueError(f"PackedWeight: nvfp4 has option {option}, wanted one of {', '.join(map(str, known))}")
    two = bool(option >> 8 & _TWO_GLOBALS)
    if two and shape[0] % 2:
        raise ValueError(
            f"PackedWeight: nvfp4 has {shape[0]} rows and two global scales, wanted an even number of rows"
        )
    elements = shape[0] * shape[1]
    wanted = ((torch.uint8, elements // 2), (torch.float8_e4m3fn, elements // _NVFP4_GROUP), (torch.float32, 1 + two))
    _check_parts(NVFP4, parts, shape, wanted)


NVFP4 = register(Format("nvfp4", 3, ("packed", "scales", "global_scale"), _check_nvfp4,
                        "compressed-tensors compressors/nvfp4, ModelOpt NVFP4QTensor"))  # fmt: skip


def _nvfp4_option(flags: int) -> int:
    return option_of(scales=torch.float8_e4m3fn, bits=4, flags=flags)


def nvfp4(
    packed: Tensor, scales: Tensor, global_scale: Tensor, dtype: torch.dtype = torch.bfloat16, *, reciprocal: bool
) -> PackedWeight:
    """Returns an NVFP4 weight: ``W[n, k] = e2m1(code) · (scale · global)``, or ``e2m1(code) · (scale / global)``.

    Args:
        packed: uint8 ``[N, K/2]``, two codes per byte, the low nibble first.
        scales: float8_e4m3fn ``[N, K/16]``, one scale for each 16 columns of a row. With three dimensions
            ``[E, N, K/16]`` the weight is stacked.
        global_scale: float32, one element, or one for each expert of a stacked weight. With two elements for each
            weight, the first element is for the first half of the rows and the second for the second half, such as the
            gate and the up of an expert.
        dtype: dtype to which the library that made the weight decodes it; the default dtype of ``dequantize``.
        reciprocal: True for compressed-tensors' ``weight_global_scale``, by which scales are divided; False for
            ModelOpt's ``weight_scale_2``, with which scales are multiplied. ModelOpt decodes code 8 to +0, and
            compressed-tensors decodes code 8 to -0.

    Raises:
        TypeError: ``packed`` is not a tensor, or ``dtype`` is not a float dtype.
        ValueError: a size or a tensor's dtype does not fit.
    """
    shape = (*scales.shape[:-1], scales.shape[-1] * _NVFP4_GROUP)
    count = shape[0] if len(shape) == 3 else 1
    flags = (_RECIPROCAL if reciprocal else 0) | (_TWO_GLOBALS if global_scale.numel() == 2 * count > 0 else 0)
    return PackedWeight(NVFP4, (packed, scales, global_scale), shape, dtype, group=_NVFP4_GROUP,
                        option=_nvfp4_option(flags), stacked=len(shape) == 3)  # fmt: skip


def from_compressed_tensors(module: torch.nn.Module) -> PackedWeight:
    """Returns the weight of a layer that compressed-tensors holds as NVFP4 or MXFP4. No data is copied.

    Raises: TypeError if ``module`` is not quantized; ValueError for weights that are not 4-bit floats in groups of 16
    or 32.
    """
    scheme: Any = getattr(module, "quantization_scheme", None)
    args = getattr(scheme, "weights", None)
    if args is None:
        raise TypeError(f"mx.from_compressed_tensors: {type(module).__name__} has no quantization_scheme of weights")
    kind = (args.num_bits, getattr(args.type, "value", args.type), args.group_size)
    if kind not in ((4, "float", _NVFP4_GROUP), (4, "float", _MXFP4_GROUP)):
        raise ValueError(
            f"mx.from_compressed_tensors: weights are {kind[0]}-bit {kind[1]} in groups of {kind[2]}, wanted 4-bit "
            "floats in groups of 16 or 32"
        )
    packed, scales = module.weight_packed.detach(), module.weight_scale.detach()
    if args.group_size == _MXFP4_GROUP:
        return mxfp4(packed, scales)
    return nvfp4(packed, scales, module.weight_global_scale.detach(), reciprocal=True)


# --- quantizers -------------------------------------------------------------------------------------------------------


def _codes(scaled: Tensor) -> Tensor:
    """Returns the e2m1 codes of float32 values, to nearest, ties to the even code; magnitudes above 6 get the code of
    6.

    The result has two codes per byte, the low nibble first. The code of a value below 0 has the sign bit, also if the
    value rounds to 0.
    """
    magnitude = scaled.abs()
    codes = torch.zeros_like(scaled, dtype=torch.uint8)
    for bound in (0.25, 1.25, 2.5, 5.0):
        codes += magnitude > bound
    for bound in (0.75, 1.75, 3.5):
        codes += magnitude >= bound
    codes |= (scaled < 0).to(torch.uint8) << 3
    return codes[..., ::2] | codes[..., 1::2] << 4


def _quantized(
    weight: Tensor, group: int, scales_of: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Returns codes ``[N, K/2]`` and scales ``[N, K/group]`` of ``weight``, computed for one chunk of rows at a time.

    ``scales_of`` gets the largest magnitudes of the groups, and returns the scales to store and float32 divisors.
    """
    n, k = weight.shape
    if k % group:
        raise ValueError(f"PackedWeight: the weight has {k} columns, wanted a multiple of {group}")
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    stored = []
    for first in range(0, n, step := max(1, _CHUNK // max(1, k))):
        groups = weight[first : first + step].float().unflatten(1, (k // group, group))
        scales, divisors = scales_of(groups.abs().amax(2))
        packed[first : first + step] = _codes((groups / divisors[..., None]).flatten(1))
        stored.append(scales)
    return packed, torch.cat(stored) if stored else scales_of(weight.new_zeros(0, k // group, dtype=torch.float32))[0]


@torch.no_grad()
def quantize_mxfp4(weight: Tensor) -> PackedWeight:
    """Quantizes a weight to MXFP4 by the rule of OCP Microscaling Formats 1.0, section 6.3.

    The scale of 32 columns is ``2^(floor(log2(max |w|)) - 2)``, 2^-127 at least. The codes are ``w / scale``, to
    nearest, ties to even; a magnitude above 6 gets the code of 6. transformers' own quantizer, which needs Triton,
    rounds scales by another rule.

    Args:
        weight: float ``[N, K]`` or ``[E, N, K]``; K must be a multiple of 32. At most one chunk of rows is held in
            float32.

    Raises: ValueError if a value is not finite, or if K is not a multiple of 32.
    """

    def scales_of(largest: Tensor) -> tuple[Tensor, Tensor]:
        if not largest.is_meta and not largest.isfinite().all():
            raise ValueError("quantize_mxfp4: weight has values that are not finite")
        # frexp gives largest = m · 2^e with m in [0.5, 1), and e = 0 for 0.
        exponents = torch.where(largest > 0, largest.frexp().exponent - 3, -127).clamp_(-127)
        scales = (exponents + 127).to(torch.uint8)
        return scales, scales.view(torch.float8_e8m0fnu).float()

    if weight.dim() == 3:
        each = [quantize_mxfp4(one) for one in weight]
        return mxfp4(*(torch.stack([w.parts[i] for w in each]) for i in (0, 1)), weight.dtype)
    return mxfp4(*_quantized(weight, _MXFP4_GROUP, scales_of), weight.dtype)


@torch.no_grad()
def quantize_nvfp4(weight: Tensor) -> PackedWeight:
    """Quantizes a weight to NVFP4, with the bits of ModelOpt's ``NVFP4QTensor.quantize`` on a CPU.

    ``global = max |w| / (6 · 448)``, ``scale = e4m3(max |group| / (6 · global))`` in [2^-9, 448], 1 for a group of
    zeros, and ``code = e2m1(w / (scale · global))``, to nearest, ties to even, in float32. For a weight of zeros,
    ModelOpt returns NaN, and this function returns a weight with global 1.

    Args:
        weight: float ``[N, K]`` or ``[E, N, K]``; K must be a multiple of 16. At most one chunk of rows is held in
            float32.
    """
    if weight.dim() == 3:
        each = [quantize_nvfp4(one) for one in weight]
        return nvfp4(*(torch.stack([w.parts[i] for w in each]) for i in range(3)), weight.dtype, reciprocal=False)
    largest = weight.aminmax() if weight.numel() else (weight.new_zeros(()),) * 2
    total = torch.maximum(-largest[0], largest[1]).float() / (_LARGEST * 448.0)
    total = torch.where(total == 0, torch.ones_like(total), total)

    def scales_of(largest: Tensor) -> tuple[Tensor, Tensor]:
        scales = largest / (_LARGEST * total)
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
        stored = scales.clamp(2**-9, 448.0).to(torch.float8_e4m3fn)
        return stored, stored.float() * total

    return nvfp4(*_quantized(weight, _NVFP4_GROUP, scales_of), total.reshape(1), weight.dtype, reciprocal=False)
