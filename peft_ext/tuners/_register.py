"""A method of this project made one of PEFT's: an entry of its ``PeftType`` enum and of its mappings."""

from __future__ import annotations

import peft
from aenum import extend_enum
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

__all__ = ["peft_type", "register"]


def peft_type(name: str) -> PeftType:
    """The member ``name`` of PEFT's enum, made where it is not there yet.

    PEFT's own ``register_peft_method`` takes the names of this enum alone. The new member is its value's equal, is
    found by name and by value, and is pickled as the members that PEFT wrote are.

    Raises: ImportError where PEFT is older than 0.21: it has no hooks for a method's own keys in the state dict.
    """
    if not hasattr(BaseTuner, "_remove_adapter_name_from_key"):
        raise ImportError(f"peft_ext.tuners needs peft >= 0.21, found {peft.__version__}")
    if name not in PeftType.__members__:
        extend_enum(PeftType, name, name)
    return PeftType[name]


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Enter a method into PEFT's mappings under ``name``, lower case, once.

    From then on ``peft.get_peft_model``, ``PeftModel.from_pretrained``, ``PeftConfig.from_pretrained`` and the rest of
    PEFT know it. Importing a module of :mod:`peft_ext.tuners` calls it.

    Raises: RuntimeError where PEFT, or another package, has a method of this name.
    """
    found = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type(name.upper()))
    if found is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    elif (found.__module__, found.__qualname__) != (config_cls.__module__, config_cls.__qualname__):
        raise RuntimeError(f"peft_ext.tuners: PEFT has a method {name!r} already, {found.__module__}.{found.__name__}")
