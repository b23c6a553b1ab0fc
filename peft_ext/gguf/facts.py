"""Reads facts of a GGUF file that change the model's function and that transformers 5.24 does not read from the file.

transformers reads a part of the metadata and fills the other fields of the configuration with the defaults of the
configuration's class. The function :func:`take_facts` puts further values of the file into the configuration, and
raises an error that names the key of a value that the configuration can't express.

Source: the keys that llama.cpp's converter writes (conversion/*.py) and that llama.cpp reads (src/models/*.cpp).
"""

from __future__ import annotations

import math
import re
from collections.abc import Set
from typing import Any, Optional

import torch
from torch import Tensor

from .._imports import required
from .header import GgufHeader

with required("transformers", "a model in a GGUF file"):
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

# Tensors with factors by which rotary frequencies are divided. The factors become values of the configuration.
ROTARY_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

# Key of the metadata -> field of a mixture-of-experts configuration with the same value.
_SIZE_FIELDS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
# Names that configurations give to the eps of the norms. A configuration's class has at most one field of this list.
_EPSILON_FIELDS = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
_GEMMAS = {"gemma2": 46, "gemma3": 62}  # Number of layers of Gemma 2, and of Gemma 3, with 27 billion parameters.
_PARTIAL = ("phi3", "stablelm", "nemotron")  # Architectures that may rotate only a part of a head's features.
# Keys of the metadata, without the architecture's prefix, that transformers' module integrations.gguf reads for the
# architectures Qwen 3.5 and LFM2.
_READ_BY_FUNCTIONS = {
    "attention.key_length", "rope.dimension_count", "rope.dimension_sections", "nextn_predict_layers",
    "expert_feed_forward_length", "expert_shared_feed_forward_length",
}  # fmt: skip
# For keys of the metadata that can change what llama.cpp computes: the values with which the key changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "activation_sparsity_scale": (),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.indexer.head_count": (0,),
    "attention.key_length_mla": (0,),
    "attention.key_length_swa": (),
    "attention.kv_lora_rank": (0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.q_lora_rank": (0,),
    "attention.scale": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window_pattern": (),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0, 1.0),
    "attention.value_length_mla": (0,),
    "attention.value_length_swa": (),
    "attn_logit_softcapping": (0.0,),
    "embedding_length_per_layer_input": (0,),
    "embedding_scale": (0.0, 1.0),
    "expert_chunk_feed_forward_length": (0,),
    "expert_count": (0,),
    "expert_feed_forward_length": (0,),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "moe_latent_size": (0,),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.dimension_count_swa": (),
    "rope.dimension_sections": (),
    "rope.freq_base_swa": (),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "router_logit_softcapping": (0.0,),
    "ssm.dt_b_c_rms": (False,),
    "swiglu_clamp_exp": (),
    "swiglu_clamp_shexp": (),
    "swin_norm": (False,),
}


def take_facts(header: GgufHeader, config: Any) -> Any:
    """Returns a copy of ``config``, to which the values of the file are added that transformers does not read.

    Raises GgufError where a value that changes the model's function can't be put into the configuration.
    """
    facts = _Facts(header, config)
    facts.take_sizes()
    facts.take_attention()
    facts.take_rotary()
    facts.take_layers()
    facts.refuse_rest()
    # from_dict checks the values and computes the fields that depend on other fields.
    values = {name: value for name, value in config.to_dict().items() if name not in facts.computed}
    made = type(config).from_dict({**values, **facts.changes})
    made.architectures = config.architectures
    return made


class _Facts:
    """Collects the changes of one configuration; each ``take_`` method reads a group of values from the file.

    Attributes:
        changes: a dict that maps names of the configuration's fields to the new values of these fields.
        taken: the file's keys, without the architecture's prefix, whose values are in the configuration or in
            ``changes``.
        computed: names of fields that the configuration's class computes from other fields.
    """

    computed: Set[str] = frozenset()

    def __init__(self, header: GgufHeader, config: Any) -> None:
        self.header, self.config, self.architecture = header, config, header.architecture
        self.changes: dict[str, Any] = {}
        read = GGUF_CONFIG_MAPPING.get(config.model_type.removesuffix("_text"), {})
        self.taken = {key for key, field in read.items() if field is not None}
        if config.model_type.startswith(("qwen3_5", "lfm2")):
            self.taken |= _READ_BY_FUNCTIONS | {"expert_count"}

    def get(self, key: str, default: Any = None) -> Any:
        return self.header.get(f"{self.architecture}.{key}", default)

    def refuse(self, key: str, why: str) -> Exception:
        return self.header.error(f"{self.architecture}.{key} is {self.get(key)!r:.60}, {why}")

    def has(self, field: str) -> bool:
        return hasattr(self.config, field)

    @property
    def head(self) -> int:
        """The number of features of an attention head."""
        found = self.changes.get("head_dim", getattr(self.config, "head_dim", None))
        return found or self.config.hidden_size // self.config.num_attention_heads

    def take_sizes(self) -> None:
        config, changes = self.config, self.changes
        rows = self.header.tensors["token_embd.weight"].shape[0]
        changes["vocab_size"] = rows
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            number = getattr(config, name, None)
            # A token id beyond the vocabulary is the default of the configuration's class, and not a value of the file.
            if type(number) is int and number >= rows:
                changes[name] = None
        for key, field in _SIZE_FIELDS.items():
            if (size := self.get(key)) is not None and self.has(field):
                changes[field] = size
                self.taken.add(key)
            elif size is not None and key == "expert_feed_forward_length" and size == config.intermediate_size:
                self.taken.add(key)
        if self.architecture == "gpt2":  # transformers puts the context length into n_ctx, which GPT-2 does not use
            changes["n_positions"] = self.get("context_length")
        field = next(filter(self.has, _EPSILON_FIELDS), None)
        if (epsilon := self.get("attention.layer_norm_epsilon")) is not None and field is not None:
            changes[field] = epsilon
        elif self.get("attention.layer_norm_rms_epsilon") is None and not config.model_type.endswith("t5"):
            raise self.refuse("attention.layer_norm_rms_epsilon", "wanted a positive float")
        if (experts := self.get("expert_count", 0)) and self.get("expert_used_count", 0) not in range(1, experts + 1):
            raise self.refuse("expert_used_count", f"wanted a number from 1 to the {experts} experts")
        if experts and not any(map(self.has, ("num_experts", "num_local_experts"))):
            raise self.header.error(f"the model has {experts} experts, and transformers reads {self.architecture} "
                                    f"files as {config.model_type}, without experts")  # fmt: skip

    def take_attention(self) -> None:
        config, changes = self.config, self.changes
        key = self.get("attention.key_length")
        if key is not None and "attention.key_length" not in self.taken:
            if "head_dim" in config.to_dict():
                changes["head_dim"] = key
            elif key != self.head:
                raise self.refuse("attention.key_length", f"and transformers' {config.model_type} has no head_dim, "
                                  f"wanted {self.head}")  # fmt: skip
        if (value := self.get("attention.value_length")) is not None and value != self._key_length():
            raise self.refuse("attention.value_length", f"wanted {self._key_length()}, the length of a key")
        if self.get("attention.scale") and abs(self.get("attention.scale") * self.head**0.5 - 1) < 1e-6:
            self.taken.add("attention.scale")
        self._take_window()
        if self.architecture in _GEMMAS:
            large = config.num_hidden_layers == _GEMMAS[self.architecture]
            changes["query_pre_attn_scalar"] = config.hidden_size // config.num_attention_heads if large else self.head
            for name in ("attn_logit_softcapping", "final_logit_softcapping"):
                if self.get(name) is not None and (name[0] == "f" or self.architecture == "gemma2"):
                    changes[name] = self.get(name) or None
                    self.taken.add(name)

    def _key_length(self) -> int:
        return getattr(self.config, "d_kv", None) or self.head

    def _take_window(self) -> None:
        """Reads the size of attention's sliding window, and which layers use the window. The size 0 means no window."""
        config, key = self.config, "attention.sliding_window"
        window, pattern = self.get(key), self.get("attention.sliding_window_pattern")
        layers = config.num_hidden_layers
        if self.architecture in ("phi3", "gpt-oss") and window is not None:
            self.changes["sliding_window"] = window or None
        elif self.architecture in _GEMMAS:
            if isinstance(pattern, list) and len(pattern) == layers and all(type(one) is bool for one in pattern):
                slides = pattern
            elif pattern is None or type(pattern) is int:
                every = pattern if pattern is not None else {"gemma2": 2, "gemma3": 6}[self.architecture]
                slides = [every == 0 or (layer + 1) % every != 0 for layer in range(layers)]
            else:
                raise self.refuse("attention.sliding_window_pattern", f"wanted a number or {layers} bools")
            if window == 0 or (window is None and self.architecture == "gemma3"):
                slides = [False] * layers
            self.changes["layer_types"] = ["sliding_attention" if one else "full_attention" for one in slides]
            self.taken.add("attention.sliding_window_pattern")
        elif window and key not in self.taken and window < config.max_position_embeddings:
            raise self.refuse(key, f"and transformers' {config.model_type} uses no sliding window in all layers")

    # --- rotary positions ---------------------------------------------------------------------------------------------

    def take_rotary(self) -> None:
        held = getattr(self.config, "rope_parameters", None)
        if not held:
            self._refuse_factors(ROTARY_FACTORS)
            return
        nested = "full_attention" in held
        rotary = dict(held["full_attention"] if nested else held)
        if self.architecture == "gpt-oss":  # the class of gpt-oss's configuration scales positions by 32 by default
            rotary = {"rope_type": "default"}
        rotary["rope_theta"] = float(self.get("rope.freq_base", 10_000.0))
        self._take_part(rotary)
        self._take_scaling(rotary)
        self._take_factors(rotary)
        if nested:
            local = {"rope_type": "default", "rope_theta": float(self.get("rope.freq_base_swa", 10_000.0))}
            self.taken.add("rope.freq_base_swa")
            self.changes["rope_parameters"] = {**held, "full_attention": rotary, "sliding_attention": local}
        else:
            self.changes["rope_parameters"] = rotary
            if self.get("rope.freq_base_swa") == rotary["rope_theta"]:
                self.taken.add("rope.freq_base_swa")

    def _take_part(self, rotary: dict[str, Any]) -> None:
        """Reads how many features of each head the rotary positions rotate."""
        count = self.get("rope.dimension_count")
        if count is None or self.config.model_type in ("minimax_m2", "qwen3_5_text", "qwen3_5_moe_text"):
            return  # for MiniMax-M2 and Qwen 3.5, transformers itself reads rope.dimension_count
        if count == self.head or self.architecture in _PARTIAL:
            if count > self.head or int(self.head * (count / self.head)) != count:
                raise self.refuse("rope.dimension_count", f"wanted a part of the {self.head} features of a head")
            if self.architecture in _PARTIAL:
                rotary["partial_rotary_factor"] = count / self.head
            return
        raise self.refuse("rope.dimension_count", f"and transformers' {self.config.model_type} rotates all "
                          f"{self.head} features of a head")  # fmt: skip

    def _take_scaling(self, rotary: dict[str, Any]) -> None:
        kind = self.get("rope.scaling.type")
        factor: Optional[float] = self.get("rope.scaling.factor", self.get("rope.scale_linear"))
        if kind is None and factor not in (None, 0.0, 1.0):
            kind = "linear"
        if kind in (None, "none") or (kind == "longrope" and ROTARY_FACTORS[1] in self.header.tensors):
            return
        # A linear scaling without a factor, or with the factor 0 or 1, changes nothing.
        if kind == "linear" and factor in (None, 0.0, 1.0):
            return
        if kind not in ("linear", "yarn") or self.architecture == "phi3" or type(factor) is not float or factor <= 0:
            raise self.header.error(f"{self.architecture}.rope.scaling.type is {kind!r:.60} with the factor {factor}, "
                                    "wanted linear or yarn")  # fmt: skip
        rotary |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            original = self.get("rope.scaling.original_context_length", self.config.max_position_embeddings)
            rotary["original_max_position_embeddings"] = original
            if self.architecture == "gpt-oss":
                rotary["truncate"] = False
            for name in ("beta_fast", "beta_slow"):
                if (value := self.get(f"rope.scaling.yarn_{name}")) is not None:
                    rotary[name] = value
                    self.taken.add(f"rope.scaling.yarn_{name}")

    def _take_factors(self, rotary: dict[str, Any]) -> None:
        """Reads the tensors with the factors by which rotary frequencies are divided.

        A file with such factors has one tensor (Llama 3), or one for long texts and one for short texts (Phi 3).
        """
        count = int(self.head * rotary.get("partial_rotary_factor", 1.0)) // 2
        if self.architecture == "phi3":
            self._refuse_factors(ROTARY_FACTORS[:1])
            original = self.get("rope.scaling.original_context_length", self.config.max_position_embeddings)
            self.changes["original_max_position_embeddings"] = original
            found = [name for name in ROTARY_FACTORS[1:] if name in self.header.tensors]
            if not found:
                return
            long, short = (self._factors(name, count).tolist() for name in ROTARY_FACTORS[1:])
            rotary |= {"rope_type": "longrope", "long_factor": long, "short_factor": short,
                       "original_max_position_embeddings": original}  # fmt: skip
            if (attention := self.get("rope.scaling.attn_factor")) is not None:
                rotary["attention_factor"] = attention
                self.taken.add("rope.scaling.attn_factor")
            return
        self._refuse_factors(ROTARY_FACTORS[1:])
        if ROTARY_FACTORS[0] not in self.header.tensors:
            return
        if self.architecture in _GEMMAS or rotary.get("rope_type", "default") != "default":
            self._refuse_factors(ROTARY_FACTORS[:1])
        factors = self._factors(ROTARY_FACTORS[0], count)
        if torch.all(factors == 1):
            return
        rotary |= self._llama3(factors, rotary["rope_theta"]) or {
            "rope_type": "longrope", "long_factor": factors.tolist(), "short_factor": factors.tolist(),
            "attention_factor": 1.0, "original_max_position_embeddings": self.config.max_position_embeddings,
        }  # fmt: skip

    def _factors(self, name: str, count: int) -> Tensor:
        info = self.header.tensors.get(name)
        if info is None or info.dtype is not torch.float32 or info.shape != (count,):
            came = "missing" if info is None else f"{info.type_name} with the sizes {info.shape}"
            raise self.header.error(f"the tensor {name!r} is {came}, wanted {count} factors in F32")
        factors = self.header.data(name).clone()
        if not bool(torch.all(torch.isfinite(factors) & (factors > 0))):
            raise self.header.error(f"the tensor {name!r} has a factor that is not positive and finite")
        return factors

    def _refuse_factors(self, names: tuple[str, ...]) -> None:
        for name in names:
            if name in self.header.tensors:
                raise self.header.error(f"the tensor {name!r} has factors of rotary frequencies, which transformers' "
                                        f"{self.config.model_type} does not have")  # fmt: skip

    def _llama3(self, factors: Tensor, base: float) -> Optional[dict[str, Any]]:
        """Returns the parameters with which transformers' rotary type "llama3" computes the factors ``factors``.

        The method tries the parameters of Llama 3.1, 3.2 and 3.3, with the largest of ``factors`` as the scaling
        factor, and returns None where these parameters give other factors.
        """
        factor, context, low, high = float(factors.max()), 8192, 1.0, 4.0
        powers = torch.arange(0, 2 * len(factors), 2, dtype=torch.float32) / (2 * len(factors))
        turns = context / (2 * math.pi * base**powers)  # number of rotations of each frequency over the context
        share = ((turns - low) / (high - low)).clamp(0, 1)
        wanted = 1 / ((1 - share) / factor + share)
        if not torch.allclose(factors, wanted, rtol=1e-5, atol=0):
            return None
        return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": context}  # fmt: skip

    # --- parts of the layers ------------------------------------------------------------------------------------------

    def take_layers(self) -> None:
        """Reads which parts the layers have, such as biases, mostly from the names of the tensors."""
        names, changes = self.header.tensors, self.changes
        if self.architecture == "llama":
            changes["attention_bias"] = "blk.0.attn_q.bias" in names
            changes["mlp_bias"] = "blk.0.ffn_down.bias" in names
        elif self.architecture == "falcon":
            changes |= {"num_kv_heads": 1, "multi_query": True, "new_decoder_architecture": False}
            if self.get("attention.head_count_kv", 1) != 1:
                raise self.refuse("attention.head_count_kv", "and transformers does not undo the converter's order of "
                                  "the rows of several key-value heads, wanted 1")  # fmt: skip
        elif (linear := self.get("attention.recurrent_layers")) is not None:
            layers = self.config.num_hidden_layers
            if "layer_types" not in self.config.to_dict() or not isinstance(linear, list) or len(linear) < layers:
                raise self.refuse("attention.recurrent_layers", f"wanted bools of the {layers} layers of Qwen 3.5")
            changes["layer_types"] = ["linear_attention" if one else "full_attention" for one in linear[:layers]]
        elif self.architecture in ("t5", "t5encoder"):
            gated = any(re.search(r"\.ffn_gate\.weight$", name) for name in names)
            changes["feed_forward_proj"] = "gated-gelu" if gated else "relu"
            self.computed = {"is_gated_act", "dense_act_fn", "scale_decoder_outputs"}
            if self.architecture == "t5":
                changes["num_decoder_layers"] = self.get("decoder_block_count", self.config.num_layers)
                changes["tie_word_embeddings"] = "output.weight" not in names

    def refuse_rest(self) -> None:
        """Raises GgufError for a key of _NEUTRAL whose value changes the model's function and is not in the
        configuration."""
        for key, neutral in _NEUTRAL.items():
            value = self.get(key)
            if value is None or key in self.taken or (not isinstance(value, list) and value in neutral):
                continue
            raise self.refuse(key, f"which transformers' {self.config.model_type} does not have in a GGUF file")
