"""A mixture's experts in a training step: as transformers keeps them, a stack of matrices, or a module each."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Of Qwen3-MoE: 4 layers of 64 experts of 512 and 256, of which a token has 4.
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
# Of experts that are modules, called in a loop.
MODULE_KINDS = {
    "modules frozen": KINDS["frozen"],
    "modules stock": "PEFT",
    "modules layers": "peft_ext, `blocks=False`: each expert by itself",
    "modules ours": "peft_ext",
    "modules dropout": "peft_ext, dropout 0.05",
    "modules nf4": "peft_ext over NF4",
}


def as_modules(model: Any, experts: int, top: int) -> None:
    """Gives a Qwen3's layers experts that are modules, in the loop that Qwen3-MoE had before transformers 5."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    class Block(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.top_k = experts, top
            self.gate = nn.Linear(config.hidden_size, experts, bias=False)
            self.experts = nn.ModuleList(Qwen3MLP(config) for _ in range(experts))

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            shape = hidden_states.shape
            x = hidden_states.view(-1, shape[-1])
            weights, chosen = torch.topk(F.softmax(self.gate(x), dim=1, dtype=torch.float), self.top_k, dim=-1)
            weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
            out = torch.zeros_like(x)
            mask = F.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
            for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
                layer = self.experts[expert]
                at, token = torch.where(mask[expert].squeeze(0))
                rows = x[None, token].reshape(-1, shape[-1])
                result = layer(rows) * weights[token, at, None]
                out.index_add_(0, token, result.to(x.dtype))
            return out.reshape(shape)

    for layer in model.model.layers:
        layer.mlp = Block(model.config)


def train(kind: str, steps: int, batch: int, length: int, sizes: dict[str, Any] = MIXTURE) -> dict[str, Any]:
    """``steps`` measured forwards and backwards of one of KINDS after one to warm up; no optimizer."""
    from peft import LoraConfig
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    import peft_ext
    from peft_ext.integrations.transformers import keep_freed_memory, peak_memory_mib

    keep_freed_memory()
    torch.manual_seed(0)
    are_modules, kind = kind.startswith("modules "), kind.removeprefix("modules ")
    if are_modules:
        # Not a Qwen3-MoE by name: PEFT takes the names of one's layers for those of the stacks that it has now.
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, use_cache=False))
        as_modules(model, sizes["num_experts"], sizes["num_experts_per_tok"])
    else:
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
        attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
        if are_modules:
            targets: dict[str, Any] = {"target_modules": [*attention, "gate_proj", "up_proj", "down_proj"],
                                       "lora_dropout": 0.05 if kind == "dropout" else 0.0}  # fmt: skip
        else:
            targets = {"target_modules": attention,
                       "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}  # fmt: skip
        config = LoraConfig(r=16, lora_alpha=32, init_lora_weights=False, use_dora=kind.startswith("dora"), **targets)
        # PEFT has no DoRA on experts: its other layers are PEFT's, and those of the experts ours, not accelerated.
        accelerate = kind not in ("stock", "dora sums", "layers")
        dropout = 0.05 if kind == "dropout" and not are_modules else 0.0
        model = peft_ext.get_peft_model(model, config, accelerate=accelerate, experts_dropout=dropout)
        if kind == "layers":
            peft_ext.accelerate(model, blocks=False)
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
    """Each kind in turn, each run a process of its own; ratios are of runs that follow each other."""
    kinds, begin = (MODULE_KINDS, "modules ") if args.modules else (KINDS, "")
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(args.repeats):
        for kind in kinds:
            command = [sys.executable, "-m", "benchmarks.e2e", "mixture", kind, "--steps", str(args.steps),
                       "--batch", str(args.batch), "--length", str(args.length)]  # fmt: skip
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[kind].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{kind}: {runs[kind][-1]}", flush=True)

    def ratio(kind: str, of: str, key: str) -> float:
        return round(statistics.median(a[key] / b[key] for a, b in zip(runs[kind], runs[of], strict=True)), 3)

    each = ", each a module," if args.modules else ""
    return {
        "what": f"a Qwen3-MoE of 4 layers of 64 experts (512, 256, top 4){each} with random bf16 weights, LoRA of rank "
        f"16 on attention and experts, {args.batch} x {args.length} tokens",
        "model": ", ".join(f"{key} {value}" for key, value in MIXTURE.items()),
        "runs": runs,
        "rows": [
            {"kind": kind, "name": name, "time": ratio(kind, f"{begin}frozen", "step_ms"),
             "over_stock": round(1 / ratio(kind, f"{begin}stock", "step_ms"), 3),
             "memory": ratio(kind, f"{begin}frozen", "peak_mib"),
             "weights": ratio(kind, f"{begin}frozen", "weights_mib")}
            for kind, name in kinds.items()
        ],
    }  # fmt: skip
