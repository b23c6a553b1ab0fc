"""Tests models in GGUF files, for each architecture, against transformers' own load of the decoded weights."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

from tiers import first  # noqa: E402
from tiny_archs import EPSILON, KINDS, file_tensors, tiny_model, write_tiny  # noqa: E402
from transformers import modeling_gguf_pytorch_utils as legacy  # noqa: E402

from peft_ext.gguf import GgufError, read_header  # noqa: E402
from peft_ext.gguf.load import load_gguf  # noqa: E402
from peft_ext.gguf.pack import _names  # noqa: E402
from peft_ext.nn import PackedEmbedding, PackedExperts, PackedLinear  # noqa: E402
from peft_ext.weights.gguf import gguf_weight  # noqa: E402

pytestmark = [pytest.mark.cpu_only("files are read on the CPU"), pytest.mark.filterwarnings("ignore")]

MIXED = {"*": "Q4_K", "ffn_down": "Q6_K", "ffn_down_exps": "Q6_K", "token_embd": "Q4_1", "output": "Q6_K",
         "attn_v": "Q8_0", "attn_k": "Q4_0"}  # fmt: skip
# Kinds whose files transformers 5.24 reads as a whole. Of a gpt-oss file, transformers does not read the experts and
# gives them random values.
READABLE = [kind for kind in KINDS if kind != "gpt-oss"]
# Modules whose quantized weights are decoded, as a regular expression of the parameter, and a part of the reason.
READ_PAST = "the code of another module reads its weight"
DENSE = {
    "gpt2": {r"c_(attn|proj|fc)": "a Conv1D can't hold packed weights"},
    "mamba": {r"mixer\.(x_proj|out_proj)|lm_head": READ_PAST},
    "qwen35": {r"linear_attn\.out_proj": "transformers changes its values as it reads the file"},
    "qwen35moe": {r"linear_attn\.out_proj": "transformers changes its values as it reads the file"},
    "t5": {r"DenseReluDense\.wo": READ_PAST},
    "t5encoder": {r"DenseReluDense\.wo": READ_PAST},
    "umt5": {r"DenseReluDense\.wo": READ_PAST},
}
MIXTURES = ("minimax-m2", "qwen2moe", "qwen35moe", "qwen3moe")


def tokens(model: Any, length: int = 24) -> dict[str, Tensor]:
    ids = torch.arange(3, 3 + length)[None]
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder and hasattr(model, "lm_head") else {}
    return {"input_ids": ids, **more}


@torch.no_grad()
def outputs(model: Any, length: int = 24) -> Tensor:
    return model(**tokens(model, length))[0]


def theirs(file: Path, model: Any, kind: str) -> Any:
    """Returns transformers' dense model of a file, made with the configuration of the model that was written.

    transformers reads a part of the configuration from the file.
    """
    transformers.logging.disable_progress_bar()
    kind = "llama" if kind == "mistral" else kind  # GGUF has one architecture for both
    made = transformers.LlamaForCausalLM if kind == "llama" else type(model)
    config = transformers.LlamaConfig.from_dict({**model.config.to_dict(), "model_type": "llama"})
    config = config if kind == "llama" else model.config
    loaded, info = made.from_pretrained(
        str(file.parent), config=config, gguf_file=file.name, dtype=torch.float32, output_loading_info=True,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip
    assert not info["missing_keys"], info["missing_keys"]
    return loaded


@pytest.mark.parametrize("types", ["Q8_0", "mixed"])
@pytest.mark.parametrize("kind", READABLE)
def test_each_architecture(kind: str, types: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    file = write_tiny(tmp_path / "a.gguf", kind, model, MIXED if types == "mixed" else types)
    loaded = load_gguf(file, dtype=torch.float32)
    wanted, got = outputs(theirs(file, model, kind)), outputs(loaded)
    if kind in MIXTURES:  # the experts run other operators than transformers' loop
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
    else:
        assert torch.equal(got, wanted)
    check_layers(kind, file, loaded)


@pytest.mark.parametrize("kind", ["llama", "qwen3moe", "lfm2", "qwen35moe"])
def test_types_without_a_kernel_are_decoded(kind: str, tmp_path: Path) -> None:
    import peft

    import peft_ext

    model = tiny_model(kind)
    file = write_tiny(tmp_path / "a.gguf", kind, model, "TQ1_0")
    without = {one.name for one in read_header(file).tensors.values() if one.type_name == "TQ1_0"}
    assert without
    loaded = load_gguf(file, dtype=torch.float32)
    dense = load_gguf(decoded(file, kind, model), dtype=torch.float32)  # transformers does not read TQ1_0 in all kinds
    torch.testing.assert_close(outputs(loaded), outputs(dense), atol=2e-5, rtol=1e-4)
    reasons = set(loaded.peft_ext_dense.values())
    changed = set(DENSE.get(kind, {}).values())
    assert reasons - changed == {"no kernel decodes the type TQ1_0"}
    for parameter in loaded.peft_ext_dense:
        assert loaded.get_parameter(parameter).dtype == torch.float32
    adapted = peft_ext.accelerate(peft.get_peft_model(loaded, peft.LoraConfig(target_modules=["q_proj", "v_proj"])))
    adapted(**tokens(adapted)).logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("types", ["F32", "F16", "Q8_0", "MXFP4", "mixed"])
def test_gpt_oss(types: str, tmp_path: Path) -> None:
    """transformers gives the model of a gpt-oss file random experts: the model that was written is the authority.

    The model of quantized weights is compared with the model of a file of the weights' values.
    """
    model = tiny_model("gpt-oss")
    file = write_tiny(tmp_path / "a.gguf", "gpt-oss", model, MIXED if types == "mixed" else types)
    loaded = load_gguf(file, dtype=torch.float32)
    if types == "F32":
        assert torch.equal(outputs(loaded), outputs(model))
    dense = load_gguf(decoded(file, "gpt-oss", model), dtype=torch.float32)
    torch.testing.assert_close(outputs(loaded), outputs(dense), atol=2e-5, rtol=1e-4)
    experts = [one for one in loaded.modules() if isinstance(one, PackedExperts)]
    assert len(experts) == (0 if types in ("F32", "F16") else 2) and not loaded.peft_ext_dense


def decoded(file: Path, kind: str, model: Any) -> Path:
    """Writes a file of the float32 values of the weights of ``file``."""
    header = read_header(file)
    values = {
        name: gguf_weight(header.data(name), info.type, info.shape).dequantize(torch.float32).reshape(info.shape)
        if info.dtype is None
        else header.data(name).float()
        for name, info in header.tensors.items()
    }
    return _written(file.with_name("decoded.gguf"), kind, model, values)


def check_layers(kind: str, file: Path, loaded: Any) -> None:
    """Checks that each quantized weight is packed, but for those of ``DENSE``, whose modules say why."""
    expected = DENSE.get(kind, {})
    for parameter, reason in loaded.peft_ext_dense.items():
        (wanted,) = (why for pattern, why in expected.items() if re.search(pattern, parameter))
        assert reason == wanted, parameter
        module = loaded.get_submodule(parameter.rpartition(".")[0])
        assert module.note == f"the file's packed weight was decoded: {reason}"
        assert not isinstance(module, (PackedLinear, PackedEmbedding, PackedExperts))
    quantized = {info.name for info in read_header(file).tensors.values() if info.dtype is None}
    packed = {id(one.weight) for one in loaded.modules() if isinstance(one, (PackedLinear, PackedEmbedding))}
    experts = [one for one in loaded.modules() if isinstance(one, PackedExperts)]
    assert len(packed) + 3 * len(experts) + len(loaded.peft_ext_dense) == len(quantized)
    assert len(experts) == (loaded.config.num_hidden_layers if kind in MIXTURES else 0)
    assert bool(loaded.peft_ext_dense) == bool(expected)


@pytest.mark.parametrize("types", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("kind", ["bloom", "gemma2", "gpt2", "lfm2", "llama", "qwen2moe", "qwen35moe", "t5"])
def test_dense_files(kind: str, types: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    file = write_tiny(tmp_path / "a.gguf", kind, model, types)
    loaded = load_gguf(file, dtype=torch.float32)
    assert torch.equal(outputs(loaded), outputs(theirs(file, model, kind)))
    assert not loaded.peft_ext_dense
    assert not any(isinstance(one, (PackedLinear, PackedEmbedding, PackedExperts)) for one in loaded.modules())


@pytest.mark.parametrize("kind", [kind for kind in READABLE if kind not in ("lfm2", "qwen35", "qwen35moe")])
def test_names_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    header = read_header(write_tiny(tmp_path / "a.gguf", kind, model, "F32"))
    made = legacy.TENSOR_PROCESSORS.get(header.architecture, legacy.TensorProcessor)(model.config.to_dict())
    type_ = "llama" if kind == "mistral" else None
    wanted = legacy.get_gguf_hf_weights_map(model, made, model_type=type_)
    got = _names(model, header, made)
    assert {name: got.get(name) for name in wanted} == wanted


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3", "stablelm", "starcoder2", "nemotron", "qwen3moe"])
def test_tied_heads(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind, tie_word_embeddings=True)
    file = write_tiny(tmp_path / "a.gguf", kind, model, "Q8_0")
    loaded = load_gguf(file, dtype=torch.float32)
    assert "output.weight" not in read_header(file).tensors and loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(outputs(loaded), outputs(theirs(file, model, kind)), atol=2e-5, rtol=1e-4)


def test_a_head_of_its_own_in_t5(tmp_path: Path) -> None:
    """T5 1.1 has a head of its own, and does not scale the decoder's output."""
    model = tiny_model("t5", tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(torch.randn(96, 256) * 0.05)
    extra = {"output.weight": model.lm_head.weight.detach()}
    file = write_tiny(tmp_path / "a.gguf", "t5", model, "F32", tensors=extra)
    torch.testing.assert_close(outputs(load_gguf(file, dtype=torch.float32)), outputs(model), atol=1e-5, rtol=1e-5)


# --- facts of the file that transformers does not read ----------------------------------------------------------------


def llama3_factors(config: Any, head: int = 64) -> Tensor:
    """Returns ``rope_freqs.weight`` as llama.cpp's converter computes it (LlamaModel.generate_extra_tensors)."""
    about = config.rope_parameters
    low, high, context = about["low_freq_factor"], about["high_freq_factor"], about["original_max_position_embeddings"]
    factors = []
    for power in range(0, head, 2):
        length = 2 * math.pi * about["rope_theta"] ** (power / head)
        if length < context / high:
            factors.append(1.0)
        elif length > context / low:
            factors.append(about["factor"])
        else:
            smooth = (context / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / about["factor"] + smooth))
    return torch.tensor(factors)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = [1.0 + 0.5 * index for index in range(16)]
SHORT = [1.0 + 0.1 * index for index in range(16)]
LONGROPE = {"rope_type": "longrope", "rope_theta": 5000.0, "long_factor": LONG, "short_factor": SHORT,
            "original_max_position_embeddings": 16, "partial_rotary_factor": 0.5}  # fmt: skip
# Options of the configuration that change the function, the keys that the converter writes for them, and tensors.
FACTS: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any], Any]] = {
    "llama3": ("llama", {"rope_parameters": LLAMA3}, {}, llama3_factors),
    "llama3 with another context": (
        "llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32, "factor": 3.0}}, {},
        llama3_factors,
    ),
    "linear": ("llama", {"rope_parameters": LINEAR},
               {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, None),
    "linear by the old key": ("qwen2", {"rope_parameters": {**LINEAR, "factor": 2.0}},
                              {"qwen2.rope.scale_linear": 2.0}, None),
    "yarn": ("qwen2", {"rope_parameters": YARN}, {
        "qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 16,
    }, None),
    "yarn with bounds": ("qwen3", {"rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 0.5}}, {
        "qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 16, "qwen3.rope.scaling.yarn_beta_fast": 8.0,
        "qwen3.rope.scaling.yarn_beta_slow": 0.5,
    }, None),
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}, {
        "phi3.rope.dimension_count": 32, "phi3.rope.scaling.type": "longrope",
        "phi3.rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(16)),
    }, lambda config: {"rope_factors_long.weight": torch.tensor(LONG),
                       "rope_factors_short.weight": torch.tensor(SHORT)}),
    "a part of a head": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0,
                                                      "partial_rotary_factor": 0.75}},
                         {"phi3.rope.dimension_count": 48}, None),
    "no window": ("phi3", {"sliding_window": None}, {"phi3.attention.sliding_window": 0}, None),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}, None),
    "long heads": ("llama", {"head_dim": 128}, {}, None),
    "gemma2 27B": ("gemma2", {"num_hidden_layers": 46, "hidden_size": 64, "intermediate_size": 64, "head_dim": 8,
                              "query_pre_attn_scalar": 16}, {}, None),
    "gemma3 without windows": ("gemma3", {"layer_types": ["full_attention"] * 6},
                               {"gemma3.attention.sliding_window": None}, None),
    "gemma3 with a pattern": ("gemma3", {"layer_types": ["sliding_attention", "full_attention"] * 3},
                              {"gemma3.attention.sliding_window_pattern": 2}, None),
    "gemma3 with an array": ("gemma3", {"layer_types": ["full_attention", *["sliding_attention"] * 5]},
                             {"gemma3.attention.sliding_window_pattern": [False, *[True] * 5]}, None),
    "gemma3 local frequencies": ("gemma3", {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 50_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    }}, {"gemma3.rope.freq_base_swa": 300.0, "gemma3.rope.scaling.type": None}, None),
    "gemma3 soft cap": ("gemma3", {"final_logit_softcapping": 2.0}, {"gemma3.final_logit_softcapping": 2.0}, None),
    "t5 with relu": ("t5", {"feed_forward_proj": "relu"}, {}, None),
    "t5 with a short decoder": ("t5", {"num_decoder_layers": 1}, {}, None),
    "stablelm in sequence": ("stablelm", {"use_parallel_residual": False, "use_qkv_bias": False}, {}, None),
    "qwen3moe with three experts a token": ("qwen3moe", {"num_experts_per_tok": 3}, {}, None),
    "qwen35 with an array": ("qwen35", {"layer_types": ["full_attention", "linear_attention"]}, {
        "qwen35.attention.recurrent_layers": [False, True], "qwen35.full_attention_interval": 4,
    }, None),
    "gpt-oss yarn": ("gpt-oss", {"rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}}, {
        "gpt-oss.rope.scaling.type": "yarn", "gpt-oss.rope.scaling.factor": 4.0,
        "gpt-oss.rope.scaling.original_context_length": 16, "gpt-oss.rope.scaling.yarn_beta_fast": 32.0,
        "gpt-oss.rope.scaling.yarn_beta_slow": 1.0,
    }, None),
    "the whole context": ("llama", {}, {"llama.attention.sliding_window": 64, "llama.attention.scale": 0.125}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", FACTS)
def test_facts(case: str, tmp_path: Path) -> None:
    """The model of a file of float32 weights computes what the model that was written computes."""
    kind, options, keys, made = FACTS[case]
    model = tiny_model(kind, **options)
    tensors = None if made is None else made(model.config)
    if isinstance(tensors, Tensor):
        tensors = {"rope_freqs.weight": tensors}
    file = write_tiny(tmp_path / "a.gguf", kind, model, "F32", keys, tensors)
    loaded = load_gguf(file, dtype=torch.float32)
    for length in (12, 48):  # within and beyond the original contexts
        torch.testing.assert_close(outputs(loaded, length), outputs(model, length), atol=2e-5, rtol=1e-4)
    changed = tiny_model(kind)
    if changed.config.num_hidden_layers == model.config.num_hidden_layers and case not in (
        "biases", "the whole context", "t5 with relu", "t5 with a short decoder", "stablelm in sequence", "long heads",
        "qwen35 with an array",
    ):  # fmt: skip
        changed.load_state_dict(model.state_dict())
        assert not torch.allclose(outputs(changed, 48), outputs(model, 48), atol=1e-3), "the fact has no effect"


def test_llama3_is_in_the_configuration(tmp_path: Path) -> None:
    """The factors are parameters of the configuration, which buffers that are made again and saved models use too."""
    from peft_ext.sources.model import widen

    model = tiny_model("llama", rope_parameters=LLAMA3)
    file = write_tiny(
        tmp_path / "a.gguf", "llama", model, "F32", {}, {"rope_freqs.weight": llama3_factors(model.config)}
    )
    loaded = load_gguf(file)
    for key, value in LLAMA3.items():
        assert loaded.config.rope_parameters[key] == value, key
    widen(loaded)
    frequencies = model.model.rotary_emb.inv_freq
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, frequencies, rtol=1e-6, atol=0)
    again = transformers.LlamaConfig.from_dict(loaded.config.to_dict())
    torch.testing.assert_close(
        transformers.LlamaForCausalLM(again).model.rotary_emb.inv_freq, frequencies, rtol=1e-6, atol=0
    )


REFUSED = [
    ("llama", {"llama.attention.key_length": 32}, {}, "attention.value_length is 64"),
    ("llama", {"llama.attention.value_length": 32}, {}, "attention.value_length is 32, wanted 64, the length of a key"),
    ("qwen2", {"qwen2.attention.key_length": 32}, {}, "attention.key_length is 32, and transformers' qwen2 has no"),
    ("qwen2", {"qwen2.rope.dimension_count": 32}, {}, "rope.dimension_count is 32, and transformers' qwen2 rotates"),
    ("llama", {"llama.attention.sliding_window": 9}, {}, "attention.sliding_window is 9, and transformers' llama uses"),
    ("llama", {"llama.attention.scale": 0.5}, {}, "attention.scale is 0.5, which transformers' llama does not have"),
    ("llama", {"llama.logit_scale": 8.0}, {}, "logit_scale is 8.0, which"),
    ("llama", {"llama.residual_scale": 0.5}, {}, "residual_scale is 0.5, which"),
    ("llama", {"llama.embedding_scale": 12.0}, {}, "embedding_scale is 12.0, which"),
    ("llama", {"llama.attn_logit_softcapping": 5.0}, {}, "attn_logit_softcapping is 5.0, which"),
    ("llama", {"llama.final_logit_softcapping": 5.0}, {}, "final_logit_softcapping is 5.0, which"),
    ("llama", {"llama.attention.causal": False}, {}, "attention.causal is False, which"),
    ("llama", {"llama.attention.clamp_kqv": 2.0}, {}, "attention.clamp_kqv is 2.0, which"),
    ("llama", {"llama.attention.temperature_length": 8192}, {}, "attention.temperature_length is 8192, which"),
    ("llama", {"llama.expert_count": 4}, {}, "expert_used_count is None, wanted a number from 1 to the 4 experts"),
    ("llama", {"llama.expert_count": 4, "llama.expert_used_count": 2}, {}, "the model has 4 experts, and transformers"),
    ("qwen3moe", {"qwen3moe.expert_weights_scale": 2.5}, {}, "expert_weights_scale is 2.5, which"),
    ("qwen3moe", {"qwen3moe.expert_gating_func": 2}, {}, "expert_gating_func is 2, which"),
    ("qwen3moe", {"qwen3moe.expert_group_count": 8}, {}, "expert_group_count is 8, which"),
    ("qwen2moe", {"qwen2moe.leading_dense_block_count": 1}, {}, "leading_dense_block_count is 1, which"),
    ("llama", {"llama.rope.scaling.type": "su"}, {}, "rope.scaling.type is 'su' with the factor None, wanted linear"),
    ("llama", {"llama.rope.scaling.type": "yarn"}, {}, "rope.scaling.type is 'yarn' with the factor None, wanted"),
    ("qwen2", {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0,
               "qwen2.rope.scaling.yarn_attn_factor": 1.2}, {}, "rope.scaling.yarn_attn_factor is 1.2"),
    ("qwen2", {"qwen2.rope.scaling.attn_factor": 1.2}, {}, "rope.scaling.attn_factor is 1.2"),
    ("mamba", {"mamba.ssm.dt_b_c_rms": True}, {}, "ssm.dt_b_c_rms is True, which"),
    ("falcon", {"falcon.attention.head_count_kv": 2}, {}, "attention.head_count_kv is 2, and transformers does not"),
    ("gemma3", {"gemma3.attention.sliding_window_pattern": [True]}, {}, "wanted a number or 6 bools"),
    ("llama", {}, {"rope_freqs.weight": torch.ones(31)}, "'rope_freqs.weight' is F32 with the sizes (31,), wanted 32"),
    ("llama", {}, {"rope_freqs.weight": torch.zeros(32)}, "has a factor that is not positive and finite"),
    ("llama", {}, {"rope_factors_long.weight": torch.ones(32)}, "'rope_factors_long.weight' has factors of rotary"),
    ("phi3", {}, {"rope_factors_long.weight": torch.ones(32)}, "'rope_factors_short.weight' is missing, wanted 32"),
    ("gpt2", {}, {"rope_freqs.weight": torch.ones(32)}, "which transformers' gpt2 does not have"),
    ("llama", {}, {"blk.0.attn_q.scale": torch.ones(1)}, "'blk.0.attn_q.scale' is none of LlamaForCausalLM's"),
    ("qwen3", {}, {"cls.output.weight": torch.ones(2, 256)}, "'cls.output.weight' is none of Qwen3ForCausalLM's"),
    ("lfm2", {}, {"dense_2.weight": torch.ones(2, 256)}, "the tensor 'dense_2.weight' is none of Lfm2ForCausalLM's"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "keys", "tensors", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused(kind: str, keys: Any, tensors: Any, message: str, tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "a.gguf", kind, tiny_model(kind), "F32", keys, tensors)
    with pytest.raises(GgufError) as caught:
        load_gguf(file)
    text = str(caught.value)
    assert text.startswith(f"{file}: ") and message in text and text.isprintable(), text


@pytest.mark.parametrize("architecture", ["deci", "gemma4", "granite", "command-r"])
def test_architectures_that_transformers_does_not_read(architecture: str, tmp_path: Path) -> None:
    import gguf_files as gf

    file = tmp_path / "a.gguf"
    file.write_bytes(gf.model_file(architecture).out)
    with pytest.raises(GgufError, match=f"general.architecture is '{architecture}'"):
        load_gguf(file)


def test_gpt_oss_of_transformers(tmp_path: Path) -> None:
    """Tells when transformers begins to read the experts of a gpt-oss file."""
    model = tiny_model("gpt-oss")
    file = write_tiny(tmp_path / "a.gguf", "gpt-oss", model, "F32")
    with pytest.raises(AssertionError, match=r"mlp\.experts\.(gate_up|down)_proj"):
        theirs(file, model, "gpt-oss")


@pytest.mark.parametrize("how", ["replaced", "subclass"])
@pytest.mark.parametrize("kind", ["llama", "qwen2moe"])
def test_a_processor_of_unknown_code(kind: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of transformers that changes another tensor than the known class reads all tensors of the file."""
    known = legacy.TENSOR_PROCESSORS[kind]
    process = known.process

    def changed(self: Any, weights: Any, name: str, **kwargs: Any) -> Any:
        return process(self, weights * (2 if "attn_v" in name or "ffn_down" in name else 1), name, **kwargs)

    if how == "replaced":
        monkeypatch.setattr(known, "process", changed)
    else:
        monkeypatch.setitem(legacy.TENSOR_PROCESSORS, kind, type("Another", (known,), {"process": changed}))
    name = known.__name__ if how == "replaced" else "Another"
    model = tiny_model(kind)
    file = write_tiny(tmp_path / "a.gguf", kind, model, "Q8_0")
    loaded = load_gguf(file, dtype=torch.float32)
    assert torch.equal(outputs(loaded), outputs(theirs(file, model, kind)))
    assert not any(isinstance(one, (PackedLinear, PackedEmbedding, PackedExperts)) for one in loaded.modules())
    (reason,) = set(loaded.peft_ext_dense.values())
    assert reason == f"transformers' {name} is not known and may change its values as it reads the file"


@pytest.mark.parametrize(
    "kind", first(["llama", "qwen2moe", "qwen35moe", "lfm2", "t5", "gpt2", "gpt-oss"], ["llama", "lfm2"])
)
def test_missing_tensors(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    for name in file_tensors(kind, model):
        if name in ("token_embd.weight", "output.weight"):
            continue
        missing = {other: tensor for other, tensor in file_tensors(kind, model).items() if other != name}
        file = _written(tmp_path / "a.gguf", kind, model, missing)
        with pytest.raises(GgufError, match=r"no tensor for the parameter|wanted those of|wanted equal sizes"):
            load_gguf(file)


def _written(path: Path, kind: str, model: Any, tensors: Mapping[str, Tensor]) -> Path:
    import tiny_archs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_archs, "file_tensors", lambda kind, model: dict(tensors))
        return write_tiny(path, kind, model, "F32")


@pytest.mark.parametrize("kind", first(["llama", "qwen2moe", "qwen35", "lfm2"], ["llama", "lfm2"]))
def test_wrong_shapes(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    held = file_tensors(kind, model)
    for name, tensor in held.items():
        wrong = torch.cat([tensor, tensor[:1]])
        if name == "token_embd.weight":
            continue
        with pytest.raises(GgufError, match=r"wanted|can't read"):
            load_gguf(_written(tmp_path / "a.gguf", kind, model, {**held, name: wrong}))


def test_tensors_that_no_model_needs(tmp_path: Path) -> None:
    model = tiny_model("llama")
    extra = {"blk.0.attn_rot_embd.weight": torch.ones(32), "rope_freqs.weight": torch.ones(32)}
    loaded = load_gguf(write_tiny(tmp_path / "a.gguf", "llama", model, "F32", {}, extra), dtype=torch.float32)
    assert torch.equal(outputs(loaded), outputs(model))


def test_prediction_layers_of_qwen35(tmp_path: Path) -> None:
    """llama.cpp counts the layers that predict further tokens; transformers' model has none."""
    model = tiny_model("qwen35")
    extra = {"blk.2.nextn.eh_proj.weight": torch.ones(8, 8), "blk.2.nextn.enorm.weight": torch.ones(256)}
    keys = {"qwen35.block_count": 3, "qwen35.nextn_predict_layers": 1}
    loaded = load_gguf(write_tiny(tmp_path / "a.gguf", "qwen35", model, "F32", keys, extra), dtype=torch.float32)
    torch.testing.assert_close(outputs(loaded), outputs(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2moe", "qwen35moe"])
def test_the_gate_of_a_shared_expert(kind: str, tmp_path: Path) -> None:
    """llama.cpp's converters write the gate with the sizes (1, K), and older converters with (K,).

    transformers 5.24 reads the first of Qwen 2's sizes as (1, 1, K), and raises an error.
    """
    model = tiny_model(kind)
    held = file_tensors(kind, model)
    gates = [name for name in held if "ffn_gate_inp_shexp" in name]
    for gate in (lambda tensor: tensor[None], lambda tensor: tensor):
        file = _written(tmp_path / "a.gguf", kind, model, held | {name: gate(held[name]) for name in gates})
        torch.testing.assert_close(outputs(load_gguf(file, dtype=torch.float32)), outputs(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_untrusted_metadata(count: int, tmp_path: Path) -> None:
    """A file with any metadata gives a model, or an error of one line that names the file."""
    from test_checks import random_value

    from peft_ext.gguf import checks, facts

    kinds = ("llama", "gemma3", "gpt-oss", "qwen35moe", "phi3", "qwen3moe", "lfm2", "gpt2", "t5", "mamba")
    written = {kind: tiny_model(kind) for kind in kinds}
    taken, file = 0, tmp_path / "a.gguf"
    fields = sorted({*checks._FIELDS, *facts._NEUTRAL, "rope.scaling.type", "rope.scaling.factor"})
    for number in range(count):
        draw = random.Random(f"load:{number}")
        kind = draw.choice(sorted(written))
        key, (type_, value) = f"{kind}.{draw.choice(fields)}", random_value(draw)
        if isinstance(value, tuple):
            value = list(value[1])
        if value == [] or (isinstance(value, int) and not -(2**31) <= value < 2**32) or type_ == 12:
            continue
        if isinstance(value, int) and value < 0:
            value = float(value)
        write_tiny(file, kind, written[kind], "F32", {key: value, "tokenizer.ggml.tokens": None})
        try:
            load_gguf(file)
        except GgufError as error:
            text = str(error)
            assert text.startswith(f"{file}: ") and text.isprintable() and len(text) < len(str(file)) + 400, key
        else:
            taken += 1
    assert taken > count // 20


def test_epsilon_is_exact() -> None:
    assert torch.tensor(EPSILON).item() == EPSILON


def mutated(tensors: dict[str, Tensor], draw: random.Random) -> dict[str, Tensor]:
    """Returns the tensors with one that has another name or other sizes, or that is missing."""
    tensors, (name, other) = dict(tensors), draw.sample(sorted(tensors), 2)
    tensor = tensors.pop(name)
    kind = draw.randrange(8)
    if kind == 0:
        return tensors
    if kind == 1:
        return tensors | {other: tensor}
    if kind == 2:
        return tensors | {name: tensors[other], other: tensor}
    if kind == 3:
        return tensors | {draw.choice(("blk.1.x.weight", "x", f"{name}.weight", name.replace("0", "1"))): tensor}
    if kind == 4:
        return tensors | {name: tensor.flatten()}
    if kind == 5:
        return tensors | {name: tensor.transpose(0, -1).contiguous()}
    if kind == 6:
        return tensors | {name: tensor[None]} if tensor.dim() < 4 else tensors
    return tensors | {name: torch.cat([tensor, tensor], -1)}


@pytest.mark.parametrize("count", [40, pytest.param(800, marks=pytest.mark.slow)])
def test_untrusted_tensors(count: int, tmp_path: Path) -> None:
    """A file with any names and sizes of tensors gives a model, or an error of one line that names the file."""
    kinds = ("bloom", "gpt-oss", "gpt2", "lfm2", "llama", "mamba", "phi3", "qwen2moe", "qwen35moe", "t5")
    written = {kind: tiny_model(kind) for kind in kinds}
    held = {kind: file_tensors(kind, model) for kind, model in written.items()}
    for number in range(count):
        draw = random.Random(f"tensors:{number}")
        kind = draw.choice(kinds)
        file = _written(tmp_path / "a.gguf", kind, written[kind], mutated(held[kind], draw))
        try:
            load_gguf(file)
        except GgufError as error:
            text = str(error)
            assert text.startswith(f"{file}: ") and text.isprintable() and len(text) < len(str(file)) + 400, text
