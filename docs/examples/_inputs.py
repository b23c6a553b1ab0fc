"""Options, models and training data that the examples use. This file does not use peft_ext.

The training text is the language reference that comes with Python, so an example downloads only the model. With
``--tiny``, an example downloads nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


def options_of(script: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that the examples share; ``script`` is the example's file."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder or a name on the hub")
    parser.add_argument("--tiny", action="store_true", help="use a random model of two layers and download nothing")
    parser.add_argument("--max-steps", type=int, default=20, help="optimizer steps")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs") / Path(script).stem, help="folder for the adapter"
    )
    return parser


def load(options: argparse.Namespace, experts: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the base model in bfloat16, and its tokenizer. The model of ``--tiny`` is float32; see :func:`_tiny`."""
    torch.manual_seed(0)
    if options.tiny:
        return _tiny(experts)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16), tokenizer


def _tiny(experts: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a random Llama, or a Qwen3-MoE if ``experts`` > 0, and a tokenizer with a token for each byte."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    sizes = {
        "vocab_size": len(tokens), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if experts:
        own = {"head_dim": 16, "moe_intermediate_size": 64, "num_experts": experts, "num_experts_per_tok": 2}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **own)), tokenizer
    return LlamaForCausalLM(LlamaConfig(**sizes)), tokenizer


def blocks(tokenizer: PreTrainedTokenizerBase, count: int, length: int = 64) -> list[dict[str, list[int]]]:
    """Returns ``count`` blocks of ``length`` tokens each, as training data for a language model."""

    def tokens() -> Iterator[int]:
        while True:
            for name in sorted(topics):
                yield from tokenizer(topics[name], verbose=False)["input_ids"]

    stream = tokens()
    cut = [list(islice(stream, length)) for _ in range(count)]
    return [{"input_ids": ids, "attention_mask": [1] * length, "labels": ids} for ids in cut]


def batches(tokenizer: PreTrainedTokenizerBase, count: int, size: int = 4) -> torch.utils.data.DataLoader:
    """Returns a DataLoader of ``count`` batches of tensors; each batch has ``size`` blocks."""
    tensors = [{name: torch.tensor(ids) for name, ids in block.items()} for block in blocks(tokenizer, count * size)]
    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.DataLoader(tensors, batch_size=size, shuffle=True, generator=generator)


def questions(count: int, length: int = 100) -> list[dict[str, str]]:
    """Returns ``count`` rows: a prompt, its right answer (``chosen``) and another prompt's answer (``rejected``)."""
    names = sorted(topics)
    texts = [" ".join(topics[name].split())[:length] for name in names]
    picked = [number % len(names) for number in range(count)]
    return [
        {"prompt": f"Explain Python's {names[n]}: ", "chosen": texts[n], "rejected": texts[n - 1]} for n in picked
    ]  # fmt: skip


def summary(losses: list[float]) -> str:
    """Returns a line with the first and the last loss. Raises ValueError without losses, or if one is not finite."""
    if not losses or not all(map(math.isfinite, losses)):
        raise ValueError(f"the losses are {losses}")
    return f"loss: {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps"


def figures(metrics: dict[str, float]) -> str:
    """Returns a line with the measurements of ``PeftExtCallback`` among the metrics of ``Trainer.train``."""
    names = ("tokens_per_s", "fused_share", "peak_mib", "peak_cuda_mib")
    return ", ".join(f"{name} {metrics[name]:g}" for name in names if name in metrics)
