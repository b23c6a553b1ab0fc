"""Cases of operators over packed weights in formats other than NF4: each kind of weight, and each operator.

A kind is tested on the shapes whose sizes the kind's groups divide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from embedding_cases import lora_embedding_case
from expert_cases import dora_experts_case, dora_experts_norm_case, lora_experts_case
from hidden_cases import cross_entropy_case
from linear_cases import dora_case, dora_norm_case, grouped_lora_case, ia3_case, lora_case, lora_linears_case
from op_case import SHAPES, Case, Options
from packed_weights import KINDS

# Shapes beside those of SHAPES: whole blocks of 256 columns, and many tokens.
_MORE = (((3, 7), 512, 40, 5), ((1,), 768, 64, 2), ((70,), 256, 72, 8))


def _fitted(kind: str, case: Case, *, transposed: bool = False) -> Case:
    """Returns the case on the shapes that fit the kind. ``transposed``: W is [K, N], as of an embedding."""

    of = KINDS[kind]
    case = replace(case, multiples=(of.rows, of.columns) if transposed else (of.columns, of.rows))
    shapes = [shape for shape in (*SHAPES, *_MORE) if shape in case.shapes or shape in _MORE]
    return replace(case, shapes=[shape for shape in shapes if case.fit(shape) == shape])


def _lora(number: int, kind: str) -> Case:
    """Returns LoRA's case over a kind; the kinds take turns in the options of LoRA."""
    adapters = (torch.float32, torch.bfloat16, None)[number % 3]
    return _fitted(kind, lora_case(kind, with_bias=number % 2 == 0, dropout_p=(0.0, 0.05, 0.5)[number % 3],
                                   adapter_dtype=adapters))  # fmt: skip


# One kind for each operator: each kind decodes by the same functions, whatever the operator.
_OTHERS = (
    _fitted("nvfp4", lora_linears_case("nvfp4", adapter_dtype=torch.float32, dropout_p=0.05, with_bias=True)),
    _fitted("fp8", grouped_lora_case("fp8", with_bias=True, adapter_dtype=torch.float32)),
    _fitted("int4", dora_norm_case("int4", adapter_dtype=torch.float32)),
    _fitted("mxfp4", dora_case("mxfp4", adapter_dtype=torch.float32, dropout_p=0.05, dropout_mode="peft")),
    _fitted("gptq", dora_case("gptq", adapter_dtype=torch.float32, with_bias=True, norm_grad=True)),
    _fitted("awq", ia3_case("awq", adapter_dtype=torch.float32)),
    _fitted("hqq", ia3_case("hqq", feedforward=True, adapter_dtype=torch.float32)),
    _fitted("fp8-rows", lora_embedding_case("fp8-rows", adapter_dtype=torch.float32), transposed=True),
    _fitted("mxfp4", lora_experts_case("mxfp4", adapter_dtype=torch.float32, with_bias=True)),
    _fitted("int4-symmetric", dora_experts_norm_case("int4-symmetric", adapter_dtype=torch.float32)),
    _fitted("fp4-nested", dora_experts_case("fp4-nested", adapter_dtype=torch.float32, dropout_p=0.1)),
    _fitted("Q8_0", cross_entropy_case("Q8_0", reduction="mean")),
    _fitted("Q4_1", lora_linears_case("Q4_1", adapter_dtype=torch.float32, with_bias=True)),
)

CASES = (*(_lora(number, kind) for number, kind in enumerate(KINDS)), *_OTHERS)


def drawn(o: Options) -> dict[str, Callable[[], Case]]:
    """Returns no functions: the sweep draws the base weights of the other modules' cases."""
    return {}
