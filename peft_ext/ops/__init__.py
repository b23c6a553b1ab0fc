"""Functional, autograd-aware operators; each works under ``torch.compile(fullgraph=True)``.

A weight is a dense Tensor ``[N, K]`` or an :class:`peft_ext.NF4Weight`, everywhere.
"""

from .lora import lora_linear
from .nf4 import nf4_dequantize, nf4_linear, nf4_quantize

__all__ = ["lora_linear", "nf4_dequantize", "nf4_linear", "nf4_quantize"]
