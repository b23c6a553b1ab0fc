"""Compares rotary positions with transformers' function, also for tensors that are not contiguous."""

from __future__ import annotations

import pytest
import torch
from op_db import DTYPES, randn
from op_params import names

from peft_ext import ops


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_it_is_transformers_function(dtype: torch.dtype, device: torch.device) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = (randn(2, 7, heads, 64, dtype=dtype).transpose(1, 2) for heads in (6, 2))
    angles = torch.randn(1, 7, 32)
    angles = torch.cat((angles, angles), -1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    wanted = llama.apply_rotary_pos_emb(q, k, cos, sin)
    found = ops.rotary_embedding(*(x.to(device) for x in (q, k, cos, sin)))
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == want.dtype and got.stride() == want.stride()
        torch.testing.assert_close(got.cpu(), want, rtol=4 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_parts_of_one_projection_are_taken_where_they_lie(device: torch.device) -> None:
    heads, kv_heads, size = 4, 2, 48
    qkv = torch.randn(2, 5, (heads + 2 * kv_heads) * size).to(device).requires_grad_()
    q, k, _ = (part.unflatten(-1, (-1, size)).transpose(1, 2)
               for part in qkv.split([heads * size, kv_heads * size, kv_heads * size], -1))  # fmt: skip
    cos, sin = torch.randn(2, 2, 5, size).to(device)
    found = ops.rotary_embedding(q, k, cos, sin)
    wanted = ops.rotary_embedding(q.contiguous(), k.contiguous(), cos, sin)
    grads = [torch.randn(y.shape).to(device) for y in found]
    of_found, of_wanted = (torch.autograd.grad(ys, qkv, grads)[0] for ys in (found, wanted))
    assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))
    assert torch.equal(of_found, of_wanted)
    assert found[0].transpose(1, 2).is_contiguous() and wanted[0].is_contiguous()


def test_one_of_two_results_may_be_unused(device: torch.device) -> None:
    q, k, cos, sin = (torch.randn(2, 3, 5, 8).to(device) for _ in range(4))
    q.requires_grad_()
    y, _ = ops.rotary_embedding(q, k, cos[:, 0], sin[:, 0])
    y.sum().backward()
    first, second = (cos[:, 0].chunk(2, -1), sin[:, 0].chunk(2, -1))
    wanted = torch.cat((first[0] + second[1], first[1] - second[0]), -1)
    torch.testing.assert_close(q.grad, wanted[:, None].expand_as(q))
