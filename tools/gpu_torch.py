"""Chooses the torch and the cuda-bindings that tools/gpu.py installs for the driver of this machine."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Optional

# pip's indexes of builds of torch for drivers that are too old for the torch on PyPI. The key is the oldest CUDA
# release that the driver must support for this build, newest first. torch 2.11 and newer on PyPI need a driver for CUDA
# 13.
OLDER_TORCH = {
    (12, 8): "https://download.pytorch.org/whl/cu128",
    (12, 0): "https://download.pytorch.org/whl/cu126",
}
PYPI_CUDA = (13, 0)


def driver_cuda() -> Optional[tuple[int, int]]:
    """Returns the newest CUDA release that NVIDIA's driver supports, such as (12, 4). Returns None without a driver."""
    found = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    except (OSError, AttributeError):
        return None
    return None if failed else (found.value // 1000, found.value % 1000 // 10)


def torch_arguments(driver: Optional[tuple[int, int]]) -> list[str]:
    """Returns pip's arguments for a torch that runs with a driver for the CUDA release ``driver``."""
    index = None
    if driver is not None and driver < PYPI_CUDA:
        index = next((url for release, url in OLDER_TORCH.items() if driver >= release), None)
    return ["torch>=2.11", *(["--index-url", index] if index else [])]


def pip_names(missing: Sequence[str], cuda: Optional[str]) -> list[str]:
    """Returns pip's requirements for the packages ``missing``. The major release of cuda-bindings is that of ``cuda``,
    the CUDA release of torch, because a newer cuda-bindings looks for a newer NVRTC than torch has.
    """
    major = (cuda or "").partition(".")[0]
    return [f"{name}=={major}.*" if name == "cuda-bindings" and major else name for name in missing]
