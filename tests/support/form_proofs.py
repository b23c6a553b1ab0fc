"""The proofs of the rows of the table of known forms that ``register_form`` does not accept, beside the proofs of
:mod:`peft_ext.verification.proof`: nn.LayerNorm, activations, gates, decoder layers, attention functions
of transformers' registry, the loss function, and the ``update`` of a cache.

The tests repeat these proofs, and tools/forms.py draws the table of known forms with them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_ext import ops
from peft_ext.integrations.forms import Form, Row
from peft_ext.integrations.model_blocks.attention import by_operator
from peft_ext.integrations.model_blocks.decoder_layer import layer_of_parts
from peft_ext.integrations.model_blocks.norm import LEAST
from peft_ext.verification import proof
from peft_ext.verification.proof import CALLS, DTYPES, MAGNITUDES, told, unlike

K, FEATURES = 24, 20
# The attributes that the forward of a class may read in addition to the values of the formula, by the kind of the
# class's form.
READS = {"layer_norm": {"weight", "bias", "eps", "normalized_shape"}}
# The methods of classes whose code is a form, by kind, for the kinds whose form is not the code of the forward.
METHODS = {"gate": "_apply_gate", "cache": "update", "cache_layer": "update", "sliding_cache_layer": "update"}


def disproof(subject: Any, row: Row, form: Form) -> Optional[str]:
    """Returns why the formula of ``row`` does not stand for the code of a class or function, or None: see
    :func:`peft_ext.verification.proof.disproof`."""
    if row.kind in OF_FUNCTIONS:
        return OF_FUNCTIONS[row.kind](subject)
    if row.kind == "decoder_layer":  # the attributes that a decoder layer's forward reads may have any names
        form = dataclasses.replace(form, reads=(), passes_itself=False)
    others = set(form.reads) - READS.get(row.kind, set())
    return proof.disproof(subject, row, dataclasses.replace(form, reads=tuple(sorted(others))))


def proposals(cls: type, form: Form) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the kinds and formulas that fit the attributes that a class's forward reads."""
    yield from proof.proposals(form)
    reads = set(form.reads)
    yield from _layers(cls, reads)
    if not form.passes_itself and reads <= {"act", "approximate", "inplace"}:
        if reads == {"act"}:
            yield "activation", {"inner": "act"}
        if reads == {"approximate"}:
            yield "activation", {"approximate": "approximate"}
        if not reads - {"inplace"}:
            needs = {"needs": "inplace:False"} if reads else {}
            for function in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
                yield "activation", {"function": function, **needs}
                yield "activation", {"function": function, "dtypes": "float32,bfloat16", **needs}


_PASSED = {"attention_mask", "position_embeddings", "position_ids", "use_cache"}


def _layers(cls: type, reads: set[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the formulas of a layer with a cache whose forward reads two or four norms, an attention and an MLP."""
    norms = sorted(name for name in reads if "norm" in name)
    attention = sorted(name for name in reads - set(norms) if "attn" in name or "attention" in name)
    rest = sorted(reads - set(norms) - set(attention))
    takes = set(inspect.signature(cls.forward).parameters)
    if (len(attention), len(rest)) != (1, 1) or len(norms) not in (2, 4) or not {"cache", "past_key_values"} & takes:
        return
    passes = ",".join(sorted(takes & {*_PASSED, "cache", "past_key_values"}))
    for order, befores in itertools.product(itertools.permutations(norms), (2, 0)):
        if befores == 0 and len(norms) > 2:
            continue
        named = {"norms": ",".join(order[:befores]), "posts": ",".join(order[befores:])}
        parts = {name: value for name, value in named.items() if value}
        yield "decoder_layer", {**parts, "attention": attention[0], "mlp": rest[0], "passes": passes}


# --- modules ----------------------------------------------------------------------------------------------------------


def _fill_layer_norm(made: Any, row: Row, training: bool) -> None:
    made.normalized_shape, made.eps, made.elementwise_affine = (K,), 1e-3, True
    made.weight, made.bias = nn.Parameter(torch.randn(K) * 0.5 + 1), nn.Parameter(torch.randn(K))


def _layer_norm(*given: Any) -> Callable:
    fused = proof.fused_forward(*given)

    def run(x: Tensor) -> Tensor:
        """Returns the output of a fused LayerNorm that runs the operator also for fewer elements than LEAST."""
        least = dict(LEAST)
        LEAST.clear()
        try:
            return fused(x)
        finally:
            LEAST.update(least)

    return run


def _fill_activation(made: Any, row: Row, training: bool) -> None:
    if row.get("inner"):
        setattr(made, row.get("inner"), F.gelu)
    if row.get("approximate"):
        setattr(made, row.get("approximate"), "tanh")


def _activation(cls: type, row: Row, form: Form, module: Any) -> Callable:
    name = row.get("function") or {"": "gelu"}.get(row.get("approximate"), "gelu_tanh")
    return lambda x: ops.activation(x, name)


def _fill_gate(made: Any, row: Row, training: bool) -> None:
    setattr(made, row.get("act"), nn.SiLU())


def _gate(cls: type, row: Row, form: Form, module: Any) -> Callable:
    return lambda x: ops.gated_activation(x, None, "silu")


class _NotedAttention(nn.Module):
    """The attention of a decoder layer of the proof; it records a summary of its arguments in ``CALLS``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(K, K)

    def forward(self, *args: Any, hidden_states: Tensor, **given: Any) -> tuple[Tensor, str]:
        CALLS.append((told(args), told(given)))
        return self.layer(hidden_states), "weights"


def _fill_decoder_layer(made: Any, row: Row, training: bool) -> None:
    for name in row.names("norms") + row.names("posts"):
        setattr(made, name, nn.LayerNorm(K))
    setattr(made, row.get("attention"), _NotedAttention())
    setattr(made, row.get("mlp"), nn.Linear(K, K))


def _decoder_layer_inputs(row: Row) -> Iterator[tuple[str, Callable[[torch.dtype], tuple[tuple, dict]]]]:
    given = {name: torch.arange(3) for name in row.names("passes")}
    yield "all arguments", lambda dtype: ((proof.drawn(2, 3, K).to(dtype),), {**given, "one_more": 5})


def _decoder_layer(cls: type, row: Row, form: Form, module: Any) -> Callable:
    norms, posts = ([getattr(module, name) for name in row.names(names)] for names in ("norms", "posts"))
    attention, mlp = getattr(module, row.get("attention")), getattr(module, row.get("mlp"))
    return lambda x, **given: layer_of_parts(x, norms, posts, attention, mlp, given)


# In a model, activations and gates get the contiguous output of a linear layer, so the strides of the two results need
# not agree.
_OF_ELEMENTS = {"strict": False, "strides": False, "autocast": False}
_GATE_INPUTS = functools.partial(proof.tensors, width=2 * FEATURES)
proof.PROOFS |= {
    "layer_norm": proof.Proof(_fill_layer_norm, (4, 24), proof.tensors, _layer_norm, autocast=False),
    "activation": proof.Proof(_fill_activation, (24, 24), proof.tensors, _activation, **_OF_ELEMENTS),
    "gate": proof.Proof(_fill_gate, (24, 24), _GATE_INPUTS, _gate, METHODS["gate"], **_OF_ELEMENTS),
    "decoder_layer": proof.Proof(
        _fill_decoder_layer, (8, 8), _decoder_layer_inputs, _decoder_layer, strict=False, autocast=False
    ),
}


# --- functions --------------------------------------------------------------------------------------------------------


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
    # The values v are finite, because the caller calls _formula only if q or k is not finite.
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


def _sliding_disproof(cls: type) -> Optional[str]:
    """Returns how the ``update`` of a cache layer with a sliding window of w tokens differs from this: it returns the
    tokens that the layer held with the new tokens behind them, holds the last w - 1 of these, and counts all tokens in
    ``cumulative_length``. Returns None if the two agree, or says that a layer has no ``record_past``."""
    for window in (2, 4, 9, 100):
        held = cls(sliding_window=window)
        if getattr(held, "record_past", None) is not False:
            return "it has no record_past, which would keep all tokens"
        wanted, count = [torch.empty(2, 3, 0, 8), torch.empty(2, 3, 0, 8)], 0
        for tokens in (1, 5, 1, 2, 12, 1, 3):
            new = [torch.randn(2, 3, tokens, 8) for _ in range(2)]
            wanted, count = [torch.cat(both, 2) for both in zip(wanted, new, strict=True)], count + tokens
            found = held.update(*new)
            if not all(map(torch.equal, found, wanted)):
                return "its keys and values are not the given ones behind the earlier ones"
            wanted = [value[:, :, max(value.shape[2] - window + 1, 0) :] for value in wanted]
            if not all(map(torch.equal, (held.keys, held.values), wanted)) or held.cumulative_length != count:
                return "it does not hold the last tokens of its window"
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


OF_FUNCTIONS: dict[str, Callable[[Any], Optional[str]]] = {
    "sdpa": _sdpa_disproof,
    "causal_loss": _loss_disproof,
    "cache": _cache_of_layers_disproof,
    "cache_layer": _cache_disproof,
    "sliding_cache_layer": _sliding_disproof,
}
