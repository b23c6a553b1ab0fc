"""Makes tiny models with a mixture of experts, one of each known family, with adapters on the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel
from tiers import first
from torch import Tensor, nn

import peft_ext

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
LOCAL = {"intermediate_size": 16, "num_local_experts": 6, "num_experts_per_tok": 2}
QWEN = {"intermediate_size": 16, "moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 16}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "Mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, **LOCAL)),
    "Qwen2-MoE": lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**SIZES, **QWEN, **SHARED)),
    "Qwen3-MoE": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES, **QWEN, head_dim=8)),
    "Qwen3-Next": lambda: hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(
            **SIZES, **QWEN, **SHARED, head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
        )
    ),
    "DeepSeek-V3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 4}, intermediate_size=16, moe_intermediate_size=16, n_routed_experts=8,
            num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
            qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        )
    ),
    "gpt-oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**SIZES, **LOCAL, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    ),
    "OLMoE": lambda: hf.OlmoeForCausalLM(
        hf.OlmoeConfig(**SIZES, intermediate_size=16, num_experts=6, num_experts_per_tok=2)
    ),
    "Granite-MoE": lambda: hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**SIZES, **LOCAL)),
    "Phi-MoE": lambda: hf.PhimoeForCausalLM(
        hf.PhimoeConfig(**SIZES, **LOCAL, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    ),
    "Llama 4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **SIZES, head_dim=8, intermediate_size=16, intermediate_size_mlp=16, num_local_experts=4,
            num_experts_per_tok=1,
        )
    ),
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)
# Other models than these are left to the full tier of tests.
some_models = pytest.mark.parametrize("name", first(MODELS, ("Mixtral", "Qwen3-MoE", "gpt-oss")))


def base(
    name: str = "Qwen3-MoE", dtype: torch.dtype = torch.float32, implementation: str | None = None, seed: int = 0
) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[name]()
    if implementation is not None:
        model.set_experts_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.to(dtype)


def targets(model: nn.Module) -> list[str]:
    found = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    return sorted({".".join(name.split(".")[-3:]) for name in found if name.endswith("_proj")})


def adapt_config(**config: Any) -> Any:
    parameters = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "target_parameters": parameters,
                         "init_lora_weights": False, **config})  # fmt: skip


def adapt(model: nn.Module, autocast_adapter_dtype: bool = True, **config: Any) -> PeftModel:
    torch.manual_seed(1)
    config = adapt_config(**{"target_parameters": targets(model), **config})
    return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids}


def step(model: nn.Module) -> dict[str, Tensor]:
    """Returns the logits and the gradients by parameter name of a training step from a fixed seed."""
    model.train().zero_grad()
    torch.manual_seed(3)
    out = model(**batch())
    out.loss.backward()
    return {"logits": out.logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype is value.dtype, name
        assert (found[name] - value).norm() <= bound * value.norm() + 1e-9, name


def experts_rows(model: nn.Module) -> list[peft_ext.Row]:
    return [row for row in peft_ext.explain(model).rows if row.name.endswith(("experts", "experts.base_layer"))]


def dequantized(model: nn.Module) -> nn.Module:
    """Returns the model with each weight that quantize_nf4 quantizes replaced by its dequantized values."""
    return peft_ext.dequantize_nf4(peft_ext.quantize_nf4(model))
