"""Modules that hold the state of an adapted or quantized layer; the arithmetic is in ``peft_ext.ops``."""

from .lora import LoRALinear
from .nf4 import NF4Linear

__all__ = ["LoRALinear", "NF4Linear"]
