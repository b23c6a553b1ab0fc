"""NF4Weight to and from bitsandbytes' Params4bit, sharing storage both ways; the format is ``peft_ext.weight``'s.

:func:`to_linear4bit` makes bitsandbytes' layers of a quantized model's, to compare.
"""

from __future__ import annotations

import torch
from torch import nn

from .._imports import required
from ..weight import nf4_from_params4bit, params4bit_from_nf4, why_not_nf4

__all__ = ["nf4_from_params4bit", "params4bit_from_nf4", "to_linear4bit", "why_not_nf4"]


def to_linear4bit(model: nn.Module, dtype: torch.dtype) -> None:
    """Hands every NF4Linear's bits to a bitsandbytes ``Linear4bit``, in place, so that both run on the same weights.

    ``dtype`` is what the new layers compute in.
    """
    with required("bitsandbytes", "to_linear4bit"):
        from bitsandbytes.nn import Linear4bit

    from ..nn import NF4Linear

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, NF4Linear):
                continue
            layer = Linear4bit(
                child.in_features, child.out_features, bias=False, compute_dtype=dtype,
                compress_statistics=child.nested_absmax is not None, quant_type="nf4", device="meta",
            )  # fmt: skip
            layer.weight = child.nf4.to_bitsandbytes()
            layer.weight.module, layer.quant_state, layer.bias = layer, layer.weight.quant_state, child.bias
            # In evaluation bitsandbytes repacks the weight in place for its inference, and can't train on that again.
            layer.support_avx512bf16_for_cpu = False
            setattr(parent, name, layer.train(child.training))
    model.is_loaded_in_4bit = True  # what PEFT asks before it takes its own 4-bit layers
