"""Finds the GPUs of the process, and which of them are too old for the kernels.

The library has no kernels for a GPU whose compute capability is less than ``CAPABILITY``. If all GPUs that the process
sees are too old, all operators run the reference on GPUs. If the process sees old and newer GPUs, the families of
kernels are proved on the newer GPUs only, and a Python function in PyTorch's dispatcher, in front of each CUDA kernel,
runs the reference for tensors on an old GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor

__all__ = ["CAPABILITY", "OLD", "capability", "models", "on_old", "too_old", "why_old"]

CAPABILITY = 80  # 10 · major + minor of the compute capability of the oldest GPUs for which the library has kernels

# If the process sees old and newer GPUs, OLD maps the index of each old GPU to the reason why the kernels can't run on
# this GPU; else OLD is empty. The function ``models`` fills OLD.
OLD: dict[int, str] = {}


def models() -> dict[str, torch.device]:
    """Returns a dict that maps the name of each model of GPU that this process sees to one GPU of this model: the
    current GPU if it is of this model, or else the first GPU of this model.

    GPUs with a compute capability below ``CAPABILITY`` are not in the dict and are noted in ``OLD``, unless all GPUs
    have such a compute capability. The function makes no CUDA context. Without a usable GPU, the dict is empty.
    """
    if not torch.cuda.is_available():
        return {}
    here, found = torch.cuda.current_device(), {}
    cards = sorted(range(torch.cuda.device_count()), key=lambda index: index != here)
    old = {index: why for index in cards if (why := too_old(index))}
    if len(old) < len(cards):
        OLD.update(old)
        cards = [index for index in cards if index not in old]
    for index in cards:
        found.setdefault(torch.cuda.get_device_name(index), torch.device("cuda", index))
    return found


def capability(index: int) -> int:
    """Returns 10 · major + minor of a GPU's compute capability."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def too_old(index: int) -> str:
    """Returns why the kernels can't run on a GPU whose compute capability is less than ``CAPABILITY``; "" for any other
    GPU."""
    came = capability(index)
    return "" if came >= CAPABILITY else f"its compute capability is {came / 10}, wanted {CAPABILITY / 10} or more"


def why_old(device: torch.device) -> Optional[str]:
    """Returns why the reference runs on ``device`` although the kernels run on another GPU of this process; None for
    any other device."""
    if not OLD or device.type != "cuda":
        return None
    why = OLD.get(torch.cuda.current_device() if device.index is None else device.index)
    return why and f"the reference runs on {device}, an old GPU beside a newer one: {why}"


def on_old(args: Iterable[Any]) -> bool:
    """Returns whether the first tensor on a GPU in an operator's arguments is on a GPU of ``OLD``."""
    if not OLD:
        return False
    tensors = (value for arg in args for value in (arg if isinstance(arg, (list, tuple)) else [arg])
               if isinstance(value, Tensor) and value.is_cuda)  # fmt: skip
    first = next(tensors, None)
    return first is not None and first.device.index in OLD
