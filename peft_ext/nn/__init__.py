"""PyTorch modules for adapted layers, NF4 and other packed weights, bottleneck adapters and trained virtual tokens.

The adapted and the quantized layers compute with the operators of ``peft_ext.ops``.
"""

from .adalora import AdaLoRALinear
from .bottleneck import BottleneckAdapter
from .dora import DoRALinear
from .experts import NF4Experts
from .float8 import Float8Linear
from .ia3 import IA3Linear
from .lora import LoRALinear
from .nf4 import NF4Linear
from .packed import PackedEmbedding, PackedLinear
from .packed_experts import PackedExperts
from .prefix import PrefixEncoder
from .prompt import PromptEmbedding

__all__ = [
    "AdaLoRALinear",
    "BottleneckAdapter",
    "DoRALinear",
    "Float8Linear",
    "IA3Linear",
    "LoRALinear",
    "NF4Experts",
    "NF4Linear",
    "PackedEmbedding",
    "PackedExperts",
    "PackedLinear",
    "PrefixEncoder",
    "PromptEmbedding",
]
