"""What the tuners here share: how they hang layers in, refuse what they can't run, and name what they save."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .._imports import required

with required("peft", "peft_ext.tuners"):
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer


class Wrapper(nn.Module, BaseTunerLayer):
    """A layer over a module, ``base_layer``: an attribute that is not its own is the module's."""

    def _read(self, name: str) -> Any:
        return getattr(self.base_layer, name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not what copying looks for, nor the marks of accelerate's hooks: those are the base module's own.
            if name in ("base_layer", "_old_forward") or name.startswith(("__", "_hf_")):
                raise
        return self._read(name)


class Tuner(BaseTuner):
    """PEFT's, for methods whose layers hold modules, and whose targets need not be linear."""

    target_module_mapping: dict[str, list[str]] = {}

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own asks for a weight, which a whole feed-forward has not

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"{type(self).__name__}: adapter_names is given, but a batch of several adapters can't be run"
            )
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's looks for the name at the end or one before; what a layer holds here has names with dots of its own.
        stripped = re.sub(rf"(\.{cls.prefix}\w+)\.{re.escape(adapter_name)}(?=\.)", r"\1", key, count=1)
        return stripped if stripped != key else super()._remove_adapter_name_from_key(key, adapter_name)
