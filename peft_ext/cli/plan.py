"""``peft-ext finetune --dry-run``: what a run would train, on what, in which memory, and what it would write.

The run's own checks, tokenizer, examples and steps; the model on the meta device, as ``peft-ext explain`` has it. No
weight is read, and no file is written. How long it would take is not said: nothing was timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from ._common import console, first_line, status
from .config import FILE as CONFIG_FILE

if TYPE_CHECKING:
    from .finetune import _Run

__all__ = ["Plan", "plan", "show_plan"]

_KINDS = {
    "weights": "frozen weights", "quantization": "their scales", "adapters": "adapter", "gradients": "gradients",
    "optimizer": "optimizer", "activations": "activations", "logits": "logits", "temporary": "temporary",
}  # fmt: skip
_MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        model_class, parameters: of the base.
        trainable, adapter_bytes: of the adapter; its file's size.
        rows: as :func:`peft_ext.explain` would tell of the live model.
        memory: the estimate of a training step, of ``longest`` tokens an example; None where ``no_memory`` says why.
        load_bytes: of the dense weights, all in memory before they are quantized.
        check_bytes: of the last check, which loads the base once more beside the trained model: at least the dense
            weights and, where the step could be estimated, the model's own.
        held_bytes: what this process holds already; 0 on a GPU.
        machine_bytes, free_bytes: of the device's memory; None where the system does not tell.
        train_tokens, held_out_tokens: in the examples, without padding.
        steps, done: of the whole run; by the checkpoint to go on from.
        step_tokens: of a step, on average, without padding.
    """

    model_class: str
    parameters: int
    trainable: int
    adapter_bytes: int
    rows: list[Any]
    memory: Any
    no_memory: Optional[str]
    load_bytes: int
    check_bytes: int
    held_bytes: int
    machine_bytes: Optional[int]
    free_bytes: Optional[int]
    train_tokens: int
    held_out_tokens: int
    longest: int
    steps: int
    done: int
    step_tokens: float

    @property
    def needed_bytes(self) -> int:
        """The most at a time, loading, training or checking."""
        step = self.memory.total if self.memory is not None else 0
        return max(self.load_bytes, step, self.check_bytes) + self.held_bytes


def plan(run: _Run) -> Plan:
    """The plan of a checked run. Reads configuration alone."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    from ..memory import adapt_on_meta, estimate_memory
    from .explain import _file_bytes, _saved

    o, config = run.o, run._peft_config(run.config)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(run.config, dtype=torch.bfloat16)
    base.config.use_cache = False
    adapted = adapt_on_meta(copy.deepcopy(base).to(run.dtype), config, None, None, False).train()
    size = _file_bytes(_saved(adapted))
    lengths = [len(example["input_ids"]) for example in run.examples.train]
    batch = min(o.batch_size, len(lengths))
    memory = why = None
    try:
        memory = estimate_memory(
            base, config, batch_size=batch, sequence_length=max(lengths), dtype=run.dtype, device=run.device,
            quantization="nf4" if o.quant == "nf4" else None, blocksize=o.blocksize, accelerated=not o.stock,
            gradient_checkpointing=o.gradient_checkpointing, padding=min(lengths) != max(lengths),
        )  # fmt: skip
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:  # a forward that can't be traced
        why = first_line(error).removeprefix("estimate_memory: ")
    total, free, held = _machine(run.device)
    load = sum(p.nbytes for p in base.parameters())
    # A dense base is widened once it is loaded; one that is quantized was quantized before.
    again = load if o.quant == "nf4" else load * run.dtype.itemsize // torch.bfloat16.itemsize
    trained = 0 if memory is None else memory.weights + memory.quantization + memory.adapters
    return Plan(
        model_class=type(base).__name__, parameters=sum(p.numel() for p in base.parameters()),
        trainable=run.trainable, adapter_bytes=size, rows=_rows(run, adapted), memory=memory, no_memory=why,
        load_bytes=load, check_bytes=again + trained, held_bytes=held, machine_bytes=total, free_bytes=free,
        train_tokens=sum(lengths), held_out_tokens=sum(len(example["input_ids"]) for example in run.examples.held_out),
        longest=max(lengths), steps=run.steps, done=0 if run.checkpoint is None else _step(run.checkpoint),
        step_tokens=sum(lengths) / len(lengths) * batch * o.grad_accum,
    )  # fmt: skip


def _rows(run: _Run, model: Any) -> list[Any]:
    """The layers that get an adapter or are quantized; ``model``, on the meta device, is used up."""
    import torch

    from ..integrations.peft import accelerate
    from ..integrations.peft import explain as explain_model
    from ..memory.stand_ins import quantize_stand_ins, replace_tensors, stand_in
    from .finetune import _needs_bitsandbytes

    replace_tensors(model, stand_in)
    if run.o.quant == "nf4":
        quantize_stand_ins(model, "nf4", run.o.blocksize, True, True)
    if run.device.type != "cpu":
        replace_tensors(model, lambda t: torch.empty((), dtype=t.dtype, device=run.device).expand(t.shape))
    rows = list(explain_model(model if run.o.stock else accelerate(model)).rows)
    if _needs_bitsandbytes(run.o):
        rows = [dataclasses.replace(row, kind=row.kind.replace("NF4Linear", "Linear4bit")) for row in rows]
    if run.o.stock:
        rows = [dataclasses.replace(row, fused=False, reason="--stock") for row in rows]
    return rows


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _machine(device: Any) -> tuple[Optional[int], Optional[int], int]:
    """Bytes that the device has, that are free, and that this process takes of them already."""
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return total, free, 0
    import psutil  # accelerate brings it

    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in _limits():  # of a container, which the machine's own numbers don't show
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free, psutil.Process().memory_info().rss


def _limits() -> Iterator[tuple[int, int]]:
    root = Path("/sys/fs/cgroup")
    first, second = root / "memory", root  # of version 1, of version 2
    for limit, used in (
        (first / "memory.limit_in_bytes", first / "memory.usage_in_bytes"),
        (second / "memory.max", second / "memory.current"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            yield int(limit.read_text()), int(used.read_text())


# --- the screen -------------------------------------------------------------------------------------------------------


def show_plan(run: _Run) -> None:
    """Print it."""
    with status("planning"):
        found = plan(run)
    print("dry run: no weight is read, nothing is written")
    screen = console()
    screen.print(_summary(run, found))
    if found.rows:
        screen.print(_layers(run, found))
    screen.print(_memory(run, found))
    for line in _remarks(run, found):
        print(line)


def _table(*columns: str, right: tuple[str, ...] = (), header: bool = True) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(box=SIMPLE, pad_edge=False, show_header=header)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def _summary(run: _Run, found: Plan) -> Any:
    import torch

    from .explain import _DISK, _bytes
    from .finetune import METHODS

    o, train, held_out = run.o, run.examples.train, run.examples.held_out
    table = _table("", "", header=False)
    table.add_row("model", f"{o.model}, {found.model_class}, {found.parameters:,} parameters")
    dtype = str(run.dtype).removeprefix("torch.")
    held = f"NF4, double quantization, blocks of {o.blocksize}" if o.quant == "nf4" else dtype
    table.add_row("weights", f"{held}{', stock PEFT and bitsandbytes' if o.stock else ''}; on {run.device.type}")
    if run.why_dtype:
        twice = "; the dense weights take twice the bytes of bfloat16" if run.dtype == torch.float32 else ""
        table.add_row("computes in", f"{dtype}: {run.why_dtype}{twice}")
    share = f"{found.trainable / found.parameters:.3%}"
    table.add_row("method", f"{o.method}, {found.trainable:,} trainable parameters, {share} of the model's")
    table.add_row("data", f"{run.corpus.where}, {run.corpus.kind}")
    unit = f"blocks of {o.block_size} tokens" if run.corpus.kind == "text" else "examples"
    cut = f", {run.examples.truncated:,} cut at {o.block_size} tokens" if run.examples.truncated else ""
    if run.examples.left_out:
        cut += f", {run.examples.left_out:,} left out: no completion begins within {o.block_size} tokens"
    table.add_row("  to train on", f"{len(train):,} {unit}, {found.train_tokens:,} tokens")
    table.add_row("  held out", f"{len(held_out):,}, {found.held_out_tokens:,} tokens{cut and '; of all' + cut[1:]}")
    batch, accum = min(o.batch_size, len(train)), o.grad_accum
    epochs = found.steps * batch * accum / len(train)
    steps = f"{found.steps:,}, {epochs:.3g} epochs"
    if run.checkpoint is not None:
        steps += f"; {found.done:,} done, {max(0, found.steps - found.done):,} to go, from {run.checkpoint}"
    table.add_row("steps", steps)
    accumulated = "" if accum == 1 else f" x {accum} batches"
    table.add_row("  of a step", f"{batch} examples{accumulated}, {found.step_tokens:,.0f} tokens on average")
    lr = o.lr if o.lr is not None else METHODS[o.method]
    table.add_row("  learning rate", f"{lr:g} at most, cosine, warmup {o.warmup:g}")
    files = f"adapter_model.safetensors ({_bytes(found.adapter_bytes, _DISK)}), adapter_config.json"
    table.add_row("would write", f"{o.output}: {files}, run.json, report.html, {CONFIG_FILE}")
    if o.save_steps:
        table.add_row("", f"{o.output / 'checkpoints'}: every {o.save_steps:,} steps, the last two stay")
    if o.overwrite and o.output.is_dir() and any(o.output.iterdir()):
        table.add_row("would replace", f"the run in {o.output}")
    return table


def _layers(run: _Run, found: Plan) -> Any:
    from .explain import _grouped

    table = _table("layers", "kind", "fused", "names", "reason", right=("layers",))
    for kind, fused, reason, names, count in _grouped(found.rows):
        table.add_row(str(count), kind, "yes" if fused else "no", ", ".join(names), reason)
    return table


def _memory(run: _Run, found: Plan) -> Any:
    def mib(size: int) -> str:
        return f"{size / _MIB:,.1f}"

    numbers = ("most, MiB", "at the peak")
    table = _table("memory, estimated", *numbers, right=numbers)
    if found.memory is not None:
        for kind, name in _KINDS.items():
            table.add_row(f"  {name}", mib(getattr(found.memory, kind)), mib(found.memory.peak[kind]))
        batch = min(run.o.batch_size, len(run.examples.train))
        table.add_row(f"a step of {batch} x {found.longest} tokens", "", mib(found.memory.total))
    table.add_row("loading: the dense bfloat16 weights", "", mib(found.load_bytes))
    table.add_row("the last check: the dense weights beside the trained model", "", mib(found.check_bytes))
    if found.held_bytes:
        table.add_row("Python, the libraries and the data: this process now", "", mib(found.held_bytes))
    table.add_row("needed, at least", "", mib(found.needed_bytes))
    if found.machine_bytes is not None:
        table.add_row(f"{_where(run)} has", "", mib(found.machine_bytes))
        table.add_row("  of it free now", "", mib(found.free_bytes))
    return table


def _where(run: _Run) -> str:
    import torch

    return torch.cuda.get_device_name() if run.device.type == "cuda" else "this machine"


def _remarks(run: _Run, found: Plan) -> Iterator[str]:
    import torch

    if found.no_memory is not None:
        yield f"a step's memory could not be estimated: {found.no_memory}"
    # What this process holds is not free, and is given back before the run.
    free = None if found.free_bytes is None else found.free_bytes + found.held_bytes
    if free is not None and found.needed_bytes > free:
        mends = ["a smaller --batch-size or --block-size"]
        if run.o.quant == "none" and run.dtype == torch.float32:
            mends.insert(0, "--dtype bf16")
        if run.o.quant == "none":
            mends.insert(0, "--quant nf4")
        if not run.o.gradient_checkpointing and run.o.method != "prefix":
            mends.append("--gradient-checkpointing")
        if found.memory is None or found.check_bytes > found.memory.total:  # no smaller batch takes less
            mends = ["a smaller model"] if run.o.quant == "nf4" else ["--quant nf4", "a smaller model"]
        yield f"warning: it needs more memory than is free; {' or '.join(mends)} takes less"
    if run.packed:
        yield "the default model is not unpacked yet: a run does that first, once, into the cache folder"
