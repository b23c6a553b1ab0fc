"""Computes an activation again in the backward, from the activation's inputs, instead of keeping it since the
forward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from .reasons import hooked

__all__ = ["computed_again", "has_hooks"]


def has_hooks(layer: nn.Module) -> bool:
    """Returns whether the layer or one of its direct children has hooks, which get the layer's input. The backward must
    not compute the input of a layer with hooks again, because a hook may change the input in place without an increase
    of its version counter."""
    return hooked(layer) or any(child is not None and hooked(child) for child in layer._modules.values())


@contextmanager
def computed_again(h: Tensor, operator: Callable[..., Tensor], *args: Any) -> Iterator[None]:
    """Within the context, autograd does not keep a saved tensor that is a view of all elements of ``h``, the result of
    ``operator(*args)``.

    Instead of keeping ``h``, the backward computes ``operator(*args)`` again. If other saved-tensor hooks are active
    (as under checkpointing) or saved-tensor hooks are disabled, autograd keeps the saved tensors as usual.
    """
    if not (torch.is_grad_enabled() and h.requires_grad) or _hooks_are_set():
        yield
        return
    # A saved tensor counts as ``h`` if it has the storage object of ``h``. Data addresses are not compared, because a
    # tensor without data, as in the memory estimate, has no data address.
    storage, version, numel, dtype = h.untyped_storage()._cdata, h._version, h.numel(), h.dtype
    # held[0]() returns the h that the backward has computed again, through a weak reference, or None.
    held: list[Callable[[], Optional[Tensor]]] = [lambda: None]
    tensors = [value for value in args if isinstance(value, Tensor)]
    versions = [value._version for value in tensors]
    args = tuple(value.detach() if isinstance(value, Tensor) else value for value in args)

    def pack(value: Tensor) -> Any:
        # A tensor that was changed in place no longer equals the operator's result, and is kept.
        if value.numel() != numel or value.dtype is not dtype or value._version != version:
            return value, value._version
        if value.storage_offset() or value.untyped_storage()._cdata != storage:
            return value, value._version
        return _Again(tuple(value.shape), value.stride())

    def unpack(value: Any) -> Tensor:
        if not isinstance(value, _Again):
            value, saved = value
            if value._version != saved:  # autograd does not check versions of tensors that pass through hooks
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{value.dtype} {tuple(value.shape)} is at version {value._version}, expected version {saved}"
                )
            return value
        if versions != [tensor._version for tensor in tensors]:
            raise RuntimeError("peft_ext: the inputs of an MLP's activation were changed in place before the backward; "
                               "call peft_ext.accelerate(model, blocks=False)")  # fmt: skip
        if (found := held[0]()) is None:
            with torch.no_grad():
                found = operator(*args)
            held[0] = weakref.ref(found)
        return found.as_strided(value.shape, value.stride)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Again(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _hooks_are_set() -> bool:
    autograd = torch._C._autograd
    forbidden = autograd._saved_tensors_hooks_get_disabled_error_message() is not None
    return forbidden or autograd._top_saved_tensors_default_hooks(False) is not None
