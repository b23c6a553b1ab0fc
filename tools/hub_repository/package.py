"""peft_ext's operators and layers, as a kernel of Hugging Face's kernels hub."""

from . import _native, layers, ops
from .ops import *  # noqa: F403
from .weight import NestedAbsmax, NF4Weight

_native.load()

__all__ = ["NF4Weight", "NestedAbsmax", "layers", *ops.__all__]
