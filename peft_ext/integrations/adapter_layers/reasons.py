"""Checks that decide whether a call of a layer can run on an operator. A ``*_reason`` function returns one line of text
that says why a call can't run on an operator, or None if the call can.

The forward of a fused layer calls the functions of this module, except for a call that :mod:`.known` finds equal to an
accepted call. :func:`peft_ext.explain` calls the functions of this module too, so ``explain`` and the forward use one
set of checks.
"""

from __future__ import annotations

import math
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as any_global_hook  # noqa: PLC2701  no public name for it

from ... import _cpu
from ..._imports import version
from ..._native import STATE
from ...nn import Float8Linear, NF4Linear, PackedLinear
from ...nn.nf4 import is_dtensor, is_zero3_shard
from ...ops.checks import autocast_dtype, under_a_transform
from ...ops.format_proofs import family_of
from ...ops.library import PUBLIC, has_kernel
from ...ops.prove import proved
from ...text import dtype_name as short
from ...weights.fp4 import is_fp4_table
from ...weights.nf4 import is_nf4_table, why_not_nf4
from . import dora
from .base import (
    DTYPES,
    FOUR_BIT,
    LINEAR,
    PACKED,
    Conv1D,
    Params4bit,
    active_in,
    class_name,
    is_fully_sharded,
    quant_state_of,
)
from .foreign import foreign_reason, is_foreign


def native_kernels() -> dict[str, dict[str, bool]]:
    """Returns a dict that maps each public operator to a dict, which maps each device ("cpu", "cuda") to whether the
    loaded library has kernels for the main operators that the public operator calls (``library.PUBLIC``)."""
    return {
        op: {key.lower(): all(has_kernel(name, key) for name in called) for key in ("CPU", "CUDA")}
        for op, called in PUBLIC.items()
    }


# The result of `native_kernels` at import. An operator without native kernels would run the reference, which is slower
# than PEFT, so a layer that needs this operator takes the stock path.
KERNELS = native_kernels()

# The dtypes in which a frozen linear layer without an adapter runs on an operator too, because PyTorch has no fast
# product in these dtypes on this CPU.
WIDENED = _cpu.widened_dtypes()

# Exact types that the fused layers accept as plain tensors.
_plain: tuple[type, ...] = (nn.Parameter, Tensor)

# Ids of the sharded parameters that fully_shard, or ZeRO-3 for a leaf module, gathers before a fused layer's forward.
_gathered: frozenset[int] = frozenset()

# Maps each quant_type of bitsandbytes that the operators read to the function that checks a table of its codes' values.
_IS_TABLE = {"nf4": is_nf4_table, "fp4": is_fp4_table}
# Maps the id of a table of codes that passed the check to a weak reference to the table, and its quant_type.
_TABLES: dict[int, tuple[weakref.ref[Tensor], str]] = {}
# The quant_types of which a table has failed the check. Under torch.compile, all layers with a weight of a quant_type
# in _foreign_tables run the stock forward.
_foreign_tables: set[str] = set()

# Maps the name of a class of PEFT's variants of LoRA, without the kind of layer, to the variant's common name.
_VARIANTS = {"Dora": "DoRA", "ALora": "aLoRA", "Arrow": "Arrow", "BdLora": "BD-LoRA", "Kasa": "KaSA", "MiCA": "MiCA",
             "Monteclora": "MonteCLoRA", "QALora": "QALoRA", "Velora": "VeLoRA"}  # fmt: skip

_HOOKS = "hooks on lora_A, lora_B or lora_dropout, or a replaced forward, would not run"
_ZERO = (
    "lora_A is a shard (ZeRO-3), which is gathered for lora_A alone: set_z3_leaf_modules of DeepSpeed gathers a "
    "decoder layer as a whole"
)


def _own_forward(kind: type) -> Any:
    """Returns the forward of a class, or None if another Python module has replaced the forward."""
    forward = kind.forward
    named = (getattr(forward, "__module__", None), getattr(forward, "__qualname__", None))
    own = named == (kind.__module__, f"{kind.__qualname__}.forward") and not hasattr(forward, "__wrapped__")
    return forward if own else None


# Maps each class whose forward a fused layer replaces to the forward at import; None: another module had replaced it.
_FORWARDS = {
    kind: _own_forward(kind)
    for kind in (nn.Linear, nn.Embedding, nn.Dropout, nn.Identity, *PACKED, Conv1D, *FOUR_BIT)
    if isinstance(kind, type)
}

# The result of the checks of one adapter: the reason not to fuse the adapter (or None), its lora_A, and its lora_B.
Adapter = tuple[Optional[str], Optional[Tensor], Optional[Tensor]]
Pairs = list[tuple[Tensor, Tensor]]


# --- which tensors count as plain -------------------------------------------------------------------------------------


@contextmanager
def accepting(kind: type) -> Iterator[None]:
    """Lets the fused layers accept tensors of the class ``kind`` within the context, such as the fake tensors of the
    memory estimate."""
    global _plain
    before, _plain = _plain, (*_plain, kind)
    try:
        yield
    finally:
        _plain = before


@contextmanager
def as_in_forward(model: nn.Module) -> Iterator[None]:
    """Within the context, the checks treat a sharded parameter as whole if FSDP2, or ZeRO-3 for a leaf module, gathers
    the parameter in the forward of ``model``."""
    global _gathered
    before, _gathered = _gathered, frozenset(_gathered_ids(model))
    try:
        yield
    finally:
        _gathered = before


def _gathered_ids(model: nn.Module) -> Iterator[int]:
    for module in model.modules():
        if getattr(module, "_z3_leaf", False):  # DeepSpeed's set_z3_leaf_modules sets `_z3_leaf`
            yield from (id(parameter) for parameter in module.parameters() if hasattr(parameter, "ds_id"))
        if not is_fully_sharded(type(module)):
            continue
        state = module._get_fsdp_state()
        # Before torch 2.13, FSDP2's state has at most one group of parameters, in `_fsdp_param_group`.
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [getattr(state, "_fsdp_param_group", None)] if groups is None else groups:
            for parameter in getattr(group, "fsdp_params", ()):
                if not parameter.is_dtensor:  # a parameter under tensor parallelism stays a DTensor when gathered
                    yield id(parameter.sharded_param)
                    owner = parameter._module_info  # the module may have got another parameter since fully_shard
                    yield id(owner.module._parameters.get(owner.param_name))


def _is_shard(parameter: Any) -> bool:
    return (is_dtensor(parameter) and id(parameter) not in _gathered) or is_partitioned(parameter)


def is_partitioned(parameter: Any) -> bool:
    """Returns whether ZeRO-3 has partitioned ``parameter`` and does not hold the whole parameter while a fused layer
    runs.

    ZeRO-3 gathers a parameter for the module that owns the parameter, or for a leaf module (``set_z3_leaf_modules``)
    around the owner. Only parameters of a leaf module stay gathered through the forward of an adapter layer.
    """
    if not hasattr(parameter, "ds_id") or id(parameter) in _gathered:
        return False
    status = getattr(getattr(parameter, "ds_status", None), "name", None)
    is_whole = status == "AVAILABLE" and not is_zero3_shard(parameter)
    return not (is_whole and hasattr(parameter, "ds_z3_leaf_module"))


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Returns the shape of a parameter; for a parameter that ZeRO-3 has partitioned, the shape of the whole
    parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape) if hasattr(parameter, "ds_id") else parameter.shape)


# --- an input, a tensor, a module -------------------------------------------------------------------------------------


def plain_types() -> tuple[type, ...]:
    """Returns the classes that the fused layers accept as plain tensors, by exact type."""
    return _plain


def accepts_input(x: Any) -> bool:
    """Returns whether x is a tensor that the operators accept: plain, dense, and float32, bfloat16 or float16.

    The operators work under torch.compile, so the result may be True while torch.compile traces. ``accepts_input``
    returns False under torch.func's transforms, forward-mode differentiation, torch.jit.trace and torch.export (where x
    is a fake tensor), so that the call takes the stock path.
    """
    if type(x) not in _plain or x.dtype not in DTYPES or x.layout is not torch.strided or x.is_nested:
        return False
    return torch.compiler.is_compiling() or not (under_a_transform() or torch._C._is_tracing())


def tensor_reason(name: str, tensor: Optional[Tensor], dim: int = 2) -> Optional[str]:
    """Returns why the operators can't read the parameter ``tensor``; None if they can. The returned text calls the
    parameter ``name``."""
    # A DTensor and a quantized subclass are not plain. FSDP puts None in place of a parameter that FSDP removes.
    if type(tensor) not in _plain and id(tensor) not in _gathered:
        return f"{name} is a {type(tensor).__name__}, wanted a plain parameter"
    shape = whole_shape(tensor)
    if is_partitioned(tensor) or len(shape) == 1 < dim:  # FSDP1 flattens the parameters that it shards
        return f"{name} is a shard (FSDP, ZeRO-3 or tensor parallelism)"
    if len(shape) != dim:
        return f"{name} is {list(shape)}, wanted {dim} dimension{'s' * (dim > 1)}"
    if tensor.is_meta or tensor.layout is not torch.strided:
        return f"{name} is on {tensor.device} with layout {tensor.layout}"
    return None


def kernel_reason(op: str, device: str) -> Optional[str]:
    """Returns why layers on ``device`` must not run the public operator ``op``; None if they may. A reason is that
    native kernels are not loaded, or that the kernels did not pass the comparison with the reference."""
    if KERNELS[op].get(device):
        return proved(device, *PUBLIC[op])
    if device == "cuda" and not STATE.cuda_loaded:
        return f"it is on a GPU, and the CUDA library is not loaded ({STATE.cuda_error})"
    return f"no native kernels of {op} for {device} tensors are loaded"


def own_forward(kind: type) -> Any:
    """Returns the forward that the class ``kind`` had at import; None if ``kind`` is not in ``_FORWARDS``, or if its
    forward was replaced before or after the import of peft_ext."""
    known = _FORWARDS.get(kind)
    return known if kind.forward is known else None


def hooked(module: nn.Module) -> bool:
    """Returns whether ``module`` has hooks, or a forward that was replaced on the instance or, for a class in
    ``_FORWARDS``, on the class."""
    kind = type(module)
    return bool(
        kind.forward is not _FORWARDS.get(kind, kind.forward)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (module.__dict__.get("forward") is not None and replaced_on_instance(module))
    )


# --- a layer and its base ---------------------------------------------------------------------------------------------


def replaced_on_instance(module: nn.Module) -> bool:
    """Returns whether the instance ``module`` has a forward that is not its class's forward.

    The class's forward, bound to the module and stored on the module (as removed hooks leave it), does not count.
    """
    own = module.__dict__.get("forward")
    return own is not None and not (
        getattr(own, "__self__", None) is module and getattr(own, "__func__", None) is type(module).forward
    )


def layer_reason(layer: Any) -> Optional[str]:
    """Returns why the next call of an adapter layer can't be fused: the forward of the layer or of its class was
    replaced, or adapters are disabled or merged. Returns None otherwise."""
    if layer.__dict__.get("forward") is not None and replaced_on_instance(layer):
        return "its forward was replaced on the instance (accelerate's device hooks do that)"
    kind = type(layer)
    if kind.stock_class.forward is not kind.stock_forward:
        return "its class's forward was replaced"
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        error = getattr(layer._modules.get("base_layer"), "merge_error", None)
        moved = "" if error is None else f", and requantizing moved its weight by {error:.2%}"
        return f"merged: the base layer alone runs{moved}"
    return None


def base_reason(layer: Any) -> Optional[str]:
    """Returns why the base layer's own forward has to run; None if the operator can compute the base layer too."""
    base = layer._modules["base_layer"]
    if hooked(base):
        return "hooks on base_layer, or its replaced forward, would not run"
    if bool(layer.__dict__.get("fan_in_fan_out")) is not (type(base) is Conv1D):
        return f"fan_in_fan_out is {layer.__dict__.get('fan_in_fan_out')} over a {class_name(type(base))}"
    return weight_reason(base)


def alone_reason(layer: Any) -> Optional[str]:
    """Returns why the adapter's part can't be fused if the base layer's own forward runs; None if it can be fused."""
    base = layer._modules["base_layer"]
    for name, parameter in base._parameters.items():
        # A base layer on which fully_shard itself was called gathers its parameters when the base layer is called.
        if _is_shard(parameter) and not is_fully_sharded(type(base)):
            return f"base_layer.{name} is a shard (FSDP, ZeRO-3 or tensor parallelism)"
        if parameter is not None and parameter.is_meta:
            return f"base_layer.{name} is on meta"
    if isinstance(base, PackedLinear):
        return None
    weight = base._parameters.get("weight")
    if weight is None:
        return "its base layer has no weight of its own"
    shape = whole_shape(weight)
    return None if len(shape) == 2 else f"base_layer.weight is {shape}, wanted 2 dimensions"


def _is_falcons(kind: type) -> bool:
    """Returns whether ``kind`` is FalconLinear, which computes x @ W.T + b. Autocast treats x @ W.T + b as two
    operations."""
    return kind.__name__ == "FalconLinear" and kind.__module__ == "transformers.models.falcon.modeling_falcon"


def weight_reason(base: nn.Module) -> Optional[str]:
    """Returns why the operators can't read the weight of the layer ``base``; None if they can. The operators read the
    weights of Linear, FalconLinear, Conv1D, NF4Linear, PackedLinear, Linear4bit and the layers in :mod:`.foreign`."""
    kind = type(base)
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if is_partitioned(bias):
        return "its bias is a shard (FSDP, ZeRO-3 or tensor parallelism)"
    if issubclass(kind, Float8Linear):
        return "Float8Linear runs its own forward"
    if issubclass(kind, PackedLinear):
        for tensor in (base.weight, *base._buffers.values()):
            if reason := tensor_reason("its weight", tensor, dim=len(whole_shape(tensor))):
                return reason
        if base.weight.requires_grad:
            return "its base weight requires grad"
        return proved(base.weight.device.type, family_of(base.format.name))
    if kind in FOUR_BIT:
        if is_partitioned(weight):
            return "its weight is a shard (FSDP, ZeRO-3 or tensor parallelism)"
        # Pickling and fully_shard can replace a Params4bit by a plain nn.Parameter.
        if type(weight) not in (Params4bit, nn.Parameter) and id(weight) not in _gathered:
            return f"its weight is a {type(weight).__name__}, wanted bitsandbytes' Params4bit"
        # PEFT's merge in inference mode makes an inference tensor. Autograd can't save an inference tensor for the
        # operator's backward. bitsandbytes keeps the weight outside of autograd, so the stock path works.
        if not torch.compiler.is_compiling() and weight.is_inference() and torch.is_grad_enabled():
            return "its weight was made in inference mode, and autograd can't keep it"
        quant_state = quant_state_of(base)
        if reason := why_not_nf4(quant_state, ("nf4", "fp4")) or _table_reason(quant_state):
            return reason
        # absmax is a plain tensor, whose attributes are faster to read than those of the weight, a tensor subclass.
        absmax = quant_state.absmax
        if absmax.is_meta or tuple(quant_state.shape) != (base.out_features, base.in_features):
            return f"its weight is {tuple(quant_state.shape)} on {absmax.device}, wanted [N, K] in memory"
        cast = autocast_dtype(absmax)
        if cast is not None and base.compute_type_is_set and base.compute_dtype not in (cast, None):
            return f"autocast computes in {short(cast)}, the layer's compute_dtype is {short(base.compute_dtype)}"
        return None
    if is_foreign(kind):
        return foreign_reason(base)
    is_falcons = kind not in LINEAR and kind is not NF4Linear and _is_falcons(kind)
    if kind not in LINEAR and kind is not NF4Linear and kind is not Conv1D and not is_falcons:
        return f"its base layer is a {class_name(kind)}, wanted Linear, Conv1D, NF4Linear, PackedLinear or Linear4bit"
    if "bias" not in base._parameters:
        return "its bias is no parameter of its own (torch.nn.utils.prune and parametrize make it of others)"
    if reason := tensor_reason("its weight", weight):
        return reason
    if weight.requires_grad:
        return "its base weight requires grad"
    if kind is not NF4Linear and weight.dtype not in DTYPES:
        return f"its weight is {short(weight.dtype)}, wanted float32, bfloat16 or float16"
    if is_falcons and bias is not None:
        cast = autocast_dtype(weight)
        if cast not in (None, bias.dtype):
            return f"autocast multiplies in {short(cast)}, and the bias is added apart, in {short(bias.dtype)}"
    return None


def _table_reason(state: Any) -> Optional[str]:
    """Returns why the operators can't decode a weight with bitsandbytes' quant_state ``state``, or None. The operators
    decode with their own tables of codes of NF4 and FP4, so the state's table has to be equal to the operators' table.
    The values of a table that was found equal are not read again while the table lives."""
    code, kind = state.code, state.quant_type
    # torch.compile can't read the values of a table while it traces, so `accelerate` reads a model's tables earlier.
    if not torch.compiler.is_compiling():
        known = _TABLES.get(id(code))
        if type(code) is not Tensor or (known is not None and known[0]() is code and known[1] == kind):
            return None
        if _IS_TABLE[kind](code):
            key = id(code)
            _TABLES[key] = weakref.ref(code, lambda _: _TABLES.pop(key, None)), kind
            return None
        _foreign_tables.add(kind)
    return f"its table of codes is not {kind.upper()}'s" if kind in _foreign_tables else None


def linear_reason(layer: nn.Linear, dtype: torch.dtype) -> Optional[str]:
    """Returns why PyTorch's own product runs in calls of ``layer`` that compute in ``dtype``; else None."""
    if dtype not in WIDENED:
        return f"PyTorch's product of {short(dtype)} is as fast here"
    return product_reason(layer)


def product_reason(layer: nn.Linear) -> Optional[str]:
    """Returns why frozen_linear can't compute a linear layer without an adapter; None if it can."""
    if replaced_on_instance(layer):
        return "its forward was replaced on the instance (accelerate's device hooks do that)"
    if reason := weight_reason(layer):
        return reason
    device = layer._parameters["weight"].device.type
    return kernel_reason("frozen_linear", "cpu") if device == "cpu" else f"it is on {device}"


# --- LoRA, DoRA, AdaLoRA ----------------------------------------------------------------------------------------------


def variant_name(variant: Any) -> str:
    """Returns the common name of a variant of LoRA, such as "DoRA" for PEFT's DoraLinearVariant."""
    name = type(variant).__name__
    return _VARIANTS.get(re.sub(r"(Linear|NF4|Conv\dd|Embedding)Variant$", "", name), f"LoRA variant {name}")


def checked_adapters(
    layer: Any, names: list[str], several: bool, check: Optional[Callable[[Any, str, bool], Adapter]] = None
) -> tuple[Optional[str], Pairs]:
    """Returns the reason not to fuse the adapters ``names`` (None: they can be fused), and each pair (lora_A, lora_B).

    ``checked_adapters`` does not look at the base layer. ``check`` checks one adapter; by default
    ``layer.checked_adapter``, which is :func:`lora_adapter` or :func:`adalora_adapter`, depending on the method.
    """
    if not names:
        return "no active adapter on this layer", []
    if any_global_hook():
        return "global hooks of torch.nn would not run", []
    dropouts = layer._modules["lora_dropout"]._modules
    pairs: Pairs = []
    for name in names:
        reason, a, b = layer.checked_adapter(name, several) if check is None else check(layer, name, several)
        if reason:
            return reason, []
        dropout = dropouts[name]
        if hooked(dropout):
            return _HOOKS, []
        if type(dropout) is nn.Dropout:
            if dropout.training and (dropout.p >= 1.0 or dropout.inplace):
                return f"{dropout} is not fused", []
            if several and dropout.training and dropout.p > 0.0:
                return "several adapters draw a dropout mask each", []
        elif type(dropout) is not nn.Identity:
            return f"lora_dropout is a {type(dropout).__name__}, wanted nn.Dropout or nn.Identity", []
        if reason := tensor_reason("lora_A", a) or tensor_reason("lora_B", b):
            return reason, []
        if a.dtype is not b.dtype or a.dtype not in DTYPES:
            return f"lora_A is {short(a.dtype)}, lora_B {short(b.dtype)}, wanted both float32, bfloat16 or float16", []
        pairs.append((a, b))
        like = pairs[0][0]
        if a.dtype is not like.dtype or a.device != like.device:
            return f"several adapters: {short(like.dtype)} on {like.device}, {short(a.dtype)} on {a.device}", []
        if reason := scaling_reason(layer.scaling[name], a):
            return reason, []
    if not layer.cast_input_dtype_enabled:
        return "PEFT's cast of the input is switched off (cast_input_dtype_enabled)", []
    return None, pairs


def lora_adapter(layer: Any, name: str, several: bool) -> Adapter:
    """Returns the reason not to fuse a LoRA or DoRA adapter (None: it can be fused), its lora_A and its lora_B."""
    modules = layer._modules
    if (variant := layer.lora_variant.get(name)) is not None:
        if not dora.VARIANTS and variant_name(variant) == "DoRA":
            return f"DoRA is not fused: {version('peft')} is not as peft_ext knows it", None, None
        if type(variant) not in dora.VARIANTS:
            return f"{variant_name(variant)} is not fused yet", None, None
        if several:
            return "DoRA beside another active adapter is not fused", None, None
        if isinstance(layer.scaling[name], Tensor):
            return "DoRA whose scaling is a tensor is not fused", None, None
        if reason := _magnitude_reason(modules["lora_magnitude_vector"]._modules[name]):
            return reason, None, None
    lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
        names = f"lora_A is a {type(lora_A).__name__}, lora_B a {type(lora_B).__name__}"
        return f"{names}, wanted plain nn.Linear", None, None
    if hooked(lora_A) or hooked(lora_B):
        is_zero = hasattr(lora_A._parameters.get("weight"), "ds_id")
        return (_ZERO if is_zero else _HOOKS), None, None
    a, b = lora_A._parameters, lora_B._parameters
    if a.get("bias") is not None:
        return "lora_A has a bias", None, None
    if (bias := b.get("bias")) is not None:
        if variant is not None:
            return "DoRA with a bias of lora_B is not fused", None, None
        if reason := tensor_reason("lora_B's bias", bias, dim=1):
            return reason, None, None
    return None, a.get("weight"), b.get("weight")


def adalora_adapter(layer: Any, name: str, several: bool) -> Adapter:
    """Returns the reason not to fuse an AdaLoRA adapter (None: it can be fused), its lora_A and its lora_B."""
    (lora_A, lora_B), modules = layer.pair(name), layer._modules
    lora_E, ranknum = modules["lora_E"]._parameters.get(name), modules["ranknum"]._parameters.get(name)
    reason = tensor_reason("lora_E", lora_E) or tensor_reason("ranknum", ranknum, dim=1)
    if reason is None and lora_A is not None and lora_E.dtype is not lora_A.dtype:
        reason = f"lora_E is {short(lora_E.dtype)}, lora_A {short(lora_A.dtype)}"
    if reason is None and whole_shape(lora_E)[0] == 0:
        reason = "it has rank 0"
    return reason, lora_A, lora_B


def scaling_reason(scaling: Any, like: Tensor) -> Optional[str]:
    """Returns why the operators can't use an adapter's scaling; None if they can. ``like``: the adapter's lora_A, whose
    device a scaling that is a tensor must have."""
    # PEFT's hotswap makes the scaling a tensor of one element.
    if type(scaling) is Tensor and scaling.numel() == 1 and scaling.device == like.device:
        return "scaling is a tensor that requires grad" if scaling.requires_grad else None
    # Not math.isfinite: torch.compile can't trace math.isfinite once the scaling has changed.
    if not isinstance(scaling, (float, int)) or isinstance(scaling, bool) or not -math.inf < scaling < math.inf:
        return f"scaling is {type(scaling).__name__}, wanted a finite number"
    return None


def _magnitude_reason(module: nn.Module) -> Optional[str]:
    if type(module) is not dora.DoraLinearLayer:
        return f"lora_magnitude_vector is a {type(module).__name__}, wanted DoraLinearLayer"
    return magnitude_reason(module, dim=1)


def magnitude_reason(module: Any, *, dim: int) -> Optional[str]:
    """Returns why a module with DoRA's magnitude can't be fused; None if it can.

    ``dim``: the number of dimensions that the magnitude must have.
    """
    if hooked(module):
        return "hooks on lora_magnitude_vector would not run"
    magnitude = module._parameters.get("weight")
    if reason := tensor_reason("lora_magnitude_vector", magnitude, dim=dim):
        return reason
    if magnitude.dtype not in DTYPES:
        return f"lora_magnitude_vector is {short(magnitude.dtype)}, wanted float32, bfloat16 or float16"
    return None


# --- (IA)³ ------------------------------------------------------------------------------------------------------------


def checked_vectors(layer: Any) -> tuple[Optional[str], list[Tensor]]:
    """Returns the reason not to fuse the active (IA)³ adapters (None: they can be fused), and their ia3_l."""
    held, vectors = layer._modules["ia3_l"], []
    for name in active_in(layer, held):
        vector = held._parameters.get(name)
        if reason := tensor_reason("ia3_l", vector):
            return reason, []
        if vector.dtype not in DTYPES:
            return f"ia3_l is {short(vector.dtype)}, wanted float32, bfloat16 or float16", []
        vectors.append(vector)
        like = vectors[0]
        if vector.dtype is not like.dtype or vector.device != like.device:
            there = f"{short(vector.dtype)} on {vector.device}"
            return f"several active adapters: {short(like.dtype)} on {like.device}, {there}", []
    if not vectors:
        return "no active adapter on this layer", []
    if any_global_hook():
        return "global hooks of torch.nn would not run", []
    return None, vectors


# --- an engine that frees parameters ----------------------------------------------------------------------------------


def freed_reason(layer: nn.Module) -> Optional[str]:
    """Returns which engine (FSDP or ZeRO-3) frees the parameters of ``layer`` after a forward; None if no engine does.

    Logits can't be computed from a head after its parameters were freed.
    """
    if any(hasattr(parameter, "ds_id") for parameter in layer.parameters()):
        return "ZeRO-3 frees its weight after the forward"
    if not getattr(layer, "_is_fsdp_managed_module", False):  # FSDP1 and FSDP2 set _is_fsdp_managed_module
        return None
    held = {id(parameter) for parameter in layer.parameters()}
    wrapped, is_held = _fully_sharded(), False
    for module, state in wrapped:
        # Before torch 2.13, FSDP2's state has at most one group of parameters, in `_fsdp_param_group`.
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [getattr(state, "_fsdp_param_group", None)] if groups is None else groups:
            for parameter in getattr(group, "fsdp_params", ()):
                seen = parameter.sharded_param, getattr(parameter, "_unsharded_param", None)
                if held.isdisjoint(map(id, seen)):
                    continue
                is_held = True
                if group.post_forward_mesh_info is not None and not _will_be_root(module, state, wrapped):
                    return "FSDP2 frees its weight after the forward (reshard_after_forward)"
    if is_held or any(layer in module.modules() for module, _ in wrapped):
        return None
    return "FSDP1 flattens its weight, and frees it after the forward"


def _fully_sharded() -> list[tuple[nn.Module, Any]]:
    """Returns a pair (module, state) for each fully sharded module, without importing torch.distributed."""
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    return [(module, state()) for module, state in list(states.items()) if is_fully_sharded(type(module))]


def _will_be_root(module: nn.Module, state: Any, wrapped: list[tuple[nn.Module, Any]]) -> bool:
    """Returns whether ``module`` will be FSDP2's root in the first forward. By default, FSDP2's root keeps its gathered
    parameters after the forward."""
    if state._is_root is not None or not getattr(state, "_auto_reshard_after_forward", False):
        return False
    return not any(module in other.modules() for other, _ in wrapped if other is not module)
