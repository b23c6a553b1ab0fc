"""The timer of ``peft-ext bench`` and of the project's own benchmarks.

timer.py computes the errors of contenders against float64, then times all contenders in turn. layer.py compares one
adapted layer of peft_ext with the layers of PEFT and bitsandbytes.
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
