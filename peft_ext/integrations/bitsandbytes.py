"""NF4Weight to and from bitsandbytes' Params4bit, sharing storage both ways."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from .. import reference
from .._imports import required
from ..weight import NESTED_BLOCKSIZE, NestedAbsmax, NF4Weight

__all__ = ["nf4_from_params4bit", "params4bit_from_nf4", "why_not_nf4"]


def why_not_nf4(quant_state: Any) -> Optional[str]:
    """The reason why a bitsandbytes ``QuantState`` is no NF4Weight, or None where it is one."""
    if quant_state is None:
        return "the weight is not quantized yet: no quant_state"
    if (kind := getattr(quant_state, "quant_type", None)) != "nf4":
        return f"quant_type is {kind!r}, wanted 'nf4'"
    if getattr(quant_state, "packing_format_for_cpu", False):
        return "bitsandbytes repacked the weight for its CPU inference"
    if quant_state.nested and (size := getattr(quant_state.state2, "blocksize", None)) != NESTED_BLOCKSIZE:
        return f"the nested blocksize is {size}, wanted {NESTED_BLOCKSIZE}"
    return None


def nf4_from_params4bit(weight: Tensor, quant_state: Any = None) -> NF4Weight:
    """See :meth:`peft_ext.NF4Weight.from_bitsandbytes`."""
    state = quant_state if quant_state is not None else getattr(weight, "quant_state", None)
    if reason := why_not_nf4(state):
        raise ValueError(f"NF4Weight.from_bitsandbytes: {reason}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"NF4Weight.from_bitsandbytes: weight is {type(weight).__name__}, wanted a Tensor")
    # A plain tensor, from here on: each attribute of bitsandbytes' tensor subclass costs a call into Python.
    with torch._C.DisableTorchFunctionSubclass():
        packed = weight.data
    if packed.dtype != torch.uint8:  # quant_storage: the same bytes under another dtype
        packed = packed.reshape(-1).view(torch.uint8)
    nested = None
    if state.nested:
        nested = NestedAbsmax(state.state2.absmax, state.state2.code, state.offset)
    return NF4Weight(packed.reshape(-1, 1), state.absmax, state.shape, state.dtype, state.blocksize, nested)


def params4bit_from_nf4(nf4: NF4Weight) -> Any:
    """See :meth:`peft_ext.NF4Weight.to_bitsandbytes`."""
    with required("bitsandbytes", "NF4Weight.to_bitsandbytes"):
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Params4bit

    state2 = offset = None
    if nf4.nested is not None:
        state2 = QuantState(
            absmax=nf4.nested.absmax, code=nf4.nested.code, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32
        )
        offset = nf4.nested.offset
    state = QuantState(
        absmax=nf4.absmax, shape=nf4.shape, code=reference.nf4_code(nf4.device), blocksize=nf4.blocksize,
        quant_type="nf4", dtype=nf4.dtype, offset=offset, state2=state2,
    )  # fmt: skip
    return Params4bit(
        nf4.packed, requires_grad=False, quant_state=state, blocksize=nf4.blocksize, quant_type="nf4",
        compress_statistics=nf4.nested is not None, bnb_quantized=True,
    )  # fmt: skip
