"""Recommends a PEFT method for a model, a card, a task and an amount of data.

The recommendation is the best-ranked method that fits the card, in the first setting in which the method fits. The
order of the settings is: dense weights; dense weights with gradient checkpointing; quantized weights (by default NF4);
quantized weights with gradient checkpointing; quantized weights with gradient checkpointing and one sequence at a time.

A method fits in a setting if the memory of a traced training step of the method is at most the part of the card's
memory that tensors may use, see :meth:`peft_ext.memory.MemoryEstimate.fits`. The traced model is the given model, or a
model of the given size with the proportions of Llama, BERT or T5.
"""

from .choice import PREFERENCES, recommend_peft_method
from .report import Alternative, Recommendation

__all__ = ["PREFERENCES", "Alternative", "Recommendation", "recommend_peft_method"]
