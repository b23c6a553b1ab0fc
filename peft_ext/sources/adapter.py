"""Checks the files of an untrusted adapter before PEFT reads them. The message of each error is one line.

adapter_config.json must be a JSON object with a known method, fields of the right types, and no size larger than the
saved weights allow. adapter_model.safetensors must have a header that the safetensors library accepts, and
floating-point dtypes for tensors that PEFT would cast. run.json is optional, and records in which format the base's
weights were stored in training. No code in an adapter's folder is imported, and no file is unpickled.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import os
import types
import typing
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Union

import torch

from .. import tuners  # noqa: F401  registers the methods that PEFT lacks
from .._imports import required
from ..weights.nf4 import BLOCKSIZES
from ..weights.quantizers import QUANTIZATIONS
from .json_file import raised_as, read_object, shown
from .model import MOST_LAYERS, SourceError
from .weight_files import check_floats, weight_shapes

with required("peft", "a saved adapter's configuration"):
    from peft import PeftConfig, TaskType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

_MOST_RANK = 1024
_LARGEST = torch.finfo(torch.float32).max

# Beginnings of the names of LoRA initializations that decompose the base weight. For these, PEFT first allocates
# tensors of the rank r in the configuration, and then truncates the tensors to the shorter side of the weight. The r in
# a saved configuration may therefore be larger than the rank of the saved tensors.
_TRUNCATING = ("pissa", "olora")


def read_config(file: Path) -> PeftConfig:
    """Returns the PEFT configuration in ``file``, after a check of the types and of some values of its fields.

    Raises: OSError as ``open`` does; ValueError, one line, for a file that is no valid configuration of a known method.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    values = read_object(file)
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{file}: peft_type is {shown(kind)}, wanted the name of a method, such as 'LORA'")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    try:
        hints = typing.get_type_hints(config_class)
    except (NameError, TypeError):
        # An annotation uses a name that only type checkers import. The types of the fields are then not checked.
        hints = {}
    for field in dataclasses.fields(config_class):
        value, hint = values.get(field.name, field.default), hints.get(field.name, Any)
        if value is not field.default and not _is_of(value, hint):
            raise ValueError(f"{file}: {field.name} is {shown(value)}, wanted {inspect.formatannotation(hint)}")
    task = values.get("task_type")
    if task is not None and task not in [known.value for known in TaskType]:
        raise ValueError(f"{file}: task_type is {shown(task)}, wanted one of {', '.join(t.value for t in TaskType)}")
    _check_values(file, values)
    # PEFT's multitask prompt tuning may read the file that this field names, also when PEFT loads a saved adapter.
    path = values.get("prompt_tuning_init_state_dict_path")
    if isinstance(path, str) and not path.endswith(".safetensors"):
        raise ValueError(f"{file}: prompt_tuning_init_state_dict_path is {shown(path)}, a pickle, which runs code as "
                         "it is read")  # fmt: skip
    kinds = (ValueError, TypeError, KeyError, AttributeError, ImportError, OverflowError, RecursionError)
    with raised_as(ValueError, f"{file}: ", *kinds):
        return PeftConfig.from_pretrained(str(file.parent))


def _check_values(file: Path, values: dict[str, Any]) -> None:
    """Raises ValueError for wrong values that PEFT does not check, or that PEFT checks only while it builds the
    model."""
    for name, value in values.items():
        if name.endswith("dropout") and isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise ValueError(f"{file}: {name} is {shown(value)}, wanted 0 to 1")
    if values.get("megatron_config") and find_spec("megatron") is None:
        raise ValueError(f"{file}: megatron_config is given, which needs the package megatron")
    mapping = values.get("auto_mapping") or {}
    if wrong := [name for name, value in mapping.items() if not isinstance(value, (str, type(None)))]:
        raise ValueError(f"{file}: auto_mapping has {shown(mapping[wrong[0]])} for {shown(wrong[0])}, wanted text")
    ranges = values.get("layer_replication") or []
    if not all(len(r) == 2 and all(type(i) is int for i in r) and 0 <= r[0] < r[1] <= MOST_LAYERS for r in ranges):
        raise ValueError(f"{file}: layer_replication is {shown(ranges)}, wanted pairs of a first layer and one after "
                         "the last")  # fmt: skip
    if sum(end - start for start, end in ranges) > MOST_LAYERS:
        raise ValueError(f"{file}: layer_replication makes more than {MOST_LAYERS} layers")


def _is_of(value: Any, hint: Any) -> bool:
    """Returns whether the JSON ``value`` fits a field's annotation ``hint``. Every value fits an unknown annotation."""
    arguments = typing.get_args(hint)
    kind = typing.get_origin(hint) or hint
    if kind in (Union, types.UnionType):
        return any(_is_of(value, argument) for argument in arguments)
    if kind is typing.Literal:
        return isinstance(value, tuple({type(argument) for argument in arguments}))
    if kind in (list, tuple, set):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return isinstance(value, list) and (len(inner) != 1 or all(_is_of(item, inner[0]) for item in value))
    if kind is dict:
        return isinstance(value, dict) and (len(arguments) != 2 or all(_is_of(v, arguments[1]) for v in value.values()))
    if kind in (int, float):  # PEFT accepts a lora_alpha of 0.5, although the field's type is int
        return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        kind = str
    return isinstance(value, kind) if kind in (bool, str, type(None)) else True


def checked_config(folder: Path) -> PeftConfig:
    """Returns the configuration of the adapter in ``folder``, checked against the header of the adapter's weights.

    Raises: OSError where the configuration or the weights can't be read; ValueError, one line, where
    :func:`read_config` raises ValueError, where the weights are no safetensors, where a tensor that PEFT would cast is
    not of a float dtype, and where a size in the configuration is no integer of at least 1 or is larger than the saved
    weights allow.
    """
    config, weights = read_config(folder / CONFIG_NAME), weight_shapes(folder / SAFETENSORS_WEIGHTS_NAME)
    largest = max((size for shape in weights.values() for size in shape), default=0)
    for name, size, most in _sizes(config, largest):
        if type(size) is not int or size < 1:
            raise ValueError(f"{folder / CONFIG_NAME}: {name} is {shown(size)}, wanted an integer of at least 1")
        if size > most:
            raise ValueError(f"{folder / CONFIG_NAME}: {name} is {shown(size)}, wanted at most {most}, the longest "
                             f"side of a tensor in {SAFETENSORS_WEIGHTS_NAME}")  # fmt: skip
    if config.is_prompt_learning or config.peft_type in ("LORA", "ADALORA", "IA3", "BOTTLENECK"):
        check_floats(folder / SAFETENSORS_WEIGHTS_NAME, PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, ""))
    return config


def _sizes(config: PeftConfig, largest: int) -> Iterator[tuple[str, Any, int]]:
    """Yields name, value and largest accepted value of each field from which PEFT takes the size of a tensor that it
    allocates before it reads the adapter's weights.
    """
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method == "LORA":
        if str(config.init_lora_weights).startswith(_TRUNCATING):
            largest = max(largest, _MOST_RANK)
        yield "r", config.r, largest
        for name, value in (config.rank_pattern or {}).items():
            yield f"rank_pattern[{shown(name)}]", value, largest
    elif method == "ADALORA":
        # The saved weights lack AdaLoRA's pruned ranks. The lists in rank_pattern have an entry for each initial rank.
        listed = (len(value) for value in (config.rank_pattern or {}).values() if isinstance(value, list))
        yield "init_r", config.init_r, max(largest, *listed, 0)
    elif method == "BOTTLENECK" and config.bottleneck_dim is not None:
        yield "bottleneck_dim", config.bottleneck_dim, largest
    elif config.is_prompt_learning:
        yield "num_virtual_tokens", config.num_virtual_tokens, largest


def training_options(adapter: Path) -> dict[str, Any]:
    """Returns the options of the ``peft-ext finetune`` run that wrote ``adapter``; the added key "kind" has the value
    of "kind" in run.json's "examples", or None.

    Returns {} if ``adapter``, or the run of which ``adapter`` is a checkpoint, has no run.json of ``peft-ext
    finetune``.

    Raises SourceError where run.json can't be read or has an unknown quantization or block size, because a merge
    without the options in run.json could use another base than the training.
    """
    adapter = Path(os.path.realpath(adapter))  # a checkpoint may be given as ".", or by a symbolic link
    for folder in (adapter, adapter.parent.parent) if adapter.parent.name == "checkpoints" else (adapter,):
        file = folder / "run.json"
        if not file.is_file():
            continue
        with raised_as(SourceError, "", OSError, ValueError):
            document = read_object(file)
        options, examples = document.get("options"), document.get("examples")
        if not isinstance(options, dict) or "quant" not in options:
            continue
        quant, blocksize = options["quant"], options.get("blocksize", 64)
        if quant not in QUANTIZATIONS:
            raise SourceError(
                f"{file}: options have the quant {quant!r:.60}, wanted one of {', '.join(QUANTIZATIONS)}: correct "
                "or remove the file"
            )
        if type(blocksize) is not int or blocksize not in BLOCKSIZES:
            raise SourceError(f"{file}: options have the blocksize {blocksize!r:.60}, wanted one of {BLOCKSIZES}")
        return {**options, "kind": examples.get("kind") if isinstance(examples, dict) else None}
    return {}
