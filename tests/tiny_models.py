"""Tiny random models of the architectures that people adapt: transformers' own classes, with a batch for each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import transformers as hf
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft_models import spread
from torch import Tensor

VOCAB, CLASSES, LAYERS, HEADS = 128, 3, 2, 4
BATCH = 8
HIDDEN, INNER = 64, 128  # multiples of 64, a block of NF4

_SPREAD = HIDDEN**-0.5  # of a weight whose product keeps its input's size, so that every layer counts in the logits
_SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_ENCODER = {**_SIZES, "intermediate_size": INNER, "vocab_size": VOCAB, "initializer_range": _SPREAD}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_ENCODER, **_SPECIAL}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}  # fewer keys than queries: a narrow k_proj and v_proj
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def _tokens(length: int) -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(5))


def _numbers(*shape: int) -> Tensor:
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(6))


def _mask(length: int) -> Tensor:
    """Every second sequence is three tokens shorter, padded on the left."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1::2, :3] = 0
    return mask


def _text() -> dict[str, Tensor]:
    return {"input_ids": _tokens(9), "attention_mask": _mask(9)}


@dataclass(frozen=True)
class Architecture:
    """How to make a model, what to give it and what of it to adapt.

    ``inputs`` without labels are also what it generates from; ``lora``, ``dora`` (``lora`` where None) and ``ia3`` are
    arguments of PEFT's configurations, empty for the list of layers that PEFT has for the architecture.
    """

    model: type[hf.PreTrainedModel]
    config: hf.PretrainedConfig
    inputs: Callable[[], dict[str, Tensor]] = _text
    labels: Callable[[], Tensor] = lambda: _tokens(9)
    task: Optional[TaskType] = TaskType.CAUSAL_LM
    lora: dict[str, Any] = field(default_factory=lambda: {"target_modules": "all-linear"})
    dora: Optional[dict[str, Any]] = None
    ia3: dict[str, Any] = field(default_factory=dict)

    @property
    def generates(self) -> bool:
        return self.model.can_generate()

    def build(self) -> hf.PreTrainedModel:
        """The model, with the same weights each time; biases and norms, which start at 0 and 1, as after training."""
        torch.manual_seed(1)
        model = self.model(copy.deepcopy(self.config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
        return model

    def batch(self) -> dict[str, Tensor]:
        return {**self.inputs(), "labels": self.labels()}

    def peft_config(self, method: str) -> PeftConfig:
        """A configuration of "LoRA", "DoRA" or "IA3" that starts from weights as after some training."""
        if method == "IA3":
            return IA3Config(task_type=self.task, init_ia3_weights=False, **self.ia3)
        targets = self.dora if method == "DoRA" and self.dora is not None else self.lora
        return LoraConfig(
            task_type=self.task, r=4, lora_alpha=6, use_dora=method == "DoRA", init_lora_weights=False, **targets
        )

    def adapt(self, method: str, model: Optional[hf.PreTrainedModel] = None) -> PeftModel:
        torch.manual_seed(3)
        model = get_peft_model(self.build() if model is None else model, self.peft_config(method))
        spread(model)
        return model.eval()


_CLASSIFIES = {"task": TaskType.SEQ_CLS, "labels": lambda: torch.arange(BATCH) % CLASSES}

ARCHITECTURES = {
    "Llama": Architecture(hf.LlamaForCausalLM, hf.LlamaConfig(**_GROUPED)),
    "Qwen2": Architecture(hf.Qwen2ForCausalLM, hf.Qwen2Config(**_GROUPED)),
    "Qwen3": Architecture(hf.Qwen3ForCausalLM, hf.Qwen3Config(**_GROUPED, head_dim=32)),
    "Mistral": Architecture(hf.MistralForCausalLM, hf.MistralConfig(**_GROUPED, sliding_window=4)),
    "Gemma2": Architecture(hf.Gemma2ForCausalLM, hf.Gemma2Config(**_GROUPED, head_dim=32)),
    "Gemma3": Architecture(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**_GROUPED, head_dim=32)),
    "Phi": Architecture(hf.PhiForCausalLM, hf.PhiConfig(**_DECODER, resid_pdrop=0.1)),
    "Phi3": Architecture(
        hf.Phi3ForCausalLM,
        hf.Phi3Config(**_GROUPED, resid_pdrop=0.1),
        ia3={"target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "GPT-2": Architecture(
        hf.GPT2LMHeadModel,
        hf.GPT2Config(
            n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, vocab_size=VOCAB, n_positions=32, initializer_range=_SPREAD,
            **_SPECIAL,
        ),
    ),
    "Falcon": Architecture(
        hf.FalconForCausalLM,
        hf.FalconConfig(
            **_SIZES, **_SPECIAL, vocab_size=VOCAB, initializer_range=_SPREAD, bias=True, hidden_dropout=0.1
        ),
    ),
    "OPT": Architecture(
        hf.OPTForCausalLM,
        hf.OPTConfig(
            **_SIZES, **_SPECIAL, ffn_dim=INNER, word_embed_proj_dim=32, vocab_size=VOCAB, max_position_embeddings=32,
            init_std=_SPREAD
        ),
    ),
    "BERT": Architecture(
        hf.BertForSequenceClassification, hf.BertConfig(**_ENCODER, num_labels=CLASSES), **_CLASSIFIES
    ),
    "RoBERTa": Architecture(
        hf.RobertaForSequenceClassification, hf.RobertaConfig(**_ENCODER, num_labels=CLASSES), **_CLASSIFIES
    ),
    "T5": Architecture(
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            d_model=HIDDEN, d_kv=16, d_ff=INNER, num_layers=LAYERS, num_heads=HEADS, vocab_size=VOCAB, pad_token_id=0,
            eos_token_id=1, decoder_start_token_id=0,
        ),
        labels=lambda: _tokens(6),
        task=TaskType.SEQ_2_SEQ_LM,
    ),
    "ViT": Architecture(
        hf.ViTForImageClassification,
        hf.ViTConfig(
            **_SIZES, intermediate_size=INNER, image_size=8, patch_size=4, num_labels=CLASSES, hidden_dropout_prob=0.1,
            initializer_range=_SPREAD,
        ),
        inputs=lambda: {"pixel_values": _numbers(3, 8, 8)},
        labels=lambda: torch.arange(BATCH) % CLASSES,
        task=None,
        lora={"target_modules": [*_ATTENTION, "fc1", "fc2"], "modules_to_save": ["classifier"]},
        ia3={"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]},
    ),
    "Whisper": Architecture(
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig(
            d_model=HIDDEN, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, vocab_size=VOCAB,
            num_mel_bins=8, max_source_positions=12, max_target_positions=32, decoder_start_token_id=1, dropout=0.1,
            init_std=_SPREAD, suppress_tokens=None, begin_suppress_tokens=None, **_SPECIAL,
        ),
        inputs=lambda: {"input_features": _numbers(8, 24)},
        labels=lambda: _tokens(6),
        task=None,
        ia3={"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]},
    ),
    "Mixtral": Architecture(
        hf.MixtralForCausalLM,
        hf.MixtralConfig(**_GROUPED, num_local_experts=2),  # each token takes both: a choice may flip with a rounding
        lora={
            "target_modules": _ATTENTION,
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
        dora={"target_modules": _ATTENTION},  # PEFT has none of an expert's weights
    ),
}  # fmt: skip
