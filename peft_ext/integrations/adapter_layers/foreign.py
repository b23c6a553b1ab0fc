"""Quantized linear layers of other packages whose packed weight the operators read: GPTQModel's layers for GPTQ and AWQ
that compute in PyTorch, hqq's layers, and transformers' layers over GGUF's blocks.

A layer is recognized by the exact name of its class and of the class's module, so that the packages need not be
imported.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ...weights.gguf import gguf_weight
from ...weights.int_groups import from_awq, from_gptq, from_hqq
from ...weights.packed import PackedWeight

__all__ = ["foreign_operands", "foreign_reason", "foreign_weight", "is_foreign"]

_GPTQMODEL = "gptqmodel.nn_modules.qlinear"
_GGUF = "transformers.integrations.gguf.utils.GgufLinear"


def _from_gguf(module: Any) -> PackedWeight:
    """Returns the weight of transformers' ``GgufLinear`` as a PackedWeight that shares the module's memory."""
    if module.input_permutation is not None:
        raise ValueError("its base layer permutes its input")
    shape = module.out_features, module.in_features
    weight = gguf_weight(module.weight.detach(), module.ggml_type, shape)
    weight.check_kernel("GgufLinear")
    return weight


# Maps the full name of a layer's class to the function that reads the layer's weight.
_READERS: dict[str, Callable[[nn.Module], PackedWeight]] = {
    f"{_GPTQMODEL}.torch.TorchLinear": from_gptq,
    f"{_GPTQMODEL}.torch.TorchQuantLinear": from_gptq,
    f"{_GPTQMODEL}.torch_awq.AwqTorchLinear": from_awq,
    _GGUF: _from_gguf,
    "hqq.core.quantize.HQQLinear": from_hqq,
}

# Maps each layer whose weight was read to the addresses of the layer's tensors and to the PackedWeight that shares
# their memory.
_HELD: weakref.WeakKeyDictionary[nn.Module, tuple[list[int], PackedWeight]] = weakref.WeakKeyDictionary()


def _reader(kind: type) -> Optional[Callable[[nn.Module], PackedWeight]]:
    return _READERS.get(f"{kind.__module__}.{kind.__qualname__}")


def _is_gguf(kind: type) -> bool:
    return f"{kind.__module__}.{kind.__qualname__}" == _GGUF


def is_foreign(kind: type) -> bool:
    return _reader(kind) is not None


def _tensors(base: nn.Module) -> list[Tensor]:
    given = [getattr(base, name, None) for name in ("W_q", "qweight", "qzeros", "scales", "g_idx")]
    if _is_gguf(type(base)):
        given.append(base.weight)
    given += [value for name, value in (getattr(base, "meta", None) or {}).items() if name in ("scale", "zero")]
    return [tensor for tensor in given if isinstance(tensor, Tensor)]


def foreign_weight(base: nn.Module) -> PackedWeight:
    """Returns the weight of the layer ``base`` as a PackedWeight that shares the layer's memory. ``foreign_weight``
    returns the same PackedWeight object until the address of a tensor of the layer changes. Raises ValueError if the
    layer's layout is not supported."""
    key = [tensor.data_ptr() for tensor in _tensors(base)]
    known = _HELD.get(base)
    if known is None or known[0] != key:
        known = _HELD[base] = key, _reader(type(base))(base)
    return known[1]


def foreign_reason(base: nn.Module) -> Optional[str]:
    """Returns why the operators can't read the weight of the layer ``base`` of another package; None if they can."""
    if getattr(base, "adapter", None) is not None:
        return "its base layer has an adapter of its own"
    if torch.compiler.is_compiling() or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in _tensors(base)):
        return "its base layer's tensors are no plain tensors, or are being compiled"
    if any(tensor.is_meta for tensor in _tensors(base)):
        return "its weight is on meta"
    try:
        foreign_weight(base)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def foreign_operands(base: Any, x: Tensor) -> Optional[tuple[PackedWeight, Optional[Tensor]]]:
    """Returns the weight and the bias with which the forward of the layer ``base`` computes its output for x, or None
    if x has another dtype than the layer computes in."""
    weight, bias = foreign_weight(base), base.bias
    if _is_gguf(type(base)):  # a GgufLinear multiplies in the dtype of x
        return weight, None if bias is None else bias.to(x.dtype)
    if weight.dtype is not x.dtype or (bias is not None and bias.dtype is not x.dtype):
        return None
    return weight, bias
