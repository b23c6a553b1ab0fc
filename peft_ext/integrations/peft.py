"""PEFT's LoRA layers and bitsandbytes' 4-bit linears on this project's ops, in a live model.

    accelerate:  layer.__class__ = the fused subclass of its class          restore:  the way back

Only the class of a layer changes: its parameters, ``__dict__`` and ``state_dict`` stay what they were, so saving,
copying, pickling, merging and adding or deleting adapters go on as PEFT wrote them. On each call a fused layer asks
:func:`_stock_reason`, which :func:`explain` reports, whether the op computes what PEFT would; where not, PEFT's own
forward runs.

Layers are matched by exact type: a subclass may have changed the forward that would be replaced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from ..nn import NF4Linear
from ..ops._checks import autocast_dtype
from ..ops._library import has_kernel
from ..weight import NF4Weight
from .bitsandbytes import nf4_from_params4bit, why_not_nf4

try:
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
except ImportError:
    lora = None
try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

__all__ = ["Explanation", "Row", "accelerate", "explain", "restore"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (nn.Parameter, Tensor)
_NOT_ACCELERATED = "accelerate(model) was not called on it"
_VARIANTS = {
    "DoraLinearVariant": "DoRA",
    "ALoraLinearVariant": "aLoRA",
    "ArrowLinearVariant": "Arrow",
    "BdLoraLinearVariant": "BD-LoRA",
    "KasaLinearVariant": "KaSA",
    "MiCALinearVariant": "MiCA",
    "MontecloraLinearVariant": "MonteCLoRA",
    "QALoraLinearVariant": "QALoRA",
    "VeloraLinearVariant": "VeLoRA",
}
_METHODS = {"adalora": "AdaLoRA", "delora": "DeLoRA", "gralora": "GraLoRA", "ln_tuning": "LN Tuning", "loha": "LoHa",
            "lokr": "LoKr", "lora": "LoRA", "miss": "MiSS", "poly": "Poly", "randlora": "RandLora", "road": "RoAd",
            "vblora": "VB-LoRA", "vera": "VeRA", "xlora": "X-LoRA"}  # fmt: skip

# The devices on which an op has a native kernel. Elsewhere it runs the reference, which is slower than PEFT.
_KERNELS = {op: {key.lower(): has_kernel(op, key) for key in ("CPU", "CUDA")} for op in ("lora_linear", "nf4_linear")}

# Where a merged layer over an NF4 weight keeps what unmerge puts back: LoraLayer._caches, no part of the state dict.
_KEPT = "peft_ext_unmerged"


# --- the predicate ----------------------------------------------------------------------------------------------------


def _stock_reason(layer: nn.Module) -> Optional[str]:
    """Why a fused layer's next call takes the stock path, as far as the layer's own state decides; None: it is fused.

    What only the call knows is decided in :func:`_takes`, :func:`_fused_lora` and :func:`_enter_4bit`: arguments
    beside x, an x whose dtype or kind the op does not take, and a call inside torch.func or torch.jit.trace.
    """
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (accelerate's device hooks do that)"
    if type(layer) in _FOUR_BIT:
        return _weight_reason(layer) or _kernel_reason("nf4_linear", layer.weight.quant_state.absmax.device.type)
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "merged: the base layer alone runs"
    modules = layer._modules
    lora_as = modules["lora_A"]._modules
    name = None
    for active in layer.active_adapters:
        if active in lora_as:
            if name is not None:
                return "several active adapters are not fused yet"
            name = active
    if name is None:
        return "no active adapter on this layer"
    if name in layer.lora_variant:
        return f"{_variant(layer.lora_variant[name])} is not fused yet"
    lora_A, lora_B = lora_as[name], modules["lora_B"]._modules[name]
    dropout, base = modules["lora_dropout"]._modules[name], modules["base_layer"]
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
        return f"lora_A is a {type(lora_A).__name__}, lora_B a {type(lora_B).__name__}, wanted plain nn.Linear"
    if _hooked(base) or _hooked(lora_A) or _hooked(lora_B) or _hooked(dropout) or _has_any_global_hook():
        return "hooks on base_layer, lora_A, lora_B or lora_dropout would not run"
    if type(dropout) is nn.Dropout:
        if dropout.training and (dropout.p >= 1.0 or dropout.inplace):
            return f"{dropout} is not fused"
    elif type(dropout) is not nn.Identity:
        return f"lora_dropout is a {type(dropout).__name__}, wanted nn.Dropout or nn.Identity"
    if lora_A._parameters.get("bias") is not None or lora_B._parameters.get("bias") is not None:
        return "a bias on lora_A or lora_B (lora_bias) is not fused yet"
    a, b = lora_A._parameters.get("weight"), lora_B._parameters.get("weight")
    if reason := _tensor_reason("lora_A", a) or _tensor_reason("lora_B", b):
        return reason
    if reason := _kernel_reason("lora_linear", a.device.type):
        return reason
    if a.dtype is not b.dtype or a.dtype not in _DTYPES:
        return f"lora_A is {_short(a.dtype)}, lora_B {_short(b.dtype)}, wanted both float32, bfloat16 or float16"
    scaling = layer.scaling[name]
    # A comparison and not math.isfinite, which torch.compile can't trace once the scale has changed.
    if not isinstance(scaling, (float, int)) or not -math.inf < scaling < math.inf:
        return f"scaling is {type(scaling).__name__}, wanted a finite number"
    if not layer.cast_input_dtype_enabled:
        return "PEFT's cast of the input is switched off (cast_input_dtype_enabled)"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out is not fused"
    return _weight_reason(base)


def _weight_reason(base: nn.Module) -> Optional[str]:
    """Why the weight of ``base``, a Linear, NF4Linear or Linear4bit, can't be read by the ops as it lies."""
    kind = type(base)
    weight = base._parameters.get("weight")
    if kind in _FOUR_BIT:
        if type(weight) not in (bnb.nn.Params4bit, nn.Parameter):  # pickle makes the one into the other
            return f"its weight is a {type(weight).__name__}, wanted bitsandbytes' Params4bit"
        quant_state = getattr(weight, "quant_state", None)
        if reason := why_not_nf4(quant_state):
            return reason
        absmax = quant_state.absmax  # on the weight's device, and no tensor subclass, whose attributes are slow to read
        if absmax.is_meta or tuple(quant_state.shape) != (base.out_features, base.in_features):
            return f"its weight is {tuple(quant_state.shape)} on {absmax.device}, wanted [N, K] in memory"
        cast = autocast_dtype(absmax)
        if cast is not None and base.compute_type_is_set and base.compute_dtype not in (cast, None):
            return f"autocast computes in {_short(cast)}, the layer's compute_dtype is {_short(base.compute_dtype)}"
        return None
    if kind is not nn.Linear and kind is not NF4Linear:
        return f"its base layer is a {_class_name(kind)}, wanted Linear, NF4Linear or Linear4bit"
    if reason := _tensor_reason("its weight", weight):
        return reason
    if weight.requires_grad:
        return "its base weight requires grad"
    if kind is nn.Linear and weight.dtype not in _DTYPES:
        return f"its weight is {_short(weight.dtype)}, wanted float32, bfloat16 or float16"
    return None


def _tensor_reason(name: str, weight: Optional[Tensor]) -> Optional[str]:
    if type(weight) not in _PLAIN:  # a DTensor, a quantized subclass, or taken out of the module by FSDP
        return f"{name} is a {type(weight).__name__}, wanted a plain parameter"
    if weight.dim() != 2 or hasattr(weight, "ds_id"):
        return f"{name} is a shard (FSDP or ZeRO-3)"
    if weight.is_meta or weight.layout is not torch.strided:
        return f"{name} is on {weight.device} with layout {weight.layout}"
    return None


def _kernel_reason(op: str, device: str) -> Optional[str]:
    return None if _KERNELS[op].get(device) else f"no native kernel for {device} tensors is loaded"


def _hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _variant(variant: Any) -> str:
    name = type(variant).__name__
    return _VARIANTS.get(name, f"LoRA variant {name}")


# --- the fused forwards -----------------------------------------------------------------------------------------------


def _takes(x: Any) -> bool:
    """Whether x is a tensor that the ops take: plain, dense, of a float dtype with kernels; no transform under way.

    The ops know torch.compile. torch.func's transforms, torch.jit.trace and torch.export, whose x is a fake tensor,
    see PEFT's own path.
    """
    if type(x) not in _PLAIN or x.dtype not in _DTYPES or x.layout is not torch.strided or x.is_nested:
        return False
    return torch.compiler.is_compiling() or not (torch.jit.is_tracing() or torch._C._are_functorch_transforms_active())


def _fused_lora(layer: nn.Module, x: Tensor) -> Optional[Tensor]:
    """``x Wᵀ + s·dropout(x) Aᵀ Bᵀ + b`` in the dtype that PEFT returns, or None where PEFT's own forward has to run."""
    if _stock_reason(layer) is not None or not _takes(x):
        return None
    modules = layer._modules
    base, lora_as = modules["base_layer"], modules["lora_A"]._modules
    kind, bias = type(base), base._parameters["bias"]
    out_dtype = None
    if kind is nn.Linear:
        weight = base._parameters["weight"]
        if autocast_dtype(x) is None and not (weight.dtype is x.dtype and (bias is None or bias.dtype is x.dtype)):
            return None  # as in F.linear, an error
    elif kind is NF4Linear:
        weight = base.nf4
        bias = bias if bias is None else bias.to(x.dtype)
    else:
        out_dtype = x.dtype
        if autocast_dtype(x) not in (None, x.dtype) and x.dtype is not torch.float32:
            return None  # float16 plus bfloat16 under autocast: PEFT's sum has a dtype of its own
        if (entered := _enter_4bit(base, x)) is None:
            return None
        x, weight, bias = entered
    for name in layer.active_adapters:
        if name in lora_as:
            break
    dropout = modules["lora_dropout"]._modules[name]
    drops = type(dropout) is nn.Dropout
    y = ops.lora_linear(
        x, weight, lora_as[name]._parameters["weight"], modules["lora_B"]._modules[name]._parameters["weight"], bias,
        scaling=layer.scaling[name], dropout_p=dropout.p if drops else 0.0, training=drops and dropout.training,
    )  # fmt: skip
    return y if out_dtype is None else y.to(out_dtype)


def _enter_4bit(base: nn.Module, x: Tensor) -> Optional[tuple[Tensor, NF4Weight, Optional[Tensor]]]:
    """x, weight and bias as ``Linear4bit.forward`` hands them on, or None where its own forward has to run.

    The bias is cast for the call, where bitsandbytes casts the parameter for good.
    """
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    compute = base.compute_dtype or x.dtype
    if compute not in _DTYPES or autocast_dtype(x) not in (None, compute):
        return None
    bias = base._parameters["bias"]
    bias = bias if bias is None else bias.to(compute)
    return x.to(compute), nf4_from_params4bit(base._parameters["weight"]), bias


# --- the classes ------------------------------------------------------------------------------------------------------

_FUSED: dict[type, type] = {}


def _fuses(stock: type) -> Any:
    """Register a class as the fused subclass of ``stock``, under the same ``__name__``.

    PEFT, accelerate and ``repr`` look at the class's ``__name__`` ("Linear4bit"); pickle at ``__qualname__``.
    """

    def register(fused: type) -> type:
        fused.__name__ = stock.__name__
        _FUSED[stock] = fused
        return fused

    return register


if lora is not None:

    @_fuses(lora.Linear)
    class FusedLoraLinear(lora.Linear):
        """``peft.tuners.lora.Linear`` over nn.Linear, NF4Linear or Linear4bit on :func:`peft_ext.ops.lora_linear`.

        Over an NF4Linear, merge requantizes ``dequantize(W) + Σ delta`` with W's own block size, and unmerge puts
        W's very bits back.
        """

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._check_forward_args(x, *args, **kwargs)
            y = None if args or kwargs else _fused_lora(self, x)
            return super().forward(x, *args, **kwargs) if y is None else y

        def resolve_lora_variant(self, **kwargs: Any) -> Any:
            variant = super().resolve_lora_variant(**kwargs)
            if variant is not None and isinstance(self.get_base_layer(), NF4Linear):
                raise NotImplementedError(f"{_variant(variant)} over an NF4Linear is not supported yet")
            return variant

        def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
            base = self.get_base_layer()
            if not isinstance(base, NF4Linear):
                return super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
            if names:
                _merge_nf4(self, base, names, safe_merge)

        def unmerge(self) -> None:
            base = self.get_base_layer()
            if not self.merged or not isinstance(base, NF4Linear):
                return super().unmerge()
            if _KEPT not in self._caches:
                raise RuntimeError("the NF4 weight from before the merge is not here: it was merged elsewhere")
            nf4, bias = self._cache_pop(_KEPT)
            base.set_nf4(nf4.to(base.weight.device))
            if bias is not None:
                base.bias.data = bias.to(base.bias)
            self.merged_adapters.clear()

    @torch.no_grad()
    def _merge_nf4(layer: Any, base: NF4Linear, names: list[str], safe_merge: bool) -> None:
        """Merge from the weight that was kept, whatever was merged before: one rounding, in any order."""
        nf4, bias = layer._caches.get(_KEPT, (base.nf4, None if base.bias is None else base.bias.detach().clone()))
        merged, merged_bias = nf4.to(base.weight.device).dequantize(torch.float32), bias
        for name in (*layer.merged_adapters, *names):
            if name in layer.lora_variant:
                raise NotImplementedError(f"{_variant(layer.lora_variant[name])} over an NF4Linear can't be merged")
            merged = merged + layer.get_delta_weight(name).float()
            if layer.lora_bias[name]:
                if bias is None:
                    raise RuntimeError("Impossible to merge LoRA with `lora_bias=True`: the base layer has no bias.")
                merged_bias = merged_bias + layer.lora_B[name].bias * layer.scaling[name]
            finite = torch.isfinite(merged).all() and (bias is None or torch.isfinite(merged_bias).all())
            if safe_merge and not finite:
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        quantized = ops.nf4_quantize(merged, nf4.blocksize, nf4.nested is not None)
        base.set_nf4(replace(quantized, dtype=nf4.dtype))
        if bias is not None:
            base.bias.data = merged_bias.to(base.bias)
        layer._cache_store(_KEPT, (nf4, bias))
        layer.merged_adapters.extend(names)


if bnb is not None:

    @_fuses(bnb.nn.Linear4bit)
    class FusedLinear4bit(bnb.nn.Linear4bit):
        """bitsandbytes' ``Linear4bit`` over an NF4 weight on :func:`peft_ext.ops.nf4_linear`."""

        def forward(self, x: Tensor) -> Tensor:
            if _stock_reason(self) is None and _takes(x) and (entered := _enter_4bit(self, x)) is not None:
                return ops.nf4_linear(*entered).to(x.dtype)
            return super().forward(x)

        @property
        def support_avx512bf16_for_cpu(self) -> bool:
            """False for an NF4 weight: bitsandbytes must not repack it, whichever path a call takes.

            A repacked weight loses its gradients when it is trained again, and changes in the state dict.
            """
            quant_state = getattr(self._parameters.get("weight"), "quant_state", None)
            return self.__dict__.get("support_avx512bf16_for_cpu", False) and why_not_nf4(quant_state) is not None

        @support_avx512bf16_for_cpu.setter
        def support_avx512bf16_for_cpu(self, value: bool) -> None:
            self.__dict__["support_avx512bf16_for_cpu"] = value


if lora is not None and bnb is not None:

    @_fuses(lora.Linear4bit)
    class FusedLoraLinear4bit(lora.Linear4bit):
        """``peft.tuners.lora.bnb.Linear4bit`` on :func:`peft_ext.ops.lora_linear`."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._check_forward_args(x, *args, **kwargs)
            y = None if args or kwargs else _fused_lora(self, x)
            return super().forward(x, *args, **kwargs) if y is None else y


_STOCK = {fused: stock for stock, fused in _FUSED.items()}
_FOUR_BIT = () if bnb is None else (bnb.nn.Linear4bit, FusedLinear4bit)


# --- public -----------------------------------------------------------------------------------------------------------


def accelerate(model: nn.Module) -> nn.Module:
    """Put the LoRA layers and 4-bit linears of a live model on the fused ops, in place.

    Args:
        model: a Hugging Face PeftModel, or any module tree with PEFT LoRA layers (``lora.Linear`` over nn.Linear or
            NF4Linear, ``lora.Linear4bit``) or bitsandbytes ``Linear4bit`` layers. A layer that can't be fused goes on
            as it was; :func:`explain` tells why. Layers that are added later stay stock until the next call.

    Returns: the same model. Calling again is harmless. Outputs and gradients agree with PEFT's to rounding; dropout
    draws its mask from the same generator, not the same mask. Not offered: the gradient of a gradient, and
    forward-mode derivatives.

    Raises: TypeError where model is no nn.Module.
    """
    for module in _tree("accelerate", model).modules():
        if (fused := _FUSED.get(type(module))) is not None:
            module.__class__ = fused
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate` in place: every layer has the class it had, and nothing is left behind.

    Raises: TypeError where model is no nn.Module; RuntimeError, before anything is changed, where a layer is merged
    into an NF4 weight, which only the fused layer can unmerge.
    """
    for name, module in _tree("restore", model).named_modules():
        if type(module) in _STOCK and _KEPT in getattr(module, "_caches", ()):
            raise RuntimeError(f"restore: {name} is merged into an NF4 weight; call unmerge_adapter() first")
    for module in model.modules():
        if (stock := _STOCK.get(type(module))) is not None:
            module.__class__ = stock
    return model


@dataclass(frozen=True)
class Row:
    """What one layer does: ``kind`` as "LoRA over Linear4bit"; ``reason`` is empty where ``fused``."""

    name: str
    kind: str
    fused: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """A row for each PEFT layer, and for each quantized linear that is not the base of one. Prints as a table."""

    rows: list[Row] = field(default_factory=list)

    # A table of more rows than this shows like rows as one, with their count and the first one's name.
    LONGEST = 20

    @property
    def fused_share(self) -> float:
        """Fused layers over all layers; 0 where there is none."""
        return sum(row.fused for row in self.rows) / len(self.rows) if self.rows else 0.0

    def __str__(self) -> str:
        grouped: dict[Any, list[str]] = {}
        for row in self.rows:
            key = (row.kind, row.fused, row.reason) if len(self.rows) > self.LONGEST else row
            grouped.setdefault(key, []).append(row.name)
        lines = [("layer", "kind", "fused", "reason")]
        for key, names in grouped.items():
            kind, fused, reason = (key.kind, key.fused, key.reason) if isinstance(key, Row) else key
            more = f"{len(names)} x, first {names[0]}" if len(names) > 1 else names[0]
            lines.append((more, kind, "yes" if fused else "no", reason))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        cells = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
        table = ["  ".join(line).rstrip() for line in cells]
        fused = sum(row.fused for row in self.rows)
        return "\n".join([*table, f"{fused} of {len(self.rows)} layers fused ({self.fused_share:.0%})"])


def explain(model: nn.Module) -> Explanation:
    """Which layers run fused right now, and why the others do not.

    "Right now" is literal: the rows change with ``train()``, ``set_adapter``, ``merge_adapter``, autocast and the rest
    of the state that :func:`accelerate` honours. What depends on a single call is not known here: extra arguments such
    as ``adapter_names``, and an input whose dtype does not fit, take the stock path as well.

    Raises: TypeError where model is no nn.Module.
    """
    return Explanation(list(_rows(_tree("explain", model))))


def _tree(caller: str, model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model is {type(model).__name__}, wanted an nn.Module")
    return model


def _rows(model: nn.Module) -> Iterator[Row]:
    bases = set()
    for name, module in model.named_modules():
        kind = reason = None
        if lora is not None and isinstance(module, BaseTunerLayer):
            bases.add(module.get_base_layer())
            method, base = _method(module), getattr(module, "base_layer", module)
            kind = f"{method} over {_class_name(type(base))}"
            if type(module) not in _STOCK and type(module) not in _FUSED:
                reason = _unmatched(module, method, kind)
        elif module in bases:
            continue
        elif isinstance(module, NF4Linear):
            kind, reason = "NF4Linear", _kernel_reason("nf4_linear", module.weight.device.type) or ""
        elif bnb is not None and isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            kind = _class_name(type(module))
            if type(module) not in _FOUR_BIT:
                reason = f"{kind} is not fused; only Linear4bit itself is"
        if kind is None:
            continue
        if reason is None:
            reason = _NOT_ACCELERATED if type(module) in _FUSED else _stock_reason(module)
        yield Row(name, kind, not reason, reason or "")


def _class_name(kind: type) -> str:
    return _STOCK.get(kind, kind).__name__


def _package(module: nn.Module) -> tuple[str, type]:
    """The tuner's package, ``x`` of ``peft.tuners.x``, and PEFT's class that the layer is or derives from."""
    for kind in type(module).__mro__:
        kind = _STOCK.get(kind, kind)
        path = kind.__module__.split(".")
        if path[:2] == ["peft", "tuners"] and len(path) > 2:
            return path[2], kind
    return type(module).__name__, type(module)


def _method(module: Any) -> str:
    package, _ = _package(module)
    if package == "lora":
        for name in module.active_adapters:
            if (variant := module.lora_variant.get(name)) is not None:
                return _variant(variant)
    return _METHODS.get(package, package.replace("_", " ").upper())


def _unmatched(module: nn.Module, method: str, kind: str) -> str:
    package, stock = _package(module)
    if stock in _FUSED and type(module) is not stock:
        return f"{type(module).__name__} is a subclass of PEFT's {stock.__name__}, which is matched exactly"
    return f"{kind if package == 'lora' else method} is not fused yet"
