"""Tests edge cases of operators, and tests that need more than one call: masks, raw arguments, autocast, merges."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import assert_close, run, to_wide
from op_db import DTYPES, SEED, SHAPES, Case, Sample, randn
from op_params import LINEAR, SAVES, TILES, ids, names, strided
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import peft_ext
from peft_ext import NF4Weight, _native, ops, reference
from peft_ext.ops import library


def test_every_op_has_a_kernel(device: torch.device, pytestconfig: pytest.Config) -> None:
    """Without kernels the battery would only compare the reference with itself."""
    assert _native.STATE.module is not None
    # On a GPU nf4_merge calls nf4_dequantize_merged first. On the CPU nf4_merge is one pass and does not call
    # nf4_dequantize_merged.
    by_reference = {"nf4_dequantize_merged"} if pytestconfig.getoption("--device") == "cpu" else set()
    for op in library.OPERATORS.values():
        if not op.composed:  # an operator that calls other operators needs no kernel
            wanted = op.cuda if device.type == "cuda" else op.name not in by_reference
            assert library.has_kernel(op.name, device.type.upper()) == wanted, op.name


SCRATCH = """
import os, torch
from peft_ext import ops

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

x, weight = torch.zeros(6144, 4096, dtype=torch.bfloat16), torch.zeros(64, 4096, dtype=torch.bfloat16)
a, b = torch.zeros(4, 4096), torch.zeros(64, 4)
for rows in (64, 6144):  # what the first call leaves is PyTorch's
    before = resident()
    ops.lora_linear(x[:rows], weight, a, b)
print(resident() - before)
"""


@pytest.mark.cpu_only("it is about the CPU's scratch")
@pytest.mark.skipif(not TILES or not Path("/proc/self/statm").exists(), reason="no strips here, or no /proc")
def test_a_large_scratch_is_given_back_when_the_call_ends() -> None:
    """Strips of activations take 48 MiB; a thread keeps at most 32 MiB of one kind of scratch.

    The test runs in its own process, because other tests make this process keep freed memory.
    """
    found = subprocess.run([sys.executable, "-c", SCRATCH], check=True, stdout=subprocess.PIPE, text=True)
    assert int(found.stdout) < 24 * 2**20


@pytest.mark.cpu_only("the checks of CUDA's glue are its own")
def test_raw_operators_check_their_weight() -> None:
    """Raw operators check the weight too, because a kernel would read a weight of another dtype past its end."""
    raw, x = torch.ops.peft_ext, torch.zeros(40, 64, dtype=torch.bfloat16)
    a, b, g = torch.zeros(4, 64), torch.zeros(96, 4), torch.zeros(96)
    dense = (torch.zeros(96, 64, dtype=torch.float32)[:, :32], *[None] * 4, 0, (96, 64))
    wrong = (torch.zeros(96, 64), *[None] * 4, 0, (96, 64))
    for op, args in {
        "nf4_linear": (x, *wrong, None),
        "nf4_linear_backward": (x.new_zeros(40, 96), *wrong),
        "lora_linear": (x, *wrong, None, a, b, None, 1.0, 0.0, None),
        "dora_linear": (x, *wrong, None, a, b, g, 1.0, 0.0, None, False, False),
        "ia3_linear": (x, *wrong, None, g, False, False),
        "dora_weight_norm": (*wrong, a, b, 1.0, torch.bfloat16),
    }.items():
        with pytest.raises(RuntimeError, match=f"{op}: weight is Float, wanted BFloat16"):
            getattr(raw, op)(*args)
    with pytest.raises(RuntimeError, match="lora_linear: x has 64 columns, wanted 32"):
        raw.lora_linear(x.float(), *dense, None, a, b, None, 1.0, 0.0, None)
    packed, absmax = torch.zeros(8, 1, dtype=torch.uint8), torch.zeros(1)
    for shape, message in (
        ((2**32, 2**32), "a size of 4294967296 times 4294967296"),
        ((-4, -4), "shape has -4, wanted sizes of 0 and more"),
        ((16,), "nf4_linear: weight has 1 dimensions, wanted"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw.nf4_linear(x, packed, absmax, None, None, None, 64, shape, None)


def test_native_and_reference_agree_on_the_mask(device: torch.device) -> None:
    """With x of ones and A the identity, S is dropout(x), whose kept elements are 1 / (1 - p)."""
    for p in (0.05, 0.5, 0.999):
        for tokens, k in ((5, 33), (64, 512), (3, 1029)):
            x, a, b = (t.to(device) for t in (torch.ones(tokens, k), torch.eye(k), torch.zeros(1, k)))
            weight = ops.checks.weight_args(torch.zeros_like(b))
            s = torch.ops.peft_ext.lora_linear(x, *weight, None, a, b, None, 1.0, p, SEED.to(device))[1].cpu()
            keep = reference.dropout_keep_mask(SEED, p, x.shape)
            assert torch.equal(s != 0, keep)
            assert torch.equal(s[keep], torch.full_like(s[keep], 1 / (1 - p)))


def test_philox_is_the_published_generator() -> None:
    """Compares with known answers of Philox4x32-7 (kat_vectors of Random123: zeros, ones, digits of pi)."""
    from peft_ext.reference.philox import philox4x32

    ones = 0xFFFFFFFF
    vectors = (
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((ones,) * 4, (ones,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    )  # fmt: skip
    for counter, key, wanted in vectors:
        drawn = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        assert tuple(int(word) for word in drawn) == wanted


@pytest.mark.parametrize("tokens", [5, 16, 17, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=names)
def test_float32_adapters_keep_their_bits(dtype: torch.dtype, tokens: int, device: torch.device) -> None:
    """Over a base of zeros Y and dX are the low-rank term alone, and as exact as the float64 term rounded once."""
    x, grad = randn(tokens, 192, dtype=dtype).to(device).requires_grad_(), randn(tokens, 130, dtype=dtype).to(device)
    a, b = randn(16, 192, dtype=torch.float32).to(device), randn(130, 16, dtype=torch.float32).to(device)
    y = ops.lora_linear(x, torch.zeros(130, 192, dtype=dtype, device=device), a, b)
    y.backward(grad)
    exact = x.detach().double() @ a.double().t() @ b.double().t(), grad.double() @ b.double() @ a.double()
    for got, want in zip((y, x.grad), exact, strict=True):
        assert (got.double() - want).norm() <= 1.02 * (want.to(dtype).double() - want).norm()


def test_dropout_rate_and_independence() -> None:
    keep = reference.dropout_keep_mask(SEED, 0.3, torch.Size((1000, 1000))).double()
    assert abs(keep.mean() - 0.7) < 5 * (0.3 * 0.7 / 1e6) ** 0.5
    lag = ((keep.view(-1)[1:] - 0.7) * (keep.view(-1)[:-1] - 0.7)).mean() / (0.3 * 0.7)
    assert abs(lag) < 5e-3
    other = reference.dropout_keep_mask(SEED + 1, 0.3, torch.Size((1000, 1000))).double()
    assert abs(((keep - 0.7) * (other - 0.7)).mean() / 0.21) < 5e-3


def test_manual_seed_repeats_the_mask_and_eval_has_none(device: torch.device) -> None:
    x, w, a, b = (torch.randn(*s).to(device) for s in ((8, 64), (32, 64), (4, 64), (32, 4)))
    torch.manual_seed(3)
    first = ops.lora_linear(x, w, a, b, dropout_p=0.5, training=True)
    second = ops.lora_linear(x, w, a, b, dropout_p=0.5, training=True)
    torch.manual_seed(3)
    assert torch.equal(ops.lora_linear(x, w, a, b, dropout_p=0.5, training=True), first)
    assert not torch.equal(first, second)
    plain = ops.lora_linear(x, w, a, b)
    assert torch.equal(ops.lora_linear(x, w, a, b, dropout_p=0.5, training=False), plain)


@pytest.mark.parametrize("case", [case for case in LINEAR if case.op != "dropout"], ids=ids)
def test_the_gradient_of_a_gradient_is_refused(case: Case, device: torch.device) -> None:
    sample = case.make(torch.float32, case.fit(SHAPES[0])).to(device)
    if not sample.grads:
        pytest.skip("it has no gradient")
    if case.op == "attention" and device.type == "cuda":
        pytest.skip("on a GPU it is PyTorch's own")
    leaf = sample.inputs[sample.grads[0]].requires_grad_()
    with pytest.raises(RuntimeError, match=r"the gradient of a gradient \(create_graph=True\) is not supported"):
        torch.autograd.grad(case.call(**sample.inputs).sum(), leaf, create_graph=True)


def test_the_gradient_of_a_dropouts_gradient(device: torch.device) -> None:
    x = torch.randn(5, 30, dtype=torch.float32).to(device).requires_grad_()
    y = ops.dropout(x, 0.5, seed=SEED.to(device))
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, torch.where(y == 0, 0.0, 8.0))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_mask(reentrant: bool, device: torch.device) -> None:
    from torch.utils.checkpoint import checkpoint

    w, *leaves = (torch.randn(*s).to(device) for s in ((32, 64), (8, 64), (4, 64), (32, 4)))
    x, a, b = leaves = [leaf.requires_grad_() for leaf in leaves]

    def layer(x: Tensor) -> Tensor:
        return ops.lora_linear(x, w, a, b, dropout_p=0.5, training=True).tanh()

    torch.manual_seed(1)
    plain = torch.autograd.grad(layer(x).sum(), (x, a, b))
    torch.manual_seed(1)
    for leaf in leaves:
        leaf.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    for leaf, wanted in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_autocast_computes_in_its_dtype(base: str, device: torch.device) -> None:
    x, weight, a, b = (torch.randn(*s).to(device) for s in ((8, 64), (32, 64), (4, 64), (32, 4)))
    x, a, b = (leaf.requires_grad_() for leaf in (x, a, b))
    held = weight if base == "dense" else reference.nf4_quantize(weight)
    bias = torch.zeros(32, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = ops.lora_linear(x, held, a, b, bias)
    assert y.dtype == torch.bfloat16
    low = weight.bfloat16() if base == "dense" else held
    assert torch.equal(y, ops.lora_linear(x.bfloat16(), low, a, b, bias.bfloat16()))
    y.float().sum().backward()
    assert x.grad.dtype == a.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_nan_and_infinite_weights_quantize_as_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    weight = torch.randn(40, 64).to(dtype)
    weight[1, 5], weight[3, 7], weight[5, 0] = float("nan"), float("inf"), -float("inf")
    weight[7] = 1e-30 if dtype is not torch.float16 else 6e-8
    quantized, want = ops.nf4_quantize(weight.to(device)), reference.nf4_quantize(weight)
    got = quantized.to("cpu")
    assert torch.equal(got.packed, want.packed)
    assert torch.equal(got.absmax.isnan(), want.absmax.isnan())
    assert torch.equal(got.absmax.nan_to_num(), want.absmax.nan_to_num())
    got, want = quantized.dequantize(dtype).cpu(), reference.nf4_dequantize(want, dtype)
    assert torch.equal(got.nan_to_num(nan=123.0), want.nan_to_num(nan=123.0))


def test_float64_runs_and_bad_nf4_weights_are_refused(device: torch.device) -> None:
    nf4 = ops.nf4_quantize(torch.randn(8, 64).to(device))
    assert nf4.dequantize(torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="NF4Weight: packed is torch.uint8 with 256 elements, wanted torch.uint8 with"):
        NF4Weight(nf4.packed, nf4.absmax, torch.Size((8, 65)), torch.float32)
    with pytest.raises(ValueError, match="NF4Weight: absmax is torch.float32 with 8 elements, wanted torch.uint8"):
        NF4Weight(nf4.packed, nf4.absmax, nf4.shape, torch.float32, 64, peft_ext.NestedAbsmax(*[torch.zeros(1)] * 3))
    with pytest.raises(ValueError, match="nf4_quantize: blocksize is 48, wanted one of"):
        ops.nf4_quantize(torch.zeros(4, 4), 48)
    with pytest.raises(RuntimeError, match="nf4_linear: weight is Byte with 1 elements, wanted Byte with 256"):
        x, one = torch.zeros(2, 64, device=device), torch.zeros(1, dtype=torch.uint8, device=device)
        torch.ops.peft_ext.nf4_linear(x, one, nf4.absmax, None, None, None, 64, [8, 64], None)


# --- edges of dora and ia3 -------------------------------------------------------------------------------------------


def dora_leaves(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns a weight with a row of zeros, a bias, and x, lora_A, lora_B (with a zero in this row) and magnitude."""
    weight, b = randn(6, 64, dtype=dtype, scale=0.1), randn(6, 3, dtype=dtype)
    weight[2], b[2] = 0.0, 0.0
    x, a, magnitude = randn(5, 64, dtype=dtype), randn(3, 64, dtype=dtype, scale=0.1), torch.ones(6, dtype=dtype)
    leaves = [leaf.to(device).requires_grad_() for leaf in (x, a, b, magnitude)]
    return weight.to(device), torch.ones(6, dtype=dtype, device=device), leaves


@pytest.mark.parametrize(("n", "k"), [(6, 0), (0, 6)])
def test_the_norm_of_no_row_or_column(n: int, k: int, device: torch.device) -> None:
    w, a, b = (torch.zeros(*size, device=device).requires_grad_() for size in ((n, k), (3, k), (n, 3)))
    norm = ops.dora_weight_norm(w.detach(), a, b)
    assert norm.shape == (n,) and not any(g.any() for g in (norm, *torch.autograd.grad(norm.sum(), (a, b))))


@pytest.mark.parametrize("norm_grad", [False, True])
@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
def test_an_all_zero_row_is_finite(module: Any, norm_grad: bool, device: torch.device) -> None:
    weight, bias, leaves = dora_leaves(device)
    y = module.dora_linear(leaves[0], weight, *leaves[1:], bias, norm_grad=norm_grad)
    assert module.dora_weight_norm(weight, *leaves[1:3])[2] == 0
    assert torch.equal(y[:, 2], torch.ones_like(y[:, 2]))
    for name, grad in zip("x A B magnitude".split(), torch.autograd.grad(y.square().sum(), leaves), strict=True):
        assert grad.isfinite().all(), name
        if name in ("B", "magnitude"):
            assert torch.equal(grad[2], torch.zeros_like(grad[2])), name
    norm = module.dora_weight_norm(weight, *leaves[1:3])
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(norm.sum(), leaves[1:3]))


@pytest.mark.parametrize("save_output", SAVES)
def test_a_factor_near_zero_has_its_gradient(save_output: bool, device: torch.device) -> None:
    """Where a factor g is 0 or nearly 0, Y = g∘Z does not determine Z; the gradient of g must still be exact. In
    float16, 1e-7 times Z is subnormal."""
    for dtype in DTYPES:
        check_factors_near_zero(dtype, save_output, device)


def check_factors_near_zero(dtype: torch.dtype, save_output: bool, device: torch.device) -> None:
    k, vector = 70, torch.tensor([1, 0, 1e-30, -1e-30, 1e-7, -1e-7, 1e-4, -1e-4, 2.0**-6, -(2.0**-6), 1, 1])
    n = len(vector)
    weight, x, grad = randn(n, k, dtype=dtype), randn(33, k, dtype=dtype), randn(33, n, dtype=dtype)
    a, b = randn(3, k, dtype=dtype, scale=0.1), randn(n, 3, dtype=dtype, scale=0.1)
    product = x.double() @ weight.double().t()

    norm = reference.dora_weight_norm(weight.double(), a.double(), b.double())
    magnitude = (vector * norm.float()).requires_grad_()
    on = [tensor.to(device) for tensor in (x, weight, a, b)]
    ops.dora_linear(*on, magnitude.to(device), save_output=save_output).backward(grad.to(device))
    wanted = ((product + x.double() @ a.double().t() @ b.double().t()) / norm * grad.double()).sum(0)
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(magnitude.grad.double(), wanted, rtol=bound, atol=bound * wanted.abs().max().item())

    bias = randn(n, dtype=dtype)
    ia3_l = vector.clone().requires_grad_()
    ops.ia3_linear(*on[:2], ia3_l.to(device), bias.to(device), save_output=save_output).backward(grad.to(device))
    wanted = ((product + bias.double()) * grad.double()).sum(0)
    torch.testing.assert_close(ia3_l.grad.double(), wanted, rtol=bound, atol=bound * wanted.abs().max().item())


def test_the_norm_is_that_of_the_weights_now(device: torch.device) -> None:
    weight, _, (x, a, b, magnitude) = dora_leaves(device)
    ops.dora_linear(x, weight, a, b, magnitude)
    weight.mul_(2)
    weight[2] = 1.0
    b.data.mul_(3)  # a change through .data does not change b._version
    g = magnitude / (weight + b @ a).norm(dim=1)
    torch.testing.assert_close(ops.dora_linear(x, weight, a, b, magnitude), g * (x @ (weight + b @ a).t()))


def test_peft_and_lora_dropout_are_one_without_dropout_and_differ_with_it(device: torch.device) -> None:
    weight, bias, (x, a, b, magnitude) = dora_leaves(device)
    for kwargs in ({}, {"dropout_p": 0.5}, {"training": True}):
        y = ops.dora_linear(x, weight, a, b, magnitude, bias, **kwargs)
        assert torch.equal(ops.dora_linear(x, weight, a, b, magnitude, bias, dropout_mode="peft", **kwargs), y)
    kwargs = {"dropout_p": 0.5, "training": True, "seed": SEED.to(device)}
    y = ops.dora_linear(x, weight, a, b, magnitude, **kwargs)
    assert not torch.allclose(ops.dora_linear(x, weight, a, b, magnitude, dropout_mode="peft", **kwargs), y)


@pytest.mark.parametrize("dropout_p", [2**-16, 0.02, 0.25, 0.26, 0.9])
@pytest.mark.parametrize(
    "tokens, k, n",
    [(33, 1, 1), (40, 31, 70), (150, 200, 33), (65, 64, 130), (128, 577, 16), (130, 50, 1100), (16, 31, 70),
     (17, 65, 130), (23, 1032, 1024), (24, 1032, 1024)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peft_dropout_of_any_share_is_the_formula(
    dtype: torch.dtype, dropout_p: float, tokens: int, k: int, n: int, device: torch.device, pytestconfig: pytest.Config
) -> None:
    """Below some dropout probability, the second product of the base may use the dropped elements alone."""
    x, grad, weight, bias = (
        randn(*shape, dtype=dtype).to(device) for shape in ((tokens, k), (tokens, n), (n, k), (n,))
    )
    a, b = randn(5, k, dtype=torch.float32).to(device), randn(n, 5, dtype=torch.float32).to(device)
    magnitude = (weight.float().norm(dim=1) * (1.0 + 0.5 * randn(n, dtype=torch.float32).to(device))).detach()
    kwargs = {"scaling": 0.5, "dropout_p": dropout_p, "training": True, "dropout_mode": "peft", "seed": SEED.to(device)}
    found = []
    for function, wide in ((ops.dora_linear, None), (reference.dora_linear, torch.float64)):
        leaves = [(t if wide is None else t.to(wide)).clone().requires_grad_() for t in (x, a, b, magnitude)]
        held, held_bias = (t if wide is None else t.to(wide) for t in (weight, bias))
        y = function(leaves[0], held, *leaves[1:], held_bias, **kwargs)
        found.append((y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))))
    bound = 2**-17 if dtype == torch.float32 else 2**-7
    for name, ours, exact in zip(("y", "x", "A", "B", "magnitude"), *found, strict=True):
        assert (ours.double() - exact).norm() <= bound * exact.norm(), name
        assert (ours.double() - exact).abs().max() <= 2 * bound * exact.abs().max(), name
    # On the CPU paths of x86-64 only y is rounded, and no value before y, except where PyTorch multiplies in 16 bits.
    ours = pytestconfig.getoption("--device") == "cpu" and "neon" not in _native.STATE.isa
    if ours and tokens >= 128 and dropout_p <= 0.25:
        (y, *_), (exact, *_) = found
        rounding = (exact.to(dtype).double() - exact).norm()
        assert (y.double() - exact).norm() <= 1.1 * rounding + 2**-20 * exact.norm()


@pytest.mark.parametrize("norm_grad", [False, True])
def test_a_known_norm_is_taken_as_it_is(norm_grad: bool, device: torch.device) -> None:
    weight, bias, leaves = dora_leaves(device)
    x, a, b, magnitude = leaves
    norm = ops.dora_weight_norm(weight, a, b, 0.5)
    grad = randn(5, 6, dtype=torch.float32).to(device)
    kwargs = {"scaling": 0.5, "norm_grad": norm_grad}
    computed, given = (
        ops.dora_linear(x, weight, a, b, magnitude, bias, weight_norm=known, **kwargs) for known in (None, norm)
    )
    assert torch.equal(given, computed)
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, grad) for y in (given, computed)), strict=True):
        assert torch.equal(ours, theirs)
    halved = ops.dora_linear(x, weight, a, b, magnitude, weight_norm=2 * norm, **kwargs)
    torch.testing.assert_close(2 * halved, ops.dora_linear(x, weight, a, b, magnitude, **kwargs))


def test_autocast_leaves_float64_alone(device: torch.device) -> None:
    """As in PyTorch's autocast, a float64 operand stays float64, and a mix of float64 and float32 is an error."""
    sizes = ((8, 64), (32, 64), (4, 64), (32, 4), (8, 32))
    x, weight, a, b, rows = (torch.randn(*size, dtype=torch.float64, device=device) for size in sizes)
    heads = torch.randn(1, 2, 8, 16, dtype=torch.float64, device=device)
    calls = (
        lambda: ops.lora_linear(x, weight, a, b), lambda: ops.gated_lora_linear(x, x, "silu", weight, a, b),
        lambda: ops.lora_residual(x, rows, a, b), lambda: ops.lora_linears(x, [weight], [a], [b])[0],
        lambda: ops.frozen_linear(x, weight), lambda: ops.bottleneck_adapter(x, a, None, a.mT.contiguous(), None),
        lambda: ops.scaled_dot_product_attention(heads, heads, heads),
    )  # fmt: skip
    for call in calls:
        wanted = call()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = call()
        assert found.dtype is torch.float64 and torch.equal(found, wanted)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for mixed in (lambda: ops.frozen_linear(x, weight.float()), lambda: ops.frozen_linear(x.float(), weight),
                      lambda: ops.lora_residual(x.float(), rows, a, b)):  # fmt: skip
            with pytest.raises(TypeError, match="is float64, x is bfloat16|is float32, x is float64"):
                mixed()


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_autocast_of_dora_and_ia3(base: str, device: torch.device) -> None:
    weight, bias, (x, a, b, magnitude) = dora_leaves(device)
    held = weight if base == "dense" else reference.nf4_quantize(weight)
    low = weight.bfloat16() if base == "dense" else held
    with torch.autocast(device.type, dtype=torch.bfloat16):
        dora = ops.dora_linear(x, held, a, b, magnitude, bias)
        ia3 = ops.ia3_linear(x, held, magnitude, bias)
    low_x, low_bias = x.bfloat16(), bias.bfloat16()
    assert dora.dtype == ia3.dtype == torch.bfloat16
    assert torch.equal(dora, ops.dora_linear(low_x, low, a, b, magnitude, low_bias))
    assert torch.equal(ia3, ops.ia3_linear(low_x, low, magnitude, low_bias))
    (dora.float() + ia3.float()).sum().backward()
    assert x.grad.dtype == a.grad.dtype == magnitude.grad.dtype == torch.float32


def test_rank_scale_of_ones_is_none_and_of_zeros_the_base(device: torch.device) -> None:
    x, w, a, b = (torch.randn(*s).to(device) for s in ((8, 64), (32, 64), (4, 64), (32, 4)))
    plain = ops.lora_linear(x, w, a, b, scaling=0.5)
    assert torch.equal(ops.lora_linear(x, w, a, b, rank_scale=torch.ones(4, device=device), scaling=0.5), plain)
    zero = torch.zeros(4, device=device, requires_grad=True)
    y = ops.lora_linear(x, w, a, b, rank_scale=zero, scaling=0.5)
    torch.testing.assert_close(y, x @ w.t())
    (grad,) = torch.autograd.grad(y.sum(), zero)
    # The gradient is a float32 sum of 16,384 products in no fixed order, so its error is several ulp.
    wanted = 0.5 * (x.double() @ a.double().t()).sum(0) * b.double().sum(0)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["nf4", "nested"])
@pytest.mark.parametrize(
    ("n", "k", "r", "blocksize"),
    [(96, 64, 16, 64), (33, 65, 5, 32), (1, 1, 1, 64), (70, 515, 33, 256), (0, 32, 4, 64), (700, 256, 8, 64),
     (5, 4096, 2, 4096)],
)  # fmt: skip
@pytest.mark.parametrize("scaled", [False, True])
def test_merge_is_the_references_but_where_a_sum_falls_on_a_threshold(
    base: str, n: int, k: int, r: int, blocksize: int, scaled: bool, device: torch.device
) -> None:
    nf4 = reference.nf4_quantize(randn(n, k, dtype=torch.bfloat16, scale=0.05), blocksize, base == "nested")
    a, b = randn(r, k, dtype=torch.bfloat16, scale=0.1), randn(n, r, dtype=torch.float32, scale=0.1)
    g = 1 + randn(n, dtype=torch.float64, scale=0.2) if scaled else None
    moved = [None if value is None else value.to(device) for value in (nf4, a, b, g)]
    merged, error = ops.nf4_merge(*moved[:3], scaling=0.75, row_scale=moved[3])
    assert (merged.shape, merged.dtype, merged.blocksize) == (nf4.shape, nf4.dtype, blocksize)
    assert (merged.nested is None) == (nf4.nested is None) and error.dtype is torch.float64 and error.shape == ()
    dense = nf4.dequantize(torch.float64) + 0.75 * b.double() @ a.double()
    dense = dense if g is None else g[:, None] * dense
    wanted = reference.nf4_quantize(dense.float(), blocksize)
    got = NF4Weight(merged.packed, merged.absmax, nf4.shape, nf4.dtype, blocksize, merged.nested).to(
        torch.device("cpu")
    )
    if n == 0:
        assert error == 0
        return
    codes = [torch.stack((w.packed >> 4, w.packed & 15)).int() for w in (got, wanted)]
    assert (codes[0] - codes[1]).abs().max() <= 1
    assert (codes[0] != codes[1]).sum() <= max(1, n * k // 1000)
    distance = ((wanted.dequantize(torch.float64) - dense).norm() / dense.norm()).item()
    assert error.item() == pytest.approx(distance, rel=1e-2, abs=1e-6)
    back = got.dequantize(torch.float64)
    assert ((back - dense).norm() / dense.norm()).item() == pytest.approx(distance, rel=5e-2, abs=1e-3)


def test_merge_says_what_is_wrong_and_what_is_not_finite(device: torch.device) -> None:
    nf4 = reference.nf4_quantize(randn(8, 64, dtype=torch.float32)).to(device)
    a, b = (torch.ones(s, device=device) for s in ((2, 64), (8, 2)))
    for wrong, kind, message in (
        ({"nf4": a}, TypeError, "nf4_merge: nf4 is Tensor, wanted an NF4Weight"),
        ({"lora_A": a[:, :3]}, ValueError, r"nf4_merge: lora_A has shape \(2, 3\), wanted \[R, 64\]"),
        ({"lora_B": b[:, :1]}, ValueError, "nf4_merge: lora_B has rank 1, lora_A has rank 2"),
        ({"scaling": float("inf")}, ValueError, "nf4_merge: scaling is inf, wanted a finite number"),
        ({"row_scale": b}, ValueError, r"nf4_merge: row_scale has shape \(8, 2\), wanted \(8,\)"),
    ):
        with pytest.raises(kind, match=message):
            ops.nf4_merge(**{"nf4": nf4, "lora_A": a, "lora_B": b, **wrong})
    assert not ops.nf4_merge(nf4, a * float("nan"), b)[1].isfinite()
    zero = reference.nf4_quantize(torch.zeros(8, 64)).to(device)
    assert ops.nf4_merge(zero, a, b * 0)[1] == 0


# (samples, tokens of a sample, K, N, ranks, each sample's adapter): samples that end within a strip of 16 tokens, tails
# of all widths, an adapter without samples, no adapters, one sample, and more samples than one launch on a GPU takes.
_GROUPS: tuple[tuple[int, int, int, int, tuple[int, ...], tuple[int, ...]], ...] = (
    (5, 7, 33, 65, (1, 64, 16, 31), (3, 0, 1, -1, 3)),
    (3, 16, 64, 32, (8, 17), (1, 1, 0)),
    (1, 1, 1, 1, (1, 2), (1,)),
    (1, 37, 100, 48, (15,), (0,)),
    (4, 9, 130, 31, (33, 2), (-1, -1, -1, -1)),
    (8, 1, 515, 33, (3, 63, 4), (2, 0, 2, -1, 0, 0, 2, 2)),
    (600, 1, 36, 34, (5, 1, 18), tuple(i % 7 % 4 - 1 for i in range(600))),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("groups", _GROUPS, ids=lambda groups: f"{groups[0]}x{groups[1]}")
def test_groups_of_any_sizes(groups: tuple, dtype: torch.dtype, device: torch.device) -> None:
    """Compares values, gradients and S; adapters have three dtypes, and every second adapter is not contiguous."""
    samples, length, k, n, ranks, adapters = groups
    x, weight = randn(samples, length, k, dtype=dtype), randn(n, k, dtype=dtype, scale=k**-0.5)
    held = {"x": x}
    for group, rank in enumerate(ranks):
        kind = (torch.float32, torch.bfloat16, torch.float16)[group % 3]
        a, b = randn(rank, k, dtype=kind, scale=k**-0.5), randn(n, rank, dtype=kind)
        held |= {f"A{group}": a, f"B{group}": b}
    scaling = [0.75, -2.0, 1.0, 0.5][: len(ranks)]
    grad = randn(samples, length, n, dtype=dtype)

    def call(**inputs: Tensor) -> Tensor:
        lora = [[inputs[f"{side}{group}"] for group in range(len(ranks))] for side in "AB"]
        return ops.grouped_lora_linear(inputs["x"], weight.to(device), *lora, adapters, scaling=scaling)

    def plain(**inputs: Tensor) -> Tensor:
        y = torch.nn.functional.linear(inputs["x"], weight.to(inputs["x"].dtype))
        for group in range(len(ranks)):
            a, b = (inputs[f"{side}{group}"].to(y.dtype) for side in "AB")
            index = torch.tensor([i for i, adapter in enumerate(adapters) if adapter == group], dtype=torch.int64)
            y = y.index_add(0, index, scaling[group] * (inputs["x"][index] @ a.t()) @ b.t())
        return y

    sample = Sample(held, tuple(held))
    odd = {name: strided(v) if name[1:] in ("1", "3") and min(v.shape) > 1 else v for name, v in held.items()}
    moved = Sample({name: value.to(device) for name, value in odd.items()}, tuple(held))
    assert_close(run(call, moved, grad), run(plain, sample, grad), run(plain, to_wide(sample), grad), max(k, n))

    # In a token's row of S, columns beyond the rank of the token's adapter are zeros; without an adapter all are zeros.
    lora = [[moved.inputs[f"{side}{group}"] for group in range(len(ranks))] for side in "AB"]
    args = (*ops.checks.weight_args(weight.to(device)), None, *lora, scaling, list(adapters))
    s = torch.ops.peft_ext.grouped_lora_linear(moved.inputs["x"], *args)[1].cpu()
    wide = [[matrix.cpu().double() for matrix in side] for side in lora]
    wanted = reference.grouped_lora.grouped_lora_linear_forward(x.double(), weight.double(), None, *wide, *args[-2:])[1]
    assert s.shape == wanted.shape == (samples * length, max(ranks)) and s.dtype is torch.float32
    assert torch.equal(s == 0, wanted == 0)
    assert (s - wanted).abs().max() <= k**0.5 * torch.finfo(torch.float32).eps * max(1.0, wanted.abs().max().item())


def test_an_adapter_under_two_indices_sums_its_gradients(device: torch.device) -> None:
    x, weight, a, b = (randn(*s, dtype=torch.float32).to(device) for s in ((4, 3, 64), (96, 64), (8, 64), (96, 8)))
    found = []
    for groups, adapters, scaling in (([0, 0], [0, 1, -1, 0], [0.5, 0.5]), ([0], [0, 0, -1, 0], [0.5])):
        leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
        lists = ([leaf for _ in groups] for leaf in leaves)
        y = ops.grouped_lora_linear(x, weight, *lists, adapters, scaling=scaling)
        y.square().sum().backward()
        found.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for twice, once in zip(*found, strict=True):
        torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-6 * once.abs().max().item())


def test_the_residual_alone_takes_the_gradient_as_it_comes(device: torch.device) -> None:
    x, residual, a, b = (randn(*s, dtype=torch.bfloat16).to(device) for s in ((5, 64), (5, 96), (8, 64), (96, 8)))
    residual.requires_grad_()
    y = ops.lora_residual(x, residual, a, b)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.equal(residual.grad, grad)
    assert y.data_ptr() != residual.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("length", [1, 8, 40])
def test_an_adapter_that_is_not_finite_stays_with_its_samples(
    length: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, a = (randn(*s, dtype=dtype).to(device) for s in ((4, length, 64), (96, 64), (8, 64)))
    b = [randn(96, 8, dtype=dtype).to(device) for _ in range(2)]
    b[1][3, 2], b[1][7, 1] = float("nan"), float("inf")
    y = ops.grouped_lora_linear(x, weight, [a, a], b, [0, 1, -1, 0])
    assert [bool(sample.isfinite().all()) for sample in y.cpu()] == [True, False, True, True]


def test_an_adapter_that_no_sample_has_may_hold_anything(device: torch.device) -> None:
    x, weight, a = (randn(*s, dtype=torch.float32).to(device) for s in ((3, 5, 64), (96, 64), (8, 64)))
    b = [randn(96, 8, dtype=torch.float32).to(device), torch.full((96, 8), float("nan")).to(device)]
    assert ops.grouped_lora_linear(x, weight, [a, a], b, [0, -1, 0]).isfinite().all()
    assert ops.grouped_lora_linear(x, weight, [a, a], b, [-1, -1, -1]).isfinite().all()


class Seen(TorchDispatchMode):
    """Records the operators that reach the dispatcher, where profilers and selective checkpointing see operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", (True, False), ids=("grad", "no_grad"))
def test_the_way_past_autograd_is_seen_by_dispatch_modes(grad: bool, device: torch.device) -> None:
    x, weight = torch.randn(3, 64, device=device), torch.randn(32, 64, device=device)
    lora_A, lora_B = torch.randn(4, 64, device=device), torch.randn(32, 4, device=device)
    with torch.set_grad_enabled(grad), Seen() as seen:
        y = ops.lora_linear(x, weight, lora_A.requires_grad_(), lora_B)
    assert y.requires_grad == grad and "peft_ext::lora_linear" in seen.names


def test_a_torch_without_that_guard_takes_the_longer_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_AutoDispatchBelowAutograd")
    longer = library.below_autograd(torch.ops.peft_ext.nf4_linear.default)
    x, weight = torch.randn(3, 64), torch.randn(32, 64)
    with torch.inference_mode():  # with autograd, torch.library itself would need the class that this test removes
        y = longer(x, weight, None, None, None, None, 0, [32, 64], None)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight))
