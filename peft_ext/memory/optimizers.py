"""What the optimizers hold of a parameter."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def _plain(states: int) -> Callable[[Tensor], list[int]]:
    """Returns torch.optim's sizes: states like the parameter."""
    return lambda p: [p.numel() * p.element_size()] * states


def _wide(states: int) -> Callable[[Tensor], list[int]]:
    return lambda p: [4 * p.numel()] * states


def _eight_bit(states: int) -> Callable[[Tensor], list[int]]:
    """Returns bitsandbytes' sizes: a byte an element and a float32 for each 256; float32 below 4096 elements."""
    return lambda p: [p.numel() + 4 * -(-p.numel() // 256) if p.numel() >= 4096 else 4 * p.numel()] * states


def _adafactor(p: Tensor) -> list[int]:
    if p.dim() < 2:
        return [4 * p.numel()]
    return [4 * p[..., 0].numel(), 4 * p[..., 0, :].numel()]


# By name: the states of one parameter, in bytes, and tensors like all parameters that a step makes on the way, on CUDA,
# where torch.optim takes all of them at once (on the CPU it is one parameter after the other).
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
