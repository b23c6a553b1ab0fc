"""DoRA computed by :func:`peft_ext.ops.dora_linear`, and a variant of PEFT's own DoRA that works over an NF4Linear."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from ... import ops
from ..._imports import has, optional
from ...nn import NF4Linear
from ...ops.dora import checked_dora_linear
from ...reference.dora import output_scale
from ...weights.packed import PackedWeight
from .base import weight_of

dora = DoraLinearLayer = DoraLinearVariant = None
with optional("peft", "DoRA is not fused"):
    from peft.tuners.lora import dora
    from peft.tuners.lora.dora import ENABLE_DORA_CACHING, DoraLinearLayer  # noqa: F401  for dora.ENABLE_DORA_CACHING
    from peft.tuners.lora.variants import DoraLinearVariant as _DoraLinearVariant

    has(DoraLinearLayer, "_cache_clear", "_cache_get", "_cache_store")
    has(_DoraLinearVariant, "init", "forward")
    DoraLinearVariant = _DoraLinearVariant

# Name of the attribute that holds the dora_dropout of peft_ext.accelerate on a layer whose dora_dropout is not "peft".
DORA_DROPOUT = "_peft_ext_dora_dropout"

# Classes of the DoRA variants that are fused; empty if the installed PEFT lacks a name that this module uses.
VARIANTS: tuple[type, ...] = ()
DoraNF4Variant = None

if DoraLinearVariant is not None:

    class _Dequantized:
        """A proxy of a LoRA layer over an NF4Linear. The method ``get_base_layer`` of the proxy returns a dequantized
        nn.Linear in place of an NF4Linear."""

        def __init__(self, layer: Any) -> None:
            object.__setattr__(self, "_layer", layer)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._layer, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self._layer, name, value)

        def get_base_layer(self) -> nn.Module:
            base = self._layer.get_base_layer()
            if not isinstance(base, NF4Linear):
                return base
            dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(base.dequantize(), requires_grad=False)
            dense.bias = base.bias
            return dense

    class DoraNF4Variant(DoraLinearVariant):
        """PEFT's variant of DoRA for a LoRA layer over an NF4Linear. PEFT alone can't dequantize the weight of an
        NF4Linear."""

        @staticmethod
        def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
            DoraLinearVariant.init(_Dequantized(module), adapter_name, **kwargs)

        @staticmethod
        def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
            return DoraLinearVariant.forward(_Dequantized(module), active_adapter, x, result, **kwargs)

    VARIANTS = (DoraLinearVariant, DoraNF4Variant)


def prepare_dora(layer: Any, dora_dropout: Optional[str]) -> None:
    """Sets the attribute DORA_DROPOUT on a LoRA layer to ``dora_dropout``, or removes the attribute if ``dora_dropout``
    is "peft", or leaves the attribute as it is if ``dora_dropout`` is None. Over an NF4Linear, replaces PEFT's DoRA
    variants by DoraNF4Variant."""
    if dora_dropout is not None:
        layer.__dict__.pop(DORA_DROPOUT, None)
    if dora_dropout not in (None, "peft"):
        layer.__dict__[DORA_DROPOUT] = dora_dropout
    if isinstance(layer.get_base_layer(), NF4Linear):
        _replace_variants(layer, DoraLinearVariant, DoraNF4Variant)


def clear_dora(layer: Any) -> None:
    """Undoes :func:`prepare_dora`."""
    layer.__dict__.pop(DORA_DROPOUT, None)
    _replace_variants(layer, DoraNF4Variant, DoraLinearVariant)


def _replace_variants(layer: Any, old: type, new: type) -> None:
    for name, variant in layer.lora_variant.items():
        if type(variant) is old:
            layer.lora_variant[name] = new()


# --- the fused forward ------------------------------------------------------------------------------------------------


def forward(
    layer: Any, name: str, x: Tensor, weight: Any, bias: Optional[Tensor], pair: tuple[Tensor, Tensor],
    dtype: torch.dtype, is_known: bool = False,
) -> Tensor:  # fmt: skip
    """Returns DoRA's output ``m/‖W + s·B A‖ ∘ (x Wᵀ + s·x Aᵀ Bᵀ) + b`` for one adapter, with its magnitude m and its
    scaling s.

    In training, dropout acts on x in both products if dora_dropout is "peft". If dora_dropout is "lora", dropout acts
    on x in the low-rank product alone.
    """
    modules = layer._modules
    module = modules["lora_magnitude_vector"]._modules[name]
    magnitude, dropout = module._parameters["weight"], modules["lora_dropout"]._modules[name]
    (lora_A, lora_B), scaling = pair, layer.scaling[name]
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training and layer.training else 0.0
    norm = cached_norm(module, name, x.dtype, weight, lora_A, lora_B, scaling)
    mode = layer.__dict__.get(DORA_DROPOUT, "peft")
    if is_known:
        y = checked_dora_linear(x, weight, bias, lora_A, lora_B, magnitude, scaling, p, mode, norm)
    else:
        y = ops.dora_linear(x, weight, lora_A, lora_B, magnitude, bias, scaling=scaling, dropout_p=p, training=True,
                            dropout_mode=mode, weight_norm=norm)  # fmt: skip
    if x.dim() == 1:
        y = y.unsqueeze(0)  # PEFT's scale is [1, N], so for an x of one dimension PEFT's result has two dimensions
    dtype = layer.dora_dtype(dtype, magnitude)
    return y if y.dtype is dtype else y.to(dtype)


def forward_over(layer: Any, name: str, base: nn.Module, x: Tensor) -> Tensor:
    """Returns DoRA's output, summed in float32, over a 4-bit layer whose own forward multiplies in a 16-bit dtype."""
    modules = layer._modules
    module, dropout = modules["lora_magnitude_vector"]._modules[name], modules["lora_dropout"]._modules[name]
    (lora_A, lora_B), scaling, bias = layer.pair(name), layer.scaling[name], base._parameters["bias"]
    weight = weight_of(base)
    norm = cached_norm(module, name, weight.dtype, weight, lora_A, lora_B, scaling)
    if norm is None:
        norm = ops.dora_weight_norm(weight, lora_A.detach(), lora_B.detach(), scaling)
    scale, result = output_scale(module._parameters["weight"], norm), base(x)
    drops = type(dropout) is nn.Dropout and dropout.training and layer.training and dropout.p > 0.0
    # If dora_dropout is "peft", DoRA's scaled term contains the product of the base weight with x after dropout;
    # frozen_linear computes this product in float32, the dtype of x.
    if drops and layer.__dict__.get(DORA_DROPOUT, "peft") == "peft":
        dropped = dropout(x)
        product = ops.frozen_linear(dropped, weight)
        z = ops.lora_residual(dropped, product, lora_A, lora_B, scaling=scaling)
        return result - product + ops.ia3_scale(z, scale)
    plain = result if bias is None else result - bias
    z = ops.lora_residual(x, plain, lora_A, lora_B, scaling=scaling, dropout_p=dropout.p if drops else 0.0,
                          training=drops)  # fmt: skip
    y = ops.ia3_scale(z, scale)
    return y if bias is None else y + bias


def cached_norm(
    module: Any, name: str, dtype: torch.dtype, weight: Any, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Optional[Tensor]:
    """Returns DoRA's weight norm from PEFT's cache; returns None in training and outside of the context
    ``peft.helpers.DoraCaching``.

    Inside ``DoraCaching`` in evaluation mode, computes and stores a norm that the cache lacks. For a weight of three
    dimensions the norm is ``[experts, outputs]``, the norm of all experts of a mixture.
    """
    if not dora.ENABLE_DORA_CACHING or module.training:
        # Clears the cache of norms, as PEFT's own code does: a cached norm is stale once the adapter has changed.
        if module._dora_cache:
            module._cache_clear()
        return None
    key = f"weight-norm-{name}"
    norm = module._cache_get(key, None)
    if norm is None:
        with torch.no_grad():
            dtype = dtype if isinstance(weight, PackedWeight) else None
            norm_of = ops.dora_weight_norm if len(weight.shape) == 2 else ops.dora_experts_weight_norm
            norm = norm_of(weight, lora_A, lora_B, scaling, dtype=dtype)
        module._cache_store(key, norm)
    return norm
