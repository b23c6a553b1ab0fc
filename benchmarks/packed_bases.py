"""Makes the packed weights of the benchmarks from a dense bf16 weight ``[N, K]``, one function for each format.

Weights in MXFP4, NVFP4, FP8, int4 and int8 are quantized from the dense weight. Weights in FP4, GPTQ, AWQ, HQQ and GGUF
have random codes, and scales that give values about as large as those of the dense weight, because a kernel's time does
not depend on the values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from peft_ext.weights import PackedWeight, fp4, fp8, gguf, int_groups, mx
from peft_ext.weights.int4_quantize import quantize_int4


def _bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def _words(*shape: int) -> Tensor:
    return _bytes(*shape, 4).view(torch.int32).squeeze(-1)


def _fp4(weight: Tensor) -> PackedWeight:
    blocks = weight.numel() // 64
    return fp4.fp4(_bytes(weight.numel() // 2), torch.full((blocks,), 0.05), tuple(weight.shape))


def _int8(weight: Tensor) -> PackedWeight:
    scales = weight.float().abs().amax(1, keepdim=True) / 127
    codes = (weight.float() / scales).round().to(torch.int8)
    return int_groups.int_rows(codes, scales.bfloat16(), tuple(weight.shape), bits=8)


def _gptq(weight: Tensor) -> PackedWeight:
    n, k = weight.shape
    scales = torch.full((k // 128, n), 0.005, dtype=torch.float16)
    return int_groups.gptq(_words(k // 8, n), _words(k // 128, n // 8), scales, in_features=k)


def _awq(weight: Tensor) -> PackedWeight:
    n, k = weight.shape
    return int_groups.awq(_words(k, n // 8), _words(k // 128, n // 8), torch.full((k // 128, n), 0.005).half())


def _hqq(weight: Tensor) -> PackedWeight:
    groups = weight.numel() // 64
    scales, zeros = (torch.full((groups,), value, dtype=torch.bfloat16) for value in (0.005, 7.5))
    return int_groups.hqq(_bytes(weight.numel() // 2), scales, zeros, tuple(weight.shape))


# GGUF type -> number of columns of a block, number of its bytes, and the offsets of its float16 scales in bytes.
_GGUF = {
    "Q4_0": (32, 18, (0,)), "Q4_1": (32, 20, (0, 2)), "Q8_0": (32, 34, (0,)), "Q4_K": (256, 144, (0, 2)),
    "Q5_K": (256, 176, (0, 2)), "Q6_K": (256, 210, (208,)),
}  # fmt: skip


def _gguf(type: str, weight: Tensor) -> PackedWeight:
    n, k = weight.shape
    columns, size, places = _GGUF[type]
    blocks = _bytes(n, k // columns, size)
    scale = 0.003 if columns == 32 else 0.0001
    for place in places:
        blocks[..., place : place + 2] = torch.tensor([scale], dtype=torch.float16).view(torch.uint8)
    return gguf.gguf_weight(blocks.flatten(1), type, (n, k))


PACKED: dict[str, Callable[[Tensor], PackedWeight]] = {
    "FP4": _fp4,
    "MXFP4": mx.quantize_mxfp4,
    "NVFP4": mx.quantize_nvfp4,
    "FP8": fp8.quantize_fp8,
    "int4": quantize_int4,
    "int4, zero points": lambda weight: quantize_int4(weight, symmetric=False),
    "int8": _int8,
    "GPTQ": _gptq,
    "AWQ": _awq,
    "HQQ": _hqq,
    **{f"GGUF {type}": partial(_gguf, type) for type in _GGUF},
}
