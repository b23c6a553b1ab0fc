"""Finds the processor's name and the installed versions of packages, for reports, and the memory of a device."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Optional

import torch

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


def cpu_name() -> str:
    """Returns the processor's model name, or its architecture where the name is unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of the ``packages`` that are installed; without arguments, of the packages that a training
    run uses."""
    found = {}
    for name in packages or _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def memory_of(device: Any) -> tuple[Optional[int], Optional[int], int]:
    """Returns three numbers of bytes: the device's memory, its free memory, and the memory that this process uses (0 on
    a GPU). On a CPU, the memory limit of a container bounds the device's memory and the free memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return total, free, 0
    import psutil  # psutil is a dependency of the accelerate library

    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in _container_limits():  # psutil does not see the memory limit of a container
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free, psutil.Process().memory_info().rss


def _container_limits() -> Iterator[tuple[int, int]]:
    root = Path("/sys/fs/cgroup")
    first, second = root / "memory", root  # folders of the files of cgroup version 1 and of cgroup version 2
    for limit, used in (
        (first / "memory.limit_in_bytes", first / "memory.usage_in_bytes"),
        (second / "memory.max", second / "memory.current"),
    ):
        # The file with a limit may not exist, or may contain "max" instead of a number.
        with contextlib.suppress(OSError, ValueError):
            yield int(limit.read_text()), int(used.read_text())
