"""Recommends a PEFT method for a model, a card, a task and an amount of data.

The recommendation is the first method for the task and the data, in the first of these settings that fits the card:

    16-bit weights  >  with checkpointing  >  NF4 weights  >  NF4 with checkpointing  >  that, one sequence at a time

:func:`peft_ext.estimate_memory` traces the training step to find what fits. It traces the given model, or a model of
the given size with the proportions of Llama, BERT or T5.
"""

from .choice import PREFERENCES, recommend_peft_method
from .report import Alternative, Recommendation

__all__ = ["PREFERENCES", "Alternative", "Recommendation", "recommend_peft_method"]
