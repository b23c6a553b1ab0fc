"""Which PEFT method for a model, a card, a task and an amount of data.

    first the method that fits task and data, then the first setting of it that fits the card:
    16-bit weights  >  with checkpointing  >  NF4 weights  >  NF4 with checkpointing  >  that, one sequence at a time

What fits is not guessed: :func:`peft_ext.estimate_memory` traces the training step, of the given model or of one with
the proportions of the Llama family (BERT's, T5's) and the wanted number of parameters.
"""

from .choice import PREFERENCES, recommend_peft_method
from .report import Alternative, Recommendation

__all__ = ["PREFERENCES", "Alternative", "Recommendation", "recommend_peft_method"]
