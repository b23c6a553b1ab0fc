"""Recommends a PEFT method for a model, a card, a task and an amount of data.

The recommendation is the best-ranked method that fits the card, in the first setting in which the method fits. The
order of the settings is: dense weights; dense weights with gradient checkpointing; NF4 weights; NF4 weights with
gradient checkpointing; NF4 weights with gradient checkpointing and one sequence at a time.

A setting fits if the memory of a traced training step fits the card, see :func:`peft_ext.estimate_memory`. The traced
model is the given model, or a model of the given size with the proportions of Llama, BERT or T5.
"""

from .choice import PREFERENCES, recommend_peft_method
from .report import Alternative, Recommendation

__all__ = ["PREFERENCES", "Alternative", "Recommendation", "recommend_peft_method"]
