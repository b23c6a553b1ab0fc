"""FP8: e4m3 codes with a scale for each block of rows and columns, for each row, or for the weight.

Sources: transformers' ``integrations/finegrained_fp8.py`` (blocks), compressed-tensors' float-quantized format (blocks,
rows, one scale).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from .packed import SCALE_TYPES, Format, PackedWeight, option_of, register

_ALL = 63  # stands for the log2 of a block's size if the block has all rows or columns; kAll in the C++ file fp8.h
_MAX = torch.finfo(torch.float8_e4m3fn).max
_MOST = torch.finfo(torch.float32).max
_CHUNK = 1 << 22  # number of elements of a weight that quantize_fp8 holds in float32 at a time


def _shift(what: str, size: int) -> int:
    """Returns log2 of ``size``, the number of rows or columns of a block; ``_ALL`` for a size of 0, which means all."""
    if type(size) is not int or size < 0 or size & (size - 1) or size >= 1 << 32:
        raise ValueError(f"PackedWeight: fp8 has blocks of {size!r} {what}, wanted a power of two, or 0 for all {what}")
    return size.bit_length() - 1 if size else _ALL


def block_size(weight: PackedWeight) -> tuple[int, int]:
    """Returns the numbers of rows and columns of a block of an FP8 weight; 0 stands for all rows or columns."""
    shift = weight.option >> 8 & 63
    return (0 if shift == _ALL else 1 << shift), weight.group


def _blocks(count: int, shift: int) -> int:
    return ((count - 1) >> shift) + 1 if count else 0


def _check(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> None:
    rows, columns = shape
    row_shift, column_shift = option >> 8 & 63, option >> 14 & 63
    if column_shift != _shift("columns", group):
        raise ValueError(f"PackedWeight: fp8 has group {group} and option {option}, wanted the option of the group")
    if option & 15 >= SCALE_TYPES.index(torch.float8_e4m3fn):
        raise ValueError(f"PackedWeight: fp8 has option {option}, wanted scales that are not e4m3")
    scales = SCALE_TYPES[option & 15]
    wanted = (
        (torch.float8_e4m3fn, rows * columns),
        (scales, _blocks(rows, row_shift) * _blocks(columns, column_shift)),
    )
    for name, part, (dtype, count) in zip(FP8.parts, parts, wanted, strict=True):
        dtypes = (dtype, torch.uint8) if dtype.itemsize == 1 else (dtype,)
        if part is None or part.dtype not in dtypes or part.numel() != count:
            came = "None" if part is None else f"{part.dtype} with {part.numel()} elements"
            raise ValueError(f"PackedWeight: {name} of fp8 is {came}, wanted {dtype} with {count} elements for shape "
                             f"{tuple(shape)}")  # fmt: skip


FP8 = register(Format("fp8", 4, ("weight", "scales"), _check, "transformers Fp8Dequantize, compressed-tensors"))


def fp8(
    weight: Tensor,
    scales: Tensor,
    block_size: Optional[Sequence[int]] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> PackedWeight:
    """Returns an FP8 weight: ``W[n, k] = e4m3(weight[n, k]) · scales[n // rows, k // columns]``.

    Args:
        weight: float8_e4m3fn ``[N, K]``, or ``[E, N, K]`` of a stacked weight; the bytes may be given as uint8.
        scales: float32, bfloat16, float16 or e8m0 ``[ceil(N/rows), ceil(K/columns)]``, for each expert of a stacked
            weight. Scales in e8m0 may be given as uint8. The byte 255 of e8m0 is a NaN, also in uint8, where
            transformers' ``Fp8Dequantize`` makes an infinity from this byte.
        block_size: ``(rows, columns)`` of a block: powers of two, or 0 for all; None: one scale for the weight. The
            last blocks of the rows and columns may be incomplete. The block size ``(1, 0)`` means one scale for each
            row ("channel").
        dtype: dtype to which the library that made the weight decodes it; the default dtype of ``dequantize``.

    Raises:
        TypeError: ``weight`` or ``scales`` has another dtype, or ``dtype`` is not a float dtype.
        ValueError: a size does not fit, a size of a block is not a power of two, or ``scales`` is e4m3.
    """
    if weight.dtype not in (torch.float8_e4m3fn, torch.uint8):
        raise TypeError(f"PackedWeight: weight of fp8 is {weight.dtype}, wanted torch.float8_e4m3fn")
    rows, columns = (0, 0) if block_size is None else block_size
    row_shift, column_shift = _shift("rows", rows), _shift("columns", columns)
    if scales.dim() == weight.dim():
        grid = _blocks(weight.shape[-2], row_shift), _blocks(weight.shape[-1], column_shift)
        if tuple(scales.shape[-2:]) != grid:
            raise ValueError(f"PackedWeight: scales of fp8 has shape {tuple(scales.shape)}, wanted {grid} for shape "
                             f"{tuple(weight.shape)}")  # fmt: skip
    flags = row_shift | column_shift << 6
    option = option_of(scales=scales.dtype, bits=8, flags=flags)
    return PackedWeight(
        FP8, (weight, scales), weight.shape, dtype, group=columns, option=option, stacked=weight.dim() == 3
    )


def from_transformers(module: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
    """Returns the weight of transformers' ``FP8Linear``, in the module's memory; no data is copied.

    Raises: TypeError if ``module`` is another module or holds packed 4-bit codes (int8).
    """
    from transformers.integrations.finegrained_fp8 import FP8Linear

    if not isinstance(module, FP8Linear):
        raise TypeError(f"fp8.from_transformers: module is {type(module).__name__}, wanted FP8Linear")
    return fp8(module.weight.detach(), module.weight_scale_inv.detach(), module.block_size, dtype)


def from_compressed_tensors(module: torch.nn.Module) -> PackedWeight:
    """Returns the weight of a layer that compressed-tensors holds in its float-quantized format. No data is copied.

    The weight decodes to the dtype of its scales, as in compressed-tensors.

    Raises: TypeError if ``module`` is not quantized; ValueError for weights that are not symmetric 8-bit floats, or for
    another strategy than tensor, channel or block.
    """
    scheme: Any = getattr(module, "quantization_scheme", None)
    args = getattr(scheme, "weights", None)
    if args is None:
        raise TypeError(f"fp8.from_compressed_tensors: {type(module).__name__} has no quantization_scheme of weights")
    strategy, kind = getattr(args.strategy, "value", args.strategy), getattr(args.type, "value", args.type)
    if (args.num_bits, kind, args.symmetric) != (8, "float", True):
        raise ValueError(
            f"fp8.from_compressed_tensors: weights are {args.num_bits}-bit {kind}, symmetric {args.symmetric}, wanted "
            "symmetric 8-bit floats"
        )
    sizes = {"tensor": (0, 0), "channel": (1, 0), "block": args.block_structure}
    if strategy not in sizes:
        raise ValueError(f"fp8.from_compressed_tensors: strategy is {strategy!r}, wanted one of {', '.join(sizes)}")
    scales = module.weight_scale.detach()
    return fp8(module.weight.detach(), scales, sizes[strategy], scales.dtype)


@torch.no_grad()
def quantize_fp8(weight: Tensor, rows: int = 128, columns: int = 128) -> PackedWeight:
    """Quantizes a weight to FP8, with the bits of transformers' ``Fp8Quantize``.

    ``scale = 1 / (448 / max |block|)`` and ``code = e4m3(clamp(w · (448 / max |block|), -448, 448))`` in float32, to
    nearest, ties to even. The scale of a block of zeros is 1. The factor ``448 / max |block|`` is at most the largest
    float32. If the numbers of a block are so small that ``448 / max |block|`` overflows, transformers' factor is
    infinity, and the values that transformers decodes are NaN. transformers does not quantize a weight that has an
    incomplete block; this function computes the scale of an incomplete block from the elements that the block has.

    Args:
        weight: float ``[N, K]`` or ``[E, N, K]``.
        rows, columns: size of a block: powers of two, or 0 for all rows or columns.

    The function holds one chunk of rows in float32 at a time: at least the rows of one block, unless a block has all
    rows.
    """
    row_shift, column_shift = _shift("rows", rows), _shift("columns", columns)
    if weight.dim() == 3:
        each = [quantize_fp8(one, rows, columns) for one in weight]
        codes, scales = (torch.stack([w.parts[i] for w in each]) for i in (0, 1))
        return fp8(codes, scales, (rows, columns), weight.dtype)
    n, k = weight.shape
    width = columns or max(1, k)
    grid = weight.new_zeros(_blocks(n, row_shift), _blocks(k, column_shift), dtype=torch.float32)
    step = max(1, _CHUNK // max(1, k))
    if rows:
        step = max(1, step // rows) * rows
    for first in range(0, n if k else 0, step):
        chunk = torch.nn.functional.pad(weight[first : first + step].float().abs(), (0, -k % width))
        largest = chunk.unflatten(1, (-1, width)).amax(2)
        blocks = torch.arange(first, first + len(largest), device=weight.device) >> row_shift
        grid.scatter_reduce_(0, blocks[:, None].expand_as(largest), largest, "amax")
    factors = torch.where(grid > 0, _MAX / torch.where(grid > 0, grid, 1.0), 1.0).clamp_(max=_MOST)
    codes = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=weight.device)
    for first in range(0, n if k else 0, step):
        chunk = weight[first : first + step].float()
        blocks = torch.arange(first, first + len(chunk), device=weight.device) >> row_shift
        scaled = chunk.mul(factors[blocks].repeat_interleave(width, 1)[:, :k])
        codes[first : first + step] = scaled.clamp_(-_MAX, _MAX).to(torch.float8_e4m3fn)
    return fp8(codes, 1.0 / factors, (rows, columns), weight.dtype)
