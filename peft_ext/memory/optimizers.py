"""Computes the bytes of the optimizers' states and of the temporary tensors in the optimizers' steps."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

from torch import Tensor


def _plain(states: int) -> Callable[[Tensor], list[int]]:
    """Returns a function that gives the bytes of a parameter's states in torch.optim.

    Each state has the parameter's shape and dtype.
    """
    return lambda p: [p.nbytes] * states


def _eight_bit(states: int) -> Callable[[Tensor], list[int]]:
    """Returns a function that gives the bytes of a parameter's 8-bit states in bitsandbytes.

    A state has one byte for each element and one float32 for each 256 elements. The states of a parameter with fewer
    than 4096 elements are float32.
    """
    return lambda p: [p.numel() + 4 * -(-p.numel() // 256) if p.numel() >= 4096 else 4 * p.numel()] * states


def _adafactor(p: Tensor) -> list[int]:
    if p.dim() < 2:
        return [4 * p.numel()]
    return [4 * p[..., 0].numel(), 4 * p[..., 0, :].numel()]


def _adam_copies(p: Tensor) -> int:
    return 2 * p.nbytes


def _one_copy(p: Tensor) -> int:
    return p.nbytes


def _adafactor_copies(p: Tensor) -> int:
    """Returns the bytes of two float32 tensors of the parameter's shape, and for a 16-bit parameter also of float32
    copies of the parameter and of its gradient, as in transformers' Adafactor."""
    return (4 if p.element_size() == 2 else 2) * 4 * p.numel()


class Optimizer(NamedTuple):
    """Computes the bytes of an optimizer's states and of the temporary tensors in its step.

    Attributes:
        states: function of a parameter that returns a list with the bytes of each of the parameter's states.
        all_at_once: number of temporary copies of all gradients in a step on CUDA, where torch.optim updates all
            parameters at once; 0 for an optimizer that updates one parameter after the other, or in one kernel.
        one_by_one: function of a parameter that returns the most bytes of the temporary tensors while this parameter is
            updated, in a step that updates one parameter after the other; None if such a step makes no temporary
            tensors.
        left: function of a parameter that returns the bytes of the temporary tensor that is still alive when the next
            parameter is updated.
        eight_bit: whether the elements of the optimizer's states have 8 bits.
    """

    states: Callable[[Tensor], list[int]]
    all_at_once: int = 0
    one_by_one: Optional[Callable[[Tensor], int]] = None
    left: Callable[[Tensor], int] = _one_copy
    eight_bit: bool = False

    def state_bytes(self, p: Tensor, of_embedding: bool = False) -> list[int]:
        """Returns the bytes of each state of one parameter. ``of_embedding``: whether the parameter is the weight of an
        nn.Embedding, whose states transformers' Trainer keeps in float32 under an 8-bit optimizer."""
        sizes = self.states(p)
        return [4 * p.numel()] * len(sizes) if self.eight_bit and of_embedding else sizes

    def temporary(self, parameters: Sequence[Tensor], device: str) -> int:
        """Returns the bytes of the temporary tensors in a step that updates ``parameters``."""
        if device == "cuda" and self.all_at_once:
            return self.all_at_once * sum(p.nbytes for p in parameters)
        if self.one_by_one is None:
            return 0
        # Trainer puts biases and norms, which have one dimension, into a second group, after all other parameters.
        ordered = sorted(parameters, key=lambda p: p.dim() < 2)
        left = [0, *map(self.left, ordered)]
        return max(map(operator.add, left, map(self.one_by_one, ordered)), default=0)


# Maps each name of an optimizer that estimate_memory accepts to the optimizer's memory.
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(_plain(2), 1, _adam_copies),
    "adam": Optimizer(_plain(2), 1, _adam_copies),
    "adamw_torch_fused": Optimizer(_plain(2)),
    "adamw_8bit": Optimizer(_eight_bit(2), eight_bit=True),
    "adafactor": Optimizer(_adafactor, 0, _adafactor_copies, lambda p: 4 * p.numel()),
    "adagrad": Optimizer(_plain(1), 2, _one_copy),
    "lion_32bit": Optimizer(lambda p: [4 * p.numel()]),  # one float32 state
    "lion_8bit": Optimizer(_eight_bit(1), eight_bit=True),
    "rmsprop": Optimizer(_plain(1), 1, _one_copy),
    "sgd": Optimizer(_plain(0)),
}
