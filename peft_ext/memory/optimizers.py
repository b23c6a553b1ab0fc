"""Computes the bytes of the optimizers' states, and names the optimizers whose step makes temporary tensors."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def _plain(states: int) -> Callable[[Tensor], list[int]]:
    """Returns a function that gives the bytes of a parameter's states in torch.optim.

    Each state has the parameter's shape and dtype.
    """
    return lambda p: [p.numel() * p.element_size()] * states


def _wide(states: int) -> Callable[[Tensor], list[int]]:
    """Returns a function that gives the bytes of a parameter's states, each float32 and of the parameter's shape."""
    return lambda p: [4 * p.numel()] * states


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


# OPTIMIZERS maps an optimizer's name to the function that returns the bytes of each state of one parameter, and to the
# number of temporary copies of all gradients in a step on CUDA, where torch.optim updates all parameters at once. On a
# CPU, a step of an optimizer with the number 1 has two temporary copies of the largest gradient.
OPTIMIZERS: dict[str, tuple[Callable[[Tensor], list[int]], int]] = {
    "adamw": (_plain(2), 1),
    "adam": (_plain(2), 1),
    "adamw_torch_fused": (_plain(2), 0),
    "adamw_8bit": (_eight_bit(2), 0),
    "adafactor": (_adafactor, 0),
    "adagrad": (_plain(1), 1),
    "lion_32bit": (_wide(1), 0),
    "lion_8bit": (_eight_bit(1), 0),
    "rmsprop": (_plain(1), 1),
    "sgd": (_plain(0), 0),
}
