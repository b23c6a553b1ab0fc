"""A dry run: what a run would train, on what, in which memory, and what it would write.

The run's own checks, tokenizer, examples and steps are taken, and the model on the meta device. Each of its parameters
then becomes one element that is seen as the whole: to the checks of the fused layers, which ask for shapes, dtypes and
types, it is a model in memory. No weight is read, and no file is written. How long a run would take is not said:
nothing was timed.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, Optional

import torch

from ..machine import memory_of
from ..sources.json_file import first_line
from .checkpoints import how_to_go_on, step_of
from .errors import Stop, caught_signals, mendable_errors
from .options import Options
from .prepare import Run, adapter_config, needs_bitsandbytes, prepare
from .progress import status


@dataclass(frozen=True)
class Preview:
    """What an adapter would be on a model, from its configuration alone.

    Attributes:
        rows: as :func:`peft_ext.explain` would tell of the live model.
        trainable, adapter_bytes: of the adapter; about the size of its file, which is its tensors'.
        memory: the estimate of a training step; None where ``no_memory`` says why.
    """

    rows: list[Any]
    trainable: int
    adapter_bytes: int
    memory: Any
    no_memory: Optional[str]

    @property
    def fused(self) -> int:
        return sum(row.fused for row in self.rows)


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        run: the prepared run that it is of.
        model_class, parameters: of the base.
        adapter: what is adapted, and a step's memory, of ``longest`` tokens an example.
        load_bytes: of the dense weights, all in memory before they are quantized.
        check_bytes: of the last check, which loads the base once more beside the trained model: at least the dense
            weights and, where the step could be estimated, the model's own.
        held_bytes: what this process holds already; 0 on a GPU.
        machine_bytes, free_bytes: of the device's memory; None where the system does not tell.
        train_tokens, held_out_tokens: in the examples, without padding.
        steps, done: of the whole run; by the checkpoint to go on from.
        step_tokens: of a step, on average, without padding.
    """

    run: Run
    model_class: str
    parameters: int
    adapter: Preview
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
        step = self.adapter.memory.total if self.adapter.memory is not None else 0
        return max(self.load_bytes, step, self.check_bytes) + self.held_bytes


def dry_run(options: Options) -> Plan:
    """Returns the plan of a run, after all of its checks. Raises RunError where the run would.

    ::

        from peft_ext.run import Options, dry_run

        plan = dry_run(Options(model="my/model", data="my.jsonl"))
        print(plan.steps, plan.needed_bytes)
    """
    stop = Stop()
    with caught_signals(stop), mendable_errors(options.output, lambda: how_to_go_on(options.resolved())):
        run = prepare(options, stop, reads_weights=False)
        with status("planning"):
            return make_plan(run)


def make_plan(run: Run) -> Plan:
    """Returns the plan of a prepared run."""
    from transformers import AutoModelForCausalLM

    o = run.options
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(run.config, dtype=torch.bfloat16)
    base.config.use_cache = False
    lengths = [len(example["input_ids"]) for example in run.examples.train]
    batch = min(o.batch_size, len(lengths))
    adapter = preview(
        base, adapter_config(run, base), dtype=run.dtype, device=run.device, quant=o.quant, blocksize=o.blocksize,
        batch_size=batch, sequence_length=max(lengths), stock=o.stock,
        gradient_checkpointing=o.gradient_checkpointing, padding=min(lengths) != max(lengths),
    )  # fmt: skip
    if needs_bitsandbytes(o):
        rows = [dataclasses.replace(row, kind=row.kind.replace("NF4Linear", "Linear4bit")) for row in adapter.rows]
        adapter = dataclasses.replace(adapter, rows=rows)
    total, free, held = memory_of(run.device)
    load = sum(p.nbytes for p in base.parameters())
    # A dense base is widened once it is loaded; one that is quantized was quantized before.
    again = load if o.quant == "nf4" else load * run.dtype.itemsize // torch.bfloat16.itemsize
    memory = adapter.memory
    trained = 0 if memory is None else memory.weights + memory.quantization + memory.adapters
    return Plan(
        run=run, model_class=type(base).__name__, parameters=sum(p.numel() for p in base.parameters()),
        adapter=adapter, load_bytes=load, check_bytes=again + trained, held_bytes=held, machine_bytes=total,
        free_bytes=free, train_tokens=sum(lengths),
        held_out_tokens=sum(len(example["input_ids"]) for example in run.examples.held_out), longest=max(lengths),
        steps=run.steps, done=0 if run.checkpoint is None else step_of(run.checkpoint),
        step_tokens=sum(lengths) / len(lengths) * batch * o.grad_accum,
    )  # fmt: skip


def preview(
    base: Any, config: Any, *, dtype: Any, device: Any, quant: Optional[str], blocksize: int, batch_size: int,
    sequence_length: int, stock: bool = False, gradient_checkpointing: bool = False, padding: bool = False,
) -> Preview:  # fmt: skip
    """Returns what the adapter of a PEFT configuration would be on ``base``, a model on the meta device.

    Args:
        dtype, quant, blocksize: how the base is held. device: where it would run.
        batch_size, sequence_length, gradient_checkpointing, padding: of the step whose memory is estimated.
        stock: PEFT's own layers, none fused.

    Raises: what PEFT raises for a configuration that does not fit.
    """
    from ..integrations.peft import accelerate, explain
    from ..memory import adapt_on_meta, estimate_memory
    from ..memory.stand_ins import quantize_stand_ins, replace_tensors, stand_in

    model = adapt_on_meta(copy.deepcopy(base).to(dtype), config, None, None, False).train()
    size = sum(t.nbytes for t in _saved_tensors(model))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    replace_tensors(model, stand_in)
    if quant == "nf4":
        quantize_stand_ins(model, "nf4", blocksize, True, True)
    if device.type != "cpu":
        replace_tensors(model, lambda t: torch.empty((), dtype=t.dtype, device=device).expand(t.shape))
    rows = list(explain(model if stock else accelerate(model)).rows)
    if stock:
        rows = [dataclasses.replace(row, fused=False, reason="--stock") for row in rows]
    memory = why = None
    try:
        memory = estimate_memory(
            base, config, batch_size=batch_size, sequence_length=sequence_length, dtype=dtype, device=device,
            quantization="nf4" if quant == "nf4" else None, blocksize=blocksize, accelerated=not stock,
            gradient_checkpointing=gradient_checkpointing, padding=padding,
        )  # fmt: skip
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:  # a forward that can't be traced
        why = first_line(error).removeprefix("estimate_memory: ")
    return Preview(rows, trainable, size, memory, why)


def _saved_tensors(model: Any) -> list[Any]:
    """Returns what PEFT would save; of prompt methods, whose tokens it reads, the one tensor that it is."""
    from peft.utils import get_peft_model_state_dict

    if model.active_peft_config.is_prompt_learning:
        return [model.prompt_encoder[model.active_adapter].embedding.weight]
    return list(get_peft_model_state_dict(model, save_embedding_layers=False).values())
