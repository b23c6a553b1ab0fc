"""NF4Weight: a frozen [N, K] weight in bitsandbytes' own NF4 layout, never repacked.

Layout (source: bitsandbytes ``quantize_4bit``, QLoRA, arXiv 2305.14314):

* ``packed``: uint8 ``[ceil(N*K/2), 1]``, row-major, the high nibble holds the even element;
* ``absmax``: float32 ``[ceil(N*K/blocksize)]``, one scale per block of the *flat* tensor;
* double quantization: ``absmax`` is uint8 and ``nested`` holds what decodes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from torch import Tensor

__all__ = ["BLOCKSIZES", "NESTED_BLOCKSIZE", "NF4Weight", "NestedAbsmax"]

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256


@dataclass(frozen=True)
class NestedAbsmax:
    """What decodes a double-quantized absmax: ``code[absmax_u8] * absmax[i // 256] + offset``.

    ``absmax`` float32 ``[ceil(blocks/256)]``; ``code`` float32 ``[256]``, ascending;
    ``offset`` float32, 0-d: the mean that was subtracted before quantization.
    """

    absmax: Tensor
    code: Tensor
    offset: Tensor


@dataclass(frozen=True)
class NF4Weight:
    """A quantized linear weight.

    Attributes:
        packed: uint8 ``[ceil(N*K/2), 1]``, two codes a byte, high nibble first.
        absmax: float32 ``[blocks]``, or uint8 ``[blocks]`` when ``nested`` is given.
        shape: ``(N, K)``: output and input features (any shape is stored; the linear ops want 2-D).
        dtype: the dtype the weight was quantized from, and dequantizes to by default.
        blocksize: elements that share one absmax.
        nested: state of the double quantization, or None.

    Raises:
        ValueError: a size, dtype or block size that does not fit the others.
    """

    packed: Tensor
    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int = 64
    nested: Optional[NestedAbsmax] = None

    def __post_init__(self) -> None:
        shape = torch.Size(self.shape)
        object.__setattr__(self, "shape", shape)
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"NF4Weight: blocksize is {self.blocksize}, wanted one of {BLOCKSIZES}")
        n = shape.numel()
        blocks = -(-n // self.blocksize)
        if self.packed.dtype != torch.uint8 or self.packed.numel() != (n + 1) // 2:
            raise ValueError(
                f"NF4Weight: packed is {self.packed.dtype} with {self.packed.numel()} elements, "
                f"wanted torch.uint8 with {(n + 1) // 2} for shape {tuple(shape)}"
            )
        wanted = torch.uint8 if self.nested is not None else torch.float32
        if self.absmax.dtype != wanted or self.absmax.numel() != blocks:
            raise ValueError(
                f"NF4Weight: absmax is {self.absmax.dtype} with {self.absmax.numel()} elements, wanted {wanted} "
                f"with {blocks} for shape {tuple(shape)} and blocksize {self.blocksize}"
            )
        if self.nested is not None:
            groups = -(-blocks // NESTED_BLOCKSIZE)
            for name, tensor, size in (
                ("absmax", self.nested.absmax, groups),
                ("code", self.nested.code, 256),
                ("offset", self.nested.offset, 1),
            ):
                if tensor.dtype != torch.float32 or tensor.numel() != size:
                    raise ValueError(
                        f"NF4Weight: nested.{name} is {tensor.dtype} with {tensor.numel()} elements, "
                        f"wanted torch.float32 with {size}"
                    )

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes held: packed codes, scales and, if any, the double-quantization state."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in a stable order."""
        held = {"packed": self.packed, "absmax": self.absmax}
        if self.nested is not None:
            held |= {
                "nested_absmax": self.nested.absmax,
                "nested_code": self.nested.code,
                "nested_offset": self.nested.offset,
            }
        return held

    def map(self, fn: Callable[[Tensor], Tensor]) -> NF4Weight:
        """A copy with ``fn`` applied to every tensor (for example a device move)."""
        nested = self.nested
        if nested is not None:
            nested = NestedAbsmax(fn(nested.absmax), fn(nested.code), fn(nested.offset))
        return replace(self, packed=fn(self.packed), absmax=fn(self.absmax), nested=nested)

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same weight on another device; the codes and scales keep their dtypes."""
        return self.map(lambda t: t.to(device))

    def dequantize(self, dtype: Optional[torch.dtype] = None) -> Tensor:
        """See :func:`peft_ext.ops.nf4_dequantize`."""
        from .ops import nf4_dequantize

        return nf4_dequantize(self, dtype)

    def op_args(self) -> tuple[Any, ...]:
        """The weight as the ops' schemas take it: six tensors or None, then block size and shape."""
        nested = self.nested
        decode = (None, None, None) if nested is None else (nested.absmax, nested.code, nested.offset)
        return (self.packed, self.absmax, *decode, self.blocksize, list(self.shape))

    @staticmethod
    def from_bitsandbytes(weight: Any, quant_state: Any = None) -> NF4Weight:
        """Share the storage of a bitsandbytes ``Params4bit``; nothing is copied.

        Args:
            weight: the ``Params4bit``, or its packed tensor if ``quant_state`` is given.
            quant_state: bitsandbytes' ``QuantState``; default: the one the parameter carries.

        Raises:
            ValueError: not quantized yet, not NF4, or repacked for bitsandbytes' CPU inference.
        """
        from .integrations.bitsandbytes import nf4_from_params4bit

        return nf4_from_params4bit(weight, quant_state)

    def to_bitsandbytes(self) -> Any:
        """A bitsandbytes ``Params4bit`` that shares this weight's storage; nothing is copied."""
        from .integrations.bitsandbytes import params4bit_from_nf4

        return params4bit_from_nf4(self)
