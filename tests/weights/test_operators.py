"""Tests of every kind of packed weight as an argument of the operators: bits on every path, wrong parts, compiling."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from packed_bits import check_paths, set_path  # noqa: F401  a fixture
from packed_weights import KINDS, fitting, packed_weight

from peft_ext import _native, ops
from peft_ext.reference.formats import decoded
from peft_ext.weights import FORMATS, PackedWeight, gguf

dequantize = torch.ops.peft_ext.nf4_dequantize


def drawn(kind: str, n: int = 40, k: int = 96, **options: bool) -> PackedWeight:
    return packed_weight(kind, *fitting(kind, n, k), torch.Generator().manual_seed(7), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(40, 96), (17, 515), (1, 1)])
def test_decoded_bits_are_the_references(kind: str, n: int, k: int, set_path: Callable[[str], None]):  # noqa: F811
    for wild in (False, True):
        check_paths(drawn(kind, n, k, wild=wild), set_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_few_tokens_take_each_column_of_the_weight(kind: str, tokens: int, set_path: Callable[[str], None]):  # noqa: F811
    """A token that is 1 in one column and 0 elsewhere takes this column, with the codes and scales of each row."""
    weight = drawn(kind, 40, 288)
    columns = weight.shape[1]
    want = decoded(weight, torch.float32)
    largest = want.abs().amax(1, keepdim=True)
    for path in _native.STATE.module.isas():
        set_path(path)
        for first in range(0, columns - tokens + 1, tokens):
            x = torch.eye(columns, dtype=torch.bfloat16)[first : first + tokens]
            got = ops.frozen_linear(x, weight).float().T
            error = (got - want[:, first : first + tokens]).abs()
            assert (error <= 2.0**-7 * want[:, first : first + tokens].abs() + 2.0**-18 * largest).all(), path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [2, 7])
def test_few_tokens_of_a_large_weight(kind: str, tokens: int):
    """The weight has more rows than a panel, and more columns than a kernel decodes scales of at a time."""
    weight = drawn(kind, 200, 4352)
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(3)).bfloat16()
    dense = decoded(weight, torch.float32).double()
    want = x.double() @ dense.T
    spread = (x.double().square() @ dense.square().T).sqrt()  # the size of the sum of numbers with random signs
    error = (ops.frozen_linear(x, weight).double() - want).abs()
    assert (error <= 2.0**-8 * want.abs() + 2.0**-7 * spread).all()


def test_every_format_has_a_kind():
    held = {drawn(kind).format.name for kind in KINDS}
    assert {name for name in FORMATS if name != "nf4" and not name.startswith("gguf")} <= held
    kernels = {f"gguf_{type.name.lower()}" for type in gguf.TYPES.values() if type.kernel}
    assert kernels - {"gguf_mxfp4"} <= held


@pytest.mark.parametrize("kind", KINDS)
def test_raw_operators_refuse_parts_that_do_not_fit(kind: str):
    """A kernel would read beyond a part that is too short."""
    weight = drawn(kind)
    *parts, layout, shape = weight.op_args()
    name = "nf4_dequantize: "
    for i, part in enumerate(parts):
        if part is None:
            continue
        short = [*parts]
        short[i] = part.reshape(-1)[:-1]
        with pytest.raises(
            RuntimeError, match=rf"{name}part \d of a \w+ weight .* has \d+ bytes, wanted \d+ on the CPU"
        ):
            dequantize(*short, layout, shape, torch.float32)
        if i == 1:
            missing = [*parts]
            missing[1] = None
            with pytest.raises(RuntimeError, match=rf"{name}part 1 of a \w+ weight is None, wanted \d+ bytes"):
                dequantize(*missing, layout, shape, torch.float32)
    with pytest.raises(RuntimeError, match=f"{name}layout is {layout | 63 << 32}, which names no format"):
        dequantize(*parts, layout | 63 << 32, shape, torch.float32)
    with pytest.raises(RuntimeError, match=rf"{name}(part|\w+ weight)"):
        dequantize(*parts, layout, [shape[0], shape[1] * 2], torch.float32)


@pytest.mark.parametrize("kind", ["mxfp4", "fp8", "int4", "gptq", "Q4_K"])
def test_operators_on_packed_weights_pass_opcheck(kind: str):
    weight = drawn(kind, 40, 256)
    n, k = weight.shape
    x, a, b = torch.randn(3, k, requires_grad=True), torch.randn(4, k), torch.randn(n, 4)
    args = (x, *weight.op_args(), None, a, b, None, 0.5, 0.0, None)
    torch.library.opcheck(torch.ops.peft_ext.lora_linear.default, args)
    torch.library.opcheck(torch.ops.peft_ext.nf4_linear.default, (x, *weight.op_args(), None))


def test_a_stack_is_of_equal_weights():
    first, second = drawn("mxfp4"), drawn("mxfp4", 48)
    with pytest.raises(ValueError, match=r"PackedWeight\.stack: weights differ in format, shape or dtype"):
        PackedWeight.stack([first, second])
    with pytest.raises(ValueError, match=r"PackedWeight\.stack: weights is empty"):
        PackedWeight.stack([])
    stack = PackedWeight.stack([first, first])
    assert torch.equal(stack.expert(1).dequantize(), first.dequantize())
    with pytest.raises(ValueError, match="weight is packed as one weight, wanted a stacked weight|wanted"):
        ops.experts_linear(torch.randn(4, 96), first, torch.tensor([2, 4]))
