"""A linear layer over a frozen NF4 weight."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..ops import checks
from ..weights.nf4 import NESTED_BLOCKSIZE, QUANT_STATE, NestedAbsmax, NF4Weight, read_nf4, read_quant_state
from ..weights.packed import PackedWeight

_CALL_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_BUFFERS = ("absmax", "nested_absmax", "nested_code", "nested_offset")


class NF4Linear(nn.Linear):
    """``Y = X Wᵀ + b`` with W frozen in NF4; see :func:`peft_ext.ops.nf4_linear`.

    The layer replaces ``nn.Linear``, and PEFT adapts the layer like an ``nn.Linear``. The ``state_dict`` has the keys
    and the layout of bitsandbytes: ``weight`` (packed codes), ``weight.absmax``, ``weight.quant_map``,
    ``weight.quant_state.bitsandbytes__nf4`` and, with double quantization, ``weight.nested_absmax`` and
    ``weight.nested_quant_map``. A cast of the module to another float dtype casts the bias only; codes and scales do
    not change.

    Under FSDP2 (``fully_shard``) the codes are a uint8 parameter ``[bytes, 1]``, which is sharded along dimension 0 and
    gathered as bytes. The scales are buffers, of which each process has all elements.

    Args:
        in_features, out_features, bias, device: the arguments of ``nn.Linear``.
        dtype: dtype of the bias, value of ``nf4.dtype``, and default dtype of :meth:`dequantize`.
        blocksize: see :func:`peft_ext.ops.nf4_quantize`. double_quant: whether the scales are quantized too.

    ``merge_error`` is ``‖Q − W'‖ / ‖W'‖`` while an adapter is merged: W' is the merged weight in float32, and Q is W'
    after quantization to NF4.
    """

    merge_error: Optional[float] = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        for argument, value in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"NF4Linear: {argument} is {value!r}, wanted an integer of 0 or more")
        if in_features * out_features >= 2**63:
            raise ValueError(f"NF4Linear: {out_features} x {in_features} elements, wanted less than 2**63")
        checks.check_blocksize("NF4Linear", blocksize)
        if dtype is not None:
            checks.check_dtype("NF4Linear", dtype)
        # nn.Linear gets sizes of 1, so that its constructor does not allocate the dense weight.
        super().__init__(1, 1, bias=False, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        # Initial weight: zeros, that is code 7 in all elements and scale 0 in all blocks. On the device "meta" the
        # weight has a shape and no values.
        nf4 = empty_nf4(
            out_features, in_features, blocksize, double_quant, dtype or torch.get_default_dtype(),
            lambda kind, shape: torch.zeros(shape, dtype=kind, device=device),
        )  # fmt: skip
        nf4.packed.fill_(0x77)
        self.set_nf4(nf4)
        if bias and self.weight.device.type != "meta":
            nn.init.zeros_(self.bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, blocksize: int = 64, double_quant: bool = True) -> NF4Linear:
        """Returns an NF4Linear with ``linear``'s weight quantized to NF4.

        The new layer and ``linear`` share the bias parameter. The new layer is in training mode if ``linear`` is in
        training mode.

        Raises: TypeError if ``linear`` is no nn.Linear or of a subclass with another ``forward``; ValueError if
        ``linear`` has a replaced ``forward`` or hooks.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"NF4Linear: linear is {type(linear).__name__}, wanted an nn.Linear")
        check_plain_forward("NF4Linear", linear, (nn.Linear.forward,))
        nf4 = ops.nf4_quantize(linear.weight, blocksize, double_quant)
        return cls.from_nf4(nf4, linear.bias).train(linear.training)

    @classmethod
    def from_nf4(cls, nf4: NF4Weight, bias: Optional[Tensor] = None) -> NF4Linear:
        """Returns a layer whose weight is ``nf4``. The layer shares ``nf4``'s storage."""
        if not isinstance(nf4, NF4Weight):
            raise TypeError(f"NF4Linear: nf4 is {type(nf4).__name__}, wanted an NF4Weight")
        if len(nf4.shape) != 2:
            raise ValueError(f"NF4Linear: nf4 has shape {tuple(nf4.shape)}, wanted (N, K)")
        module = cls(nf4.in_features, nf4.out_features, bias=False, device="meta", dtype=nf4.dtype)
        module.set_nf4(nf4)
        if bias is not None:
            module.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        return module

    @property
    def nf4(self) -> NF4Weight:
        """The layer's weight as an NF4Weight, which shares this module's storage.

        Raises: RuntimeError if the weight is a DTensor shard, as outside the forward of a module that ``fully_shard``
        wrapped, or under tensor parallelism; or if ZeRO-3 has partitioned the weight and not gathered it.
        """
        weight = self.weight
        if is_dtensor(weight):
            raise RuntimeError(
                f"NF4Linear: weight is a DTensor with placements {weight.placements}, wanted the whole weight: NF4 "
                "blocks run over the flat weight, so that no shard is a layer. Under fully_shard call the wrapped "
                "module, or its unshard() first; leave this layer out of tensor parallelism"
            )
        nested = None
        if self.nested_absmax is not None:
            nested = NestedAbsmax(self.nested_absmax, self.nested_code, self.nested_offset)
        shape = torch.Size((self.out_features, self.in_features))
        if not hasattr(weight, "ds_id"):
            return NF4Weight(weight.detach(), self.absmax, shape, self.quant_dtype, self.blocksize, nested)
        if is_zero3_shard(weight):
            raise RuntimeError(
                f"NF4Linear: weight is {tuple(weight.shape)}, partitioned by ZeRO-3, wanted all codes of "
                f"({self.out_features}, {self.in_features}). Call the model, or use deepspeed.zero.GatheredParameters"
            )
        # ZeRO-3 frees the codes after the forward by giving the parameter another tensor. A detached alias, which
        # autograd keeps until the backward, would keep the gathered codes in memory.
        return NF4Weight(weight, self.absmax, shape, self.quant_dtype, self.blocksize, nested)

    def set_nf4(self, nf4: NF4Weight) -> None:
        """Makes ``nf4`` the layer's weight, without a copy. Raises ValueError if the shape differs from the layer's."""
        if tuple(nf4.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"NF4Linear: nf4 has shape {tuple(nf4.shape)}, wanted ({self.out_features}, {self.in_features})"
            )
        self.weight = nn.Parameter(nf4.packed, requires_grad=False)
        self._set_scales(nf4)

    def _set_scales(self, nf4: NF4Weight) -> None:
        held = nf4.tensors()
        for name in _BUFFERS:
            self.register_buffer(name, held.get(name), persistent=False)
        self.blocksize, self.quant_dtype = nf4.blocksize, nf4.dtype
        self.__dict__.pop("merge_error", None)

    def set_merged(self, nf4: NF4Weight, error: Union[Tensor, float]) -> None:
        """Makes ``nf4``, the merged weight, the weight of this layer, and sets ``merge_error`` to ``error``, the
        relative error of requantizing."""
        self.set_nf4(replace(nf4, dtype=self.quant_dtype))
        self.merge_error = float(error)

    def dequantize(self, dtype: Optional[torch.dtype] = None) -> Tensor:
        """Returns the dense weight ``[out_features, in_features]``."""
        return self.nf4.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return ops.nf4_linear(x, self.nf4, bias)

    def reset_parameters(self) -> None:
        """Does nothing, because the weight comes from a trained layer. nn.Linear's constructor calls this method."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocksize={self.blocksize}, double_quant={self.nested_absmax is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        held = (self.weight, *(self._buffers[name] for name in _BUFFERS))
        return super()._apply(keeping_bits(fn, held), recurse)

    # --- bitsandbytes' keys in the state dict -------------------------------------------------------------------------

    _STATE_KEYS = SimpleNamespace(
        weight=SimpleNamespace(
            **dict.fromkeys(("absmax", "quant_map", "nested_absmax", "nested_quant_map")),
            quant_state=SimpleNamespace(bitsandbytes__nf4=None),
        )
    )

    def _fqn_modifiers(self) -> dict[str, str]:
        """Makes torch.distributed.checkpoint.state_dict look up the key "weight" in ``_STATE_KEYS``.

        torch.distributed.checkpoint follows the dots of a key as attributes, and a parameter has no attribute
        ``absmax``.
        """
        return {"weight": "_STATE_KEYS"}

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        about: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": str(self.quant_dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
        }
        destination[prefix + "weight.absmax"] = self.absmax
        destination[prefix + "weight.quant_map"] = reference.nf4_code(self.weight.device)
        if self.nested_absmax is not None:
            destination[prefix + "weight.nested_absmax"] = self.nested_absmax
            # The table nested_code is copied, because layers may share one table, and safetensors refuses tensors that
            # share memory.
            destination[prefix + "weight.nested_quant_map"] = self.nested_code.clone()
            about |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
            about["nested_offset"] = 0.0 if self.nested_offset.is_meta else self.nested_offset.item()
        text = json.dumps(about).encode()
        destination[prefix + QUANT_STATE] = torch.tensor(list(text), dtype=torch.uint8, device="cpu")

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool, missing: list, unexpected: list,
        errors: list,
    ) -> None:  # fmt: skip
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        names = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
                 QUANT_STATE)  # fmt: skip
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        bias = state_dict.get(prefix + "bias")
        for name in names[:2] + names[-1:]:
            if name not in found and strict:
                missing.append(prefix + name)
        if {"weight", "weight.absmax", QUANT_STATE} <= found.keys():
            try:
                self._hold_state(found, assign)
            except (ValueError, TypeError) as error:
                errors.append(f"NF4Linear {prefix.rstrip('.')!r}: {error}")
        elif "weight" in found:  # a missing "weight" was reported above if the load is strict
            errors.append(f"NF4Linear {prefix.rstrip('.')!r}: weight comes without weight.absmax or {QUANT_STATE}, "
                          "wanted a state in 4 bits (quantize_nf4 after the dense state is loaded)")  # fmt: skip
        if self.bias is not None:
            if bias is None and strict:
                missing.append(prefix + "bias")
            elif bias is not None and (why := _bias_reason(bias, self.bias)):
                errors.append(f"{prefix}bias {why}")
            elif bias is not None and assign:
                self.bias = nn.Parameter(bias.detach(), requires_grad=self.bias.requires_grad)
            elif bias is not None:
                with torch.no_grad():
                    self.bias.copy_(bias)
        own = {prefix + name for name in (*names, "bias")}
        if strict:
            unexpected.extend(key for key in state_dict if key.startswith(prefix) and key not in own and key != prefix)

    def _hold_state(self, found: dict[str, Tensor], assign: bool) -> None:
        """Copies the tensors of a state dict into this module, on this module's device.

        With ``assign`` a module that is not sharded holds the given tensors without a copy. All tensors are checked
        before the first tensor is copied.
        """
        read_quant_state(found)  # read_quant_state checks that all entries are tensors, before the codes are reshaped
        packed, weight = found["weight"].detach(), self.weight
        # packed is not uint8 if bitsandbytes stored the codes with another quant_storage.
        if packed.dtype is not torch.uint8 and not is_dtensor(packed):
            packed = packed.contiguous().view(torch.uint8)
        if is_dtensor(packed) and not is_dtensor(weight):
            raise ValueError("weight is a DTensor, wanted a plain tensor (fully_shard the module first)")
        if not is_dtensor(packed):
            packed = packed.reshape(-1, 1)
        nf4 = read_nf4({**found, "weight": packed})
        if not assign and weight.is_meta and not packed.is_meta:
            warnings.warn("NF4Linear: a state is loaded into a layer on the meta device, which holds no data: call "
                          "load_state_dict(..., assign=True)", stacklevel=2)  # fmt: skip
        assign = assign and not is_dtensor(weight)
        if not assign and not is_dtensor(weight) and self._copied(nf4):
            return
        nf4 = nf4.map(lambda t: t.detach() if assign else t.detach().to(weight.device, copy=True))
        if not is_dtensor(weight):
            self.set_nf4(nf4)
            return
        if tuple(nf4.shape) != (self.out_features, self.in_features):
            raise ValueError(f"shape is {tuple(nf4.shape)}, wanted ({self.out_features}, {self.in_features})")
        packed = nf4.packed
        if not is_dtensor(packed):
            from torch.distributed.tensor import distribute_tensor

            # src_data_rank is None, because each process has loaded all codes, and no process has to send codes to
            # another.
            packed = distribute_tensor(packed, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.copy_(packed)  # the codes are written in place, because fully_shard refers to this parameter object
        self._set_scales(nf4)

    def _copied(self, nf4: NF4Weight) -> bool:
        """Copies ``nf4`` into the layer's existing tensors, which other modules may share, and returns True. Returns
        False, without a copy, if the sizes, the block size or the use of double quantization differ, if a tensor of
        ``nf4`` is on the meta device, or if a tensor of ``nf4`` is an inference tensor outside of inference mode.
        """
        own, came = self.nf4.tensors(), nf4.tensors()
        if nf4.shape != self.nf4.shape or nf4.blocksize != self.blocksize or own.keys() != came.keys():
            return False
        if any(t.is_meta or t.shape != own[name].shape or t.is_inference() and not torch.is_inference_mode_enabled()
               for name, t in came.items()):  # fmt: skip
            return False
        for name, tensor in own.items():
            tensor.copy_(came[name])
        self.quant_dtype = nf4.dtype
        self.__dict__.pop("merge_error", None)
        return True


def _bias_reason(bias: Any, own: Tensor) -> Optional[str]:
    """Returns the reason why a state dict's bias does not fit this layer, or None if the bias fits."""
    if not isinstance(bias, Tensor):
        return f"is {type(bias).__name__}, wanted a Tensor"
    if bias.shape != own.shape:
        return f"has shape {tuple(bias.shape)}, wanted {tuple(own.shape)}"
    if not bias.is_floating_point() or bias.layout is not torch.strided:
        return f"is {bias.dtype} with layout {bias.layout}, wanted floats with torch.strided"
    if bias.is_meta and not own.is_meta:
        return "is on the meta device, where there is no data"
    return None


def keeping_bits(fn: Callable[[Tensor], Tensor], held: Iterable[Optional[Tensor]]) -> Callable[[Tensor], Tensor]:
    """Wraps ``fn``, an argument of ``Module._apply``: codes and scales in ``held`` are moved, but are never cast."""
    kept = {id(tensor) for tensor in held}

    def run(tensor: Tensor) -> Tensor:
        after = fn(tensor)
        return tensor.to(after.device) if id(tensor) in kept and after.dtype != tensor.dtype else after

    return run


def check_plain_forward(kind: str, linear: nn.Linear, forwards: Iterable[Callable]) -> None:
    """Raises TypeError if the class of ``linear`` has another forward than ``forwards``, and ValueError if ``linear``
    itself has hooks or a replaced forward: a new layer of the class ``kind`` would not run this code."""
    # peft_ext.accelerate may have replaced the layer's class by a fused class.
    if getattr(type(linear), "stock_forward", type(linear).forward) not in forwards:
        came = f"{type(linear).__name__}, a subclass of nn.Linear with a forward of its own"
        raise TypeError(f"{kind}: linear is {came}, wanted a layer with the forward of nn.Linear")
    if found := [name for name in ("forward", *_CALL_HOOKS) if vars(linear).get(name)]:
        raise ValueError(f"{kind}: linear has its own {found[0]}, which the new layer would not run, wanted a layer "
                         "without hooks and without a replaced forward")  # fmt: skip


def is_dtensor(tensor: Any) -> bool:
    """Returns whether ``tensor`` is a DTensor. Compares the class's name, because importing the class would load
    torch.distributed."""
    return type(tensor).__name__ == "DTensor"


def is_zero3_shard(tensor: Any) -> bool:
    """Returns whether ``tensor`` is a parameter of DeepSpeed's ZeRO-3 that is not gathered now, and therefore empty."""
    return hasattr(tensor, "ds_id") and tuple(tensor.shape) != tuple(getattr(tensor, "ds_shape", ()))


def requantized(merged: Tensor, nf4: NF4Weight) -> tuple[NF4Weight, Tensor]:
    """Returns the float32 weight ``merged``, quantized with ``nf4``'s settings, and the relative error of quantizing.

    The error is a float64 tensor.
    """
    found = replace(ops.nf4_quantize(merged, nf4.blocksize, nf4.nested is not None), dtype=nf4.dtype)
    return found, quantization_error(found, merged)


def quantization_error(found: PackedWeight, dense: Tensor) -> Tensor:
    """Returns ``‖Q − W‖ / ‖W‖``, a float64 tensor, of a packed weight Q and the float32 weight W that Q was quantized
    from."""
    norm = torch.linalg.vector_norm(dense, dtype=torch.float64)
    moved = torch.linalg.vector_norm(found.dequantize(torch.float32).sub_(dense), dtype=torch.float64)
    return torch.where(norm == 0, 0.0, moved / norm)


def empty_nf4(
    out_features: int, in_features: int, blocksize: int, double_quant: bool, dtype: torch.dtype,
    make: Callable[[torch.dtype, tuple[int, ...]], Tensor],
) -> NF4Weight:  # fmt: skip
    """Returns an NF4Weight, whose tensors the function ``make(dtype, shape)`` makes."""
    numel = out_features * in_features
    blocks = -(-numel // blocksize)
    nested = None
    if double_quant:
        groups = -(-blocks // NESTED_BLOCKSIZE)
        nested = NestedAbsmax(make(torch.float32, (groups,)), make(torch.float32, (256,)), make(torch.float32, ()))
    absmax = make(torch.uint8 if double_quant else torch.float32, (blocks,))
    packed = make(torch.uint8, ((numel + 1) // 2, 1))
    return NF4Weight(packed, absmax, torch.Size((out_features, in_features)), dtype, blocksize, nested)
