"""Adapter layers of one module that get the same tensor, computed together by :func:`peft_ext.ops.lora_linears`.

The table of known forms names the children that the forward of a module calls with one input tensor, as in
``self.q_proj(x)``, ``self.k_proj(x)``. While the module's forward runs, the first child of a group that is called
computes the outputs of all children of this group that can be computed together. Each other child of the group returns
its stored output if the child is called with the same, unchanged tensor object, and if the state of the child is
unchanged. If a child is called with another tensor object than the first child of the group, or with a tensor that was
changed since, or if the child's state has changed, the child computes its output alone. Stored outputs that no child
has returned are dropped at the end of the module's forward. Each thread has its own stored outputs, so a child never
returns an output that another thread computed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ... import ops
from ...ops.checks import autocast_dtype
from .base import Fused
from .linear import MANY_TOKENS
from .reasons import accepts_input, hooked, kernel_reason
from .tensor_parallel import sum_gradient

__all__ = ["joins_siblings", "joint_reason", "output_of", "together"]


def joins_siblings(layer: Any) -> bool:
    """Returns whether ``layer`` is a fused layer that can be computed together with siblings. Returns False for a
    wrapper around such a layer, even if the wrapper's ``__getattr__`` returns the layer's attributes."""
    return isinstance(layer, Fused) and hasattr(layer, "joint_state")


# --- while a module's forward runs ------------------------------------------------------------------------------------


class _Now(threading.local):
    groups: Optional[dict[int, _Group]] = None
    hooks: Any = None  # the saved-tensor hook that was active when the module's forward began


NOW = _Now()


def together(module: nn.Module, groups: Iterable[tuple[str, ...]]) -> AbstractContextManager[None]:
    """Returns a context in which sibling layers of ``module`` that get the same tensor are computed together.

    ``groups`` has, for each group of siblings, the names of these children of ``module``, for example ("q_proj",
    "k_proj", "v_proj"). Under torch.compile each layer is computed alone.
    """
    return nullcontext() if torch.compiler.is_compiling() else _together(module, groups)


@contextmanager
def _together(module: nn.Module, groups: Iterable[tuple[str, ...]]) -> Iterator[None]:
    before, hooks, held = NOW.groups, NOW.hooks, {}
    for names in groups:
        layers = [module._modules.get(name) for name in names]
        layers = [layer for layer in layers if joins_siblings(layer)]
        if len(layers) > 1:
            held.update(dict.fromkeys(map(id, layers), _Group(layers)))
    NOW.groups, NOW.hooks = held, _saving_hooks()
    try:
        yield
    finally:
        NOW.groups, NOW.hooks = before, hooks


def output_of(layer: Any, x: Any) -> Optional[Tensor]:
    """Returns the layer's output for x, computed together with its siblings' outputs; None if the layer has to compute
    alone."""
    if not (groups := NOW.groups) or torch.compiler.is_compiling() or (group := groups.get(id(layer))) is None:
        return None
    if _saving_hooks() is not NOW.hooks:
        # The layer is called inside a checkpoint that began within the forward of the layers' parent module. The
        # recomputation of the checkpoint runs each layer alone, so the first run must run each layer alone, too.
        return None
    return group.output(layer, x)


def _saving_hooks() -> Any:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks and hooks[0]


class _Group:
    """A group of sibling layers, with the stored outputs that no layer has returned yet."""

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers
        self._x: Optional[Tensor] = None
        self._version = 0
        self._held: dict[int, tuple[Tensor, tuple]] = {}

    def output(self, layer: Any, x: Any) -> Optional[Tensor]:
        if not accepts_input(x) or x.is_inference() or x.numel() < MANY_TOKENS * x.shape[-1]:
            return None
        if (held := self._held.pop(id(layer), None)) is not None:
            y, state = held
            return y if x is self._x and x._version == self._version and state == _state(layer, x) else None
        return self._compute(layer, x)

    def _compute(self, leader: Any, x: Tensor) -> Optional[Tensor]:
        """Returns the output of ``leader``, and stores the outputs of the other layers that can be computed together.

        Returns None if ``leader`` has to compute alone: if the operator has no kernels, if a layer of the group has
        hooks, if ``leader`` is not the first layer that can be computed together, if no other layer can, or if
        transformers' tensor parallelism split the layers in different ways.
        """
        states = [_state(layer, x) for layer in self._layers]
        if joint_reason(self._layers, states, x.device.type) is not None:
            return None
        found = []
        for layer, state in zip(self._layers, states, strict=True):
            if state is None or (call := layer.joint_call(x)) is None:
                continue
            if not found and layer is not leader:
                return None
            found.append((layer, state, call))
        if len(found) < 2:
            return None
        split = leader.joint_split()
        # With sum_gradient, the gradient of x is summed over the processes once, and not once for each sibling layer.
        given = x if split is None else sum_gradient(x, split)
        weights, biases, lora_As, lora_Bs, rank_scales, scalings, ps, dtypes = zip(
            *(call for *_, call in found), strict=True
        )
        ys = ops.lora_linears(given, weights, lora_As, lora_Bs, biases, rank_scales=rank_scales, scalings=scalings,
                              dropout_ps=ps, training=True)  # fmt: skip
        ys = [y if y.dtype is dtype else y.to(dtype) for y, dtype in zip(ys, dtypes, strict=True)]
        self._x, self._version = x, x._version
        self._held = {id(layer): (y, state) for (layer, state, _), y in zip(found[1:], ys[1:], strict=True)}
        return ys[0]


def joint_reason(layers: list[Any], states: list[Optional[tuple]], device: str) -> Optional[str]:
    """Returns why no two of the sibling layers ``layers`` on ``device`` can be computed together; None if two can.
    ``states``: for each layer, the return value of its ``joint_state()``."""
    joint = [layer for layer, state in zip(layers, states, strict=True) if state is not None]
    if len(joint) < 2:
        return "no two have adapters that can be computed together"
    if any(map(hooked, layers)):
        return "a hook on one of them may change the input in place, which its version counter need not show"
    if len({layer.joint_split() for layer in joint}) > 1:
        return "tensor parallelism splits them in different ways"
    return kernel_reason("lora_linears", device)


def _state(layer: Any, x: Tensor) -> Optional[tuple]:
    state = layer.joint_state()
    return None if state is None else (*state, torch.is_grad_enabled(), autocast_dtype(x))
