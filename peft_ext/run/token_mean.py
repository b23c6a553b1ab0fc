"""A Trainer whose loss of an optimizer step is the mean over the label tokens of all batches of the step."""

from __future__ import annotations

from typing import Any, Union

import torch
from torch import Tensor, nn

from .._imports import required
from ..sources.model import base_model
from .data import IGNORED

with required("transformers", "peft_ext.run.finetune"):
    from transformers import Trainer

# PEFT's prompt methods that put no virtual tokens before the text: their prefixes are keys and values of attention.
_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")


class TokenMeanTrainer(Trainer):
    """transformers' Trainer, with one loss of an optimizer step for every model: the mean over the label tokens of all
    batches and all processes of the step.

    transformers' Trainer has this loss only for a model whose loss divides by ``num_items_in_batch``. A model of a
    class with ``accepts_loss_kwargs = False`` (Gemma 3n, Gemma 4) does not get ``num_items_in_batch``, so Trainer takes
    the mean of the batches' losses, in which a label of a batch with few labels has a larger weight. A model whose
    forward accepts ``num_items_in_batch`` and does not pass it to the loss trains on the sum of the batches' losses.

    This class passes no ``num_items_in_batch``. The class multiplies the loss of each batch, a mean, by the batch's
    share of the step's labels. A term that PEFT or the model adds to the loss of each batch, such as AdaLoRA's
    regularization, therefore counts once in a step. ``args.n_gpu`` is at most 1: no ``nn.DataParallel``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shifts_labels = _shifts_labels(self.model)
        self.model_accepts_loss_kwargs = False

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Returns the batches of a step, and the number of labels of the step's batches, over all processes."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if not batches or "labels" not in batches[0]:
            return batches, items
        count = sum(self._count(batch["labels"]) for batch in batches).to(self.args.device)
        return batches, self.accelerator.gather(count).sum() if self._counts_all else count

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Union[Tensor, tuple[Tensor, Any]]:
        """Returns the loss of a batch, times the batch's share of the step's labels and the number of the step's
        batches and processes, because Trainer and DDP divide by these two numbers."""
        if num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        count = self._count(inputs["labels"])  # compute_loss may remove the labels from the inputs
        found = super().compute_loss(model, inputs, return_outputs)
        loss = found[0] if return_outputs else found
        weight = count * self.current_gradient_accumulation_steps / num_items_in_batch
        if self._counts_all:
            weight = weight * self.accelerator.num_processes
        # The mean over the labels of a batch without labels is NaN.
        loss = torch.where(count > 0, loss, torch.zeros_like(loss)) * weight
        return (loss, found[1]) if return_outputs else loss

    @property
    def _counts_all(self) -> bool:
        return self.args.average_tokens_across_devices and self.args.world_size > 1

    def _count(self, labels: Tensor) -> Tensor:
        """Returns the number of labels over which the model's loss of a batch is the mean."""
        return (labels[..., 1:] if self.shifts_labels else labels).ne(IGNORED).sum()


def _shifts_labels(model: nn.Module) -> bool:
    """Returns whether the model's loss leaves out the first label of a text, which no position before it predicts.

    A causal language model leaves out the first label. If PEFT puts virtual tokens before the text, the last virtual
    token predicts the first label.
    """
    base, config = base_model(model), getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind not in _PREFIXES:
            return False
    is_decoder = not getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return is_decoder and hasattr(base, "can_generate") and base.can_generate()
