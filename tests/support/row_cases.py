"""Cases of the operators without a weight matrix: norms, activations, dropout, rotary positions, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from op_case import SEED, SHAPES, Case, Options, Sample, case_name, nothing, randn, with_errors
from op_errors import errors
from torch import Tensor

from peft_ext import ops, reference
from peft_ext.reference.activations import ACTIVATIONS

# --- norms ------------------------------------------------------------------------------------------------------------

# Shapes with more than one column. With one column the gradient of a norm is 0 except for eps, and is the difference of
# two larger numbers.
_ROWS = tuple(shape for shape in SHAPES if shape[1] > 1)


def _of_x(dtype: torch.dtype, shape: tuple) -> tuple[torch.dtype, tuple]:
    return dtype, (*shape[0], shape[1])


def rms_norm_case(kind: str = "llama", *, weight_dtype: Any = None, weighted: bool = True) -> Case:
    """Returns a case of rms_norm. The plain result is that of transformers' layer for ``kind``, "llama" or "gemma"."""
    gemma = kind == "gemma"

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        weight = randn(shape[1], dtype=torch.float64, scale=0.3) + (0.0 if gemma else 1.0)
        inputs = {"x": randn(*shape[0], shape[1], dtype=dtype, scale=3.0)}
        inputs["weight"] = weight.to(weight_dtype or dtype) if weighted else None
        return Sample(inputs, ("x", "weight") if weighted else ("x",))

    def call(x, weight, eps=1e-6, offset=1.0 if gemma else 0.0):
        return ops.rms_norm(x, weight, eps, offset=offset, round_before_weight=not gemma)

    def plain(x, weight):
        wide = torch.promote_types(x.dtype, torch.float32)
        h = x.to(wide)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        if gemma:
            return (h * (1.0 + weight.to(wide))).type_as(x)
        return h.to(x.dtype) if weight is None else weight * h.to(x.dtype)

    def result(dtype: torch.dtype, shape: tuple) -> tuple[torch.dtype, tuple]:
        mixed = weight_dtype is not None and not gemma
        return torch.promote_types(dtype, weight_dtype) if mixed else dtype, (*shape[0], shape[1])

    name = case_name("rms_norm", kind, 0.0, weight_dtype, alone=not weighted)
    return Case(name, "norm", make, call, plain, result=result, shapes=_ROWS, saved=lambda t, k, n, r: t * 4)


def layer_norm_case(vectors: str = "weight bias", vector_dtype: Any = None) -> Case:
    """Returns a case of layer_norm. ``vectors`` are the names of the layer's vectors, "weight" and "bias" or fewer."""
    names = vectors.split()

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        inputs = {"x": randn(*shape[0], shape[1], dtype=dtype, scale=3.0) + 1, "weight": None, "bias": None}
        for name in names:
            inputs[name] = randn(shape[1], dtype=vector_dtype or dtype)
        return Sample(inputs, ("x", *names))

    def call(x, weight, bias, eps=1e-5):
        return ops.layer_norm(x, weight, bias, eps)

    def plain(x, weight, bias):
        weight, bias = (value if value is None else value.to(x.dtype) for value in (weight, bias))
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    name = case_name("layer_norm", vectors.replace(" ", "_") or "alone", 0.0, vector_dtype)
    return Case(name, "norm", make, call, plain, result=_of_x, shapes=_ROWS, saved=lambda t, k, n, r: 2 * t * 4)


# --- activations ------------------------------------------------------------------------------------------------------


def _plain_activation(x: Tensor, activation: str) -> Tensor:
    if activation == "relu2":
        return F.relu(x).square()
    if activation in ("relu", "silu"):
        return getattr(F, activation)(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _off_zero(x: Tensor) -> Tensor:
    """Moves values away from zero, where the slope of ReLU jumps, and finite differences are wrong."""
    return x.masked_fill(x.abs() < 1e-3, 0.5)


def _of_n(dtype: torch.dtype, shape: tuple) -> tuple[torch.dtype, tuple]:
    return dtype, (*shape[0], shape[2])


def gated_activation_case(activation: str, form: str = "two") -> Case:
    """Returns a case of the gated activation. ``form`` says how gate and up are given.

    Gate and up are "two" tensors, "halves" of one given tensor, or "views" of one tensor.
    """

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, n = shape[0], shape[2]
        if form == "halves":
            return Sample({"gate": _off_zero(randn(*tokens, 2 * n, dtype=dtype, scale=2.0)), "up": None}, ("gate",))
        if form == "views":
            return Sample({"gate_up": _off_zero(randn(*tokens, 2 * n, dtype=dtype, scale=2.0))}, ("gate_up",))
        gate = _off_zero(randn(*tokens, n, dtype=dtype, scale=2.0))
        return Sample({"gate": gate, "up": randn(*tokens, n, dtype=dtype)}, ("gate", "up"))

    def call(gate=None, up=None, gate_up=None, activation=activation):
        if form == "views":
            gate, up = gate_up.chunk(2, -1)
        return ops.gated_activation(gate, up, activation)

    def plain(gate=None, up=None, gate_up=None):
        if form != "two":
            gate, up = (gate if gate_up is None else gate_up).chunk(2, -1)
        return _plain_activation(gate, activation) * up

    name = f"gated_activation-{activation}" + ("" if form == "two" else f"-{form}")
    return Case(name, "activations", make, call, plain, result=_of_n, saved=nothing)


def activation_case(activation: str) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        return Sample({"x": _off_zero(randn(*shape[0], shape[2], dtype=dtype, scale=2.0))}, ("x",))

    def call(x, activation=activation):
        return ops.activation(x, activation)

    def plain(x):
        return _plain_activation(x, activation)

    return Case(f"activation-{activation}", "activations", make, call, plain, result=_of_n, saved=nothing)


# --- positions --------------------------------------------------------------------------------------------------------


def rotary_case(heads: int = 3, kv_heads: int = 1, *, one_cos: bool = False, contiguous: bool = False) -> Case:
    """Returns a case of rotary positions, where q and k are transposed views, and the results are concatenated.

    With ``one_cos`` all samples share one cos and sin.
    """

    def sizes(shape: tuple) -> tuple[int, int, int]:
        """Returns (B, T, D) for a shape: B and T from its tokens, and an even D from its rank."""
        tokens = shape[0]
        count = torch.Size(tokens[1:]).numel()
        return (tokens[0] if tokens else 1), count, 2 * shape[3]

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        b, t, d = sizes(shape)
        # The two halves of cos and sin differ, while a model's halves are equal.
        inputs = {name: randn(1 if one_cos else b, t, d, dtype=dtype) for name in ("cos", "sin")}
        for name, count in (("q", heads), ("k", kv_heads)):
            values = randn(b, t, count, d, dtype=dtype).transpose(1, 2)
            inputs[name] = values.contiguous() if contiguous else values
        return Sample(inputs, ("q", "k"))

    def call(q, k, cos, sin):
        return torch.cat([y.reshape(-1) for y in ops.rotary_embedding(q, k, cos, sin)])

    def plain(q, k, cos, sin):
        def half(x: Tensor) -> Tensor:
            return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)

        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return torch.cat([((x * cos) + (half(x) * sin)).reshape(-1) for x in (q, k)])

    def result(dtype: torch.dtype, shape: tuple) -> tuple[torch.dtype, tuple]:
        b, t, d = sizes(shape)
        return dtype, (b * t * d * (heads + kv_heads),)

    traits = "-one_cos" * one_cos + "-contiguous" * contiguous
    return Case(
        f"rotary_embedding-{heads}_{kv_heads}{traits}", "rotary", make, call, plain, result=result, saved=nothing
    )


# --- dropout ----------------------------------------------------------------------------------------------------------


def dropout_case(dropout_p: float = 0.1) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        return Sample({"x": randn(*shape[0], shape[1], dtype=dtype)}, ("x",))

    def call(x, training=True, seed=None):
        return ops.dropout(x, dropout_p, training, seed=SEED.to(x.device) if seed is None else seed)

    def plain(x):
        keep = reference.dropout_keep_mask(SEED, dropout_p, x.shape).to(x.device)
        return torch.where(keep, x / (1 - dropout_p), 0.0)

    return Case(case_name("dropout", "x", dropout_p, None), "dropout", make, call, plain, result=_of_x,
                saved=lambda t, k, n, r: 16)  # fmt: skip


# --- attention --------------------------------------------------------------------------------------------------------


def attention_case(
    heads: int = 4,
    kv_heads: int = 2,
    sees: str = "all",
    *,
    more_keys: int = 0,
    other_values: int = 0,
    odd: bool = False,
    contiguous: bool = False,
    dropout_p: float = 0.0,
    biased: str = "",
) -> Case:
    """Returns a case of attention, where q, k and v are transposed views with a head size of twice the shape's rank.

    ``other_values`` is added to the head size of the values, and ``odd`` subtracts one from the head size. ``sees`` is
    "all", "causal", "padding" (some queries see no key), "documents" or "bits" (a mask for each head). ``biased`` is
    "heads" (a bias in x's dtype, transposed) or "keys" (a float32 bias with some entries -inf).
    """

    def lengths(shape: tuple) -> tuple[int, int, int]:
        """Returns (B, T, D) for a shape; tokens of one dimension are one sequence."""
        *batch, tokens = shape[0] or (1,)
        return torch.Size(batch).numel(), tokens, 2 * shape[3] - odd

    def mask_of(b: int, t: int, s: int) -> Tensor | None:
        if sees == "padding":  # the padding is on the left, as for generation
            seen = torch.ones(b, 1, t, s, dtype=torch.bool).tril()
            return seen & (torch.arange(s) >= torch.arange(b)[:, None] % max(s, 1) * 3)[:, None, None]
        if sees == "documents":
            of_query, of_key = torch.arange(t) // 70, torch.arange(s) // 70
            return (of_query[:, None] == of_key)[None, None]
        if sees == "bits":
            return torch.rand(b, heads, t, s) > 0.7
        return None

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        b, t, d = lengths(shape)
        s = t + more_keys
        inputs = {}
        for name, count, length, size in (
            ("q", heads, t, d), ("k", kv_heads, s, d), ("v", kv_heads, s, d + other_values),
        ):  # fmt: skip
            values = randn(b, length, count, size, dtype=dtype).transpose(1, 2)
            inputs[name] = values.contiguous() if contiguous else values
        return Sample(inputs | {"mask": mask_of(b, t, s), "bias": bias_of(b, t, s, dtype)}, ("q", "k", "v"))

    def bias_of(b: int, t: int, s: int, dtype: torch.dtype) -> Tensor | None:
        if biased == "heads":
            return randn(1, heads, s, t, dtype=dtype).mT
        if biased == "keys":
            bias = 3 * randn(b, 1, 1, s, dtype=torch.float32)
            bias[..., 1::5] = float("-inf")
            return bias
        return None

    def call(q, k, v, mask, bias):
        how = {"is_causal": sees == "causal", "scale": 0.3, "dropout_p": dropout_p, "training": True, "bias": bias}
        return ops.scaled_dot_product_attention(q, k, v, mask, **how, seed=SEED.to(q.device) if dropout_p else None)

    def plain(q, k, v, mask, bias):
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = 0.3 * (q @ k.mT)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        if sees == "causal":
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        probabilities = scores.softmax(-1)
        if mask is not None:  # queries that see no key give zeros, and no NaN in gradients
            probabilities = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask
        if dropout_p:
            keep = reference.dropout_keep_mask(SEED, dropout_p, probabilities.mT.shape).mT.to(q.device)
            probabilities = torch.where(keep, probabilities / (1 - dropout_p), 0.0)
        return probabilities @ v

    def result(dtype: torch.dtype, shape: tuple) -> tuple[torch.dtype, tuple]:
        b, t, d = lengths(shape)
        return dtype, (b, heads, t, d + other_values)

    traits = "-more_keys" * bool(more_keys) + "-values" * bool(other_values) + "-odd" * odd + "-contiguous" * contiguous
    traits += f"-dropout{dropout_p}" * bool(dropout_p) + f"-bias_of_{biased}" * bool(biased)
    name = f"scaled_dot_product_attention-{heads}_{kv_heads}-{sees}{traits}"
    # Leaves out shapes with one token: with one key the gradient of the scores is zero, and a relative error has no
    # meaning.
    shapes = [shape for shape in SHAPES if lengths(shape)[1] != 1]

    def saved(t: int, k: int, n: int, r: int) -> int:
        """Returns the bytes of the result, of a float32 number for each query and head, and of the seed."""
        return heads * t * (4 + 2 * (2 * r - odd + other_values)) + (16 if dropout_p else 0)

    return Case(name, "attention", make, call, plain, result=result, shapes=shapes, saved=saved)


# --- what is tested --------------------------------------------------------------------------------------------------

ERRORS = {
    "rotary_embedding-3_1": errors(
        "rotary_embedding",
        odd=({"q": torch.zeros(4, 3, 8, 31)}, ValueError,
             r"q has shape \(4, 3, 8, 31\), wanted \[B, H, T, D\] with an even D"),
        vector=({"q": torch.zeros(32)}, ValueError, r"q has shape \(32,\), wanted \[B, H, T, D\] with an even D"),
        k_shape=({"k": torch.zeros(4, 1, 7, 32)}, ValueError,
                 r"k has shape \(4, 1, 7, 32\), wanted \[4, Hkv, 8, 32\]"),
        k_dtype=({"k": torch.zeros(4, 1, 8, 32, dtype=torch.bfloat16)}, TypeError, "k is bfloat16, q is float32"),
        cos_shape=({"cos": torch.zeros(8, 32)}, ValueError,
                   r"cos has shape \(8, 32\), wanted \(4, 8, 32\) or \(1, 8, 32\)"),
        sin_shape=({"sin": torch.zeros(1, 8, 32)}, ValueError,
                   r"sin has shape \(1, 8, 32\), cos has \(4, 8, 32\)"),
        sin_grad=({"sin": torch.zeros(4, 8, 32, requires_grad=True)}, ValueError,
                  "sin requires grad, wanted a constant"),
    ),
    "scaled_dot_product_attention-4_2-all": errors(
        "scaled_dot_product_attention",
        vector=({"q": torch.zeros(32)}, ValueError, r"q has shape \(32,\), wanted \[B, H, T, D\]"),
        k_size=({"k": torch.zeros(4, 2, 8, 31)}, ValueError,
                r"k has shape \(4, 2, 8, 31\), wanted \[4, Hkv, S, 32\]"),
        k_heads=({"k": torch.zeros(4, 3, 8, 32)}, ValueError, "k has 3 heads, wanted a divisor of q's 4"),
        k_dtype=({"k": torch.zeros(4, 2, 8, 32, dtype=torch.bfloat16)}, TypeError, "k is bfloat16, q is float32"),
        v_shape=({"v": torch.zeros(4, 2, 7, 32)}, ValueError,
                 r"v has shape \(4, 2, 7, 32\), wanted \[4, 2, 8, Dv\]"),
        added_mask=({"mask": torch.zeros(8, 8)}, TypeError,
                    "mask is float32, torch.strided, wanted a strided Tensor of bools"),
        mask_shape=({"mask": torch.ones(4, 2, 8, 8, dtype=torch.bool)}, ValueError,
                    r"mask has shape \(4, 2, 8, 8\), wanted \(4, 4, 8, 8\), each of them or 1"),
        bias_shape=({"bias": torch.ones(4, 8, 8)}, ValueError,
                    r"bias has shape \(4, 8, 8\), wanted \(4, 4, 8, 8\), each of them or 1"),
        bias_dtype=({"bias": torch.ones(4, 4, 8, 8, dtype=torch.bool)}, TypeError, "bias is bool"),
        bias_grad=({"bias": torch.ones(4, 4, 8, 8, requires_grad=True)}, ValueError,
                   "bias requires a gradient, wanted one without"),
    ),
    "dropout-x-dropout0.1": errors(
        "dropout", "seed",
        integers=({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x is int64, wanted one of"),
    ),
    "gated_activation-silu": errors(
        "gated_activation",
        activation=({"activation": "tanh"}, ValueError,
                    r"activation is 'tanh', wanted one of \('gelu', 'gelu_tanh', 'relu', 'silu', 'relu2'\)"),
        up_shape=({"up": torch.zeros(4, 8, 95)}, ValueError, r"up has shape \(4, 8, 95\), wanted \(4, 8, 96\)"),
        up_dtype=({"up": torch.zeros(4, 8, 96, dtype=torch.bfloat16)}, TypeError, "up is bfloat16, gate is float32"),
        odd=({"gate": torch.zeros(4, 7), "up": None}, ValueError,
             r"gate has shape \(4, 7\), wanted \[\.\.\., 2F\] where up is None"),
        number=({"gate": torch.tensor(1.0)}, ValueError, r"gate has shape \(\), wanted \[\.\.\., F\]"),
    ),
    "activation-gelu": errors(
        "activation",
        activation=({"activation": None}, ValueError, "activation is None, wanted one of"),
        number=({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\), wanted \[\.\.\., F\]"),
    ),
    "rms_norm-llama": errors(
        "rms_norm",
        number=({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\), wanted \[\.\.\., K\]"),
        weight_size=({"weight": torch.ones(1, 64)}, ValueError, r"weight has shape \(1, 64\), wanted \(64,\)"),
        weight_of_integers=({"weight": torch.ones(64, dtype=torch.int64)}, TypeError, "weight is int64, wanted one of"),
        negative_eps=({"eps": -1e-6}, ValueError, "eps is -1e-06, wanted 0 or more"),
        eps=({"eps": None}, ValueError, "eps is None, wanted a finite number"),
        offset=({"offset": float("nan")}, ValueError, "offset is nan, wanted a finite number"),
    ),
    "layer_norm-weight_bias": errors(
        "layer_norm",
        number=({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\), wanted \[\.\.\., K\]"),
        weight_size=({"weight": torch.ones(65)}, ValueError, r"weight has shape \(65,\), wanted \(64,\)"),
        bias_size=({"bias": torch.ones(64, 1)}, ValueError, r"bias has shape \(64, 1\), wanted \(64,\)"),
        negative_eps=({"eps": -1.0}, ValueError, "eps is -1.0, wanted 0 or more"),
    ),
}  # fmt: skip

CASES = with_errors(
    ERRORS,
    rms_norm_case(),
    rms_norm_case(weight_dtype=torch.float32),
    rms_norm_case("gemma"),
    rms_norm_case("gemma", weight_dtype=torch.float16),
    rms_norm_case(weighted=False),
    layer_norm_case(),
    layer_norm_case(vector_dtype=torch.float32),
    layer_norm_case("weight"),
    layer_norm_case("bias"),
    layer_norm_case(""),
    gated_activation_case("silu"),
    gated_activation_case("silu", "views"),
    gated_activation_case("silu", "halves"),
    gated_activation_case("gelu", "halves"),
    gated_activation_case("gelu_tanh"),
    gated_activation_case("relu"),
    gated_activation_case("relu2"),
    activation_case("gelu"),
    activation_case("gelu_tanh"),
    activation_case("relu"),
    activation_case("silu"),
    activation_case("relu2"),
    dropout_case(),
    dropout_case(0.5),
    rotary_case(),
    rotary_case(2, 2, one_cos=True),
    rotary_case(5, 2, contiguous=True),
    attention_case(),
    attention_case(3, 1, "causal"),
    attention_case(2, 2, "causal", odd=True, contiguous=True),
    attention_case(sees="padding"),
    attention_case(sees="documents", other_values=3),
    attention_case(sees="bits", more_keys=37, contiguous=True),
    attention_case(6, 1, "causal", more_keys=5),
    attention_case(3, 1, "causal", dropout_p=0.2),
    attention_case(sees="padding", dropout_p=0.1, more_keys=7, odd=True),
    attention_case(4, 4, biased="heads", more_keys=11),
    attention_case(4, 2, "causal", biased="heads", dropout_p=0.2),
    attention_case(3, 1, "padding", biased="keys", odd=True),
    attention_case(4, 2, biased="keys", dropout_p=0.1),
)


def drawn(o: Options) -> dict[str, Callable[[], Case]]:
    """Returns, by public operator, a function that makes a random case for the sweep."""
    return {
        "rotary_embedding": lambda: rotary_case(
            o.rng.choice((1, 3, 8)), o.rng.choice((1, 2)), one_cos=o.maybe(), contiguous=o.maybe(0.3)
        ),
        "gated_activation": lambda: gated_activation_case(
            o.rng.choice(ACTIVATIONS), o.rng.choice(("two", "halves", "views"))
        ),
        "activation": lambda: activation_case(o.rng.choice(ACTIVATIONS)),
        "rms_norm": lambda: rms_norm_case(o.rng.choice(("llama", "gemma")), weight_dtype=o.adapters),
        "layer_norm": lambda: layer_norm_case(o.rng.choice(("weight bias", "weight", "bias", "")), o.adapters),
    }  # fmt: skip
