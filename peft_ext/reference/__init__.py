"""The operations in plain PyTorch, for any float dtype: fallback, oracle and baseline.

In float64 these are the oracle that every kernel is tested against. Nothing here calls ``peft_ext.ops``.
"""

from .lora import lora_linear, lora_linear_backward
from .nf4 import dynamic_code, nf4_code, nf4_dequantize, nf4_linear, nf4_quantize
from .philox import dropout_keep_mask

__all__ = [
    "dropout_keep_mask",
    "dynamic_code",
    "lora_linear",
    "lora_linear_backward",
    "nf4_code",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
]
