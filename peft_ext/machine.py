"""The machine and its packages, as a result's reader needs them to judge a number."""

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
    """Returns the processor's name as it tells it, or its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Returns the installed versions of these packages, by default of those that a training run uses."""
    found = {}
    for name in packages or _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def memory_of(device: Any) -> tuple[Optional[int], Optional[int], int]:
    """Returns the bytes that a device has, that are free, and that this process takes of them already (0 on a GPU)."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return total, free, 0
    import psutil  # accelerate brings it

    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in _container_limits():  # which the machine's own numbers don't show
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free, psutil.Process().memory_info().rss


def _container_limits() -> Iterator[tuple[int, int]]:
    root = Path("/sys/fs/cgroup")
    first, second = root / "memory", root  # of version 1, of version 2
    for limit, used in (
        (first / "memory.limit_in_bytes", first / "memory.usage_in_bytes"),
        (second / "memory.max", second / "memory.current"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            yield int(limit.read_text()), int(used.read_text())
