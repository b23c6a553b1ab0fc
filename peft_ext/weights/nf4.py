"""NF4Weight: a frozen weight [N, K] in bitsandbytes' NF4 layout, which peft_ext's kernels read without repacking.

Layout (source: bitsandbytes ``quantize_4bit``, QLoRA, arXiv 2305.14314):

* ``packed``: uint8 ``[ceil(N*K/2), 1]``, row-major; the high nibble of a byte holds the element with the even index;
* ``absmax``: float32 ``[ceil(N*K/blocksize)]``, one scale per block of the *flat* tensor;
* double quantization: ``absmax`` is uint8, and ``nested`` holds the tensors that decode ``absmax``;
* the weights of experts ``[E, N, K]``: each expert is packed separately; the tensors of all experts are concatenated.

This module also holds the 16 NF4 codes (source: bitsandbytes' ``get_4bit_type("nf4")``) and the conversion from and to
bitsandbytes' ``Params4bit``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Optional

import torch
from torch import Tensor

from .._imports import required
from .._ops import NAMESPACE
from .packed import Format, PackedWeight, register

__all__ = [
    "BLOCKSIZES",
    "FLOATS",
    "NESTED_BLOCKSIZE",
    "NF4_CODE",
    "QUANT_STATE",
    "NF4Weight",
    "NestedAbsmax",
    "is_nf4_table",
    "nf4_code",
    "nf4_from_params4bit",
    "params4bit_from_nf4",
    "read_nf4",
    "read_quant_state",
    "why_not_nf4",
]

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"

# Quantiles of the normal distribution, scaled to [-1, 1]; the eighth code is exactly 0.
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
_MOST_BYTES = 1 << 20


# The format's own check does nothing, because the class NF4Weight checks its tensors.
NF4 = register(Format("nf4", 0, ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset"),
                      lambda *_: None, "bitsandbytes"))  # fmt: skip


@dataclass(frozen=True)
class NestedAbsmax:
    """State that decodes a double-quantized absmax: ``absmax_i = code[absmax_u8[i]] * absmax[i // 256] + offset``.

    ``absmax`` is float32 ``[ceil(blocks/256)]``, one scale for each 256 scales of the weight. ``code`` is the table of
    the values of the 8-bit codes, float32 ``[256]``, ascending. ``offset`` is a float32 tensor of no dimensions: the
    mean that was subtracted from the scales before the scales were quantized. In a stacked weight ``absmax`` holds the
    values of all E experts, one expert after the other, and ``offset`` is ``[E]``.
    """

    absmax: Tensor
    code: Tensor
    offset: Tensor


@dataclass(frozen=True)
class NF4Weight(PackedWeight):
    """A linear weight, quantized to NF4.

    Attributes:
        packed: uint8 ``[ceil(N*K/2), 1]``, two codes per byte, the high nibble first.
        absmax: float32 ``[blocks]``, or uint8 ``[blocks]`` with ``nested``.
        shape: ``(N, K)``, output and input features. A weight of another shape can be stored; the linear operators need
            two dimensions.
        dtype: dtype of the weight before it was quantized, and default dtype of :meth:`dequantize`.
        blocksize: number of elements that share one absmax.
        nested: state of the double quantization; None without double quantization.
        stacked: whether ``shape`` is ``(E, N, K)`` of E separately packed weights, see :meth:`stack`.

    Raises:
        TypeError: ``packed``, ``absmax`` or a part of ``nested`` is no tensor, a size is no integer, ``nested`` is no
            NestedAbsmax, or ``dtype`` is no float dtype.
        ValueError: a size, dtype, layout, device or block size that does not fit the other arguments.
    """

    packed: Tensor
    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int = 64
    nested: Optional[NestedAbsmax] = None
    stacked: bool = False

    def __post_init__(self) -> None:
        if type(self.shape) is not torch.Size:
            object.__setattr__(self, "shape", _size(self.shape))
        shape = self.shape
        if type(self.blocksize) is not int or self.blocksize not in BLOCKSIZES:
            raise ValueError(f"NF4Weight: blocksize is {self.blocksize!r}, wanted one of {BLOCKSIZES}")
        if self.dtype not in FLOATS:
            raise TypeError(f"NF4Weight: dtype is {self.dtype!r}, wanted one of {', '.join(map(str, FLOATS))}")
        n = math.prod(shape)  # math.prod and not torch.Size.numel(), which overflows 64 bits
        if n < 0 or (n and min(shape, default=1) < 0):
            raise ValueError(f"NF4Weight: shape is {tuple(shape)}, wanted sizes of 0 or more")
        if self.stacked and len(shape) != 3:
            raise ValueError(f"NF4Weight: shape is {tuple(shape)}, wanted (E, N, K) of stacked weights")
        count, each = (shape[0], n // max(1, shape[0])) if self.stacked else (1, n)
        blocks = -(-each // self.blocksize)
        nested, packed = self.nested, self.packed
        held = [("packed", packed, torch.uint8, count * ((each + 1) // 2))]
        if nested is None:
            held.append(("absmax", self.absmax, torch.float32, count * blocks))
        elif isinstance(nested, NestedAbsmax):
            held += (
                ("absmax", self.absmax, torch.uint8, count * blocks),
                ("nested.absmax", nested.absmax, torch.float32, count * -(-blocks // NESTED_BLOCKSIZE)),
                ("nested.code", nested.code, torch.float32, 256),
                ("nested.offset", nested.offset, torch.float32, count),
            )
        else:
            raise TypeError(f"NF4Weight: nested is {type(nested).__name__}, wanted a NestedAbsmax or None")
        # The checks are one condition, for speed: each call of a layer makes a new NF4Weight.
        device = packed.device if isinstance(packed, Tensor) else None
        for name, tensor, dtype, count in held:
            if name == "nested.offset" and isinstance(tensor, Tensor) and tensor.device != device:
                # The offset may be on another device, as PyTorch's operators accept a 0-d tensor on the CPU with
                # tensors on a GPU.
                tensor = tensor.to(device)
                object.__setattr__(self, "nested", replace(nested, offset=tensor))
            if not (
                isinstance(tensor, Tensor)
                and tensor.dtype == dtype
                and tensor.numel() == count
                and tensor.layout is torch.strided
                and tensor.device == device
            ):
                self._refuse(name, tensor, dtype, count)

    @staticmethod
    def stack(weights: Sequence[NF4Weight]) -> NF4Weight:
        """Returns weights ``(N, K)`` as one stacked weight ``(E, N, K)``: the tensors of all weights, concatenated.

        Each expert keeps the bitsandbytes layout of a separate weight, its own offset of double quantization included.
        All experts share one table of double-quantization codes.

        Raises: TypeError or ValueError if ``weights`` is empty, or if the weights are not 2-D or differ in shape,
        dtype, block size, device or the use of double quantization.
        """
        if not weights or not all(isinstance(weight, NF4Weight) for weight in weights):
            raise TypeError("NF4Weight.stack: weights is empty or holds other objects, wanted one NF4Weight per expert")
        first = weights[0]
        kind = (first.shape, first.dtype, first.blocksize, first.nested is None, first.device)
        for weight in weights:
            if (weight.shape, weight.dtype, weight.blocksize, weight.nested is None, weight.device) != kind:
                raise ValueError("NF4Weight.stack: weights differ in shape, dtype, blocksize, nesting or device")
        if len(first.shape) != 2:
            raise ValueError(f"NF4Weight.stack: weights have shape {tuple(first.shape)}, wanted [N, K]")
        nested = None
        if first.nested is not None:
            held = [weight.nested for weight in weights if weight.nested is not None]
            nested = NestedAbsmax(
                torch.cat([one.absmax for one in held]), first.nested.code,
                torch.stack([one.offset.reshape(()) for one in held]),
            )  # fmt: skip
        return NF4Weight(
            torch.cat([weight.packed for weight in weights]), torch.cat([weight.absmax for weight in weights]),
            torch.Size((len(weights), *first.shape)), first.dtype, first.blocksize, nested, True,
        )  # fmt: skip

    def expert(self, index: int) -> NF4Weight:
        """Returns the weight ``(N, K)`` of one expert of a stacked weight, in the same memory."""
        if not self.stacked:
            raise ValueError(
                f"NF4Weight.expert: the weight has shape {tuple(self.shape)}, wanted a result of NF4Weight.stack"
            )
        experts = self.shape[0]

        def part(tensor: Tensor) -> Tensor:
            size = tensor.shape[0] // experts
            return tensor[index * size : (index + 1) * size]

        nested = self.nested
        if nested is not None:
            nested = NestedAbsmax(part(nested.absmax), nested.code, nested.offset.reshape(-1)[index])
        return replace(self, packed=part(self.packed), absmax=part(self.absmax), shape=self.shape[1:], nested=nested,
                       stacked=False)  # fmt: skip

    def _refuse(self, name: str, tensor: object, dtype: torch.dtype, count: int) -> NoReturn:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"NF4Weight: {name} is {type(tensor).__name__}, wanted a Tensor")
        if tensor.dtype != dtype or tensor.numel() != count:
            raise ValueError(
                f"NF4Weight: {name} is {tensor.dtype} with {tensor.numel()} elements, wanted {dtype} with {count} for "
                f"shape {tuple(self.shape)} and blocksize {self.blocksize}"
            )
        if tensor.layout is not torch.strided:
            raise ValueError(f"NF4Weight: {name} has layout {tensor.layout}, wanted torch.strided")
        raise ValueError(f"NF4Weight: {name} is on {tensor.device}, packed is on {self.packed.device}")

    def check_scales(self) -> None:
        """Raises ValueError if a scale is impossible, for example because of a wrong bit in a file.

        Scales must be finite and not negative. With double quantization the table of codes must be finite and ascend,
        and the offset must be finite. ``check_scales`` reads the scales' values, which on a GPU waits for the GPU.
        """
        held = self.tensors()
        for name in ("absmax", "nested_absmax", "nested_code", "nested_offset"):
            scales = held.get(name)
            if scales is None or scales.is_meta or not scales.is_floating_point():
                continue
            if not scales.isfinite().all():
                raise ValueError(f"NF4Weight: {name} has values that are not finite")
            if name in ("absmax", "nested_absmax") and (scales < 0).any():
                raise ValueError(f"NF4Weight: {name} has values below 0")
            if name == "nested_code" and (scales.diff() < 0).any():
                raise ValueError("NF4Weight: nested_code does not ascend")

    @property
    def format(self) -> Format:
        return NF4

    @property
    def parts(self) -> tuple[Optional[Tensor], ...]:
        return self.op_args()[:5]

    @property
    def group(self) -> int:
        return self.blocksize

    @property
    def option(self) -> int:
        return 0

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def tensors(self) -> dict[str, Tensor]:
        """Returns a dict that maps the names of the weight's tensors to the tensors, always in the same order."""
        held = {"packed": self.packed, "absmax": self.absmax}
        if self.nested is not None:
            held |= {
                "nested_absmax": self.nested.absmax,
                "nested_code": self.nested.code,
                "nested_offset": self.nested.offset,
            }
        return held

    def map(self, fn: Callable[[Tensor], Tensor]) -> NF4Weight:
        """Returns an NF4Weight with ``fn`` applied to every tensor, for example to move the tensors to a device."""
        nested = self.nested
        if nested is not None:
            nested = NestedAbsmax(fn(nested.absmax), fn(nested.code), fn(nested.offset))
        return replace(self, packed=fn(self.packed), absmax=fn(self.absmax), nested=nested)

    def dequantize(self, dtype: Optional[torch.dtype] = None) -> Tensor:
        """See :func:`peft_ext.ops.nf4_dequantize`."""
        dtype = self.dtype if dtype is None else dtype
        if dtype not in FLOATS:
            raise TypeError(f"nf4_dequantize: dtype is {dtype}, wanted one of {', '.join(map(str, FLOATS))}")
        if self.stacked:
            return torch.stack([self.expert(i).dequantize(dtype) for i in range(self.shape[0])])
        return getattr(torch.ops, NAMESPACE).nf4_dequantize(*self.op_args(), dtype)

    def op_args(self) -> tuple[Any, ...]:
        """Returns the weight as arguments of the operators' schemas: five tensors or None, block size and shape."""
        nested = self.nested
        decode = (None, None, None) if nested is None else (nested.absmax, nested.code, nested.offset)
        return (self.packed, self.absmax, *decode, self.blocksize, list(self.shape))

    @staticmethod
    def from_bitsandbytes(weight: Any, quant_state: Any = None) -> NF4Weight:
        """Returns an NF4Weight that shares the storage of a bitsandbytes ``Params4bit``; no data is copied.

        Args:
            weight: the ``Params4bit``, or its packed tensor if ``quant_state`` is given.
            quant_state: bitsandbytes' ``QuantState``; default ``weight.quant_state``.

        Raises:
            TypeError: ``weight`` is not a tensor, and a ``quant_state`` is given.
            ValueError: there is no quant_state; ``weight`` is not NF4, has another table of codes, has double-quantized
                scales in blocks of another size than 256, or was repacked for bitsandbytes' CPU inference; or scales
                are not valid, see :meth:`check_scales`.
        """
        nf4 = nf4_from_params4bit(weight, quant_state)
        if not is_nf4_table((quant_state if quant_state is not None else weight.quant_state).code):
            raise ValueError("NF4Weight.from_bitsandbytes: the quant_state's table of codes is not NF4's")
        nf4.check_scales()
        return nf4

    def to_bitsandbytes(self) -> Any:
        """Returns a bitsandbytes ``Params4bit`` that shares this weight's storage; no data is copied."""
        return params4bit_from_nf4(self)


def read_quant_state(found: Mapping[str, Any]) -> tuple[list[int], torch.dtype, int, Optional[float]]:
    """Returns ``(shape, dtype, blocksize, nested offset)`` from a layer's state dict in bitsandbytes' format.

    The keys of ``found``, the layer's state dict, have no prefix: "weight", "weight.absmax" and so on.
    ``found[QUANT_STATE]`` holds JSON text, one byte per element. The function checks the class and the layout of the
    entries of ``found`` that the weight needs, and :class:`NF4Weight` checks their sizes.

    Raises: KeyError without ``QUANT_STATE``; ValueError, whose text says what came and what was wanted, if
    ``QUANT_STATE`` is no tensor of JSON bytes, or if a value or an entry does not fit; TypeError if another entry is
    not a tensor.
    """
    held = found[QUANT_STATE]
    if not isinstance(held, Tensor) or held.dtype != torch.uint8 or held.dim() != 1 or held.is_meta:
        came = f"{held.dtype} {tuple(held.shape)} on {held.device}" if isinstance(held, Tensor) else type(held).__name__
        raise ValueError(f"{QUANT_STATE} is {came}, wanted the bytes of JSON")
    if held.numel() > _MOST_BYTES:
        raise ValueError(f"{QUANT_STATE} has {held.numel()} bytes, wanted at most {_MOST_BYTES}")
    try:
        about = json.loads(bytes(held.tolist()).decode())
    except (ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        raise ValueError(f"{QUANT_STATE} is not JSON: {why}") from None
    if not isinstance(about, dict):
        raise ValueError(f"{QUANT_STATE} is a JSON {type(about).__name__}, wanted an object")
    for name in ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"):
        if name in found and not isinstance(found[name], Tensor):
            raise TypeError(f"{name} is {type(found[name]).__name__}, wanted a Tensor")
        if name in found and found[name].layout is not torch.strided:
            raise ValueError(f"{name} has layout {found[name].layout}, wanted torch.strided")
    if (kind := about.get("quant_type")) != "nf4":
        raise ValueError(f"quant_type is {kind!r:.60}, wanted 'nf4'")
    if not is_nf4_table(found.get("weight.quant_map")):
        raise ValueError("weight.quant_map is not NF4's table of codes")
    dtype = about.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r:.60}, wanted one of {', '.join(_DTYPES)}")
    if not isinstance(shape := about.get("shape"), list):
        raise ValueError(f"shape is {shape!r:.60}, wanted a list of sizes")
    blocksize = about.get("blocksize")
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize is {blocksize!r:.60}, wanted one of {BLOCKSIZES}")
    if "nested_offset" not in about:
        return shape, _DTYPES[dtype], blocksize, None
    if about.get("nested_blocksize") != NESTED_BLOCKSIZE:
        raise ValueError(f"nested_blocksize is {about.get('nested_blocksize')!r:.60}, wanted {NESTED_BLOCKSIZE}")
    offset = about["nested_offset"]
    if not isinstance(offset, (int, float)) or not abs(offset) <= torch.finfo(torch.float32).max:
        raise ValueError(f"nested_offset is {offset!r:.60}, wanted a finite number")
    for name in ("weight.nested_absmax", "weight.nested_quant_map"):
        if name not in found:
            raise ValueError(f"{name} is missing, wanted it because {QUANT_STATE} has a nested_offset")
    return shape, _DTYPES[dtype], blocksize, float(offset)


def read_nf4(found: Mapping[str, Any]) -> NF4Weight:
    """Returns the weight from a layer's state dict in bitsandbytes' format, whose keys are "weight", "weight.absmax"
    and so on, without a copy of the tensors.

    Raises: the errors of :func:`read_quant_state`; KeyError if "weight" or "weight.absmax" is missing; TypeError or
    ValueError if sizes or scales do not fit.
    """
    shape, dtype, blocksize, offset = read_quant_state(found)
    nested = None
    if offset is not None:
        held = torch.tensor(offset, dtype=torch.float32)
        nested = NestedAbsmax(found["weight.nested_absmax"], found["weight.nested_quant_map"], held)
    nf4 = NF4Weight(found["weight"], found["weight.absmax"], shape, dtype, blocksize, nested)
    nf4.check_scales()
    return nf4


def nf4_code(device: torch.device | str = "cpu") -> Tensor:
    """Returns the 16 NF4 codes in ascending order, float32 ``[16]``."""
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


def is_nf4_table(code: Optional[Tensor]) -> bool:
    """Returns whether ``code`` is NF4's table of 16 codes, in any float dtype. The kernels contain this table, and read
    no other table.

    None and a tensor on the meta device count as NF4's table, because their values are unknown.
    """
    if code is None or code.is_meta:
        return True
    wanted = nf4_code()
    return code.shape == wanted.shape and torch.allclose(code.detach().float().cpu(), wanted, rtol=0, atol=1e-2)


def _size(shape: Any) -> torch.Size:
    try:
        sizes = tuple(shape)
    except TypeError:
        sizes = (shape,)
    if not all(isinstance(size, (int, torch.SymInt)) and not isinstance(size, bool) for size in sizes):
        raise TypeError(f"NF4Weight: shape is {shape!r}, wanted integers")
    if any(not 0 <= size < 2**63 for size in sizes):
        raise ValueError(f"NF4Weight: shape is {sizes}, wanted sizes of 0 or more")
    return torch.Size(sizes)


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


def why_not_nf4(quant_state: Any, kinds: Sequence[str] = ("nf4",)) -> Optional[str]:
    """Returns the reason why the operators can't read a weight with the bitsandbytes ``QuantState``, or None if they
    can.

    ``kinds``: the accepted values of quant_type, of "nf4" and "fp4". ``why_not_nf4`` does not check the table of codes.
    """
    if quant_state is None:
        return "the weight is not quantized yet: no quant_state"
    if (kind := getattr(quant_state, "quant_type", None)) not in kinds:
        return f"quant_type is {kind!r}, wanted {' or '.join(map(repr, kinds))}"
    if getattr(quant_state, "packing_format_for_cpu", False):
        return "bitsandbytes repacked the weight for its CPU inference"
    if quant_state.nested and (size := getattr(quant_state.state2, "blocksize", None)) != NESTED_BLOCKSIZE:
        return f"the nested blocksize is {size}, wanted {NESTED_BLOCKSIZE}"
    return None


def nf4_from_params4bit(weight: Tensor, quant_state: Any = None) -> NF4Weight:
    """See :meth:`peft_ext.NF4Weight.from_bitsandbytes`."""
    state = quant_state if quant_state is not None else getattr(weight, "quant_state", None)
    if reason := why_not_nf4(state):
        raise ValueError(f"NF4Weight.from_bitsandbytes: {reason}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"NF4Weight.from_bitsandbytes: weight is {type(weight).__name__}, wanted a Tensor")
    # A plain tensor is faster: each attribute of bitsandbytes' tensor subclass costs a call into Python.
    with torch._C.DisableTorchFunctionSubclass():
        packed = weight.data
    if packed.dtype != torch.uint8:  # bitsandbytes' option quant_storage may give the bytes another dtype
        packed = packed.reshape(-1).view(torch.uint8)
    nested = None
    if state.nested:
        nested = NestedAbsmax(state.state2.absmax, state.state2.code, state.offset)
    return NF4Weight(packed.reshape(-1, 1), state.absmax, state.shape, state.dtype, state.blocksize, nested)


def params4bit_from_nf4(nf4: NF4Weight) -> Any:
    """See :meth:`peft_ext.NF4Weight.to_bitsandbytes`."""
    with required("bitsandbytes", "NF4Weight.to_bitsandbytes"):
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Params4bit

    state2 = offset = None
    if nf4.nested is not None:
        state2 = QuantState(
            absmax=nf4.nested.absmax, code=nf4.nested.code, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32
        )
        offset = nf4.nested.offset
    state = QuantState(
        absmax=nf4.absmax, shape=nf4.shape, code=nf4_code(nf4.device), blocksize=nf4.blocksize,
        quant_type="nf4", dtype=nf4.dtype, offset=offset, state2=state2,
    )  # fmt: skip
    return Params4bit(
        nf4.packed, requires_grad=False, quant_state=state, blocksize=nf4.blocksize, quant_type="nf4",
        compress_statistics=nf4.nested is not None, bnb_quantized=True,
    )  # fmt: skip
