"""The record of a run's measurements: the Trainer's history, and run.json, from which the report is drawn."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import torch

from .. import __version__, _native
from ..files import atomic_file
from ..machine import cpu_name, versions
from ..text import dtype_name
from . import evaluate, report
from .prepare import Run
from .progress import log


@dataclass
class Record:
    """What a run has measured and done so far: the content of run.json.

    Attributes:
        results: results that the run has set so far, by the name of the entry of run.json.
        history: the Trainer's log history, with the entries that :func:`recording_callback` adds.
        meter: the :class:`peft_ext.integrations.trainer.PeftExtCallback` of the training; None before training.
        curve: indices of the held-out examples on which the held-out curve is computed.
        peaks: peak memory in MiB of each process at the end of training, in the order of the ranks; None where the
            system does not report the memory.
        load_growths: for each process, in the order of the ranks, the largest growth of its resident memory in MiB
            while the base was loaded; None where the system does not report the memory.
        no_report: the reason why the last report could not be drawn; None where the report was drawn.
    """

    run: Run
    results: dict[str, Any] = field(default_factory=lambda: {"finished": False})
    history: list[dict[str, Any]] = field(default_factory=list)
    meter: Any = None
    curve: list[int] = field(default_factory=list)
    no_report: Optional[str] = None
    peaks: list[Optional[float]] = field(default_factory=list)
    load_growths: list[Optional[float]] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def document(self) -> dict[str, Any]:
        """Returns the content of run.json as a dictionary."""
        run, o, ranks = self.run, self.run.options, self.run.ranks
        return {
            "options": {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(o).items()},
            "changed": o.changed(),
            "learning_rate": o.learning_rate,
            "trainable_parameters": run.trainable,
            "parameters": run.parameters,
            "versions": {"peft_ext": __version__, "python": platform.python_version(), **versions()},
            "machine": {
                **machine(), "dtype": f"{dtype_name(run.dtype)}: {run.why_dtype}".removesuffix(": "),
                "system": f"{platform.system()} {platform.machine()}",
                **({"processes": ranks.described()} if ranks.world > 1 else {}),
            },
            "examples": {
                "train": len(run.examples.train), "held_out": len(run.examples.held_out), "kind": run.corpus.kind,
                "empty": run.corpus.empty,
                "digest": run.corpus.digest, "tokens": run.examples.digest, "cut": run.examples.truncated,
                "left_out": run.examples.left_out, "rest_tokens": run.examples.rest,
            },
            "processes": {
                "count": ranks.world, "machines": ranks.nodes, "launcher": ranks.launch.launcher,
                "launch": ranks.identity, "peak_mib": self.peaks, "load_growth_mib": self.load_growths,
            },
            "step_examples": run.step_examples,
            "started": self.started,
            "steps_wanted": run.steps,
            "new_tokens": evaluate.NEW_TOKENS,
            "seconds": run.seconds,
            **self._measured(),
            **self.results,
        }  # fmt: skip

    def _measured(self) -> dict[str, Any]:
        """Returns a dict of those entries of run.json that come from the Trainer's history and from ``meter``."""
        steps = [entry for entry in self.history if "loss" in entry]
        found: dict[str, Any] = {}
        if self.meter is not None:
            names = ("tokens_per_s", "median_step_s", "peak_mib", "peak_cuda_mib")
            found = {name: getattr(self.meter, name) for name in names}
        columns = ("step", "learning_rate", "step_s", "tokens", "held_out_loss")
        return {
            **found, "losses": [entry["loss"] for entry in steps], "steps": steps[-1]["step"] if steps else 0,
            "history": {name: [entry.get(name) for entry in steps] for name in columns},
        }  # fmt: skip

    def write(self) -> None:
        """Writes run.json atomically and draws report.html, on rank 0.

        Raises OSError where run.json can't be written.
        """
        if not self.run.ranks.speaks:
            return
        folder, document = self.run.options.output, self.document()
        with atomic_file(folder / "run.json") as file:
            file.write(json.dumps(document, indent=2) + "\n")
        try:
            report.write_report(folder, document)
            self.no_report = None
        except Exception as error:  # an error in drawing the report must not end the run
            self.no_report = " ".join(f"{type(error).__name__}: {error}".split())

    def log_report(self) -> None:
        """Logs the path of report.html, or a warning with the reason why the report could not be drawn."""
        if self.no_report is None:
            log.info(f"report: {self.run.options.output / 'report.html'}")
        else:
            log.warning(f"no report, it could not be drawn: {self.no_report}")


def machine() -> dict[str, Any]:
    """Returns the CPU's name, the number of threads, the CPU path of the kernels, and the GPU's name or "cpu"."""
    return {
        "cpu": cpu_name(), "threads": torch.get_num_threads(), "isa": _native.STATE.isa,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }  # fmt: skip


def recording_callback(record: Record) -> Any:
    """Returns a Trainer callback that adds each step's seconds and tokens to the Trainer's history.

    At the first step, the callback also records the bytes of weights, adapter, gradients and optimizer states. At up to
    HELD_OUT_POINTS steps the callback also adds the held-out loss, and writes run.json. A checkpoint stores the history
    in trainer_state.json, so that a resumed run continues the history.
    """
    from transformers import TrainerCallback

    run, meter = record.run, record.meter
    count = evaluate.HELD_OUT_POINTS + 1
    points = {round(run.steps * i / count) for i in range(1, count)} - {0, run.steps}

    class Recorder(TrainerCallback):
        entry: dict[str, Any] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            record.history = state.log_history

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "memory" not in record.results:
                record.results["memory"] = _bytes_by_kind(kwargs["model"], kwargs["optimizer"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.entry = {"step_s": round(meter.step_seconds[-1], 5), "tokens": meter.step_tokens[-1]}
            # All ranks must evaluate or none, so each rank tests the largest signal number of all ranks.
            if state.global_step in points and not any(run.ranks.largest(run.stop.signal)):
                model = kwargs["model"]
                with run.phase("evaluate in training"):
                    losses = evaluate.held_out_losses(run, model, record.curve)
                model.train()
                if len(losses) == len(record.curve):
                    self.entry |= {"held_out_loss": evaluate.mean_loss(losses), "held_out_examples": len(losses)}

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" not in (logs or {}) or not state.log_history:
                return
            state.log_history[-1].update(self.entry)  # the Trainer has appended a copy of logs to log_history
            if "held_out_loss" in self.entry:
                try:
                    record.write()
                except OSError as error:  # training goes on, because run.json is written again at the end
                    log.warning(f"{error.filename or run.options.output}: {error.strerror}")

    return Recorder()


def _bytes_by_kind(model: Any, optimizer: Any) -> dict[str, int]:
    """Returns a dict from "frozen", "adapter", "gradients" and "optimizer" to the bytes in memory of the frozen
    weights, of the adapter, of the gradients and of the optimizer states after an optimizer step.

    ``_bytes_by_kind`` is called before the gradients of the step are freed. A storage that several tensors share is
    counted once. "optimizer" includes the scores that AdaLoRA keeps.
    """
    seen: set[int] = set()

    def size(tensors: Iterable[Any]) -> int:
        total = 0
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            if hasattr(tensor, "to_local"):  # of a DTensor, this process's shard is counted
                tensor = tensor.to_local()
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    def held(state: Any) -> Iterator[Any]:  # bitsandbytes does not register its scales as buffers
        while state is not None:
            yield from vars(state).values()
            state = state.state2

    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    frozen = [p for p in parameters if not p.requires_grad]
    scales = [tensor for p in frozen for tensor in held(getattr(p, "quant_state", None))]
    states = [value for state in optimizer.state.values() for value in state.values()]
    allocator = getattr(getattr(model, "base_model", None), "rankallocator", None)
    for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
        states += getattr(allocator, name, {}).values()
    return {
        "frozen": size([*frozen, *model.buffers(), *scales]), "adapter": size(trained),
        "gradients": size(p.grad for p in trained), "optimizer": size(states),
    }  # fmt: skip
