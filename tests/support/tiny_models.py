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

CLASSES = 3
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Sizes:
    """Of a model and its batch. ``hidden`` and ``inner`` are multiples of 64, a block of NF4, where bitsandbytes'
    kernels are to take them; a token goes to ``active`` of the ``experts``."""

    hidden: int = 64
    inner: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2  # fewer keys than queries: a narrow k_proj and v_proj
    head_dim: int = 32  # where an architecture has it apart from hidden / heads
    vocab: int = 128
    experts: int = 2
    active: int = 2  # of two both: a choice may flip with a rounding
    smooth: bool = False  # no ReLU, whose side a rounding may choose
    batch: int = 8
    length: int = 9

    @property
    def spread(self) -> float:
        """The deviation of a weight whose product keeps its input's size, so that every layer counts in the logits."""
        return self.hidden**-0.5

    @property
    def activation(self) -> str:
        return "gelu" if self.smooth else "relu"

    @property
    def body(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "initializer_range": self.spread,
        }  # fmt: skip

    @property
    def encoder(self) -> dict[str, Any]:
        return {**self.body, "intermediate_size": self.inner, "vocab_size": self.vocab}

    @property
    def decoder(self) -> dict[str, Any]:
        return {**self.encoder, **_SPECIAL}

    @property
    def grouped(self) -> dict[str, Any]:
        return {**self.decoder, "num_key_value_heads": self.kv_heads}

    @property
    def vision(self) -> dict[str, Any]:
        return {**self.body, "intermediate_size": self.inner, "image_size": 8, "patch_size": 4}

    def tokens(self, length: Optional[int] = None) -> Tensor:
        length = self.length if length is None else length
        return torch.randint(3, self.vocab, (self.batch, length), generator=torch.Generator().manual_seed(5))

    def fewer_tokens(self) -> Tensor:
        """What a decoder is to say of an encoder's tokens."""
        return self.tokens(max(2, self.length - 3))

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=torch.Generator().manual_seed(6))

    def text(self) -> dict[str, Tensor]:
        """Every second sequence is three tokens shorter, padded on the left."""
        mask = torch.ones(self.batch, self.length, dtype=torch.long)
        mask[1::2, : min(3, self.length - 1)] = 0
        return {"input_ids": self.tokens(), "attention_mask": mask}

    def unpadded(self) -> dict[str, Tensor]:
        return {"input_ids": self.tokens()}

    def images(self) -> dict[str, Tensor]:
        return {"pixel_values": self.numbers(3, 8, 8)}

    def classes(self) -> Tensor:
        return torch.arange(self.batch) % CLASSES


@dataclass(frozen=True)
class Architecture:
    """How to make a model, what to give it and what of it to adapt.

    ``inputs`` without labels are also what it generates from; ``lora``, ``dora`` (``lora`` where None) and ``ia3`` are
    arguments of PEFT's configurations, empty for the list of layers that PEFT has for the architecture. ``labels`` is
    None where the model has a loss of its own or none at all.
    """

    model: type[hf.PreTrainedModel]
    config: hf.PretrainedConfig
    inputs: Callable[[], dict[str, Any]]
    labels: Optional[Callable[[], Tensor]]
    task: Optional[TaskType] = TaskType.CAUSAL_LM
    lora: dict[str, Any] = field(default_factory=lambda: {"target_modules": "all-linear"})
    dora: Optional[dict[str, Any]] = None
    ia3: dict[str, Any] = field(default_factory=dict)

    @property
    def generates(self) -> bool:
        return self.model.can_generate()

    def build(self, seed: int = 1) -> hf.PreTrainedModel:
        """The model, with the same weights each time; biases and norms, which start at 0 and 1, as after training."""
        torch.manual_seed(seed)
        model = self.model(copy.deepcopy(self.config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
        return model

    def batch(self) -> dict[str, Any]:
        return {**self.inputs(), **({} if self.labels is None else {"labels": self.labels()})}

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


def _decoder(s: Sizes, model: type, config: hf.PretrainedConfig, **options: Any) -> Architecture:
    return Architecture(model, config, **{"inputs": s.text, "labels": s.tokens, **options})


def _classifier(s: Sizes, model: type, config: hf.PretrainedConfig, **options: Any) -> Architecture:
    config.num_labels = CLASSES
    return Architecture(model, config, s.text, s.classes, TaskType.SEQ_CLS, **options)


def _seq2seq(s: Sizes, model: type, config: hf.PretrainedConfig, **options: Any) -> Architecture:
    return Architecture(model, config, s.text, s.fewer_tokens, TaskType.SEQ_2_SEQ_LM, **options)


def _vision(s: Sizes, model: type, config: hf.PretrainedConfig, **options: Any) -> Architecture:
    config.num_labels = CLASSES
    return Architecture(model, config, s.images, s.classes, None, **options)


def _ia3(keys: list[str], feedforward: list[str]) -> dict[str, Any]:
    return {"ia3": {"target_modules": [*keys, *feedforward], "feedforward_modules": feedforward}}


_LLAMA_IA3 = _ia3(["k_proj", "v_proj"], ["down_proj"])
_FC_IA3 = _ia3(["k_proj", "v_proj"], ["fc2"])


def _falcon(s: Sizes, ia3: Optional[dict[str, Any]] = None, **options: Any) -> Architecture:
    config = hf.FalconConfig(**s.body, **_SPECIAL, vocab_size=s.vocab, **options)
    return _decoder(s, hf.FalconForCausalLM, config, ia3=ia3 or {})


def _bart(s: Sizes) -> dict[str, Any]:
    return {
        "d_model": s.hidden, "encoder_layers": s.layers, "decoder_layers": s.layers, "encoder_attention_heads": s.heads,
        "decoder_attention_heads": s.heads, "encoder_ffn_dim": s.inner, "decoder_ffn_dim": s.inner,
        "vocab_size": s.vocab, "decoder_start_token_id": 1, "init_std": s.spread, **_SPECIAL,
    }  # fmt: skip


# What is tested one by one.
_TESTED: dict[str, Callable[[Sizes], Architecture]] = {
    "Llama": lambda s: _decoder(s, hf.LlamaForCausalLM, hf.LlamaConfig(**s.grouped)),
    "Qwen2": lambda s: _decoder(s, hf.Qwen2ForCausalLM, hf.Qwen2Config(**s.grouped)),
    "Qwen3": lambda s: _decoder(s, hf.Qwen3ForCausalLM, hf.Qwen3Config(**s.grouped, head_dim=s.head_dim)),
    "Mistral": lambda s: _decoder(s, hf.MistralForCausalLM, hf.MistralConfig(**s.grouped, sliding_window=4)),
    "Gemma2": lambda s: _decoder(s, hf.Gemma2ForCausalLM, hf.Gemma2Config(**s.grouped, head_dim=s.head_dim)),
    "Gemma3": lambda s: _decoder(s, hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**s.grouped, head_dim=s.head_dim)),
    "Phi": lambda s: _decoder(s, hf.PhiForCausalLM, hf.PhiConfig(**s.decoder, resid_pdrop=0.1)),
    "Phi3": lambda s: _decoder(
        s, hf.Phi3ForCausalLM, hf.Phi3Config(**s.grouped, resid_pdrop=0.1), **_ia3(["qkv_proj"], ["down_proj"])
    ),
    "GPT-2": lambda s: _decoder(
        s, hf.GPT2LMHeadModel,
        hf.GPT2Config(
            n_embd=s.hidden, n_layer=s.layers, n_head=s.heads, vocab_size=s.vocab, n_positions=32,
            initializer_range=s.spread, **_SPECIAL,
        ),
    ),
    "Falcon": lambda s: _falcon(s, bias=True, hidden_dropout=0.1),
    # Without a bias and without dropout nothing stands between a layer and the sum, which Falcon makes in place; IA3
    # scales what goes into it.
    "Falcon-7B": lambda s: _falcon(s, bias=False, **_ia3(["query_key_value", "dense_4h_to_h"], [])),
    "Falcon-40B": lambda s: _falcon(s, bias=False, new_decoder_architecture=True, num_kv_heads=s.kv_heads),
    "OPT": lambda s: _decoder(
        s, hf.OPTForCausalLM,
        hf.OPTConfig(
            hidden_size=s.hidden, num_hidden_layers=s.layers, num_attention_heads=s.heads, **_SPECIAL, ffn_dim=s.inner,
            word_embed_proj_dim=32, vocab_size=s.vocab, max_position_embeddings=32, init_std=s.spread,
            activation_function=s.activation,
        ),
    ),
    "GPT-NeoX": lambda s: _decoder(s, hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**s.decoder)),
    "Cohere": lambda s: _decoder(s, hf.CohereForCausalLM, hf.CohereConfig(**s.grouped), **_LLAMA_IA3),
    "Cohere2": lambda s: _decoder(
        s, hf.Cohere2ForCausalLM, hf.Cohere2Config(**s.grouped, sliding_window=4), **_LLAMA_IA3
    ),
    # A token goes to one expert of two, whose choice a rounding may flip, or to the one that there is; the second layer
    # is dense, and the routed sum is added in place to what the shared expert returns.
    "Llama4": lambda s: _decoder(
        s, hf.Llama4ForCausalLM,
        hf.Llama4TextConfig(
            **s.grouped, intermediate_size_mlp=s.inner, head_dim=s.head_dim, moe_layers=[0], attention_chunk_size=4,
            num_local_experts=1 if s.experts == s.active else s.experts, num_experts_per_tok=1,
        ),
        lora={"target_modules": [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]},
        **_ia3(["k_proj", "v_proj", "down_proj"], []),
    ),
    "BERT": lambda s: _classifier(s, hf.BertForSequenceClassification, hf.BertConfig(**s.encoder)),
    "RoBERTa": lambda s: _classifier(s, hf.RobertaForSequenceClassification, hf.RobertaConfig(**s.encoder)),
    "T5": lambda s: _seq2seq(
        s, hf.T5ForConditionalGeneration,
        hf.T5Config(
            d_model=s.hidden, d_kv=16, d_ff=s.inner, num_layers=s.layers, num_heads=s.heads, vocab_size=s.vocab,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, feed_forward_proj=s.activation,
        ),
    ),
    "ViT": lambda s: _vision(
        s, hf.ViTForImageClassification, hf.ViTConfig(**s.vision, hidden_dropout_prob=0.1),
        lora={"target_modules": [*_ATTENTION, "fc1", "fc2"], "modules_to_save": ["classifier"]},
        **_FC_IA3,
    ),
    "Whisper": lambda s: Architecture(
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig(
            **_bart(s), num_mel_bins=8, max_source_positions=12, max_target_positions=32, dropout=0.1,
            suppress_tokens=None, begin_suppress_tokens=None,
        ),
        inputs=lambda: {"input_features": s.numbers(8, 24)}, labels=s.fewer_tokens, task=None,
        **_FC_IA3,
    ),
    "Mixtral": lambda s: _decoder(
        s, hf.MixtralForCausalLM,
        hf.MixtralConfig(**s.grouped, num_local_experts=s.experts, num_experts_per_tok=s.active),
        lora={
            "target_modules": _ATTENTION,
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
        dora={"target_modules": _ATTENTION},  # PEFT has none of an expert's weights
    ),
}  # fmt: skip


def _positions(s: Sizes) -> dict[str, Any]:
    return {"max_position_embeddings": 32}


# What the model fuzzer draws from beside them; its target modules are its own.
_MORE: dict[str, Callable[[Sizes], Architecture]] = {
    "Gemma": lambda s: _decoder(s, hf.GemmaForCausalLM, hf.GemmaConfig(**s.grouped, head_dim=s.head_dim)),
    "GPT-J": lambda s: _decoder(
        s, hf.GPTJForCausalLM,
        hf.GPTJConfig(n_embd=s.hidden, n_layer=s.layers, n_head=s.heads, rotary_dim=4, vocab_size=s.vocab,
                      n_positions=32, initializer_range=s.spread, **_SPECIAL),
    ),
    "GPT-Neo": lambda s: _decoder(
        s, hf.GPTNeoForCausalLM,
        hf.GPTNeoConfig(hidden_size=s.hidden, num_layers=s.layers, num_heads=s.heads, intermediate_size=s.inner,
                        attention_types=[[["global", "local"][: s.layers], 1]], vocab_size=s.vocab, window_size=4,
                        max_position_embeddings=32, initializer_range=s.spread, **_SPECIAL),
    ),
    "CodeGen": lambda s: _decoder(
        s, hf.CodeGenForCausalLM,
        hf.CodeGenConfig(n_embd=s.hidden, n_layer=s.layers, n_head=s.heads, rotary_dim=4, vocab_size=s.vocab,
                         n_positions=32, initializer_range=s.spread, **_SPECIAL),
    ),
    "GPTBigCode": lambda s: _decoder(
        s, hf.GPTBigCodeForCausalLM,
        hf.GPTBigCodeConfig(n_embd=s.hidden, n_layer=s.layers, n_head=s.heads, n_inner=s.inner, vocab_size=s.vocab,
                            n_positions=32, initializer_range=s.spread, **_SPECIAL),
    ),
    "BLOOM": lambda s: _decoder(
        s, hf.BloomForCausalLM,
        hf.BloomConfig(hidden_size=s.hidden, n_layer=s.layers, n_head=s.heads, vocab_size=s.vocab,
                       initializer_range=s.spread, **_SPECIAL),
    ),
    "MPT": lambda s: _decoder(
        s, hf.MptForCausalLM,
        hf.MptConfig(d_model=s.hidden, n_layers=s.layers, n_heads=s.heads, expansion_ratio=2, vocab_size=s.vocab,
                     max_seq_len=32, initializer_range=s.spread, **_SPECIAL),
    ),
    "DeepSeek-V2": lambda s: _decoder(
        s, hf.DeepseekV2ForCausalLM,
        hf.DeepseekV2Config(**s.decoder, num_key_value_heads=s.heads, kv_lora_rank=16, q_lora_rank=24, head_dim=8,
                            qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, moe_intermediate_size=s.inner,
                            n_routed_experts=s.experts, num_experts_per_tok=s.active, n_shared_experts=1,
                            first_k_dense_replace=s.layers - 1),
    ),
    "DeepSeek-V3": lambda s: _decoder(
        s, hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config(**s.decoder, num_key_value_heads=s.heads, kv_lora_rank=16, q_lora_rank=24,
                            qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, moe_intermediate_size=s.inner,
                            n_routed_experts=s.experts, num_experts_per_tok=s.active, n_group=1, topk_group=1,
                            first_k_dense_replace=s.layers - 1),
    ),
    "OLMo": lambda s: _decoder(s, hf.OlmoForCausalLM, hf.OlmoConfig(**s.grouped, clip_qkv=2.0)),
    "OLMo2": lambda s: _decoder(s, hf.Olmo2ForCausalLM, hf.Olmo2Config(**s.grouped)),
    "OLMoE": lambda s: _decoder(
        s, hf.OlmoeForCausalLM, hf.OlmoeConfig(**s.grouped, num_experts=s.experts, num_experts_per_tok=s.active)
    ),
    "StableLM": lambda s: _decoder(
        s, hf.StableLmForCausalLM, hf.StableLmConfig(**s.grouped, use_parallel_residual=True, qk_layernorm=True)
    ),
    "gpt-oss": lambda s: _decoder(
        s, hf.GptOssForCausalLM,
        hf.GptOssConfig(**s.grouped, head_dim=s.head_dim, num_local_experts=s.experts, num_experts_per_tok=s.active,
                        sliding_window=4),
    ),
    "Granite": lambda s: _decoder(
        s, hf.GraniteForCausalLM, hf.GraniteConfig(**s.grouped, residual_multiplier=0.5, logits_scaling=2.0)
    ),
    "GraniteMoE": lambda s: _decoder(
        s, hf.GraniteMoeForCausalLM,
        hf.GraniteMoeConfig(**s.grouped, num_local_experts=s.experts, num_experts_per_tok=s.active),
    ),
    "Starcoder2": lambda s: _decoder(s, hf.Starcoder2ForCausalLM, hf.Starcoder2Config(**s.grouped)),
    "GLM": lambda s: _decoder(s, hf.GlmForCausalLM, hf.GlmConfig(**s.grouped, head_dim=s.head_dim)),
    "GLM4": lambda s: _decoder(s, hf.Glm4ForCausalLM, hf.Glm4Config(**s.grouped, head_dim=s.head_dim)),
    "Nemotron": lambda s: _decoder(s, hf.NemotronForCausalLM, hf.NemotronConfig(**s.grouped)),
    "Persimmon": lambda s: _decoder(s, hf.PersimmonForCausalLM, hf.PersimmonConfig(**s.decoder)),
    "SmolLM3": lambda s: _decoder(s, hf.SmolLM3ForCausalLM, hf.SmolLM3Config(**s.grouped)),
    "Qwen2-MoE": lambda s: _decoder(
        s, hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig(**s.grouped, moe_intermediate_size=s.inner, shared_expert_intermediate_size=s.inner,
                          num_experts=s.experts, num_experts_per_tok=s.active),
    ),
    "Qwen3-MoE": lambda s: _decoder(
        s, hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig(**s.grouped, head_dim=s.head_dim, moe_intermediate_size=s.inner, num_experts=s.experts,
                          num_experts_per_tok=s.active),
    ),
    "Exaone4": lambda s: _decoder(s, hf.Exaone4ForCausalLM, hf.Exaone4Config(**s.grouped, sliding_window=4)),
    "Helium": lambda s: _decoder(s, hf.HeliumForCausalLM, hf.HeliumConfig(**s.grouped, head_dim=s.hidden // s.heads)),
    "XGLM": lambda s: _decoder(
        s, hf.XGLMForCausalLM,
        hf.XGLMConfig(d_model=s.hidden, num_layers=s.layers, attention_heads=s.heads, ffn_dim=s.inner,
                      vocab_size=s.vocab, max_position_embeddings=32, init_std=s.spread, **_SPECIAL),
    ),
    "Mamba": lambda s: _decoder(
        s, hf.MambaForCausalLM,
        hf.MambaConfig(hidden_size=s.hidden, state_size=4, num_hidden_layers=s.layers, vocab_size=s.vocab,
                       time_step_rank=4, **_SPECIAL),
        inputs=s.unpadded,
    ),
    "DistilBERT": lambda s: _classifier(
        s, hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig(vocab_size=s.vocab, max_position_embeddings=32, n_layers=s.layers, n_heads=s.heads,
                            dim=s.hidden, hidden_dim=s.inner, initializer_range=s.spread, pad_token_id=0),
    ),
    "ELECTRA": lambda s: _classifier(
        s, hf.ElectraForSequenceClassification, hf.ElectraConfig(**s.encoder, embedding_size=24)
    ),
    "ALBERT": lambda s: _classifier(  # its layers are one, called again and again
        s, hf.AlbertForSequenceClassification, hf.AlbertConfig(**s.encoder, embedding_size=24)
    ),
    "DeBERTa-v2": lambda s: _classifier(
        s, hf.DebertaV2ForSequenceClassification,
        hf.DebertaV2Config(**s.encoder, max_position_embeddings=32, relative_attention=True, position_buckets=8,
                           pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True),
    ),
    "MPNet": lambda s: _classifier(s, hf.MPNetForSequenceClassification, hf.MPNetConfig(**s.encoder)),
    "ModernBERT": lambda s: _classifier(
        s, hf.ModernBertForSequenceClassification,
        hf.ModernBertConfig(**s.decoder, local_attention=4, global_attn_every_n_layers=2, cls_token_id=1,
                            sep_token_id=2),
    ),
    "BART": lambda s: _seq2seq(s, hf.BartForConditionalGeneration, hf.BartConfig(**_bart(s), **_positions(s))),
    "mBART": lambda s: _seq2seq(s, hf.MBartForConditionalGeneration, hf.MBartConfig(**_bart(s), **_positions(s))),
    "Pegasus": lambda s: _seq2seq(
        s, hf.PegasusForConditionalGeneration,
        hf.PegasusConfig(**_bart(s), **_positions(s), activation_function=s.activation),
    ),
    "Marian": lambda s: _seq2seq(s, hf.MarianMTModel, hf.MarianConfig(**_bart(s), **_positions(s))),
    "DeiT": lambda s: _vision(s, hf.DeiTForImageClassification, hf.DeiTConfig(**s.vision)),
    "BEiT": lambda s: _vision(
        s, hf.BeitForImageClassification, hf.BeitConfig(**s.vision, use_relative_position_bias=True)
    ),
    "DINOv2": lambda s: _vision(
        s, hf.Dinov2ForImageClassification,
        hf.Dinov2Config(**{**s.vision, "mlp_ratio": 2}),
    ),
    "Swin": lambda s: _vision(
        s, hf.SwinForImageClassification,
        hf.SwinConfig(image_size=8, patch_size=2, embed_dim=s.hidden // 2, depths=[1, 1], num_heads=[2, 2],
                      window_size=2, initializer_range=s.spread),
    ),
    "CLIP": lambda s: Architecture(
        hf.CLIPModel,
        hf.CLIPConfig(
            text_config={**s.decoder, "max_position_embeddings": 32, "projection_dim": 24},
            vision_config={**s.vision, "projection_dim": 24}, projection_dim=24,
        ),
        inputs=lambda: {**s.text(), **s.images(), "return_loss": True}, labels=None, task=None,
    ),
    "SigLIP": lambda s: Architecture(
        hf.SiglipModel,
        hf.SiglipConfig(text_config={**s.decoder, "max_position_embeddings": 32, "projection_size": s.hidden},
                        vision_config=s.vision),
        inputs=lambda: {"input_ids": s.tokens(), **s.images(), "return_loss": True}, labels=None, task=None,
    ),
}  # fmt: skip

FAMILIES = (*_TESTED, *_MORE)


def architecture(name: str, sizes: Optional[Sizes] = None) -> Architecture:
    """Of one of ``FAMILIES``, in these sizes."""
    make = _TESTED[name] if name in _TESTED else _MORE[name]
    return make(Sizes() if sizes is None else sizes)


_DEFAULT = Sizes()
BATCH, HIDDEN, LAYERS = _DEFAULT.batch, _DEFAULT.hidden, _DEFAULT.layers
ARCHITECTURES = {name: architecture(name) for name in _TESTED}
