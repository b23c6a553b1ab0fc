"""For each layout in which checkpoints store weights: the names of a layer's tensors, and the function that makes a
PackedWeight of the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from ...weights.fp8 import fp8
from ...weights.int_groups import awq, gptq, hqq, int_rows
from ...weights.mx import mxfp4, nvfp4
from ...weights.packed import PackedWeight
from .rules import Scheme

__all__ = ["LAYOUTS", "Layout"]

# Type of a function that makes a PackedWeight from the parts of the weight, the shape of the weight (outputs, inputs),
# with the number of experts in front for experts, and the scheme.
Make = Callable[[Sequence[Optional[Tensor]], tuple[int, ...], Scheme], PackedWeight]


@dataclass(frozen=True)
class Layout:
    """The names of one layer's tensors in a file, and the function that makes a PackedWeight of the tensors.

    Attributes:
        parts: names of the parts of the PackedWeight, in their order; the first part holds the codes.
        make: the function that makes the weight from its tensors. The parts of the PackedWeight are the layer's tensors
            in the order of ``parts``; a part is None if its tensor is not needed, such as a g_idx whose groups are in
            order.
        optional: the names in ``parts`` that a layer may lack.
        extra: names of tensors that a layer may have, and that are saved again with the weight, although decoding the
            weight does not need these tensors.
        joined: the text before a name of ``parts`` or ``extra`` in a name of the file: "." if the name takes the place
            of "weight", as in ``up_proj.weight_packed``; "" if the name is appended to the name of the dense parameter,
            as in ``gate_up_proj_blocks``.
        rows: the index of that dimension of the layer's tensors that runs along the rows of the weight. Layers of one
            input, such as an expert's gate and up, are merged to one weight by concatenating the tensors along this
            dimension.
        shared: names of tensors that must be equal in all layers that are merged to one weight, and of which the merged
            weight has one.
        halves: names of tensors of 4-bit codes whose first half of rows is in the high nibbles of the bytes.
        alone: function that returns why the tensors of layers of one input can't be merged to one weight; "" if they
            can.
    """

    parts: tuple[str, ...]
    make: Make
    optional: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    joined: str = "."
    rows: int = 0
    shared: tuple[str, ...] = ()
    halves: tuple[str, ...] = ()
    alone: Callable[[Scheme], str] = lambda scheme: ""

    @property
    def codes(self) -> str:
        return self.parts[0]

    def built(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], scheme: Scheme
    ) -> tuple[PackedWeight, list[Optional[str]], dict[str, Tensor]]:
        """Returns the packed weight, the name of each part's tensor (None for a part that is None), and a dict of the
        tensors of the file that are no part.

        Raises ValueError if a tensor is missing or does not fit.
        """
        for name in self.parts:
            if name not in tensors and name not in self.optional:
                raise ValueError(f"the file has {self.codes} without {name}")
        weight = self.make([tensors.get(name) for name in self.parts], shape, scheme)
        if tuple(weight.shape) != tuple(shape):
            raise ValueError(f"its packed weight has shape {tuple(weight.shape)}, wanted {tuple(shape)}")
        parts = zip(self.parts, weight.parts, strict=True)
        held = [None if part is None else name for name, part in parts]
        return weight, held, {name: tensor for name, tensor in tensors.items() if name not in held}


def _int_rows(parts: Sequence[Any], shape: tuple[int, ...], scheme: Scheme) -> PackedWeight:
    codes, scales, zero_points, g_idx = parts
    if codes.dtype not in (torch.int32, torch.int8):
        raise ValueError(f"its codes are {codes.dtype}, wanted torch.int32 or torch.int8")
    if not scheme.symmetric and zero_points is None:
        raise ValueError("its weights are asymmetric, and the file has no weight_zero_point")
    zero_points = None if scheme.symmetric else zero_points
    return int_rows(codes, scales, shape, bits=scheme.bits, zero_points=zero_points, g_idx=g_idx)


def _gptq(parts: Sequence[Any], shape: tuple[int, ...], scheme: Scheme) -> PackedWeight:
    qweight, scales, qzeros, g_idx = parts
    return gptq(qweight, qzeros, scales, bits=scheme.bits, group=scheme.group, g_idx=g_idx,
                v1=scheme.version == "gptq", in_features=shape[-1])  # fmt: skip


def _fp8(parts: Sequence[Any], shape: tuple[int, ...], scheme: Scheme) -> PackedWeight:
    codes, scales = parts
    return fp8(codes, scales, (scheme.rows, scheme.group), _library_dtype(scales))


def _library_dtype(scales: Tensor) -> torch.dtype:
    """Returns the dtype to which the checkpoint's own library decodes FP8 codes: the dtype of the scales, or bfloat16
    for scales of one byte."""
    return scales.dtype if scales.dtype.itemsize > 1 else torch.bfloat16


def _hqq(parts: Sequence[Any], shape: tuple[int, ...], scheme: Scheme) -> PackedWeight:
    axis = int(scheme.version.removeprefix("axis "))
    return hqq(*parts, shape, bits=scheme.bits, group=scheme.group or shape[-1 if axis == 1 else -2], axis=axis)


_INT = ("weight_scale", "weight_zero_point", "weight_g_idx")

# Names in hqq's state dict that belong to settings and not to the tensors of a weight.
_HQQ = (
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
    "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip


def _hqq_alone(scheme: Scheme) -> str:
    return "" if scheme.version == "axis 1" else "groups along axis 0 run through all rows of an expert's gate or up"


LAYOUTS: dict[str, Layout] = {
    "fp8": Layout(("weight", "weight_scale_inv"), _fp8),
    "float-quantized": Layout(("weight", "weight_scale"), _fp8),
    "nvfp4-pack-quantized": Layout(("weight_packed", "weight_scale", "weight_global_scale"),
                                   lambda parts, *_: nvfp4(*parts, reciprocal=True)),
    "mxfp4-pack-quantized": Layout(("weight_packed", "weight_scale"), lambda parts, *_: mxfp4(*parts)),
    "mxfp4 experts": Layout(("_blocks", "_scales"), lambda parts, *_: mxfp4(*parts), joined=""),
    "pack-quantized": Layout(("weight_packed", *_INT), _int_rows, _INT[1:], ("weight_shape",), shared=_INT[2:]),
    "int-quantized": Layout(("weight", *_INT), _int_rows, _INT[1:], shared=_INT[2:]),
    "gptq": Layout(("qweight", "scales", "qzeros", "g_idx"), _gptq, ("g_idx",), rows=1, shared=("g_idx",)),
    "awq": Layout(("qweight", "scales", "qzeros"), lambda parts, *_: awq(parts[0], parts[2], parts[1]), rows=1),
    "hqq": Layout(("W_q", "scale", "zero"), _hqq, (), _HQQ, shared=_HQQ, halves=("W_q",), alone=_hqq_alone),
}  # fmt: skip
