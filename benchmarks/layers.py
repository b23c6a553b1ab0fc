"""Times adapted layers at the shapes that people train on CPUs, compared with the frozen layer and PEFT's layer.

``python -m benchmarks.layers`` times a training step of one layer, forward and backward, of three contenders: PyTorch's
frozen layer, PEFT's layer (over NF4 with bitsandbytes' layer), and PEFT's layer after ``peft_ext.accelerate``. Each
contender has up to 64 layers of a shape and runs a step on one layer after the other, as in a model, so that the
weights of large shapes are not in a cache from an earlier call. The contenders are timed in turn. The result file has
the median and the quartiles, over the rounds, of the ratios of two contenders' times. Low-rank adapters have rank 16
or the rank of ``--rank``, and adapters are float32. The name of a result file contains the rank if it is not 16.

In bfloat16, the default, the shapes are those of the linear layers, without heads, of SmolLM2-135M, Qwen2.5-0.5B,
Llama-3.2-1B, BERT-base and GPT-2, with 16 to 4,096 tokens. ``--dtype float32`` measures some of the shapes with 512
tokens, also for DoRA and IA3, since CPUs without bfloat16 instructions train in float32. The help of
``python -m benchmarks`` tells how to measure another CPU path than the best path.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .command import command_parser
from .files import record
from .harness import machine, measured_ceilings

RANK = 16  # The rank of the adapters in the tables of docs/performance.md.
# A contender has so many layers of a shape that their dense weights fill ROTATING_BYTES bytes, but at most MOST_LAYERS.
ROTATING_BYTES, MOST_LAYERS = 1 << 26, 64


@dataclass(frozen=True)
class Plan:
    """The measurements in a dtype. ``shapes``: numbers (K, N) of input and output features of layers. ``tokens``:
    numbers of tokens of a step. ``methods``: names of methods in ``_configs()``."""

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    methods: tuple[str, ...]


PLANS = {
    torch.bfloat16: Plan(
        (
            (576, 576), (576, 192), (576, 1536), (1536, 576),  # SmolLM2-135M
            (896, 896), (896, 128), (896, 4864), (4864, 896),  # Qwen2.5-0.5B
            (2048, 2048), (2048, 512), (2048, 8192), (8192, 2048),  # Llama-3.2-1B
            (768, 768), (768, 2304), (768, 3072), (3072, 768),  # BERT-base, GPT-2
        ),
        (16, 64, 256, 1024, 4096),
        ("LoRA", "QLoRA, dropout 0.05"),
    ),
    torch.float32: Plan(
        ((576, 576), (576, 1536), (768, 768), (768, 3072), (2048, 2048), (2048, 512)), (512,),
        ("LoRA", "LoRA, dropout 0.05", "QLoRA", "QLoRA, dropout 0.05", "DoRA", "IA3"),
    ),
}  # fmt: skip
NAMES = {torch.bfloat16: "layer-shapes", torch.float32: "layer-float32"}


class Layers(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def _linear(k: int, n: int, dtype: torch.dtype) -> nn.Module:
    return nn.Linear(k, n, bias=False, dtype=dtype)


def _linear4bit(k: int, n: int, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    how = {"quant_type": "nf4", "compress_statistics": True}
    layer = Linear4bit(k, n, bias=False, compute_dtype=dtype, **how)
    layer.weight = Params4bit((torch.randn(n, k) * 0.02).to(dtype), requires_grad=False, **how)
    return layer.to("cpu")


def _configs(rank: int) -> dict[str, tuple[Callable[..., nn.Module], Any]]:
    from peft import IA3Config, LoraConfig

    lora = {"r": rank, "target_modules": r"layers\.\d+", "init_lora_weights": False}
    return {
        "LoRA": (_linear, LoraConfig(**lora)),
        "LoRA, dropout 0.05": (_linear, LoraConfig(**lora, lora_dropout=0.05)),
        "QLoRA": (_linear4bit, LoraConfig(**lora)),
        "QLoRA, dropout 0.05": (_linear4bit, LoraConfig(**lora, lora_dropout=0.05)),
        "DoRA": (_linear, LoraConfig(**lora, use_dora=True)),
        "IA3": (_linear, IA3Config(target_modules=r"layers\.\d+", feedforward_modules=[])),
    }


class Contender:
    """The layers of one contender, all of one shape. Each step runs on the next layer."""

    def __init__(self, kind: str, make: Callable[..., nn.Module], config: Any, k: int, n: int, dtype: torch.dtype):
        import peft

        import peft_ext

        torch.manual_seed(0)
        if kind == "frozen":
            make = _linear
        count = min(MOST_LAYERS, -(-ROTATING_BYTES // (k * n * dtype.itemsize)))
        model: Any = Layers([make(k, n, dtype).requires_grad_(False) for _ in range(count)])
        if kind != "frozen":
            with_adapter = peft.get_peft_model(model, config).train()
            model = (with_adapter if kind == "stock" else peft_ext.accelerate(with_adapter)).base_model.model
        self.layers, self.turn = list(model.layers), 0

    def step(self, x: Tensor, grad: Tensor) -> float:
        """Returns the seconds that a training step of the next layer takes."""
        layer = self.layers[self.turn]
        self.turn = (self.turn + 1) % len(self.layers)
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        start = time.perf_counter()
        layer(x).backward(grad)
        return time.perf_counter() - start


def _ratio(over: list[float], under: list[float]) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(over, under, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


def _calls(tokens: int, k: int, n: int) -> int:
    """Returns the number of steps that a round times for each contender: up to eight, and fewer for a long step."""
    return max(1, min(8, int(4e9 // (4 * tokens * k * n + 1e8))))


def measure(dtype: torch.dtype, rounds: int, rank: int = RANK) -> dict[str, Any]:
    """Returns the rank of the adapters, the ceilings of the run, and a row for each shape, number of tokens and
    method."""
    plan, ceilings, rows = PLANS[dtype], measured_ceilings(), []
    configs = {method: _configs(rank)[method] for method in plan.methods}
    for k, n in plan.shapes:
        made = partial(Contender, k=k, n=n, dtype=dtype)
        contenders = {("frozen", ""): made("frozen", _linear, None)} | {
            (kind, method): made(kind, *config) for method, config in configs.items() for kind in ("stock", "ours")
        }
        for tokens in plan.tokens:
            x = torch.randn(tokens, k).to(dtype).requires_grad_()
            grad = torch.randn(tokens, n).to(dtype)
            times: dict[tuple[str, str], list[float]] = {name: [] for name in contenders}
            calls, order = _calls(tokens, k, n), list(contenders)
            for i in range(rounds + 1):
                for name in order[i % len(order) :] + order[: i % len(order)]:
                    # The first step of a contender's turn is not timed, because the caches still hold the data of the
                    # previous contender.
                    contenders[name].step(x, grad)
                    mean = statistics.mean(contenders[name].step(x, grad) for _ in range(calls))
                    if i > 0:  # the first round warms up and does not count
                        times[name].append(mean)
            for method in configs:
                frozen, stock, ours = times[("frozen", "")], times[("stock", method)], times[("ours", method)]
                of = {"frozen": frozen, "stock": stock, "ours": ours}
                rows.append({
                    "method": method, "k": k, "n": n, "tokens": tokens,
                    "milliseconds": {kind: round(statistics.median(taken) * 1e3, 3) for kind, taken in of.items()},
                    "of_frozen": _ratio(ours, frozen), "stock_of_frozen": _ratio(stock, frozen),
                    "over_stock": _ratio(stock, ours),
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    return {"rank": rank, "ceilings": ceilings, "rows": rows}


def subject(dtype: torch.dtype, rank: int) -> str:
    """Returns kind and subject of a result file, such as "layer-shapes" or "layer-shapes_rank8"."""
    return NAMES[dtype] + (f"_rank{rank}" if rank != RANK else "")


def main(argv: Optional[list[str]] = None) -> None:
    parser = command_parser("benchmarks.layers", __doc__)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rank", type=int, default=RANK, help="rank of low-rank adapters; default: 16")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/layer-shapes-<isa>-<date>"
                        ".json, of float32 layer-float32-<isa>-<date>.json, and for a rank of 8 layer-shapes_rank8-"
                        "<isa>-<date>.json")  # fmt: skip
    args = parser.parse_args(argv)
    if args.rank < 1:
        parser.error(f"--rank is {args.rank}, expected at least 1")
    dtype = getattr(torch, args.dtype)
    record(subject(dtype, args.rank), {"machine": machine(), **measure(dtype, args.rounds, args.rank)}, args.out)


if __name__ == "__main__":
    main()
