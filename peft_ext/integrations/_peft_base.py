"""What the fused layers of every method share: the frozen weight under them, the calls they take, the NF4 merge.

A fused class is a subclass of PEFT's or bitsandbytes' that adds no state: ``_stock_reason`` says why the next call has
to take the stock path, ``_fused`` computes it on the op. :mod:`.peft` swaps the classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from .. import _cpu, ops
from .._imports import optional, version
from .._native import STATE
from ..nn import NF4Linear
from ..nn.nf4 import is_dtensor, requantized
from ..ops.checks import autocast_dtype
from ..ops.library import has_kernel
from ..weight import NF4Weight
from .bitsandbytes import nf4_from_params4bit, why_not_nf4

check_adapters_to_merge = Linear4bit = Linear8bitLt = Params4bit = Conv1D = None
with optional("peft", "an adapter over an NF4Linear can't be merged"):
    from peft.tuners.tuners_utils import check_adapters_to_merge
with optional("bitsandbytes", "no layer over a Linear8bitLt is fused"):
    from bitsandbytes.nn import Linear8bitLt
with optional("bitsandbytes", "Linear4bit, and an adapter's layer over one, is not fused"):
    from bitsandbytes.nn import Linear4bit, Params4bit
with optional("transformers", "no layer over a Conv1D (GPT-2) is fused"):
    from transformers.pytorch_utils import Conv1D

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What the fused layers take for a tensor, by exact type.
_plain: tuple[type, ...] = (nn.Parameter, Tensor)


@contextmanager
def taking(kind: type) -> Iterator[None]:
    """Within it the fused layers take tensors of this subclass as well: fake ones, where a step is estimated."""
    global _plain
    before, _plain = _plain, (*_plain, kind)
    try:
        yield
    finally:
        _plain = before


# Shards that fully_shard gathers into plain parameters by the time a fused layer sees them: by id.
_gathered: frozenset[int] = frozenset()


@contextmanager
def as_in_forward(model: nn.Module) -> Iterator[None]:
    """Within it a layer's reasons are those of a call within ``model``'s: FSDP2's shards count as what it gathers."""
    global _gathered
    before, _gathered = _gathered, frozenset(_gathers(model))
    try:
        yield
    finally:
        _gathered = before


def _gathers(model: nn.Module) -> Iterator[int]:
    for module in model.modules():
        if not is_fully_sharded(type(module)):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # one or none before torch 2.13
        for group in [getattr(state, "_fsdp_param_group", None)] if groups is None else groups:
            for parameter in getattr(group, "fsdp_params", ()):
                if not parameter.is_dtensor:  # under tensor parallelism too, which is what is left after gathering
                    yield id(parameter.sharded_param)


def is_fully_sharded(kind: type) -> bool:
    """Whether fully_shard wrapped modules of this class themselves, told without importing torch.distributed."""
    return hasattr(kind, "_get_fsdp_state")


def _is_shard(parameter: Any) -> bool:
    return (is_dtensor(parameter) and id(parameter) not in _gathered) or hasattr(parameter, "ds_id")


# The operators that a layer on one of the public ops calls, in its forward and backward.
_CALLED = {
    "bottleneck_adapter": ("bottleneck_adapter", "bottleneck_adapter_backward"),
    "grouped_lora_linear": ("grouped_lora_linear", "lora_linear_backward"),
    "lora_linear": ("lora_linear", "lora_linear_backward"),
    "lora_residual": ("lora_residual", "lora_residual_backward"),
    "frozen_linear": ("nf4_linear", "nf4_linear_backward"),
    "nf4_linear": ("nf4_linear", "nf4_linear_backward"),
    "dora_linear": ("dora_linear", "dora_linear_backward", "dora_weight_norm"),
    "ia3_linear": ("ia3_linear", "ia3_linear_backward"),
    "ia3_scale": ("ia3_scale", "ia3_scale_backward"),
}


def native_kernels() -> dict[str, dict[str, bool]]:
    """By public op, by device: whether all that it calls has a kernel of the library that is loaded."""
    return {
        op: {key.lower(): all(has_kernel(name, key) for name in called) for key in ("CPU", "CUDA")}
        for op, called in _CALLED.items()
    }


# Without them an op runs the reference, which is slower than PEFT.
KERNELS = native_kernels()

# The dtypes in which a frozen linear without an adapter is put on an op as well: PyTorch has no product of them here.
WIDENED = _cpu.widened_dtypes()

# Where a layer merged into an NF4 weight keeps what unmerge puts back: an attribute, no part of the state dict.
KEPT = "_peft_ext_unmerged"

# Fused class by stock class, and the way back.
FUSED: dict[type, type] = {}
STOCK: dict[type, type] = {}


def fuses(stock: type) -> Callable[[type], type]:
    """Register a class as the fused subclass of ``stock``, under the same ``__name__``.

    PEFT, accelerate and ``repr`` look at the class's ``__name__`` ("Linear4bit"); pickle at ``__qualname__``.
    """

    def register(fused: type) -> type:
        fused.__name__, fused.stock_class = stock.__name__, stock
        FUSED[stock], STOCK[fused] = fused, stock
        return fused

    return register


class Fused:
    """The forward of a fused layer: the op where it computes what the stock class would, else the stock class's own.

    ``_reads`` names what it reads of an instance: accelerate leaves one that lacks any of them as it is, and says so.
    """

    _reads: tuple[str, ...] = ("base_layer", "active_adapters", "_disable_adapters", "merged_adapters")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = None if args or kwargs else self._fused(x)
        return super().forward(x, *args, **kwargs) if y is None else y


# --- why a call takes the stock path ----------------------------------------------------------------------------------


def layer_reason(layer: Any) -> Optional[str]:
    """Why an adapter layer's next call runs no adapter, or another forward than its class's."""
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (accelerate's device hooks do that)"
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        error = getattr(layer._modules.get("base_layer"), "merge_error", None)
        moved = "" if error is None else f", and requantizing moved its weight by {error:.2%}"
        return f"merged: the base layer alone runs{moved}"
    return None


def base_reason(layer: Any) -> Optional[str]:
    """Why the base layer of ``layer`` has to run on its own, and not in the op."""
    base = layer._modules["base_layer"]
    if hooked(base):
        return "hooks on base_layer would not run"
    if bool(layer.__dict__.get("fan_in_fan_out")) is not (type(base) is Conv1D):
        return f"fan_in_fan_out is {layer.__dict__.get('fan_in_fan_out')} over a {class_name(type(base))}"
    return weight_reason(base)


def alone_reason(layer: Any) -> Optional[str]:
    """Why the base layer of ``layer``, which has to run on its own, may not return what the op takes."""
    base = layer._modules["base_layer"]
    for name, parameter in base._parameters.items():
        # What fully_shard wrapped by itself gathers its parameters as it is called.
        if _is_shard(parameter) and not is_fully_sharded(type(base)):
            return f"base_layer.{name} is a shard (FSDP, ZeRO-3 or tensor parallelism)"
        if parameter is not None and parameter.is_meta:
            return f"base_layer.{name} is on meta"
    weight = base._parameters.get("weight")
    if weight is None:
        return "its base layer has no weight of its own"
    return None if weight.dim() == 2 else f"base_layer.weight is {tuple(weight.shape)}, wanted 2 dimensions"


def _is_linear(kind: type) -> bool:
    """nn.Linear, and what computes the same: it on an op, and Falcon's x @ W.T + b."""
    if kind in (nn.Linear, FusedLinear):
        return True
    return kind.__name__ == "FalconLinear" and kind.__module__ == "transformers.models.falcon.modeling_falcon"


def weight_reason(base: nn.Module) -> Optional[str]:
    """Why the weight of ``base``, a Linear, Conv1D, NF4Linear or Linear4bit, can't be read by the ops as it lies."""
    kind = type(base)
    weight = base._parameters.get("weight")
    if kind in FOUR_BIT:
        # pickle and fully_shard make the one into the other
        if type(weight) not in (Params4bit, nn.Parameter) and id(weight) not in _gathered:
            return f"its weight is a {type(weight).__name__}, wanted bitsandbytes' Params4bit"
        quant_state = quant_state_of(base)
        if reason := why_not_nf4(quant_state):
            return reason
        absmax = quant_state.absmax  # on the weight's device, and no tensor subclass, whose attributes are slow to read
        if absmax.is_meta or tuple(quant_state.shape) != (base.out_features, base.in_features):
            return f"its weight is {tuple(quant_state.shape)} on {absmax.device}, wanted [N, K] in memory"
        cast = autocast_dtype(absmax)
        if cast is not None and base.compute_type_is_set and base.compute_dtype not in (cast, None):
            return f"autocast computes in {short(cast)}, the layer's compute_dtype is {short(base.compute_dtype)}"
        return None
    if kind is not NF4Linear and kind is not Conv1D and not _is_linear(kind):
        return f"its base layer is a {class_name(kind)}, wanted Linear, Conv1D, NF4Linear or Linear4bit"
    if reason := tensor_reason("its weight", weight):
        return reason
    if weight.requires_grad:
        return "its base weight requires grad"
    if kind is not NF4Linear and weight.dtype not in DTYPES:
        return f"its weight is {short(weight.dtype)}, wanted float32, bfloat16 or float16"
    return None


def tensor_reason(name: str, tensor: Optional[Tensor], dim: int = 2) -> Optional[str]:
    # a DTensor, a quantized subclass, or taken out of the module by FSDP
    if type(tensor) not in _plain and id(tensor) not in _gathered:
        return f"{name} is a {type(tensor).__name__}, wanted a plain parameter"
    if tensor.dim() != dim or hasattr(tensor, "ds_id"):
        return f"{name} is a shard (FSDP, ZeRO-3 or tensor parallelism)"
    if tensor.is_meta or tensor.layout is not torch.strided:
        return f"{name} is on {tensor.device} with layout {tensor.layout}"
    return None


def kernel_reason(op: str, device: str) -> Optional[str]:
    if KERNELS[op].get(device):
        return None
    if device == "cuda" and not STATE.cuda_loaded:
        why = STATE.cuda_error or "torch is a CPU build"
        return f"it is on a GPU, and the CUDA library is not loaded ({why})"
    return f"no native kernels of {op} for {device} tensors are loaded"


def hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def class_name(kind: type) -> str:
    return STOCK.get(kind, kind).__name__


# --- what the ops take ------------------------------------------------------------------------------------------------


def takes(x: Any) -> bool:
    """Whether x is a tensor that the ops take: plain, dense, of a float dtype with kernels; no transform under way.

    The ops know torch.compile. torch.func's transforms, torch.jit.trace and torch.export, whose x is a fake tensor,
    see PEFT's own path.
    """
    if type(x) not in _plain or x.dtype not in DTYPES or x.layout is not torch.strided or x.is_nested:
        return False
    return torch.compiler.is_compiling() or not (torch.jit.is_tracing() or torch._C._are_functorch_transforms_active())


def enter(
    base: nn.Module, x: Tensor, seen: Optional[torch.dtype] = None
) -> Optional[tuple[Tensor, Union[Tensor, NF4Weight], Optional[Tensor], torch.dtype]]:
    """x, weight and bias as the base layer's forward hands them on, and the dtype that this forward returns.

    None where its own forward has to run, which raises PyTorch's error or gives a sum a dtype of its own. ``seen`` is
    the dtype in which PEFT hands x to the base layer, x's own by default.
    """
    kind, bias, cast = type(base), base._parameters["bias"], autocast_dtype(x)
    if kind is not NF4Linear and kind not in FOUR_BIT:
        weight = base._parameters["weight"]
        weight = weight.t() if kind is Conv1D else weight
        if cast is None and not (weight.dtype is x.dtype and (bias is None or bias.dtype is x.dtype)):
            return None  # as in F.linear, an error
        return x, weight, bias, cast or x.dtype
    if kind is NF4Linear:
        return x, base.nf4, bias if bias is None else bias.to(x.dtype), cast or x.dtype
    seen = seen or x.dtype
    if cast not in (None, seen) and seen is not torch.float32:
        return None  # float16 plus bfloat16 under autocast: PEFT's sum has a dtype of its own
    entered = enter_4bit(base, x, seen)
    return None if entered is None else (*entered, seen)


def enter_4bit(base: nn.Module, x: Tensor, seen: torch.dtype) -> Optional[tuple[Tensor, NF4Weight, Optional[Tensor]]]:
    """x, weight and bias as ``Linear4bit.forward`` hands them on for an x of dtype ``seen``; None: its own has to run.

    The bias is cast for the call, where bitsandbytes casts the parameter for good.
    """
    if not base.compute_type_is_set:
        base.set_compute_type(x.to(seen))
        base.compute_type_is_set = True
    compute = base.compute_dtype or seen
    if compute not in DTYPES or autocast_dtype(x) not in (None, compute):
        return None
    bias = base._parameters["bias"]
    bias = bias if bias is None else bias.to(compute)
    return x.to(compute), nf4_from_params4bit(base._parameters["weight"], quant_state_of(base)), bias


def sums_wider(base: nn.Module, x: Tensor) -> bool:
    """Whether ``base``, a 4-bit layer, multiplies in fewer bits than PEFT adds the adapter in.

    So it is with float32 activations, as behind ``prepare_model_for_kbit_training``'s norms, over a 16-bit
    compute_dtype. Then the base layer runs on its own, as in PEFT.
    """
    if type(base) not in FOUR_BIT or x.dtype is not torch.float32 or autocast_dtype(x) is not None:
        return False
    # Where the layer has not chosen its type yet, it will take x's.
    return base.compute_type_is_set and base.compute_dtype not in (None, torch.float32)


def quant_state_of(base: nn.Module) -> Any:
    """A ``Linear4bit``'s: the parameter's or, where fully_shard has gathered that into a plain one, the layer's."""
    state = getattr(base._parameters.get("weight"), "quant_state", None)
    return base.__dict__.get("quant_state") if state is None else state


@fuses(nn.Linear)
class FusedLinear(nn.Linear):
    """A frozen ``nn.Linear`` that no adapter's op takes, the head among them, on :func:`peft_ext.ops.frozen_linear`.

    For calls in a dtype of ``WIDENED``; in another one PyTorch's own product runs, and for one token without a
    gradient, which PyTorch multiplies as a vector, without widening W.
    """

    _reads: tuple[str, ...] = ()

    def _stock_reason(self) -> Optional[str]:
        return linear_reason(self, linear_dtype(self))

    def forward(self, x: Tensor) -> Tensor:
        if takes(x) and linear_reason(self, autocast_dtype(x) or x.dtype) is None and enter(self, x) is not None:
            if x.numel() != self.in_features or (torch.is_grad_enabled() and x.requires_grad):
                return ops.frozen_linear(x, self._parameters["weight"], self._parameters["bias"])
        return super().forward(x)


def linear_dtype(layer: nn.Linear) -> torch.dtype:
    """The dtype that the layer computes in, for an x of its weight's dtype."""
    weight = layer._parameters["weight"]
    return autocast_dtype(weight) or weight.dtype


def linear_reason(layer: nn.Linear, dtype: torch.dtype) -> Optional[str]:
    """Why PyTorch's own product runs in a call of ``layer`` that computes in ``dtype``."""
    if dtype not in WIDENED:
        return f"PyTorch's product of {short(dtype)} is as fast here"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (accelerate's device hooks do that)"
    if reason := weight_reason(layer):
        return reason
    device = layer._parameters["weight"].device.type
    return kernel_reason("frozen_linear", "cpu") if device == "cpu" else f"it is on {device}"


def would_widen(layer: nn.Module) -> bool:
    """Whether accelerate is to make ``layer`` a FusedLinear: a frozen nn.Linear, for some call of which that is faster.

    One of float32 computes in 16 bits under autocast.
    """
    if type(layer) is not nn.Linear:
        return False
    weight = layer._parameters["weight"]
    if weight is None or weight.requires_grad or weight.device.type != "cpu":
        return False
    return weight.dtype in WIDENED or (weight.dtype is torch.float32 and torch.bfloat16 in WIDENED)


def without_adapters(model: nn.Module, seen: Optional[set[int]] = None) -> Iterator[nn.Module]:
    """As ``modules()``, but of an adapter layer the base alone, and nothing that the adapter adds."""
    seen = set() if seen is None else seen
    if id(model) in seen:
        return
    seen.add(id(model))
    yield model
    base = model._modules.get("base_layer")
    for child in model._modules.values() if base is None else [base]:
        if child is not None:
            yield from without_adapters(child, seen)


FOUR_BIT: tuple[type, ...] = ()
# bitsandbytes' classes whose layers are listed by explain, whether or not an adapter is over them.
QUANTIZED = tuple(kind for kind in (Linear4bit, Linear8bitLt) if kind is not None)

if Linear4bit is not None and Params4bit is not None:

    @fuses(Linear4bit)
    class FusedLinear4bit(Linear4bit):
        """bitsandbytes' ``Linear4bit`` over an NF4 weight on :func:`peft_ext.ops.nf4_linear`."""

        _reads = (
            "compute_dtype", "compute_type_is_set", "quant_state", "set_compute_type", "weight.quant_state.absmax",
            "weight.quant_state.blocksize", "weight.quant_state.dtype", "weight.quant_state.nested",
            "weight.quant_state.offset", "weight.quant_state.quant_type", "weight.quant_state.shape",
            "weight.quant_state.state2",
        )  # fmt: skip

        def _stock_reason(self) -> Optional[str]:
            if "forward" in self.__dict__:
                return "its forward was replaced on the instance (accelerate's device hooks do that)"
            return weight_reason(self) or kernel_reason("nf4_linear", quant_state_of(self).absmax.device.type)

        def forward(self, x: Tensor) -> Tensor:
            if self._stock_reason() is None and takes(x) and (entered := enter_4bit(self, x, x.dtype)) is not None:
                return ops.nf4_linear(*entered).to(x.dtype)
            return super().forward(x)

        @property
        def support_avx512bf16_for_cpu(self) -> bool:
            """False: bitsandbytes must not repack the weight in evaluation, whichever path a call takes, NF4 or FP4.

            A repacked weight loses its gradients when it is trained again, and changes in the state dict.
            """
            return False

        @support_avx512bf16_for_cpu.setter
        def support_avx512bf16_for_cpu(self, value: bool) -> None:
            self.__dict__["support_avx512bf16_for_cpu"] = value

    FOUR_BIT = (Linear4bit, FusedLinear4bit)


def is_repacked(base: nn.Module) -> bool:
    """Whether bitsandbytes has repacked the weight of a ``Linear4bit``, in an evaluation on this CPU."""
    return bool(getattr(quant_state_of(base), "packing_format_for_cpu", False))


# --- merging into NF4 -------------------------------------------------------------------------------------------------


class MergesNF4:
    """merge and unmerge of an adapter layer over an NF4Linear; over another base the stock class's own.

    merge requantizes the merged weight with the base's own block size, always from the weight that was kept: one
    rounding, in any order; ``base_layer.merge_error`` says how far that moves it. unmerge puts the kept weight's very
    bits back. A subclass gives ``_merged``: weight and bias after one adapter more, from those before it and the weight
    without any; and ``_factors``, where all adapters are low-rank: lora_A, lora_B and the rows' scale of them together,
    which :func:`peft_ext.ops.nf4_merge` adds in one pass over the codes.
    """

    def _factors(self, names: list[str], nf4: NF4Weight) -> Optional[tuple[Tensor, Tensor, Optional[Tensor]]]:
        return None

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        base = self.get_base_layer()
        if not isinstance(base, NF4Linear):
            return super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if check_adapters_to_merge is None:
            raise RuntimeError(f"merge: {version('peft')} has no peft.tuners.tuners_utils.check_adapters_to_merge")
        held = getattr(self, self.adapter_layer_names[0])
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in held]
        if names:
            _merge_nf4(self, base, names, safe_merge)

    def unmerge(self) -> None:
        base = self.get_base_layer()
        if not self.merged or not isinstance(base, NF4Linear):
            return super().unmerge()
        if KEPT not in self.__dict__:
            raise RuntimeError("the NF4 weight from before the merge is not here: it was merged elsewhere")
        nf4, bias = self.__dict__.pop(KEPT)
        base.set_nf4(nf4.to(base.weight.device))
        if bias is not None:
            base.bias.data = bias.to(base.bias)
        self.merged_adapters.clear()


_MERGE_LOSES = (
    "merging into an NF4 weight rounds the merged weight to 4 bits again; peft_ext.explain(model) says how far that "
    "moves it. peft_ext.dequantize_nf4(model) before merging, or peft-ext merge, keeps it"
)


@torch.no_grad()
def _merge_nf4(layer: Any, base: NF4Linear, names: list[str], safe_merge: bool) -> None:
    nf4, bias = layer.__dict__.get(KEPT, (base.nf4, None if base.bias is None else base.bias.detach().clone()))
    unmerged = nf4.to(base.weight.device)
    together = [*layer.merged_adapters, *names]
    merged_bias = bias
    if (factors := layer._factors(together, unmerged)) is not None:
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
        quantized, error = requantized(merged, nf4)
    base.set_merged(quantized, error)
    if bias is not None:
        base.bias.data = merged_bias.to(base.bias)
    layer.__dict__[KEPT] = (nf4, bias)
    layer.merged_adapters.extend(names)
    warnings.warn(_MERGE_LOSES, stacklevel=3)
