"""LoRA over linear layers that transformers splits between processes (``from_pretrained(..., tp_plan="auto")``).

    column   y_i = x W_iᵀ + s (drop(x) Aᵀ) B_iᵀ + b_i         W_i [N/n, K], A [R, K], B_i [N/n, R]
             backward: the sum over the n processes of dx and of dA
    row      y = Σ_i (x_i W_iᵀ + s (drop(x_i) A_iᵀ) Bᵀ) + b   W_i [N, K/n], A_i [R, K/n], B [N, R]
             forward: the sum over the n processes; backward: the sum of dB

Process i of n holds the shards with the index i, and s is the adapter's scaling. transformers replaces the forward of
each split layer. PEFT splits lora_B of a layer in the style "column" and lora_A of a layer in the style "row" as
transformers splits the base layer. A layer is fused only if its replaced forward is known exactly: the digest of the
code that runs is in ``FORMS``. Each process computes its shard of a layer with one operator. PEFT's own forward sums
the ``[T, R]`` product of x and lora_A over the processes, in addition to the base layer's sums; the fused forward sums
the gradient of A or B instead.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from ...nn.nf4 import is_dtensor
from ...ops.checks import autocast_dtype
from ...ops.lora import checked_lora_linear
from ..forms.digest import Unknown, digest_of
from .base import DTYPES, LINEAR, class_name
from .reasons import (
    Adapter,
    accepts_input,
    any_global_hook,
    checked_adapters,
    kernel_reason,
    own_forward,
    variant_name,
)

MODULE = "transformers.distributed.tensor_parallel"
# Maps the name of each style of transformers' tensor parallelism that the fused forward knows to the digest of its
# code, and to whether the style splits the columns of the output.
FORMS = {"ColwiseParallel": ("3ea21281494b13db1084", True), "RowwiseParallel": ("ca8ea2dbcc3e8b690361", False)}
_METHODS = (
    "should_use_local_tensors", "transform_inputs_pre_forward", "context_around_forward",
    "transform_output_post_forward", "_from_local_last_dim_shard",
)  # fmt: skip
_HOOKS = "hooks on lora_A, lora_B or base_layer would not run"
_digests: dict[tuple, str] = {}


@dataclass(frozen=True)
class Split:
    """How a layer is split over a one-dimensional mesh: by the columns of its output, or by the columns of its
    input."""

    column: bool
    mesh: Any

    @property
    def dim(self) -> int:
        """The index of the split dimension of W, and of lora_B (if ``column``) or else of lora_A."""
        return 0 if self.column else 1


# --- which layers are split -------------------------------------------------------------------------------------------


def is_split(module: nn.Module) -> bool:
    """Returns whether transformers' tensor parallelism replaced the forward of ``module``."""
    return getattr(module.__dict__.get("forward"), "__module__", None) == MODULE


def split_of(module: nn.Module) -> Union[Split, str]:
    """Returns how a linear layer is split, or the reason why the layer's replaced forward has to run. The layer must be
    one for which :func:`is_split` is true."""
    from torch.distributed.tensor import Replicate, Shard

    forward = module.__dict__["forward"]
    if not getattr(forward, "__closure__", None):
        return "transformers' forward is not known"
    cells = {
        name: cell.cell_contents for name, cell in zip(forward.__code__.co_freevars, forward.__closure__, strict=True)
    }
    style, mesh, original = cells.get("self"), cells.get("mesh"), cells.get("original_forward")
    name = type(style).__name__
    try:
        digest, column = FORMS.get(name, ("", True))
        if name not in FORMS or _digest(forward, style) != digest:
            return f"transformers' forward of {name} is not known"
    except Unknown as unknown:
        return f"transformers' forward of {name} is not known: {unknown}"
    layouts = (Replicate(), Shard(-1)) if column else (Shard(-1), Replicate())
    given = {"input_layouts": layouts[0], "output_layouts": layouts[1], "use_local_output": True}
    if vars(style) != given:
        return f"{name} is not fused with {', '.join(f'{key}={value}' for key, value in vars(style).items())}"
    if type(module) not in LINEAR or getattr(original, "__self__", None) is not module:
        return f"{name} is fused over Linear, not over {class_name(type(module))}"
    if original.__func__ is not own_forward(nn.Linear) or getattr(module, "_hf_quantized_needs_local_tp", False):
        return f"{name} is fused over the forward of nn.Linear, not over another forward"
    if mesh.ndim != 1:
        return f"its mesh has {mesh.ndim} dimensions, wanted 1"
    return Split(column, mesh)


def _digest(forward: Any, style: Any) -> str:
    functions = [getattr(type(style), name) for name in _METHODS]
    key = (forward.__code__, *functions)
    if key not in _digests:
        _digests[key] = digest_of([forward, *functions])
    return _digests[key]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _shard_of(module: nn.Module, split: Split) -> Optional[Tensor]:
    """Returns this process's shard of the weight of a split layer; None if the weight is not split in the way that
    ``split`` describes."""
    weight = module._parameters.get("weight")
    if not is_dtensor(weight) or weight.device_mesh != split.mesh or weight.dim() != 2:
        return None
    (placement,) = weight.placements
    return weight.to_local() if placement.is_shard() and placement.dim % 2 == split.dim else None


# --- the checks of a call ---------------------------------------------------------------------------------------------


def checked(layer: Any, names: list[str]) -> tuple[Optional[str], Optional[tuple]]:
    """Returns the reason why PEFT's own forward has to run over a split base layer, and None; or returns None, and a
    tuple of the split, the shards of W, lora_A and lora_B, and the bias of the base layer."""
    base = layer._modules["base_layer"]
    if torch.compiler.is_compiling():
        return "tensor parallelism: torch.compile takes PEFT's own forward", None
    if isinstance(split := split_of(base), str):
        return f"tensor parallelism: {split}", None
    if _has_hooks(base) or any_global_hook():
        return _HOOKS, None
    reason, pairs = checked_adapters(layer, names, len(names) > 1, functools.partial(_adapter, split))
    if reason is not None:
        return reason, None
    weight, bias = _shard_of(base, split), base._parameters.get("bias")
    if weight is None:
        return "tensor parallelism: base_layer.weight is not split as its forward expects", None
    if bias is not None:
        bias = bias.to_local() if is_dtensor(bias) else None
        if bias is None or bias.shape != weight.shape[:1]:
            return "tensor parallelism: base_layer.bias is not split as its forward expects", None
    if any(tensor is not None and tensor.requires_grad for tensor in base._parameters.values()):
        return "its base weight requires grad", None
    (lora_A, lora_B), scaling = pairs[0], layer.scaling[names[0]]
    if isinstance(scaling, Tensor):
        return "tensor parallelism: a scaling that is a tensor is not fused", None
    if weight.dtype not in DTYPES or (bias is not None and bias.dtype is not weight.dtype):
        return "tensor parallelism: the base layer is not float32, bfloat16 or float16", None
    if lora_A.device != weight.device or lora_B.device != weight.device:
        return "tensor parallelism: lora_A and lora_B are not on the device of base_layer", None
    if weight.shape != (lora_B.shape[0], lora_A.shape[1]) or lora_A.shape[0] != lora_B.shape[1]:
        return "tensor parallelism: the shards of lora_A and lora_B do not fit the shard of base_layer", None
    if autocast_dtype(weight) is not None:
        return "tensor parallelism: autocast takes PEFT's own forward", None
    reason = kernel_reason("lora_linear", weight.device.type)
    return reason, None if reason else (split, weight, lora_A, lora_B, bias)


def _adapter(split: Split, layer: Any, name: str, several: bool) -> Adapter:
    """Returns the reason not to fuse one adapter over a split base layer, and the adapter's lora_A and lora_B, of which
    one is this process's shard."""
    if several:
        return "tensor parallelism: several active adapters are not fused", None, None
    if (variant := layer.lora_variant.get(name)) is not None:
        return f"tensor parallelism: {variant_name(variant)} is not fused", None, None
    if not isinstance(layer._modules["lora_A"], nn.ModuleDict):
        return "tensor parallelism: only LoRA is fused", None, None
    lora_A, lora_B = layer._modules["lora_A"]._modules[name], layer._modules["lora_B"]._modules[name]
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
        return "tensor parallelism: lora_A or lora_B is no plain nn.Linear", None, None
    if lora_A._parameters.get("bias") is not None or lora_B._parameters.get("bias") is not None:
        return "tensor parallelism: a bias of lora_B is not fused", None, None
    whole, part = (lora_A, lora_B) if split.column else (lora_B, lora_A)
    if _has_hooks(lora_A) or _has_hooks(lora_B) or "forward" in whole.__dict__:
        return _HOOKS, None, None
    shard = _shard_of(part, split)
    if shard is None or not is_split(part) or split_of(part) != split:
        return "tensor parallelism: PEFT did not split the adapter as transformers split the base layer", None, None
    tensor = whole._parameters.get("weight")
    return (None, tensor, shard) if split.column else (None, shard, tensor)


# --- the forward ------------------------------------------------------------------------------------------------------


class _SumGradient(torch.autograd.Function):
    """The forward returns x. The backward sums the gradient of x over the processes of ``group``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumOutput(torch.autograd.Function):
    """The forward sums y over the processes of ``group``, in place. The backward returns the gradient of y
    unchanged."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        ctx.mark_dirty(y)
        torch.distributed.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sum_gradient(x: Tensor, split: Split) -> Tensor:
    """Returns x; the backward sums the gradient of x over the processes of ``split``."""
    return _SumGradient.apply(x, split.mesh.get_group())


def _fits(x: Tensor, weight: Tensor) -> bool:
    return x.dtype is weight.dtype and x.shape[-1:] == weight.shape[1:] and x.device == weight.device


def forward(layer: Any, x: Tensor, names: list[str]) -> Optional[Tensor]:
    """Returns the output of an adapter layer over a split base layer; None if PEFT's own forward has to run."""
    reason, found = checked(layer, names)
    if reason is not None or not accepts_input(x):
        return None
    split, weight, lora_A, lora_B, bias = found
    if not _fits(x, weight):
        return None
    scaling, p = float(layer.scaling[names[0]]), layer.dropout_p(names[0])
    if split.column:
        x, lora_A = sum_gradient(x, split), sum_gradient(lora_A, split)
        return checked_lora_linear(x, weight, bias, lora_A, lora_B, None, scaling, p)
    y = checked_lora_linear(x, weight, None, lora_A, sum_gradient(lora_B, split), None, scaling, p)
    y = _SumOutput.apply(y, split.mesh.get_group())
    return y if bias is None else y + bias


def joint_state(layer: Any, names: list[str]) -> Optional[tuple]:
    """Returns ``LowRank.joint_state`` of an adapter layer over a split base layer: the state on which the layer's
    output depends, as a tuple that can be compared. Returns None if PEFT's own forward has to run, if the columns of
    the output are not split, or if a parameter is an inference tensor."""
    reason, found = checked(layer, names)
    if reason is not None or not found[0].column:
        return None
    modules, name = layer._modules, names[0]
    owners = modules["base_layer"], modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    held = [tensor for owner in owners for tensor in owner._parameters.values() if tensor is not None]
    if any(tensor.is_inference() for tensor in held):
        return None
    # A change of a DTensor's shard in place counts in the version of the shard, which all views of the shard share.
    shards = [tensor.to_local() if is_dtensor(tensor) else tensor for tensor in held]
    versions = tuple((id(tensor), tensor._version, shard._version) for tensor, shard in zip(held, shards, strict=True))
    return name, layer.scaling[name], layer.dropout_p(name), found[0], versions


def joint_call(layer: Any, x: Tensor, names: list[str]) -> Optional[tuple]:
    """Returns ``LowRank.joint_call`` of an adapter layer over a split base layer, for which :func:`joint_state`
    returned a tuple; None if x does not have the dtype, device and last size of this process's shard of W."""
    split, weight, lora_A, lora_B, bias = checked(layer, names)[1]
    if not _fits(x, weight):
        return None
    scaling, p = layer.scaling[names[0]], layer.dropout_p(names[0])
    return weight, bias, sum_gradient(lora_A, split), lora_B, None, scaling, p, x.dtype
