"""Compares an operator's values and gradients with a float64 oracle, and the errors with plain PyTorch's errors.

Tolerance: a kernel's error is at most 1.5 times the error of plain PyTorch in the same dtype, plus one rounding of the
result, plus a float32 rounding error that grows with the square root of the number of summed terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from op_db import Case, Sample, randn, wide
from torch import Tensor

Parts = dict[str, Tensor]  # the value of an operator under the name "y", and the gradients by the inputs' names


def run(function: Any, sample: Sample, grad: Tensor | None = None, *, keep_strides: bool = False) -> dict[str, Tensor]:
    """Returns the value of ``function``, and its gradients for a given output gradient, copied to the CPU.

    ``keep_strides``: call ``function`` on the inputs themselves, with their strides, instead of on copies.
    """
    copy = (lambda value: value.detach()) if keep_strides else (lambda value: value.detach().clone())
    inputs = {k: copy(v) if isinstance(v, Tensor) else v for k, v in sample.inputs.items()}
    for name in sample.grads:
        inputs[name].requires_grad_()
    y = function(**inputs)
    found = {"y": y.detach().cpu()}
    if grad is not None and sample.grads:
        y.backward(grad.to(y))
        for name in sample.grads:
            assert inputs[name].grad is not None, f"no gradient reached {name}"
            assert inputs[name].grad.dtype == inputs[name].dtype
            found[name] = inputs[name].grad.cpu()
    return found


def output_grad(case: Case, dtype: torch.dtype, shape: tuple) -> Tensor:
    dtype, shape = case.result(dtype, shape)
    return randn(*shape, dtype=dtype)


def to_wide(sample: Sample) -> Sample:
    return Sample({k: wide(v) for k, v in sample.inputs.items()}, sample.grads)


def assert_close(
    got: Parts, plain: Parts, exact: Parts, terms: int, from_product: Sequence[str] = (),
    product: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Asserts for each part of ``got`` that the error, in the norm and at the worst element, is within the tolerance.

    ``product``: dtype of the product from which the parts in ``from_product`` are computed; default: y's dtype.
    """
    for name in got:
        assert_part_close(name, got, plain, exact, terms, from_product, product)


def assert_part_close(
    name: str, got: Parts, plain: Parts, exact: Parts, terms: int, from_product: Sequence[str] = (),
    product: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Asserts the same as :func:`assert_close` for one part: the value "y" or a gradient."""
    value, want = got[name], exact[name]
    assert value.shape == want.shape, name
    if value.numel() == 0:
        return
    ulp = torch.finfo(value.dtype).eps
    if name in from_product:  # the part is computed from a rounded product
        ulp = max(ulp, torch.finfo(product or got["y"].dtype).eps)
    error, yardstick = (value.double() - want).abs(), (plain[name].double() - want).abs()
    # The floor is the error of rounding the exact result once, plus float32 rounding for the order of a sum. If at most
    # one element of the exact result is not 0, plain PyTorch's error may be zero by chance, so that twice this rounding
    # is allowed.
    rounding = ulp * want.abs() / (1 if want.count_nonzero() <= 1 else 2)
    floor = rounding + terms**0.5 * torch.finfo(torch.float32).eps * want.abs().max()
    assert error.norm() <= 1.5 * yardstick.norm() + floor.norm(), (name, error.norm(), yardstick.norm())
    assert error.max() <= 1.5 * yardstick.max() + 2 * floor.max(), (name, error.max(), yardstick.max())
