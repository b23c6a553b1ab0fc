"""Tiny random models of commonly adapted architectures, made of transformers' own classes, and a batch for each
model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import transformers as hf
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft_models import spread
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_ext.ops.library import OPERATORS

CLASSES = 3
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and its batch.

    For bitsandbytes' kernels, ``hidden`` and ``inner`` must be multiples of 64, the block size of NF4. In a mixture,
    each token goes to ``active`` of the ``experts`` experts.
    """

    hidden: int = 64
    inner: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2  # Fewer key heads than query heads, so that k_proj and v_proj are narrow.
    head_dim: int = 32  # Used by architectures whose head_dim is independent of hidden / heads.
    vocab: int = 128
    experts: int = 2
    active: int = 2  # Each token goes to both experts: rounding may change which single expert is chosen.
    smooth: bool = False  # Whether activations have no kink; rounding may move an input across the kink of ReLU.
    batch: int = 8
    length: int = 9

    @property
    def spread(self) -> float:
        """The standard deviation of weights with which a product keeps the size of its input, so that every layer
        matters.
        """
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
    def headed(self) -> dict[str, Any]:
        return {**self.grouped, "head_dim": self.head_dim}

    @property
    def gpt(self) -> dict[str, Any]:
        return {
            "n_embd": self.hidden, "n_layer": self.layers, "n_head": self.heads, "vocab_size": self.vocab,
            "n_positions": 32, "initializer_range": self.spread, **_SPECIAL,
        }  # fmt: skip

    @property
    def all_experts(self) -> dict[str, Any]:
        return {"num_experts": self.experts, "num_experts_per_tok": self.active}

    @property
    def local_experts(self) -> dict[str, Any]:
        return {"num_local_experts": self.experts, "num_experts_per_tok": self.active}

    @property
    def deepseek(self) -> dict[str, Any]:
        return {
            **self.decoder, "num_key_value_heads": self.heads, "kv_lora_rank": 16, "q_lora_rank": 24,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": self.inner,
            "n_routed_experts": self.experts, "num_experts_per_tok": self.active, "n_shared_experts": 1,
            "first_k_dense_replace": self.layers - 1,
        }  # fmt: skip

    @property
    def bart(self) -> dict[str, Any]:
        return {
            "d_model": self.hidden, "encoder_layers": self.layers, "decoder_layers": self.layers,
            "encoder_attention_heads": self.heads, "decoder_attention_heads": self.heads, "encoder_ffn_dim": self.inner,
            "decoder_ffn_dim": self.inner, "vocab_size": self.vocab, "decoder_start_token_id": 1,
            "init_std": self.spread, **_SPECIAL,
        }  # fmt: skip

    @property
    def vision(self) -> dict[str, Any]:
        return {**self.body, "intermediate_size": self.inner, "image_size": 8, "patch_size": 4}

    def tokens(self, length: Optional[int] = None) -> Tensor:
        length = self.length if length is None else length
        return torch.randint(3, self.vocab, (self.batch, length), generator=torch.Generator().manual_seed(5))

    def fewer_tokens(self) -> Tensor:
        """Returns a decoder's labels, which are fewer than an encoder's tokens."""
        return self.tokens(max(2, self.length - 3))

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=torch.Generator().manual_seed(6))

    def text(self) -> dict[str, Tensor]:
        """Returns a batch of tokens, in which every second sequence is up to three tokens shorter and padded on the
        left."""
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
    """A recipe for a model, its inputs, and the modules to adapt.

    ``inputs`` makes a batch without labels, which is also used for generation. ``lora``, ``dora`` (None for the value
    of ``lora``) and ``ia3`` are arguments of PEFT's configurations; empty arguments mean PEFT's own list of layers for
    the architecture. ``labels`` is None if the model computes its loss without labels or has no loss.
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
        """Returns the model with random weights of ``seed``, in eval mode. Vectors such as biases and the weights of
        norms get random values too, not 0 and 1."""
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
        """Returns a configuration of "LoRA", "DoRA" or "IA3" with random initial weights, so that the adapter acts."""
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


def _of(stem: str, head: str, sizes: dict[str, Any]) -> tuple[type[hf.PreTrainedModel], hf.PretrainedConfig]:
    """Returns transformers' model class named ``stem`` + ``head``, and a configuration of ``stem`` with the sizes."""
    return getattr(hf, f"{stem}{head}"), getattr(hf, f"{stem}Config")(**sizes)


def _decoder(s: Sizes, stem: str, sizes: dict[str, Any], head: str = "ForCausalLM", **options: Any) -> Architecture:
    return Architecture(*_of(stem, head, sizes), **{"inputs": s.text, "labels": s.tokens, **options})


def _classifier(s: Sizes, stem: str, sizes: dict[str, Any]) -> Architecture:
    model, config = _of(stem, "ForSequenceClassification", sizes)
    config.num_labels = CLASSES
    return Architecture(model, config, s.text, s.classes, TaskType.SEQ_CLS)


def _seq2seq(s: Sizes, stem: str, sizes: dict[str, Any], head: str = "ForConditionalGeneration") -> Architecture:
    return Architecture(*_of(stem, head, sizes), s.text, s.fewer_tokens, TaskType.SEQ_2_SEQ_LM)


def _vision(s: Sizes, stem: str, sizes: dict[str, Any], **options: Any) -> Architecture:
    model, config = _of(stem, "ForImageClassification", sizes)
    config.num_labels = CLASSES
    return Architecture(model, config, s.images, s.classes, None, **options)


def _ia3(keys: list[str], feedforward: list[str]) -> dict[str, Any]:
    return {"ia3": {"target_modules": [*keys, *feedforward], "feedforward_modules": feedforward}}


_LLAMA_IA3 = _ia3(["k_proj", "v_proj"], ["down_proj"])
_FC_IA3 = _ia3(["k_proj", "v_proj"], ["fc2"])


def _falcon(s: Sizes, ia3: Optional[dict[str, Any]] = None, **sizes: Any) -> Architecture:
    return _decoder(s, "Falcon", {**s.body, **_SPECIAL, "vocab_size": s.vocab, **sizes}, ia3=ia3 or {})


# The architectures that tests cover one by one.
_TESTED: dict[str, Callable[[Sizes], Architecture]] = {
    "Llama": lambda s: _decoder(s, "Llama", s.grouped),
    "Qwen2": lambda s: _decoder(s, "Qwen2", s.grouped),
    "Qwen3": lambda s: _decoder(s, "Qwen3", s.headed),
    "Mistral": lambda s: _decoder(s, "Mistral", {**s.grouped, "sliding_window": 4}),
    "Gemma2": lambda s: _decoder(s, "Gemma2", s.headed),
    "Gemma3": lambda s: Architecture(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**s.headed), s.text, s.tokens),
    "Phi": lambda s: _decoder(s, "Phi", {**s.decoder, "resid_pdrop": 0.1}),
    "Phi3": lambda s: _decoder(s, "Phi3", {**s.grouped, "resid_pdrop": 0.1}, **_ia3(["qkv_proj"], ["down_proj"])),
    "GPT-2": lambda s: _decoder(s, "GPT2", s.gpt, "LMHeadModel"),
    "Falcon": lambda s: _falcon(s, bias=True, hidden_dropout=0.1),
    # Falcon adds the attention's output to the MLP's output in place. IA3 scales the output of Falcon's MLP.
    "Falcon-7B": lambda s: _falcon(s, bias=False, **_ia3(["query_key_value", "dense_4h_to_h"], [])),
    "Falcon-40B": lambda s: _falcon(s, bias=False, new_decoder_architecture=True, num_kv_heads=s.kv_heads),
    "OPT": lambda s: _decoder(
        s, "OPT",
        {
            "hidden_size": s.hidden, "num_hidden_layers": s.layers, "num_attention_heads": s.heads, **_SPECIAL,
            "ffn_dim": s.inner, "word_embed_proj_dim": 32, "vocab_size": s.vocab, "max_position_embeddings": 32,
            "init_std": s.spread, "activation_function": s.activation,
        },
    ),
    "GPT-NeoX": lambda s: _decoder(s, "GPTNeoX", s.decoder),
    "Cohere": lambda s: _decoder(s, "Cohere", s.grouped, **_LLAMA_IA3),
    "Cohere2": lambda s: _decoder(s, "Cohere2", {**s.grouped, "sliding_window": 4}, **_LLAMA_IA3),
    # Llama 4 sends each token to one expert, and rounding could change the choice, so by default this model has one
    # expert. The second layer of this Llama 4 is dense. Llama 4 adds the routed sum to the shared expert's output in
    # place.
    "Llama4": lambda s: Architecture(
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig(
            **s.headed, intermediate_size_mlp=s.inner, moe_layers=[0], attention_chunk_size=4,
            num_local_experts=1 if s.experts == s.active else s.experts, num_experts_per_tok=1,
        ),
        s.text, s.tokens,
        lora={"target_modules": [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]},
        **_ia3(["k_proj", "v_proj", "down_proj"], []),
    ),
    "BERT": lambda s: _classifier(s, "Bert", s.encoder),
    "RoBERTa": lambda s: _classifier(s, "Roberta", s.encoder),
    "T5": lambda s: _seq2seq(
        s, "T5",
        {
            "d_model": s.hidden, "d_kv": 16, "d_ff": s.inner, "num_layers": s.layers, "num_heads": s.heads,
            "vocab_size": s.vocab, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
            "feed_forward_proj": s.activation,
        },
    ),
    "ViT": lambda s: _vision(
        s, "ViT", {**s.vision, "hidden_dropout_prob": 0.1},
        lora={"target_modules": [*_ATTENTION, "fc1", "fc2"], "modules_to_save": ["classifier"]},
        **_FC_IA3,
    ),
    "Whisper": lambda s: Architecture(
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig(
            **s.bart, num_mel_bins=8, max_source_positions=12, max_target_positions=32, dropout=0.1,
            suppress_tokens=None, begin_suppress_tokens=None,
        ),
        inputs=lambda: {"input_features": s.numbers(8, 24)}, labels=s.fewer_tokens, task=None,
        **_FC_IA3,
    ),
    "Mixtral": lambda s: _decoder(
        s, "Mixtral", {**s.grouped, **s.local_experts},
        lora={
            "target_modules": _ATTENTION,
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
        dora={"target_modules": _ATTENTION},  # PEFT has no DoRA on experts' parameters
    ),
}  # fmt: skip

_POSITIONS = {"max_position_embeddings": 32}

# More architectures for the model fuzzer, which chooses target modules itself.
_MORE: dict[str, Callable[[Sizes], Architecture]] = {
    "Gemma": lambda s: _decoder(s, "Gemma", s.headed),
    "GPT-J": lambda s: _decoder(s, "GPTJ", {**s.gpt, "rotary_dim": 4}),
    "GPT-Neo": lambda s: _decoder(
        s, "GPTNeo",
        {
            "hidden_size": s.hidden, "num_layers": s.layers, "num_heads": s.heads, "intermediate_size": s.inner,
            "attention_types": [[["global", "local"][: s.layers], 1]], "vocab_size": s.vocab, "window_size": 4,
            **_POSITIONS, "initializer_range": s.spread, **_SPECIAL,
        },
    ),
    "CodeGen": lambda s: _decoder(s, "CodeGen", {**s.gpt, "rotary_dim": 4}),
    "GPTBigCode": lambda s: _decoder(s, "GPTBigCode", {**s.gpt, "n_inner": s.inner}),
    "BLOOM": lambda s: _decoder(
        s, "Bloom",
        {"hidden_size": s.hidden, "n_layer": s.layers, "n_head": s.heads, "vocab_size": s.vocab,
         "initializer_range": s.spread, **_SPECIAL},
    ),
    "MPT": lambda s: _decoder(
        s, "Mpt",
        {"d_model": s.hidden, "n_layers": s.layers, "n_heads": s.heads, "expansion_ratio": 2, "vocab_size": s.vocab,
         "max_seq_len": 32, "initializer_range": s.spread, **_SPECIAL},
    ),
    "DeepSeek-V2": lambda s: _decoder(s, "DeepseekV2", {**s.deepseek, "head_dim": 8}),
    "DeepSeek-V3": lambda s: _decoder(s, "DeepseekV3", {**s.deepseek, "n_group": 1, "topk_group": 1}),
    "OLMo": lambda s: _decoder(s, "Olmo", {**s.grouped, "clip_qkv": 2.0}),
    "OLMo2": lambda s: _decoder(s, "Olmo2", s.grouped),
    "OLMoE": lambda s: _decoder(s, "Olmoe", {**s.grouped, **s.all_experts}),
    "StableLM": lambda s: _decoder(
        s, "StableLm", {**s.grouped, "use_parallel_residual": True, "qk_layernorm": True}
    ),
    "gpt-oss": lambda s: _decoder(s, "GptOss", {**s.headed, **s.local_experts, "sliding_window": 4}),
    "Granite": lambda s: _decoder(s, "Granite", {**s.grouped, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "GraniteMoE": lambda s: _decoder(s, "GraniteMoe", {**s.grouped, **s.local_experts}),
    "Starcoder2": lambda s: _decoder(s, "Starcoder2", s.grouped),
    "GLM": lambda s: _decoder(s, "Glm", s.headed),
    "GLM4": lambda s: _decoder(s, "Glm4", s.headed),
    "Nemotron": lambda s: _decoder(s, "Nemotron", s.grouped),
    "Persimmon": lambda s: _decoder(s, "Persimmon", s.decoder),
    "SmolLM3": lambda s: _decoder(s, "SmolLM3", s.grouped),
    "Qwen2-MoE": lambda s: _decoder(
        s, "Qwen2Moe",
        {**s.grouped, **s.all_experts, "moe_intermediate_size": s.inner, "shared_expert_intermediate_size": s.inner},
    ),
    "Qwen3-MoE": lambda s: _decoder(s, "Qwen3Moe", {**s.headed, **s.all_experts, "moe_intermediate_size": s.inner}),
    "Exaone4": lambda s: _decoder(s, "Exaone4", {**s.grouped, "sliding_window": 4}),
    "Helium": lambda s: _decoder(s, "Helium", {**s.grouped, "head_dim": s.hidden // s.heads}),
    "XGLM": lambda s: _decoder(
        s, "XGLM",
        {"d_model": s.hidden, "num_layers": s.layers, "attention_heads": s.heads, "ffn_dim": s.inner,
         "vocab_size": s.vocab, **_POSITIONS, "init_std": s.spread, **_SPECIAL},
    ),
    "Mamba": lambda s: _decoder(
        s, "Mamba",
        {"hidden_size": s.hidden, "state_size": 4, "num_hidden_layers": s.layers, "vocab_size": s.vocab,
         "time_step_rank": 4, **_SPECIAL},
        inputs=s.unpadded,
    ),
    "DistilBERT": lambda s: _classifier(
        s, "DistilBert",
        {"vocab_size": s.vocab, **_POSITIONS, "n_layers": s.layers, "n_heads": s.heads, "dim": s.hidden,
         "hidden_dim": s.inner, "initializer_range": s.spread, "pad_token_id": 0},
    ),
    "ELECTRA": lambda s: _classifier(s, "Electra", {**s.encoder, "embedding_size": 24}),
    # All layers of ALBERT are one module, which is called several times.
    "ALBERT": lambda s: _classifier(s, "Albert", {**s.encoder, "embedding_size": 24}),
    "DeBERTa-v2": lambda s: _classifier(
        s, "DebertaV2",
        {**s.encoder, **_POSITIONS, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"],
         "norm_rel_ebd": "layer_norm", "share_att_key": True},
    ),
    "MPNet": lambda s: _classifier(s, "MPNet", s.encoder),
    "ModernBERT": lambda s: _classifier(
        s, "ModernBert",
        {**s.decoder, "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "BART": lambda s: _seq2seq(s, "Bart", {**s.bart, **_POSITIONS}),
    "mBART": lambda s: _seq2seq(s, "MBart", {**s.bart, **_POSITIONS}),
    "NLLB-MoE": lambda s: _seq2seq(  # GELU: with few tokens, one input across ReLU's kink changes much
        s, "NllbMoe",
        {**s.bart, **_POSITIONS, "num_experts": s.experts, "encoder_sparse_step": 1, "decoder_sparse_step": 1,
         "expert_capacity": 64, "router_jitter_noise": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
         "moe_token_dropout": 0.0, "attention_dropout": 0.0, "activation_function": "gelu"},
    ),
    "Pegasus": lambda s: _seq2seq(s, "Pegasus", {**s.bart, **_POSITIONS, "activation_function": s.activation}),
    "Marian": lambda s: _seq2seq(s, "Marian", {**s.bart, **_POSITIONS}, "MTModel"),
    "DeiT": lambda s: _vision(s, "DeiT", s.vision),
    "BEiT": lambda s: _vision(s, "Beit", {**s.vision, "use_relative_position_bias": True}),
    "DINOv2": lambda s: _vision(s, "Dinov2", {**s.vision, "mlp_ratio": 2}),
    "Swin": lambda s: _vision(
        s, "Swin",
        {"image_size": 8, "patch_size": 2, "embed_dim": s.hidden // 2, "depths": [1, 1], "num_heads": [2, 2],
         "window_size": 2, "initializer_range": s.spread},
    ),
    "CLIP": lambda s: Architecture(
        hf.CLIPModel,
        hf.CLIPConfig(
            text_config={**s.decoder, **_POSITIONS, "projection_dim": 24},
            vision_config={**s.vision, "projection_dim": 24}, projection_dim=24,
        ),
        inputs=lambda: {**s.text(), **s.images(), "return_loss": True}, labels=None, task=None,
    ),
    "SigLIP": lambda s: Architecture(
        hf.SiglipModel,
        hf.SiglipConfig(text_config={**s.decoder, **_POSITIONS, "projection_size": s.hidden}, vision_config=s.vision),
        inputs=lambda: {"input_ids": s.tokens(), **s.images(), "return_loss": True}, labels=None, task=None,
    ),
}  # fmt: skip

FAMILIES = (*_TESTED, *_MORE)


def architecture(name: str, sizes: Optional[Sizes] = None) -> Architecture:
    """Returns the architecture ``name`` in the given sizes, by default ``Sizes()``."""
    make = _TESTED[name] if name in _TESTED else _MORE[name]
    return make(Sizes() if sizes is None else sizes)


_DEFAULT = Sizes()
BATCH, HIDDEN, LAYERS = _DEFAULT.batch, _DEFAULT.hidden, _DEFAULT.layers
ARCHITECTURES = {name: architecture(name) for name in _TESTED}


# --- a step of a model, and what is compared --------------------------------------------------------------------------

# The results of a training step by name: logits, loss and gradients.
Step = dict[str, Optional[Tensor]]
# Another order of float32 sums of at most 128 terms, through two layers and back, changes a gradient by up to 5e-6 of
# the gradient's norm. A bfloat16 rounding changes a gradient by 2e-3, a missing term of a layer by more than 1e-2.
TOLERANCE = 2e-5


class OperatorCalls(TorchDispatchMode):
    """Counts the calls of peft_ext's operators by name, on this thread, on which the CPU's backward runs too.

    An operator that is composed of other operators is not counted. A call of lora_linears counts one lora_linear for
    each layer, a call of lora_experts counts one lora_linear or dora_linear, a call of gated_lora_linear counts one
    gated_activation and one lora_linear, and a call of decoder_layer counts the seven linear layers in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Optional[dict[str, Any]] = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in ("lora_linears", "lora_linears_backward") and func.namespace == "peft_ext":
            # The backward has a gradient for each layer, and the forward has a scaling for each layer.
            layers = args[0] if name.endswith("_backward") else args[3][::2]
            self.calls[name.replace("linears", "linear")] += sum(layer is not None for layer in layers)
        elif name in ("lora_experts", "lora_experts_backward") and func.namespace == "peft_ext":
            scaled = args[12] is not None  # argument 12 is DoRA's vector of output scales
            self.calls[name.replace("lora_experts", "dora_linear" if scaled else "lora_linear")] += 1
        elif name in ("gated_lora_linear", "gated_lora_linear_backward") and func.namespace == "peft_ext":
            self.calls.update(name.replace("gated_lora_linear", part) for part in ("gated_activation", "lora_linear"))
        elif name == "decoder_layer" and func.namespace == "peft_ext":
            self.calls.update({"decoder_layer": 1, "lora_linear": 7})
        elif func.namespace == "peft_ext" and not OPERATORS[name].composed:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.eval()(**batch).logits


def step(model: nn.Module, batch: dict[str, Tensor]) -> Step:
    """Returns logits, loss and the gradient of each trainable parameter of a training step from a fixed seed."""
    model.train().zero_grad()
    torch.manual_seed(4)
    output = model(**batch)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": output.logits.detach(), "loss": output.loss.detach(), **gradients}


def error_of(actual: Tensor, wanted: Tensor) -> float:
    return ((actual.double() - wanted.double()).norm() / wanted.double().norm()).item()


def assert_close(actual: Any, wanted: Any, tolerance: float = TOLERANCE) -> None:
    """Asserts that ``actual`` and ``wanted`` have equal keys and dtypes, and that each relative error is below
    ``tolerance``. A wanted tensor of norm 0 fails, because it would compare nothing."""
    if isinstance(wanted, Tensor):
        actual, wanted = {"logits": actual}, {"logits": wanted}
    assert actual.keys() == wanted.keys()
    for key, value in wanted.items():
        assert value is not None and actual[key] is not None, f"{key} has no gradient"
        assert value.norm() > 0, f"{key} is zero: nothing was compared"
        assert actual[key].dtype is value.dtype, key
        assert error_of(actual[key], value) < tolerance, f"{key}: {error_of(actual[key], value):.1e} off"
