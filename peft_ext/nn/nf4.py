"""A linear layer over a frozen NF4 weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..weight import NESTED_BLOCKSIZE, NestedAbsmax, NF4Weight

__all__ = ["NF4Linear"]

_BUFFERS = ("absmax", "nested_absmax", "nested_code", "nested_offset")
_QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"


class NF4Linear(nn.Linear):
    """``Y = X Wᵀ + b`` with W frozen in NF4; see :func:`peft_ext.ops.nf4_linear`.

    A drop-in for ``nn.Linear`` that PEFT adapts like one, and whose ``state_dict`` has bitsandbytes' keys and bits:
    ``weight`` (packed), ``weight.absmax``, ``weight.quant_map``, ``weight.quant_state.bitsandbytes__nf4`` and, with
    double quantization, ``weight.nested_absmax`` and ``weight.nested_quant_map``. Casting the module to another float
    dtype casts the bias alone: codes and scales keep their bits.

    Args:
        in_features, out_features, bias, device: as ``nn.Linear``.
        dtype: what ``nf4.dtype`` reports and :meth:`dequantize` gives by default.
        blocksize: see :func:`peft_ext.ops.nf4_quantize`. double_quant: quantize the scales too.

    ``merge_error``: where an adapter was merged into the weight, ``‖Q − W'‖ / ‖W'‖`` of requantizing the merged one.
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
        # A one-element stand-in keeps nn.Linear's initialization from making the dense weight.
        super().__init__(1, 1, bias=False, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.set_nf4(_empty_nf4(out_features, in_features, blocksize, double_quant, device, dtype))
        if bias and self.weight.device.type != "meta":
            nn.init.zeros_(self.bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, blocksize: int = 64, double_quant: bool = True) -> NF4Linear:
        """Quantize ``linear``'s weight; the bias parameter is shared, the training flag is kept."""
        nf4 = ops.nf4_quantize(linear.weight, blocksize, double_quant)
        return cls.from_nf4(nf4, linear.bias).train(linear.training)

    @classmethod
    def from_nf4(cls, nf4: NF4Weight, bias: Optional[Tensor] = None) -> NF4Linear:
        """A layer over ``nf4``, whose storage it shares."""
        module = cls(nf4.in_features, nf4.out_features, bias=False, device="meta", dtype=nf4.dtype)
        module.set_nf4(nf4)
        if bias is not None:
            module.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        return module

    @property
    def nf4(self) -> NF4Weight:
        """The weight, sharing this module's storage."""
        nested = None
        if self.nested_absmax is not None:
            nested = NestedAbsmax(self.nested_absmax, self.nested_code, self.nested_offset)
        shape = torch.Size((self.out_features, self.in_features))
        return NF4Weight(self.weight.data, self.absmax, shape, self.quant_dtype, self.blocksize, nested)

    def set_nf4(self, nf4: NF4Weight) -> None:
        """Hold ``nf4`` from now on, without a copy. Raises ValueError if its shape is not this layer's."""
        if tuple(nf4.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"NF4Linear: nf4 has shape {tuple(nf4.shape)}, wanted ({self.out_features}, {self.in_features})"
            )
        self.weight = nn.Parameter(nf4.packed, requires_grad=False)
        held = nf4.tensors()
        for name in _BUFFERS:
            self.register_buffer(name, held.get(name), persistent=False)
        self.blocksize, self.quant_dtype = nf4.blocksize, nf4.dtype
        self.__dict__.pop("merge_error", None)

    def set_merged(self, nf4: NF4Weight, error: Union[Tensor, float]) -> None:
        """The same for the weight that merging made, with the relative error of requantizing it."""
        self.set_nf4(replace(nf4, dtype=self.quant_dtype))
        self.merge_error = float(error)

    def dequantize(self, dtype: Optional[torch.dtype] = None) -> Tensor:
        """The dense weight ``[out_features, in_features]``."""
        return self.nf4.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return ops.nf4_linear(x, self.nf4, bias)

    def reset_parameters(self) -> None:
        """The weight comes from a trained layer; only nn.Linear's constructor asks for an initialization."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocksize={self.blocksize}, double_quant={self.nested_absmax is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        before = {name: self._buffers[name] for name in _BUFFERS}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after.dtype != buffer.dtype:  # .half() and the like: the scales keep their bits
                self._buffers[name] = buffer.to(after.device)
        return self

    # --- bitsandbytes' keys in the state dict -------------------------------------------------------------------------

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
            destination[prefix + "weight.nested_quant_map"] = self.nested_code.clone()  # safetensors refuses aliases
            about |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
            about["nested_offset"] = 0.0 if self.nested_offset.is_meta else self.nested_offset.item()
        text = json.dumps(about).encode()
        destination[prefix + _QUANT_STATE] = torch.tensor(list(text), dtype=torch.uint8)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool, missing: list, unexpected: list,
        errors: list,
    ) -> None:  # fmt: skip
        names = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
                 _QUANT_STATE)  # fmt: skip
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        bias = state_dict.get(prefix + "bias")
        for name in names[:2] + names[-1:]:
            if name not in found and strict:
                missing.append(prefix + name)
        if {"weight", "weight.absmax", _QUANT_STATE} <= found.keys():
            try:
                self._hold_state(found)
            except (ValueError, KeyError, TypeError) as error:
                errors.append(f"NF4Linear {prefix.rstrip('.')!r}: {error}")
        if self.bias is not None:
            if bias is None and strict:
                missing.append(prefix + "bias")
            elif bias is not None and bias.shape != self.bias.shape:
                errors.append(f"{prefix}bias has shape {tuple(bias.shape)}, wanted {tuple(self.bias.shape)}")
            elif bias is not None:
                with torch.no_grad():
                    self.bias.copy_(bias)
        own = {prefix + name for name in (*names, "bias")}
        if strict:
            unexpected.extend(key for key in state_dict if key.startswith(prefix) and key not in own and key != prefix)

    def _hold_state(self, found: dict[str, Tensor]) -> None:
        """Copy a state dict's tensors in, on this module's device, once all of them are known to fit."""
        about = json.loads(bytes(found[_QUANT_STATE].tolist()).decode())
        if about.get("quant_type") != "nf4":
            raise ValueError(f"quant_type is {about.get('quant_type')!r}, wanted 'nf4'")
        nested = None
        if "nested_offset" in about:
            if about.get("nested_blocksize") != NESTED_BLOCKSIZE:
                raise ValueError(f"nested_blocksize is {about.get('nested_blocksize')}, wanted {NESTED_BLOCKSIZE}")
            offset = torch.tensor(float(about["nested_offset"]))
            nested = NestedAbsmax(found["weight.nested_absmax"], found["weight.nested_quant_map"], offset)
        dtype = getattr(torch, str(about["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype is {about['dtype']!r}, wanted the name of a torch dtype")
        nf4 = NF4Weight(found["weight"].data.reshape(-1, 1), found["weight.absmax"], torch.Size(about["shape"]), dtype,
                        int(about["blocksize"]), nested)  # fmt: skip
        device = self.weight.device
        self.set_nf4(nf4.map(lambda t: t.detach().to(device, copy=True)))


def requantized(merged: Tensor, nf4: NF4Weight) -> tuple[NF4Weight, Tensor]:
    """A merged weight, float32, quantized as ``nf4`` is, and the relative error of that as a float64 tensor."""
    found = replace(ops.nf4_quantize(merged, nf4.blocksize, nf4.nested is not None), dtype=nf4.dtype)
    norm = torch.linalg.vector_norm(merged, dtype=torch.float64)
    moved = torch.linalg.vector_norm(found.dequantize(torch.float32).sub_(merged), dtype=torch.float64)
    return found, torch.where(norm == 0, 0.0, moved / norm)


def _empty_nf4(
    out_features: int, in_features: int, blocksize: int, double_quant: bool, device: Any, dtype: Optional[torch.dtype]
) -> NF4Weight:
    """A weight of zeros: code 7 everywhere, all scales 0 (on the meta device: shapes alone)."""
    numel = out_features * in_features
    blocks = -(-numel // blocksize)
    packed = torch.full(((numel + 1) // 2, 1), 0x77, dtype=torch.uint8, device=device)
    if not double_quant:
        absmax, nested = torch.zeros(blocks, device=device), None
    else:
        absmax = torch.zeros(blocks, dtype=torch.uint8, device=device)
        groups = -(-blocks // NESTED_BLOCKSIZE)
        nested = NestedAbsmax(
            torch.zeros(groups, device=device), torch.zeros(256, device=device), torch.zeros((), device=device)
        )
    return NF4Weight(packed, absmax, torch.Size((out_features, in_features)), dtype or torch.get_default_dtype(),
                     blocksize, nested)  # fmt: skip
