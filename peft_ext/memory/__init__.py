"""Memory of one training step, from a trace of that very step without memory.

    total = max over time of Σ bytes of the tensors alive:
            weights + quantization + adapters + optimizer          all the time
          + activations + logits                                   from the forward to their use in the backward
          + gradients                                              from their backward to the optimizer's step
          + temporary                                              inside an operator, a layer, a loss

The model is copied without its data, adapted by PEFT, quantized, put on the fused operators, and then runs forward,
backward and the optimizer's part under PyTorch's FakeTensorMode: shapes, dtypes, views and autograd are those of the
real step, of every operator of PyTorch, PEFT, transformers and this package, but no tensor has data. A dispatch mode
notes when each storage is made and when it dies. So what a layer saves for its backward, what checkpointing drops and
computes again, what is shared, and at which moment all of it is largest is read off, for any architecture and any PEFT
method, rather than modelled.
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
