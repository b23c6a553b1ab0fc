"""Merging of an adapter into a packed weight. Unmerging restores the exact bits of the weight before the merge."""

from __future__ import annotations

import math
import warnings
from typing import Any, Optional

import torch
from torch import Tensor

from ... import ops
from ..._imports import optional, version
from ...nn import NF4Linear, PackedLinear
from ...nn.nf4 import is_zero3_shard
from ...nn.requantize import frozen_weight, requantized, set_frozen_weight
from ...weights.nf4 import NF4Weight
from .base import KEPT

check_adapters_to_merge = None
with optional("peft", "an adapter over an NF4Linear can't be merged"):
    from peft.tuners.tuners_utils import check_adapters_to_merge

Merged = tuple[Tensor, Optional[Tensor]]  # a weight and a bias (or None) with an adapter merged into both

MERGE_LOSES = (
    "merging into an NF4 weight rounds the merged weight to 4 bits again; peft_ext.explain(model) says how far that "
    "moves it. peft_ext.dequantize_nf4(model) before merging, or peft-ext merge, keeps it"
)
PACKED_MERGE_LOSES = (
    "merging into a packed weight ({}) quantizes the merged weight again; peft_ext.explain(model) says how far that "
    "moves it. peft_ext.dequantize_packed(model) before merging, or peft-ext merge, keeps it"
)


class MergesNF4:
    """Defines ``merge`` and ``unmerge`` of an adapter layer over an NF4Linear or a PackedLinear. Over another base
    layer the stock class's methods run.

    Each ``merge`` starts from the weight before the first merge, applies the adapters that are merged already and the
    new adapters, and quantizes the result once in the base weight's layout. ``base_layer.merge_error`` is the relative
    error of the quantization of the merged weight. ``unmerge`` restores the weight before the first merge bit for bit.
    ``merge`` raises RuntimeError, for example, if peft_ext has no quantizer for the layout of the base weight, and over
    any base layer if ZeRO-3 has partitioned the weight.

    A subclass defines ``_merged``, which returns weight and bias with one more adapter merged, computed from the weight
    and bias before this adapter and from the weight without any adapter. A subclass of low-rank adapters also defines
    ``_factors``, which returns the concatenated lora_A, the concatenated lora_B and a scale per output row (None if the
    method scales no output row). :func:`peft_ext.ops.nf4_merge` merges the factors that ``_factors`` returns in one
    pass over the NF4 codes. If ``_factors`` returns None or the weight is not NF4, ``merge`` computes the merged weight
    with ``_merged``.
    """

    def _factors(self, names: list[str], nf4: NF4Weight) -> Optional[tuple[Tensor, Tensor, Optional[Tensor]]]:
        return None

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        base = self.get_base_layer()
        if is_zero3_shard(base.weight):
            # PEFT's merge adds nothing to the empty weight of a partitioned parameter, without an error, and then
            # counts the adapter as merged.
            raise RuntimeError(
                f"merge: base_layer.weight is {tuple(base.weight.shape)}, partitioned by ZeRO-3, wanted the whole "
                "weight. Save the adapter and merge it in one process"
            )
        if not isinstance(base, (NF4Linear, PackedLinear)):
            return super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if check_adapters_to_merge is None:
            raise RuntimeError(f"merge: {version('peft')} has no peft.tuners.tuners_utils.check_adapters_to_merge")
        held = getattr(self, self.adapter_layer_names[0])
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in held]
        if names:
            _merge_packed(self, base, names, safe_merge)

    def unmerge(self) -> None:
        base = self.get_base_layer()
        if not self.merged or not isinstance(base, (NF4Linear, PackedLinear)):
            return super().unmerge()
        if KEPT not in self.__dict__:
            raise RuntimeError("the packed weight from before the merge is not here: it was merged elsewhere")
        weight, bias = self.__dict__.pop(KEPT)
        set_frozen_weight(base, weight.to(base.weight.device))
        if bias is not None:
            base.bias.data = bias.to(base.bias)
        self.merged_adapters.clear()


@torch.no_grad()
def _merge_packed(layer: Any, base: Any, names: list[str], safe_merge: bool) -> None:
    bias = None if base.bias is None else base.bias.detach().clone()
    # The merge gives the base layer's own tensors new data; the tensors that are detached here keep the data from
    # before the merge.
    weight, bias = layer.__dict__.get(KEPT) or (frozen_weight(base).map(Tensor.detach), bias)
    unmerged = weight.to(base.weight.device)
    together = [*layer.merged_adapters, *names]
    merged_bias, is_nf4 = bias, isinstance(weight, NF4Weight)
    if is_nf4 and (factors := layer._factors(together, unmerged)) is not None:
        lora_A, lora_B, row_scale = factors
        quantized, error = ops.nf4_merge(unmerged, lora_A, lora_B, row_scale=row_scale)
        if safe_merge and not math.isfinite(error):
            broken = ", ".join(together)
            raise ValueError(f"NaNs detected in the merged weights. The adapter {broken} seems to be broken")
    else:
        dense = merged = unmerged.dequantize(torch.float32)
        for name in together:
            merged, merged_bias = layer._merged(name, merged, merged_bias, dense)
            finite = torch.isfinite(merged).all() and (bias is None or torch.isfinite(merged_bias).all())
            if safe_merge and not finite:
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        quantized, error = requantized(merged, weight)
    set_frozen_weight(base, quantized, error)
    if bias is not None:
        base.bias.data = merged_bias.to(base.bias)
    layer.__dict__[KEPT] = (weight, bias)
    layer.merged_adapters.extend(names)
    warnings.warn(MERGE_LOSES if is_nf4 else PACKED_MERGE_LOSES.format(weight.format.name), stacklevel=3)
