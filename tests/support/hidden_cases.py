"""Cases of bottleneck adapters and of the loss over a vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from linear_cases import low_rank_inputs
from nf4_cases import dequantized
from op_case import SHAPES, Case, Options, Sample, case_name, randn, with_errors
from op_errors import errors

from peft_ext import ops
from peft_ext.reference.bottleneck import ACTIVATIONS

# --- bottleneck -------------------------------------------------------------------------------------------------------


def bottleneck_case(
    activation: str = "gelu", *, own: bool = False, biases: bool = True, adapter_dtype: Any = None, scale: float = 0.75
) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, m = shape
        n, adapters = k if own else n, adapter_dtype or dtype
        inputs = {
            "x": randn(*tokens, k, dtype=dtype),
            "down_weight": randn(m, k, dtype=adapters, scale=k**-0.5),
            "down_bias": randn(m, dtype=adapters) if biases else None,
            "up_weight": randn(n, m, dtype=adapters, scale=m**-0.5),
            "up_bias": randn(n, dtype=adapters) if biases else None,
            "residual": None if own else randn(*tokens, n, dtype=dtype),
        }
        return Sample(inputs, [name for name, value in inputs.items() if value is not None])

    def call(x, down_weight, down_bias, up_weight, up_bias, residual, activation=activation, scale=scale):
        return ops.bottleneck_adapter(
            x, down_weight, down_bias, up_weight, up_bias, scale=scale, activation=activation, residual=residual
        )

    def plain(x, down_weight, down_bias, up_weight, up_bias, residual):
        down_weight, down_bias, up_weight, up_bias = (
            value if value is None else value.to(x.dtype) for value in (down_weight, down_bias, up_weight, up_bias)
        )
        u = F.linear(x, down_weight, down_bias)
        if activation in ("relu", "silu"):
            h = getattr(F, activation)(u)
        else:
            h = F.gelu(u, approximate="tanh" if activation == "gelu_tanh" else "none")
        return (x if residual is None else residual) + scale * F.linear(h, up_weight, up_bias)

    name = "-".join(["bottleneck_adapter", activation, *(["own"] if own else []), *([] if biases else ["no_biases"]),
                     *([f"{adapter_dtype}".removeprefix("torch.")] if adapter_dtype else [])])  # fmt: skip
    return Case(
        name, "bottleneck", make, call, plain,
        # With one element the activation's slope may be nearly 0, and plain PyTorch's error may be 0 by chance.
        shapes=[shape for shape in SHAPES if shape[1] > 1],
        result=lambda dtype, shape: (dtype, (*shape[0], shape[1] if own else shape[2])),
    )  # fmt: skip


# --- cross entropy ----------------------------------------------------------------------------------------------------


def cross_entropy_case(
    base: str, *, with_bias: bool = False, adapter_dtype: Any = None, own_input: bool = False, reduction: str = "sum",
    **options: float,
) -> Case:  # fmt: skip
    """Returns a case of linear_cross_entropy, where N is the size of the vocabulary, and some labels are ignored.

    With ``own_input`` the adapter has a separate input.
    """

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, _ = shape
        inputs = low_rank_inputs(base, dtype, shape, adapter_dtype or dtype, with_bias)
        inputs["hidden"] = inputs.pop("x")
        inputs["labels"] = torch.randint(0, n, tokens)
        if inputs["labels"].numel() > 1:
            inputs["labels"].view(-1)[::5] = -100
        inputs["lora_input"] = randn(*tokens, k, dtype=dtype) if own_input else None
        if adapter_dtype is None:
            inputs["lora_A"] = inputs["lora_B"] = None
        trained = ("hidden", "bias", "lora_A", "lora_B", "lora_input")
        return Sample(inputs, [name for name in trained if inputs[name] is not None])

    def call(hidden, weight, labels, bias, lora_A, lora_B, lora_input, compute, chunk=100, **more):
        return ops.linear_cross_entropy(
            hidden, weight, labels, bias, lora_A=lora_A, lora_B=lora_B, lora_input=lora_input, scaling=0.75,
            reduction=reduction, chunk=chunk, **{**options, **more},
        )  # fmt: skip

    def plain(hidden, weight, labels, bias, lora_A, lora_B, lora_input, compute):
        # transformers computes the linear layer with PEFT's adapter in hidden's dtype, and the loss in float32.
        logits = F.linear(hidden, dequantized(weight, compute).to(hidden.dtype), bias)
        if lora_A is not None:
            low = hidden if lora_input is None else lora_input
            logits = logits + F.linear(F.linear(low, lora_A.to(low.dtype)), lora_B.to(low.dtype)) * 0.75
        z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * options.get("logit_scale", 1.0)
        if cap := options.get("softcap"):
            z = cap * torch.tanh(z / cap)
        found = F.cross_entropy(z.reshape(-1, z.shape[-1]), labels.reshape(-1), reduction=reduction,
                                label_smoothing=options.get("label_smoothing", 0.0))  # fmt: skip
        return found.view(labels.shape) if reduction == "none" else found

    name = case_name("linear_cross_entropy", base, 0.0, adapter_dtype, bias=with_bias, own_input=own_input,
                      **dict.fromkeys([reduction, *options], True))  # fmt: skip
    # A mean needs at least two tokens: the mean over no labels is NaN, and with one token the terms of the adapter's
    # gradient may cancel.
    shapes = [shape for shape in SHAPES if reduction != "mean" or torch.Size(shape[0]).numel() > 1]
    return Case(
        name, "cross_entropy", make, call, plain, shapes=shapes, from_product=("y", "bias", "lora_A", "lora_B"),
        result=lambda dtype, shape: (torch.float32, shape[0] if reduction == "none" else ()),
    )  # fmt: skip


# --- what is tested --------------------------------------------------------------------------------------------------

ERRORS = {
    "bottleneck_adapter-gelu": errors(
        "bottleneck_adapter", "residual shape", "residual dtype",
        activation=({"activation": "tanh"}, ValueError,
                    r"activation is 'tanh', wanted one of \('gelu', 'gelu_tanh', 'relu', 'silu'\)"),
        scale=({"scale": float("inf")}, ValueError, "scale is inf, wanted a finite number"),
        x_columns=({"x": torch.zeros(4, 8, 63)}, ValueError,
                   r"x has shape \(4, 8, 63\), wanted \[\.\.\., 64\] for down_weight \(16, 64\)"),
        x_of_integers=({"x": torch.zeros(4, 8, 64, dtype=torch.int64)}, TypeError, "x is int64, wanted one of"),
        down_of_1_dimension=({"down_weight": torch.zeros(64)}, ValueError,
                             r"down_weight has shape \(64,\), wanted \[M, K\]"),
        down_of_no_rows=({"down_weight": torch.zeros(0, 64), "up_weight": torch.zeros(96, 0)}, ValueError,
                         r"down_weight has shape \(0, 64\), wanted at least 1 row and 1 column"),
        no_columns=({"x": torch.zeros(4, 8, 0), "down_weight": torch.zeros(16, 0)}, ValueError,
                    r"down_weight has shape \(16, 0\), wanted at least 1 row and 1 column"),
        up_of_no_rows=({"up_weight": torch.zeros(0, 16)}, ValueError,
                       r"up_weight has shape \(0, 16\), wanted at least 1 row and 1 column"),
        up_columns=({"up_weight": torch.zeros(96, 15)}, ValueError,
                    r"up_weight has shape \(96, 15\), wanted \[N, 16\] for down_weight \(16, 64\)"),
        down_bias=({"down_bias": torch.zeros(15)}, ValueError, r"down_bias has shape \(15,\), wanted \(16,\)"),
        up_bias=({"up_bias": torch.zeros(95)}, ValueError, r"up_bias has shape \(95,\), wanted \(96,\)"),
        no_residual=({"residual": None}, ValueError, "up_weight has 96 rows, wanted x's 64 where residual is None"),
    ),
    "linear_cross_entropy-dense-sum": errors(
        "linear_cross_entropy", "weight of 3 dims", "trainable weight", "bias size",
        columns=({"hidden": torch.zeros(4, 8, 3)}, ValueError,
                 r"hidden has shape \(4, 8, 3\), wanted \[\.\.\., 64\] for weight \(96, 64\)"),
        labels=({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError,
                r"labels has shape \(4,\), wanted \(4, 8\)"),
        weight_dtype=({"weight": torch.zeros(96, 64, dtype=torch.bfloat16)}, TypeError,
                      "weight is bfloat16, hidden is float32"),
        labels_of_floats=({"labels": torch.zeros(4, 8)}, TypeError,
                          "labels is torch.float32, wanted a tensor of int64"),
        half_an_adapter=({"lora_A": torch.zeros(4, 64)}, TypeError, "of lora_A and lora_B one is None"),
        lora_input=({"lora_input": torch.zeros(4, 64)}, ValueError,
                    r"lora_input has shape \(4, 64\), wanted \(4, 8, 64\)"),
        softcap=({"softcap": -1.0}, ValueError, "softcap is -1.0, wanted more than 0, or None"),
        smoothing=({"label_smoothing": 2}, ValueError, "label_smoothing is 2, wanted 0 to 1"),
        scale=({"logit_scale": float("nan")}, ValueError, "logit_scale is nan, wanted a finite number"),
        chunk=({"chunk": 0}, ValueError, "chunk is 0, wanted at least 1"),
    ),
}  # fmt: skip

CASES = with_errors(
    ERRORS,
    bottleneck_case(),
    bottleneck_case(own=True, adapter_dtype=torch.float32),
    bottleneck_case("gelu_tanh", own=True),
    bottleneck_case("relu", biases=False),
    bottleneck_case("silu", own=True, adapter_dtype=torch.float32, biases=False),
    cross_entropy_case("dense"),
    cross_entropy_case("dense", with_bias=True, adapter_dtype=torch.float32, reduction="mean", label_smoothing=0.1),
    cross_entropy_case("nested", reduction="none", softcap=3.0, logit_scale=0.5),
    cross_entropy_case("dense", adapter_dtype=torch.bfloat16, own_input=True, reduction="none"),
)


def drawn(o: Options) -> dict[str, Callable[[], Case]]:
    """Returns, by public operator, a function that makes a random case for the sweep."""
    return {
        "bottleneck_adapter": lambda: bottleneck_case(
            o.rng.choice(ACTIVATIONS), own=o.maybe(), biases=o.maybe(), adapter_dtype=o.adapters,
            scale=o.rng.choice((0.75, -2.0)),
        ),
    }  # fmt: skip
