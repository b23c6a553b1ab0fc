"""Tiny models, and their logits, for tests of calls with few tokens without a gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import peft_ext
from peft_ext.integrations.model_blocks import attention, block, decoder_layer

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 199, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "max_position_embeddings": 64}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "Qwen 2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "Qwen 3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=48)),
    "OLMo 2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**SIZES)),
    "OLMo 3, window": lambda: hf.Olmo3ForCausalLM(
        hf.Olmo3Config(**SIZES, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    ),
    "Gemma 3, window": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**SIZES, head_dim=48, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    ),
    "Mistral, window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=5)),
    "Qwen 3, window": lambda: hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**SIZES, head_dim=48, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
}
METHODS = ("LoRA", "NF4", "NF4, LoRA", "DoRA", "NF4, two adapters", "two adapters")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03}
PROMPT, STEPS = 9, 4


def build(name: str = "Llama", method: str = "NF4, LoRA", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model: Any = MODELS[name]().to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, parameter.shape[1] ** -0.5)
    if "NF4" in method:
        peft_ext.quantize_nf4(model, progress=False)
    if "MXFP4" in method:
        peft_ext.quantize_packed(model, "mxfp4")
    if method != "NF4":
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora="DoRA" in method,
                            lora_dropout=0.1)  # fmt: skip
        model = get_peft_model(model, config)
        if "two" in method:
            model.add_adapter("other", config)
            model.base_model.set_adapter(["default", "other"])
    return model.requires_grad_(False).eval()


def batch(size: int) -> dict[str, Tensor]:
    ids = torch.arange(3, 3 + size * PROMPT).view(size, PROMPT)
    mask = torch.ones_like(ids)
    for row in range(size - 1):
        mask[row, : 2 * row + 1] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: nn.Module, size: int = 1, steps: int = STEPS, **more: Any) -> Tensor:
    """Returns the logits of ``steps`` tokens behind a prompt; the tokens do not depend on the model."""
    out = model.generate(**batch(size), max_new_tokens=steps + 1, min_new_tokens=steps + 1, do_sample=False,
                         output_logits=True, return_dict_in_generate=True, prefix_allowed_tokens_fn=_token,
                         **more)  # fmt: skip
    return torch.stack(out.logits)


def _token(row: int, ids: Tensor) -> list[int]:
    return [(7 * len(ids) + row) % 190 + 3]


@contextlib.contextmanager
def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        for module in (attention, block, decoder_layer):
            patch.setattr(module, "few_reason", lambda x: "off")
        yield


def inner(model: Any) -> Any:
    return model.base_model.model.model.layers[0]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype] if found.dtype in TOLERANCE else 2e-5
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max(), (found - wanted).abs().max()
