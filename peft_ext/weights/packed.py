"""PackedWeight: a frozen weight [N, K] that is stored as codes and scales, in the layout of a checkpoint file.

A weight has up to five tensors (``parts``) and two small integers (``group`` and ``option``), whose meaning the
weight's :class:`Format` defines. The kernels read the codes and scales from the tensors of the PackedWeight, and decode
the weight in each call. peft_ext stores no copy of a packed weight in another layout for its kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from .._ops import NAMESPACE

MOST_PARTS = 5

# The dtypes of scales in files, in the order of ScaleType in csrc/weight/packed_view.h.
SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.float8_e4m3fn)


def scale_type(dtype: torch.dtype) -> int:
    """Returns the index in ``SCALE_TYPES`` of a dtype of scales. uint8 counts as e8m0, because MXFP4 files declare
    their e8m0 scales as uint8."""
    if dtype is torch.uint8:
        dtype = torch.float8_e8m0fnu
    if dtype not in SCALE_TYPES:
        raise TypeError(f"PackedWeight: the scales are {dtype}, wanted one of {', '.join(map(str, SCALE_TYPES))}")
    return SCALE_TYPES.index(dtype)


def option_of(*, scales: Optional[torch.dtype] = None, bits: int = 0, flags: int = 0) -> int:
    """Returns the integer ``option`` of a weight: dtype of the scales, bits of a code, and the format's own flags."""
    return (0 if scales is None else scale_type(scales)) | bits << 4 | flags << 8


@dataclass(frozen=True)
class Format:
    """One way to store a weight.

    Attributes:
        name: name of the format in documents and errors.
        number: number of the format in ``csrc/weight/formats/list.h``.
        parts: names of the weight's tensors, in order.
        check: a function of ``(parts, shape, group, option)`` that raises ValueError if these arguments do not fit a
            weight ``[N, K]``.
        source: name of the library or specification that defines how a weight of the format is decoded.
        decode: None if the kernels decode the format. If no kernel decodes the format: the function by which
            :meth:`PackedWeight.dequantize` decodes the parts of a weight ``[N, K]`` to float32; layers and experts
            cannot hold a weight of this format.
    """

    name: str
    number: int
    parts: tuple[str, ...]
    check: Callable[[Sequence[Optional[Tensor]], torch.Size, int, int], None]
    source: str
    decode: Optional[Callable[[Sequence[Optional[Tensor]], torch.Size], Tensor]] = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes copy and pickle return the registered format itself, because formats are compared by identity."""
        return _registered, (self.name,)


def _registered(name: str) -> Format:
    return FORMATS[name]


FORMATS: dict[str, Format] = {}
_BY_NUMBER: dict[int, Format] = {}


def register(format: Format) -> Format:
    """Adds a format to ``FORMATS``. Raises ValueError if the name or the number is taken, or if the format has more
    than ``MOST_PARTS`` parts."""
    if format.name in FORMATS or format.number in _BY_NUMBER:
        raise ValueError(f"PackedWeight: the format {format.name} ({format.number}) exists")
    if len(format.parts) > MOST_PARTS:
        raise ValueError(f"PackedWeight: the format {format.name} has {len(format.parts)} parts, wanted 5 at most")
    FORMATS[format.name] = _BY_NUMBER[format.number] = format
    return format


def format_of(layout: int) -> Optional[str]:
    """Returns the name of the format of a packed weight from an operator's argument ``layout``; None if no format has
    the number."""
    format = _BY_NUMBER.get(layout >> 32 & 0xFF)
    return None if format is None else format.name


def _made(weight: PackedWeight) -> None:
    """PackedWeight calls ``_made`` with each new weight, except with an NF4Weight. ``_made`` does nothing until
    :func:`when_made` replaces ``_made``."""


def when_made(call: Callable[[PackedWeight], None]) -> None:
    """Sets the function that PackedWeight calls with each weight that is made; for an NF4Weight the function is not
    called.

    peft_ext.ops sets a function that proves the kernels of the weight's format before their first use.
    """
    global _made
    _made = call


def _as_bytes(part: Optional[Tensor]) -> Optional[Tensor]:
    """Returns a tensor of 8-bit floats as uint8, because kernels read 8-bit floats as bytes.

    A uint8 tensor is returned itself and not as a view: autograd saves the tensors that kernels read until the
    backward, and a saved view would keep the codes in memory that DeepSpeed's ZeRO-3 gathers for a layer.
    """
    is_float = part is not None and part.element_size() == 1 and part.dtype.is_floating_point
    return part.view(torch.uint8) if is_float else part


class PackedWeight:
    """A linear weight ``[N, K]``, or the weights ``[E, N, K]`` of experts, stored as codes and scales.

    Attributes:
        format: the :class:`Format`.
        parts: the weight's tensors, in the order of ``format.parts``; None for a tensor that this weight does not have.
        shape: ``(N, K)``, output and input features, or ``(E, N, K)`` if ``stacked``.
        dtype: dtype to which the format's own library decodes, and default dtype of :meth:`dequantize`.
        group: number of columns that share a scale; 0: all columns of a row. In FP4, NF4 and HQQ: number of elements of
            the flat weight that share a scale. In GGUF: number of columns of a block.
        option: an integer with the dtype of the scales, the bits of a code and the format's flags; see
            :func:`option_of`.
        stacked: whether the weight holds the weights of experts, so that each tensor in ``parts`` consists of the
            experts' tensors, one after the other.

    Raises:
        TypeError: a part is not a tensor, or dtype is not a float dtype.
        ValueError: the shape, the group or the option does not fit the format, or a part's size, dtype, layout or
            device does not fit.
    """

    def __init__(
        self,
        format: Format,
        parts: Sequence[Optional[Tensor]],
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        group: int = 0,
        option: int = 0,
        stacked: bool = False,
    ) -> None:
        self.format, self.shape, self.dtype = format, torch.Size(shape), dtype
        self.group, self.option, self.stacked = group, option, stacked
        self.parts = (*parts, *(None,) * (len(format.parts) - len(parts)))
        self._check()
        held = [_as_bytes(part) for part in self.parts] + [None] * (MOST_PARTS - len(self.parts))
        self._args = (*held, self.layout, list(self.shape))
        _made(self)

    def _check(self) -> None:
        name, device = self.format.name, None
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise TypeError(f"PackedWeight: dtype is {self.dtype!r}, wanted a float dtype")
        if len(self.shape) != (3 if self.stacked else 2):
            wanted = "(E, N, K)" if self.stacked else "(N, K)"
            raise ValueError(f"PackedWeight: {name} has shape {tuple(self.shape)}, wanted {wanted}")
        for part_name, part in zip(self.format.parts, self.parts, strict=True):
            if part is None:
                continue
            if not isinstance(part, Tensor):
                raise TypeError(f"PackedWeight: {part_name} of {name} is {type(part).__name__}, wanted a Tensor")
            if part.layout is not torch.strided or (device is not None and part.device != device):
                raise ValueError(
                    f"PackedWeight: {part_name} of {name} has layout {part.layout} on {part.device}, wanted a strided "
                    f"tensor on {device or part.device}"
                )
            device = part.device
        if device is None:
            raise ValueError(f"PackedWeight: {name} has no tensor")
        first = self._part_of(0) if self.stacked and self.shape[0] else self.parts
        self.format.check(first, self.shape[-2:], self.group, self.option)

    def _part_of(self, expert: int) -> tuple[Optional[Tensor], ...]:
        return tuple(None if part is None else part.reshape(self.shape[0], -1)[expert] for part in self.parts)

    def __repr__(self) -> str:
        return f"PackedWeight({self.format.name}, {tuple(self.shape)}, {self.dtype})"

    @property
    def layout(self) -> int:
        """The integer ``layout`` of the operators' schemas, which encodes the group, the number of the format and the
        option."""
        return self.group | self.format.number << 32 | self.option << 40

    @property
    def device(self) -> torch.device:
        return next(part.device for part in self.parts if part is not None)

    @property
    def out_features(self) -> int:
        return self.shape[-2]

    @property
    def in_features(self) -> int:
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        """Number of bytes of all tensors of the weight."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits(self) -> float:
        """Number of bits for each element, scales included."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def tensors(self) -> dict[str, Tensor]:
        """Returns a dict that maps the names of the tensors that the weight has to the tensors, in the order of
        ``format.parts``."""
        return {name: part for name, part in zip(self.format.parts, self.parts, strict=True) if part is not None}

    def replaced(self, parts: Sequence[Optional[Tensor]]) -> PackedWeight:
        """Returns a weight of this format, shape and dtype with other tensors."""
        return PackedWeight(self.format, parts, self.shape, self.dtype, group=self.group, option=self.option,
                            stacked=self.stacked)  # fmt: skip

    def map(self, fn: Callable[[Tensor], Tensor]) -> PackedWeight:
        """Returns a PackedWeight with ``fn`` applied to every tensor, for example to move the tensors to a device."""
        return self.replaced([None if part is None else fn(part) for part in self.parts])

    def to(self, device: torch.device | str) -> PackedWeight:
        """Returns this weight on another device. The tensors of the weight keep their dtypes."""
        return self.map(lambda t: t.to(device))

    @classmethod
    def stack(cls, weights: Sequence[PackedWeight]) -> PackedWeight:
        """Returns weights ``(N, K)`` of one format and shape as one stacked weight ``(E, N, K)``, with copied parts."""
        if not weights:
            raise ValueError("PackedWeight.stack: weights is empty, wanted one weight for each expert")
        first = weights[0]
        for other in weights:
            if (other.layout, other.shape, other.dtype) != (first.layout, first.shape, first.dtype):
                raise ValueError("PackedWeight.stack: weights differ in format, shape or dtype")
        parts = [None if part is None else torch.stack([one.parts[i] for one in weights])
                 for i, part in enumerate(first.parts)]  # fmt: skip
        return PackedWeight(first.format, parts, (len(weights), *first.shape), first.dtype, group=first.group,
                            option=first.option, stacked=True)  # fmt: skip

    def expert(self, index: int) -> PackedWeight:
        """Returns the weight ``(N, K)`` of one expert of a stacked weight, in the same memory."""
        if not self.stacked:
            raise ValueError(f"PackedWeight.expert: the weight has shape {tuple(self.shape)}, wanted a stacked weight")
        return PackedWeight(self.format, self._part_of(index), self.shape[1:], self.dtype, group=self.group,
                            option=self.option)  # fmt: skip

    def dequantize(self, dtype: Optional[torch.dtype] = None) -> Tensor:
        """Returns the decoded weight: each value in float32, in the order of operations of the format's own library,
        rounded once to ``dtype`` (default: the weight's dtype)."""
        dtype = self.dtype if dtype is None else dtype
        if self.stacked:
            return torch.stack([self.expert(i).dequantize(dtype) for i in range(self.shape[0])])
        if self.format.decode is not None:
            return self.format.decode(self.parts, self.shape).to(dtype)
        return getattr(torch.ops, NAMESPACE).nf4_dequantize(*self.op_args(), dtype)

    def check_kernel(self, holder: str) -> None:
        """Raises ValueError if no kernel decodes the format. The error's text begins with ``holder``, the name of the
        class or function that needs the kernel."""
        if self.format.decode is not None:
            raise ValueError(
                f"{holder}: no kernel decodes the weight's format {self.format.name}: decode the weight, "
                "weight.dequantize()"
            )

    def op_args(self) -> tuple[Any, ...]:
        """Returns the weight as arguments of the operators' schemas: five tensors or None, layout and shape."""
        return self._args


def unpacked(args: Sequence[Any], dtype: torch.dtype) -> PackedWeight:
    """Undoes :meth:`PackedWeight.op_args`. ``args`` are five tensors or None, layout and shape."""
    *parts, layout, shape = args
    format = _BY_NUMBER[layout >> 32 & 0xFF]
    return PackedWeight(format, parts[: len(format.parts)], shape, dtype, group=layout & 0xFFFFFFFF,
                        option=layout >> 40, stacked=len(shape) == 3)  # fmt: skip
