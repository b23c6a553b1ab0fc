"""Tiny random models of each architecture that transformers reads from GGUF, and their files.

The layout of the tensors and the keys of the metadata are those of llama.cpp's converter (conversion/*.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from tiny_gguf import FILE_TYPES, write_and_close
from torch import Tensor

from peft_ext.weights.gguf import TYPES, llama_row_order, type_number
from peft_ext.weights.gguf_quantize import quantize_gguf

EPSILON = 2.0**-17  # a value that float32 in the file does not round

# A key's value: the name of a field of the configuration, or a function of the configuration.
Field = Union[str, Callable[[Any], Any]]
# A function that returns the tensors that the converter makes of a tensor of the model, by their names in the file. The
# name "" stands for the name that the package gguf gives.
Change = Callable[[Any, Tensor], Mapping[str, Tensor]]


def _one(function: Callable[[Any, Tensor], Tensor]) -> Change:
    return lambda config, tensor: {"": function(config, tensor)}


def _interleaved(heads: str) -> Change:
    def change(config: Any, tensor: Tensor) -> Tensor:
        return tensor[torch.argsort(llama_row_order(len(tensor), getattr(config, heads)))]

    return _one(change)


def _three_parts(config: Any, tensor: Tensor) -> Tensor:
    """Bloom: the rows of q, k and v of each head become all rows of q, of k, and of v."""
    heads = tensor.view(config.n_head, 3, config.hidden_size // config.n_head, *tensor.shape[1:])
    return heads.transpose(0, 1).reshape(tensor.shape)


def _grouped(config: Any, tensor: Tensor) -> Tensor:
    """Falcon: rows of q, k and v of each group of heads become all rows of q, of k, and of v."""
    heads, groups, size = config.num_attention_heads, config.num_kv_heads, config.hidden_size
    of = tensor.view(groups, heads // groups + 2, size // heads, size)
    return torch.cat([of[:, :-2].reshape(-1, size), of[:, -2].reshape(-1, size), of[:, -1].reshape(-1, size)])


def _tiled(columns: bool = False, head: bool = True, tail: bool = False) -> Callable[[Any, Tensor], Tensor]:
    """Qwen 3.5: value heads that are grouped by key head become tiled. ``tail``: the rows after those of q and k."""

    def change(config: Any, tensor: Tensor) -> Tensor:
        keys, values = config.linear_num_key_heads, config.linear_num_value_heads
        size = config.linear_value_head_dim if head else 1
        order = torch.arange(values * size).view(keys, values // keys, size).transpose(0, 1).reshape(-1)
        start = 2 * config.linear_key_head_dim * keys if tail else 0
        return tensor[:, order] if columns else torch.cat([tensor[:start], tensor[start:][order]])

    return change


def _experts(names: tuple[str, str]) -> Change:
    def change(config: Any, tensor: Tensor) -> Mapping[str, Tensor]:
        return dict(zip(names, tensor.chunk(2, 1), strict=True))

    return change


_PLUS_ONE = _one(lambda config, tensor: tensor + 1)
_SQUEEZED = _one(lambda config, tensor: tensor.squeeze(1))
_TRANSPOSED = _one(lambda config, tensor: tensor.t())
_MINUS_EXP = _one(lambda config, tensor: -tensor.exp())
_GATE_UP = {r"experts\.gate_up_proj$": _experts(("ffn_gate_exps.weight", "ffn_up_exps.weight")),
            r"experts\.down_proj$": lambda config, tensor: {"ffn_down_exps.weight": tensor}}  # fmt: skip
_QWEN35 = {
    r"linear_attn\.A_log": _one(lambda config, tensor: -_tiled(head=False)(config, tensor).exp()),
    r"linear_attn\.dt_bias": lambda config, tensor: {"ssm_dt.bias": _tiled(head=False)(config, tensor)},
    r"linear_attn\.in_proj_[ab]": _one(_tiled(head=False)),
    r"linear_attn\.in_proj_z": _one(_tiled()),
    r"linear_attn\.in_proj_qkv": _one(_tiled(tail=True)),
    r"linear_attn\.conv1d": _one(lambda config, tensor: _tiled(tail=True)(config, tensor).squeeze(1)),
    r"linear_attn\.out_proj": _one(_tiled(columns=True)),
    r"linear_attn\.norm": _one(lambda config, tensor: tensor),
    r"norm\.weight": _PLUS_ONE,
}  # fmt: skip
_QWEN35_FIELDS: dict[str, Field] = {
    "attention.key_length": "head_dim", "attention.value_length": "head_dim",
    "ssm.conv_kernel": "linear_conv_kernel_dim", "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads", "ssm.time_step_rank": "linear_num_value_heads",
    "ssm.inner_size": lambda config: config.linear_value_head_dim * config.linear_num_value_heads,
    "full_attention_interval": lambda config: 2,
    "rope.dimension_count": lambda config: int(config.head_dim * config.rope_parameters["partial_rotary_factor"]),
    "rope.dimension_sections": lambda config: [4, 2, 2, 0],
}  # fmt: skip
_QWEN35_OPTIONS = {
    "head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 64, "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [4, 2, 2],
                        "mrope_interleaved": True, "partial_rotary_factor": 0.25},
}  # fmt: skip
_HEAD = {"attention.key_length": "head_dim", "attention.value_length": "head_dim"}
_MIXTURE: dict[str, Field] = {
    "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}  # fmt: skip
_SHARED: dict[str, Field] = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}


class Kind(NamedTuple):
    """One architecture of GGUF.

    Attributes:
        config: name of transformers' class of the configuration.
        options: arguments of the configuration.
        fields: the architecture's keys; None removes a key of ``_FIELDS``.
        changes: regular expressions of the model's names, and the converter's changes; the first that matches is used.
    """

    config: str
    options: Mapping[str, Any] = {}
    fields: Mapping[str, Optional[Field]] = {}
    changes: Mapping[str, Change] = {}


_SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "initializer_range": 0.06, "rms_norm_eps": EPSILON,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip
_FIELDS: dict[str, Field] = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": lambda config: config.rope_parameters["rope_theta"],
}  # fmt: skip
_NO = dict.fromkeys(("attention.layer_norm_rms_epsilon", "rope.freq_base"))
_LLAMA = {r"q_proj\.": _interleaved("num_attention_heads"), r"k_proj\.": _interleaved("num_key_value_heads")}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
_T5 = {
    "d_model": 256, "d_ff": 512, "d_kv": 32, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2,
    "tie_word_embeddings": True,
    "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": EPSILON, "initializer_factor": 1.0,
    "dropout_rate": 0.0, "n_positions": 64,
    "relative_attention_num_buckets": 16,
}  # fmt: skip
_T5_FIELDS: dict[str, Optional[Field]] = {
    "context_length": "n_positions", "embedding_length": "d_model", "feed_forward_length": "d_ff",
    "block_count": "num_layers", "decoder_block_count": "num_decoder_layers", "attention.head_count": "num_heads",
    "attention.head_count_kv": None, "attention.key_length": "d_kv", "attention.value_length": "d_kv",
    "attention.layer_norm_epsilon": "layer_norm_epsilon", "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "attention.relative_buckets_count": "relative_attention_num_buckets", "rope.freq_base": None,
    "decoder_start_token_id": lambda config: 0,
}  # fmt: skip

KINDS: dict[str, Kind] = {
    "llama": Kind("LlamaConfig", {}, {
        "vocab_size": "vocab_size", "rope.dimension_count": "head_dim", **_HEAD,
    }, _LLAMA),
    "mistral": Kind("MistralConfig", {}, {
        "vocab_size": "vocab_size", "rope.dimension_count": "head_dim", **_HEAD,
    }, _LLAMA),
    "qwen2": Kind("Qwen2Config"),
    "qwen3": Kind("Qwen3Config", {"head_dim": 32}, _HEAD),
    "qwen2moe": Kind("Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 512},
                     {**_MIXTURE, **_SHARED}, _GATE_UP),
    "qwen3moe": Kind("Qwen3MoeConfig", {**_EXPERTS, "head_dim": 32, "norm_topk_prob": True},
                     {**_MIXTURE, **_HEAD}, _GATE_UP),
    "lfm2": Kind("Lfm2Config", {
        "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "norm_eps": EPSILON,
    }, {
        "attention.head_count_kv": lambda config: [0, config.num_key_value_heads], "vocab_size": "vocab_size",
        "shortconv.l_cache": "conv_L_cache", "attention.layer_norm_rms_epsilon": "norm_eps",
    }, {r"conv\.conv": _SQUEEZED}),
    "phi3": Kind("Phi3Config", {
        "sliding_window": 9, "original_max_position_embeddings": 64, "pad_token_id": 0,
    }, {
        "attention.sliding_window": "sliding_window",
        "rope.dimension_count": lambda config: config.hidden_size // config.num_attention_heads,
        "rope.scaling.original_context_length": "original_max_position_embeddings",
    }),
    "stablelm": Kind("StableLmConfig", {
        "use_qkv_bias": True, "layer_norm_eps": EPSILON,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    }, {
        **_NO, "attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual",
        "rope.dimension_count": lambda config: int(
            config.rope_parameters["partial_rotary_factor"] * config.hidden_size // config.num_attention_heads
        ),
    }),
    "starcoder2": Kind("Starcoder2Config", {"norm_epsilon": EPSILON}, {
        "attention.layer_norm_rms_epsilon": "norm_epsilon", "attention.layer_norm_epsilon": "norm_epsilon",
    }),
    "nemotron": Kind("NemotronConfig", {
        "norm_eps": EPSILON, "head_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25},
    }, {
        **_HEAD, "attention.layer_norm_rms_epsilon": "norm_eps", "attention.layer_norm_epsilon": "norm_eps",
        "rope.scaling.type": lambda config: "none", "vocab_size": "vocab_size",
        "rope.dimension_count": lambda config: int(
            config.rope_parameters["partial_rotary_factor"] * config.hidden_size
        ) // config.num_attention_heads,
    }, {r"norm\.weight": _PLUS_ONE}),
    "gemma2": Kind("Gemma2Config", {
        "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 9, "tie_word_embeddings": True,
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }, {
        **_HEAD, "rope.freq_base": None, "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
    }, {r"norm\.weight": _PLUS_ONE}),
    "gemma3": Kind("Gemma3TextConfig", {
        "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 9, "tie_word_embeddings": True,
        "num_hidden_layers": 6,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50_000.0},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}},
    }, {
        **_HEAD, "attention.sliding_window": "sliding_window",
        "rope.freq_base": lambda config: config.rope_parameters["full_attention"]["rope_theta"],
        "rope.freq_base_swa": lambda config: config.rope_parameters["sliding_attention"]["rope_theta"],
        "rope.scaling.type": lambda config: "linear",
        "rope.scaling.factor": lambda config: config.rope_parameters["full_attention"].get("factor"),
    }, {r"norm\.weight": _PLUS_ONE}),
    "minimax-m2": Kind("MiniMaxM2Config", {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "intermediate_size": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    }, {
        **_HEAD, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "intermediate_size", "expert_gating_func": lambda config: 2,
        "rope.dimension_count": lambda config: 32,
    }, {**_GATE_UP, r"e_score_correction_bias": lambda config, tensor: {"exp_probs_b.bias": tensor}}),
    "qwen35": Kind("Qwen3_5TextConfig", _QWEN35_OPTIONS, _QWEN35_FIELDS, _QWEN35),
    "qwen35moe": Kind("Qwen3_5MoeTextConfig", {
        **_QWEN35_OPTIONS, **_EXPERTS, "shared_expert_intermediate_size": 256,
    }, {**_QWEN35_FIELDS, **_MIXTURE, **_SHARED, "feed_forward_length": None}, {
        **_GATE_UP, **_QWEN35,
    }),
    "falcon": Kind("FalconConfig", {
        "num_kv_heads": 1, "multi_query": True, "layer_norm_epsilon": EPSILON,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }, {
        **_NO, "attention.layer_norm_epsilon": "layer_norm_epsilon", "tensor_data_layout": lambda config: "jploski",
        "attention.head_count_kv": "num_kv_heads", "feed_forward_length": lambda config: 4 * config.hidden_size,
    }, {r"query_key_value": _one(_grouped)}),
    "bloom": Kind("BloomConfig", {"n_layer": 2, "n_head": 4, "layer_norm_epsilon": EPSILON}, {
        **_NO, "attention.layer_norm_epsilon": "layer_norm_epsilon", "attention.head_count": "n_head",
        "attention.head_count_kv": "n_head", "block_count": "n_layer", "context_length": lambda config: 64,
        "feed_forward_length": lambda config: 4 * config.hidden_size,
    }, {r"query_key_value": _one(_three_parts)}),
    "gpt2": Kind("GPT2Config", {
        "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 64, "layer_norm_epsilon": EPSILON,
    }, {
        **_NO, "attention.layer_norm_epsilon": "layer_norm_epsilon", "attention.head_count": "n_head",
        "attention.head_count_kv": None, "block_count": "n_layer", "context_length": "n_positions",
        "embedding_length": "n_embd", "feed_forward_length": lambda config: 4 * config.n_embd,
    }, {r"c_(attn|proj|fc)\.weight": _TRANSPOSED}),
    "mamba": Kind("MambaConfig", {"state_size": 16, "layer_norm_epsilon": EPSILON, "intermediate_size": 512}, {
        "attention.layer_norm_rms_epsilon": "layer_norm_epsilon", "attention.head_count": lambda config: 0,
        "attention.head_count_kv": None, "rope.freq_base": None, "feed_forward_length": lambda config: 0,
        "context_length": lambda config: 2**20, "ssm.conv_kernel": "conv_kernel",
        "ssm.inner_size": "intermediate_size", "ssm.state_size": "state_size",
        "ssm.time_step_rank": "time_step_rank", "ssm.dt_b_c_rms": lambda config: False,
    }, {r"A_log": _MINUS_EXP, r"conv1d\.weight": _SQUEEZED}),
    "t5": Kind("T5Config", _T5, _T5_FIELDS),
    "umt5": Kind("UMT5Config", _T5, _T5_FIELDS),
    "t5encoder": Kind("T5Config", _T5, {**_T5_FIELDS, "decoder_block_count": None, "decoder_start_token_id": None}),
    "gpt-oss": Kind("GptOssConfig", {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 9,
    }, {
        **_HEAD, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "intermediate_size", "attention.sliding_window": "sliding_window",
    }, {
        r"experts\.gate_up_proj$": lambda config, tensor: {
            "ffn_gate_exps.weight": tensor.transpose(1, 2)[:, ::2],
            "ffn_up_exps.weight": tensor.transpose(1, 2)[:, 1::2],
        },
        r"experts\.gate_up_proj_bias": lambda config, tensor: {
            "ffn_gate_exps.bias": tensor[:, ::2], "ffn_up_exps.bias": tensor[:, 1::2]
        },
        r"experts\.down_proj$": lambda config, tensor: {"ffn_down_exps.weight": tensor.transpose(1, 2)},
        r"experts\.down_proj_bias": lambda config, tensor: {"ffn_down_exps.bias": tensor},
        r"sinks": lambda config, tensor: {"attn_sinks.weight": tensor},
    }),
}  # fmt: skip
# For each kind whose name is not GGUF's name of the architecture: GGUF's name.
_ARCHITECTURE = {"mistral": "llama", "umt5": "t5"}


def tiny_config(kind: str, **options: Any) -> Any:
    """Returns a small configuration of a kind of ``KINDS``, with two layers and weights of 256 or 512 columns."""
    import transformers

    about = KINDS[kind]
    made = getattr(transformers, about.config)
    own = {"n_layer", "n_embd", "d_model"} & set(about.options)
    common = {"vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"}
    if kind == "bloom":
        common |= {"hidden_size"}
    sizes = {key: value for key, value in _SIZES.items() if not own or key in common}
    if about.config in ("T5Config", "UMT5Config"):
        sizes["pad_token_id"] = 0
    return made(**{**sizes, **about.options, **options})


def tiny_model(kind: str, seed: int = 1, **options: Any) -> Any:
    """Returns a random float32 model of a kind in eval mode, whose norms and biases have random values too."""
    import transformers

    torch.manual_seed(seed)
    config = tiny_config(kind, **options)
    auto = {"t5": "AutoModelForSeq2SeqLM", "umt5": "AutoModelForSeq2SeqLM", "t5encoder": "T5EncoderModel"}.get(
        kind, "AutoModelForCausalLM"
    )
    made = getattr(transformers, auto)
    model = (made.from_config(config, dtype=torch.float32) if auto.startswith("Auto") else made(config)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and (tensor.dim() == 1 or name.endswith("_bias")):
                tensor += 0.2 * torch.randn_like(tensor)
            elif tensor.is_floating_point() and tensor.dim() == 3 and "experts" in name:
                tensor.normal_(0, 0.06)
    return model


def write_tiny(
    path: Union[str, Path], kind: str, model: Any, types: Union[str, Mapping[str, str]] = "Q8_0",
    metadata: Optional[Mapping[str, Any]] = None, tensors: Optional[Mapping[str, Tensor]] = None,
) -> Path:  # fmt: skip
    """Writes a model of a kind of ``KINDS`` to a GGUF file, with a tokenizer of single tokens.

    Vectors, convolutions and the tensors that llama.cpp does not quantize are F32. A weight whose columns are no
    multiple of the type's block is Q8_0, or F16 where the columns are no multiple of 32.

    Args:
        types: ggml's type of all matrices, or types by the last part of a name ("attn_q"); "*": all others.
        metadata: further keys; None removes a key.
        tensors: further tensors, in F32.
    """
    import gguf

    about, config, architecture = KINDS[kind], model.config, _ARCHITECTURE.get(kind, kind)
    chosen = {"*": types} if isinstance(types, str) else types
    writer = gguf.GGUFWriter(str(path), architecture)
    keys: dict[str, Any] = {"general.name": "tiny", "general.file_type": FILE_TYPES.get(chosen["*"], 0)}
    for key, field in {**_FIELDS, **about.fields}.items():
        if field is not None:
            keys[f"{architecture}.{key}"] = getattr(config, field) if isinstance(field, str) else field(config)
    keys |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.eos_token_id": 2,
             "tokenizer.ggml.tokens": [f"t{number}" for number in range(config.vocab_size)],
             "tokenizer.ggml.merges": ["t 1"], "tokenizer.ggml.bos_token_id": 1,
             "tokenizer.ggml.padding_token_id": config.pad_token_id} | dict(metadata or {})  # fmt: skip
    for key, value in keys.items():
        if value is not None:
            _add_key(writer, key, value)
    for name, tensor in {**file_tensors(kind, model), **(tensors or {})}.items():
        data, number = _stored(name, tensor, chosen)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType(number))
    write_and_close(writer)
    return Path(path)


def _add_key(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def file_tensors(kind: str, model: Any) -> dict[str, Tensor]:
    """Returns the float32 tensors of the model's file, by their names there, before they are quantized."""
    import gguf

    architecture = _ARCHITECTURE.get(kind, kind)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    layers = getattr(model.config, "num_hidden_layers", 2)
    names, found = gguf.get_tensor_name_map(numbers[architecture], layers), {}
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name in tied or re.search(r"(encoder|decoder)\.embed_tokens|rotary", name):
            continue
        change = next((one for key, one in KINDS[kind].changes.items() if re.search(key, name)), None)
        made = {"": tensor} if change is None else change(model.config, tensor)
        for new, values in made.items():
            if new:
                new = f"blk.{re.search(r'layers[.]([0-9]+)', name)[1]}.{new}"
            else:
                new = names.get_name(name.removeprefix("transformer."), try_suffixes=(".weight", ".bias"))
                new = new or names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert new is not None, f"{name} has no name in a GGUF file"
            found[new] = values.detach().float().squeeze().contiguous()  # the converter squeezes too
    return found


_KEPT = re.compile(r"ffn_gate_inp\.|conv1d|shortconv\.conv|attn_rel_b|position_embd|norm")


def _stored(name: str, tensor: Tensor, chosen: Mapping[str, str]) -> tuple[Any, int]:
    kind = name.removesuffix(".weight").rpartition(".")[2]
    wanted = type_number(chosen.get(kind, chosen["*"]))
    if tensor.dim() == 1 or not name.endswith(".weight") or _KEPT.search(name):
        wanted = 0
    elif wanted in TYPES and tensor.shape[-1] % TYPES[wanted].columns:
        wanted = type_number("F16" if tensor.shape[-1] % 32 else "Q8_0")
    if wanted in _SCALES:
        return _random_blocks(tensor, wanted), wanted
    data = quantize_gguf(tensor, wanted)
    if wanted in TYPES or wanted == 30:
        return data.numpy(), wanted
    return data.view({0: torch.float32, 1: torch.float16}[wanted]).view(tensor.shape).numpy(), wanted


# For types without a quantizer, whose weights are random: the bytes of a block that hold float16 scales.
_SCALES = {12: slice(0, 4), 13: slice(0, 4), 14: slice(208, 210)}  # Q4_K, Q5_K, Q6_K.


def _random_blocks(tensor: Tensor, number: int) -> Any:
    """Returns random blocks for a tensor of ``tensor.shape``. The scales make weights of some 0.06."""
    of, generator = TYPES[number], torch.Generator().manual_seed(tensor.numel())
    blocks = torch.randint(0, 256, (*tensor.shape[:-1], tensor.shape[-1] // of.columns, of.bytes), generator=generator)
    blocks = blocks.to(torch.uint8)
    scales = torch.full((2,), 2.0e-4 if number < 14 else 3.0e-5, dtype=torch.float16).view(torch.uint8)
    place = _SCALES[number]
    blocks[..., place] = scales[: place.stop - place.start]
    return blocks.flatten(-2).numpy()
