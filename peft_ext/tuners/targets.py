"""Finds the modules of a model that a configuration targets, and the parameters that several modules share."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from .._imports import required

with required("peft", "peft_ext.tuners"):
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES
    from peft.utils.other import AuxiliaryTrainingWrapper
with required("transformers", "peft_ext.tuners"):
    from transformers.pytorch_utils import Conv1D

ALL_LINEAR = "all-linear"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes of dense weights, not of packed codes

_Names = Optional[Union[list[str], str]]

# Keys of a transformers config, or of a nested config, that hold the number of layers of a stack.
_LAYER_COUNT = re.compile(r"(n_layers?|num_hidden_layers|num_layers|(en|de)coder_layers|num_(en|de)coder_layers)")


@dataclass
class TargetConfig(PeftConfig):
    """Fields of PEFT's configurations that choose modules. Unlike in PEFT, the name of a container stands for all
    modules below the container.

    Args:
        target_modules: full names ("model.layers.1.mlp") or last components of names ("mlp"); or a regular expression
            that matches a full name; or "all-linear". A module is a target if ``target_modules`` names the module, or a
            module that contains it. If ``target_modules`` is None, the method's default targets are used.
        exclude_modules: names or a regular expression, read like target_modules; these modules are not targets.
        modules_to_save: modules that are trained and saved whole, as in PEFT; these modules are not targets.
        layers_to_transform: index or indices of layers; None: all layers. Modules outside of the layers of
            ``layers_to_transform`` are not targets. A layer's index is the first number in the module's full name
            (after a name that matches ``layers_pattern``).
        layers_pattern: name or names of the list of layers ("layers", "h"), as regular expressions; default any name.

    Raises: TypeError or ValueError if a field has a value of a wrong type, or a value that is not allowed.
    """

    target_modules: _Names = field(
        default=None, metadata={"help": "Names or a regular expression; a container means everything below it."}
    )
    exclude_modules: _Names = field(
        default=None, metadata={"help": "Names or a regular expression of what is left alone, with all below it."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Modules that are trained and saved whole, such as a classification head."}
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "The index or indices of the layers that may hold targets."}
    )
    layers_pattern: _Names = field(
        default=None, metadata={"help": "The name of what layers_to_transform indexes, such as 'layers' or 'h'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules = self._names("target_modules", self.target_modules)
        self.exclude_modules = self._names("exclude_modules", self.exclude_modules)
        indices = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        if indices is not None and not all(type(index) is int and index >= 0 for index in indices):
            self._fail(
                "layers_to_transform", self.layers_to_transform, "None, an index of 0 or more, or a list of them"
            )
        if self.layers_pattern and indices is None:
            self._fail("layers_pattern", self.layers_pattern, "None where layers_to_transform is None")

    def _names(self, field_name: str, value: Any) -> Any:
        """Returns a list of names as a set, as PEFT's configurations do, and a regular expression or None unchanged.
        ``to_dict`` turns each set into a sorted list."""
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in value):
            raise TypeError(
                f"{type(self).__name__}: {field_name} is {value!r}, wanted names, a regular expression or None"
            )
        return set(value)

    def to_dict(self) -> dict[str, Any]:
        """Returns PEFT's dictionary, with a sorted list for each set, so that equal configurations are saved as equal
        files."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

    def _fail(self, field_name: str, value: Any, wanted: str) -> None:
        raise ValueError(f"{type(self).__name__}: {field_name} is {value!r}, wanted {wanted}")


# --- names ------------------------------------------------------------------------------------------------------------


def containers(name: str) -> Iterator[str]:
    """Yields the module's name and the names of the modules that contain it, innermost first: a.b.c, a.b, a."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _named(names: Union[Iterable[str], str], name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in names)


def matches(names: Optional[Union[Iterable[str], str]], name: str) -> bool:
    """Returns whether ``names`` contains, or matches, ``name`` or the name of a module that contains ``name``."""
    return bool(names) and any(_named(names, container) for container in containers(name))


def excluded(config: TargetConfig, name: str) -> bool:
    return matches(config.exclude_modules, name) or matches(config.modules_to_save, name)


def _layer_index(config: TargetConfig, name: str) -> Optional[int]:
    patterns = config.layers_pattern or [r"[^.]+"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:.*?\.)??(?:{pattern})\.(\d+)(?:\.|$)", name):
            return int(found.group(1))
    return None


def in_layers(config: TargetConfig, name: str) -> bool:
    """Returns whether ``layers_to_transform`` is None or the module ``name`` lies in one of its layers."""
    wanted = config.layers_to_transform
    return wanted is None or _layer_index(config, name) in ([wanted] if isinstance(wanted, int) else wanted)


def targeted(config: TargetConfig, name: str) -> bool:
    """Returns whether the module ``name`` is a target. If ``target_modules`` is None, every module in the chosen layers
    that is not excluded is a target."""
    named = config.target_modules is None or matches(config.target_modules, name)
    return named and in_layers(config, name) and not excluded(config, name)


# --- a model as it was before any adapter -----------------------------------------------------------------------------


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the full name and the module for every module below ``model``, as if the model had no adapter.

    In place of a tuner layer ``base_modules`` yields the module that the tuner layer wraps. Modules that adapters or
    ``modules_to_save`` added are left out.
    """
    inside = None
    for name, module in model.named_modules():
        if not name or (inside is not None and name.startswith(inside)):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside = f"{name}."
        if isinstance(module, BaseTunerLayer):
            yield name, module.get_base_layer()
        elif not isinstance(module, AuxiliaryTrainingWrapper):
            yield name, module


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields each parameter with its full name, as if the model had no adapter. A parameter that several modules share
    is yielded under each of its names."""
    wrapped = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holder = next((container for container in containers(name) if container in wrapped), None)
        if holder is None:
            yield name, parameter
        elif name.startswith(f"{holder}.base_layer."):
            yield f"{holder}.{name.removeprefix(f'{holder}.base_layer.')}", parameter


def expand_all_linear(model: nn.Module, names: Any, config: PeftConfig) -> Any:
    """Returns the full names that PEFT means by "all-linear" if ``names`` is "all-linear", otherwise ``names``.

    "all-linear" means every ``nn.Linear``, its quantized subclasses and GPT-2's ``Conv1D``, except the head of a
    language model and, for the task SEQ_CLS, the classifier.
    """
    if not isinstance(names, str) or names.lower() != ALL_LINEAR:
        return names
    heads = set(SEQ_CLS_HEAD_NAMES) if config.task_type == "SEQ_CLS" else set()
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(output, BaseTunerLayer):
        output = output.get_base_layer()
    return {
        name
        for name, module in base_modules(model)
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and name not in heads
    }


def last_layers(model: nn.Module, count: int) -> set[str]:
    """Returns the full names of the last ``count`` layers of each stack. T5, for example, has two stacks, an encoder
    and a decoder.

    A stack is an outermost ``nn.ModuleList``. If the model's config has layer counts, a list of another length is not a
    stack.

    Raises: ValueError if the model has no stack, or a stack with fewer layers than ``count``.
    """
    stacks: dict[str, int] = {}
    for name, module in base_modules(model):
        if isinstance(module, nn.ModuleList) and not any(container in stacks for container in containers(name)):
            stacks[name] = len(module)
    counts = set(_layer_counts(getattr(model, "config", None)))
    stacks = {name: length for name, length in stacks.items() if length in counts or not counts}
    if not stacks:
        raise ValueError(f"num_last_layers: {type(model).__name__} has no list of layers, give target_modules instead")
    for name, length in stacks.items():
        if count > length:
            raise ValueError(f"num_last_layers is {count}, wanted at most {length}, the number of layers of {name}")
    return {f"{name}.{index}" for name, length in stacks.items() for index in range(length - count, length)}


def _layer_counts(config: Any) -> Iterator[int]:
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _layer_counts(value)
        elif type(value) is int and _LAYER_COUNT.fullmatch(str(key)):
            yield value


# --- the plan ---------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """The names of the modules that an adapter wraps, and of the tensors that the adapter replaces in them.

    Attributes:
        units: maps the full name of a wrapped module to the names, within that module, of the tensors that the adapter
            owns there.
        tied: maps the full name of a wrapped module to a dict. The dict maps the name of a shared tensor in that module
            to the name of the wrapped module that owns the tensor, and to the tensor's name in the owner.
        excluded: full names of the modules that ``exclude_modules`` and ``modules_to_save`` excluded.
    """

    units: dict[str, list[str]] = field(default_factory=dict)
    tied: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)
    excluded: set[str] = field(default_factory=set)


def own_units(
    model: nn.Module, config: TargetConfig, *, within: Optional[Collection[str]] = None, buffers: bool = False
) -> dict[str, list[str]]:
    """Returns a dict from the full name of each unit, a module to wrap, to the names of the target tensors in the unit.

    A target module becomes a unit, which the adapter's layer wraps with all modules below it, if the module itself owns
    parameters: a linear layer, a norm, or a mixer that has a state matrix besides its projections. A module that
    contains an ``nn.ModuleList`` is not wrapped: its own parameters stay frozen, with a warning. No name of a tensor is
    in two units. ``within``: if given, only modules whose full names are in ``within``, and modules below these, are
    wrapped. ``buffers``: whether saved buffers, such as a batch norm's statistics, are target tensors too.

    Raises: ValueError if a target is quantized (a parameter is not of a float dtype of 16 to 64 bits, or the module has
    packed weights such as ``qweight``), or if a module to be wrapped contains an adapter already.
    """
    units: dict[str, list[str]] = {}
    inside = None
    for name, module in base_modules(model):
        own = [key for key, parameter in module._parameters.items() if parameter is not None]
        if not own or (inside is not None and name.startswith(inside)) or not targeted(config, name):
            continue
        if within is not None and not any(container in within for container in containers(name)):
            continue
        if any(isinstance(below, nn.ModuleList) for below in module.modules()):
            warnings.warn(
                f"{type(config).__name__}: {name}.{own[0]} stays frozen: lists of layers lie below it", stacklevel=2
            )
            continue
        inside = f"{name}."
        if names := _names_in(name, module, config, buffers):
            units[name] = names
    return units


def _names_in(unit: str, module: nn.Module, config: TargetConfig, buffers: bool) -> list[str]:
    names = []
    for path, below in module.named_modules():
        full = f"{unit}.{path}" if path else unit
        if excluded(config, full):
            continue
        if isinstance(below, BaseTunerLayer):
            raise ValueError(
                f"{type(config).__name__}: {unit} already contains an adapter, of {full}; target {full} instead"
            )
        saved = [
            key for key, tensor in below.named_buffers(recurse=False) if key not in below._non_persistent_buffers_set
        ]
        quantized = [key for key, parameter in below._parameters.items() if not _trainable(parameter)]
        quantized += [key for key in ("qweight", "W_q", "codebooks") if hasattr(below, key)]
        if quantized:
            raise ValueError(
                f"{type(config).__name__}: {full} is a {type(below).__name__} whose {quantized[0]} is quantized, and "
                "can't be trained; exclude the module, or load the model without quantization"
            )
        keys = [key for key, parameter in below._parameters.items() if parameter is not None] + (
            saved if buffers else []
        )
        names += [f"{path}.{key}" if path else key for key in keys]
    return names


def _trainable(parameter: Optional[nn.Parameter]) -> bool:
    # bitsandbytes' Params4bit may store its codes as bfloat16 (bnb_4bit_quant_storage).
    return parameter is None or (parameter.dtype in FLOATS and not hasattr(parameter, "quant_state"))


def plan(model: nn.Module, config: TargetConfig, units: dict[str, list[str]], skip_tied: Collection[str] = ()) -> Plan:
    """Returns the plan to replace tensors: which module owns which tensor.

    ``units`` maps the full name of each target module to the names of the module's tensors. If several target modules
    hold a tensor, the first of these modules in the model owns the tensor. ``skip_tied``: full names of parameters that
    are not replaced although they share a target tensor, because the modules with these parameters never read them.

    Raises: ValueError if a module that is not a target holds a target tensor too, because the two modules would then
    use different tensors; or if a tensor is a shard (ZeRO-3, DTensor), because a copy of a shard can't be trained.
    """
    places: dict[int, list[str]] = {}
    by_name = {}
    for name, parameter in _base_parameters(model):
        places.setdefault(id(parameter), []).append(name)
        by_name[name] = parameter
    replaced = {f"{unit}.{name}": (unit, name) for unit, names in units.items() for name in names}
    for name in replaced:
        if (tensor := by_name.get(name)) is not None and (hasattr(tensor, "ds_id") or type(tensor.data) is not Tensor):
            raise ValueError(
                f"{type(config).__name__}: {name} is a shard or a {type(tensor.data).__name__}, wanted a tensor"
            )
    made = Plan(excluded={name for name, _ in base_modules(model) if excluded(config, name)})
    for unit, names in units.items():
        made.units[unit], made.tied[unit] = [], {}
        for name in names:
            full = f"{unit}.{name}"
            shared = places[id(by_name[full])] if full in by_name else [full]
            elsewhere = [other for other in shared if other not in replaced and other not in skip_tied]
            if elsewhere:
                raise ValueError(
                    f"{type(config).__name__}: {full} is also {' and '.join(elsewhere)}, which is not a target: the "
                    "two would no longer share one tensor. Make both targets or neither, or load the model with "
                    "tie_word_embeddings=False."
                )
            owner = replaced[next(other for other in shared if other in replaced)]
            if owner == (unit, name):
                made.units[unit].append(name)
            else:
                made.tied[unit][name] = owner
    return made
