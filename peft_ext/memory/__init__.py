"""Estimates the memory of one training step from a trace of the step with tensors that have no data.

    total = max over time of Σ bytes of the tensors alive:
            weights + quantization + adapters + optimizer          during the whole step
          + activations + logits                                   from the forward to their use in the backward
          + gradients                                              from the backward to the optimizer's step
          + temporary                                              inside an operator, a layer or a loss

The model is copied without its data, then adapted by PEFT, quantized and accelerated as the arguments say. Forward and
backward run under PyTorch's FakeTensorMode: shapes, dtypes, views and autograd are those of the real step, but tensors
have no data. A dispatch mode notes when each storage is made and when the storage is freed. The trace therefore shows
the tensors that a layer saves for its backward, the tensors that checkpointing frees and computes again, shared
tensors, and the moment of the peak. A model whose forward depends on the values of tensors cannot be traced. The
optimizer's states and temporary tensors are added from a table of sizes.
"""

from .adapt import adapt_on_meta
from .estimate import METHODS, QUANTIZATIONS, check_arguments, check_positive, estimate_memory, profile_step
from .profile import KINDS, MemoryEstimate, Profile

__all__ = [
    "KINDS",
    "METHODS",
    "QUANTIZATIONS",
    "MemoryEstimate",
    "Profile",
    "adapt_on_meta",
    "check_arguments",
    "check_positive",
    "estimate_memory",
    "profile_step",
]
