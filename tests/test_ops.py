"""The battery: every operator of ``op_db.CASES`` against the float64 oracle, values and gradients.

Tolerance: a kernel's error is at most 1.5 times that of plain PyTorch in the same dtype, plus the rounding of the
result itself; in float32 a few ulp of the sum's length.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_db import CASES, DTYPES, SEED, SHAPES, Case, Sample, randn, wide
from torch import Tensor

import peft_ext
from peft_ext import NF4Weight, _native, ops, reference
from peft_ext.ops import _library

LINEAR = [case for case in CASES if not case.exact]
ids = lambda case: case.name  # noqa: E731


def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(function: Any, sample: Sample, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Value, and gradients for a given output gradient, of ``function`` on detached copies of the inputs."""
    inputs = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in sample.inputs.items()}
    for name in sample.grads:
        inputs[name].requires_grad_()
    y = function(**inputs)
    found = {"y": y.detach()}
    if grad is not None and sample.grads:
        y.backward(grad.to(y.dtype))
        for name in sample.grads:
            assert inputs[name].grad is not None, f"no gradient reached {name}"
            assert inputs[name].grad.dtype == inputs[name].dtype
            found[name] = inputs[name].grad
    return found


def to_wide(sample: Sample) -> Sample:
    return Sample({k: wide(v) for k, v in sample.inputs.items()}, sample.grads)


def assert_close(got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], terms: int) -> None:
    """Each part within 1.5x plain PyTorch's error of the oracle, in the norm and at the worst element."""
    for name, value in got.items():
        want = exact[name]
        assert value.shape == want.shape, name
        if value.numel() == 0:
            continue
        ulp = torch.finfo(value.dtype).eps
        error, yardstick = (value.double() - want).abs(), (plain[name].double() - want).abs()
        # What rounding the exact result once costs, and a few ulp of float32 for the order of the sum.
        floor = ulp * want.abs() / 2 + terms**0.5 * torch.finfo(torch.float32).eps * want.abs().max()
        assert error.norm() <= 1.5 * yardstick.norm() + floor.norm(), (name, error.norm(), yardstick.norm())
        assert error.max() <= 1.5 * yardstick.max() + 2 * floor.max(), (name, error.max(), yardstick.max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_values_and_gradients(case: Case, dtype: torch.dtype, shape: tuple) -> None:
    sample = case.make(dtype, shape)
    if case.exact:
        got, want = run(case.call, sample)["y"], run(case.oracle, sample)["y"]
        assert got.dtype == want.dtype and got.shape == want.shape
        assert torch.equal(got, want)
        return
    y = run(case.call, sample)["y"]
    assert y.dtype == dtype and y.shape == (*shape[0], shape[2])
    grad = randn(*y.shape, dtype=dtype)
    exact = run(case.oracle, to_wide(sample), grad)
    assert_close(run(case.call, sample, grad), run(case.plain, sample, grad), exact, max(shape[1], shape[2]))


@pytest.mark.parametrize("case", LINEAR, ids=ids)
def test_noncontiguous_inputs_and_gradient(case: Case) -> None:
    sample = case.make(torch.float32, ((6, 5), 64, 96, 16))
    dense = run(case.call, sample, grad := randn(6, 5, 96, dtype=torch.float32))
    inputs = dict(sample.inputs)
    inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    for name in ("lora_A", "lora_B"):
        if name in inputs:
            inputs[name] = inputs[name].t().contiguous().t()
    if isinstance(inputs.get("weight"), Tensor):
        inputs["weight"] = inputs["weight"].t().contiguous().t()
    assert not inputs["x"].is_contiguous()
    for name in sample.grads:
        inputs[name] = inputs[name].detach().requires_grad_()
    y = case.call(**inputs)
    y.backward(grad.transpose(0, 1).contiguous().transpose(0, 1))
    torch.testing.assert_close(y, dense["y"], rtol=1e-6, atol=1e-6)
    for name in sample.grads:
        torch.testing.assert_close(inputs[name].grad, dense[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", LINEAR, ids=ids)
def test_gradients_only_where_asked(case: Case) -> None:
    sample = case.make(torch.float32, SHAPES[0])
    everything = run(case.call, sample, grad := randn(*SHAPES[0][0], 96, dtype=torch.float32))
    for name in sample.grads:
        alone = run(case.call, Sample(sample.inputs, (name,)), grad)
        assert torch.equal(alone[name], everything[name])


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_same_bits_for_one_and_two_threads(case: Case, two_threads: None) -> None:
    sample = case.make(torch.bfloat16, ((2, 333), 515, 261, 24))
    grad = randn(2, 333, 261, dtype=torch.bfloat16) if not case.exact else None
    both = run(case.call, sample, grad)
    torch.set_num_threads(1)
    one = run(case.call, sample, grad)
    # The base product is PyTorch's: its own sums are compared only where it keeps its word.
    for name in both:
        if name in ("y", "x") and not case.exact:
            continue
        assert torch.equal(both[name], one[name]), name
    if case.exact:
        assert torch.equal(both["y"], one["y"])


@pytest.mark.skipif(_native.STATE.isa == "scalar", reason="the scalar path leaves few tokens to PyTorch's product")
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_few_tokens_have_the_same_bits_for_one_and_two_threads(dtype: torch.dtype, two_threads: None) -> None:
    nf4 = reference.nf4_quantize(randn(515, 1088, dtype=dtype), double_quant=True)
    x = randn(7, 1088, dtype=dtype)
    both = ops.nf4_linear(x, nf4)
    torch.set_num_threads(1)
    assert torch.equal(ops.nf4_linear(x, nf4), both)


@pytest.mark.parametrize("case", [case for case in LINEAR if case.op == "lora"], ids=ids)
def test_saved_for_backward_are_x_s_and_the_seed(case: Case) -> None:
    """Beside the inputs: S [T, R] in float32 and 16 bytes. No mask, no dropped x, no copy of x."""
    sample = case.make(torch.bfloat16, ((40,), 128, 96, 8))
    inputs = {k: v.requires_grad_() if k in sample.grads else v for k, v in sample.inputs.items()}
    held = {t.data_ptr() for t in inputs.values() if isinstance(t, Tensor)}
    if isinstance(inputs["weight"], NF4Weight):
        held |= {t.data_ptr() for t in inputs["weight"].tensors().values()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.call(**inputs)
    new = {t.data_ptr(): t.numel() * t.element_size() for t in saved if t.data_ptr() not in held}
    assert sum(new.values()) == 40 * 8 * 4 + (2 * 8 if "dropout" in case.name else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("case", LINEAR, ids=ids)
def test_gradcheck_of_the_oracle(case: Case, dtype: torch.dtype) -> None:
    """The oracle's gradients, against finite differences: what everything else is measured by."""
    sample = to_wide(case.make(dtype, ((3,), 5, 4, 2)))
    inputs = [sample.inputs[name].requires_grad_() for name in sample.grads]

    def function(*values: Tensor) -> Tensor:
        return case.oracle(**{**sample.inputs, **dict(zip(sample.grads, values, strict=True))})

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_reference_backward_is_the_gradient_of_its_forward(base: str) -> None:
    """The closed-form backward that the fallback and the kernels implement, in float64 against autograd."""
    weight = randn(4, 64, dtype=torch.float64)
    held = weight if base == "dense" else reference.nf4_quantize(weight)
    x, a, b = (randn(*s, dtype=torch.float64).requires_grad_() for s in ((6, 64), (3, 64), (4, 3)))
    y, s = reference.lora.lora_linear_forward(x, held, None, a, b, 0.5, 0.25, SEED)
    grad = torch.randn_like(y)
    wanted = torch.autograd.grad(y, (x, a, b), grad)
    got = reference.lora_linear_backward(grad, x.detach(), held, a.detach(), b.detach(), s.detach(), 0.5, 0.25, SEED)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def flat_args(case: Case, sample: Sample) -> tuple[str, tuple]:
    """The private operator behind a case and its arguments."""
    i = sample.inputs
    if case.name.startswith("nf4_linear"):
        return "nf4_linear", (i["x"], *i["nf4"].op_args(), i["bias"])
    weight = i["weight"].op_args() if isinstance(i["weight"], NF4Weight) else ops._checks.weight_args(i["weight"])
    return "lora_linear", (i["x"], *weight, i["bias"], i["lora_A"], i["lora_B"], 0.75, 0.1, SEED)


@pytest.mark.parametrize("case", LINEAR, ids=ids)
def test_opcheck(case: Case) -> None:
    sample = case.make(torch.float32, SHAPES[0])
    for name in sample.grads:
        sample.inputs[name].requires_grad_()
    name, args = flat_args(case, sample)
    torch.library.opcheck(getattr(torch.ops.peft_ext, name).default, args)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", LINEAR, ids=ids)
def test_compiles_without_a_graph_break(case: Case, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (9, 12):
        sample = case.make(torch.float32, ((tokens,), 64, 96, 16))
        grad = randn(tokens, 96, dtype=torch.float32)
        eager, traced = run(case.call, sample, grad), run(compiled, sample, grad)
        for name in eager:
            torch.testing.assert_close(traced[name], eager[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_error_messages(case: Case) -> None:
    for about, wrong, kind, message in case.errors:
        sample = case.make(torch.float32, SHAPES[0])
        with pytest.raises(kind, match=message):
            case.call(**{**sample.inputs, **wrong})
            pytest.fail(f"no error for {about}")


# --- what is not one call of one op ----------------------------------------------------------------------------------


def test_every_op_has_a_cpu_kernel() -> None:
    """A battery over the fallback would prove nothing."""
    assert _native.STATE.module is not None
    assert [name for name in _library.OPS if not _library.has_kernel(name, "CPU")] == []


def test_native_and_reference_agree_on_the_mask() -> None:
    """x of ones, A of the identity: S is the dropped x itself, kept elements scaled by 1/(1-p)."""
    for p in (0.05, 0.5, 0.999):
        for tokens, k in ((5, 33), (64, 512), (3, 1029)):
            x, a, b = torch.ones(tokens, k), torch.eye(k), torch.zeros(1, k)
            s = torch.ops.peft_ext.lora_linear(
                x, *ops._checks.weight_args(torch.zeros(1, k)), None, a, b, 1.0, p, SEED
            )[1]
            keep = reference.dropout_keep_mask(SEED, p, x.shape)
            assert torch.equal(s != 0, keep)
            assert torch.equal(s[keep], torch.full_like(s[keep], 1 / (1 - p)))


def test_philox_is_the_published_generator() -> None:
    """Known answers of Philox4x32-7 (Random123's kat_vectors: zeros, ones, digits of pi)."""
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


def test_dropout_rate_and_independence() -> None:
    keep = reference.dropout_keep_mask(SEED, 0.3, torch.Size((1000, 1000))).double()
    assert abs(keep.mean() - 0.7) < 5 * (0.3 * 0.7 / 1e6) ** 0.5
    lag = ((keep.view(-1)[1:] - 0.7) * (keep.view(-1)[:-1] - 0.7)).mean() / (0.3 * 0.7)
    assert abs(lag) < 5e-3
    other = reference.dropout_keep_mask(SEED + 1, 0.3, torch.Size((1000, 1000))).double()
    assert abs(((keep - 0.7) * (other - 0.7)).mean() / 0.21) < 5e-3


def test_manual_seed_repeats_the_mask_and_eval_has_none() -> None:
    x, w, a, b = (torch.randn(*s) for s in ((8, 64), (32, 64), (4, 64), (32, 4)))
    torch.manual_seed(3)
    first = ops.lora_linear(x, w, a, b, dropout_p=0.5, training=True)
    second = ops.lora_linear(x, w, a, b, dropout_p=0.5, training=True)
    torch.manual_seed(3)
    assert torch.equal(ops.lora_linear(x, w, a, b, dropout_p=0.5, training=True), first)
    assert not torch.equal(first, second)
    plain = ops.lora_linear(x, w, a, b)
    assert torch.equal(ops.lora_linear(x, w, a, b, dropout_p=0.5, training=False), plain)


@pytest.mark.parametrize("case", LINEAR, ids=ids)
def test_the_gradient_of_a_gradient_is_refused(case: Case) -> None:
    sample = case.make(torch.float32, SHAPES[0])
    sample.inputs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"the gradient of a gradient \(create_graph=True\) is not supported"):
        torch.autograd.grad(case.call(**sample.inputs).sum(), sample.inputs["x"], create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_mask(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(8, 64, requires_grad=True)
    w, a, b = torch.randn(32, 64), torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return ops.lora_linear(x, w, a, b, dropout_p=0.5, training=True).tanh()

    torch.manual_seed(1)
    plain = torch.autograd.grad(layer(x).sum(), (x, a, b))
    torch.manual_seed(1)
    leaves = (x, a, b)
    for leaf in leaves:
        leaf.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    for leaf, wanted in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_autocast_computes_in_its_dtype(base: str) -> None:
    x = torch.randn(8, 64, requires_grad=True)
    weight = torch.randn(32, 64)
    held = weight if base == "dense" else reference.nf4_quantize(weight)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.lora_linear(x, held, a, b, torch.zeros(32))
    assert y.dtype == torch.bfloat16
    low = weight.bfloat16() if base == "dense" else held
    assert torch.equal(y, ops.lora_linear(x.bfloat16(), low, a, b, torch.zeros(32, dtype=torch.bfloat16)))
    y.float().sum().backward()
    assert x.grad.dtype == a.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_nan_and_infinite_weights_quantize_as_the_reference(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 64).to(dtype)
    weight[1, 5], weight[3, 7], weight[5, 0] = float("nan"), float("inf"), -float("inf")
    weight[7] = 1e-30 if dtype is not torch.float16 else 6e-8
    got, want = ops.nf4_quantize(weight), reference.nf4_quantize(weight)
    assert torch.equal(got.packed, want.packed)
    assert torch.equal(got.absmax.isnan(), want.absmax.isnan())
    assert torch.equal(got.absmax.nan_to_num(), want.absmax.nan_to_num())
    got, want = got.dequantize(dtype), reference.nf4_dequantize(want, dtype)
    assert torch.equal(got.nan_to_num(nan=123.0), want.nan_to_num(nan=123.0))


def test_float64_runs_and_bad_nf4_weights_are_refused() -> None:
    nf4 = ops.nf4_quantize(torch.randn(8, 64))
    assert nf4.dequantize(torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="NF4Weight: packed is torch.uint8 with 256 elements, wanted torch.uint8 with"):
        NF4Weight(nf4.packed, nf4.absmax, torch.Size((8, 65)), torch.float32)
    with pytest.raises(ValueError, match="NF4Weight: absmax is torch.float32 with 8 elements, wanted torch.uint8"):
        NF4Weight(nf4.packed, nf4.absmax, nf4.shape, torch.float32, 64, peft_ext.NestedAbsmax(*[torch.zeros(1)] * 3))
    with pytest.raises(ValueError, match="nf4_quantize: blocksize is 48, wanted one of"):
        ops.nf4_quantize(torch.zeros(4, 4), 48)
    with pytest.raises(RuntimeError, match="nf4_linear: weight is Byte with 1 elements, wanted Byte with 256"):
        torch.ops.peft_ext.nf4_linear(
            torch.zeros(2, 64), torch.zeros(1, dtype=torch.uint8), nf4.absmax, None, None, None, 64, [8, 64], None
        )
