"""Measures how long each part of a training step takes, with PyTorch's profiler.

``python -m benchmarks.e2e parts`` runs LoRA with dropout 0.05 in peft_ext and in PEFT, and the frozen model, at two
widths. The time of a part of a step is the sum of the own times of the part's operators; an operator's own time leaves
out the operators that it calls. The name of an operator, and the shapes of its inputs, decide to which part the
operator belongs. peft_ext computes the activation of a gated MLP and the MLP's last layer by one operator, so that the
time of peft_ext's linear layers includes the activation.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from .command import run_alone

NAME = "step-parts-avx512_bf16"
METHOD = "LoRA, dropout 0.05"
LINEAR, ATTENTION, HEAD, OPTIMIZER, ELEMENTWISE, REST = PARTS = (
    "linear layers", "attention", "head and loss", "optimizer", "other operators", "between operators",
)  # fmt: skip
# The first pattern that matches an operator's name gives the part that the operator belongs to. Operators of the
# optimizer, and operators with an input dimension of the vocabulary's size (head and loss), do not need a pattern.
PATTERNS = (
    (ATTENTION, r"scaled_dot_product|attention"),
    (HEAD, r"cross_entropy|log_softmax|nll_loss"),
    (LINEAR, r"(aten::(mm|addmm|bmm)|peft_ext::(lora|gated_lora|nf4_lora|dora|ia3|nf4)_\w+)$"),
)


def part_of(event: FunctionEvent, vocabulary: int) -> str:
    """Returns the part of a step, one of :data:`PARTS`, that a profiled operator belongs to."""
    above = event
    while above is not None:
        if above.name.startswith("Optimizer."):
            return OPTIMIZER
        above = above.cpu_parent
    if any(vocabulary in shape for shape in event.input_shapes or () if isinstance(shape, (list, tuple))):
        return HEAD
    return next((part for part, pattern in PATTERNS if re.search(pattern, event.name)), ELEMENTWISE)


def sums(events: Iterable[FunctionEvent], vocabulary: int) -> dict[str, float]:
    """Returns a dict from each part of a training step to the milliseconds that the part's operators take, each
    operator without the operators that it calls."""
    found = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if event.name.startswith(("aten::", "peft_ext::", "Optimizer.")):
            found[part_of(event, vocabulary)] += event.self_cpu_time_total / 1e3
    return found


def train(kind: str, shape: str, steps: int, batch: int, length: int) -> dict[str, Any]:
    """Returns a dict with the median milliseconds of a training step of the contender ``kind``, and of each part of the
    step."""
    from . import e2e

    vocabulary = e2e.SHAPES[shape][0]["vocab_size"]
    step = e2e.stepper(e2e.METHODS[METHOD], kind, steps, e2e.SHAPES[shape][0])
    torch.manual_seed(1)
    found = []
    for turn in range(1 + steps):
        tokens = torch.randint(0, vocabulary, (batch, length))
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            start = time.perf_counter()
            step(tokens, turn)
            milliseconds = 1e3 * (time.perf_counter() - start)
        parts = sums(profiler.events(), vocabulary)
        found.append({**parts, REST: max(0.0, milliseconds - sum(parts.values())), "step": milliseconds})
    return {name: round(statistics.median(run[name] for run in found[1:]), 2) for name in found[0]}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Runs each contender at each width in a process of its own, and returns a row for each width."""
    from . import e2e

    rows = []
    for shape in args.shapes:
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in e2e.KINDS}
        for _ in range(args.repeats):
            for kind in e2e.KINDS:
                sizes = ("--steps", args.steps, "--batch", args.batch, "--length", args.length)
                runs[kind].append(run_alone("e2e", "part", kind, shape, *sizes))
                print(f"{shape}, {kind}: {runs[kind][-1]}", flush=True)
        rows.append({"shape": shape, "what": e2e.SHAPES[shape][1], "milliseconds": {
            kind: {part: statistics.median(run[part] for run in found) for part in found[0]}
            for kind, found in runs.items()}})  # fmt: skip
    what = f"a Llama with random weights, {METHOD}, rank 16 on all linears, {args.batch} x {args.length} tokens"
    return {"what": what, "rows": rows}
