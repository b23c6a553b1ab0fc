"""GGUF: packed weights that hold the quantized tensors of llama.cpp's files, with the bytes of the file.

A row of a GGUF weight is a whole number of blocks. A block of GGUF holds 32 to 256 columns: codes of 1 to 8 bits with
scales. The decoded values equal those of the Python package gguf (``gguf/quants.py``), in float32. Kernels decode the
types for which :func:`has_kernel` is True; for the other types, ``dequantize`` calls the package gguf.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from .._imports import required
from .packed import Format, PackedWeight, register

_FIRST = 64  # the format of ggml's type t has the number _FIRST + t


class GgmlType(NamedTuple):
    """A quantized type of ggml: its name, the columns and bytes of a block, and whether a kernel decodes the type."""

    name: str
    columns: int
    bytes: int
    kernel: bool


# The quantized types that the package gguf decodes, by ggml's numbers (enum ggml_type in ggml.h).
TYPES: dict[int, GgmlType] = {
    2: GgmlType("Q4_0", 32, 18, True),
    3: GgmlType("Q4_1", 32, 20, True),
    6: GgmlType("Q5_0", 32, 22, True),
    7: GgmlType("Q5_1", 32, 24, True),
    8: GgmlType("Q8_0", 32, 34, True),
    10: GgmlType("Q2_K", 256, 84, True),
    11: GgmlType("Q3_K", 256, 110, True),
    12: GgmlType("Q4_K", 256, 144, True),
    13: GgmlType("Q5_K", 256, 176, True),
    14: GgmlType("Q6_K", 256, 210, True),
    16: GgmlType("IQ2_XXS", 256, 66, False),
    17: GgmlType("IQ2_XS", 256, 74, False),
    18: GgmlType("IQ3_XXS", 256, 98, False),
    19: GgmlType("IQ1_S", 256, 50, False),
    20: GgmlType("IQ4_NL", 32, 18, True),
    21: GgmlType("IQ3_S", 256, 110, False),
    22: GgmlType("IQ2_S", 256, 82, False),
    23: GgmlType("IQ4_XS", 256, 136, True),
    29: GgmlType("IQ1_M", 256, 56, False),
    34: GgmlType("TQ1_0", 256, 54, False),
    35: GgmlType("TQ2_0", 256, 66, True),
    39: GgmlType("MXFP4", 32, 17, True),
    40: GgmlType("NVFP4", 64, 36, False),
}
_DENSE = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_DENSE_NAMES = {"F32": 0, "F16": 1, "F64": 28, "BF16": 30}
_NUMBERS = {type.name: number for number, type in TYPES.items()} | _DENSE_NAMES
_NAMES = {number: name for name, number in _NUMBERS.items()}


def type_number(type: int | str) -> int:
    """Returns ggml's number of a type, given as a number, as gguf's ``GGMLQuantizationType``, or as a name ("Q4_K").

    Raises ValueError for a type that is neither in ``TYPES`` nor one of F32, F16, BF16 and F64.
    """
    number = _NUMBERS.get(type.upper()) if isinstance(type, str) else int(type)
    if number in TYPES or number in _DENSE:
        return number
    raise ValueError(f"gguf: the ggml type is {type!r}, wanted one of {', '.join(_NUMBERS)}")


def type_name(type: int | str) -> str:
    """Returns ggml's name of a type, for example "Q4_K" or "F16"; see :func:`type_number`."""
    return _NAMES[type_number(type)]


def dense_dtype(type: int | str) -> Optional[torch.dtype]:
    """Returns the dtype of a type that is not quantized (F32, F16, BF16, F64), and None for a quantized type."""
    return _DENSE.get(type_number(type))


def has_kernel(type: int | str) -> bool:
    """Returns whether peft_ext's kernels decode the type. The package gguf decodes the other quantized types."""
    number = type_number(type)
    return number in TYPES and TYPES[number].kernel


def ggml_type(weight: PackedWeight) -> Optional[int]:
    """Returns ggml's number of the type of a weight; None for a weight of another format than GGUF's."""
    number = weight.format.number - _FIRST
    return number if _FORMATS.get(number) is weight.format else None


def _check(number: int, parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> None:
    type, (data,), (rows, columns) = TYPES[number], parts, shape
    if columns % type.columns:
        raise ValueError(
            f"PackedWeight: gguf {type.name} has {columns} columns, wanted a multiple of its block of {type.columns}"
        )
    count = rows * columns // type.columns * type.bytes
    if data is None or data.dtype != torch.uint8 or data.numel() != count:
        came = "None" if data is None else f"{data.dtype} with {data.numel()} elements"
        raise ValueError(
            f"PackedWeight: data of gguf {type.name} is {came}, wanted torch.uint8 with {count} for shape "
            f"{tuple(shape)}: {type.bytes} bytes for {type.columns} columns"
        )


def decoded_by_gguf(number: int, parts: Sequence[Optional[Tensor]], shape: torch.Size) -> Tensor:
    """Returns the float32 values of a GGUF weight, on the device of the weight. The package gguf decodes the weight on
    the CPU.

    Raises: ImportError if the package gguf is not installed.
    """
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        name = TYPES[number].name
        raise ImportError(f"decoding of gguf {name} needs the package gguf (pip install gguf): {error}") from error

    blocks = parts[0].reshape(-1, TYPES[number].bytes)
    values = dequantize(blocks.cpu().numpy(), GGMLQuantizationType(number))
    return torch.from_numpy(values).to(blocks.device).reshape(shape)


_FORMATS = {
    number: register(
        Format(
            f"gguf_{type.name.lower()}",
            _FIRST + number,
            ("data",),
            partial(_check, number),
            "gguf quants.py",
            None if type.kernel else partial(decoded_by_gguf, number),
        )
    )
    for number, type in TYPES.items()
}


def gguf_weight(
    data: Tensor, type: int | str, shape: Optional[Sequence[int]] = None, dtype: torch.dtype = torch.float32
) -> PackedWeight:
    """Returns a weight in the layout of a GGUF file: ``W[n, k] = scale · code``, or ``scale · code + offset``.

    Args:
        data: uint8, the bytes of the tensor in the file: ``[N, bytes of a row]``, ``[E, N, bytes of a row]`` for the
            weights of experts, or flat with ``shape``.
        type: ggml's type, as a number or a name, for example 12 or ``"Q4_K"``.
        shape: ``(N, K)`` or ``(E, N, K)``. A GGUF file lists the sizes in the opposite order. Default: computed from
            the shape of ``data``.
        dtype: default dtype of :meth:`~peft_ext.weights.packed.PackedWeight.dequantize`. The package gguf decodes to
            float32.

    Raises:
        TypeError: ``data`` is not a tensor, or ``dtype`` is not a float dtype.
        ValueError: the type is unknown or dense, ``data`` is not uint8, K is not a multiple of the type's block, or the
            number of bytes does not fit the shape.

    Source: gguf ``quants.py``, llama.cpp ``ggml-common.h``.
    """
    number = type_number(type)
    if number not in TYPES:
        raise ValueError(f"gguf_weight: the ggml type {type!r} is dense ({_DENSE[number]}), wanted a quantized type")
    if not isinstance(data, Tensor):
        raise TypeError(f"gguf_weight: data is {data.__class__.__name__}, wanted a Tensor")
    name, columns, size, _ = TYPES[number]
    if shape is None:
        if data.dim() not in (2, 3) or data.shape[-1] % size:
            raise ValueError(
                f"gguf_weight: data of {name} has shape {tuple(data.shape)}, wanted [N, bytes] or [E, N, bytes] with "
                f"rows of whole blocks of {size} bytes, or the argument shape"
            )
        shape = (*data.shape[:-1], data.shape[-1] // size * columns)
    return PackedWeight(_FORMATS[number], (data,), shape, dtype, group=columns, stacked=len(shape) == 3)


def from_gguf_linear(module: Any, dtype: torch.dtype = torch.float32) -> PackedWeight:
    """Returns the weight of transformers' ``GgufLinear``, in the memory of the layer; no data is copied.

    ``dtype`` is the weight's default dtype. A ``GgufLinear`` has no dtype: it decodes to the dtype of its input.

    Raises:
        TypeError: ``module`` is not a ``GgufLinear``.
        ValueError: the layer permutes its input (``input_permutation``), so that the layer's function is not
            ``x @ W.T``; or the weight does not fit the layer's sizes.
    """
    with required("transformers", "peft_ext.weights.gguf.from_gguf_linear"):
        from transformers.integrations.gguf.utils import GgufLinear

    if not isinstance(module, GgufLinear):
        raise TypeError(f"from_gguf_linear: module is {module.__class__.__name__}, wanted a GgufLinear")
    if module.input_permutation is not None:
        raise ValueError("from_gguf_linear: the layer has an input_permutation, wanted a layer without a permutation")
    shape = (module.out_features, module.in_features)
    return gguf_weight(module.weight.detach(), module.ggml_type, shape, dtype)


def llama_row_order(rows: int, heads: int) -> Tensor:
    """Returns int64 ``[rows]``: the order of a GGUF file's rows in the weight of transformers' q_proj or k_proj.

    llama.cpp's converter interleaves the two halves of each head's rows, for architecture "llama" (Llama, Mistral and
    models with the same layers). Row i of transformers' weight is row ``order[i]`` of the file's ``attn_q`` or
    ``attn_k``. ``heads``: attention heads for ``attn_q``, key-value heads for ``attn_k``.

    Raises ValueError if ``rows`` is not a multiple of ``2 * heads``, or if ``heads`` is below 1.

    Source: transformers ``LlamaTensorProcessor``, llama.cpp ``convert_hf_to_gguf.py`` (``permute``).
    """
    if heads < 1 or rows % (2 * heads):
        raise ValueError(f"llama_row_order: {rows} rows for {heads} heads, wanted a multiple of {2 * max(heads, 1)}")
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def permuted_rows(weight: PackedWeight, order: Tensor) -> PackedWeight:
    """Returns a copy of a GGUF weight ``[N, K]`` whose row i is row ``order[i]`` of ``weight``.

    The function copies whole rows of bytes, and decodes or quantizes no value.

    Raises ValueError for another format, for a stacked weight, or if ``order`` does not have the shape ``(N,)``.
    """
    if weight.format not in _FORMATS.values() or weight.stacked:
        raise ValueError(f"permuted_rows: the weight is {weight!r}, wanted a GGUF weight (N, K)")
    rows = weight.out_features
    if order.shape != (rows,):
        raise ValueError(f"permuted_rows: order has shape {tuple(order.shape)}, wanted ({rows},): row numbers")
    return weight.map(lambda data: data.reshape(rows, -1)[order.to(data.device)])
