"""Runs small trainings, and computes digests of their losses and of the trained parameters.

    python trainings.py RUNS

trains each case RUNS times on one thread and on two threads, and prints the digests as JSON.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator

import peft
import torch
from tiny_models import ARCHITECTURES
from torch import nn

from peft_ext import BottleneckConfig, get_peft_model, quantize_nf4

_LOW_RANK = {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
METHODS = {
    "LoRA": lambda: peft.LoraConfig(**_LOW_RANK),
    "DoRA": lambda: peft.LoraConfig(use_dora=True, **_LOW_RANK),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=6, target_r=4, tinit=1, tfinal=1, deltaT=1, total_step=4, lora_dropout=0.1,
        target_modules="all-linear", task_type="CAUSAL_LM",
    ),
    "IA3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "bottleneck": lambda: BottleneckConfig(task_type="CAUSAL_LM"),
}  # fmt: skip
BASES = ("float32", "bfloat16", "nf4")  # nf4: quantized from bfloat16
CASES = tuple(itertools.product(METHODS, BASES))
STEPS = 4


def adapted(method: str, base: str) -> nn.Module:
    torch.manual_seed(3)
    model = ARCHITECTURES["Llama"].build()
    if base != "float32":
        model = model.to(torch.bfloat16)
    if base == "nf4":
        quantize_nf4(model, progress=False)
    return get_peft_model(model, METHODS[method]()).train()


def train(model: nn.Module, steps: int = STEPS) -> Iterator[torch.Tensor]:
    """Yields the loss of each step, then the trained parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    batch = ARCHITECTURES["Llama"].batch()
    torch.manual_seed(4)
    for index in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        if hasattr(model.base_model, "rankallocator"):
            model.base_model.update_and_allocate(index)
        optimizer.zero_grad()
        yield loss.detach()
    yield from (parameter.detach() for parameter in trained)


def digest(method: str, base: str, threads: int) -> str:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = hashlib.sha256()
        for tensor in train(adapted(method, base)):
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    found = {f"{threads} {' '.join(case)}": [digest(*case, threads) for _ in range(int(sys.argv[1]))]
             for threads in (1, 2) for case in CASES}  # fmt: skip
    print(json.dumps(found))
