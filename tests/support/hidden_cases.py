"""Cases of bottleneck adapters and of the loss over a vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from linear_cases import dequantized, low_rank_inputs
from op_case import SHAPES, Case, Sample, case_name, randn

from peft_ext import ops

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

    name = "-".join(["bottleneck", activation, *(["own"] if own else []), *([] if biases else ["no_biases"]),
                     *([f"{adapter_dtype}".removeprefix("torch.")] if adapter_dtype else [])])  # fmt: skip
    return Case(
        name, "bottleneck", make, call, plain,
        # With one element, a zero of the activation's slope cancels, and plain PyTorch's error may be 0 by chance.
        shapes=[shape for shape in SHAPES if shape[1] > 1],
        result=lambda dtype, shape: (dtype, (*shape[0], shape[1] if own else shape[2])),
    )  # fmt: skip


# --- cross entropy ----------------------------------------------------------------------------------------------------


def cross_entropy_case(
    base: str, *, with_bias: bool = False, adapter_dtype: Any = None, own_input: bool = False, reduction: str = "sum",
    **options: float,
) -> Case:  # fmt: skip
    """N is the size of the vocabulary. Some labels are ignored. ``own_input``: the adapter has a separate input."""

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
        # As transformers does: a linear layer in hidden's dtype with PEFT's adapter, then everything in float32.
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
    # The mean over no labels is NaN, and the adapter's gradient of one token is a sum that may cancel.
    shapes = [shape for shape in SHAPES if reduction != "mean" or torch.Size(shape[0]).numel() > 1]
    return Case(
        name, "cross_entropy", make, call, plain, shapes=shapes, from_product=("y", "bias", "lora_A", "lora_B"),
        result=lambda dtype, shape: (torch.float32, shape[0] if reduction == "none" else ()),
    )  # fmt: skip
