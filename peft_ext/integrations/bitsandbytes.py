"""Conversion between NF4Weight and bitsandbytes' Params4bit. The conversion copies the packed weight in neither
direction.

``peft_ext.weights.nf4`` describes the format of NF4 weights. :func:`to_linear4bit` converts the NF4Linear layers of a
model to bitsandbytes' ``Linear4bit``, for comparisons.
"""

from __future__ import annotations

import torch
from torch import nn

from .._imports import required
from ..weights.nf4 import nf4_from_params4bit, params4bit_from_nf4, why_not_nf4

__all__ = ["nf4_from_params4bit", "params4bit_from_nf4", "to_linear4bit", "why_not_nf4"]


def to_linear4bit(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces every NF4Linear in ``model`` by a bitsandbytes ``Linear4bit`` with the same codes and scales.

    ``dtype`` is the compute_dtype of the new layers.
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
            # False stops bitsandbytes from repacking the weight in evaluation. No gradient flows to the input of a
            # layer with a repacked weight.
            layer.support_avx512bf16_for_cpu = False
            setattr(parent, name, layer.train(child.training))
    model.is_loaded_in_4bit = True  # PEFT adds 4-bit adapter layers only if is_loaded_in_4bit is set
