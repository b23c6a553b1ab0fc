"""How an operator is declared: schema, reference fallback and fake in one call.

The native libraries only add kernels for the CPU and CUDA dispatch keys. Where one has none (no native library, or a
device without a kernel) the dispatcher takes the reference, registered for every backend.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["LIBRARY", "NAMESPACE", "WEIGHT", "define", "has_kernel"]

NAMESPACE = "peft_ext"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# A frozen weight in a schema: dense (the optionals are None, blocksize 0) or NF4 (see NF4Weight.op_args).
WEIGHT = (
    "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? nested_offset, "
    "int blocksize, SymInt[] shape"
)

OPS: list[str] = []


def define(name: str, schema: str, *, reference: Callable, fake: Callable) -> None:
    """Declare ``peft_ext::<name>``; ``reference`` runs where no kernel is registered."""
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    OPS.append(name)


def has_kernel(name: str, dispatch_key: str) -> bool:
    """Whether a native library registered a kernel of ``peft_ext::<name>`` for "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", dispatch_key)
