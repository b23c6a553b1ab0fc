"""Functions that call the operators of peft_ext, and that also run under ``torch.compile(fullgraph=True)``.

The frozen weight of a linear layer is a dense Tensor ``[N, K]`` (of experts: ``[E, N, K]``) or a PackedWeight such as
:class:`peft_ext.NF4Weight`. The docstring of a function names the dtypes for which there are kernels. For float64
operands, the functions run the reference, in plain PyTorch; ``nf4_quantize`` and ``nf4_merge`` convert float64 to
float32.
"""

from . import decoder_layer  # noqa: F401  declares an operator without a public function
from .activations import activation, gated_activation
from .attention import scaled_dot_product_attention
from .bottleneck import bottleneck_adapter
from .cross_entropy import linear_cross_entropy
from .dora import dora_linear, dora_weight_norm
from .dropouts import dropout
from .embedding import lora_embedding
from .experts import dora_experts, dora_experts_weight_norm, experts_linear, lora_experts
from .gated_lora import gated_lora_linear
from .grouped_lora import grouped_lora_linear
from .ia3 import ia3_linear, ia3_scale
from .lora import lora_linear, lora_residual
from .nf4 import frozen_linear, nf4_dequantize, nf4_linear, nf4_merge, nf4_quantize
from .norm import layer_norm, rms_norm
from .rotary import rotary_embedding
from .siblings import lora_linears

__all__ = [
    "activation",
    "bottleneck_adapter",
    "dora_experts",
    "dora_experts_weight_norm",
    "dora_linear",
    "dora_weight_norm",
    "dropout",
    "experts_linear",
    "frozen_linear",
    "gated_activation",
    "gated_lora_linear",
    "grouped_lora_linear",
    "ia3_linear",
    "ia3_scale",
    "layer_norm",
    "linear_cross_entropy",
    "lora_embedding",
    "lora_linear",
    "lora_experts",
    "lora_linears",
    "lora_residual",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_merge",
    "nf4_quantize",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
]
