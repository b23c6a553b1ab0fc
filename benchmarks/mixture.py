"""Times training steps of a mixture-of-experts model whose experts are stacked matrices, as in transformers."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from .command import run_alone

# Sizes of a Qwen3-MoE of 4 layers. A layer has 64 experts of hidden size 512 and intermediate size 256; the router
# gives each token to 4 experts.
MIXTURE = {
    "hidden_size": 512,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "vocab_size": 1000,
}
KINDS = {
    "frozen": "the frozen model, its input's gradient wanted",
    "stock": "PEFT",
    "ours": "peft_ext",
    "dropout": "peft_ext, dropout 0.05 on the experts",
    "nf4": "peft_ext over NF4",
    "dora sums": "DoRA, by the sums of weights",
    "dora": "peft_ext, DoRA",
    "dora nf4": "peft_ext, DoRA over NF4",
}


def train(kind: str, steps: int, batch: int, length: int, sizes: dict[str, Any] = MIXTURE) -> dict[str, Any]:
    """Times ``steps`` forwards and backwards of the contender ``kind`` (a key of KINDS), after an untimed forward and
    backward. No optimizer runs."""
    from peft import LoraConfig
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    import peft_ext
    from peft_ext.integrations.transformers import keep_freed_memory, peak_memory_mib

    keep_freed_memory()
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, use_cache=False))
    model = model.to(torch.bfloat16).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    if kind.endswith("nf4"):
        peft_ext.quantize_nf4(model, progress=False)
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    embeddings = model.get_input_embeddings()
    if kind != "frozen":
        config = LoraConfig(
            r=16, lora_alpha=32, init_lora_weights=False, use_dora=kind.startswith("dora"),
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )  # fmt: skip
        # PEFT has no DoRA on experts. The kind "dora sums" has peft_ext's unaccelerated layers on experts, and PEFT's
        # layers elsewhere.
        accelerate = kind not in ("stock", "dora sums")
        dropout = 0.05 if kind == "dropout" else 0.0
        model = peft_ext.get_peft_model(model, config, accelerate=accelerate, experts_dropout=dropout)
    model.train()
    tokens = torch.randint(0, sizes["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))
    seconds, losses = [], []
    for _ in range(1 + steps):
        start = time.perf_counter()
        x = embeddings(tokens).detach().requires_grad_(kind == "frozen")
        loss = model(inputs_embeds=x, labels=tokens).loss
        loss.backward()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
        losses.append(loss.item())
    return {
        "step_ms": round(1000 * statistics.median(seconds[1:]), 2), "peak_mib": round(peak_memory_mib() or 0),
        "weights_mib": round(weights / 2**20, 1), "loss": round(losses[0], 5),
    }  # fmt: skip


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the contenders of KINDS in turn, each run in its own process. In a round each contender runs once, and a
    ratio divides figures of two runs of the same round."""
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(args.repeats):
        for kind in KINDS:
            sizes = ("--steps", args.steps, "--batch", args.batch, "--length", args.length)
            runs[kind].append(run_alone("e2e", "mixture", kind, *sizes))
            print(f"{kind}: {runs[kind][-1]}", flush=True)

    def ratio(kind: str, of: str, key: str) -> float:
        return round(statistics.median(a[key] / b[key] for a, b in zip(runs[kind], runs[of], strict=True)), 3)

    return {
        "what": "a Qwen3-MoE of 4 layers of 64 experts (hidden size 512, intermediate size 256, 4 experts a token) "
        f"with random bf16 weights, LoRA of rank 16 on attention and experts, {args.batch} x {args.length} tokens",
        "model": ", ".join(f"{key} {value}" for key, value in MIXTURE.items()),
        "runs": runs,
        "rows": [
            {"kind": kind, "name": name, "time": ratio(kind, "frozen", "step_ms"),
             "over_stock": round(1 / ratio(kind, "stock", "step_ms"), 3),
             "memory": ratio(kind, "frozen", "peak_mib"), "weights": ratio(kind, "frozen", "weights_mib")}
            for kind, name in KINDS.items()
        ],
    }  # fmt: skip
