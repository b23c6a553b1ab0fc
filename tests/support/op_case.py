"""The class Case of a tested operator: a function that draws inputs, the operator, plain PyTorch and the oracle."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from op_errors import Error
from torch import Tensor

from peft_ext.weights import PackedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SEED = torch.tensor([0x1234_5678_9ABC_DEF0, -0x0FED_CBA9_8765_4321], dtype=torch.int64)

# (shape of the tokens, K, N, R): odd, prime, one, no tokens, wider than a panel, and multiples of the tile sizes.
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
    """The inputs of one call. ``grads`` has the names of the inputs that get a gradient."""

    inputs: dict[str, Any]
    grads: Sequence[str] = ()

    def to(self, device: torch.device) -> Sample:
        """Returns a sample with equal values on ``device``."""
        return Sample({name: _moved(value, device) for name, value in self.inputs.items()}, self.grads)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, (Tensor, PackedWeight)) else value


@dataclass(frozen=True)
class Case:
    """One operator in one configuration.

    Attributes:
        name: id of the tests of the case.
        op: stem of the operator's files.
        make: a function that draws a sample for (dtype, shape).
        call: a function that calls the public operator with a sample's inputs.
        plain: ``call`` in eager PyTorch, in the dtype that a user would choose; its error determines the tolerance.
        oracle: ``call`` in float64, differentiable by autograd.
        exact: whether the result must have the oracle's bits.
        result: a function from (dtype, shape) to the dtype and the shape of the result.
        held: a function from a sample to inputs of the oracle that are constants of the gradient although they depend
            on the sample.
        from_product: names of the gradients that are computed from the base product after its rounding to x's dtype.
        shapes: the shapes of SHAPES on which the case is tested.
        errors: wrong arguments of the operator, and the expected errors.
        saved: a function from (T, K, N, R) to the bytes that a bfloat16 call keeps for the backward besides its inputs.
        multiples: numbers of which K and N must be multiples.
    """

    name: str
    op: str
    make: Callable[[torch.dtype, tuple], Sample]
    call: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    oracle: Callable[..., Tensor] = None  # the default is ``plain``, called with float64 inputs
    exact: bool = False
    result: Callable[[torch.dtype, tuple], tuple[torch.dtype, tuple]] = lambda dtype, shape: (
        dtype, (*shape[0], shape[2]))  # fmt: skip
    held: Callable[[Sample], dict[str, Any]] = lambda sample: {}
    from_product: Sequence[str] = ()
    shapes: Sequence[tuple] = SHAPES
    errors: Sequence[Error] = ()
    saved: Callable[[int, int, int, int], int] | None = None
    multiples: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if self.oracle is None:
            object.__setattr__(self, "oracle", self.plain)

    def fit(self, shape: tuple) -> tuple:
        """Returns the shape with K and N rounded up to the case's multiples."""
        tokens, k, n, r = shape
        (of_k, of_n) = self.multiples
        return (tokens, -(-k // of_k) * of_k, -(-n // of_n) * of_n, r)

    @property
    def public(self) -> str:
        """Name of the public function of peft_ext.ops that this case calls."""
        return self.name.partition("-")[0]


@dataclass(frozen=True)
class Options:
    """The options of a random case, drawn from the case's seed.

    Attributes:
        base: "dense", "nf4:BLOCKSIZE" or "nested:BLOCKSIZE".
        adapters: dtype of the adapters; None: the dtype of the input.
        dropout: dropout probability.
        blocksize, nested: block size of an NF4 weight, and whether the weight is double-quantized.
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
    """Returns the cases with their errors.

    A key of ``errors`` is a case's name, or an operator's name for all its cases.
    """
    given = tuple(replace(case, errors=errors.get(case.name, errors.get(case.public, ()))) for case in cases)
    unknown = errors.keys() - {name for case in given for name in (case.name, case.public)}
    assert not unknown, f"errors of no case: {unknown}"
    return given


def nothing(t: int, k: int, n: int, r: int) -> int:
    """Returns 0, as the ``Case.saved`` of an operator that keeps only its inputs."""
    return 0


def shrunk_bytes(dropout_p: float) -> Callable[[int, int, int, int], int]:
    """Returns a ``Case.saved`` for a low-rank layer, which saves S [T, R] in float32 and, with dropout, a seed of 16
    bytes."""
    return lambda t, k, n, r: t * r * 4 + (16 if dropout_p else 0)


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


def wide(value: Any) -> Any:
    """Returns an input for the oracle: a floating-point tensor in float64, any other value unchanged."""
    if isinstance(value, PackedWeight):
        return value
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def case_name(op: str, base: str, dropout_p: float, adapter_dtype: Any, **traits: bool) -> str:
    parts = [base, *(name for name, present in traits.items() if present)]
    parts += [f"dropout{dropout_p}"] if dropout_p else []
    parts += [f"adapters_{str(adapter_dtype).removeprefix('torch.')}"] if adapter_dtype is not None else []
    return f"{op}-" + "-".join(parts)
