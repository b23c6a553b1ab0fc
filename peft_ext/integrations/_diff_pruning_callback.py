"""Diff Pruning's second phase under transformers' Trainer."""

from __future__ import annotations

from typing import Any, Optional, Union

from .._imports import required

with required("transformers", "peft_ext.integrations.transformers"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


__all__ = ["DiffPruningCallback"]


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
        from ..tuners import DiffPruningModel

        tuner = getattr(model, "base_model", None)
        if not isinstance(tuner, DiffPruningModel):
            raise TypeError(
                f"DiffPruningCallback: model is {type(model).__name__}, wanted a PeftModel with Diff Pruning"
            )
        return tuner
