"""A Trainer whose loss of an optimizer step is the mean over the label tokens of all batches of the step."""

from __future__ import annotations

from typing import Any, Union

import torch
from torch import Tensor, nn

from .._imports import required
from .causal_loss import is_causal
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
        count = sum(self._count(batch) for batch in batches).to(self.args.device)
        return batches, self.accelerator.gather(count).sum() if self._counts_all else count

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Union[Tensor, tuple[Tensor, Any]]:
        """Returns the loss of a batch, times the batch's share of the step's labels and the number of the step's
        batches and processes, because Trainer and DDP divide by these two numbers."""
        if num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        count = self._count(inputs)  # compute_loss may remove the labels from the inputs
        found = super().compute_loss(model, inputs, return_outputs)
        loss = found[0] if return_outputs else found
        # A step without labels has the loss 0.
        weight = count * self.current_gradient_accumulation_steps / num_items_in_batch.clamp(min=1)
        if self._counts_all:
            weight = weight * self.accelerator.num_processes
        # The mean over the labels of a batch without labels is NaN.
        loss = torch.where(count > 0, loss, torch.zeros_like(loss)) * weight
        return (loss, found[1]) if return_outputs else loss

    @property
    def _counts_all(self) -> bool:
        return self.args.average_tokens_across_devices and self.args.world_size > 1

    def _count(self, batch: dict[str, Any]) -> Tensor:
        """Returns the number of labels over which the loss of a batch is the mean."""
        labels, config = batch["labels"], getattr(self.model, "active_peft_config", None)
        if _kind(config) == "CPT":
            labels = _cpt_labels(config, batch)
        return (labels[..., 1:] if self.shifts_labels else labels).ne(IGNORED).sum()


def _kind(config: Any) -> str:
    """Returns the name of the method of a PEFT configuration; "" without a configuration."""
    kind = getattr(config, "peft_type", "")
    return str(getattr(kind, "value", kind))


def _shifts_labels(model: nn.Module) -> bool:
    """Returns whether the model's loss leaves out the first label of a text, which no position before it predicts.

    A causal language model leaves out the first label, see :func:`peft_ext.run.causal_loss.check_causal_loss`. If PEFT
    puts virtual tokens without labels before the text, the last virtual token predicts the first label.
    """
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning and _kind(config) not in (*_PREFIXES, "CPT"):
        return False
    return is_causal(model)


def _cpt_labels(config: Any, batch: dict[str, Any]) -> Tensor:
    """Returns the labels of a batch as PEFT's CPT makes them, with those of the virtual tokens before those of the
    text.

    A label counts where the number of the token's type is a positive multiple of 4. The numbers of the text's types, 4
    where the batch has no ``input_type_mask``, are increased by the largest number of the virtual tokens' types.
    """
    labels = batch["labels"]
    virtual, types = (torch.tensor(values, device=labels.device).expand(len(labels), -1)
                      for values in (config.cpt_token_ids, config.cpt_tokens_type_mask))  # fmt: skip
    given = batch.get("input_type_mask", torch.full_like(labels, 4)).to(labels.device)
    types = torch.cat([types, given + (given > 0) * types.max()], 1)
    return torch.cat([virtual, labels], 1).masked_fill((types <= 0) | (types % 4 != 0), IGNORED)
