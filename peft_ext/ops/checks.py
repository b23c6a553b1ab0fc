"""Argument checks that the public operators share. An error message names the operator and the argument, and says which
value was passed and which values are allowed."""

from __future__ import annotations

import sys
from typing import Any, Optional, Union

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..text import dtype_name as _name
from ..weights.nf4 import BLOCKSIZES, FLOATS, NestedAbsmax, NF4Weight
from ..weights.packed import PackedWeight, unpacked

_LARGEST = sys.float_info.max


# The fast paths (the functions fits_*) accept a tensor only if its type is exactly one of _PLAIN. An operand of a
# subclass is checked by the slower functions check_*.
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_OF_KERNELS = frozenset({torch.float32, torch.bfloat16, torch.float16})


def fits_linear(x: Any, weight: Any, bias: Any) -> bool:
    """Fast path of the checks of x, a frozen weight and a bias: returns True for the common eager call.

    fits_linear accepts only calls that run eagerly, outside autocast, on a CPU or a GPU, with plain tensors (the weight
    may be packed) that fit one another and are not float64, and with a weight that gets no gradient. Everything that
    fits_linear accepts is also accepted by check_float, check_linear and check_bias, which take several times as long.
    If fits_linear returns False, the caller calls check_float, check_linear and check_bias, which accept the call or
    raise an error.
    """
    kinds = _PLAIN
    if type(x) not in kinds or torch.compiler.is_compiling():
        return False
    dtype, device = x.dtype, x.device
    if dtype not in _OF_KERNELS or x.layout is not torch.strided or x.is_nested or device.type not in ("cpu", "cuda"):
        return False
    if torch.is_autocast_enabled(device.type):
        return False
    if isinstance(weight, PackedWeight):
        if weight.device != device:
            return False
    elif (
        type(weight) not in kinds or weight.dtype is not dtype or weight.device != device
        or weight.layout is not torch.strided or weight.is_nested or (weight.requires_grad and torch.is_grad_enabled())
    ):  # fmt: skip
        return False
    shape, of_x = weight.shape, x.shape
    if len(shape) != 2 or not of_x or of_x[-1] != shape[1]:
        return False
    if bias is not None and (
        type(bias) not in kinds or bias.dtype is not dtype or bias.device != device
        or bias.layout is not torch.strided or bias.is_nested or bias.shape != shape[:1]
    ):  # fmt: skip
        return False
    return True


def fits_vector(value: Any, x: Tensor) -> bool:
    """Fast path of the checks of a float tensor, such as lora_A, that an operator takes beside x: returns True for a
    plain tensor on x's device.

    fits_vector checks type, dtype, layout and device, and does not check the shape.
    """
    return (
        type(value) in _PLAIN and value.dtype in _OF_KERNELS and value.layout is torch.strided and not value.is_nested
        and value.device == x.device
    )  # fmt: skip


def fits_seed(seed: Any, x: Tensor) -> bool:
    """Fast path of :func:`check_seed`: returns True for a plain int64 tensor ``[2]`` on x's device or on the
    CPU."""
    if type(seed) is not Tensor or seed.dtype is not torch.int64 or seed.layout is not torch.strided:
        return False
    return seed.shape == (2,) and (seed.is_cpu or seed.device == x.device)


def fits_adapted(x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any, scaling: Any, dropout_p: Any) -> bool:
    """Fast path of the checks of a layer with lora_A and lora_B: returns True if no further check is needed.

    The operands must fit as in :func:`fits_linear`, lora_A and lora_B must be plain tensors of fitting shapes, and
    scaling and dropout_p must be floats in range.
    """
    if not fits_linear(x, weight, bias) or not fits_vector(lora_A, x) or not fits_vector(lora_B, x):
        return False
    shape, of_a = weight.shape, lora_A.shape
    if len(of_a) != 2 or of_a[1] != shape[1] or not of_a[0] or lora_B.shape != (shape[0], of_a[0]):
        return False
    if type(scaling) is not float or type(dropout_p) is not float:
        return False
    return -_LARGEST <= scaling <= _LARGEST and 0.0 <= dropout_p < 1.0


def adapted_operands(
    op: str, x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any, scaling: Any, dropout_p: Any, name: str = "x"
) -> tuple[Tensor, Union[Tensor, PackedWeight], Optional[Tensor]]:
    """Checks the operands of a layer with lora_A and lora_B. Returns x, weight and bias; under autocast, x, a dense
    weight and bias are returned in autocast's dtype. Error messages use ``name`` for x."""
    if not fits_adapted(x, weight, lora_A, lora_B, bias, scaling, dropout_p):
        check_float(op, name, x)
        x, weight, bias = cast_for_autocast(x, weight, bias)
        check_linear(op, x, weight, name)
        check_lora(op, weight, lora_A, lora_B)
        check_bias(op, bias, x, weight.shape[0], name)
        check_scale(op, scaling, dropout_p)
    return x, weight, bias


def check_module(op: str, model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{op}: model is {type(model).__name__}, wanted an nn.Module")


def check_float(op: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} is {type(value).__name__}, wanted a Tensor")
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {argument} is {_name(value.dtype)}, wanted one of {', '.join(map(_name, FLOATS))}")
    if value.layout is not torch.strided or value.is_nested:
        came = "is a nested tensor" if value.is_nested else f"has layout {value.layout}"
        raise TypeError(f"{op}: {argument} {came}, wanted torch.strided")


def check_dtype(op: str, dtype: object) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{op}: dtype is {dtype}, wanted one of {', '.join(map(str, FLOATS))}")


def check_count(op: str, argument: str, value: object) -> None:
    """Checks a size: an integer of at least 1 that fits a signed 64-bit integer."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{op}: {argument} is {value!r}, wanted an integer")
    if value < 1:
        raise ValueError(f"{op}: {argument} is {value}, wanted at least 1")
    if value >= 2**63:
        raise ValueError(f"{op}: {argument} is {value}, wanted less than 2**63")


def check_blocksize(op: str, blocksize: int) -> None:
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"{op}: blocksize is {blocksize}, wanted one of {BLOCKSIZES}")


def _check_device(op: str, argument: str, value: Tensor, other: Tensor, name: str = "x") -> None:
    if value.device != other.device:
        raise ValueError(f"{op}: {argument} is on {value.device}, {name} is on {other.device}")


def _has_shape(value: Tensor, *shapes: tuple[int, ...]) -> bool:
    """Returns whether a tensor has one of the shapes.

    The sizes are compared one by one: under torch.compile a symbolic size can equal a number, but a tuple of symbolic
    sizes does not equal a tuple of numbers.
    """
    return any(
        len(shape) == value.dim() and all(a == b for a, b in zip(value.shape, shape, strict=True)) for shape in shapes
    )


def check_vector(
    op: str, argument: str, value: object, x: Tensor, *shapes: tuple[int, ...], name: str = "x"
) -> None:  # fmt: skip
    """Checks that ``value`` is a float tensor of any float dtype, on x's device, with one of ``shapes``. Error messages
    use ``name`` for x."""
    if not torch.compiler.is_compiling() and fits_vector(value, x) and value.shape in shapes:
        return
    check_float(op, argument, value)
    _check_device(op, argument, value, x, name)
    if not _has_shape(value, *shapes):
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{op}: {argument} has shape {tuple(value.shape)}, wanted {wanted}")


def check_bias(op: str, bias: Optional[Tensor], x: Tensor, out_features: int, name: str = "x") -> None:
    """Checks that ``bias`` is None, or ``[N]`` of x's dtype and device. Error messages use ``name`` for x."""
    if bias is None:
        return
    check_vector(op, "bias", bias, x, (out_features,), name=name)
    if bias.dtype != x.dtype:
        raise TypeError(f"{op}: bias is {_name(bias.dtype)}, {name} is {_name(x.dtype)}")


def check_weight(op: str, weight: Union[Tensor, PackedWeight]) -> None:
    """Checks a frozen weight ``[N, K]``, dense or packed."""
    if not isinstance(weight, PackedWeight):
        check_float(op, "weight", weight)
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: weight requires grad, wanted a frozen weight (call weight.requires_grad_(False))")
    if len(weight.shape) != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, wanted [N, K]")


def check_linear(op: str, x: Tensor, weight: Union[Tensor, PackedWeight], name: str = "x") -> None:
    """Checks x ``[..., K]`` against a weight ``[N, K]``, packed or dense of x's dtype. Error messages use ``name`` for
    x."""
    check_float(op, name, x)
    check_weight(op, weight)
    if isinstance(weight, PackedWeight):
        _check_device(op, "weight", weight.parts[0], x, name)
    else:
        _check_device(op, "weight", weight, x, name)
        if weight.dtype != x.dtype:
            raise TypeError(f"{op}: weight is {_name(weight.dtype)}, {name} is {_name(x.dtype)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, wanted [..., {weight.shape[1]}] for weight "
                         f"{tuple(weight.shape)}")  # fmt: skip


def check_lora(op: str, weight: Union[Tensor, PackedWeight], lora_A: Tensor, lora_B: Tensor) -> None:
    """Checks lora_A ``[R, K]`` and lora_B ``[N, R]``, each of its own float dtype, on the weight's device."""
    held = weight.parts[0] if isinstance(weight, PackedWeight) else weight
    check_low_rank(op, tuple(weight.shape), held, "weight", lora_A, lora_B)


def check_low_rank(op: str, shape: tuple[int, int], beside: Tensor, name: str, lora_A: Tensor, lora_B: Tensor) -> None:
    """Checks lora_A ``[R, K]`` and lora_B ``[N, R]`` for a base weight of ``shape`` ``(N, K)``.

    lora_A and lora_B must be on the device of the tensor ``beside``. Error messages use ``name`` for ``beside``.
    """
    out_features, in_features = shape
    for argument, value in (("lora_A", lora_A), ("lora_B", lora_B)):
        check_float(op, argument, value)
        _check_device(op, argument, value, beside, name)
        if value.dim() != 2:
            raise ValueError(f"{op}: {argument} has shape {tuple(value.shape)}, wanted 2 dimensions")
    if lora_A.shape[1] != in_features:
        raise ValueError(f"{op}: lora_A has shape {tuple(lora_A.shape)}, wanted [R, {in_features}]")
    if lora_B.shape[0] != out_features:
        raise ValueError(f"{op}: lora_B has shape {tuple(lora_B.shape)}, wanted [{out_features}, R]")
    if lora_B.shape[1] != lora_A.shape[0]:
        raise ValueError(f"{op}: lora_B has rank {lora_B.shape[1]}, lora_A has rank {lora_A.shape[0]}")
    if lora_A.shape[0] == 0:
        raise ValueError(f"{op}: lora_A has rank 0, wanted at least 1")


def check_experts(
    op: str, x: Tensor, weight: Union[Tensor, PackedWeight], offsets: Tensor, bias: Optional[Tensor]
) -> None:
    """Checks x ``[S, K]``, offsets ``[E]`` and an optional bias ``[E, N]`` against frozen weights ``[E, N, K]``, dense
    of x's dtype or packed."""
    check_experts_weight(op, weight, x.dtype)
    _check_device(op, "weight", weight.parts[0] if isinstance(weight, PackedWeight) else weight, x)
    experts, out_features, in_features = weight.shape
    if x.dim() != 2 or x.shape[1] != in_features:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, wanted [S, {in_features}] for weight "
                         f"{tuple(weight.shape)}")  # fmt: skip
    check_offsets(op, offsets, x, experts)
    if bias is not None:
        check_vector(op, "bias", bias, x, (experts, out_features))
        if bias.dtype != x.dtype:
            raise TypeError(f"{op}: bias is {_name(bias.dtype)}, x is {_name(x.dtype)}")


def check_experts_weight(op: str, weight: Union[Tensor, PackedWeight], dtype: Optional[torch.dtype] = None) -> None:
    """Checks frozen weights ``[E, N, K]``: a stacked PackedWeight, or a dense tensor (of ``dtype``, if given)."""
    if not isinstance(weight, PackedWeight):
        check_float(op, "weight", weight)
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: weight requires grad, wanted a frozen weight (call weight.requires_grad_(False))")
        if dtype is not None and weight.dtype != dtype:
            raise TypeError(f"{op}: weight is {_name(weight.dtype)}, x is {_name(dtype)}")
    if len(weight.shape) != 3:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, wanted [E, N, K]")
    if isinstance(weight, PackedWeight) and not weight.stacked:
        raise ValueError(f"{op}: weight is packed as one weight, wanted a stacked weight")


def check_offsets(op: str, offsets: Tensor, like: Tensor, experts: int) -> None:
    """Checks offsets ``[E]``, int32 or int64, on the device of the tensor ``like``."""
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        came = _name(offsets.dtype) if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"{op}: offsets is {came}, wanted int32 or int64")
    if tuple(offsets.shape) != (experts,):
        raise ValueError(f"{op}: offsets has shape {tuple(offsets.shape)}, wanted ({experts},)")
    _check_device(op, "offsets", offsets, like)


def check_experts_lora(op: str, x: Tensor, weight: Union[Tensor, PackedWeight], lora_A: Tensor, lora_B: Tensor) -> None:
    """Checks lora_A ``[E, R, K]`` and lora_B ``[E, N, R]``, each of its own float dtype, on x's device."""
    experts, out_features, in_features = weight.shape
    for argument, value in (("lora_A", lora_A), ("lora_B", lora_B)):
        check_float(op, argument, value)
        _check_device(op, argument, value, x)
        if value.dim() != 3:
            raise ValueError(f"{op}: {argument} has shape {tuple(value.shape)}, wanted 3 dimensions")
    rank = lora_A.shape[1]
    for argument, value, wanted in (
        ("lora_A", lora_A, (experts, rank, in_features)), ("lora_B", lora_B, (experts, out_features, rank))
    ):  # fmt: skip
        if tuple(value.shape) != wanted:
            raise ValueError(f"{op}: {argument} has shape {tuple(value.shape)}, wanted {wanted}")
    if rank == 0:
        raise ValueError(f"{op}: lora_A has rank 0, wanted at least 1")


def check_bottleneck(
    op: str,
    x: Tensor,
    down_weight: Tensor,
    down_bias: Optional[Tensor],
    up_weight: Tensor,
    up_bias: Optional[Tensor],
    residual: Optional[Tensor],
) -> None:
    """Checks down ``[M, K]``, up ``[N, M]`` and their biases against x ``[..., K]``, and a residual ``[..., N]``."""
    if x.dim() < 1:
        raise ValueError(f"{op}: x has shape (), wanted [..., K]")
    for argument, value, wanted in (("down_weight", down_weight, "M, K"), ("up_weight", up_weight, "N, M")):
        check_float(op, argument, value)
        _check_device(op, argument, value, x)
        if value.dim() != 2:
            raise ValueError(f"{op}: {argument} has shape {tuple(value.shape)}, wanted [{wanted}]")
    size, k = down_weight.shape
    n = up_weight.shape[0]
    if x.shape[-1] != k:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, wanted [..., {k}] for down_weight ({size}, {k})")
    if up_weight.shape[1] != size:
        raise ValueError(f"{op}: up_weight has shape {tuple(up_weight.shape)}, wanted [N, {size}] for down_weight "
                         f"({size}, {k})")  # fmt: skip
    for argument, value in (("down_weight", down_weight), ("up_weight", up_weight)):
        if 0 in value.shape:
            raise ValueError(f"{op}: {argument} has shape {tuple(value.shape)}, wanted at least 1 row and 1 column")
    for argument, value, wanted in (("down_bias", down_bias, size), ("up_bias", up_bias, n)):
        if value is not None:
            check_vector(op, argument, value, x, (wanted,))
    if residual is None:
        if n != k:
            raise ValueError(f"{op}: up_weight has {n} rows, wanted x's {k} where residual is None")
        return
    check_residual(op, x, residual, up_weight, "up_weight")


def check_residual(op: str, x: Tensor, residual: Tensor, out: Tensor, name: str) -> None:
    """Checks that ``residual`` is ``[..., N]`` of the dtype and device of x ``[..., K]``, where N is ``out.shape[0]``.

    ``name`` is the name of the tensor ``out`` in error messages.
    """
    check_float(op, "residual", residual)
    if not isinstance(out, Tensor) or out.is_nested:
        check_float(op, name, out)
    _check_device(op, "residual", residual, x)
    if residual.dtype != x.dtype:
        raise TypeError(f"{op}: residual is {_name(residual.dtype)}, x is {_name(x.dtype)}")
    if x.dim() < 1:
        raise ValueError(f"{op}: x has shape (), wanted [..., K]")
    wanted = (*x.shape[:-1], out.shape[0] if out.dim() else 0)
    if tuple(residual.shape) != wanted:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}, wanted {wanted}")


def check_gated(op: str, gate: Tensor, up: Optional[Tensor]) -> None:
    """Checks gate and up ``[..., F]``, or gate ``[..., 2F]`` without up."""
    check_float(op, "gate", gate)
    if gate.dim() < 1:
        raise ValueError(f"{op}: gate has shape (), wanted [..., F]")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"{op}: gate has shape {tuple(gate.shape)}, wanted [..., 2F] where up is None")
        return
    check_float(op, "up", up)
    _check_device(op, "up", up, gate, "gate")
    if up.dtype != gate.dtype:
        raise TypeError(f"{op}: up is {_name(up.dtype)}, gate is {_name(gate.dtype)}")
    if up.shape != gate.shape:
        raise ValueError(f"{op}: up has shape {tuple(up.shape)}, wanted {tuple(gate.shape)}")


def check_rotary(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Checks q ``[B, H, T, D]``, k ``[B, Hkv, T, D]``, cos and sin ``[B, T, D]`` or ``[1, T, D]``, all of one dtype."""
    check_float(op, "q", q)
    if q.dim() != 4 or q.shape[3] % 2:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}, wanted [B, H, T, D] with an even D")
    batch, _, tokens, size = q.shape
    for argument, value in (("k", k), ("cos", cos), ("sin", sin)):
        check_float(op, argument, value)
        _check_device(op, argument, value, q, "q")
        if value.dtype != q.dtype:
            raise TypeError(f"{op}: {argument} is {_name(value.dtype)}, q is {_name(q.dtype)}")
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (batch, tokens, size):
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}, wanted [{batch}, Hkv, {tokens}, {size}]")
    for argument, value in (("cos", cos), ("sin", sin)):
        if not _has_shape(value, (batch, tokens, size), (1, tokens, size)):
            wanted = f"({batch}, {tokens}, {size}) or (1, {tokens}, {size})"
            raise ValueError(f"{op}: {argument} has shape {tuple(value.shape)}, wanted {wanted}")
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {argument} requires grad, wanted a constant")
    if sin.shape != cos.shape:
        raise ValueError(f"{op}: sin has shape {tuple(sin.shape)}, cos has {tuple(cos.shape)}")


def check_attention(
    op: str, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], is_causal: bool, scale: Optional[float],
    bias: Optional[Tensor],
) -> None:  # fmt: skip
    """Checks q ``[B, H, T, D]``, k ``[B, Hkv, S, D]`` and v ``[B, Hkv, S, Dv]`` of one dtype and one device, an
    optional mask of bools, an optional bias of floats, is_causal and scale."""
    if q.dim() != 4:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}, wanted [B, H, T, D]")
    batch, heads, queries, size = q.shape
    for argument, value in (("k", k), ("v", v)):
        _check_device(op, argument, value, q, "q")
        if value.dtype != q.dtype:
            raise TypeError(f"{op}: {argument} is {_name(value.dtype)}, q is {_name(q.dtype)}")
    if k.dim() != 4 or k.shape[0] != batch or k.shape[3] != size:
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}, wanted [{batch}, Hkv, S, {size}]")
    kv_heads, keys = k.shape[1:3]
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(f"{op}: k has {kv_heads} heads, wanted a divisor of q's {heads}")
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{op}: v has shape {tuple(v.shape)}, wanted [{batch}, {kv_heads}, {keys}, Dv]")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or mask.layout is not torch.strided:
            came = f"{_name(mask.dtype)}, {mask.layout}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{op}: mask is {came}, wanted a strided Tensor of bools")
        if is_causal:
            raise ValueError(f"{op}: is_causal is True, wanted False where there is a mask")
    if bias is not None:
        check_float(op, "bias", bias)
        if bias.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: bias requires a gradient, wanted one without: none is made of it")
    for argument, value in (("mask", mask), ("bias", bias)):
        wanted = (batch, heads, queries, keys)
        if value is None:
            continue
        _check_device(op, argument, value, q, "q")
        if value.dim() != 4 or any(size not in (1, of) for size, of in zip(value.shape, wanted, strict=True)):
            raise ValueError(f"{op}: {argument} has shape {tuple(value.shape)}, wanted {wanted}, each of them or 1")
    if scale is None or torch.compiler.is_compiling():
        return
    if not isinstance(scale, (int, float)) or not 0 < scale <= _LARGEST or scale is True:
        raise ValueError(f"{op}: scale is {scale!r}, wanted a finite number above 0")


def check_scale(op: str, scaling: float, dropout_p: float = 0.0, *, argument: str = "scaling") -> None:
    # Under torch.compile(dynamic=True) a number is a symbol, and a comparison of a symbol needs a guard. torch.compile
    # cannot add a guard within a checkpoint.
    if torch.compiler.is_compiling():
        return
    if not isinstance(scaling, (int, float)) or not -_LARGEST <= scaling <= _LARGEST or scaling is True:
        raise ValueError(f"{op}: {argument} is {scaling!r}, wanted a finite number")
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p!r}, wanted 0 <= p < 1")


def check_seed(op: str, seed: Optional[Tensor], x: Tensor) -> None:
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or tuple(seed.shape) != (2,):
        came = f"{_name(seed.dtype)} {tuple(seed.shape)}" if isinstance(seed, Tensor) else type(seed).__name__
        raise ValueError(f"{op}: seed is {came}, wanted int64 (2,)")
    if seed.layout is not torch.strided:
        raise TypeError(f"{op}: seed has layout {seed.layout}, wanted torch.strided")
    if not seed.is_cpu:
        _check_device(op, "seed", seed, x)


def weight_args(weight: Union[Tensor, PackedWeight]) -> tuple:
    """Returns the seven arguments that stand for a dense or packed weight in a schema, see ``library.WEIGHT``."""
    if isinstance(weight, PackedWeight):
        return weight.op_args()
    return (weight, None, None, None, None, 0, list(weight.shape))


def unpack_weight(weight: Tensor, *args: Any) -> Union[Tensor, PackedWeight]:
    """Undoes :func:`weight_args` for the reference: returns a dense weight, or a PackedWeight.

    The argument after the seven that :func:`weight_args` returns is a dtype, which becomes the dtype of the
    PackedWeight. A packed weight of three dimensions is a stack of experts' weights.
    """
    *parts, layout, shape, dtype = args
    if layout == 0:
        return weight
    if layout >> 32:
        return unpacked((weight, *parts, layout, shape), dtype)
    nested = None if parts[1] is None else NestedAbsmax(*parts[1:])
    return NF4Weight(weight, parts[0], torch.Size(shape), dtype, layout, nested, stacked=len(shape) == 3)


def autocast_dtype(x: Tensor) -> Optional[torch.dtype]:
    """Returns the dtype that autocast computes linear layers of x in; None outside autocast, on the meta device, and
    for float64, which autocast does not cast."""
    device = x.device.type
    # torch.is_autocast_enabled raises an error for the meta device.
    if device == "meta" or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def cast_for_autocast(
    x: Tensor, weight: Union[Tensor, PackedWeight], bias: Optional[Tensor]
) -> tuple[Tensor, Union[Tensor, PackedWeight], Optional[Tensor]]:
    """Returns x, weight and bias; under autocast, x, a dense weight and bias are returned in autocast's dtype."""
    if (dtype := autocast_dtype(x)) is None:
        return x, weight, bias
    return x.to(dtype), cast(weight, dtype), cast(bias, dtype)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Returns the tensor ``value``, cast to autocast's dtype, which is ``dtype``. A float64 tensor, which autocast does
    not cast, and an object that is not a tensor are returned unchanged."""
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype is not torch.float64 else value


def under_a_transform() -> bool:
    """Returns whether forward-mode differentiation or a transform of torch.func is active."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def wants_reference(*values: Optional[Tensor]) -> bool:
    """Returns whether the reference must compute a call, because no kernel supports the call.

    Kernels support neither float64 nor forward-mode differentiation nor transforms of torch.func. While torch.compile
    traces, wants_reference returns True only for float64.
    """
    if not torch.compiler.is_compiling() and under_a_transform():
        return True
    for value in values:  # this loop takes half the time of any() over a generator
        if value is not None and value.dtype is torch.float64:
            return True
    return False
