"""Integers in groups: weights of compressed-tensors, GPTQ, AWQ and HQQ, in the layouts of their files.

A group is a number of columns of a row (in HQQ, of elements of the flat weight) that share a scale and a zero point. In
each format a code ``q`` decodes to ``(q - zero) · scale``; in HQQ, ``q - zero`` is rounded first, see :func:`hqq`.
Sources: compressed-tensors' ``compressors/pack_quantized``
and ``naive_quantized``; GPTQModel's ``nn_modules/qlinear/torch.py`` and ``torch_awq.py``; hqq's ``core/quantize.py``.

``int_rows``, ``gptq``, ``awq`` and ``hqq`` take tensors; ``from_state`` takes the tensors and the configuration of a
checkpoint; the other ``from_`` functions take a module of a library. No function of this module copies or repacks the
codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Optional

import torch
from torch import Tensor

from .packed import Format, PackedWeight, option_of, register

# Flags in the integer ``option`` of a PackedWeight, by format.
INT_PLAIN, INT_ONE_SCALE = 1, 2  # "int": flag 1: each code is an int8 element; flag 2: the weight has only one scale.
V1 = 1  # "gptq": flag of a weight for which 1 was subtracted from each zero before the zeros were packed.
HQQ_AXIS0 = 1  # "hqq": flag of a weight of G groups in which code f of the flat weight is of group f % G.

# A word of AWQ has the codes of eight rows. AWQ_SHIFTS[n % 8] is the number of bits by which the code of row n is
# shifted in its word.
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)

SCALES = (torch.float32, torch.bfloat16, torch.float16)


def _refuse(format: str, what: str, came: object, wanted: object) -> NoReturn:
    raise ValueError(f"PackedWeight: {what} of {format} is {came}, wanted {wanted}")


def _check_part(format: str, name: str, part: Optional[Tensor], dtypes: Sequence[torch.dtype], count: int,
                shape: Sequence[int]) -> None:  # fmt: skip
    if part is None or part.dtype not in dtypes or part.numel() != count:
        came = "None" if part is None else f"{part.dtype} with {part.numel()} elements"
        wanted = " or ".join(map(str, dtypes))
        _refuse(format, name, came, f"{wanted} with {count} elements for shape {tuple(shape)}")


def _check_option(format: str, bits: Sequence[int], group: int, option: int, scales: Optional[Tensor]) -> int:
    """Returns the number of bits of a code, which ``option`` encodes. Raises ValueError if ``group`` or ``option`` does
    not fit the format."""
    if (came := option >> 4 & 15) not in bits:
        _refuse(format, "bits", came, " or ".join(map(str, bits)))
    if group < 0:
        _refuse(format, "group", group, "0 or more columns")
    wanted = option_of(scales=scales.dtype) if scales is not None and scales.dtype in SCALES else None
    if wanted is not None and option & 15 != wanted:
        _refuse(format, "option", f"{option & 15} for the dtype of the scales", f"{wanted} for {scales.dtype}")
    return came


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _check_int(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> None:
    codes, scales, zero_points, g_idx = parts
    (rows, columns), flags = shape, option >> 8
    plain, one_scale = flags & INT_PLAIN, flags & INT_ONE_SCALE
    bits = _check_option("int", (8,) if plain else (2, 4, 8), group, option, scales)
    if group and columns % group:
        _refuse("int", "group", group, f"a divisor of the {columns} columns")
    count = columns // group if group else 1
    if one_scale and (group or (zero_points is not None and not plain)):
        _refuse("int", "option", "one scale with groups or packed zero points", "one scale for each row")
    kind, size = (torch.int8, rows * columns) if plain else (torch.int32, rows * _words(columns, bits))
    _check_part("int", "codes", codes, (kind,), size, shape)
    _check_part("int", "scales", scales, SCALES, 1 if one_scale else rows * count, shape)
    if zero_points is not None:
        size = (1 if one_scale else rows * count) if plain else _words(rows, bits) * count
        _check_part("int", "zero_points", zero_points, (kind,), size, shape)
    if g_idx is not None:
        _check_part("int", "g_idx", g_idx, (torch.int32,), columns, shape)


def _check_gptq(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> None:
    qweight, scales, qzeros, g_idx = parts
    rows, columns = shape
    bits = _check_option("gptq", (2, 4, 8), group, option, scales)
    count = -(-columns // group) if group else 1
    _check_part("gptq", "qweight", qweight, (torch.int32,), _words(columns, bits) * rows, shape)
    _check_part("gptq", "scales", scales, SCALES, count * rows, shape)
    _check_part("gptq", "qzeros", qzeros, (torch.int32,), count * _words(rows, bits), shape)
    if g_idx is not None:
        _check_part("gptq", "g_idx", g_idx, (torch.int32,), columns, shape)


def _check_awq(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> None:
    qweight, scales, qzeros = parts
    rows, columns = shape
    _check_option("awq", (4,), group, option, scales)
    if rows % 8:
        _refuse("awq", "number of rows", rows, "a multiple of 8")
    if group and columns % group:
        _refuse("awq", "group", group, f"a divisor of the {columns} columns")
    count = columns // group if group else 1
    _check_part("awq", "qweight", qweight, (torch.int32,), columns * rows // 8, shape)
    _check_part("awq", "scales", scales, SCALES, count * rows, shape)
    _check_part("awq", "qzeros", qzeros, (torch.int32,), count * rows // 8, shape)


def _check_hqq(parts: Sequence[Optional[Tensor]], shape: torch.Size, group: int, option: int) -> None:
    codes, scale, zero = parts
    count = shape[0] * shape[1]
    bits = _check_option("hqq", (4, 8), group, option, scale)
    if not group or count % group:
        _refuse("hqq", "group", group, f"a divisor of the {count} elements")
    of_axis = group if option >> 8 & HQQ_AXIS0 else count // group
    if bits == 4 and of_axis % 2:
        _refuse("hqq", "number of groups", of_axis, "an even number, because a byte has the codes of two groups")
    _check_part("hqq", "W_q", codes, (torch.uint8,), count * bits // 8, shape)
    _check_part("hqq", "scale", scale, SCALES, count // group, shape)
    _check_part("hqq", "zero", zero, (scale.dtype,), count // group, shape)


INT = register(Format("int", 5, ("codes", "scales", "zero_points", "g_idx"), _check_int, "compressed-tensors"))
GPTQ = register(Format("gptq", 6, ("qweight", "scales", "qzeros", "g_idx"), _check_gptq, "GPTQModel"))
AWQ = register(Format("awq", 7, ("qweight", "scales", "qzeros"), _check_awq, "GPTQModel torch_awq.py"))
HQQ = register(Format("hqq", 8, ("W_q", "scale", "zero"), _check_hqq, "hqq"))


def _checked_order(format: str, g_idx: Optional[Tensor], group: int, count: int, columns: int) -> Optional[Tensor]:
    """Returns int32 ``g_idx``, or None if ``g_idx`` is None or empty or if each group is of consecutive columns. Reads
    the data of ``g_idx``, except on the meta device, where ``g_idx`` is returned unchecked.

    Raises ValueError if ``g_idx`` is not int32 with ``columns`` elements in its last dimension, or if a column's group
    is not from 0 to ``count - 1``.
    """
    if g_idx is None or g_idx.is_meta or not g_idx.numel():
        return g_idx if g_idx is not None and g_idx.numel() else None
    if g_idx.dtype is not torch.int32 or g_idx.shape[-1] != columns:
        _refuse(format, "g_idx", f"{g_idx.dtype} {tuple(g_idx.shape)}", f"torch.int32 [{columns}]")
    in_order = torch.arange(columns, device=g_idx.device) // (group or max(1, columns))
    if (g_idx == in_order).all():
        return None
    low, high = (int(edge) for edge in g_idx.aminmax())
    if low < 0 or high >= count:
        _refuse(format, "g_idx", f"from {low} to {high}", f"groups from 0 to {count - 1}")
    return g_idx


def _scale_dtype(format: str, scales: Tensor) -> torch.dtype:
    if not isinstance(scales, Tensor) or scales.dtype not in SCALES:
        came = scales.dtype if isinstance(scales, Tensor) else type(scales).__name__
        raise TypeError(f"PackedWeight: the scales of {format} are {came}, wanted a tensor of {SCALES}")
    return scales.dtype


def int_rows(codes: Tensor, scales: Tensor, shape: Sequence[int], *, bits: int = 4,
             zero_points: Optional[Tensor] = None, g_idx: Optional[Tensor] = None,
             dtype: Optional[torch.dtype] = None) -> PackedWeight:  # fmt: skip
    """Returns a weight of compressed-tensors' integers: ``W[n, k] = (q[n, k] - zero[n, g]) · scale[n, g]``.

    ``g`` is the group of column ``k``: ``k // group``, or ``g_idx[k]``. A group has K / G columns. The file formats
    pack-quantized, int-quantized and naive-quantized of compressed-tensors hold the weights that ``int_rows`` returns.
    compressed-tensors computes in the scales' dtype: the difference is exact, and the product is rounded once.

    Args:
        codes: int32 ``[N, ceil(K · bits / 32)]`` of ``q + 2^(bits - 1)``, the lowest bits first; or int8 ``[N, K]`` of
            ``q``.
        scales: float32, bfloat16 or float16 ``[N, G]``; ``[N, 1]`` for a scale for each row; ``[1]`` for one scale for
            the weight.
        shape: ``(N, K)``, or ``(E, N, K)`` of experts, whose tensors then have E as the first size.
        bits: 2, 4 or 8 bits of a packed code.
        zero_points: int32 ``[ceil(N · bits / 32), G]``, packed along N as the codes are packed along K; int8 ``[N, G]``
            with int8 codes; None for a symmetric weight.
        g_idx: int32 ``[K]``, the group of each column (activation ordering). g_idx None, and a g_idx with a -1 (which
            compressed-tensors writes before it orders the columns), mean consecutive groups.
        dtype: dtype of the weight; default: the scales' dtype, to which compressed-tensors decodes.

    Raises: TypeError or ValueError if a tensor's dtype, number of elements or values do not fit.
    """
    kind = _scale_dtype("int", scales)
    *experts, rows, columns = shape
    plain = codes.dtype is torch.int8
    each = scales.numel() // max(1, experts[0]) if experts else scales.numel()
    one_scale = each == 1 and rows != 1
    count = 1 if one_scale else max(1, each // max(1, rows))
    if columns % count:
        _refuse("int", "scales", tuple(scales.shape), f"[{rows}, G] with a G that divides the {columns} columns")
    if not one_scale:
        of_zeros = rows if plain else _words(rows, bits)
        for name, part, first in (("scales", scales, rows), ("zero_points", zero_points, of_zeros)):
            if part is not None and part.dim() == len(shape) and tuple(part.shape[-2:]) != (first, count):
                _refuse("int", name, list(part.shape), f"[{first}, {count}]")
    group = columns // count if count > 1 else 0
    if g_idx is not None and not g_idx.is_meta and g_idx.numel() and (g_idx == -1).any(-1).all():
        g_idx = None
    g_idx = _checked_order("int", g_idx, group, count, columns)
    flags = (INT_PLAIN if plain else 0) | (INT_ONE_SCALE if one_scale else 0)
    option = option_of(scales=kind, bits=8 if plain else bits, flags=flags)
    return PackedWeight(INT, (codes, scales, zero_points, g_idx), shape, dtype or kind, group=group, option=option,
                        stacked=bool(experts))  # fmt: skip


def gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, bits: int = 4, group: int = 128,
         g_idx: Optional[Tensor] = None, v1: bool = False, in_features: Optional[int] = None,
         dtype: Optional[torch.dtype] = None) -> PackedWeight:  # fmt: skip
    """Returns a GPTQ weight: ``W[n, k] = scale[g, n] · (q[k, n] - zero[g, n])``.

    ``g`` is the group of column ``k``: ``k // group``, or ``g_idx[k]``. GPTQModel computes in the scales' dtype: the
    difference is exact, and the product is rounded once.

    Args:
        qweight: int32 ``[ceil(K · bits / 32), N]``. A word of qweight has the codes of consecutive columns k of one row
            n of W, the lowest bits first. For experts, qweight, qzeros, scales and g_idx have the number of experts as
            their first size.
        qzeros: int32 ``[G, ceil(N · bits / 32)]``. A word of qzeros has the zeros of consecutive rows n of W.
        scales: float32, bfloat16 or float16 ``[G, N]``.
        bits: number of bits of a code: 2, 4 or 8.
        group: number of columns of a group; -1 or 0: all columns.
        g_idx: int32 ``[K]``, the group of each column (``desc_act``); None: consecutive groups.
        v1: whether 1 was subtracted from each zero, as in files with ``checkpoint_format`` "gptq". As in GPTQModel, the
            ones are added back to all fields of a word in one addition, so that a field of all ones carries into the
            next field.
        in_features: K; default: the number of codes of a column of qweight.
        dtype: dtype of the weight; default: the scales' dtype, to which GPTQModel decodes.

    Raises: TypeError or ValueError if a tensor's dtype, shape or values do not fit, or if bits is not 2, 4 or 8.
    """
    kind = _scale_dtype("gptq", scales)
    if bits not in (2, 4, 8):
        _refuse("gptq", "bits", bits, "2, 4 or 8")
    *experts, words, _ = qweight.shape
    columns, rows = words * 32 // bits if in_features is None else in_features, scales.shape[-1]
    group = 0 if group is None or group <= 0 or group >= columns else group
    count = -(-columns // group) if group else 1
    for name, part, wanted in (("qweight", qweight, (_words(columns, bits), rows)), ("scales", scales, (count, rows)),
                               ("qzeros", qzeros, (count, _words(rows, bits)))):  # fmt: skip
        if tuple(part.shape) != (*experts, *wanted):
            _refuse(
                "gptq",
                name,
                list(part.shape),
                f"{[*experts, *wanted]} for {bits} bits and groups of {group or columns}",
            )
    g_idx = _checked_order("gptq", g_idx, group, count, columns)
    option = option_of(scales=kind, bits=bits, flags=V1 if v1 else 0)
    return PackedWeight(GPTQ, (qweight, scales, qzeros, g_idx), (*experts, rows, columns), dtype or kind, group=group,
                        option=option, stacked=bool(experts))  # fmt: skip


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, dtype: Optional[torch.dtype] = None) -> PackedWeight:
    """Returns an AWQ weight of 4 bits in the GEMM layout: ``W[n, k] = (q[k, n] - zero[g, n]) · scale[g, n]``.

    The group ``g`` of column ``k`` is ``k // group``, and a group has ``group = K / G`` columns. GPTQModel computes in
    the scales' dtype: the difference is exact, and the product is rounded once.

    Args:
        qweight: int32 ``[K, N / 8]``. From the lowest bits on, a word of qweight has the codes of the rows 0, 2, 4, 6,
            1, 3, 5 and 7 of eight rows of W. For experts, qweight, qzeros and scales have the number of experts as
            their first size.
        qzeros: int32 ``[G, N / 8]``, with the rows of a word in the order of qweight.
        scales: float32, bfloat16 or float16 ``[G, N]``.
        dtype: dtype of the weight; default: the scales' dtype.

    Raises: TypeError or ValueError if a tensor's dtype or shape does not fit, for example in the GEMV layouts.
    """
    kind = _scale_dtype("awq", scales)
    *experts, columns, _ = qweight.shape
    count, rows = scales.shape[-2:]
    if count == 0 or columns % count:
        _refuse("awq", "scales", list(scales.shape), f"[G, N] with a G that divides the {columns} columns")
    for name, part, first in (("qweight", qweight, columns), ("qzeros", qzeros, count)):
        if tuple(part.shape) != (*experts, first, rows // 8):
            _refuse("awq", name, list(part.shape), f"{[*experts, first, rows // 8]}, the GEMM layout of 4 bits")
    return PackedWeight(AWQ, (qweight, scales, qzeros), (*experts, rows, columns), dtype or kind,
                        group=columns // count if count > 1 else 0, option=option_of(scales=kind, bits=4),
                        stacked=bool(experts))  # fmt: skip


def hqq(W_q: Tensor, scale: Tensor, zero: Tensor, shape: Sequence[int], *, bits: int = 4, group: int = 64,
        axis: int = 1, dtype: Optional[torch.dtype] = None) -> PackedWeight:  # fmt: skip
    """Returns an HQQ weight: ``W = round(q - zero) · scale``, where ``round`` rounds to the dtype of scale and zero.

    hqq computes in the dtype of scale and zero (hqq's ``compute_dtype``), and hqq's zeros are no integers, so that the
    difference is rounded. The codes of W have the flat numbers ``f = n K + k``. The group of code f is ``f // group``
    with axis 1, and ``f % G`` with axis 0.

    Args:
        W_q: uint8, N · K bytes for 8 bits, and N · K / 2 for 4 bits: the first half of the codes is in the high
            nibbles, the second half is in the low nibbles. A float tensor (``view_as_float``) is read as bytes.
        scale, zero: float32, bfloat16 or float16 with G = N · K / group elements.
        shape: ``(N, K)``, or ``(E, N, K)`` of experts, whose tensors have E as their first size.
        bits: number of bits of a code: 4 or 8.
        group: number of elements that share a scale.
        axis: 0 or 1, the axis of hqq's groups.
        dtype: dtype of the weight; default: the scales' dtype.

    Raises: TypeError or ValueError if a tensor's dtype or number of elements does not fit, if bits or axis has another
    value, if group does not divide the number of elements, or if the number of groups is odd with 4 bits (with axis 0:
    if group is odd).
    """
    kind = _scale_dtype("hqq", scale)
    if axis not in (0, 1):
        _refuse("hqq", "axis", axis, "0 or 1")
    codes = W_q if W_q.dtype is torch.uint8 else W_q.view(torch.uint8)
    option = option_of(scales=kind, bits=bits, flags=HQQ_AXIS0 if axis == 0 else 0)
    return PackedWeight(HQQ, (codes, scale, zero), shape, dtype or kind, group=group, option=option,
                        stacked=len(shape) == 3)  # fmt: skip


# --- checkpoints and modules ------------------------------------------------------------------------------------------


def from_state(config: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: Optional[Sequence[int]] = None,
               dtype: Optional[torch.dtype] = None) -> PackedWeight:  # fmt: skip
    """Returns the weight of a layer of a checkpoint of compressed-tensors, GPTQ, AWQ or HQQ.

    Args:
        config: the checkpoint's ``quantization_config``. ``config`` must have the settings of this one weight: if a
            configuration of compressed-tensors has several ``config_groups``, pass the group of the layer; if a
            configuration of hqq has several settings, pass the setting of the layer, as ``{"quant_method": ...,
            **setting}``.
        tensors: the layer's tensors by name without a prefix, for example ``qweight``, ``qzeros``, ``scales``.
        shape: ``(N, K)``; may be omitted if the tensors give the shape.
        dtype: dtype of the weight; default: the scales' dtype.

    Raises: TypeError for scales of another dtype than float32, bfloat16 and float16; ValueError, whose text names what
    came and what was wanted, for other arguments that do not fit, and for a layout that is not supported.
    """
    method = str(config.get("quant_method"))
    read = _READERS.get(method)
    if read is None:
        raise ValueError(f"from_state: quant_method is {method!r}, wanted one of {', '.join(_READERS)}")
    return read(config, tensors, None if shape is None else tuple(shape), dtype)


def _needed(method: str, tensors: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    missing = [name for name in names if tensors.get(name) is None]
    if missing:
        raise ValueError(f"from_state: {method} lacks {', '.join(missing)}; the tensors are {', '.join(tensors)}")
    return [tensors[name].detach() for name in names]


def _wrong(method: str, setting: str, came: object, wanted: str) -> NoReturn:
    raise ValueError(f"from_state: {setting} of {method} is {came!r}, wanted {wanted}")


def _optional(tensors: Mapping[str, Tensor], name: str) -> Optional[Tensor]:
    tensor = tensors.get(name)
    return None if tensor is None else tensor.detach()


def _read_compressed(config: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: Optional[tuple[int, ...]],
                     dtype: Optional[torch.dtype]) -> PackedWeight:  # fmt: skip
    method = "compressed-tensors"
    scheme: Mapping[str, Any] = config
    if "weights" not in config:
        groups = config.get("config_groups") or {}
        if len(groups) != 1:
            _wrong(method, "config_groups", list(groups), "one group, or the group of the layer with its weights")
        (scheme,) = groups.values()
    weights, format = scheme.get("weights") or {}, scheme.get("format") or config.get("format")
    if weights.get("type", "int") != "int":
        _wrong(method, "type", weights.get("type"), "'int'")
    if (strategy := weights.get("strategy")) not in (None, "group", "channel", "tensor"):
        _wrong(method, "strategy", strategy, "'group', 'channel' or 'tensor'")
    if format not in (None, "pack-quantized", "int-quantized", "naive-quantized", "mixed-precision"):
        _wrong(method, "format", format, "'pack-quantized', 'int-quantized' or 'naive-quantized'")
    name = "weight_packed" if tensors.get("weight_packed") is not None else "weight"
    codes, scales = _needed(method, tensors, name, "weight_scale")
    packed, bits = name == "weight_packed", weights.get("num_bits", 8)
    if packed and bits not in (2, 4, 8):
        _wrong(method, "num_bits", bits, "2, 4 or 8")
    if codes.dtype is not (torch.int32 if packed else torch.int8):
        _wrong(method, name, codes.dtype, "torch.int32" if packed else "torch.int8")
    if packed:
        shape = tuple(_needed(method, tensors, "weight_shape")[0].tolist()) if shape is None else shape
    else:
        shape = tuple(codes.shape)
    zero_points = None if weights.get("symmetric", True) else _needed(method, tensors, "weight_zero_point")[0]
    weight = int_rows(codes, scales, shape, bits=bits, zero_points=zero_points,
                      g_idx=_optional(tensors, "weight_g_idx"), dtype=dtype)  # fmt: skip
    size = weights.get("group_size")
    if strategy == "group" and size and size != (weight.group or shape[-1]):
        _wrong(method, "group_size", size, f"{weight.group or shape[-1]}, the group size of the scales")
    return weight


def _read_gptq(config: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: Optional[tuple[int, ...]],
               dtype: Optional[torch.dtype]) -> PackedWeight:  # fmt: skip
    format = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if format not in ("gptq", "gptq_v2"):
        _wrong("gptq", "checkpoint_format", format, "'gptq' or 'gptq_v2'")
    if (pack := str(config.get("pack_dtype") or "int32").removeprefix("torch.")) != "int32":
        _wrong("gptq", "pack_dtype", pack, "'int32'")
    qweight, qzeros, scales = _needed("gptq", tensors, "qweight", "qzeros", "scales")
    return gptq(qweight, qzeros, scales, bits=config.get("bits", 4), group=config.get("group_size", 128),
                g_idx=_optional(tensors, "g_idx"), v1=format == "gptq",
                in_features=None if shape is None else shape[1], dtype=dtype)  # fmt: skip


def _read_awq(config: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: Optional[tuple[int, ...]],
              dtype: Optional[torch.dtype]) -> PackedWeight:  # fmt: skip
    format = str(config.get("version") or config.get("format") or "gemm").lower()
    if format != "gemm":
        _wrong("awq", "version", format, "'gemm'")
    if (bits := config.get("bits", config.get("w_bit", 4))) != 4:
        _wrong("awq", "bits", bits, "4")
    qweight, qzeros, scales = _needed("awq", tensors, "qweight", "qzeros", "scales")
    weight = awq(qweight, qzeros, scales, dtype=dtype)
    size = config.get("group_size", config.get("q_group_size", -1))
    if size > 0 and size != (weight.group or weight.in_features):
        _wrong("awq", "group_size", size, f"{weight.group or weight.in_features}, the group size of the scales")
    if shape is not None and tuple(weight.shape) != shape:
        _wrong("awq", "shape", shape, str(tuple(weight.shape)))
    return weight


def _decoded(value: Any, text: bool = False) -> Any:
    """Returns a setting of hqq's, which hqq's state dict may hold as a tensor: a number, or the bytes of a text."""
    if not isinstance(value, Tensor):
        return value
    return bytes(value.tolist()).decode() if text else value.tolist()


def _read_hqq(config: Mapping[str, Any], tensors: Mapping[str, Any], shape: Optional[tuple[int, ...]],
              dtype: Optional[torch.dtype]) -> PackedWeight:  # fmt: skip
    held = config.get("quant_config", config)
    setting = {**held.get("weight_quant_params", {}), **{k: v for k, v in tensors.items() if v is not None}}
    for name in ("scale_q", "zero_q", "zero_scale"):
        if name in setting:
            raise ValueError(f"from_state: hqq has {name}, wanted scale and zero, neither quantized nor offloaded")
    for name in ("quant_scale", "quant_zero"):
        if _decoded(setting.get(name)):
            _wrong("hqq", name, True, "False: scales and zeros that are not quantized")
    if "nbits" not in setting or "group_size" not in setting or "axis" not in setting:
        raise ValueError(f"from_state: hqq has the settings {', '.join(setting)}, wanted nbits, group_size and axis")
    bits, axis, group = (_decoded(setting[name]) for name in ("nbits", "axis", "group_size"))
    if bits not in (4, 8):
        _wrong("hqq", "nbits", bits, "4 or 8")
    if (packing := _decoded(setting.get("packing"), True)) not in (f"{bits}bit_u8", None):
        _wrong("hqq", "packing", packing, f"'{bits}bit_u8'")
    codes, scale, zero = _needed("hqq", setting, "W_q", "scale", "zero")
    if shape is None and "shape" not in setting:
        raise ValueError("from_state: hqq lacks the shape")
    shape = tuple(_decoded(setting["shape"])) if shape is None else shape
    compute = _decoded(setting.get("compute_dtype"), True) or scale.dtype
    if isinstance(compute, str):
        compute = getattr(torch, compute.removeprefix("torch."), compute)
    if scale.dtype is not compute or zero.dtype is not compute:
        _wrong("hqq", "compute_dtype", compute, f"the dtype of scale ({scale.dtype}) and zero ({zero.dtype})")
    group = group or shape[1 if axis == 1 else 0]
    return hqq(codes, scale, zero, shape, bits=bits, group=group, axis=axis, dtype=dtype)


_READERS = {"compressed-tensors": _read_compressed, "gptq": _read_gptq, "awq": _read_awq, "hqq": _read_hqq}


def _tensors_of(module: torch.nn.Module, *names: str) -> dict[str, Tensor]:
    held = {name: getattr(module, name, None) for name in names}
    return {name: tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}


def from_compressed_tensors(module: torch.nn.Module, dtype: Optional[torch.dtype] = None) -> PackedWeight:
    """Returns the weight of a linear module that compressed-tensors compressed, in the module's memory.

    The module has ``weight_packed``, ``weight_scale`` and ``weight_shape``, or an int8 ``weight`` and ``weight_scale``,
    and compressed-tensors' ``quantization_scheme``.

    Raises: TypeError or ValueError as in :func:`from_state`; ValueError for a module without a quantization_scheme.
    """
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None or scheme.weights is None:
        raise ValueError(f"from_compressed_tensors: {type(module).__name__} has no quantization_scheme of its weight")
    given = scheme.weights
    names = ("type", "strategy", "num_bits", "symmetric", "group_size")
    weights = {name: getattr(given, name) for name in names}
    weights |= {name: str(getattr(weights[name], "value", weights[name])) for name in ("type", "strategy")}
    tensors = _tensors_of(module, "weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point",
                          "weight_g_idx")  # fmt: skip
    return _read_compressed({"weights": weights}, tensors, None, dtype)


def from_gptq(module: torch.nn.Module, v1: Optional[bool] = None, dtype: Optional[torch.dtype] = None) -> PackedWeight:
    """Returns the weight of a GPTQ module (GPTQModel's TorchLinear or TorchQuantLinear, AutoGPTQ's QuantLinear), in the
    module's memory.

    Args:
        v1: whether 1 was subtracted from each of the module's zeros, see :func:`gptq`; default: whether
            ``module.qzero_format()`` is 1, a number that GPTQModel changes when it loads a model; True for a module
            without this method.

    Raises: TypeError or ValueError as in :func:`from_state`; ValueError for a module whose attribute ``planar`` is
    true.
    """
    if getattr(module, "planar", False):
        raise ValueError("from_gptq: the module's words are planar, wanted checkpoint_format 'gptq' or 'gptq_v2'")
    version = getattr(module, "qzero_format", None)
    if v1 is None:
        v1 = version is None or version() == 1
    config = {"bits": module.bits, "group_size": module.group_size, "pack_dtype": getattr(module, "pack_dtype", None),
              "checkpoint_format": "gptq" if v1 else "gptq_v2"}  # fmt: skip
    tensors = _tensors_of(module, "qweight", "qzeros", "scales", "g_idx")
    return _read_gptq(config, tensors, (tensors["scales"].shape[-1], _in_features(module)), dtype)


def from_awq(module: torch.nn.Module, dtype: Optional[torch.dtype] = None) -> PackedWeight:
    """Returns the weight of an AWQ module in the GEMM layout (GPTQModel's AwqTorchLinear, AutoAWQ's WQLinear_GEMM), in
    the module's memory.

    Raises: TypeError or ValueError as in :func:`from_state`.
    """
    bits = getattr(module, "bits", None) or getattr(module, "w_bit", 4)
    tensors = _tensors_of(module, "qweight", "qzeros", "scales")
    return _read_awq({"bits": bits, "group_size": module.group_size}, tensors, None, dtype)


def from_hqq(module: torch.nn.Module, dtype: Optional[torch.dtype] = None) -> PackedWeight:
    """Returns the weight of an ``hqq.core.quantize.HQQLinear``, in the module's memory.

    Raises: ValueError for a module that is not quantized yet; TypeError or ValueError as in :func:`from_state`.
    """
    meta, codes = getattr(module, "meta", None), getattr(module, "W_q", None)
    if not meta or codes is None:
        raise ValueError("from_hqq: the module is not quantized yet: W_q or meta is None")
    return _read_hqq({}, {**meta, "W_q": codes}, None, dtype)


def _in_features(module: torch.nn.Module) -> int:
    # AutoGPTQ's modules have infeatures instead of in_features.
    return getattr(module, "in_features", None) or module.infeatures
