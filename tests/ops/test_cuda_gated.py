"""Tests the CUDA passes of a LoRA layer whose input is a gated activation.

The results must have the bits of the operators of the activation and of the layer, one after the other, and be near the
reference in float64. Rows and columns end in the middle of a tile, and passes are cut into several chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_kernels import Launches, assert_same_bits
from nf4_cases import nf4_weight
from torch import Tensor

from peft_ext import reference
from peft_ext.ops import checks
from peft_ext.reference.activations import ACTIVATIONS

pytestmark = pytest.mark.slow

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SEED = torch.tensor([17, 1 << 40 | 3])
# Sizes (T, F) of h: several tiles and chunks in both dimensions, ends within a tile, fewer rows or columns than a tile.
SHAPES = [(330, 584), (64, 64), (129, 1160), (3, 8), (1100, 40)]


class Call:
    """The operands of one call, over a weight of 72 rows."""

    def __init__(
        self, shape: tuple[int, int], rank: int, p: float, dtype: torch.dtype, adapter: torch.dtype = F32,
        activation: str = "silu", halves: bool = False, nf4: bool = False, rank_scale: bool = False, bias: bool = True,
    ) -> None:  # fmt: skip
        (t, f), n = shape, 72
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(t + rank))
        both = draw(t, 2 * f).mul(2).to(dtype)
        self.gate, self.up = (both, None) if halves else (part.contiguous() for part in both.chunk(2, -1))
        self.activation, self.p, self.seed = activation, p, SEED if p else None
        base = nf4_weight(n, f, dtype, 64, True) if nf4 else (draw(n, f) / f**0.5).to(dtype)
        self.base, self.weight, self.bias = base, checks.weight_args(base), draw(n).to(dtype) if bias else None
        self.adapter = ((draw(rank, f) / 8).to(adapter), (draw(n, rank) / 8).to(adapter),
                        draw(rank) if rank_scale else None)  # fmt: skip
        self.grad, self.scale = draw(t, n).to(dtype), (0.75, p, self.seed)

    @property
    def given(self) -> tuple[Tensor, Tensor | None, int]:
        return self.gate, self.up, ACTIVATIONS.index(self.activation)

    def run(self, call: Callable[..., Any], needs: bool = True) -> list[Tensor]:
        y, s = call("gated_lora_linear", *self.given, *self.weight, self.bias, *self.adapter, *self.scale)
        grads = call("gated_lora_linear_backward", self.grad, *self.given, *self.weight, *self.adapter, s, *self.scale,
                     needs)  # fmt: skip
        return [y, s, *grads]

    def apart(self, call: Callable[..., Any], needs: bool = True) -> list[Tensor]:
        """Returns what :meth:`run` returns, computed by the operators of the activation and of the layer."""
        h = call("gated_activation", *self.given)
        y, s = call("lora_linear", h, *self.weight, self.bias, *self.adapter, *self.scale)
        grad_h, *own = call("lora_linear_backward", self.grad, h, *self.weight, *self.adapter, s, *self.scale, needs)
        none = torch.empty(0, dtype=self.gate.dtype)
        of_gate = call("gated_activation_backward", grad_h, *self.given) if needs else (none, none)
        return [y, s, *of_gate, *own]

    def expected(self) -> list[Tensor]:
        """Returns Y and the gradients of gate, up, lora_A, lora_B and rank_scale by the reference in float64."""
        halves = self.up is None
        leaves = [None if value is None else value.double().requires_grad_()
                  for value in (self.gate, self.up, *self.adapter)]  # fmt: skip
        gate, up, a, b, scale = leaves
        dense = self.base if isinstance(self.base, Tensor) else reference.nf4_dequantize(self.base, self.gate.dtype)
        bias = None if self.bias is None else self.bias.double()
        y = reference.gated_lora_linear(
            gate, up, self.activation, dense.double(), a, b, bias, rank_scale=scale, scaling=0.75, dropout_p=self.p,
            training=True, seed=self.seed,
        )  # fmt: skip
        given = [leaf for leaf in leaves if leaf is not None]
        grads = iter(torch.autograd.grad(y, given, self.grad.double()))
        found = [torch.empty(0) if leaf is None else next(grads) for leaf in leaves]
        assert not halves or found[1].numel() == 0
        return [y.detach(), *found]


def check(call: Callable[..., Any], case: Call) -> None:
    got = case.run(call)
    for one, other in zip(got, case.apart(call), strict=True):
        assert_same_bits(one, other)
    for one, wide in zip([got[0], *got[2:]], case.expected(), strict=True):
        assert one.shape == wide.shape
        if wide.numel():
            # h is rounded to the dtype of gate before the products, and dh before the gradients of gate and up.
            off = (one.double() - wide).norm() / wide.norm()
            assert off < (2.0**-6 if case.gate.dtype is BF16 else 2.0**-9), off


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [5, 32])
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["plain", "dropout"])
def test_bits_and_values(cuda_call: Callable[..., Any], p: float, rank: int, shape: tuple[int, int]) -> None:
    check(cuda_call, Call(shape, rank, p, BF16))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(cuda_call: Callable[..., Any], activation: str) -> None:
    check(cuda_call, Call((70, 136), 8, 0.5, F16, activation=activation))


@pytest.mark.parametrize(
    "options",
    [
        {"halves": True}, {"adapter": BF16}, {"adapter": BF16, "dtype": F16}, {"rank_scale": True}, {"bias": False},
        {"nf4": True}, {"nf4": True, "shape": (5, 128)}, {"dtype": F32}, {"rank": 33}, {"rank": 70},
        {"shape": (70, 60)}, {"shape": (1, 136)}, {"halves": True, "shape": (70, 132)},
    ],
    ids=str,
)  # fmt: skip
def test_other_operands(cuda_call: Callable[..., Any], options: dict[str, Any]) -> None:
    """rank_gated computes the cases of 16 bits with up to 32 ranks and rows of a multiple of eight columns. In the
    other cases (float32, more than 32 ranks, 60 or 132 columns, and the forward of 5 tokens over NF4), the kernels of
    the activation and of the layer run one after the other."""
    check(cuda_call, Call(**{"shape": (130, 128), "rank": 16, "p": 0.1, "dtype": BF16, **options}))


def test_rows_apart(cuda_call: Callable[..., Any]) -> None:
    """The operands are parts of wider rows, the second also at an address that is no multiple of 16 bytes."""
    for first in (8, 3):
        case = Call((130, 128), 16, 0.1, BF16)
        wide = torch.zeros(130, 400, dtype=BF16)
        parts = [wide[:, first : first + 128], wide[:, first + 160 : first + 288]]
        for part, value in zip(parts, (case.gate, case.up), strict=True):
            part.copy_(value)
        case.gate, case.up = parts
        check(cuda_call, case)


def test_no_gradient_of_the_operands(cuda_call: Callable[..., Any]) -> None:
    case = Call((130, 128), 16, 0.1, BF16)
    found, whole = case.run(cuda_call, False), case.run(cuda_call)
    assert found[2].numel() == found[3].numel() == 0
    for one, other in zip(found[4:], whole[4:], strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["plain", "dropout"])
def test_launches(launches: Launches, p: float) -> None:
    """A forward: terms, h and S, its sums, Y0. A backward: terms, P and dB, their sums, dX0, the gradients with dA, its
    sums."""
    case = Call((200, 136), 8, p, BF16)
    found, forward = launches.of("gated_lora_linear", *case.given, *case.weight, case.bias, *case.adapter, *case.scale)
    _, backward = launches.of(
        "gated_lora_linear_backward", case.grad, *case.given, *case.weight, *case.adapter, found[1], *case.scale, True
    )
    assert (forward, backward) == (4, 6)


def test_wrong_sizes(cuda_call: Callable[..., Any]) -> None:
    case = Call((70, 128), 8, 0.0, BF16)
    s = case.run(cuda_call)[1]
    arguments = [case.grad, *case.given, *case.weight, *case.adapter, s, *case.scale, True]
    for at, wrong, message in ((0, case.grad[:-1], "grad is"), (2, case.up[:-1], "up is not"), (14, s[:-1], ": s ")):
        with pytest.raises(RuntimeError, match=f"gated_lora_linear_backward.*{message}"):
            cuda_call("gated_lora_linear_backward", *arguments[:at], wrong, *arguments[at + 1 :])
