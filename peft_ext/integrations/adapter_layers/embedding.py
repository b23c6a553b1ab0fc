"""PEFT's LoRA over an ``nn.Embedding`` or a ``PackedEmbedding``, computed by :func:`peft_ext.ops.lora_embedding`."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from ... import ops
from ..._imports import optional
from ...nn import PackedEmbedding
from ...nn.nf4 import is_zero3_shard
from ...ops.checks import autocast_dtype, under_a_transform
from ...text import dtype_name
from .base import DTYPES, Fused, active_in, class_name, fuses
from .reasons import any_global_hook, hooked, kernel_reason, layer_reason, plain_types, scaling_reason, tensor_reason

LoraEmbedding = None
with optional("peft", "LoRA over an embedding is not fused"):
    from peft.tuners.lora import Embedding as LoraEmbedding

# The methods that PEFT's embedding layer calls in its forward, as they were at import. A call of a LoRA layer over an
# embedding is fused only if the methods in _HELPERS are unchanged.
_HELPERS = {name: getattr(LoraEmbedding, name, None) for name in ("_embed", "_get_embed_scale")}


def _base_reason(base: nn.Module) -> Optional[str]:
    """Returns why the operator can't replace the forward of the embedding under the adapter; None if it can."""
    packed = type(base) is PackedEmbedding
    if not packed and type(base) is not nn.Embedding:  # a subclass, such as Gemma's, may scale its output
        return f"its base layer is a {class_name(type(base))}, wanted nn.Embedding or PackedEmbedding"
    if hooked(base):
        return "hooks on base_layer, or its replaced forward, would not run"
    if base.max_norm is not None:
        return "max_norm changes the weights in the forward"
    if base.scale_grad_by_freq or base.sparse:
        return "scale_grad_by_freq or sparse makes the gradient of lora_A another"
    if packed:
        return _packed_reason(base)
    if getattr(base, "embed_scale", None) is not None:
        return "its base layer has an embed_scale"
    weight = base._parameters.get("weight")
    if reason := tensor_reason("its weight", weight):
        return reason
    if weight.requires_grad:
        return "its base weight requires grad"
    return (
        None if weight.dtype in DTYPES else f"its weight is {dtype_name(weight.dtype)}, wanted a float of 16 or 32 bits"
    )


def _packed_reason(base: PackedEmbedding) -> Optional[str]:
    """Returns why the operator can't read the table of a PackedEmbedding; None if the operator can."""
    codes = base.weight
    if codes.requires_grad:
        return "its base weight requires grad"
    if codes.is_meta or is_zero3_shard(codes):
        return "its weight is on meta" if codes.is_meta else "ZeRO-3 has partitioned its weight"
    dtype = base.compute_dtype
    return None if dtype in DTYPES else f"its dtype is {dtype_name(dtype)}, wanted a float of 16 or 32 bits"


if LoraEmbedding is not None:

    @fuses(LoraEmbedding)
    class FusedLoraEmbedding(Fused, LoraEmbedding):
        """Fused ``peft.tuners.lora.Embedding``; fuses calls outside of autocast, over a plain ``nn.Embedding`` or a
        ``PackedEmbedding``, with one active adapter of plain LoRA."""

        reads = (*Fused.reads, "lora_embedding_A", "lora_embedding_B", "lora_variant", "scaling", "input_fns",
                 "output_fns")  # fmt: skip

        def merge(self, *args: Any, **kwargs: Any) -> None:
            """PEFT's merge. Raises RuntimeError if the table is packed, because PEFT would add the adapter to the codes
            of the table."""
            base = self._modules["base_layer"]
            if type(base) is PackedEmbedding:
                raise RuntimeError(
                    f"merge: the table of a PackedEmbedding is packed ({base.format.name}), wanted a dense table: call "
                    "peft_ext.dequantize_packed(model) first"
                )
            super().merge(*args, **kwargs)

        def _reasons(self) -> tuple[Optional[str], Optional[str]]:
            return self._reason(), None

        def _reason(self) -> Optional[str]:
            if reason := layer_reason(self):
                return reason
            for helper, known in _HELPERS.items():
                if helper in self.__dict__ or getattr(LoraEmbedding, helper, None) is not known:
                    return f"its {helper} was replaced"
            names = active_in(self, self.lora_embedding_A)
            if len(names) != 1:
                return "several active adapters over an embedding" if names else "no active adapter on this layer"
            (name,), base = names, self._modules["base_layer"]
            if any_global_hook():
                return "global hooks of torch.nn would not run"
            if name in self.lora_variant:
                return f"a {type(self.lora_variant[name]).__name__} over an embedding is not fused"
            if self.input_fns or self.output_fns:
                return "tensor parallelism splits lora_A"
            a, b = self._pair(name)
            if reason := _base_reason(base) or tensor_reason("lora_A", a) or tensor_reason("lora_B", b):
                return reason
            if a.dtype is not b.dtype or a.dtype not in DTYPES:
                names = f"lora_A is {dtype_name(a.dtype)}, lora_B {dtype_name(b.dtype)}"
                return f"{names}, wanted both float32, bfloat16 or float16"
            scaling = self.scaling[name]
            if reason := scaling_reason(scaling, a) or kernel_reason("lora_embedding", a.device.type):
                return reason
            if isinstance(scaling, Tensor):
                return "its scaling is a tensor"
            return None if autocast_dtype(a) is None else "under autocast PEFT rounds its low-rank product"

        def _pair(self, name: str) -> tuple[Tensor, Tensor]:
            return self.lora_embedding_A[name], self.lora_embedding_B[name]

        def _fused(self, x: Any) -> Optional[Tensor]:
            if type(x) not in plain_types() or x.dtype not in (torch.int64, torch.int32) or x.is_nested:
                return None
            if not torch.compiler.is_compiling() and (under_a_transform() or torch._C._is_tracing()):
                return None
            if self._reason() is not None:
                return None
            (name,), base = active_in(self, self.lora_embedding_A), self._modules["base_layer"]
            packed = type(base) is PackedEmbedding
            scaling, weight = self.scaling[name], base.table if packed else base._parameters["weight"]
            if x.device != weight.device:
                return None
            a, b = self._pair(name)
            y = ops.lora_embedding(x, weight, a, b, scaling=scaling, padding_idx=base.padding_idx)
            return y * base.embed_scale if packed and base.scale != 1 else y
