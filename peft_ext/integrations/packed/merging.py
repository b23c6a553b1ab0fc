"""How the stored tensors of a mixture's experts become the tensors of one stacked weight, and how the stacked weight is
saved.

transformers merges the linear layers of experts to one parameter by two operations: ``MergeModulelist`` stacks the
experts, and ``Concatenate`` appends the rows of layers of one input, such as gate and up. The operations of this module
take the same two steps, stacking and appending, for packed tensors. The rows of a packed tensor may run along another
dimension than the rows of a dense tensor, or share a byte. Each operation has an inverse, so that ``save_pretrained``
writes the bytes of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._imports import required
from .layouts import Layout
from .rules import Scheme

with required("transformers", "peft_ext.PackedConfig"):
    from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist

__all__ = ["Common", "merged_shape", "operations_of"]


def _one(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


class Common(ConversionOps):
    """Keeps the first of several tensors that should be equal, such as the g_idx of gate and the g_idx of up.

    Attributes:
        differ: names of the merged tensors whose source tensors were not equal.
    """

    def __init__(self) -> None:
        self.differ: list[str] = []

    def __deepcopy__(self, memo: Any) -> Common:
        return self  # transformers copies the converters, and all copies have to write to one list `differ`

    @torch.no_grad
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        first, *others = (_one(input_dict.pop(name)) for name in source_patterns if name in input_dict)
        if not all(torch.equal(first, other) for other in others):
            self.differ.append(kwargs.get("full_layer_name", target_patterns[0]))
        return {target_patterns[0]: first}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Repeated()


class _Repeated(ConversionOps):
    """The inverse of ``Common``: gives each target name a copy of one tensor."""

    @torch.no_grad
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        return {name: _one(value).clone() for name in target_patterns}

    @property
    def reverse_op(self) -> ConversionOps:
        return Common()


class _Halves(ConversionOps):
    """Appends the rows of two tensors ``[experts, bytes, ...]`` of 4-bit codes. The high nibbles of a tensor's bytes
    hold the first half of the rows, and the low nibbles hold the second half."""

    @torch.no_grad
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        first, second = (_one(input_dict.pop(name)) for name in source_patterns)
        return {target_patterns[0]: torch.cat((first & 0xF0 | second >> 4, first << 4 | second & 15), 1)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Apart()


class _Apart(ConversionOps):
    """The inverse of ``_Halves``: divides the rows of one tensor of 4-bit codes between two tensors."""

    @torch.no_grad
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        high, low = _one(value).chunk(2, 1)
        return dict(zip(target_patterns, (high & 0xF0 | low >> 4, high << 4 | low & 15), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return _Halves()


def _has_halves(layout: Layout, scheme: Scheme, part: str) -> bool:
    return part in layout.halves and scheme.bits == 4


def operations_of(layout: Layout, scheme: Scheme, part: str, dense: Sequence[Any]) -> list[Any]:
    """Returns the operations that merge the packed tensor ``part`` of experts, in place of transformers' operations
    ``dense`` for dense weights."""
    found: list[Any] = []
    for one in dense:
        if not isinstance(one, Concatenate):
            found.append(one)
        elif part in layout.shared:
            found.append(Common())
        else:
            found.append(_Halves() if _has_halves(layout, scheme, part) else Concatenate(1 + layout.rows))
    return found


def merged_shape(
    layout: Layout, scheme: Scheme, part: str, dense: Sequence[Any], sources: int, experts: int, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Returns the shape of the merged tensor of all experts, from the ``shape`` of the tensor of one layer of one
    expert.

    ``sources``: the number of layers whose rows are appended. Raises ValueError if transformers merges the experts by
    other operations than stacking and appending, or if the tensors of the layout can't be merged.
    """
    if [type(one) for one in dense] == [MergeModulelist] and dense[0].dim == 0 and sources == 1:
        return (experts, *shape)
    known = [type(one) for one in dense] == [MergeModulelist, Concatenate] and (dense[0].dim, dense[1].dim) == (0, 1)
    if not known or (sources != 2 and layout.halves):
        steps = ", ".join(map(str, dense))
        raise ValueError(f"transformers merges {sources} tensors of shape {shape} by {steps}, which is not supported")
    if reason := layout.alone(scheme):
        raise ValueError(f"experts can't stay packed: {reason}. Load a checkpoint whose experts are stored in another "
                         "layout, or load this one with its own library")  # fmt: skip
    if part in layout.shared:
        return (experts, *shape)
    if len(shape) <= layout.rows:
        raise ValueError(f"its {part} has shape {shape}, wanted {layout.rows + 1} dimensions or more")
    joined = list(shape)
    joined[layout.rows] *= sources
    return (experts, *joined)
