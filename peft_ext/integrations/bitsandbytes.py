"""NF4Weight to and from bitsandbytes' Params4bit, sharing storage both ways; the format is ``peft_ext.weight``'s."""

from __future__ import annotations

from ..weight import nf4_from_params4bit, params4bit_from_nf4, why_not_nf4

__all__ = ["nf4_from_params4bit", "params4bit_from_nf4", "why_not_nf4"]
