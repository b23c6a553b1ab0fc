"""What a case of an operator is: how to draw inputs, the public op, plain PyTorch and the float64 oracle."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from op_errors import Error
from torch import Tensor

from peft_ext import NF4Weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SEED = torch.tensor([0x1234_5678_9ABC_DEF0, -0x0FED_CBA9_8765_4321], dtype=torch.int64)

# (tokens shape, K, N, R): odd, prime, one, empty, wider than a panel, and a multiple of everything.
SHAPES: tuple[tuple[tuple[int, ...], int, int, int], ...] = (
    ((4, 8), 64, 96, 16),
    ((3, 7), 65, 33, 5),
    ((1,), 1, 1, 1),
    ((), 48, 40, 3),
    ((0,), 32, 16, 4),
    ((2, 0, 3), 32, 16, 4),
    ((131,), 515, 70, 8),
    ((17,), 36, 1031, 33),
    ((300,), 96, 64, 17),
    ((5,), 192, 70, 8),
    ((16,), 128, 33, 4),
    ((1,), 4160, 130, 2),
    ((100,), 96, 80, 6),
)


@dataclass
class Sample:
    """Inputs of one call. ``grads`` names those that get a gradient; ``call`` takes the inputs and nothing else."""

    inputs: dict[str, Any]
    grads: Sequence[str] = ()

    def to(self, device: torch.device) -> Sample:
        """The same values on ``device``."""
        return Sample({name: _moved(value, device) for name, value in self.inputs.items()}, self.grads)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, (Tensor, NF4Weight)) else value


@dataclass(frozen=True)
class Case:
    """One operator in one configuration.

    Attributes:
        name: test id. op: stem of the operator's files. make: draws a sample for (dtype, shape).
        call: the public op. plain: the same in eager PyTorch, in the dtype a user would run it in; the yardstick.
        oracle: the same in float64, differentiable by autograd. exact: the result must have the oracle's bits.
        result: dtype and shape of the result, for (dtype, shape). held: inputs of the oracle that its gradient takes
        for constants although they depend on the sample. from_product: gradients that are computed from the base
        product, as it was rounded to x's dtype. shapes: those of SHAPES it is tested on. errors: what the operator
        refuses. saved: bytes that a bfloat16 call keeps for the backward beside its inputs, for (T, K, N, R).
    """

    name: str
    op: str
    make: Callable[[torch.dtype, tuple], Sample]
    call: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    oracle: Callable[..., Tensor] = None  # by default the code of plain
    exact: bool = False
    result: Callable[[torch.dtype, tuple], tuple[torch.dtype, tuple]] = lambda dtype, shape: (
        dtype, (*shape[0], shape[2]))  # fmt: skip
    held: Callable[[Sample], dict[str, Any]] = lambda sample: {}
    from_product: Sequence[str] = ()
    shapes: Sequence[tuple] = SHAPES
    errors: Sequence[Error] = ()
    saved: Callable[[int, int, int, int], int] | None = None

    def __post_init__(self) -> None:
        if self.oracle is None:
            object.__setattr__(self, "oracle", self.plain)

    @property
    def public(self) -> str:
        """The public function of peft_ext.ops that this case calls."""
        return self.name.partition("-")[0]


@dataclass(frozen=True)
class Options:
    """What a random case is made of, drawn from its seed.

    Attributes:
        base: "dense", "nf4:BLOCKSIZE" or "nested:BLOCKSIZE". adapters: the adapters' dtype; None: the input's.
        dropout: its probability. blocksize, nested: of an NF4 weight.
    """

    rng: random.Random
    base: str
    adapters: torch.dtype | None
    dropout: float
    blocksize: int
    nested: bool

    def maybe(self, chance: float = 0.5) -> bool:
        return self.rng.random() < chance


def with_errors(errors: dict[str, tuple[Error, ...]], *cases: Case) -> tuple[Case, ...]:
    """Gives cases their errors, by a case's name, or by an operator's: then all of its cases."""
    given = tuple(replace(case, errors=errors.get(case.name, errors.get(case.public, ()))) for case in cases)
    unknown = errors.keys() - {name for case in given for name in (case.name, case.public)}
    assert not unknown, f"errors of no case: {unknown}"
    return given


def nothing(t: int, k: int, n: int, r: int) -> int:
    """``Case.saved`` of an operator that keeps its inputs alone."""
    return 0


def shrunk_bytes(dropout_p: float) -> Callable[[int, int, int, int], int]:
    """Returns ``Case.saved`` of a low-rank layer: S [T, R] in float32, and with dropout the seed's 16 bytes."""
    return lambda t, k, n, r: t * r * 4 + (16 if dropout_p else 0)


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


def wide(value: Any) -> Any:
    """An input as the oracle takes it: float64 of the very same value."""
    if isinstance(value, NF4Weight):
        return value
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def case_name(op: str, base: str, dropout_p: float, adapter_dtype: Any, **traits: bool) -> str:
    parts = [base, *(name for name, present in traits.items() if present)]
    parts += [f"dropout{dropout_p}"] if dropout_p else []
    parts += [f"adapters_{str(adapter_dtype).removeprefix('torch.')}"] if adapter_dtype is not None else []
    return f"{op}-" + "-".join(parts)
