"""bitsandbytes' FP4: the layout of NF4 with another table of codes, the 16 values of a 4-bit float.

Source: bitsandbytes' ``get_4bit_type("fp4")`` and ``dequantize_4bit``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from .nf4 import BLOCKSIZES, NESTED_BLOCKSIZE, NestedAbsmax, why_not_nf4
from .packed import Format, PackedWeight, option_of, register

# The 16 values of FP4, in the order of their codes. Code 8 decodes to +0.
FP4_CODE = tuple(sign * code / 12 + 0.0 for sign in (1, -1) for code in (0, 0.0625, 8, 12, 4, 6, 2, 3))


def _check(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> None:
    if group not in BLOCKSIZES or option != _option(group):
        raise ValueError(f"PackedWeight: fp4 has blocks of {group!r} elements, wanted one of {BLOCKSIZES}")
    elements = shape[0] * shape[1]
    blocks = -(-elements // group)
    nested = parts[2] is not None
    wanted = [(torch.uint8, -(-elements // 2)), (torch.uint8 if nested else torch.float32, blocks)]
    if nested:
        wanted += [(torch.float32, -(-blocks // NESTED_BLOCKSIZE)), (torch.float32, 256), (torch.float32, 1)]
    for name, part, (dtype, count) in zip(FP4.parts, parts, (*wanted, *[(None, 0)] * 3), strict=False):
        if dtype is None and part is None:
            continue
        if part is None or part.dtype is not dtype or part.numel() != count:
            came = "None" if part is None else f"{part.dtype} with {part.numel()} elements"
            want = f"{dtype} with {count} elements" if dtype else "None, because nested_absmax is None,"
            raise ValueError(f"PackedWeight: {name} of fp4 is {came}, wanted {want} for shape {tuple(shape)} and "
                             f"blocks of {group} elements")  # fmt: skip


FP4 = register(Format("fp4", 1, ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset"), _check,
                      "bitsandbytes dequantize_4bit"))  # fmt: skip


def _option(blocksize: int) -> int:
    return option_of(bits=4, flags=blocksize.bit_length() - 1)


def fp4(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    blocksize: int = 64,
    nested: Optional[NestedAbsmax] = None,
) -> PackedWeight:
    """Returns an FP4 weight: ``W[i] = code value(packed, i) · absmax[i // blocksize]`` over the flat weight.

    Args:
        packed: uint8, ``ceil(N·K/2)`` elements, two codes per byte, the high nibble first.
        absmax: float32, ``ceil(N·K/blocksize)`` elements; uint8 with ``nested``.
        shape: ``(N, K)``. With ``(E, N, K)`` the weight is stacked: each expert is packed separately, and the tensors
            of all experts are concatenated. For a stacked weight, ``nested`` must be None.
        dtype: dtype of the weight before it was quantized.
        blocksize: number of elements that share one absmax: a power of two from 32 to 4096.
        nested: state that decodes a double-quantized ``absmax``.

    Raises:
        TypeError: a part is not a tensor, or ``dtype`` is not a float dtype.
        ValueError: a size or a dtype does not fit the other arguments.
    """
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"PackedWeight: fp4 has blocks of {blocksize!r} elements, wanted one of {BLOCKSIZES}")
    parts: tuple[Optional[Tensor], ...] = (packed, absmax)
    if nested is not None:
        if len(shape) == 3:
            raise ValueError("PackedWeight: a stacked fp4 weight has nested, wanted a float32 absmax")
        parts += (nested.absmax, nested.code, nested.offset)
    return PackedWeight(FP4, parts, shape, dtype, group=blocksize, option=_option(blocksize), stacked=len(shape) == 3)


def from_params4bit(weight: Tensor, quant_state: Any = None) -> PackedWeight:
    """Returns an FP4 weight that shares the storage of a bitsandbytes ``Params4bit``; no data is copied.

    Args:
        weight: the ``Params4bit``, or its packed tensor if ``quant_state`` is given.
        quant_state: bitsandbytes' ``QuantState``; default ``weight.quant_state``.

    Raises:
        TypeError: ``weight`` is not a tensor.
        ValueError: ``weight`` is not quantized yet, is not FP4, has another table of codes, has double-quantized scales
            in blocks of another size than 256, or was repacked for bitsandbytes' CPU inference.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"fp4.from_params4bit: weight is {type(weight).__name__}, wanted a Tensor")
    state = quant_state if quant_state is not None else getattr(weight, "quant_state", None)
    if reason := why_not_nf4(state, ("fp4",)):
        raise ValueError(f"fp4.from_params4bit: {reason}")
    if not is_fp4_table(state.code):
        raise ValueError("fp4.from_params4bit: the quant_state's table of codes is not FP4's")
    return held_by_params4bit(weight, state)


def held_by_params4bit(weight: Tensor, state: Any) -> PackedWeight:
    """Returns the FP4 weight of a ``Params4bit`` that :func:`from_params4bit` accepts, without the checks."""
    with torch._C.DisableTorchFunctionSubclass():
        # bitsandbytes' option quant_storage may give the bytes another dtype.
        packed = weight.data.reshape(-1).view(torch.uint8)
    nested = NestedAbsmax(state.state2.absmax, state.state2.code, state.offset) if state.nested else None
    return fp4(packed, state.absmax, state.shape, state.dtype, blocksize=state.blocksize, nested=nested)


def is_fp4_table(code: Optional[Tensor]) -> bool:
    """Returns whether ``code`` is FP4's table of 16 codes, in any float dtype; see :func:`.nf4.is_nf4_table`."""
    if code is None or code.is_meta:
        return True
    return code.shape == (16,) and torch.allclose(
        code.detach().float().cpu(), torch.tensor(FP4_CODE, device="cpu"), rtol=0, atol=1e-3
    )
