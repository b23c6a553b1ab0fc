"""Adapted layers in float32, the dtype in which a CPU without a bfloat16 dot product trains, against PEFT's own.

``python -m benchmarks.float32`` times a training step of one layer, forward and backward, on 512 tokens: frozen in
PyTorch, as PEFT has it (over NF4 with bitsandbytes' layer), and as ours, at the shapes of SmolLM2-135M, of a model 768
wide and of Llama-3.2-1B. The three take turns; ratios are of each round, their median and quartiles are written. To see
another path than the CPU's best, force ours and PyTorch's as for ``python -m benchmarks``; rank 16, float32 adapters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .harness import machine

RESULTS = Path(__file__).parent / "results"
SHAPES = ((576, 576), (576, 1536), (768, 768), (768, 3072), (2048, 2048), (2048, 512))
TOKENS = 512
KINDS = ("frozen", "stock", "ours")


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _linear(k: int, n: int) -> nn.Module:
    return nn.Linear(k, n, bias=False)


def _linear4bit(k: int, n: int) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    how = {"quant_type": "nf4", "compress_statistics": True}
    layer = Linear4bit(k, n, bias=False, compute_dtype=torch.float32, **how)
    layer.weight = Params4bit(torch.randn(n, k) * 0.02, requires_grad=False, **how)
    return layer.to("cpu")


def _configs() -> dict[str, tuple[Callable[[int, int], nn.Module], Any]]:
    from peft import IA3Config, LoraConfig

    lora = {"r": 16, "target_modules": ["layer"], "init_lora_weights": False}
    return {
        "LoRA": (_linear, LoraConfig(**lora)),
        "LoRA, dropout 0.05": (_linear, LoraConfig(**lora, lora_dropout=0.05)),
        "QLoRA": (_linear4bit, LoraConfig(**lora)),
        "QLoRA, dropout 0.05": (_linear4bit, LoraConfig(**lora, lora_dropout=0.05)),
        "DoRA": (_linear, LoraConfig(**lora, use_dora=True)),
        "IA3": (_linear, IA3Config(target_modules=["layer"], feedforward_modules=[])),
    }


def _model(kind: str, make: Callable[[int, int], nn.Module], config: Any, k: int, n: int) -> nn.Module:
    import peft

    import peft_ext

    torch.manual_seed(0)
    if kind == "frozen":
        return _linear(k, n).requires_grad_(False)
    model = peft.get_peft_model(One(make(k, n)), config).train()
    return model if kind == "stock" else peft_ext.accelerate(model)


def _step(model: nn.Module, x: Tensor, grad: Tensor) -> float:
    x.grad = None
    for parameter in model.parameters():
        parameter.grad = None
    start = time.perf_counter()
    model(x).backward(grad)
    return time.perf_counter() - start


def _ratio(times: dict[str, list[float]], over: str, under: str) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(times[over], times[under], strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


def measure(rounds: int) -> dict[str, Any]:
    rows = []
    for k, n in SHAPES:
        x, grad = torch.randn(TOKENS, k, requires_grad=True), torch.randn(TOKENS, n)
        for method, (make, config) in _configs().items():
            models = {kind: _model(kind, make, config, k, n) for kind in KINDS}
            times: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for i in range(rounds + 1):
                for kind, model in models.items():
                    _step(model, x, grad)  # what another left in the caches is not its own time
                    taken = min(_step(model, x, grad) for _ in range(2))
                    if i > 0:  # the first warms up
                        times[kind].append(taken)
            rows.append({
                "method": method, "k": k, "n": n, "tokens": TOKENS,
                "milliseconds": {kind: round(statistics.median(taken) * 1e3, 3) for kind, taken in times.items()},
                "of_frozen": _ratio(times, "ours", "frozen"), "over_stock": _ratio(times, "stock", "ours"),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.float32", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/e2e-float32-<isa>-<date>.json")
    args = parser.parse_args()
    about = machine()
    result = {"machine": about, **measure(args.rounds)}
    out = args.out or RESULTS / f"e2e-float32-{about['isa']}-{about['date']}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
