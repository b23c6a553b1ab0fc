"""A dry run: plans the model, data, memory and steps of a run, without loading weights or writing a run's files.

The dry run makes the checks of a run that need no weights, tokenizes the data, counts the steps, and builds the model
on the meta device. Each parameter is then replaced by a tensor of one element that is expanded to the parameter's
shape. The checks of fused layers do not read the values of weights, so the expanded tensors pass like real weights. The
dry run estimates no times.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, Optional

import torch

from ..machine import memory_of
from ..sources.json_file import first_line
from ..weights.quantizers import PACKED_FORMATS
from .checkpoints import how_to_go_on, step_of
from .errors import Stop, caught_signals, mendable_errors
from .options import Options
from .prepare import Run, adapter_config, facts_of, meta_base, needs_bitsandbytes, prepare
from .progress import status
from .ranks import joined
from .shard_memory import ShardedMemory, sharded_memory


@dataclass(frozen=True)
class Preview:
    """What can be told, without the model's weights, of an adapter on a model: its layers, its size and its memory.

    Attributes:
        rows: the predicted rows of :func:`peft_ext.explain`, one for each layer.
        trainable: number of trainable parameters.
        adapter_bytes: bytes of the adapter's tensors, about the size of adapter_model.safetensors.
        memory: estimate of a training step's memory; None where the memory could not be estimated.
        no_memory: the reason why the memory could not be estimated; None where ``memory`` is the estimate.
        sharded: memory of one process of a run whose base is sharded; None where the base is not sharded.
    """

    rows: list[Any]
    trainable: int
    adapter_bytes: int
    memory: Any
    no_memory: Optional[str]
    sharded: Optional[ShardedMemory] = None

    @property
    def fused(self) -> int:
        """Number of fused layers."""
        return sum(row.fused for row in self.rows)


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        run: the prepared run.
        model_class, parameters: class name and number of parameters of the base.
        adapter: preview of the adapter, with the memory of a step whose examples have ``longest`` tokens.
        load_bytes: bytes of the weights as they are loaded: in bfloat16, also if the run quantizes the weights
            afterwards, or packed as in the files. With --shard fsdp2 and hsdp, ``load_bytes`` is the memory while the
            base loads in the process with the largest shards.
        check_bytes: lower bound of the bytes during the last check, which loads the base a second time: the loaded base
            and, where a step's memory could be estimated, the trained model. With --shard fsdp2 and hsdp,
            ``check_bytes`` counts the shards of both models.
        held_bytes: bytes of memory that this process uses now; 0 for a run on a GPU.
        machine_bytes, free_bytes: total and free memory of the device; None where the system does not report them.
        train_tokens, held_out_tokens: number of tokens of all training examples and of all held-out examples, without
            padding.
        longest: number of tokens of the longest training example.
        steps: number of steps of the whole run.
        done: number of steps of the checkpoint to resume from; 0 for a new run.
        step_tokens: mean number of tokens of a step over all processes, without padding.
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
        """The sum of ``held_bytes`` and of the largest of three: ``load_bytes``, ``step_bytes`` and ``check_bytes``."""
        return max(self.load_bytes, self.step_bytes, self.check_bytes) + self.held_bytes

    @property
    def step_bytes(self) -> int:
        """Bytes of a training step in this process; 0 where the memory of a step could not be estimated and the base is
        not sharded."""
        if self.adapter.sharded is not None:
            return self.adapter.sharded.step
        return self.adapter.memory.total if self.adapter.memory is not None else 0


def dry_run(options: Options) -> Plan:
    """Makes the checks of a run that are possible without the weights, and returns the plan of the run.

    Raises RunError where a check fails.

    ::

        from peft_ext.run import Options, dry_run

        plan = dry_run(Options(model="my/model", data="my.jsonl"))
        print(plan.steps, plan.needed_bytes)
    """
    stop = Stop()

    def hint() -> str:
        return how_to_go_on(options.resolved())

    with caught_signals(stop), joined() as ranks, ranks.reported(stop, hint), mendable_errors(options.output, hint):
        run = ranks.together(lambda: prepare(options, stop, ranks, reads_weights=False))
        ranks.check_alike(facts_of(run))
        with status("planning"):
            return make_plan(run)


def make_plan(run: Run) -> Plan:
    """Returns the plan of a prepared run."""
    o, base = run.options, meta_base(run)
    base.config.use_cache = False
    lengths = [len(example["input_ids"]) for example in run.examples.train]
    adapter = preview(
        base, adapter_config(run, base), dtype=run.dtype, device=run.device, quant=o.quant, blocksize=o.blocksize,
        batch_size=o.batch_size, sequence_length=max(lengths), stock=o.stock,
        gradient_checkpointing=o.gradient_checkpointing, padding=min(lengths) != max(lengths),
        shards=run.shards,
    )  # fmt: skip
    if needs_bitsandbytes(o):
        rows = [dataclasses.replace(row, kind=row.kind.replace("NF4Linear", "Linear4bit")) for row in adapter.rows]
        adapter = dataclasses.replace(adapter, rows=rows)
    total, free, held = memory_of(run.device)
    load = sum(p.nbytes for p in base.parameters())
    if o.quant == "checkpoint":
        load += sum(buffer.nbytes for buffer in base.buffers())  # the scales of the packed weights
    # A dense base is converted to the run's dtype after loading. A base that is quantized later is loaded in bfloat16.
    again = load if o.quant != "none" else load * run.dtype.itemsize // torch.bfloat16.itemsize
    memory = adapter.memory
    trained = 0 if memory is None else memory.weights + memory.quantization + memory.adapters
    check = again + trained
    if (shard := adapter.sharded) is not None:
        load, check = shard.load, shard.check
    return Plan(
        run=run, model_class=type(base).__name__, parameters=run.parameters,
        adapter=adapter, load_bytes=load, check_bytes=check, held_bytes=held, machine_bytes=total,
        free_bytes=free, train_tokens=sum(lengths),
        held_out_tokens=sum(len(example["input_ids"]) for example in run.examples.held_out), longest=max(lengths),
        steps=run.steps, done=0 if run.checkpoint is None else step_of(run.checkpoint),
        step_tokens=sum(lengths) / len(lengths) * run.step_examples,
    )  # fmt: skip


def preview(
    base: Any, config: Any, *, dtype: Any, device: Any, quant: Optional[str], blocksize: int, batch_size: int,
    sequence_length: int, stock: bool = False, gradient_checkpointing: bool = False, padding: bool = False,
    shards: Optional[int] = None,
) -> Preview:  # fmt: skip
    """Returns the preview of the adapter of a PEFT configuration on ``base``, a model on the meta device.

    Args:
        dtype, quant, blocksize: dtype of the base, its quantization ("nf4" or one of ``PACKED_FORMATS``; another value
            for a base that is dense or packed already), and NF4's block size.
        device: device of the run.
        batch_size, sequence_length, gradient_checkpointing, padding: arguments of :func:`peft_ext.estimate_memory` that
            describe the training step whose memory is estimated.
        stock: whether the layers stay PEFT's own layers, without fused layers.
        shards: number of processes among which FSDP2 shards the base; None: the base is not sharded.

    Raises the errors of PEFT for a configuration that does not fit the model.
    """
    from ..integrations.peft import accelerate, explain
    from ..memory import adapt_on_meta, estimate_memory
    from ..memory.stand_ins import quantize_stand_ins, replace_tensors, stand_in

    model = adapt_on_meta(copy.deepcopy(base).to(dtype), config, None, None, False).train()
    size = sum(t.nbytes for t in _saved_tensors(model))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    replace_tensors(model, stand_in)
    quant = quant if quant in ("nf4", *PACKED_FORMATS) else None
    if quant is not None:
        quantize_stand_ins(model, quant, blocksize, True, True)
    if device.type != "cpu":
        replace_tensors(model, lambda t: torch.empty((), dtype=t.dtype, device=device).expand(t.shape))
    rows = list(explain(model if stock else accelerate(model)).rows)
    if stock:
        rows = [dataclasses.replace(row, fused=False, reason="--stock") for row in rows]
    memory = why = None
    try:
        memory = estimate_memory(
            base, config, batch_size=batch_size, sequence_length=sequence_length, dtype=dtype, device=device,
            quantization=quant, blocksize=blocksize, accelerated=not stock,
            gradient_checkpointing=gradient_checkpointing, padding=padding,
        )  # fmt: skip
    # estimate_memory raises these errors for a forward that can't be traced
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        why = first_line(error).removeprefix("estimate_memory: ")
    sharded = None if shards is None else sharded_memory(model, shards, memory, quant)
    return Preview(rows, trainable, size, memory, why, sharded)


def _saved_tensors(model: Any) -> list[Any]:
    """Returns the adapter's tensors that PEFT would save.

    For a prompt method, ``_saved_tensors`` returns the prompt encoder's embedding, because PEFT can't compute the
    prompt on the meta device.
    """
    from peft.utils import get_peft_model_state_dict

    if model.active_peft_config.is_prompt_learning:
        return [model.prompt_encoder[model.active_adapter].embedding.weight]
    return list(get_peft_model_state_dict(model, save_embedding_layers=False).values())
