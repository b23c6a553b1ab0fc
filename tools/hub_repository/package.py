"""peft_ext's operators and layers, as a kernel of Hugging Face's kernels hub."""

from __future__ import annotations

from . import _native, layers, ops
from .ops import *  # noqa: F403
from .ops import prove
from .weights.nf4 import NestedAbsmax, NF4Weight


def _image(kernel: str, file: str, capability: int) -> tuple[bytes, bytes]:
    from . import device_code

    return device_code.image(kernel, file, capability)


_native.load(_image)
prove.arm()

__all__ = ["NF4Weight", "NestedAbsmax", "layers", *ops.__all__]
