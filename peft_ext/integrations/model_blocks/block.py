"""What a fused block of a model is, and how a class of the model's is tried.

A block's class is a subclass of the model's own, made once for what a trial of that class found: its formula, tried on
random numbers with weights of the trial's own. A class whose forward computes anything else keeps it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..adapter_layers.base import STOCK
from ..adapter_layers.reasons import accepts_input, forward_is_replaced, replaced_on_instance
from .reads import Watched, are_as_watched

__all__ = ["Block", "are_alike", "class_of", "stub", "tried_as", "with_gradients"]

_TOLERANCE = 1e-5  # of a trial in float32, of the largest value


class Block:
    """A module of a model on fused operators. A subclass gives ``formula``, ``block_reason`` and ``_fused``, or its own
    ``parts`` and ``forward``."""

    stock_class: type
    stock_forward: Callable[..., Any]  # the stock class's, that was tried
    watched: tuple[Watched, ...] = ()  # and what it finds by name
    formula: tuple = ()
    kind = ""

    def __init_subclass__(cls, **_: Any) -> None:
        """Nothing: a class that is fused is no new one of the model's, which may list its own."""

    @classmethod
    def prepare(cls, stock: type) -> None:
        """Does what a trial does beside, where the class is made again in a process that has tried nothing yet."""

    def block_reason(self) -> Optional[str]:
        """Returns why the module's own forward runs."""
        raise NotImplementedError

    def replaced(self) -> Optional[str]:
        """Returns why the module's forward is not the one that was tried."""
        if replaced_on_instance(self):
            return "its forward was replaced on the instance"
        if forward_is_replaced(type(self)):
            return "its class's forward was replaced"
        return None if are_as_watched(self.watched) else "a name that its forward asks for stands for something else"

    def parts(self) -> Iterator[tuple[str, Optional[str]]]:
        """Yields what is fused of the module, and why it is not now."""
        yield self.kind, self.block_reason()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Block):  # restored, and called by who held the bound method
            return type(self).forward(self, *args, **kwargs)
        alone = len(args) == 1 and not kwargs and not torch.compiler.is_compiling() and accepts_input(args[0])
        return self._fused(*args) if alone and self.block_reason() is None else super().forward(*args, **kwargs)

    def _fused(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class was made at run time: it is made again from the model's.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (type(self).__mro__[1], self.stock_class, self.formula), *state


def _new(mixin: type, stock: type, formula: tuple) -> Block:
    kind = class_of(mixin, stock, formula)
    kind.prepare(stock)
    return kind.__new__(kind)


@functools.cache
def class_of(mixin: type, stock: type, formula: tuple) -> type:
    """Returns the class of ``stock`` on fused operators by ``formula``, made once."""
    held = {"stock_class": stock, "stock_forward": stock.forward, "formula": formula, "__doc__": stock.__doc__,
            "__module__": stock.__module__}  # fmt: skip
    kind = type(stock)  # past a metaclass of the model's, too
    made = type.__new__(kind, stock.__name__, (mixin, stock), held)
    STOCK[made] = stock
    return made


# --- trials -----------------------------------------------------------------------------------------------------------


def stub(module: nn.Module) -> Any:
    """Returns an object with what ``module`` has, whose parameters and layers can be others."""
    trial = object.__new__(type(module))
    own = {name: value.copy() if type(value) in (list, dict, set) else value for name, value in vars(module).items()}
    trial.__dict__ = {**own, "_parameters": dict(module._parameters), "_modules": dict(module._modules)}
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        trial.__dict__[hooks] = {}
    return trial


def tried_as(trial: nn.Module, mixin: type, formula: tuple) -> Any:
    """Returns the trial as an instance of the fused class, with the same parameters and layers."""
    fused = object.__new__(class_of(mixin, type(trial), formula))
    fused.__dict__ = trial.__dict__
    return fused


def with_gradients(forward: Callable[[Any, Tensor], Tensor], trial: Any, x: Tensor) -> list[Tensor]:
    """Returns what ``forward`` gives and the gradients of x and of what the trial holds, under a seed of its own."""
    layers = [child for child in trial._modules.values() if child is not None]
    held = [p for p in (*trial._parameters.values(), *(p for child in layers for p in child.parameters()))
            if p is not None]  # fmt: skip
    with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        x = x.detach().clone().requires_grad_()
        y = forward(trial, x)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        grads = torch.autograd.grad((y * weights).sum(), [x, *held], allow_unused=True)
        return [y.detach(), *(grad for grad in grads if grad is not None)]


def are_alike(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(
        a.shape == b.shape and a.dtype is b.dtype
        and bool((a - b).abs().max() <= _TOLERANCE * b.abs().max().clamp(min=1e-3))
        for a, b in zip(found, wanted, strict=True)
    )  # fmt: skip
