"""``peft-ext finetune --dry-run``: prints the plan of a run as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..methods import METHODS
from ..run import Plan
from ..run.config import FILE as CONFIG_FILE
from ..text import dtype_name, format_bytes
from ._common import console, layers_table, mib, new_table

_KINDS = {
    "weights": "frozen weights", "quantization": "their scales", "adapters": "adapter", "gradients": "gradients",
    "optimizer": "optimizer", "activations": "activations", "logits": "logits", "temporary": "temporary",
}  # fmt: skip
_SHARES = {
    "frozen": "frozen weights, a share, and their scales", "adapter": "adapter, a share",
    "gradients": "gradients, a share", "optimizer": "optimizer, a share",
    "gathered": "gathered: the embedding, the head and two layers", "other": "activations, logits and temporary",
}  # fmt: skip


def show_plan(plan: Plan) -> None:
    """Prints the plan of a run as tables on standard output."""
    print("dry run: no weight is read, nothing is written")
    screen = console()
    screen.print(_summary(plan))
    if plan.adapter.rows:
        screen.print(layers_table({None: plan.adapter.rows}))
    screen.print(_memory(plan))
    for line in _remarks(plan):
        print(line)


def _summary(plan: Plan) -> Any:
    run, o = plan.run, plan.run.options
    train, held_out = run.examples.train, run.examples.held_out
    table = new_table("", "", show_header=False)
    table.add_row("model", f"{o.model}, {plan.model_class}, {plan.parameters:,} parameters")
    dtype = dtype_name(run.dtype)
    table.add_row("weights", f"{run.weights}{', stock PEFT and bitsandbytes' if o.stock else ''}; on {run.device.type}")
    if run.why_dtype:
        twice = "; the dense weights take twice the bytes of bfloat16" if run.dtype == torch.float32 else ""
        table.add_row("computes in", f"{dtype}: {run.why_dtype}{twice}")
    share = f"{plan.adapter.trainable / plan.parameters:.3%}"
    table.add_row("method", f"{o.method}, {plan.adapter.trainable:,} trainable parameters, {share} of the model's")
    table.add_row("data", f"{run.corpus.where}, {run.corpus.kind}")
    unit = f"blocks of {o.block_size} tokens" if run.corpus.kind == "text" else "examples"
    cut = f", {run.examples.truncated:,} cut at {o.block_size} tokens" if run.examples.truncated else ""
    if run.examples.left_out:
        cut += f", {run.examples.left_out:,} left out: no completion begins within {o.block_size} tokens"
    if run.examples.rest:
        cut += f", {run.examples.rest:,} tokens left out that fill no block"
    table.add_row("  to train on", f"{len(train):,} {unit}, {plan.train_tokens:,} tokens")
    table.add_row("  held out", f"{len(held_out):,}, {plan.held_out_tokens:,} tokens{cut and '; of all' + cut[1:]}")
    steps = f"{plan.steps:,}, {plan.steps * run.step_examples / len(train):.3g} epochs"
    if run.checkpoint is not None:
        steps += f"; {plan.done:,} done, {max(0, plan.steps - plan.done):,} to go, from {run.checkpoint}"
    table.add_row("steps", steps)
    shares = f" x {o.grad_accum} batches" * (o.grad_accum > 1)
    shares += f" x {run.ranks.world} processes" * (run.ranks.world > 1)
    table.add_row("  of a step", f"{o.batch_size} examples{shares}, {plan.step_tokens:,.0f} tokens on average")
    table.add_row("  learning rate", f"{o.learning_rate:g} at most, cosine, warmup {o.warmup:g}")
    size = format_bytes(plan.adapter.adapter_bytes, binary=False)
    files = f"adapter_model.safetensors (about {size}), adapter_config.json"
    table.add_row("would write", f"{o.output}: {files}, run.json, report.html, {CONFIG_FILE}")
    if o.save_steps:
        table.add_row("", f"{o.output / 'checkpoints'}: every {o.save_steps:,} steps, the last two stay")
    if o.overwrite and o.output.is_dir() and any(o.output.iterdir()):
        table.add_row("would replace", f"the run in {o.output}")
    return table


def _memory(plan: Plan) -> Any:
    numbers = ("most, MiB", "at the peak")
    table = new_table("memory, estimated", *numbers, right=numbers)
    if (shard := plan.adapter.sharded) is not None:
        for kind, name in _SHARES.items():
            table.add_row(f"  {name}", mib(getattr(shard, kind)), mib(getattr(shard, kind)))
        table.add_row(f"a step of {plan.run.options.batch_size} x {plan.longest} tokens", "", mib(shard.step))
        table.add_row("loading: the shards and one weight", "", mib(plan.load_bytes))
        table.add_row("the last check: new shards beside the trained model", "", mib(plan.check_bytes))
    else:
        if (memory := plan.adapter.memory) is not None:
            for kind, name in _KINDS.items():
                table.add_row(f"  {name}", mib(getattr(memory, kind)), mib(memory.peak[kind]))
            table.add_row(f"a step of {plan.run.options.batch_size} x {plan.longest} tokens", "", mib(memory.total))
        is_packed = plan.run.options.quant == "checkpoint"
        held, beside = ("packed", "packed") if is_packed else ("dense bfloat16", "dense")
        table.add_row(f"loading: the {held} weights", "", mib(plan.load_bytes))
        table.add_row(f"the last check: the {beside} weights beside the trained model", "", mib(plan.check_bytes))
    if plan.held_bytes:
        table.add_row("Python, the libraries and the data: this process now", "", mib(plan.held_bytes))
    table.add_row("needed, at least", "", mib(plan.needed_bytes))
    if plan.machine_bytes is not None and plan.free_bytes is not None:
        where = torch.cuda.get_device_name() if plan.run.device.type == "cuda" else "this machine"
        table.add_row(f"{where} has", "", mib(plan.machine_bytes))
        table.add_row("  of it free now", "", mib(plan.free_bytes))
    return table


def _remarks(plan: Plan) -> Iterator[str]:
    run, o, adapter = plan.run, plan.run.options, plan.adapter
    if adapter.no_memory is not None:
        yield f"a step's memory could not be estimated: {adapter.no_memory}"
    if run.sharded:
        yield f"the memory is of the process with the largest shards; {run.shards} processes share the base"
    # The memory that this process uses now counts as free, because the process ends before the run begins.
    free = None if plan.free_bytes is None else plan.free_bytes + plan.held_bytes
    # On a CPU, all processes of a machine share the machine's memory.
    needed = plan.needed_bytes * (run.ranks.local_world if run.device.type == "cpu" else 1)
    if free is not None and needed > free:
        method = METHODS[o.method]
        dense = o.quant == "none" and method.can_quantize
        mends = ["--quant nf4"] * dense
        mends += ["--dtype bf16"] * (o.quant == "none" and run.dtype == torch.float32)
        mends += ["a smaller --batch-size or --block-size"]
        mends += ["--gradient-checkpointing"] * (not o.gradient_checkpointing and method.can_checkpoint)
        # A smaller batch does not help if the last check needs more memory than a step.
        if adapter.memory is None or plan.check_bytes > plan.step_bytes:
            mends = ["--quant nf4"] * dense + ["a smaller model"]
        yield f"warning: it needs more memory than is free; {' or '.join(mends)} takes less"
    if run.packed:
        yield "the default model is not unpacked yet: a run does that first, once, into the cache folder"
