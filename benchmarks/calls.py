"""Times what the call of a layer takes in addition to its arithmetic: Python, dispatch and autograd.

``python -m benchmarks.calls`` times a chain of 50 layers of 64 x 64 on one thread: frozen, with PEFT's layers, and with
PEFT's layers after ``peft_ext.accelerate``. The chain gets two tokens, except that a chain of 4-bit layers gets 40
tokens, because bitsandbytes dequantizes the weight only for an input of many tokens. The benchmark times a forward in
training, a forward and backward in training ("step"), and a forward in evaluation, and runs the three models in turn. A
result is the median, over the rounds, of the microseconds that one layer takes; a ratio is the median of the rounds'
ratios.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .command import command_parser
from .files import record
from .harness import machine

LAYERS, SIZE = 50, 64
KINDS = ("frozen", "stock", "ours")
CALLS = ("forward in training", "step", "forward in evaluation")


class Chain(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make() for _ in range(LAYERS)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _linear() -> nn.Module:
    return nn.Linear(SIZE, SIZE)


def _linear4bit() -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(SIZE, SIZE, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = Params4bit(torch.randn(SIZE, SIZE), requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


def _configs() -> dict[str, tuple[Callable[[], nn.Module], Tensor, Any]]:
    """Returns a dict from the name of each method to a function that makes a base layer, the chain's input, and PEFT's
    configuration."""
    from peft import AdaLoraConfig, IA3Config, LoraConfig

    targets = [f"layers.{i}" for i in range(LAYERS)]
    few, some = torch.randn(2, SIZE), torch.randn(40, SIZE, dtype=torch.bfloat16)
    lora = {"r": 8, "target_modules": targets}
    return {
        "LoRA": (_linear, few, LoraConfig(**lora)),
        "LoRA, dropout 0.05": (_linear, few, LoraConfig(**lora, lora_dropout=0.05)),
        "QLoRA": (_linear4bit, some, LoraConfig(**lora)),
        "DoRA": (_linear, few, LoraConfig(**lora, use_dora=True)),
        "QDoRA": (_linear4bit, some, LoraConfig(**lora, use_dora=True)),
        "AdaLoRA": (_linear, few, AdaLoraConfig(init_r=8, target_r=4, total_step=100, target_modules=targets)),
        "IA3": (_linear, few, IA3Config(target_modules=targets, feedforward_modules=[])),
    }


def _model(kind: str, make: Callable[[], nn.Module], config: Any) -> nn.Module:
    import peft

    import peft_ext

    torch.manual_seed(0)
    chain = Chain(make)
    if kind == "frozen":
        return chain.requires_grad_(False)
    model = peft.get_peft_model(chain, config)
    return model if kind == "stock" else peft_ext.accelerate(model)


def _timed(call: Callable[[], Any], repeats: int) -> float:
    """Returns the microseconds of the fastest of ``repeats`` calls, divided by the number of layers of the chain."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) / LAYERS * 1e6


def _training(model: nn.Module, x: Tensor, repeats: int) -> list[float]:
    model.train()
    leaf = x.clone().requires_grad_()
    return [_timed(lambda: model(leaf), repeats), _timed(lambda: model(leaf).sum().backward(), repeats)]


@torch.no_grad()
def _evaluation(model: nn.Module, x: Tensor, repeats: int) -> float:
    model.eval()
    return _timed(lambda: model(x), repeats)


def measure(rounds: int, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows = []
    for method, (make, x, config) in _configs().items():
        models = {kind: _model(kind, make, config) for kind in KINDS}
        found: dict[str, dict[str, list[float]]] = {call: {kind: [] for kind in KINDS} for call in CALLS}
        # Evaluation is timed last, because bitsandbytes repacks a weight in evaluation, and a layer with a repacked
        # weight cannot train.
        for calls in (CALLS[:2], CALLS[2:]):
            for i in range(rounds + 1):
                for kind, model in models.items():
                    taken = _training(model, x, repeats) if calls[1:] else [_evaluation(model, x, repeats)]
                    for call, microseconds in zip(calls, taken, strict=True):
                        if i > 0:  # the first round warms up and does not count
                            found[call][kind].append(microseconds)
        row: dict[str, Any] = {"method": method}
        for call, by_kind in found.items():
            median = {kind: round(statistics.median(values), 1) for kind, values in by_kind.items()}
            ratios = [ours / stock for ours, stock in zip(by_kind["ours"], by_kind["stock"], strict=True)]
            row[call] = {**median, "of_stock": round(statistics.median(ratios), 3)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {"rows": rows}


def main() -> None:
    parser = command_parser("benchmarks.calls", __doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--out", type=Path, help="result file; default: benchmarks/results/layer-calls-<isa>-<date>.json"
    )
    args = parser.parse_args()
    record("layer-calls", {"machine": machine(), **measure(args.rounds, args.repeats)}, args.out)


if __name__ == "__main__":
    main()
