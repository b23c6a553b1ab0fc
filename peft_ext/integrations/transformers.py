"""For transformers' Trainer: acceleration with measurements, and AdaLoRA's budget.

::

    trainer = Trainer(model, args, train_dataset=..., callbacks=[PeftExtCallback()])
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["AdaLoraCallback", "PeftExtCallback", "keep_freed_memory", "peak_memory_mib"]


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory for the next allocation instead of returning it to the system.

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
    """The most resident memory this process ever had, MiB; None where the system does not tell.

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


class PeftExtCallback(TrainerCallback):
    """Accelerates the model as training begins and measures the steps.

    Args:
        accelerate: call :func:`peft_ext.accelerate` on the model as training begins.
        warmup_steps: steps that the speed leaves out: the first ones allocate.

    After training (and in the logs while it runs): ``step_seconds``, a list; ``median_step_s``; ``tokens_per_s``, of
    the steps alone: no evaluation, logging or saving; it needs ``TrainingArguments(include_num_input_tokens_seen=...)``
    and is None without; ``peak_mib``, see :func:`peak_memory_mib`, and ``peak_cuda_mib`` on a GPU.
    """

    def __init__(self, accelerate: bool = True, warmup_steps: int = 2) -> None:
        self.accelerate, self.warmup_steps = accelerate, warmup_steps
        self.step_seconds: list[float] = []
        self.step_tokens: list[int] = []
        self.peak_mib: Optional[float] = None
        self.peak_cuda_mib: Optional[float] = None
        self._started: Optional[float] = None
        self._tokens_seen = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step_seconds, self.step_tokens = [], []
        if self.accelerate:
            from .peft import accelerate

            accelerate(kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started, self._tokens_seen = time.perf_counter(), int(state.num_input_tokens_seen)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._started is None:
            return
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.step_seconds.append(time.perf_counter() - self._started)
        self.step_tokens.append(int(state.num_input_tokens_seen) - self._tokens_seen)
        self._started = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs is not None and "loss" in logs and self.tokens_per_s is not None:
            logs["tokens_per_s"] = round(self.tokens_per_s, 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.peak_mib = peak_memory_mib()
        if args.device.type == "cuda":
            self.peak_cuda_mib = torch.cuda.max_memory_allocated(args.device) / 2**20

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
