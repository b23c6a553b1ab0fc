"""What the operators refuse, and how they say it: arguments that stand in for those of a sample of ``SHAPES[0]``."""

from __future__ import annotations

from typing import Any

import torch

Error = tuple[str, dict[str, Any], type, str]  # about what, the arguments, the error's class, its message
Wrong = tuple[dict[str, Any], type, str]  # the arguments, the error's class, and what follows the operator's name

# By what is wrong: what several operators say alike.
_ALIKE: dict[str, Wrong] = {
    "columns": ({"x": torch.zeros(2, 3)}, ValueError, r"x has shape \(2, 3\), wanted \[\.\.\., 64\]"),
    "weight dtype": ({"weight": torch.zeros(96, 64, dtype=torch.bfloat16)}, TypeError,
                     "weight is bfloat16, x is float32"),
    "weight of 3 dims": ({"weight": torch.zeros(2, 96, 64)}, ValueError,
                         r"weight has shape \(2, 96, 64\), wanted \[N, K\]"),
    "trainable weight": ({"weight": torch.zeros(96, 64, requires_grad=True)}, ValueError,
                         "weight requires grad, wanted a frozen"),
    "bias size": ({"bias": torch.zeros(3)}, ValueError, r"bias has shape \(3,\), wanted \(96,\)"),
    "A columns": ({"lora_A": torch.zeros(16, 63)}, ValueError, r"lora_A has shape \(16, 63\), wanted \[R, 64\]"),
    "B rows": ({"lora_B": torch.zeros(95, 16)}, ValueError, r"lora_B has shape \(95, 16\), wanted \[96, R\]"),
    "ranks": ({"lora_B": torch.zeros(96, 8)}, ValueError, "lora_B has rank 8, lora_A has rank 16"),
    "dropout 1": ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0, wanted 0 <= p < 1"),
    "seed": ({"seed": torch.zeros(3)}, ValueError, r"seed is float32 \(3,\), wanted int64 \(2,\)"),
    "residual shape": ({"residual": torch.zeros(32, 96)}, ValueError,
                       r"residual has shape \(32, 96\), wanted \(4, 8, 96\)"),
    "residual dtype": ({"residual": torch.zeros(4, 8, 96, dtype=torch.bfloat16)}, TypeError,
                       "residual is bfloat16, x is float32"),
    "dense": ({"nf4": torch.zeros(4, 4)}, TypeError, "nf4 is Tensor, wanted an NF4Weight"),
}  # fmt: skip


def _errors(operator: str, *alike: str, **own: Wrong) -> tuple[Error, ...]:
    wrong = {**{name: _ALIKE[name] for name in alike}, **own}
    return tuple((about, arguments, kind, f"{operator}: {text}") for about, (arguments, kind, text) in wrong.items())


# By the name of a case, or of an operator: then of all of its cases.
ERRORS: dict[str, tuple[Error, ...]] = {
    "nf4_quantize": _errors(
        "nf4_quantize",
        integers=({"weight": torch.zeros(4, 4, dtype=torch.int32)}, TypeError,
                  "weight is int32, wanted one of float32"),
    ),
    "nf4_dequantize": _errors(
        "nf4_dequantize", "dense",
        integer_dtype=({"dtype": torch.int8}, TypeError, "dtype is torch.int8, wanted"),
    ),
    "nf4_linear": _errors(
        "nf4_linear", "columns", "bias size", "dense",
        integer_x=({"x": torch.zeros(2, 64, dtype=torch.int64)}, TypeError, "x is int64, wanted"),
        bias_dtype=({"bias": torch.zeros(96, dtype=torch.float64)}, TypeError, "bias is float64, x is float32"),
    ),
    "lora_linear-dense": _errors(
        "lora_linear", "columns", "weight dtype", "trainable weight", "weight of 3 dims", "A columns", "B rows",
        "ranks", "dropout 1", "seed",
        no_tensor=({"x": [1.0]}, TypeError, "x is list, wanted a Tensor"),
        sparse=({"x": torch.zeros(4, 64).to_sparse()}, TypeError, "x has layout torch.sparse_coo"),
        rank_0=({"lora_A": torch.zeros(0, 64), "lora_B": torch.zeros(96, 0)}, ValueError,
                "lora_A has rank 0, wanted at least 1"),
        A_device=({"lora_A": torch.zeros(16, 64, device="meta")}, ValueError, "lora_A is on meta, weight is on cpu"),
        rank_scale_size=({"rank_scale": torch.ones(16, 1)}, ValueError,
                         r"rank_scale has shape \(16, 1\), wanted \(16,\)"),
        scaling=({"scaling": float("inf")}, ValueError, "scaling is inf, wanted a finite number"),
        negative_dropout=({"dropout_p": -0.5}, ValueError, "dropout_p is -0.5, wanted 0 <= p < 1"),
    ),
    "lora_residual-any": _errors(
        "lora_residual", "residual shape", "residual dtype", "A columns", "ranks", "dropout 1", "seed",
        no_residual=({"residual": None}, TypeError, "residual is NoneType, wanted a Tensor"),
        B_rows=({"lora_B": torch.zeros(95, 16)}, ValueError, r"residual has shape \(4, 8, 96\), wanted \(4, 8, 95\)"),
    ),
    "grouped_lora_linear-dense": _errors(
        "grouped_lora_linear", "weight dtype",
        vector=({"x": torch.zeros(64)}, ValueError, r"x has shape \(64,\), wanted \[samples, \.\.\., K\]"),
        columns=({"x": torch.zeros(4, 3)}, ValueError, r"x has shape \(4, 3\), wanted \[\.\.\., 64\]"),
        samples=({"adapters": [0]}, ValueError, "adapters has 1 elements, wanted 4, one for each sample of x"),
        index=({"adapters": [0, 1, 4, 0]}, ValueError, "adapters has 4, wanted -1 to 3"),
        name=({"adapters": ["a", 0, 0, 0]}, ValueError, "adapters has 'a', wanted -1 to 3"),
        scaling=({"scaling": (1.0, float("nan"), 1.0, 1.0)}, ValueError, "scaling is nan, wanted a finite number"),
        as_many=({"scaling": (1.0,)}, ValueError,
                 "4 of lora_A, 4 of lora_B and 1 of scaling, wanted as many, and at least 1"),
        A_columns=({"A1": torch.zeros(8, 63)}, ValueError, r"lora_A has shape \(8, 63\), wanted \[R, 64\]"),
        ranks=({"B2": torch.zeros(96, 3)}, ValueError, "lora_B has rank 3, lora_A has rank 17"),
    ),
    "dora_weight_norm-dense": _errors(
        "dora_weight_norm", "A columns", "weight of 3 dims",
        scaling=({"scaling": float("nan")}, ValueError, "scaling is nan, wanted a finite"),
        integer_dtype=({"dtype": torch.int8}, TypeError, "dtype is torch.int8, wanted one of"),
        other_dtype=({"dtype": torch.float16}, TypeError,
                     "dtype is torch.float16, wanted a dense weight's own, torch.float32"),
    ),
    "dora_linear-dense": _errors(
        "dora_linear", "columns", "B rows", "trainable weight", "dropout 1",
        magnitude_size=({"magnitude": torch.zeros(95)}, ValueError, r"magnitude has shape \(95,\), wanted \(96,\)"),
        magnitude_dtype=({"magnitude": torch.zeros(96, dtype=torch.int32)}, TypeError,
                         "magnitude is int32, wanted one of float32"),
        no_magnitude=({"magnitude": None}, TypeError, "magnitude is NoneType, wanted a Tensor"),
        norm_size=({"weight_norm": torch.zeros(1)}, ValueError, r"weight_norm has shape \(1,\), wanted \(96,\)"),
        mode=({"dropout_mode": "base"}, ValueError, "dropout_mode is 'base', wanted 'lora' or 'peft'"),
        seed=({"seed": 3}, ValueError, r"seed is int, wanted int64 \(2,\)"),
    ),
    "ia3_linear-dense": _errors(
        "ia3_linear", "columns", "weight dtype", "bias size",
        l_of_the_input=({"ia3_l": torch.ones(64)}, ValueError,
                        r"ia3_l has shape \(64,\), wanted \(96,\) or \(96, 1\)"),
        l_lying=({"ia3_l": torch.ones(1, 96)}, ValueError, r"ia3_l has shape \(1, 96\), wanted"),
        l_of_integers=({"ia3_l": torch.ones(96, dtype=torch.int64)}, TypeError, "ia3_l is int64"),
    ),
    "ia3_scale": _errors(
        "ia3_scale",
        l_size=({"ia3_l": torch.ones(95)}, ValueError,
                r"ia3_l has shape \(95,\), wanted \(96,\) or \(1, 96\) or \(96, 1\)"),
        number=({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\), wanted \[\.\.\., K\]"),
    ),
    "rotary_embedding-3_1": _errors(
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
    "gated_activation-silu": _errors(
        "gated_activation",
        activation=({"activation": "tanh"}, ValueError,
                    r"activation is 'tanh', wanted one of \('gelu', 'gelu_tanh', 'relu', 'silu', 'relu2'\)"),
        up_shape=({"up": torch.zeros(4, 8, 95)}, ValueError, r"up has shape \(4, 8, 95\), wanted \(4, 8, 96\)"),
        up_dtype=({"up": torch.zeros(4, 8, 96, dtype=torch.bfloat16)}, TypeError, "up is bfloat16, gate is float32"),
        odd=({"gate": torch.zeros(4, 7), "up": None}, ValueError,
             r"gate has shape \(4, 7\), wanted \[\.\.\., 2F\] where up is None"),
        number=({"gate": torch.tensor(1.0)}, ValueError, r"gate has shape \(\), wanted \[\.\.\., F\]"),
    ),
    "activation-gelu": _errors(
        "activation",
        activation=({"activation": None}, ValueError, "activation is None, wanted one of"),
        number=({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\), wanted \[\.\.\., F\]"),
    ),
    "rms_norm-llama": _errors(
        "rms_norm",
        number=({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\), wanted \[\.\.\., K\]"),
        weight_size=({"weight": torch.ones(1, 64)}, ValueError, r"weight has shape \(1, 64\), wanted \(64,\)"),
        weight_of_integers=({"weight": torch.ones(64, dtype=torch.int64)}, TypeError, "weight is int64, wanted one of"),
        negative_eps=({"eps": -1e-6}, ValueError, "eps is -1e-06, wanted 0 or more"),
        eps=({"eps": None}, ValueError, "eps is None, wanted a finite number"),
        offset=({"offset": float("nan")}, ValueError, "offset is nan, wanted a finite number"),
    ),
    "layer_norm-weight_bias": _errors(
        "layer_norm",
        number=({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\), wanted \[\.\.\., K\]"),
        weight_size=({"weight": torch.ones(65)}, ValueError, r"weight has shape \(65,\), wanted \(64,\)"),
        bias_size=({"bias": torch.ones(64, 1)}, ValueError, r"bias has shape \(64, 1\), wanted \(64,\)"),
        negative_eps=({"eps": -1.0}, ValueError, "eps is -1.0, wanted 0 or more"),
    ),
    "bottleneck-gelu": _errors(
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
    "linear_cross_entropy-dense-sum": _errors(
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
