"""Registers a method of peft_ext with PEFT: in PEFT's ``PeftType`` enum and in PEFT's mappings."""

from __future__ import annotations

import peft
from aenum import extend_enum
from packaging.version import Version

from .._imports import has, required

with required("peft", "peft_ext.tuners"):
    from peft import PeftConfig, PeftModel
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import register_peft_method
    from peft.utils.peft_types import PeftType

_OLDEST = "0.21"  # the first version of PEFT with hooks for a method's own state dict keys

# Methods and attributes of PEFT's classes that peft_ext's tuners override. If PEFT renamed a method, PEFT's method
# would run instead of the tuner's method.
MODEL_HOOKS = (
    "_check_merge_allowed",
    "_check_target_module_exists",
    "_check_tied_modules",
    "_create_and_replace",
    "_get_tied_target_modules",
    "_prepare_adapter_config",
    "_prepare_model",
    "_remap_adapter_state_dict_for_load",
    "_remove_adapter_name_from_key",
    "_replace_module",
    "_unload_and_optionally_merge",
    "inject_adapter",
    "set_adapter",
)
LAYER_HOOKS = (
    "_move_adapter_to_device_of_base_layer",
    "adapter_layer_names",
    "enable_adapters",
    "merge",
    "other_param_names",
    "unmerge",
)


def _check_peft() -> None:
    """Raises ImportError if PEFT is too old, or lacks a name that the tuners override; the message has the missing
    name."""
    if Version(peft.__version__).release < Version(_OLDEST).release:
        raise ImportError(f"peft_ext.tuners needs peft >= {_OLDEST}, found {peft.__version__}")
    with required("peft", "peft_ext.tuners"):
        has(PeftModel, "_enable_peft_forward_hooks")  # PeftModel's method calls the tuner's method of this name
        has(BaseTuner, *MODEL_HOOKS)
        has(BaseTunerLayer, *LAYER_HOOKS)


def peft_type(name: str) -> PeftType:
    """Returns the member ``name`` of PEFT's ``PeftType`` enum, and adds the member if PEFT lacks it.

    PEFT's ``register_peft_method`` accepts only names of the members of ``PeftType``. The new member equals its string
    value, is found by name and by value, and is pickled like the members that PEFT defines.
    """
    if name not in PeftType.__members__:
        extend_enum(PeftType, name, name)
    return PeftType[name]


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Adds a method to PEFT's mappings under ``name``, which must be in lower case. A second call with the same method
    does nothing.

    After ``register`` has returned, ``peft.get_peft_model``, ``PeftModel.from_pretrained``,
    ``PeftConfig.from_pretrained`` and other functions of PEFT accept the method. The modules of :mod:`peft_ext.tuners`
    call ``register`` on import.

    Raises: ImportError if PEFT is too old or lacks a name that the methods override; RuntimeError if PEFT, or another
    package, already has a method of this name.
    """
    _check_peft()
    found = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type(name.upper()))
    if found is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    elif (found.__module__, found.__qualname__) != (config_cls.__module__, config_cls.__qualname__):
        raise RuntimeError(f"peft_ext.tuners: PEFT has a method {name!r} already, {found.__module__}.{found.__name__}")
