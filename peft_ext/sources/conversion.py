"""Plans how transformers' conversions make the tensors of a model from the tensors in the model's files.

transformers renames the tensors of many checkpoints while it loads them, and joins or splits some tensors: Mixtral's
files have each expert's w1, w2 and w3, and the model has gate_up_proj and down_proj of all experts. :func:`plan`
applies transformers' renamings to the names only, and checks names, shapes and dtypes, before any weight is read.
A :class:`Group` has the tensors of the files that become one tensor of the model, or several tensors by one conversion.
The methods of a group read and convert these tensors, or only the rows that a process needs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor

from .._imports import required
from .json_file import first_line
from .model import SourceError
from .tensor_files import TensorFiles

with required("transformers", "loading shards of a model"):
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        build_glob_alternation,
        dot_natural_key,
        rename_source_key,
    )


@dataclass(frozen=True)
class Shapes:
    """A stand-in for the dense model in transformers' conversions, with the configuration and tensors on the meta
    device."""

    config: Any
    tensors: dict[str, Tensor]

    def get_parameter(self, name: str) -> Tensor:
        return self.tensors[name]

    get_parameter_or_buffer = get_parameter


@dataclass
class Group:
    """Tensors of the files that become one tensor of the model, or several tensors by one conversion of transformers.

    Attributes:
        name: name of the first tensor of the model that the group makes.
        parts: a dict that maps each source pattern of the conversion to the names of the tensors in the files that
            match the pattern, in the order in which the conversion gets these tensors. A group without a conversion,
            whose tensor is only renamed, has the one pattern "".
        dtype: the dtype to which each tensor of the files is cast before the conversion.
        converter: transformers' conversion; None if the group's tensor is only renamed.
        model: a stand-in for the dense model, which some conversions read.
        shapes: a dict that maps the name of each tensor of the model that the group makes to the tensor's shape.
    """

    name: str
    files: TensorFiles
    dtype: torch.dtype
    parts: dict[str, list[str]] = field(default_factory=dict)
    converter: Optional[Any] = None
    model: Optional[Shapes] = None
    shapes: dict[str, torch.Size] = field(default_factory=dict)

    @property
    def is_by_rows(self) -> bool:
        """Whether :meth:`rows` can make some rows of the result without reading all data of the group in the files."""
        if self.converter is None:
            return True
        first, *others = self.converter.operations
        return (
            type(first) is MergeModulelist and first.dim == 0 and len(others) < 2
            and all(type(operation) is Concatenate and operation.dim > 0 for operation in others)
            and len(self.shapes) == 1
        )  # fmt: skip

    def rows(self, start: int, end: int) -> Tensor:
        """Returns the rows ``start`` to ``end`` (exclusive) of the group's only tensor, on the CPU.

        If the group joins the tensors of single experts, a row is one expert, and is made from the tensors of this
        expert alone. Raises SourceError where a file can't be read.
        """
        if self.converter is None:
            return self.files.rows(self.parts[""][0], start, end).to(self.dtype)
        chosen = {pattern: names[start:end] for pattern, names in self.parts.items()}
        return self._converted(chosen)[self.name]

    def whole(self) -> dict[str, Tensor]:
        """Returns the tensors of the group by name, on the CPU. Raises SourceError where a file can't be read."""
        if self.converter is None:
            return {self.name: self.files.rows(self.parts[""][0]).to(self.dtype)}
        return self._converted(self.parts)

    def _converted(self, parts: dict[str, list[str]], on_meta: bool = False) -> dict[str, Tensor]:
        converter = copy.deepcopy(self.converter)
        for pattern, names in parts.items():
            for name in names:
                if on_meta:
                    tensor = torch.empty(self.files.entries[name].shape, dtype=self.dtype, device="meta")
                else:
                    tensor = self.files.rows(name).to(self.dtype)
                converter.add_tensor(self.name, name, pattern, tensor)
        try:
            found = converter.convert(self.name, model=self.model, config=self.model.config)
        except Exception as error:  # a conversion that needs the whole model may raise any error
            raise SourceError(f"model {self.where}: transformers' conversion of {self.name}: "
                              f"{first_line(error)}") from error  # fmt: skip
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in found.items()}

    def trace(self) -> None:
        """Sets ``shapes`` by converting tensors on the meta device. Raises SourceError where the conversion fails."""
        if self.converter is None:
            self.shapes = {self.name: torch.Size(self.files.entries[self.parts[""][0]].shape)}
            return
        self.shapes = {name: tensor.shape for name, tensor in self._converted(self.parts, on_meta=True).items()}

    @property
    def names(self) -> Iterator[str]:
        """The names of the group's tensors in the files."""
        return (name for names in self.parts.values() for name in names)

    @property
    def where(self) -> str:
        """The file and name of the group's first tensor, for a message."""
        name = next(iter(self.names))
        return f"{self.files.entries[name].file}: {name}"


def plan(
    model: Any, files: TensorFiles, dtype: torch.dtype, quantizer: Optional[Any] = None
) -> tuple[list[Group], set[str]]:
    """Returns the groups that make the tensors of ``model``'s state dict, and the names of the buffers in the state
    dict that no group makes, which have to be initialized.

    ``model`` is a transformers model on the meta device, made in ``dtype``. The layers of ``model`` are dense, or
    packed as in the files; for a packed model, ``quantizer`` is the result of
    :func:`peft_ext.sources.model.pack_as_stored`. If transformers loads a tensor in another dtype than ``dtype``, the
    tensor in ``model`` gets this other dtype. A buffer that the files lack is initialized if the model's class allows a
    missing buffer (``_keys_to_ignore_on_load_missing``). Tensors of the files that the model does not have are ignored,
    as transformers does.

    Raises: SourceError where the files lack a tensor, or where a tensor has a wrong shape or dtype.
    """
    mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    groups = _groups(model, files, mapping, wanted, _dtypes(model, dtype))
    # save_pretrained reverts the conversions in _weight_conversions. If this release of transformers has no was_used,
    # save_pretrained reverts all conversions of the mapping.
    used = [conversion for conversion in mapping if getattr(conversion, "was_used", lambda: True)()]
    model._weight_conversions = used
    found: dict[str, Group] = {}
    for group in groups.values():
        group.trace()
        for name, shape in group.shapes.items():
            if name in wanted:
                _check_tensor(group, name, shape, wanted[name])
                found[name] = group
    tied: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    initialized = set()
    for names in tied.values():
        if any(name in found for name in names):
            continue
        if any(re.search(pattern, names[0]) for pattern in model._keys_to_ignore_on_load_missing or ()):
            if names[0] in dict(model.named_buffers()):
                initialized.update(names)
                continue
        at = next(iter(files.entries.values())).file.parent if files.entries else "the files"
        raise SourceError(f"model {at}: the files lack {names[0]}, which would be random")
    return [group for group in groups.values() if any(name in found for name in group.shapes)], initialized


def _dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Casts the model's tensors to the dtypes in which transformers would load them, and returns a dict that maps the
    tensors' names to these dtypes."""
    kept, found = model._get_dtype_plan(dtype), {}
    pattern, by_group, _ = build_glob_alternation(list(kept)) if kept else (None, {}, {})
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        match = pattern.search(name) if pattern is not None else None
        found[name] = kept[by_group[match.lastgroup]] if match is not None else tensor.dtype
        if found[name] != tensor.dtype:
            tensor.data = tensor.data.to(found[name])
    return found


def _groups(
    model: Any, files: TensorFiles, mapping: list[Any], wanted: dict[str, Tensor], dtypes: dict[str, torch.dtype]
) -> dict[str, Group]:
    """Returns a dict that maps the name of a group's first tensor in the model to the group. A group has the tensors
    that transformers' loader converts together."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    if unknown := [entry for entry in mapping if not isinstance(entry, (WeightRenaming, WeightConverter))]:
        raise SourceError(f"model {type(model).__name__}: conversion {type(unknown[0]).__name__} of its files is not "
                          "supported, wanted renamings and converters of transformers")  # fmt: skip
    prefix, dense = model.base_model_prefix, Shapes(model.config, wanted)
    groups: dict[str, Group] = {}
    for key in sorted(files.entries, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        group = groups.setdefault(name, Group(name, files, dtypes[name], converter=converter, model=dense))
        if group.converter is not converter or converter is None and group.parts:
            raise SourceError(f"model {files.entries[key].file}: {key} and {next(iter(group.names))} are both {name}")
        group.parts.setdefault(pattern or "", []).append(key)
    return groups


def _check_tensor(group: Group, name: str, shape: torch.Size, wanted: Tensor) -> None:
    if shape != wanted.shape:
        raise SourceError(f"model {group.where}: {name} has shape {tuple(shape)}, wanted {tuple(wanted.shape)}")
    for key in group.names:
        kind = group.files.entries[key].dtype
        has_other_codes = min(kind.itemsize, wanted.dtype.itemsize) == 1 and kind != wanted.dtype
        if kind.is_floating_point != wanted.is_floating_point() or has_other_codes:
            is_wide = wanted.is_floating_point() and wanted.dtype.itemsize > 1
            raise SourceError(f"model {group.files.entries[key].file}: {key} is {kind}, wanted "
                              f"{'floats of 16 or more bits' if is_wide else wanted.dtype}")  # fmt: skip
