"""Which dtypes this CPU multiplies matrices in by instructions of its own, and so what to compute in here.

    float32    always
    bfloat16   AVX512-BF16 or AMX on x86-64; FEAT_BF16 on aarch64
    float16    AVX512-FP16 or AMX-FP16 on x86-64; FEAT_FP16 on aarch64

Elsewhere PyTorch's product of that dtype is oneDNN's emulation of it (AVX-512 without them) or a plain loop (AVX2 and
less), tens of times slower than that of float32. The facts are CPUID's, as PyTorch reads them, less what the
environment forbids: PyTorch's oneDNN obeys ``ONEDNN_MAX_CPU_ISA``, this package's kernels ``PEFT_EXT_CPU_ISA``.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

from . import _native

# oneDNN's names of its limits, from less to more. One that is not here, as "ALL", is no limit.
_LIMITS = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16",
           "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16")  # fmt: skip
# By dtype: PyTorch's check, the least limit that leaves the instructions, and their names in PyTorch's list by machine.
# AVX-NE-CONVERT, of some CPUs without AVX-512, converts bfloat16 and multiplies in float32: it is no product.
_WANTED = {
    torch.bfloat16: ("_is_mkldnn_bf16_supported", "AVX512_CORE_BF16", ("avx512_bf16", "amx_bf16"), ("bf16",)),
    torch.float16: ("_is_mkldnn_fp16_supported", "AVX512_CORE_FP16", ("avx512_fp16", "amx_fp16"), ("fp16_arith",)),
}
# The paths on which it widens a panel of the weight at a time to float32, of dtypes that they do not multiply.
_WIDENS = ("avx2", "avx512", "neon", "neon_bf16")


def capabilities() -> Mapping[str, Any]:
    """CPUID's facts by PyTorch's names; of a torch without the list those alone that it has functions for."""
    if (found := getattr(torch.cpu, "get_capabilities", None)) is not None:
        return found()
    asked = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported",
             "amx_fp16": "_is_amx_fp16_supported", "avx512_f": "_is_avx512_supported",
             "avx2": "_is_avx2_supported"}  # fmt: skip
    return {name: bool(getattr(torch.cpu, function, bool)()) for name, function in asked.items()}


def _limit() -> str:
    """Returns what oneDNN may use at most; "" for all."""
    name = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return name.upper() if name.upper() in _LIMITS else ""


def _onednn_multiplies(check: str) -> bool:
    """Returns whether PyTorch gives oneDNN products of the dtype that ``check`` asks for; not so on AVX2 and less."""
    try:
        return bool(getattr(torch.ops.mkldnn, check)())
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return False


def multiplies(dtype: torch.dtype) -> bool:
    """Returns whether PyTorch's matrix product of ``dtype`` runs on instructions that this CPU has for it."""
    if dtype not in _WANTED:
        return True
    check, least, x86, arm = _WANTED[dtype]
    supported, has = _onednn_multiplies(check), capabilities()
    if not is_x86():
        return supported and any(has.get(name) for name in arm)
    if (limit := _limit()) and _LIMITS.index(limit) < _LIMITS.index(least):
        return False
    return supported and any(has.get(name) for name in x86)


def widened_dtypes() -> frozenset[torch.dtype]:
    """Returns the 16-bit dtypes in which this package's product of a frozen weight is to be taken for PyTorch's.

    PyTorch's has no instructions for them here, and the package's own has, or is PyTorch's of float32 over a panel of
    the weight at a time. The portable path leaves the product to PyTorch as it is.
    """
    isa = _native.STATE.isa
    if isa not in (*_WIDENS, *_native.TILE_PATHS):
        return frozenset()
    return frozenset(dtype for dtype in _WANTED if not multiplies(dtype))


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


def compute_dtype() -> torch.dtype:
    """Returns what to compute in where nothing else was asked for: bfloat16 where this CPU has instructions for it."""
    return torch.bfloat16 if not why_float32() else torch.float32


def why_float32() -> str:
    """Returns why :func:`compute_dtype` is float32; "" where it is not."""
    if not multiplies(torch.bfloat16):
        by = "the environment forbids the" if _forbidden() else "this CPU has no"
        return f"{by} instructions for bfloat16 products"
    isa = _native.STATE.isa
    if isa == "neon" or (is_x86() and isa not in (*_native.TILE_PATHS, "reference")):
        return f"the CPU path in use, {isa}, has no instructions for bfloat16 products"
    return ""


def _forbidden() -> bool:
    """Returns whether the CPU itself would have them."""
    has = capabilities()
    return bool(_limit()) and any(has.get(name) for name in _WANTED[torch.bfloat16][2])


def instruction_sets() -> list[str]:
    """Returns those that decide how fast a CPU multiplies matrices, by PyTorch's names, as CPUID has them."""
    has = capabilities()
    names = ("avx2", "fma3", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16",
             "neon", "fp16_arith", "bf16", "sve", "sme")  # fmt: skip
    return [name for name in names if has.get(name)]
