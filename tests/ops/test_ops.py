"""The battery: compares values and gradients of every case in ``op_db.CASES`` with the float64 oracle.

``test_op_edges.py`` has the tests that need more than one call of an operator.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from battery import assert_close, output_grad, run, to_wide
from op_db import CASES, DTYPES, SAVED_OUTPUT, SEED, SHAPES, Case, Sample, randn
from op_params import LINEAR, SAVES, TILES, ids, names, strided
from torch import Tensor

from peft_ext import NF4Weight, _native, ops, reference
from peft_ext.ops import library
from peft_ext.ops.proof_inputs import ProofInputs
from peft_ext.weights import PackedWeight


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(("case", "shape"), [(case, shape) for case in CASES for shape in case.shapes],
                         ids=lambda value: value.name if isinstance(value, Case) else str(value))  # fmt: skip
def test_values_and_gradients(case: Case, dtype: torch.dtype, shape: tuple, device: torch.device) -> None:
    sample = case.make(dtype, shape)
    moved = sample.to(device)
    if case.exact:
        got, want = run(case.call, moved)["y"], run(case.oracle, moved)["y"]
        assert got.dtype == want.dtype and got.shape == want.shape
        assert torch.equal(got, want)
        return
    y = run(case.call, moved)["y"]
    assert (y.dtype, tuple(y.shape)) == case.result(dtype, shape)
    grad = output_grad(case, dtype, shape)
    exact = run(case.oracle, to_wide(sample), grad)
    found, plain = run(case.call, moved, grad), run(case.plain, sample, grad)
    assert_close(found, plain, exact, max(shape[1], shape[2]), case.from_product, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("case", LINEAR, ids=ids)
def test_noncontiguous_inputs_and_gradient(case: Case, device: torch.device) -> None:
    shape = case.fit(((6, 5), 64, 96, 16))
    sample = case.make(torch.float32, shape).to(device)
    dense = run(case.call, sample, grad := output_grad(case, torch.float32, shape))
    inputs = {k: strided(v) if isinstance(v, Tensor) else v for k, v in sample.inputs.items()}
    for name in sample.grads:
        inputs[name] = inputs[name].detach().requires_grad_()
    y = case.call(**inputs)
    if sample.grads:
        y.backward(strided(grad.to(device)))
    torch.testing.assert_close(y.cpu(), dense["y"], rtol=1e-6, atol=1e-6)
    for name in sample.grads:
        torch.testing.assert_close(inputs[name].grad.cpu(), dense[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", LINEAR, ids=ids)
def test_gradients_only_where_asked(case: Case, device: torch.device) -> None:
    shape = case.fit(SHAPES[0])
    sample = case.make(torch.float32, shape).to(device)
    everything = run(case.call, sample, grad := output_grad(case, torch.float32, shape))
    for name in sample.grads:
        alone = run(case.call, Sample(sample.inputs, (name,)), grad)
        assert torch.equal(alone[name], everything[name])


@pytest.mark.slow
@pytest.mark.cpu_only("it is about CPU threads")
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_same_bits_for_one_and_two_threads(case: Case, two_threads: None) -> None:
    shape = case.fit(((2, 333), 515, 261, 24))
    sample = case.make(torch.bfloat16, shape)
    grad = output_grad(case, torch.bfloat16, shape) if not case.exact else None
    both = run(case.call, sample, grad)
    torch.set_num_threads(1)
    one = run(case.call, sample, grad)
    # Without tiles PyTorch computes the base product; the bits of this product and of results from it may depend on the
    # number of threads.
    hers = () if case.exact or TILES else ("y", "x", *case.from_product)
    for name in both:
        if name not in hers:
            assert torch.equal(both[name], one[name]), name


@pytest.mark.cpu_only("it is about CPU threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_few_tokens_over_a_dense_weight_have_the_same_bits(dtype: torch.dtype, two_threads: None) -> None:
    x, weight, a, b = (randn(*s, dtype=dtype) for s in ((7, 1091), (515, 1091), (5, 1091), (515, 5)))
    both = ops.lora_linear(x, weight, a, b)
    torch.set_num_threads(1)
    assert torch.equal(ops.lora_linear(x, weight, a, b), both)


@pytest.mark.cpu_only("it is about CPU threads")
@pytest.mark.skipif(_native.STATE.isa == "scalar", reason="the scalar path leaves few tokens to PyTorch's product")
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_few_tokens_have_the_same_bits_for_one_and_two_threads(dtype: torch.dtype, two_threads: None) -> None:
    nf4 = reference.nf4_quantize(randn(515, 1088, dtype=dtype), double_quant=True)
    x = randn(7, 1088, dtype=dtype)
    both = ops.nf4_linear(x, nf4)
    torch.set_num_threads(1)
    assert torch.equal(ops.nf4_linear(x, nf4), both)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(("blocksize", "nested"), [(64, True), (128, False), (512, True)])
def test_few_tokens_over_nf4_rows_that_begin_inside_a_block(
    blocksize: int, nested: bool, dtype: torch.dtype, device: torch.device
) -> None:
    n, k = 37, 320  # with blocks of 128 and 512 elements, most rows begin inside a block
    powers = torch.randint(-4, 4, (n, k // 64), generator=torch.Generator().manual_seed(0)).repeat_interleave(64, 1)
    weight = reference.nf4_quantize(randn(n, k, dtype=torch.float32) * torch.exp2(powers), blocksize, nested)
    exact = reference.nf4_dequantize(weight, torch.float32).double()
    for tokens in (1, 2, 3, 4, 5, 8, 13):
        x = randn(tokens, k, dtype=dtype)
        y = ops.nf4_linear(x.to(device), weight.to(device)).cpu().double()
        # Each weight is rounded to bfloat16 at most once, and y once.
        error = (y - x.double() @ exact.T).abs()
        assert (error <= 2**-7 * (x.double().abs() @ exact.abs().T)).all(), tokens


@pytest.mark.cpu_only("elsewhere the promise changes nothing")
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("case", SAVED_OUTPUT, ids=ids)
def test_gradients_from_the_saved_output(case: Case, dtype: torch.dtype) -> None:
    """With save_output the caller promises not to change the result in place, and the result is saved for backward."""
    for shape in case.shapes:
        sample, grad = case.make(dtype, shape), output_grad(case, dtype, shape)
        exact, plain = run(case.oracle, to_wide(sample), grad), run(case.plain, sample, grad)
        assert_close(run(case.call, sample, grad), plain, exact, max(shape[1], shape[2]), case.from_product)
    inputs = {k: v.requires_grad_() if k in sample.grads else v for k, v in sample.inputs.items()}
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = case.call(**inputs)
    assert y.data_ptr() in saved


@pytest.mark.parametrize("save_output", SAVES)
def test_the_output_may_be_changed_in_place(save_output: bool, device: torch.device) -> None:
    """Falcon adds to a layer's output in place. Where Y is saved, autograd raises an error for an in-place change."""
    x, weight, a, b = (randn(*s, dtype=torch.float32).to(device) for s in ((7, 64), (96, 64), (4, 64), (96, 4)))
    vector, grad = torch.rand(96).to(device).requires_grad_(), randn(7, 96, dtype=torch.float32).to(device)

    def dora() -> Tensor:
        return ops.dora_linear(x, weight, a, b, vector, save_output=save_output)

    def ia3() -> Tensor:
        return ops.ia3_linear(x, weight, vector, save_output=save_output)

    for call in (dora, ia3):
        (wanted,) = torch.autograd.grad(call(), vector, grad)
        y = call()
        y += 1.0
        if save_output:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(y, vector, grad)
        else:
            assert torch.equal(torch.autograd.grad(y, vector, grad)[0], wanted)


def saved_bytes(case: Case, sample: Sample) -> int:
    """Returns the bytes that a call keeps for the backward, without the call's inputs."""
    inputs = {k: v.requires_grad_() if k in sample.grads else v for k, v in sample.inputs.items()}
    held = {t.untyped_storage().data_ptr() for t in inputs.values() if isinstance(t, Tensor)}
    for weight in inputs.values():
        if isinstance(weight, PackedWeight):
            held |= {t.untyped_storage().data_ptr() for t in weight.tensors().values()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.call(**inputs)
    new = {t.data_ptr(): t.numel() * t.element_size()
           for t in saved if t.untyped_storage().data_ptr() not in held}  # fmt: skip
    return sum(new.values())


@pytest.mark.parametrize("case", [case for case in LINEAR if case.saved is not None], ids=ids)
def test_saved_for_backward(case: Case, device: torch.device) -> None:
    """Besides its inputs a call keeps only ``Case.saved`` bytes: no mask, no dropout(x), no copy of x or of a
    weight.
    """
    if case.op == "attention" and device.type == "cuda":
        pytest.skip("on a GPU it is PyTorch's own")
    t, k, n, r = 40, 256, 96, 8
    sample = case.make(torch.bfloat16, ((t,), k, n, r)).to(device)
    assert saved_bytes(case, sample) == case.saved(t, k, n, r)


def test_dora_with_a_frozen_magnitude_saves_no_product(device: torch.device) -> None:
    for case in (case for case in LINEAR if case.name.startswith("dora_linear") and "norm_grad" not in case.name):
        sample = case.make(torch.bfloat16, ((40,), 256, 96, 8)).to(device)
        seed = 2 * 8 if "dropout" in case.name else 0
        assert saved_bytes(case, Sample(sample.inputs, ("x", "lora_A", "lora_B"))) == 40 * 8 * 4 + seed + 96 * 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("case", LINEAR, ids=ids)
def test_gradcheck_of_the_oracle(case: Case, dtype: torch.dtype) -> None:
    """Compares the oracle's gradients, with which all other gradients are compared, with finite differences."""
    sample = to_wide(case.make(dtype, case.fit(((3,), 5, 4, 2))))
    if not sample.grads:
        pytest.skip("it has no gradient")
    inputs = [sample.inputs[name].requires_grad_() for name in sample.grads]

    def function(*values: Tensor) -> Tensor:
        return case.oracle(**{**sample.inputs, **held, **dict(zip(sample.grads, values, strict=True))})

    held = case.held(sample)
    assert torch.autograd.gradcheck(function, inputs)


# These tests compare, in float64, the closed-form backwards of the reference with autograd of the forwards.


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def frozen(base: str, *shape: int) -> Tensor | NF4Weight:
    weight = randn(*shape, dtype=torch.float64)
    return weight if base == "dense" else reference.nf4_quantize(weight)


def assert_gradients(y: Tensor, inputs: list[Tensor], backward: Any) -> None:
    grad = torch.randn_like(y)
    wanted = torch.autograd.grad(y, inputs, grad)
    with torch.no_grad():
        for ours, theirs in zip(backward(grad), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


BASE = pytest.mark.parametrize("base", ["dense", "nf4"])


@BASE
@pytest.mark.parametrize("ranked", [False, True], ids=["plain", "rank_scale"])
def test_reference_lora_backward_is_the_gradient_of_its_forward(base: str, ranked: bool) -> None:
    weight = frozen(base, 4, 64)
    inputs = leaves((6, 64), (3, 64), (4, 3), *([(3,)] if ranked else []))
    x, a, b, *rho = inputs
    rank_scale = rho[0] if ranked else None
    y, s = reference.lora.lora_linear_forward(x, weight, None, a, b, rank_scale, 0.5, 0.25, SEED)

    def backward(grad: Tensor) -> tuple:
        found = reference.lora_linear_backward(grad, x, weight, a, b, rank_scale, s, 0.5, 0.25, SEED)
        return found if ranked else found[:3]

    assert_gradients(y, inputs, backward)


@BASE
@pytest.mark.parametrize("drop_base", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_reference_dora_backward_is_the_gradient_of_its_forward(base: str, drop_base: bool, with_bias: bool) -> None:
    weight, bias = frozen(base, 4, 64), randn(4, dtype=torch.float64) if with_bias else None
    x, a, b, g = inputs = leaves((6, 64), (3, 64), (4, 3), (4,))
    with torch.no_grad():
        g[1], g[2] = 0.0, 1e-3  # with g = 0, Y does not determine Z
    for scaled in (False,) if drop_base or with_bias else (False, True):
        y, s, z = reference.dora.dora_linear_forward(x, weight, bias, a, b, g, 0.5, 0.25, SEED, drop_base)
        held = y if scaled else z

        def backward(grad: Tensor, s: Tensor = s, held: Tensor = held, scaled: bool = scaled) -> tuple:
            return reference.dora_linear_backward(grad, x, weight, a, b, g, s, held, scaled, 0.5, 0.25, SEED, drop_base)

        assert_gradients(y, inputs, backward)


@BASE
def test_reference_norm_backward_is_the_gradient_of_its_forward(base: str) -> None:
    weight = frozen(base, 4, 64)
    a, b = inputs = leaves((3, 64), (4, 3))
    norm, u = reference.dora.dora_weight_norm_forward(weight, a, b, 0.5, torch.float64)
    torch.testing.assert_close(norm, (reference.common.dense(weight, torch.float64) + 0.5 * b @ a).norm(dim=1))
    assert_gradients(
        norm, inputs,
        lambda grad: reference.dora_weight_norm_backward(grad, weight, a, b, norm, u, 0.5, torch.float64),
    )  # fmt: skip


@BASE
@pytest.mark.parametrize("feedforward", [False, True])
def test_reference_ia3_backward_is_the_gradient_of_its_forward(base: str, feedforward: bool) -> None:
    weight, bias = frozen(base, 4, 64), randn(4, dtype=torch.float64)
    x, ia3_l = inputs = leaves((6, 64), (64 if feedforward else 4,))
    with torch.no_grad():
        ia3_l[1], ia3_l[2] = 0.0, 1e-3
    for scaled in (False, True):
        y, z = reference.ia3.ia3_linear_forward(x, weight, bias, ia3_l, feedforward)
        held = y if scaled else z

        def backward(grad: Tensor, held: Tensor = held, scaled: bool = scaled) -> tuple:
            return reference.ia3_linear_backward(grad, x, weight, bias, ia3_l, held, scaled, feedforward)

        assert_gradients(y, inputs, backward)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_reference_norm_backwards_are_the_gradients_of_their_forwards(offset: float) -> None:
    x, weight, bias = inputs = leaves((2, 3, 5), (5,), (5,))
    y, rstd = reference.norm.rms_norm_forward(x, weight, 1e-3, offset, True)
    assert_gradients(y, inputs[:2], lambda grad: reference.rms_norm_backward(grad, x, weight, rstd, offset))
    y, mean, rstd = reference.norm.layer_norm_forward(x, weight, bias, 1e-3)
    assert_gradients(y, inputs, lambda grad: reference.layer_norm_backward(grad, x, weight, mean, rstd))


def test_reference_rotary_backward_is_the_gradient_of_its_forward() -> None:
    q, k, cos, sin = leaves((2, 3, 5, 6), (2, 1, 5, 6), (2, 5, 6), (2, 5, 6))
    y, of_k = reference.rotary_embedding(q, k, cos.detach(), sin.detach())
    grad_k = torch.randn_like(of_k)
    wanted = torch.autograd.grad(of_k, k, grad_k, retain_graph=True)[0]

    def backward(grad: Tensor) -> list[Tensor]:
        grad_q, back_k = reference.rotary_embedding_backward(grad, grad_k, cos, sin)
        torch.testing.assert_close(back_k, wanted)
        return [grad_q]

    assert_gradients(y, [q], backward)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_reference_attention_backward_is_the_gradient_of_its_forward(is_causal: bool, p: float, biased: bool) -> None:
    q, k, v = inputs = leaves((2, 4, 5, 6), (2, 2, 7, 6), (2, 2, 7, 3))
    mask = None if is_causal else torch.rand(2, 1, 5, 7) > 0.4
    bias = torch.randn(1, 4, 5, 7, dtype=torch.float64) if biased else None
    how = (mask, is_causal, 0.3, p, SEED if p else None, bias)
    out, lse = reference.scaled_dot_product_attention(q, k, v, *how)

    def backward(grad: Tensor) -> tuple[Tensor, ...]:
        return reference.scaled_dot_product_attention_backward(grad, q, k, v, out, lse, *how)

    assert_gradients(out, inputs, backward)


@pytest.mark.parametrize("activation", reference.activations.ACTIVATIONS)
def test_reference_activation_backwards_are_the_gradients_of_their_forwards(activation: str) -> None:
    gate, up = inputs = leaves((3, 6), (3, 6))
    y = reference.gated_activation(gate, up, activation)
    assert_gradients(y, inputs, lambda grad: reference.gated_activation_backward(grad, gate, up, activation))
    y = reference.gated_activation(gate, None, activation)
    assert_gradients(y, [gate], lambda grad: reference.gated_activation_backward(grad, gate, None, activation)[:1])
    y = reference.activation(gate, activation)
    assert_gradients(y, [gate], lambda grad: [reference.activation_backward(grad, gate, activation)])


@pytest.mark.parametrize("family", library.PROOFS)
def test_opcheck(family: str, device: torch.device) -> None:
    """Runs torch.library.opcheck (schema, fake, autograd, compilation) on the calls that prove a family of kernels."""
    for name, args in library.PROOFS[family](ProofInputs(device, torch.float32, (10, 64, 96))):
        if library.has_kernel(name, "Autograd"):
            leaves = [value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point()
                      else value for value in args]  # fmt: skip
            torch.library.opcheck(getattr(torch.ops.peft_ext, name).default, tuple(leaves))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", LINEAR, ids=ids)
def test_compiles_without_a_graph_break(case: Case, dynamic: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (9, 12):
        shape = case.fit(((tokens,), 64, 96, 16))
        sample, grad = case.make(torch.float32, shape).to(device), output_grad(case, torch.float32, shape)
        eager, traced = run(case.call, sample, grad), run(compiled, sample, grad)
        for name in eager:
            torch.testing.assert_close(traced[name], eager[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_error_messages(case: Case) -> None:
    for about, wrong, kind, message in case.errors:
        sample = case.make(torch.float32, case.fit(SHAPES[0]))
        with pytest.raises(kind, match=message):
            case.call(**{**sample.inputs, **wrong})
            pytest.fail(f"no error for {about}")


@pytest.mark.parametrize("k", [40, 64])
@pytest.mark.parametrize("tokens", [1, 8, 40, 140])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_in_a_row_of_the_weight_stays_with_its_output(
    dtype: torch.dtype, tokens: int, k: int, device: torch.device
) -> None:
    """Kernels read a row of the weight in whole vectors or tiles, which may reach into the next row."""
    x, weight = randn(tokens, k, dtype=dtype).to(device), randn(48, k, dtype=dtype).to(device)
    a, b = randn(4, k, dtype=torch.float32).to(device), randn(48, 4, dtype=torch.float32).to(device)
    weight[5::7] = float("nan")
    finite = ops.lora_linear(x, weight, a, b, scaling=0.5).isfinite()
    assert torch.equal(finite, weight.isfinite().all(dim=1).expand(tokens, 48))
