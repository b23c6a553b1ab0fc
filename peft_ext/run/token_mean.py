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

# PEFT's prompt methods that put no virtual tokens before the text, but prefixes before attention's keys and values.
_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")


class TokenMeanTrainer(Trainer):
    """transformers' Trainer, except that for every model the loss of an optimizer step is the mean over the label
    tokens of all batches of the step, in all processes if ``args.average_tokens_across_devices`` is True.

    transformers' Trainer takes the mean over the label tokens only for a model whose loss divides by
    ``num_items_in_batch``. A model of a class with ``accepts_loss_kwargs = False`` (Gemma 3n, Gemma 4) does not get
    ``num_items_in_batch``, so Trainer takes the mean of the batches' losses, in which a label of a batch with few
    labels weighs more than a label of a batch with many labels. With transformers' Trainer, a model whose forward
    accepts ``num_items_in_batch`` and does not pass it to the loss trains on the sum of the batches' losses.

    TokenMeanTrainer does not pass ``num_items_in_batch`` to the model. TokenMeanTrainer multiplies the loss of each
    batch, which is a mean over the batch's labels, by the batch's share of the step's labels. A term that PEFT or the
    model adds to the loss of each batch, such as AdaLoRA's regularization, therefore counts once in a step.
    ``args.n_gpu`` must be at most 1, because ``nn.DataParallel`` is not supported.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shifts_labels = _shifts_labels(self.model)
        self.model_accepts_loss_kwargs = False

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Returns the batches of a step, and the number of labels in the step's batches of all processes (of this
        process without ``args.average_tokens_across_devices``); for batches without labels, the number that Trainer
        returns."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if not batches or "labels" not in batches[0]:
            return batches, items
        count = sum(self._count(batch) for batch in batches).to(self.args.device)
        return batches, self.accelerator.gather(count).sum() if self._counts_all else count

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Union[Tensor, tuple[Tensor, Any]]:
        """Returns the loss of a batch, times the batch's share of the step's labels.

        The loss is also multiplied by the number of the step's batches, by which Trainer divides, and with
        ``args.average_tokens_across_devices`` by the number of processes, by which DDP divides. Without
        ``num_items_in_batch``, as in evaluation, the loss is Trainer's.
        """
        if num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # The labels are counted first, because Trainer's compute_loss may remove the labels from inputs.
        count = self._count(inputs)
        found = super().compute_loss(model, inputs, return_outputs)
        loss = found[0] if return_outputs else found
        # clamp: in a step without labels, the weight of the loss is 0 and not NaN.
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
        if getattr(config, "peft_type", None) == "CPT":
            labels = _cpt_labels(config, batch)
        return (labels[..., 1:] if self.shifts_labels else labels).ne(IGNORED).sum()


def _shifts_labels(model: nn.Module) -> bool:
    """Returns whether the model's loss leaves out the first label of a text, because no earlier position predicts it.

    A causal language model leaves out the first label, see :func:`peft_ext.run.causal_loss.check_causal_loss`. If PEFT
    puts virtual tokens without labels before the text, the last virtual token predicts the first label, so that the
    loss counts this label.
    """
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning and config.peft_type not in (*_PREFIXES, "CPT"):
        return False
    return is_causal(model)


def _cpt_labels(config: Any, batch: dict[str, Any]) -> Tensor:
    """Returns the labels that PEFT's CPT makes for a batch: the labels of the virtual tokens, then those of the text.

    A token's label is kept if the token's type is a positive multiple of 4, else the label becomes IGNORED. The types
    of the text are the batch's ``input_type_mask``, or all 4 if the batch has no ``input_type_mask``. The largest type
    of the virtual tokens is added to the positive types of the text.
    """
    labels = batch["labels"]
    virtual, types = (torch.tensor(values, device=labels.device).expand(len(labels), -1)
                      for values in (config.cpt_token_ids, config.cpt_tokens_type_mask))  # fmt: skip
    given = batch.get("input_type_mask", torch.full_like(labels, 4)).to(labels.device)
    types = torch.cat([types, given + (given > 0) * types.max()], 1)
    return torch.cat([virtual, labels], 1).masked_fill((types <= 0) | (types % 4 != 0), IGNORED)
