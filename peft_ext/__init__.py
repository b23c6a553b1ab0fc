"""peft_ext: parameter-efficient fine-tuning, fast and small.

``peft_ext.ops`` and ``peft_ext.nn`` compute with fused kernels. One line accelerates a live Hugging Face model::

    import peft_ext
    peft_ext.accelerate(model)      # a PeftModel, in place; peft_ext.restore(model) undoes the call

Importing ``peft_ext``, with ``peft_ext.ops``, ``peft_ext.nn`` and ``peft_ext.reference``, needs only torch and
filelock. Functions that need Hugging Face's packages import these packages on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import _native, nn, ops, reference
from ._version import __version__
from .ops import prove
from .weights.nf4 import NestedAbsmax, NF4Weight


def _image(kernel: str, file: str, capability: int) -> tuple[bytes, bytes]:
    from . import device_code

    return device_code.image(kernel, file, capability)


_native.load(_image)
prove.arm()

# Name -> module, imported on first use, so that ``import peft_ext`` needs only torch and filelock.
_LAZY = {
    "accelerate": "integrations.peft",
    "agree": "integrations.peft",
    "restore": "integrations.peft",
    "estimate_memory": "memory",
    "explain": "integrations.peft",
    "register_form": "verification.proof",
    "PackedConfig": "integrations.packed",
    "load_gguf": "gguf.load",
    "get_peft_model": "model",
    "load_adapter": "model",
    "MergeError": "merge",
    "MergeReport": "merge",
    "merge_to_dense": "merge",
    "GgufMergeReport": "merge",
    "merge_to_gguf": "merge",
    "ExportError": "export",
    "ExportReport": "export",
    "load_gguf_adapter": "export",
    "write_gguf_adapter": "export",
    "save_adapter": "files",
    "dequantize_nf4": "quantize",
    "dequantize_packed": "quantize",
    "quantize_nf4": "quantize",
    "quantize_packed": "quantize",
    "recommend_peft_method": "recommend",
    "verify": "verification",
    "BitFitConfig": "tuners",
    "BottleneckConfig": "tuners",
    "DiffPruningConfig": "tuners",
    "PartialConfig": "tuners",
}

__all__ = [*_LAZY, "NF4Weight", "NestedAbsmax", "__version__", "nn", "ops", "reference"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
