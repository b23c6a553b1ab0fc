"""The reference implementations of the operators of ``peft_ext.ops``, in plain PyTorch.

The operators run the reference where there is no kernel. The tests compare the kernels with the reference in float64.
The reference does not import ``peft_ext.ops``.
"""

from .activations import activation, activation_backward, gated_activation, gated_activation_backward
from .attention import scaled_dot_product_attention, scaled_dot_product_attention_backward
from .bottleneck import bottleneck_adapter, bottleneck_adapter_backward
from .cross_entropy import linear_cross_entropy
from .dora import dora_linear, dora_linear_backward, dora_weight_norm, dora_weight_norm_backward
from .dropouts import dropout
from .embedding import lora_embedding, lora_embedding_backward
from .experts import dora_experts, dora_experts_weight_norm, lora_experts
from .float8 import float8_linear
from .gated_lora import gated_lora_linear, gated_lora_linear_backward
from .grouped_lora import grouped_lora_linear
from .ia3 import ia3_linear, ia3_linear_backward, ia3_scale, ia3_scale_backward
from .lora import lora_linear, lora_linear_backward, lora_residual, lora_residual_backward
from .nf4 import dynamic_code, frozen_linear, nf4_code, nf4_dequantize, nf4_linear, nf4_quantize
from .norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from .philox import dropout_keep_mask
from .rotary import rotary_embedding, rotary_embedding_backward
from .siblings import lora_linears

__all__ = [
    "activation",
    "activation_backward",
    "bottleneck_adapter",
    "bottleneck_adapter_backward",
    "dora_experts",
    "dora_experts_weight_norm",
    "dora_linear",
    "dora_linear_backward",
    "dora_weight_norm",
    "dora_weight_norm_backward",
    "dropout",
    "dropout_keep_mask",
    "dynamic_code",
    "float8_linear",
    "frozen_linear",
    "gated_activation",
    "gated_activation_backward",
    "gated_lora_linear",
    "gated_lora_linear_backward",
    "grouped_lora_linear",
    "ia3_linear",
    "ia3_linear_backward",
    "ia3_scale",
    "ia3_scale_backward",
    "layer_norm",
    "layer_norm_backward",
    "linear_cross_entropy",
    "lora_embedding",
    "lora_embedding_backward",
    "lora_linear",
    "lora_linear_backward",
    "lora_experts",
    "lora_linears",
    "lora_residual",
    "lora_residual_backward",
    "nf4_code",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "rms_norm",
    "rms_norm_backward",
    "rotary_embedding",
    "rotary_embedding_backward",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_backward",
]
