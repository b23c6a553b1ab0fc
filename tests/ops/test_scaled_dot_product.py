"""Compares attention with PyTorch's function beyond the battery: long, wide, with few visible keys, with strides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_db import DTYPES
from op_params import names
from torch import Tensor

from peft_ext import ops, reference


def draw(*sizes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns random heads [B, H, T, D], a transposed view of [B, T, H, D] as a projection gives it."""
    return torch.randn(*sizes).to(dtype).to(device).transpose(1, 2).requires_grad_()


def drawn(
    t: int, s: int, d: int, dtype: torch.dtype, device: torch.device, heads: tuple[int, int] = (4, 2), batch: int = 2
) -> list[Tensor]:
    torch.manual_seed(0)
    return [draw(batch, length, count, d, dtype=dtype, device=device)
            for count, length in ((heads[0], t), (heads[1], s), (heads[1], s))]  # fmt: skip


def step(attention: object, q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None = None) -> list[Tensor]:
    y = attention(q, k, v)
    grad = torch.ones_like(y) if grad is None else grad
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), grad)]


def assert_as_good(found: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    for value, other, want in zip(found, plain, exact, strict=True):
        error, yardstick = ((x.double() - want).norm() for x in (value, other))
        assert error <= 1.5 * yardstick + 1e-6 * want.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(("t", "s", "d"), [(1100, 1100, 64), (70, 1000, 128), (333, 333, 320), (65, 64, 20)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_it_is_as_good_as_pytorchs(
    t: int, s: int, d: int, is_causal: bool, dtype: torch.dtype, device: torch.device
) -> None:
    values = drawn(t, s, d, dtype, device)
    grad = torch.randn(2, t, 4, d).to(dtype).to(device).transpose(1, 2)
    found = step(lambda *x: ops.scaled_dot_product_attention(*x, is_causal=is_causal), *values, grad)
    plain = step(
        lambda *x: F.scaled_dot_product_attention(*x, is_causal=is_causal, enable_gqa=True), *values, grad
    )  # fmt: skip
    wide = [value.detach().double().requires_grad_() for value in values]
    exact = step(lambda *x: ops.scaled_dot_product_attention(*x, is_causal=is_causal), *wide, grad.double())
    assert_as_good(found, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (10, 1)])
@pytest.mark.parametrize(("t", "s", "d"), [(1, 1000, 64), (8, 300, 64), (4, 41, 20), (5, 1, 8), (2, 513, 72)])
@pytest.mark.parametrize("how", ["all", "causal", (2, 1, 1), (1, 6, 0), (2, 1, 0)], ids=str)
def test_few_queries(
    how: object, t: int, s: int, d: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """The forward has a kernel of its own for few queries. A mask of this test hides all keys of a query."""
    q, k, v = (value.detach() for value in drawn(t, s, d, dtype, device, heads))
    mask = None
    if isinstance(how, tuple):
        mask = torch.rand(how[0], how[1] if heads[0] == 6 else 1, how[2] or t, s) > 0.4
        mask[0, 0, 0] = False
        mask = mask.to(device)
    more = {"mask": mask, "is_causal": how == "causal"}
    found = ops.scaled_dot_product_attention(q, k, v, **more)
    exact, plain = (
        reference.attention.scaled_dot_product_attention(
            q.to(wide), k.to(wide), v.to(wide), mask, how == "causal", d**-0.5
        )[0]
        for wide in (torch.float64, dtype)
    )
    if mask is not None:  # for a query that sees no key, the operator gives 0, and the reference gives NaN or 0
        exact, plain = exact.nan_to_num(), plain.nan_to_num()
    assert (found.double() - exact).norm() <= 1.5 * (plain.double() - exact).norm() + 2e-7 * exact.norm()


def test_the_result_lies_as_the_next_layer_takes_it(device: torch.device) -> None:
    y = ops.scaled_dot_product_attention(*drawn(9, 9, 8, torch.float32, device))
    assert y.shape == (2, 4, 9, 8)
    if device.type == "cpu":
        assert y.transpose(1, 2).is_contiguous()
    with torch.no_grad():
        y = ops.scaled_dot_product_attention(*drawn(9, 9, 8, torch.float32, device))
    # If y were a view that was made under no_grad, autograd would refuse this in-place product.
    y.mul_(torch.ones(8, device=device, requires_grad=True))
    assert y.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_one_key_alone_gives_its_value(dtype: torch.dtype, device: torch.device) -> None:
    """A single key has probability 1 for any score, so the score's gradient is 0."""
    q, k, v = drawn(5, 1, 16, dtype, device)
    y, of_q, of_k, of_v = step(ops.scaled_dot_product_attention, q, k, v)
    torch.testing.assert_close(y, v.detach().repeat_interleave(2, 1).expand_as(y), rtol=1e-6, atol=0)
    assert max(of_q.abs().max(), of_k.abs().max()) < 1e-4
    torch.testing.assert_close(of_v, torch.full_like(v, 10.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_scores_of_any_size(dtype: torch.dtype, device: torch.device) -> None:
    """No exp of a score overflows, and the key with the largest score gets all weight."""
    q, k, v = drawn(70, 300, 16, torch.float32, device)
    q = (100 * q.detach()).to(dtype).requires_grad_()
    k, v = ((x.detach() * by).to(dtype).requires_grad_() for x, by in ((k, 10), (v, 1)))
    found = step(ops.scaled_dot_product_attention, q, k, v)
    assert all(value.isfinite().all() for value in found)
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT
    wanted = v.double().repeat_interleave(2, 1).gather(2, scores.argmax(-1, keepdim=True).expand(-1, -1, -1, 16))
    alone = scores.topk(2).values.diff(dim=-1).abs()[..., 0] / 4 > 20
    torch.testing.assert_close(found[0].double()[alone], wanted[alone], rtol=1e-2, atol=1e-3)
    assert alone.float().mean() > 0.5


def test_scores_beyond_what_floats_tell_apart(device: torch.device) -> None:
    q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
    q[..., 0] = 1e5 * torch.tensor([0.31, 0.57, 0.83, 0.91])
    k[0, 0, 0, 0] = 1e5
    v = torch.arange(4.0).repeat(8, 1).mT[None, None].contiguous()
    y, *grads = step(ops.scaled_dot_product_attention, *(x.to(device).requires_grad_() for x in (q, k, v)))
    assert y.abs().max() < 1e-30 and all(grad.isfinite().all() for grad in grads)


def test_what_is_not_a_number_stays_with_who_sees_it(device: torch.device) -> None:
    values = [value.detach() for value in drawn(40, 40, 8, torch.float32, device)]
    values[1][0, 0, 20] = float("nan")
    y = ops.scaled_dot_product_attention(*values, is_causal=True)
    assert y[0, :2, 20:].isnan().all() and not y[0, :2, :20].isnan().any()
    assert not y[0, 2:].isnan().any() and not y[1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_who_sees_nothing_gets_zeros(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = drawn(130, 200, 16, dtype, device)
    mask = torch.zeros(2, 1, 130, 200, dtype=torch.bool)
    mask[1, 0, 70:, 150:] = True
    y, of_q, of_k, of_v = step(lambda *x: ops.scaled_dot_product_attention(*x, mask.to(device)), q, k, v)
    assert not y[0].any() and not y[1, :, :70].any() and y[1, :, 70:].all()
    assert not of_q[0].any() and not of_q[1, :, :70].any() and of_q[1, :, 70:].any()
    for of_key in (of_k, of_v):
        assert not of_key[0].any() and not of_key[1, :, :150].any() and of_key[1, :, 150:].any()


def test_masks_that_repeat_are_read_where_they_lie(device: torch.device) -> None:
    q, k, v = drawn(70, 90, 8, torch.float32, device)
    few = torch.rand(70, 90) > 0.5
    for mask in (few[None, None], few[None, None, :1], few[None, None, :, :1], few.mT.contiguous().mT[None, None],
                 few.expand(2, 4, 70, 90)):  # fmt: skip
        found = step(lambda *x, m=mask: ops.scaled_dot_product_attention(*x, m.to(device)), q, k, v)
        whole = mask.expand(2, 4, 70, 90).contiguous().to(device)
        wanted = step(lambda *x, m=whole: ops.scaled_dot_product_attention(*x, m), q, k, v)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_parts_of_one_projection_are_taken_where_they_lie(device: torch.device) -> None:
    heads, kv_heads, size = 4, 2, 24
    qkv = torch.randn(2, 67, (heads + 2 * kv_heads) * size).to(device).requires_grad_()
    parts = [part.unflatten(-1, (-1, size)).transpose(1, 2)
             for part in qkv.split([heads * size, kv_heads * size, kv_heads * size], -1)]  # fmt: skip
    y = ops.scaled_dot_product_attention(*parts, is_causal=True)
    wanted = ops.scaled_dot_product_attention(*(part.contiguous() for part in parts), is_causal=True)
    grad = torch.randn_like(y)
    of_y, of_wanted = (torch.autograd.grad(value, qkv, grad)[0] for value in (y, wanted))
    assert torch.equal(y, wanted) and torch.equal(of_y, of_wanted)


@pytest.mark.cpu_only("it is about CPU threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("heads", [(12, 1), (4, 4), (6, 2), (40, 20)])
def test_the_same_bits_for_any_threads(heads: tuple[int, int], dtype: torch.dtype) -> None:
    values, before = drawn(333, 333, 16, dtype, torch.device("cpu"), heads), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7, 48, 96):
            torch.set_num_threads(threads)
            found.append(step(lambda *x: ops.scaled_dot_product_attention(*x, is_causal=True), *values))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def _seen(kind: str, t: int, s: int) -> Tensor | None:
    """Returns a mask: a window of 40 keys up to the query's own, keys left out at random, or none."""
    if kind == "window":
        after = torch.arange(t)[:, None] - torch.arange(s)
        return ((after >= 0) & (after < 40))[None, None]
    return torch.rand(2, 1, t, s) > 0.4 if kind == "random" else None


@pytest.mark.cpu_only("it is about CPU threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["causal", "all", "window", "random"])
@pytest.mark.parametrize(("t", "s", "d"), [(333, 333, 20), (130, 470, 64), (470, 130, 33)])
def test_cells_of_many_threads(t: int, s: int, d: int, kind: str, dropout_p: float, dtype: torch.dtype) -> None:
    """More threads than heads divide a head into cells. The results are right, with the bits of one thread."""
    q, k, v = (value.detach() for value in drawn(t, s, d, dtype, torch.device("cpu"), (3, 1)))
    grad, before = torch.randn(2, t, 3, d).to(dtype).transpose(1, 2), torch.get_num_threads()
    how = (_seen(kind, t, s), kind == "causal", d**-0.5, dropout_p, torch.tensor([3, 5]) if dropout_p else None, None)
    found = []
    try:
        for threads in (1, 2, 3, 7, 48, 96):
            torch.set_num_threads(threads)
            y, lse = torch.ops.peft_ext.scaled_dot_product_attention(q, k, v, *how)
            grads = torch.ops.peft_ext.scaled_dot_product_attention_backward(grad, q, k, v, y, lse, *how)
            found.append([y, lse, *grads])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))
    wide = [value.double() for value in (q, k, v)]
    y, lse = reference.scaled_dot_product_attention(*wide, *how)
    wanted = reference.scaled_dot_product_attention_backward(grad.double(), *wide, y, lse, *how)
    for value, want in zip(found[0], (y, lse, *wanted), strict=True):
        assert (value.double() - want).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-6) * want.norm()


@pytest.mark.cpu_only("it is about CPU threads")
def test_keys_that_no_cell_reaches_have_no_gradient() -> None:
    """Under a causal mask, keys after the last query are in no cell. The call without the mask leaves sums of these
    keys in the memory that the next call takes.
    """
    values, before = drawn(999, 1500, 16, torch.float32, torch.device("cpu"), (1, 1), 1), torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        for is_causal in (False, True):
            found = step(lambda *x, c=is_causal: ops.scaled_dot_product_attention(*x, is_causal=c), *values)
    finally:
        torch.set_num_threads(before)
    assert all(grad[:, :, :999].any() and not grad[:, :, 999:].any() for grad in found[2:])


def test_evaluation_drops_nothing(device: torch.device) -> None:
    q, k, v = (torch.randn(1, 2, 40, 16).to(device) for _ in range(3))
    found = ops.scaled_dot_product_attention(q, k, v, dropout_p=0.5, training=False)
    assert torch.equal(found, ops.scaled_dot_product_attention(q, k, v))
    assert not torch.equal(found, ops.scaled_dot_product_attention(q, k, v, dropout_p=0.5, training=True))


def test_autocast_takes_its_dtype(device: torch.device) -> None:
    values = drawn(20, 20, 8, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        y = ops.scaled_dot_product_attention(*values)
    wanted = ops.scaled_dot_product_attention(*(value.bfloat16() for value in values))
    assert y.dtype is torch.bfloat16 and torch.equal(y, wanted)
    assert torch.autograd.grad(y, values[0], torch.ones_like(y))[0].dtype is torch.float32


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), True, "1"])
def test_a_scale_of_no_use(scale: object, device: torch.device) -> None:
    values = drawn(3, 3, 8, torch.float32, device)
    with pytest.raises(ValueError, match=r"scaled_dot_product_attention: scale is .*, wanted a finite number above 0"):
        ops.scaled_dot_product_attention(*values, scale=scale)


def test_causal_with_a_mask_is_refused(device: torch.device) -> None:
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match="is_causal is True, wanted False where there is a mask"):
        ops.scaled_dot_product_attention(*drawn(3, 3, 8, torch.float32, device), mask, is_causal=True)


def test_the_reference_is_pytorchs_function() -> None:
    q, k, v = (value.double() for value in drawn(7, 9, 8, torch.float32, torch.device("cpu")))
    mask = torch.rand(2, 1, 7, 9) > 0.4
    found, lse = reference.scaled_dot_product_attention(q, k, v, mask, False, 0.3)
    k, v = (value.repeat_interleave(2, 1) for value in (k, v))
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, mask, scale=0.3))
    scores = (0.3 * q @ k.mT).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1).masked_fill(~mask.any(-1), 0))
