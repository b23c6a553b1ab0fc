"""The proofs of rows of functions: attention functions of transformers' registry, a loss function, and the ``update``
of a cache. See :mod:`.proof` for the proofs of rows of modules.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from .attention import by_operator

__all__ = ["DISPROOFS", "DTYPES", "MAGNITUDES", "unlike"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAGNITUDES = (1e-4, 1.0, 1e2, 1e4)


def unlike(found: Tensor, wanted: Tensor, tolerance: float, strict: bool, whole: bool = False) -> Optional[str]:
    """Returns how two tensors differ beyond rounding, or None.

    Elements that are not finite must be at the same places in both tensors and, if ``strict``, be equal (NaN, or the
    same infinity). Finite elements may differ by ``tolerance`` times the largest finite value of the row, or of the
    whole tensor if ``whole``, because terms of sums may cancel. Unless ``strict``, NaN and both infinities count as
    equal: for an infinite input, PyTorch's activations give NaN or infinity, depending on the instruction set.
    """
    if found.shape != wanted.shape or found.dtype is not wanted.dtype:
        return f"{found.dtype} {tuple(found.shape)}, wanted {wanted.dtype} {tuple(wanted.shape)}"
    if not found.numel():
        return None
    a, b = found.double(), wanted.double()
    for what in (torch.isnan, torch.isposinf, torch.isneginf) if strict else (torch.isfinite,):
        if not torch.equal(what(a), what(b)):
            return f"{int((what(a) != what(b)).sum())} elements {what.__name__.removeprefix('is')} in one alone"
    a, b = (value.nan_to_num(0.0, 0.0, 0.0) for value in (a, b))
    scale = b.abs().max() if whole or not b.dim() else b.abs().amax(-1, keepdim=True)
    least = torch.finfo(wanted.dtype).tiny * 4 + tolerance * torch.finfo(wanted.dtype).eps * b.abs().max()
    excess = ((a - b).abs() / (tolerance * scale + least)).max().item()
    return None if excess <= 1 else f"by {excess:.3g} times the tolerance of {tolerance:.2g}"


def _sdpa_disproof(function: Callable) -> Optional[str]:
    """Returns how the operator and an attention function differ, and for which input, as text; None if they agree.

    Finite results are compared with results in float64: the operator's error may be twice the function's error, plus a
    few units of rounding.
    """
    biased = [False, True] if "position_bias" in function.__code__.co_varnames else [False]
    for dtype, (what, drawn), (causal, masked, scaling), with_bias in itertools.product(
        DTYPES, _heads(), [(True, False, 0.3), (False, False, None), (True, True, 0.3)], biased
    ):
        queries, keys = drawn[0].shape[2], drawn[1].shape[2]
        generator = torch.Generator().manual_seed(1)
        mask = torch.ones(2, 1, queries, keys, dtype=torch.bool).tril(keys - queries) if masked else None
        if mask is not None:
            mask[0, :, :, :5] = mask[1, :, 9:, :9] = False
        how: dict[str, Any] = {"dropout": 0.0, "scaling": scaling}
        if with_bias:
            how["position_bias"] = torch.randn(1, 4, queries, keys, generator=generator).to(dtype)
            # The diagonal lets each query see at least one key.
            mask = None if mask is None else mask | torch.eye(queries, keys, dtype=torch.bool)
        if causal and mask is None and keys != queries:
            continue  # transformers gives a mask if there are more keys than queries
        exact = {name: value.double() if name == "position_bias" else value for name, value in how.items()}
        found = []
        module = types.SimpleNamespace(num_key_value_groups=2, is_causal=causal)
        for called, of, given in ((by_operator, dtype, how), (function, dtype, how), (function, torch.float64, exact)):
            q, k, v = (value.to(dtype).to(of).requires_grad_() for value in drawn)
            out, _ = called(module, q, k, v, mask, **given)
            ramp = torch.linspace(-1, 1, out.numel()).view(out.shape).to(of)
            found.append([out.detach(), *torch.autograd.grad(out, (q, k, v), ramp)])
        if not all(value.to(dtype).isfinite().all() for value in drawn[:2]):
            # PyTorch's kernel gives finite numbers for some queries that see a NaN, and NaN for some queries that see
            # no NaN.
            seen = torch.ones(queries, keys, dtype=torch.bool).tril() if causal and mask is None else mask
            out, *grads = found[0]
            is_wrong = _formula(drawn, dtype, seen, how).isfinite() != out.isfinite()
            if is_wrong.any() or any(grad.isfinite().all() for grad in grads):
                return f"is not NaN for the queries that see a number that is not finite, {dtype}, {what}"
            continue
        for of_gradient, (ours, stock, wanted) in enumerate(zip(*found, strict=True)):
            is_right = wanted.to(dtype).isfinite()
            if not ours.isfinite()[is_right | stock.isfinite()].all() or not is_right.all() and ours.isfinite().all():
                return f"overflows where the function does not, or does not where it has to, {dtype}, {what}"
            wanted, ours = wanted[is_right], ours[is_right]
            stock_off = (stock[is_right] - wanted).nan_to_num(0.0, 0.0, 0.0).abs().max()
            allowed = 2 * stock_off + 4 * torch.finfo(dtype).eps * wanted.abs().max()
            if of_gradient:  # the gradients are differences of two sums over D, in float32
                allowed += 2**-22 * q.shape[3] * v[v.isfinite()].abs().max() * max(q.abs().max(), k.abs().max())
            if not (ours_off := (ours - wanted).abs().max()) <= allowed:
                return f"is off by {ours_off:.2g}, wanted {allowed:.2g}, {dtype}, {what}"
        if found[0][0].stride() != found[1][0].stride():
            return f"the result lies otherwise in memory, {what}"
    return None


def _formula(drawn: list[Tensor], dtype: torch.dtype, seen: Optional[Tensor], how: dict[str, Any]) -> Tensor:
    """Returns softmax(q kᵀ · scaling + bias) v ``[B, T, H, D]`` in float64, over the keys that a query sees."""
    q, k, v = (value.to(dtype).double() for value in drawn)
    k, v = (value.repeat_interleave(2, 1) for value in (k, v))
    scores = q @ k.transpose(2, 3) * (how["scaling"] or q.shape[3] ** -0.5)
    if "position_bias" in how:
        scores = scores + how["position_bias"].double()
    weights = (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).softmax(-1)
    if seen is not None:
        weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    # The values v are finite here: the caller asks only for inputs whose q or k is not finite.
    return (weights @ v if seen is None or v.isfinite().all() else (weights.masked_fill(~seen, 0) @ v)).transpose(1, 2)


def _heads() -> Iterator[tuple[str, list[Tensor]]]:
    """Yields test inputs of attention: a description, and the tensors q ``[B, H, T, D]``, k and v
    ``[B, Hkv, S, D]``."""

    def drawn(queries: int = 18, keys: int = 18, size: int = 8) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(2, tokens, heads, size, generator=generator).transpose(1, 2)
                for tokens, heads in ((queries, 4), (keys, 2), (keys, 2))]  # fmt: skip

    for magnitude in (*MAGNITUDES, 1e-3, 20.0):
        yield f"magnitude {magnitude:g}", [value * magnitude for value in drawn()]
    yield "zeros", [torch.zeros_like(value) for value in drawn()]
    for place, name in enumerate("qkv"):
        spiked = drawn()
        spiked[place][..., 2] = 3e4
        yield f"one huge column of {name}", spiked
        for value in (torch.inf, -torch.inf, torch.nan):
            special = drawn()
            special[place][0, 1, 7, 3] = value
            yield f"one {value} in {name}", special
    for queries, keys, size in ((17, 17, 5), (65, 65, 80), (16, 33, 8)):
        yield f"{queries} queries, {keys} keys, heads of {size}", drawn(queries, keys, size)


def _cache_disproof(cls: type, layer: Optional[type] = None) -> Optional[str]:
    """Returns how the ``update`` of a layer of a cache, or of a cache of such layers, differs from a concatenation, or
    None."""
    held = cls() if layer is None else cls(layer_class_to_replicate=layer)
    wanted = [torch.empty(2, 3, 0, 8), torch.empty(2, 3, 0, 8)]
    for tokens in (5, 1, 2):
        new = [torch.randn(2, 3, tokens, 8) for _ in range(2)]
        wanted = [torch.cat(both, 2) for both in zip(wanted, new, strict=True)]
        found = held.update(*new) if layer is None else held.update(*new, 0)
        inner = held if layer is None else held.layers[0]
        if not all(map(torch.equal, found, wanted)) or inner.keys is not found[0] or inner.values is not found[1]:
            return "its keys and values are not the given ones behind the earlier ones"
    return None


def _cache_of_layers_disproof(cls: type) -> Optional[str]:
    from transformers.cache_utils import DynamicLayer

    return _cache_disproof(cls, DynamicLayer)


def _loss_disproof(function: Callable) -> Optional[str]:
    """Returns how a loss function and the operator linear_cross_entropy differ, or None.

    The operator gets the identity matrix as weight, so that its logits equal its hidden states.
    """
    for dtype, items, shifted in itertools.product(DTYPES, (None, 5, torch.tensor(7)), (False, True)):
        logits = (torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
        labels = torch.tensor([[3, 1, -100, 4, 10, 0], [-100, 2, 2, 7, -100, 9]])
        target = labels if shifted else F.pad(labels, (0, 1), value=-100)[..., 1:]
        given = {"labels": None if shifted else labels, "shift_labels": labels if shifted else None}
        found = []
        for ours in (True, False):
            x = logits.clone().requires_grad_()
            if ours:
                loss = ops.linear_cross_entropy(x, torch.eye(11, dtype=dtype), target, num_items_in_batch=items)
            else:
                loss = function(x, vocab_size=11, num_items_in_batch=items, **given)
            found.append((loss.detach(), *torch.autograd.grad(loss, x)))
        for a, b in zip(*found, strict=True):
            if (why := unlike(a, b, 8 * torch.finfo(dtype).eps, True)) is not None:
                return f"{why}, {dtype}"
    return None


DISPROOFS: dict[str, Callable[[Any], Optional[str]]] = {
    "sdpa": _sdpa_disproof,
    "causal_loss": _loss_disproof,
    "cache": _cache_of_layers_disproof,
    "cache_layer": _cache_disproof,
}
