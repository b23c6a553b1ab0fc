"""Finds the dtypes for which this CPU has matrix-product instructions, and chooses the default compute dtype.

Every CPU has instructions for float32. On x86-64, CPUs with AVX512-BF16 or AMX have instructions for bfloat16, and CPUs
with AVX512-FP16 or AMX-FP16 for float16. On aarch64, CPUs with FEAT_BF16 have instructions for bfloat16, and CPUs with
FEAT_FP16 for float16.

On x86-64 CPUs without instructions for a 16-bit dtype, PyTorch's product of that dtype is oneDNN's emulation (with
AVX-512) or a plain loop (AVX2 and less), tens of times slower than the product of float32. This module asks PyTorch
which instructions the CPU has. Instructions that an environment variable forbids count as missing:
``ONEDNN_MAX_CPU_ISA`` and ``DNNL_MAX_CPU_ISA`` limit PyTorch's oneDNN, ``PEFT_EXT_CPU_ISA`` limits peft_ext's kernels.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

from . import _native

# oneDNN's names of instruction-set limits, in ascending order. A name that is not in this tuple, such as "ALL", is no
# limit.
_LIMITS = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16",
           "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16")  # fmt: skip
# _WANTED has for each 16-bit dtype: the name of PyTorch's check function, the lowest limit in _LIMITS that allows the
# dtype's instructions, and PyTorch's names of these instructions on x86-64 and on Arm. AVX-NE-CONVERT (some CPUs
# without AVX-512) only converts bfloat16 to float32.
_WANTED = {
    torch.bfloat16: ("_is_mkldnn_bf16_supported", "AVX512_CORE_BF16", ("avx512_bf16", "amx_bf16"), ("bf16",)),
    torch.float16: ("_is_mkldnn_fp16_supported", "AVX512_CORE_FP16", ("avx512_fp16", "amx_fp16"), ("fp16_arith",)),
}
# The CPU paths that widen one panel of a 16-bit weight at a time to float32.
_WIDENS = ("avx2", "avx512", "neon", "neon_bf16")


def capabilities() -> Mapping[str, Any]:
    """Returns a mapping from PyTorch's names of facts about this CPU, such as ``avx512_bf16``, to their values. The
    mapping has only five facts if torch has no ``cpu.get_capabilities``."""
    if (found := getattr(torch.cpu, "get_capabilities", None)) is not None:
        return found()
    asked = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported",
             "amx_fp16": "_is_amx_fp16_supported", "avx512_f": "_is_avx512_supported",
             "avx2": "_is_avx2_supported"}  # fmt: skip
    return {name: bool(getattr(torch.cpu, function, bool)()) for name, function in asked.items()}


def _limit() -> str:
    """Returns the instruction set to which the environment limits oneDNN; "" if the environment names none of
    ``_LIMITS``."""
    name = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return name.upper() if name.upper() in _LIMITS else ""


def _is_forbidden(least: str) -> bool:
    """Returns whether the environment limits oneDNN to an instruction set before ``least`` in ``_LIMITS``."""
    limit = _limit()
    return bool(limit) and _LIMITS.index(limit) < _LIMITS.index(least)


def _onednn_multiplies(check: str) -> bool:
    """Returns the answer of PyTorch's function ``check``: whether oneDNN multiplies matrices of a dtype. Returns False
    if PyTorch was built without oneDNN."""
    try:
        return bool(getattr(torch.ops.mkldnn, check)())
    except (AttributeError, RuntimeError):  # PyTorch was built without oneDNN
        return False


def multiplies(dtype: torch.dtype) -> bool:
    """Returns whether PyTorch's matrix product of ``dtype`` uses instructions of this CPU that are made for ``dtype``.

    Returns False if the CPU has no instructions made for ``dtype``, if PyTorch has no oneDNN, or if on x86-64
    ONEDNN_MAX_CPU_ISA or DNNL_MAX_CPU_ISA forbids the instructions. For dtypes other than bfloat16 and float16 returns
    True.
    """
    if dtype not in _WANTED:
        return True
    check, least, x86, arm = _WANTED[dtype]
    supported, has = _onednn_multiplies(check), capabilities()
    if not is_x86():
        return supported and any(has.get(name) for name in arm)
    if _is_forbidden(least):
        return False
    return supported and any(has.get(name) for name in x86)


def widened_dtypes() -> frozenset[torch.dtype]:
    """Returns the 16-bit dtypes in which peft_ext's product with a frozen weight replaces PyTorch's product.

    A 16-bit dtype is returned if this CPU has no instructions for PyTorch's product in this dtype, if PyTorch has no
    oneDNN, or if the environment forbids the instructions. peft_ext's product uses instructions for the dtype, or is
    PyTorch's float32 product over one panel of the weight at a time. On the scalar path, and without the native
    library, PyTorch's product stays in use, so the result is empty.
    """
    isa = _native.STATE.isa
    if isa not in (*_WIDENS, *_native.TILE_PATHS):
        return frozenset()
    return frozenset(dtype for dtype in _WANTED if not multiplies(dtype))


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


def compute_dtype() -> torch.dtype:
    """Returns the default compute dtype: bfloat16 where :func:`why_float32` has no reason against it, else float32.

    The reasons for float32: this CPU has no instructions for bfloat16 products, the environment forbids these
    instructions (ONEDNN_MAX_CPU_ISA, DNNL_MAX_CPU_ISA), PyTorch was built without oneDNN, or the kernels of the CPU
    path in use have no bfloat16 instructions.
    """
    return torch.bfloat16 if not why_float32() else torch.float32


def why_float32() -> str:
    """Returns in words why :func:`compute_dtype` returns float32; "" where :func:`compute_dtype` returns bfloat16."""
    if not multiplies(torch.bfloat16):
        _, least, x86, arm = _WANTED[torch.bfloat16]
        if not any(capabilities().get(name) for name in (x86 if is_x86() else arm)):
            by = "this CPU has no"
        else:
            by = "the environment forbids the" if is_x86() and _is_forbidden(least) else "this build of PyTorch has no"
        return f"{by} instructions for bfloat16 products"
    isa = _native.STATE.isa
    if isa == "neon" or (is_x86() and isa not in (*_native.TILE_PATHS, "reference")):
        return f"the CPU path in use, {isa}, has no instructions for bfloat16 products"
    return ""


def instruction_sets() -> list[str]:
    """Returns PyTorch's names of this CPU's instruction sets that decide the speed of a matrix product."""
    has = capabilities()
    names = ("avx2", "fma3", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16",
             "neon", "fp16_arith", "bf16", "sve", "sme")  # fmt: skip
    return [name for name in names if has.get(name)]


def model_facts() -> str:
    """Returns the first processor's model name and stepping, or on Arm its implementer, part and variant, from
    /proc/cpuinfo; the architecture if the file has none of them."""
    facts = []
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                name, _, value = line.partition(":")
                if not line.strip():
                    break
                if name.strip() in ("model name", "stepping", "CPU implementer", "CPU part", "CPU variant"):
                    facts.append(value.strip() if name.strip() == "model name" else f"{name.strip()} {value.strip()}")
    except OSError:
        pass
    return ", ".join(facts) or platform.machine()
