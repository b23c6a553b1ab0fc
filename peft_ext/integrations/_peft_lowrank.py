"""PEFT's LoRA, DoRA and AdaLoRA layers on :func:`peft_ext.ops.lora_linear` and :func:`peft_ext.ops.dora_linear`.

Several active adapters are one of the sum of their ranks: A and B concatenated, the scales as a scale per rank. Over a
base layer that has to run on its own (8-bit, of another class, with hooks) the low-rank part alone is fused, on
:func:`peft_ext.ops.lora_residual`. A mixed batch is :func:`peft_ext.ops.grouped_lora_linear`.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from .._imports import has, optional, version
from ..nn import NF4Linear
from ..reference.dora import output_scale
from ..weight import NF4Weight
from ._peft_base import (
    DTYPES,
    FOUR_BIT,
    Fused,
    Linear8bitLt,
    MergesNF4,
    alone_reason,
    base_reason,
    enter,
    fuses,
    hooked,
    kernel_reason,
    layer_reason,
    quant_state_of,
    short,
    sums_wider,
    takes,
    tensor_reason,
)
from .bitsandbytes import nf4_from_params4bit

LoraLinear = LoraLinear8bitLt = LoraLinear4bit = SVDLinear = SVDLinear8bitLt = SVDLinear4bit = None
dora = DoraLinearLayer = DoraLinearVariant = None
with optional("peft", "LoRA and DoRA over a linear layer that is not bitsandbytes' are not fused"):
    from peft.tuners.lora import Linear as LoraLinear
with optional("peft", "AdaLoRA over a linear layer that is not bitsandbytes' is not fused"):
    from peft.tuners.adalora import SVDLinear
if Linear8bitLt is not None:
    with optional("peft", "LoRA over bitsandbytes' Linear8bitLt is not fused"):
        from peft.tuners.lora import Linear8bitLt as LoraLinear8bitLt
    with optional("peft", "AdaLoRA over bitsandbytes' Linear8bitLt is not fused"):
        from peft.tuners.adalora import SVDLinear8bitLt
if FOUR_BIT:
    with optional("peft", "LoRA and DoRA over bitsandbytes' Linear4bit are not fused"):
        from peft.tuners.lora import Linear4bit as LoraLinear4bit
    with optional("peft", "AdaLoRA over bitsandbytes' Linear4bit is not fused"):
        from peft.tuners.adalora import SVDLinear4bit
with optional("peft", "DoRA is not fused"):
    from peft.tuners.lora import dora
    from peft.tuners.lora.dora import ENABLE_DORA_CACHING, DoraLinearLayer  # noqa: F401  the first is read as it is
    from peft.tuners.lora.variants import DoraLinearVariant as _DoraLinearVariant

    has(DoraLinearLayer, "_cache_clear", "_cache_get", "_cache_store")
    has(_DoraLinearVariant, "init", "forward")
    DoraLinearVariant = _DoraLinearVariant

_VARIANTS = {
    "DoraLinearVariant": "DoRA",
    "DoraNF4Variant": "DoRA",
    "DoraConv1dVariant": "DoRA",
    "DoraConv2dVariant": "DoRA",
    "DoraConv3dVariant": "DoRA",
    "DoraEmbeddingVariant": "DoRA",
    "ALoraLinearVariant": "aLoRA",
    "ArrowLinearVariant": "Arrow",
    "BdLoraLinearVariant": "BD-LoRA",
    "KasaLinearVariant": "KaSA",
    "MiCALinearVariant": "MiCA",
    "MontecloraLinearVariant": "MonteCLoRA",
    "QALoraLinearVariant": "QALoRA",
    "VeloraLinearVariant": "VeLoRA",
}

# accelerate's dora_dropout: the attribute of a layer that has another than PEFT's.
DORA_DROPOUT = "_peft_ext_dora_dropout"

_HOOKS = "hooks on lora_A, lora_B or lora_dropout would not run"

# What stands against fusing one adapter, its lora_A and lora_B.
_Adapter = tuple[Optional[str], Optional[Tensor], Optional[Tensor]]


def variant_name(variant: Any) -> str:
    name = type(variant).__name__
    return _VARIANTS.get(name, f"LoRA variant {name}")


# --- why a call takes the stock path ----------------------------------------------------------------------------------


def _adapters_reason(layer: Any, names: list[str], several: bool) -> Optional[str]:
    """What stands against fusing the adapters ``names``, over whatever base; a method's own checks are in
    ``layer._adapter``."""
    if not names:
        return "no active adapter on this layer"
    if _has_any_global_hook():
        return "global hooks of torch.nn would not run"
    dropouts = layer._modules["lora_dropout"]._modules
    like = None
    for name in names:
        reason, a, b = layer._adapter(name, several)
        if reason:
            return reason
        dropout = dropouts[name]
        if hooked(dropout):
            return _HOOKS
        if type(dropout) is nn.Dropout:
            if dropout.training and (dropout.p >= 1.0 or dropout.inplace):
                return f"{dropout} is not fused"
            if several and dropout.training and dropout.p > 0.0:
                return "several adapters draw a dropout mask each"
        elif type(dropout) is not nn.Identity:
            return f"lora_dropout is a {type(dropout).__name__}, wanted nn.Dropout or nn.Identity"
        if reason := tensor_reason("lora_A", a) or tensor_reason("lora_B", b):
            return reason
        if a.dtype is not b.dtype or a.dtype not in DTYPES:
            return f"lora_A is {short(a.dtype)}, lora_B {short(b.dtype)}, wanted both float32, bfloat16 or float16"
        if like is None:
            like = a
        elif a.dtype is not like.dtype or a.device != like.device:
            return f"several adapters: {short(like.dtype)} on {like.device}, {short(a.dtype)} on {a.device}"
        if reason := _scaling_reason(layer.scaling[name], a):
            return reason
    if not layer.cast_input_dtype_enabled:
        return "PEFT's cast of the input is switched off (cast_input_dtype_enabled)"
    return None


def _scaling_reason(scaling: Any, like: Tensor) -> Optional[str]:
    if type(scaling) is Tensor and scaling.numel() == 1 and scaling.device == like.device:
        return "scaling is a tensor that requires grad" if scaling.requires_grad else None  # hotswap's
    # A comparison and not math.isfinite, which torch.compile can't trace once the scale has changed.
    if not isinstance(scaling, (float, int)) or not -math.inf < scaling < math.inf:
        return f"scaling is {type(scaling).__name__}, wanted a finite number"
    return None


def _device(layer: Any, name: str) -> str:
    return layer._pair(name)[0].device.type


def _magnitude_reason(module: nn.Module) -> Optional[str]:
    if type(module) is not DoraLinearLayer:
        return f"lora_magnitude_vector is a {type(module).__name__}, wanted DoraLinearLayer"
    if hooked(module):
        return "hooks on lora_magnitude_vector would not run"
    magnitude = module._parameters.get("weight")
    if reason := tensor_reason("lora_magnitude_vector", magnitude, dim=1):
        return reason
    if magnitude.dtype not in DTYPES:
        return f"lora_magnitude_vector is {short(magnitude.dtype)}, wanted float32, bfloat16 or float16"
    return None


# --- the fused forwards -----------------------------------------------------------------------------------------------


class _LowRank(Fused):
    """A layer of adapters A, B and a scale per rank. A subclass gives ``_pair`` and ``_adapter``."""

    _reads = (*Fused._reads, "lora_A", "lora_B", "lora_dropout", "lora_variant", "scaling", "cast_input_dtype_enabled")

    def _names(self) -> list[str]:
        """The active adapters that this layer has, in the order in which PEFT adds them."""
        held = self._modules["lora_A"]
        return [name for name in self.active_adapters if name in held]

    def _stock_reason(self) -> Optional[str]:
        return self._how(self._names())[0]

    def _partly(self) -> Optional[str]:
        """Why the low-rank part alone is fused, where that is so."""
        reason, onto = self._how(self._names())
        return onto if reason is None else None

    def _how(self, names: list[str]) -> tuple[Optional[str], Optional[str]]:
        """Why PEFT's own forward has to run; and else why the base layer has to run on its own."""
        if reason := layer_reason(self) or _adapters_reason(self, names, len(names) > 1):
            return reason, None
        dora, device = names[0] in self.lora_variant, _device(self, names[0])
        if reason := base_reason(self):
            if dora:
                return reason, None
            alone = alone_reason(self)
            return (f"{reason}; {alone}" if alone else kernel_reason("lora_residual", device)), reason
        return kernel_reason("dora_linear" if dora else "lora_linear", device), None

    def _rank_scale(self, name: str, scaling: float) -> Optional[Tensor]:
        """``scaling`` times the adapter's own scale per rank ``[R]``, or None where it has none."""
        return None

    def _bias(self, name: str) -> Optional[Tensor]:
        """A bias of lora_B's ``[N]``, which PEFT scales with the rest; or None."""
        return None

    def _fused(self, x: Tensor) -> Optional[Tensor]:
        """``x Wᵀ + (dropout(x) Aᵀ ∘ ρ) Bᵀ + b`` in the dtype that PEFT returns; None: its own forward has to run."""
        names, modules = self._names(), self._modules
        reason, onto = self._how(names)
        if reason is not None or not takes(x):
            return None
        base, name = modules["base_layer"], names[0]
        if onto is None and sums_wider(base, x):
            if name in self.lora_variant:
                return self._dora_over(name, base, x)
            onto = "its sum is float32's"
        if onto is None:
            if (entered := enter(base, x)) is None:
                return None
            x, weight, bias, dtype = entered
            if name in self.lora_variant:
                return self._dora(name, x, weight, bias, dtype)
        if len(names) == 1:
            (lora_A, lora_B), scaling = self._pair(name), self.scaling[name]
            rank_scale = self._rank_scale(name, 1.0)
            if isinstance(scaling, Tensor):
                scaling, rank_scale = 1.0, _times(scaling, rank_scale, lora_A.shape[0])
        else:
            lora_A, lora_B, scaling, rank_scale = self._concatenated(names)
        dropout = modules["lora_dropout"]._modules[name]
        drops = type(dropout) is nn.Dropout
        options = {"scaling": scaling, "rank_scale": rank_scale, "dropout_p": dropout.p if drops else 0.0,
                   "training": drops and dropout.training}  # fmt: skip
        if onto is None:
            y = ops.lora_linear(x, weight, lora_A, lora_B, bias, **options)
        else:
            result = base(x)
            dtype = result.dtype
            if not takes(result) or result.shape[:-1] != x.shape[:-1]:
                return self._added(names, x, result)
            wide = torch.promote_types(x.dtype, dtype)
            # Autocast would round what the base layer returned, where PEFT adds to it.
            with torch.autocast(x.device.type, enabled=False):
                y = ops.lora_residual(x.to(wide), result.to(wide), lora_A, lora_B, **options)
        for name in names:
            if (bias := self._bias(name)) is not None:
                y = y + self.scaling[name] * bias
        return y if y.dtype is dtype else y.to(dtype)

    def _added(self, names: list[str], x: Tensor, result: Tensor) -> Tensor:
        """As PEFT adds, to a result that the op does not take: the base layer has run, and must not run again."""
        dtype = result.dtype
        for name in names:
            lora_A, lora_B = self._pair(name)
            if (rank_scale := self._rank_scale(name, 1.0)) is not None:
                lora_A = lora_A * rank_scale.unsqueeze(1)
            dropped = self._modules["lora_dropout"]._modules[name](x.to(lora_A.dtype))
            result = result + F.linear(F.linear(dropped, lora_A), lora_B, self._bias(name)) * self.scaling[name]
        return result.to(dtype)

    def _side_by_side(self, names: list[str]) -> tuple[Tensor, Tensor, None]:
        """lora_A ``[R, K]`` with all scales in it and lora_B ``[N, R]`` of several adapters, float32."""
        pairs, scaled = [self._pair(name) for name in names], []
        for name, (a, _) in zip(names, pairs, strict=True):
            scale = _times(self.scaling[name], self._rank_scale(name, 1.0), a.shape[0], a.device)
            scaled.append(scale.unsqueeze(1) * a.float())
        return torch.cat(scaled), torch.cat([b.float() for _, b in pairs], dim=1), None

    def _concatenated(self, names: list[str]) -> tuple[Tensor, Tensor, float, Optional[Tensor]]:
        """The adapters as one; the scales are filled in on the device, for a copy from the host would wait for it."""
        pairs = [self._pair(name) for name in names]
        lora_A, lora_B = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
        scalings = [self.scaling[name] for name in names]
        if any(isinstance(scaling, Tensor) for scaling in scalings):
            given = [_times(scaling, self._rank_scale(name, 1.0), a.shape[0], a.device)
                     for name, scaling, (a, _) in zip(names, scalings, pairs, strict=True)]  # fmt: skip
            return lora_A, lora_B, 1.0, torch.cat(given)
        scales = [self._rank_scale(name, scaling) for name, scaling in zip(names, scalings, strict=True)]
        if scales[0] is not None:
            return lora_A, lora_B, 1.0, torch.cat(scales)
        if scalings.count(scalings[0]) == len(scalings):
            return lora_A, lora_B, scalings[0], None
        filled = [
            torch.full((a.shape[0],), scaling, dtype=torch.float32, device=a.device)
            for (a, _), scaling in zip(pairs, scalings, strict=True)
        ]
        return lora_A, lora_B, 1.0, torch.cat(filled)


def _times(scaling: Any, rank_scale: Optional[Tensor], rank: int, device: Any = None) -> Tensor:
    """``[R]`` float32: a scale that may be a tensor of one element, times the adapter's own."""
    if not isinstance(scaling, Tensor):
        scaling = torch.full((1,), scaling, dtype=torch.float32, device=device)
    scaling = scaling.to(torch.float32).reshape(1)
    return scaling.expand(rank) if rank_scale is None else scaling * rank_scale


class Lora(_LowRank):
    """``lora.Linear`` and ``lora.Linear4bit``: modules lora_A and lora_B, one scale, DoRA's magnitude."""

    _reads = (
        *_LowRank._reads, "lora_bias", "lora_magnitude_vector", "_check_forward_args", "get_base_layer",
    )  # fmt: skip

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        if names is not None and not args and len(kwargs) == 1:
            self._check_forward_args(x, adapter_names=names)
            if (y := self._mixed(x, names)) is not None:
                return y
        return super().forward(x, *args, **kwargs)

    def _mixed(self, x: Tensor, names: list[str]) -> Optional[Tensor]:
        """A mixed batch, a name for each sample of x; None: PEFT's loop has to run.

        A name that this layer does not have, ``__base__`` among them, is the base layer's alone.
        """
        held = self._modules["lora_A"]._modules
        used = [name for name in dict.fromkeys(names) if name in held]
        if not used or layer_reason(self) is not None or not takes(x) or x.dim() < 2:
            return None
        if _adapters_reason(self, used, True) is not None or base_reason(self) is not None:
            return None
        if any(isinstance(self.scaling[name], Tensor) or self._bias(name) is not None for name in used):
            return None
        if kernel_reason("grouped_lora_linear", _device(self, used[0])) is not None:
            return None
        if (entered := enter(self._modules["base_layer"], x)) is None:
            return None
        x, weight, bias, dtype = entered
        pairs, index = [self._pair(name) for name in used], {name: i for i, name in enumerate(used)}
        y = ops.grouped_lora_linear(
            x, weight, [a for a, _ in pairs], [b for _, b in pairs], [index.get(name, -1) for name in names], bias,
            scaling=[self.scaling[name] for name in used],
        )  # fmt: skip
        return y if y.dtype is dtype else y.to(dtype)

    def _names(self) -> list[str]:
        held = self._modules["lora_A"]._modules
        return [name for name in self.active_adapters if name in held]

    def _pair(self, name: str) -> tuple[Optional[Tensor], Optional[Tensor]]:
        modules = self._modules
        lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        return lora_A._parameters.get("weight"), lora_B._parameters.get("weight")

    def _adapter(self, name: str, several: bool) -> _Adapter:
        modules = self._modules
        if (variant := self.lora_variant.get(name)) is not None:
            if not _DORA and variant_name(variant) == "DoRA":
                return f"DoRA is not fused: {version('peft')} is not as peft_ext knows it", None, None
            if type(variant) not in _DORA:
                return f"{variant_name(variant)} is not fused yet", None, None
            if several:
                return "DoRA beside another active adapter is not fused", None, None
            if isinstance(self.scaling[name], Tensor):
                return "DoRA whose scaling is a tensor is not fused", None, None
            if reason := _magnitude_reason(modules["lora_magnitude_vector"]._modules[name]):
                return reason, None, None
        lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
            names = f"lora_A is a {type(lora_A).__name__}, lora_B a {type(lora_B).__name__}"
            return f"{names}, wanted plain nn.Linear", None, None
        if hooked(lora_A) or hooked(lora_B):
            return _HOOKS, None, None
        a, b = lora_A._parameters, lora_B._parameters
        if a.get("bias") is not None:
            return "lora_A has a bias", None, None
        if (bias := b.get("bias")) is not None and (reason := tensor_reason("lora_B's bias", bias, dim=1)):
            return reason, None, None
        return None, a.get("weight"), b.get("weight")

    def _bias(self, name: str) -> Optional[Tensor]:
        return self._modules["lora_B"]._modules[name]._parameters.get("bias")

    def _dora_dtype(self, dtype: torch.dtype, magnitude: Tensor) -> torch.dtype:
        """The dtype that PEFT's DoRA returns over a base layer that returns ``dtype``."""
        return dtype

    def _dora(self, name: str, x: Tensor, weight: Any, bias: Optional[Tensor], dtype: torch.dtype) -> Tensor:
        """``m/‖W + s·B A‖ ∘ (x Wᵀ + s·x Aᵀ Bᵀ) + b``, with PEFT's dropout or the one on the low-rank path alone."""
        modules = self._modules
        module = modules["lora_magnitude_vector"]._modules[name]
        magnitude, dropout = module._parameters["weight"], modules["lora_dropout"]._modules[name]
        (lora_A, lora_B), scaling = self._pair(name), self.scaling[name]
        drops = type(dropout) is nn.Dropout
        y = ops.dora_linear(
            x, weight, lora_A, lora_B, magnitude, bias, scaling=scaling, dropout_p=dropout.p if drops else 0.0,
            training=drops and dropout.training and self.training, dropout_mode=self.__dict__.get(DORA_DROPOUT, "peft"),
            weight_norm=_cached_norm(module, name, x.dtype, weight, lora_A, lora_B, scaling),
        )  # fmt: skip
        dtype = self._dora_dtype(dtype, magnitude)
        return y if y.dtype is dtype else y.to(dtype)

    def _dora_over(self, name: str, base: nn.Module, x: Tensor) -> Tensor:
        """The same in float32 over a 4-bit layer that computes in fewer bits, and so runs on its own."""
        modules = self._modules
        module, dropout = modules["lora_magnitude_vector"]._modules[name], modules["lora_dropout"]._modules[name]
        (lora_A, lora_B), scaling, bias = self._pair(name), self.scaling[name], base._parameters["bias"]
        weight = nf4_from_params4bit(base._parameters["weight"], quant_state_of(base))
        norm = _cached_norm(module, name, weight.dtype, weight, lora_A, lora_B, scaling)
        if norm is None:
            norm = ops.dora_weight_norm(weight, lora_A.detach(), lora_B.detach(), scaling)
        scale, result = output_scale(module._parameters["weight"], norm), base(x)
        drops = type(dropout) is nn.Dropout and dropout.training and self.training and dropout.p > 0.0
        if drops and self.__dict__.get(DORA_DROPOUT, "peft") == "peft":  # on the base too, in float32
            dropped = dropout(x)
            product = ops.nf4_linear(dropped, weight)
            z = ops.lora_residual(dropped, product, lora_A, lora_B, scaling=scaling)
            return result - product + ops.ia3_scale(z, scale)
        plain = result if bias is None else result - bias
        z = ops.lora_residual(x, plain, lora_A, lora_B, scaling=scaling, dropout_p=dropout.p if drops else 0.0,
                              training=drops)  # fmt: skip
        y = ops.ia3_scale(z, scale)
        return y if bias is None else y + bias


def _cached_norm(
    module: Any, name: str, dtype: torch.dtype, weight: Any, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Optional[Tensor]:
    """The norm from PEFT's own cache inside ``peft.helpers.DoraCaching`` in eval mode, else None."""
    if not dora.ENABLE_DORA_CACHING or module.training:
        if module._dora_cache:  # as in PEFT: what was cached may be of other adapters by the next time
            module._cache_clear()
        return None
    key = f"weight-norm-{name}"
    norm = module._cache_get(key, None)
    if norm is None:
        with torch.no_grad():
            dtype = dtype if isinstance(weight, NF4Weight) else None
            norm = ops.dora_weight_norm(weight, lora_A, lora_B, scaling, dtype=dtype)
        module._cache_store(key, norm)
    return norm


class _AdaLora(_LowRank):
    """``adalora.SVDLinear`` and ``SVDLinear4bit``: parameters lora_A, lora_B, lora_E; ``ρ = s·E/(ranknum + 1e-5)``."""

    _reads = (*_LowRank._reads, "lora_E", "ranknum")

    def _pair(self, name: str) -> tuple[Optional[Tensor], Optional[Tensor]]:
        modules = self._modules
        return modules["lora_A"]._parameters.get(name), modules["lora_B"]._parameters.get(name)

    def _adapter(self, name: str, several: bool) -> _Adapter:
        lora_A, lora_B = self._pair(name)
        lora_E, ranknum = self._modules["lora_E"]._parameters.get(name), self._modules["ranknum"]._parameters.get(name)
        reason = tensor_reason("lora_E", lora_E) or tensor_reason("ranknum", ranknum, dim=1)
        if reason is None and lora_A is not None and lora_E.dtype is not lora_A.dtype:
            reason = f"lora_E is {short(lora_E.dtype)}, lora_A {short(lora_A.dtype)}"
        if reason is None and lora_E.shape[0] == 0:
            reason = "it has rank 0"
        return reason, lora_A, lora_B

    def _rank_scale(self, name: str, scaling: float) -> Tensor:
        modules = self._modules
        rank_scale = modules["lora_E"]._parameters[name].flatten() / (modules["ranknum"]._parameters[name] + 1e-5)
        return rank_scale if scaling == 1.0 else rank_scale * scaling


# --- DoRA over NF4Linear, on PEFT's own path --------------------------------------------------------------------------

_DORA: tuple[type, ...] = ()
DoraNF4Variant = None

if DoraLinearVariant is not None:

    class _Dequantized:
        """A LoRA layer over an NF4Linear, seen as one over a dense linear."""

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
        """PEFT's DoRA over an NF4Linear, whose weight PEFT does not know how to dequantize."""

        @staticmethod
        def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
            DoraLinearVariant.init(_Dequantized(module), adapter_name, **kwargs)

        @staticmethod
        def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
            return DoraLinearVariant.forward(_Dequantized(module), active_adapter, x, result, **kwargs)

    _DORA = (DoraLinearVariant, DoraNF4Variant)


def prepare_dora(layer: Any, dora_dropout: str) -> None:
    """What accelerate leaves on a LoRA layer beside its class, for DoRA."""
    layer.__dict__.pop(DORA_DROPOUT, None)
    if dora_dropout != "peft":
        layer.__dict__[DORA_DROPOUT] = dora_dropout
    if isinstance(layer.get_base_layer(), NF4Linear):
        _replace_variants(layer, DoraLinearVariant, DoraNF4Variant)


def clear_dora(layer: Any) -> None:
    """The way back from :func:`prepare_dora`."""
    layer.__dict__.pop(DORA_DROPOUT, None)
    _replace_variants(layer, DoraNF4Variant, DoraLinearVariant)


def _replace_variants(layer: Any, old: type, new: type) -> None:
    for name, variant in layer.lora_variant.items():
        if type(variant) is old:
            layer.lora_variant[name] = new()


# --- the classes ------------------------------------------------------------------------------------------------------

if LoraLinear is not None:

    @fuses(LoraLinear)
    class FusedLoraLinear(Lora, MergesNF4, LoraLinear):
        """``peft.tuners.lora.Linear`` over nn.Linear, NF4Linear or Linear4bit: LoRA and DoRA."""

        def resolve_lora_variant(self, **kwargs: Any) -> Any:
            variant = super().resolve_lora_variant(**kwargs)
            if variant is None or not isinstance(self.get_base_layer(), NF4Linear):
                return variant
            if type(variant) is not DoraLinearVariant:
                raise NotImplementedError(f"{variant_name(variant)} over an NF4Linear is not supported yet")
            return DoraNF4Variant()

        def _factors(self, names: list[str], nf4: NF4Weight) -> Optional[tuple[Tensor, Tensor, Optional[Tensor]]]:
            plain = not any(self.lora_bias[name] for name in names)
            variants_of = [self.lora_variant.get(name) for name in names]
            if plain and all(variant is None for variant in variants_of):
                return self._side_by_side(names)
            if not plain or len(names) > 1 or type(variants_of[0]) not in _DORA:
                return None
            lora_A, lora_B, _ = self._side_by_side(names)
            norm = ops.dora_weight_norm(nf4, lora_A, lora_B, dtype=torch.float32)
            return lora_A, lora_B, output_scale(self.lora_magnitude_vector[names[0]].weight, norm)

        def _merged(
            self, name: str, weight: Tensor, bias: Optional[Tensor], unmerged: Tensor
        ) -> tuple[Tensor, Optional[Tensor]]:
            variant = self.lora_variant.get(name)
            delta = self.get_delta_weight(name).float()
            merged = weight + delta
            if type(variant) in _DORA:  # the norm is of the weight that the forward sees
                norm = torch.linalg.norm(unmerged + delta, dim=1)
                merged = output_scale(self.lora_magnitude_vector[name].weight, norm).unsqueeze(1) * merged
            elif variant is not None:
                raise NotImplementedError(f"{variant_name(variant)} over an NF4Linear can't be merged")
            if self.lora_bias[name]:
                if bias is None:
                    raise RuntimeError(  # as PEFT says it
                        "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias."
                    )
                bias = bias + self.lora_B[name].bias * self.scaling[name]
            return merged, bias


if SVDLinear is not None:

    @fuses(SVDLinear)
    class FusedSVDLinear(_AdaLora, MergesNF4, SVDLinear):
        """``peft.tuners.adalora.SVDLinear`` over nn.Linear, NF4Linear or Linear4bit."""

        def _factors(self, names: list[str], nf4: NF4Weight) -> Optional[tuple[Tensor, Tensor, Optional[Tensor]]]:
            return self._side_by_side(names)

        def _merged(
            self, name: str, weight: Tensor, bias: Optional[Tensor], unmerged: Tensor
        ) -> tuple[Tensor, Optional[Tensor]]:
            return weight + self.get_delta_weight(name).float(), bias


if LoraLinear8bitLt is not None:

    @fuses(LoraLinear8bitLt)
    class FusedLoraLinear8bitLt(Lora, LoraLinear8bitLt):
        """``peft.tuners.lora.bnb.Linear8bitLt``: the low-rank part, over bitsandbytes' own 8-bit product."""


if SVDLinear8bitLt is not None:

    @fuses(SVDLinear8bitLt)
    class FusedSVDLinear8bitLt(_AdaLora, SVDLinear8bitLt):
        """``peft.tuners.adalora.bnb.SVDLinear8bitLt``, likewise."""


if LoraLinear4bit is not None:

    @fuses(LoraLinear4bit)
    class FusedLoraLinear4bit(Lora, LoraLinear4bit):
        """``peft.tuners.lora.bnb.Linear4bit``: QLoRA and QDoRA."""

        def _dora_dtype(self, dtype: torch.dtype, magnitude: Tensor) -> torch.dtype:
            # PEFT asks for CUDA's autocast, whatever the device, and casts back only outside it.
            return torch.promote_types(dtype, magnitude.dtype) if torch.is_autocast_enabled() else dtype


if SVDLinear4bit is not None:

    @fuses(SVDLinear4bit)
    class FusedSVDLinear4bit(_AdaLora, SVDLinear4bit):
        """``peft.tuners.adalora.bnb.SVDLinear4bit``."""
