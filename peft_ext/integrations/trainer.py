"""For transformers' Trainer, and those that derive from it (TRL's): acceleration with measurements, AdaLoRA's
budget, Diff Pruning's second phase.

::

    trainer = Trainer(model, args, train_dataset=...)
    PeftExtCallback().attach(trainer)
"""

from __future__ import annotations

import ctypes
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
from torch import nn

from .._imports import required

with required("transformers", "peft_ext.integrations.transformers"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import Trainer

    from .peft import Explanation

__all__ = ["AdaLoraCallback", "DiffPruningCallback", "PeftExtCallback", "keep_freed_memory", "peak_memory_mib"]


def keep_freed_memory() -> bool:
    """Asks the C library to keep freed memory for the next allocation instead of returning it to the system.

    A training step on the CPU frees its activations, glibc returns them, and the next step faults every page in again:
    a fifth of the step at 135M parameters. The setting is the whole process's, so a library must not make it on its
    own; call it once, early, in a program that trains. Returns False where there is no such setting (not glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    settings = {mmap_threshold: 2**30, trim_threshold: 2**31 - 1, top_pad: 2**26}
    return all([mallopt(parameter, value) == 1 for parameter, value in settings.items()])


def peak_memory_mib() -> Optional[float]:
    """Returns the most resident memory this process ever had, MiB; None where the system does not tell.

    It counts everything: the interpreter and its libraries, loading, quantizing, training. On Linux it is VmHWM, which
    is ``ru_maxrss`` without what the process inherits from the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _now(device: torch.device) -> Any:
    """A mark in the device's stream, or seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    mark = torch.cuda.Event(enable_timing=True)
    mark.record(torch.cuda.current_stream(device))
    return mark


class PeftExtCallback(TrainerCallback):
    """Accelerates the model as training begins, and measures the run.

    Args:
        accelerate: call :func:`peft_ext.accelerate` on the model as training begins.
        warmup_steps: steps that the speed leaves out: the first ones allocate.
        restore: call :func:`peft_ext.restore` on the model as training ends: all of it, also what was accelerated
            before. A run that ends with an exception leaves the model accelerated.
        blocks, dora_dropout, experts_dropout: of :func:`peft_ext.accelerate`.

    Of the run that began last:

    * ``step_seconds``, a list, and ``median_step_s``;
    * ``tokens_per_s``, of the steps alone: no evaluation, logging or saving, and no wait for data. The tokens are those
      that Trainer counts, of all processes, with ``TrainingArguments(include_num_input_tokens_seen=...)``, and without
      it those that the input embedding of this process looks up in the steps, padding and a decoder's included. None
      where there are none (of images, or in a compiled model without Trainer's count);
    * ``explanation``, what :func:`peft_ext.explain` says in the first step, in its mode and autocast, and
      ``fused_share``, the share in it;
    * ``peak_mib``, see :func:`peak_memory_mib`, and ``peak_cuda_mib`` on a GPU, of the process until then.

    Trainer's logs get ``tokens_per_s``, ``fused_share``, ``peak_mib`` and ``peak_cuda_mib`` wherever they have a loss,
    and the metrics that ``train()`` returns as well. Trainer calls its reporters (TensorBoard, W&B, ...) before
    the callbacks that it is given; :meth:`attach` puts this one before them, so that they see the figures too.

    Raises: ValueError where warmup_steps is negative; as training begins, what :func:`peft_ext.accelerate` raises.
    """

    def __init__(
        self, accelerate: bool = True, warmup_steps: int = 2, *, restore: bool = False, blocks: bool = True,
        dora_dropout: str = "peft", experts_dropout: float = 0.0,
    ) -> None:  # fmt: skip
        if warmup_steps < 0:
            raise ValueError(f"PeftExtCallback: warmup_steps is {warmup_steps}, wanted at least 0")
        self.accelerate, self.warmup_steps = accelerate, warmup_steps
        self.restore, self.blocks = restore, blocks
        self.dora_dropout, self.experts_dropout = dora_dropout, experts_dropout
        self._seconds: list[float] = []
        self._spans: list[tuple[Any, Any]] = []  # of steps, not yet in _seconds
        self.step_tokens: list[int] = []
        self.explanation: Optional[Explanation] = None
        self.peak_mib: Optional[float] = None
        self.peak_cuda_mib: Optional[float] = None
        self._started: Any = None
        self._trainer_tokens = self._looked_up = 0
        self._hook: Optional[RemovableHandle] = None

    def attach(self, trainer: Trainer) -> PeftExtCallback:
        """Makes this the first of ``trainer``'s callbacks, whether it is one of them already or not. Returns self.

        Raises: TypeError where trainer is no transformers Trainer.
        """
        callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", None)
        if not isinstance(callbacks, list):
            raise TypeError(f"PeftExtCallback.attach: trainer is {type(trainer).__name__}, wanted a Trainer")
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seconds, self._spans, self.step_tokens = [], [], []
        self.explanation = self.peak_mib = self.peak_cuda_mib = self._started = None
        if self.accelerate:
            from .peft import accelerate

            accelerate(kwargs["model"], blocks=self.blocks, dora_dropout=self.dora_dropout,
                       experts_dropout=self.experts_dropout)  # fmt: skip
        self._watch(kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer_tokens, self._looked_up = int(state.num_input_tokens_seen), 0
        self._started = _now(args.device)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._started is None:
            return
        self._spans.append((self._started, _now(args.device)))
        by_trainer = int(state.num_input_tokens_seen) - self._trainer_tokens
        self.step_tokens.append(self._looked_up if args.include_num_input_tokens_seen == "no" else by_trainer)
        self._started = None
        if self.explanation is None:
            self._explain(kwargs["model"])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs is None or not ("loss" in logs or "train_loss" in logs):
            return
        self._measure_memory(args)
        measured = {
            "tokens_per_s": (self.tokens_per_s, 1),
            "fused_share": (self.fused_share, 4),
            "peak_mib": (self.peak_mib, 1),
            "peak_cuda_mib": (self.peak_cuda_mib, 1),
        }
        figures = {name: round(figure, digits) for name, (figure, digits) in measured.items() if figure is not None}
        logs.update(figures)
        if state.log_history:  # its last entry is a copy of these logs, made before any callback saw them
            state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._measure_memory(args)
        self._unwatch()
        if self.restore:
            from .peft import restore

            restore(kwargs["model"])

    @property
    def step_seconds(self) -> list[float]:
        """Seconds of each step, on a GPU between two marks in its stream, which are waited for here alone."""
        for start, end in self._spans:
            if isinstance(end, float):
                self._seconds.append(end - start)
            else:
                end.synchronize()
                self._seconds.append(start.elapsed_time(end) / 1e3)
        self._spans.clear()
        return self._seconds

    @property
    def _measured(self) -> slice:
        return slice(self.warmup_steps if len(self.step_seconds) > self.warmup_steps else 0, None)

    @property
    def median_step_s(self) -> Optional[float]:
        """The median step, after the warm-up."""
        seconds = self.step_seconds[self._measured]
        return statistics.median(seconds) if seconds else None

    @property
    def tokens_per_s(self) -> Optional[float]:
        """Tokens over seconds of the steps after the warm-up."""
        tokens, seconds = sum(self.step_tokens[self._measured]), sum(self.step_seconds[self._measured])
        return tokens / seconds if tokens and seconds else None

    @property
    def fused_share(self) -> Optional[float]:
        """Fused layers over all adapted or quantized ones, in the first step."""
        return None if self.explanation is None else self.explanation.fused_share

    def _watch(self, model: nn.Module) -> None:
        """Looks at what the input embedding is called with: callbacks see no batch.

        Not at what the model is: its arguments have other names in each, and Trainer's autocast begins within its call.
        """
        self._unwatch()
        try:
            embedding = model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return
        if isinstance(embedding, nn.Module):
            self._hook = embedding.register_forward_pre_hook(functools.partial(self._look, model))

    def _unwatch(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _look(self, model: nn.Module, embedding: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Evaluation and generation between steps, and a reference's forward within one, are no training.
        if torch.compiler.is_compiling() or self._started is None or not torch.is_grad_enabled():
            return
        if inputs and isinstance(inputs[0], torch.Tensor) and not inputs[0].is_floating_point():
            self._looked_up += inputs[0].numel()
        if self.explanation is None:
            self._explain(model)

    def _explain(self, model: nn.Module) -> None:
        from .peft import explain

        self.explanation = explain(model)

    def _measure_memory(self, args: TrainingArguments) -> None:
        self.peak_mib = peak_memory_mib()
        if args.device.type == "cuda":
            self.peak_cuda_mib = torch.cuda.max_memory_allocated(args.device) / 2**20


class AdaLoraCallback(TrainerCallback):
    """Calls AdaLoRA's ``update_and_allocate`` where its paper and PEFT want it: gradients there, optimizer stepped.

    Trainer does not do it, and without it no rank is ever given up. ``AdaLoraConfig.total_step`` must be the number of
    optimizer steps of the run. A run can't be resumed: PEFT saves the ranks that are left, in other shapes than the
    optimizer's state has.

    Source: AdaLoRA, arXiv 2303.10512.
    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        tuner = getattr(model, "base_model", None)
        if not hasattr(tuner, "rankallocator"):
            raise TypeError(f"AdaLoraCallback: model is {type(model).__name__}, wanted a PeftModel with AdaLoRA")
        tuner.update_and_allocate(state.global_step)


class DiffPruningCallback(TrainerCallback):
    """Prunes a Diff Pruning adapter during the run, after which Trainer's optimizer trains what is kept.

    Args:
        target: the fraction of entries to keep, see :meth:`peft_ext.tuners.DiffPruningModel.prune`.
        at: when: an optimizer step (int, from 1) or a fraction of the run's steps (float, in (0, 1]).
        adapter_name: the active adapter by default.

    The learning rates go on as scheduled. A run that is resumed from a checkpoint after the pruning goes on with what
    was kept; from one before it, it prunes at the same step.

    After it: ``kept``, by tensor how many entries are kept.

    Raises: ValueError where an argument is out of its range; as training begins, where the run has fewer steps, or
    where several processes, DeepSpeed or FSDP train.
    """

    def __init__(self, target: float = 0.005, at: Union[int, float] = 0.5, adapter_name: Optional[str] = None) -> None:
        if not 0 < target <= 1:
            raise ValueError(f"DiffPruningCallback: target is {target}, wanted a fraction in (0, 1]")
        if (isinstance(at, float) and not 0 < at <= 1) or at <= 0:
            raise ValueError(f"DiffPruningCallback: at is {at!r}, wanted a step from 1 or a fraction in (0, 1]")
        self.target, self.at, self.adapter_name = target, at, adapter_name
        self.kept: Optional[dict[str, int]] = None

    def _step(self, state: TrainerState) -> int:
        return max(1, round(self.at * state.max_steps)) if isinstance(self.at, float) else self.at

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tuner(kwargs["model"])
        if self._step(state) > state.max_steps:
            raise ValueError(f"DiffPruningCallback: at is {self.at}, the run has {state.max_steps} steps")
        if args.world_size > 1 or args.deepspeed or args.fsdp:
            raise ValueError(
                "DiffPruningCallback: under DDP, DeepSpeed or FSDP the parameters can't be exchanged during the run; "
                "prune between two runs"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        tuner = self._tuner(kwargs["model"])
        name = self.adapter_name or tuner.active_adapters[0]
        if state.global_step >= self._step(state) and tuner.peft_config[name].kept is None:
            self.kept = tuner.prune(self.target, name, kwargs["optimizer"])

    @staticmethod
    def _tuner(model: Any) -> Any:
        tuner = getattr(model, "base_model", None)
        if not hasattr(tuner, "prune"):
            raise TypeError(
                f"DiffPruningCallback: model is {type(model).__name__}, wanted a PeftModel with Diff Pruning"
            )
        return tuner
