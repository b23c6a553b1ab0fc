"""A view of a model's configuration, through which one attention asks for peft_ext's attention function.

transformers' attentions read the name of their attention function from the model's configuration, which all modules of
a model share. A fused attention therefore gets a view of the configuration that names peft_ext's attention function.
"""

from __future__ import annotations

import copy
from typing import Any

__all__ = ["OURS", "View", "option_of", "view_of"]

# The name of peft_ext's attention function in transformers' registry.
OURS = "peft_ext_sdpa"


class View:
    """A view of a model's configuration for one attention. ``_attn_implementation`` of the view is the name of
    peft_ext's attention function where the configuration's is "sdpa". The view shares the ``__dict__`` of the
    configuration, and its class is a subclass of the configuration's class."""

    __slots__ = ("original",)

    def __init_subclass__(cls, **_: Any) -> None:
        """Does nothing: transformers' ``__init_subclass__`` would treat the view's class as a new configuration
        class."""

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return view_of, (self.original,)

    def __copy__(self) -> Any:
        return view_of(copy.copy(self.original))

    def __deepcopy__(self, memo: dict) -> Any:
        return view_of(copy.deepcopy(self.original, memo))


def option_of(attention: Any, attribute: str, *default: Any) -> Any:
    """Returns ``getattr(attention, attribute, *default)``; for an attribute "config.NAME", the attribute NAME of the
    attention's configuration, or None if the configuration has no such attribute."""
    of_config = attribute.partition("config.")[2]
    return getattr(attention.config, of_config, None) if of_config else getattr(attention, attribute, *default)


_VIEWS: dict[type, type] = {}


def view_of(config: Any) -> Any:
    stock = type(config)
    if (kind := _VIEWS.get(stock)) is None:
        own = stock._attn_implementation

        def get(self: Any) -> Any:
            found = own.fget(self)
            return OURS if found == "sdpa" else found

        held = {"_attn_implementation": property(get, own.fset), "__module__": stock.__module__}
        kind = _VIEWS[stock] = type.__new__(type(stock), stock.__name__, (View, stock), held)
    view = object.__new__(kind)
    object.__setattr__(view, "__dict__", config.__dict__)
    object.__setattr__(view, "original", config)
    return view
