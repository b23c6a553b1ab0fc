"""Writes a tiny random model and data for it, with torch, transformers and the standard library alone.

python tests/support/tiny_llama.py FOLDER    writes FOLDER/model and FOLDER/pairs.jsonl
"""

import json
import sys
from pathlib import Path

import torch


def write_tiny_model(folder: Path, experts: int = 0) -> None:
    """Writes a random bfloat16 Llama of two layers, or with ``experts`` a Qwen3-MoE, and a tokenizer of bytes."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(tokens), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0,
        "eos_token_id": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    kind = "Qwen3Moe" if experts else "Llama"
    own = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    config = getattr(transformers, f"{kind}Config")(**sizes, **(own if experts else {}))
    getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)


def write_pairs(file: Path) -> None:
    """Writes 24 prompts with completions."""
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    write_tiny_model(Path(sys.argv[1], "model"))
    write_pairs(Path(sys.argv[1], "pairs.jsonl"))
