"""Makes stand-ins for the hub's tiny models that PEFT's tests load: equal classes, similar sizes, random weights.

The stand-ins are in a cache folder with the layout of the hub's cache, where ``from_pretrained`` finds them by the
hub's names without a network. Tests that need something that a stand-in lacks (a tokenizer, another revision, trained
weights) still need the hub.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers as hf

_REVISION = "0" * 40
_SMALL = {"vocab_size": 1000, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
_LLAMA = {**_SMALL, "intermediate_size": 64, "num_key_value_heads": 4, "max_position_embeddings": 128}
_GPT = {"vocab_size": 1000, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 128}
_BERT = {**_SMALL, "intermediate_size": 37, "max_position_embeddings": 128}
_GPT2 = (hf.GPT2LMHeadModel, lambda: hf.GPT2Config(**_GPT))
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (hf.OPTForCausalLM, lambda: hf.OPTConfig(
        **_SMALL, ffn_dim=37, word_embed_proj_dim=32, max_position_embeddings=128)),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _GPT2,
    "hf-internal-testing/tiny-random-gpt2": _GPT2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (hf.GPTJForCausalLM, lambda: hf.GPTJConfig(
        **_GPT, rotary_dim=4)),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**_LLAMA)),
    "peft-internal-testing/tiny-dummy-qwen2": (hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**_LLAMA)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (hf.Gemma3ForCausalLM, lambda: hf.Gemma3TextConfig(
        **_LLAMA, head_dim=8)),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (hf.MistralForCausalLM, lambda: hf.MistralConfig(**_LLAMA)),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        hf.BertForSequenceClassification, lambda: hf.BertConfig(**_BERT)),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        hf.RobertaForSequenceClassification, lambda: hf.RobertaConfig(**_BERT)),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        hf.LlamaForSequenceClassification, lambda: hf.LlamaConfig(**_LLAMA, pad_token_id=0)),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (hf.Llama4ForCausalLM, lambda: hf.Llama4TextConfig(
        **{**_LLAMA, "intermediate_size": 32}, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1,
        head_dim=8, pad_token_id=0, interleave_moe_layer_step=1)),
    "trl-internal-testing/tiny-GptOssForCausalLM": (hf.GptOssForCausalLM, lambda: hf.GptOssConfig(
        **{**_LLAMA, "intermediate_size": 32}, num_local_experts=4, num_experts_per_tok=2, head_dim=8,
        pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 1e4})),
}  # fmt: skip


def give_name(source: Path, target: Path) -> None:
    """Renames the folder ``source``; leaves a folder ``target`` that another process has made meanwhile."""
    try:
        os.replace(source, target)
    except OSError:
        if not target.is_dir():
            raise


def write(cache: Path) -> Path:
    """Writes all of MODELS into the folder ``cache``, for use as HF_HUB_CACHE, and returns ``cache``.

    Several processes may use one cache: each model is written into a temporary folder, which then gets its name.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for name, (kind, config) in MODELS.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        if (folder / "refs/main").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete folder
        with tempfile.TemporaryDirectory(prefix="writing-", dir=cache) as temporary:
            torch.manual_seed(0)
            model = Path(temporary, "model")
            kind(config()).save_pretrained(model / "snapshots" / _REVISION)
            (model / "refs").mkdir()
            (model / "refs/main").write_text(_REVISION)
            give_name(model, folder)
    return cache
