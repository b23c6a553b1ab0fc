"""Random operands, from which each family of operators makes the calls that prove the family's kernels.

See :func:`.library.proof` and :mod:`.prove`.
"""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
from torch import Tensor

from ..reference import nf4 as reference

_CODES = (torch.uint8, torch.int8, torch.int32)  # dtypes of the codes of packed weights


class ProofInputs:
    """Random operands of one dtype on one device. The same constructor arguments and the same order of draws give the
    same values; ``nf4`` is drawn when it is first read.

    Attributes:
        t, k, n: the numbers of tokens, input features and output features. dtype, device: dtype and device of x, grad,
            bias and the dense weight.
        x: ``[t, k]``. grad: ``[t, n]``. bias: ``[n]``. a: lora_A ``[16, k]`` float32. b: lora_B ``[n, 16]`` float32.
        seed: int64 ``[2]`` on the CPU, for a dropout mask, as layers on a GPU draw their seeds.
        dense: a dense weight ``[n, k]`` as the seven arguments that ``library.WEIGHT`` declares. nf4: a
            double-quantized NF4 weight ``[n, k]`` as the seven arguments that ``library.WEIGHT`` declares.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]):
        self.t, self.k, self.n = t, k, n = shape
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)
        self.x, self.grad, self.bias = self.draw(t, k), self.draw(t, n), self.draw(n)
        self.dense = (self.draw(n, k, scale=k**-0.5), None, None, None, None, 0, [n, k])
        self.a = self.draw(16, k, of=torch.float32, scale=k**-0.5)
        self.b = self.draw(n, 16, of=torch.float32, scale=0.25)
        self.seed = torch.tensor([1234, 5], dtype=torch.int64, device="cpu")

    @functools.cached_property
    def nf4(self) -> tuple:
        weight = self.draw(self.n, self.k, of=torch.float32, scale=self.k**-0.5)
        return reference.nf4_quantize(weight, 64, True).op_args()

    def draw(self, *size: int, of: Optional[torch.dtype] = None, scale: float = 1.0) -> Tensor:
        """Returns normally distributed values times ``scale``, of the dtype ``of``; default: the operands' dtype."""
        values = torch.randn(*size, generator=self.generator, dtype=torch.float32, device="cpu") * scale
        return values.to(self.device, self.dtype if of is None else of)

    def vector(self, *size: int) -> Tensor:
        """Returns a float32 vector of random factors near 1."""
        return 1 + self.draw(*size, of=torch.float32, scale=0.1)

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        """Returns int64 numbers from ``low`` to ``high - 1``."""
        return torch.randint(low, high, size, generator=self.generator, device="cpu").to(self.device)


def widened(value: Any, dtype: torch.dtype) -> Any:
    """Returns an operator's arguments with float tensors cast to float64, and with torch.float64 in place of an
    argument that is the dtype ``dtype``.

    The scales of a packed weight are not cast. The scales are the tensors of less than two dimensions that follow the
    codes among the arguments.

    In float64, the reference does not depend on the precision that the process sets for products (TF32, bfloat16), so
    that a difference between the kernel and the reference is the kernel's error.
    """
    if isinstance(value, (list, tuple)):
        found, of_codes = [], False
        for part in value:
            is_tensor = isinstance(part, Tensor)
            of_codes = is_tensor and (part.dtype in _CODES or (of_codes and part.dim() < 2))
            found.append(part if of_codes else widened(part, dtype))
        return type(value)(found)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return torch.float64 if value is dtype else value
