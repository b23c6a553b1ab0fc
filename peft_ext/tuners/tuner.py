"""Base classes of the tuners, which insert wrapped layers, refuse unsupported calls, and name the saved tensors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .._imports import required

with required("peft", "peft_ext.tuners"):
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer


class Wrapper(nn.Module, BaseTunerLayer):
    """A layer that wraps the module ``base_layer``. An attribute that the wrapper lacks is read from ``base_layer``,
    except special names such as ``__len__`` and the accelerate library's ``_hf_hook``."""

    def _read(self, name: str) -> Any:
        return getattr(self.base_layer, name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Python's copy module looks up names that start with "__", and the accelerate library marks a module that
            # has its hooks with "_old_forward" and names that start with "_hf_". Neither these names nor "base_layer"
            # are read from the base module.
            if name in ("base_layer", "_old_forward") or name.startswith(("__", "_hf_")):
                raise
        return self._read(name)


# The expressions of transformers' Trainer for the names of parameters that get no weight decay.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|_)norm$")


class Tuner(BaseTuner):
    """PEFT's BaseTuner for methods whose adapters are modules and whose targets may be other than linear layers."""

    target_module_mapping: dict[str, list[str]] = {}
    trains_biases = False  # whether the method trains biases alone, to which Trainer applies no weight decay

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        named_so = not self.trains_biases and _NO_DECAY.search(adapter_name.lower())
        if named_so and not self.peft_config[adapter_name].inference_mode:
            warnings.warn(
                f"{type(self).__name__}: transformers' Trainer applies no weight decay to the adapter "
                f"{adapter_name!r}, because the name reads as that of a bias or of a norm; wanted another name",
                stacklevel=2,
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's _replace_module reads the weight of the replaced module, and a feed-forward block has no weight.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"{type(self).__name__}: adapter_names is given, but a batch of several adapters can't be run"
            )
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's _remove_adapter_name_from_key expects the adapter's name in the last or the second last place of a key.
        # An adapter of a Tuner is a module and may have submodules, so in a key more than one name may follow the
        # adapter's name.
        stripped = re.sub(rf"(\.{cls.prefix}\w+)\.{re.escape(adapter_name)}(?=\.)", r"\1", key, count=1)
        return stripped if stripped != key else super()._remove_adapter_name_from_key(key, adapter_name)
