"""The timer of ``peft-ext bench`` and of the project's own benchmarks.

timer.py verifies contenders against float64, then times all contenders in turn. layer.py compares one adapted layer of
ours with PEFT's and bitsandbytes'.
"""

from .timer import (
    Clock,
    Contender,
    host_clock,
    interleave,
    median_ratios,
    quartile_ratios,
    relative_error,
    verify,
)

__all__ = [
    "Clock",
    "Contender",
    "host_clock",
    "interleave",
    "median_ratios",
    "quartile_ratios",
    "relative_error",
    "verify",
]
