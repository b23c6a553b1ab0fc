"""Modules that hold the state of an adapted or quantized layer; the arithmetic is in ``peft_ext.ops``."""

from .adalora import AdaLoRALinear
from .dora import DoRALinear
from .ia3 import IA3Linear
from .lora import LoRALinear
from .nf4 import NF4Linear

__all__ = ["AdaLoRALinear", "DoRALinear", "IA3Linear", "LoRALinear", "NF4Linear"]
