"""Callbacks for transformers' Trainer and its subclasses, such as TRL's trainers.

:class:`PeftExtCallback` accelerates the model and measures the run, :class:`AdaLoraCallback` updates AdaLoRA's ranks,
and :class:`DiffPruningCallback` prunes a Diff Pruning adapter.

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

    A training step on the CPU frees its activations, glibc returns the memory to the system, and the next step causes a
    page fault for each page that it uses again. In a measurement with a model of 135M parameters, these page faults
    took a fifth of the step's time. The setting applies to the whole process, so importing peft_ext does not change the
    setting. Call ``keep_freed_memory`` once, early, in a program that trains. Returns False if the system is not Linux,
    or if the C library has no ``mallopt`` or rejects a setting.
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
    """Returns the peak resident memory of this process so far, in MiB; None if the system does not report the peak.

    The peak includes the interpreter, its libraries, loading, quantizing and training. On Linux the value is VmHWM,
    which unlike ``ru_maxrss`` does not include the peak of the parent process.
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
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on other systems
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _now(device: torch.device) -> Any:
    """Returns a recorded CUDA event for a CUDA device, else the value of ``time.perf_counter()`` in seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    mark = torch.cuda.Event(enable_timing=True)
    mark.record(torch.cuda.current_stream(device))
    return mark


class PeftExtCallback(TrainerCallback):
    """Accelerates the model as training begins, and measures the run.

    Args:
        accelerate: whether to call :func:`peft_ext.accelerate` on the model when training begins.
        warmup_steps: number of steps at the beginning, in which memory is allocated, that the measured speed leaves
            out.
        restore: whether to call :func:`peft_ext.restore` on the model when training ends. With ``restore`` True, the
            whole model is restored, also layers that were accelerated before training. If training ends with an
            exception, the model stays accelerated.
        blocks, dora_dropout, experts_dropout: arguments for :func:`peft_ext.accelerate`. With None, the model keeps
            what an earlier call of ``accelerate`` chose.

    Attributes that describe the latest run:

    * ``step_seconds`` is the list of the seconds of each step, and ``median_step_s`` is the median without the warm-up.
    * ``tokens_per_s`` is tokens per second of the steps after the warm-up, without evaluation, logging, saving and
      waiting for data. With ``TrainingArguments(include_num_input_tokens_seen=...)`` the tokens are Trainer's count
      over all processes. Without ``include_num_input_tokens_seen`` the tokens are those that the model's input
      embedding looks up in this process, including padding and the tokens of a decoder. ``tokens_per_s`` is None if no
      tokens were counted (for example for images, or for a compiled model without Trainer's count).
    * ``explanation`` is the result of :func:`peft_ext.explain` when the input embedding is first called in a training
      step; without such a call, at the end of the first step. ``fused_share`` is the ``fused_share`` of
      ``explanation``.
    * ``peak_mib`` is the result of :func:`peak_memory_mib` at the last log or at the end of training. ``peak_cuda_mib``
      is the peak of the GPU memory that PyTorch allocated in the process, read whenever ``peak_mib`` is read; None if
      the training runs on no GPU.

    Those of ``tokens_per_s``, ``fused_share``, ``peak_mib`` and ``peak_cuda_mib`` that are not None are added to each
    of Trainer's logs that has a loss, and to the metrics that ``train()`` returns. Trainer calls its reporters
    (TensorBoard, W&B, ...) before the callbacks that the user passes. :meth:`attach` moves this callback before the
    reporters, so that the reporters get the callback's values too.

    Raises: ValueError if warmup_steps is negative. When training begins, the callback raises the errors of
    :func:`peft_ext.accelerate` and :func:`peft_ext.agree`.
    """

    def __init__(
        self, accelerate: bool = True, warmup_steps: int = 2, *, restore: bool = False, blocks: Optional[bool] = None,
        dora_dropout: Optional[str] = None, experts_dropout: Optional[float] = None,
    ) -> None:  # fmt: skip
        if warmup_steps < 0:
            raise ValueError(f"PeftExtCallback: warmup_steps is {warmup_steps}, wanted at least 0")
        self.accelerate, self.warmup_steps = accelerate, warmup_steps
        self.restore, self.blocks = restore, blocks
        self.dora_dropout, self.experts_dropout = dora_dropout, experts_dropout
        self._seconds: list[float] = []
        self._spans: list[tuple[Any, Any]] = []  # begin and end of each step whose seconds are not in _seconds yet
        self.step_tokens: list[int] = []
        self.explanation: Optional[Explanation] = None
        self.peak_mib: Optional[float] = None
        self.peak_cuda_mib: Optional[float] = None
        self._started: Any = None
        self._trainer_tokens = self._looked_up = 0
        self._hook: Optional[RemovableHandle] = None

    def attach(self, trainer: Trainer) -> PeftExtCallback:
        """Makes this callback the first callback of ``trainer``, and returns this callback.

        If the trainer has this callback already, the callback is moved. In a process group, if the accelerate library's
        configuration or ``TrainingArguments(fsdp=...)`` asks for FSDP2, ``attach`` also shards the trainer's model
        (:func:`peft_ext.integrations.fsdp2.prepare_fsdp2`), so all processes have to call ``attach``, before the
        training.

        Raises: TypeError if ``trainer`` is no transformers Trainer; the errors of ``prepare_fsdp2``.
        """
        callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", None)
        if not isinstance(callbacks, list):
            raise TypeError(f"PeftExtCallback.attach: trainer is {type(trainer).__name__}, wanted a Trainer")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from .fsdp2 import prepare_fsdp2

            prepare_fsdp2(trainer)
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seconds, self._spans, self.step_tokens = [], [], []
        self.explanation = self.peak_mib = self.peak_cuda_mib = self._started = None
        from ..ops.prove import agree
        from .adapter_layers.base import is_fully_sharded
        from .peft import accelerate, explain

        if self.accelerate:
            accelerate(kwargs["model"], blocks=self.blocks, dora_dropout=self.dora_dropout,
                       experts_dropout=self.experts_dropout)  # fmt: skip
        agree(lambda: None if self.accelerate else explain(kwargs["model"]))
        sharded = any(is_fully_sharded(type(module)) for module in kwargs["model"].modules())
        if not (sharded and args.torch_compile):  # torch.compile fails at a hook in a model that FSDP2 shards
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
        if state.log_history:  # the last entry is a copy of the logs, which Trainer made before it called the callbacks
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
        """A list of the seconds of each training step. On a GPU, the seconds are those between two CUDA events, and
        reading ``step_seconds`` waits for the events."""
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
        """The median of the seconds per step after the warm-up (of all steps, if there are no more than
        ``warmup_steps``); None if there is no step."""
        seconds = self.step_seconds[self._measured]
        return statistics.median(seconds) if seconds else None

    @property
    def tokens_per_s(self) -> Optional[float]:
        """Tokens per second of the steps after the warm-up (of all steps, if there are no more than ``warmup_steps``);
        None if no tokens were counted."""
        tokens, seconds = sum(self.step_tokens[self._measured]), sum(self.step_seconds[self._measured])
        return tokens / seconds if tokens and seconds else None

    @property
    def fused_share(self) -> Optional[float]:
        """The ``fused_share`` of ``explanation``; None before the first step."""
        return None if self.explanation is None else self.explanation.fused_share

    def _watch(self, model: nn.Module) -> None:
        """Registers a hook on the model's input embedding that counts tokens, because callbacks do not get the batch.

        The hook is not on the model, because argument names differ between models and Trainer's autocast begins inside
        of the model's call.
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
        # Tokens of evaluation, of generation between steps, and of a reference model's forward in a step do not count.
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
    """Calls AdaLoRA's ``update_and_allocate`` after an optimizer step, before the gradients are cleared. The callback
    leaves out a step whose gradients are not finite, such as a step that a scaler for float16 skips, unless the step is
    one of the last ``tfinal`` steps, in which AdaLoRA uses no gradients.

    AdaLoRA's paper and PEFT's documentation update the ranks between the optimizer step and the clearing of the
    gradients. Trainer does not call ``update_and_allocate``, and without the call AdaLoRA prunes no ranks.
    ``AdaLoraConfig.total_step`` must be the number of optimizer steps of the run. A run of AdaLoRA can't be resumed,
    because PEFT saves only the remaining ranks, whose shapes differ from those of the optimizer's state.

    Source: AdaLoRA, arXiv 2303.10512.
    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        tuner = getattr(model, "base_model", None)
        if not hasattr(tuner, "rankallocator"):
            raise TypeError(f"AdaLoraCallback: model is {type(model).__name__}, wanted a PeftModel with AdaLoRA")
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not torch.isfinite(nn.utils.get_total_norm(gradients)):
            # A gradient that is NaN would make AdaLoRA's running means of importance NaN for the rest of the run.
            # AdaLoRA's last pruning, and all updates after the last pruning, use no gradients.
            config = tuner.peft_config[tuner.trainable_adapter_name]
            if state.global_step < config.total_step - config.tfinal:
                return
        tuner.update_and_allocate(state.global_step)


class DiffPruningCallback(TrainerCallback):
    """Prunes a Diff Pruning adapter during the run. After the pruning, Trainer's optimizer trains the kept entries.

    Args:
        target: the fraction of entries to keep, see :meth:`peft_ext.tuners.DiffPruningModel.prune`.
        at: the time of the pruning: an optimizer step (int, from 1) or a fraction of the run's steps (float, in
            (0, 1]).
        adapter_name: the name of the adapter; by default the first active adapter.

    The pruning does not change the schedule of the learning rate. A run that is resumed from a checkpoint made after
    the pruning trains the kept entries. A run that is resumed from a checkpoint made before the pruning prunes at the
    step that ``at`` gives.

    ``kept``: after the pruning, a dict from the name of a tensor to the number of kept entries; before the pruning
    None.

    Raises: ValueError if an argument is out of its range. When training begins: ValueError if the run has fewer steps
    than ``at``, or if the run uses several processes, DeepSpeed or FSDP; TypeError if the model has no Diff Pruning
    adapter.
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
