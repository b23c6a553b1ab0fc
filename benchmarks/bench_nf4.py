"""Times quantizing to NF4, dequantizing and an NF4 linear layer without adapter, compared with bitsandbytes and plain
bf16.

For bf16, quantizing reads 2 bytes an element and writes about half a byte; dequantizing does the reverse. Quantizing
and dequantizing by peft_ext must give the reference's bits. The linear layer takes 2 T N K operations in the forward
and as many for dX. The bf16 peer of the linear layer is the frozen ``F.linear``.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ext import NF4Weight, ops, reference

from .grid import Variant
from .harness import Comparison, Contender
from .peers import (
    DTYPES,
    Problem,
    Turns,
    comparison_of,
    compiled,
    dense,
    entered_once,
    frozen,
    functional,
    layer_bytes,
    value_of,
)


def _base(double_quant: bool) -> str:
    return "nf4" if double_quant else "nf4-plain"


def _quantize(double_quant: bool, dtype: str, problem: Problem, compile: bool) -> Comparison:
    sources = problem.weights(dtype)

    def bits(nf4: NF4Weight) -> dict[str, Tensor]:
        return {"packed": nf4.packed, "weight": reference.nf4_dequantize(nf4, torch.float32)}

    def exact() -> dict[str, Tensor]:
        return bits(reference.nf4_quantize(sources.items[0], 64, double_quant))

    def contender(quantize: Any, outputs: Any) -> Contender:
        held: list[Tensor] = []

        def take() -> None:
            held[:] = [sources.next()]

        return Contender(lambda: quantize(held[0]), outputs, exact, take)

    def bitsandbytes() -> Contender:
        from bitsandbytes.functional import quantize_4bit

        return contender(
            lambda weight: quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant),
            lambda found: bits(NF4Weight.from_bitsandbytes(*found)),
        )

    makers = {
        "ours": lambda: contender(lambda weight: ops.nf4_quantize(weight, 64, double_quant), bits),
        "bitsandbytes": bitsandbytes,
    }
    moved = problem.weight_bytes(dtype) + problem.weight_bytes(_base(double_quant))
    return comparison_of(makers, moved, tolerance=0.0)


def _dequantize(double_quant: bool, dtype: torch.dtype, problem: Problem, compile: bool) -> Comparison:
    weights = problem.weights(_base(double_quant))

    def exact() -> dict[str, Tensor]:
        return {"weight": reference.nf4_dequantize(weights.items[0], dtype)}

    def contender(dequantize: Any, enter: Any = lambda nf4: nf4) -> Contender:
        held: list[Any] = []
        entered = entered_once(weights, enter)

        def take() -> None:
            held[:] = [entered(weights.next())]

        return Contender(lambda: dequantize(held[0]), lambda weight: {"weight": weight}, exact, take)

    def bitsandbytes() -> Contender:
        from bitsandbytes.functional import dequantize_4bit

        def enter(nf4: NF4Weight) -> tuple[Tensor, Any]:
            weight = nf4.to_bitsandbytes()
            weight.quant_state.dtype = dtype
            return weight.data, weight.quant_state

        return contender(lambda found: dequantize_4bit(*found), enter)

    def eager(nf4: NF4Weight) -> Tensor:
        return reference.nf4_dequantize(nf4, dtype)

    makers = {
        "ours": lambda: contender(lambda nf4: ops.nf4_dequantize(nf4, dtype)),
        "bitsandbytes": bitsandbytes,
    }
    if not problem.captured:
        makers["torch eager"] = lambda: contender(eager)
    if compile:
        makers["torch.compile"] = lambda: contender(compiled(eager))
    moved = problem.weight_bytes(_base(double_quant)) + problem.n * problem.k * dtype.itemsize
    return comparison_of(makers, moved, tolerance=0.0)


def _eager_linear(x: Tensor, weight: NF4Weight) -> Tensor:
    return F.linear(x, dense(weight))


def _linear(training: bool, problem: Problem, compile: bool) -> Comparison:
    trained = problem.exact("nf4", lambda linear, x, mask: linear(x))
    exact = trained if training else value_of(trained)

    def contender(forward: Any, weights: Any = "nf4", **options: Any) -> Contender:
        return functional(problem, weights, forward, (), exact, training=training, **options)

    def bitsandbytes() -> Contender:
        from bitsandbytes import matmul_4bit

        def forward(x: Tensor, weight: Any) -> Tensor:
            return matmul_4bit(x, weight.data, weight.quant_state)

        return contender(forward, enter=NF4Weight.to_bitsandbytes)

    def repacked() -> Contender:
        """Returns the contender of bitsandbytes' product with a weight that is packed again for AVX-512 BF16, as
        ``Linear4bit`` packs its weight in evaluation."""
        from bitsandbytes import matmul_4bit
        from bitsandbytes.functional import (
            _convert_weight_packed_for_cpu,  # noqa: PLC2701  Linear4bit calls it
            has_avx512bf16,
        )

        forced = os.environ.get("PEFT_EXT_CPU_ISA", "amx")
        if not has_avx512bf16() or not ("amx" in forced or "bf16" in forced):
            raise ImportError("bitsandbytes repacks where the CPU has AVX-512 BF16, and the run is not forced off it")
        nf4 = problem.weights("nf4").items
        state = nf4[0].to_bitsandbytes()
        packed, state = _convert_weight_packed_for_cpu(state.data.clone(), state.quant_state)
        copies = Turns([packed, *(packed.clone() for _ in nf4[1:])])
        return contender(lambda x, weight: matmul_4bit(x, weight, state), copies)

    makers = {"ours": lambda: contender(ops.nf4_linear), "bitsandbytes": bitsandbytes}
    if not training and problem.device == "cpu":
        makers["bitsandbytes, repacked"] = repacked
    if not problem.captured:
        makers["torch eager"] = lambda: contender(_eager_linear)
    if compile:
        makers["torch.compile"] = lambda: contender(compiled(_eager_linear))
    makers["frozen"] = lambda: frozen(problem, training=training)
    tokens, k, n = problem.tokens, problem.k, problem.n
    forward_bytes = problem.weight_bytes("nf4") + 2 * tokens * (k + n)
    moved = layer_bytes(problem, "nf4") if training else forward_bytes
    flops = (4 if training else 2) * tokens * n * k
    return comparison_of(makers, moved, flops, reads=not training and tokens <= 16)


def _quantized(double_quant: bool) -> str:
    return "double-quantized" if double_quant else "plain"


# Cases in float16, and quantizing from float32, are compared only on a GPU.
VARIANTS = (
    *(
        Variant(
            "nf4_quantize",
            f"{name}, {_quantized(dq)}",
            partial(_quantize, dq, name),
            (None,),
            everywhere=True,
            devices=("cpu", "cuda") if name == "bf16" else ("cuda",),
        )
        for name in DTYPES
        for dq in (False, True)
    ),
    *(
        Variant(
            "nf4_dequantize",
            f"to {str(dtype).removeprefix('torch.')}, {_quantized(dq)}",
            partial(_dequantize, dq, dtype),
            (None,),
            everywhere=True,
            devices=("cuda",) if name == "fp16" else ("cpu", "cuda"),
            graph=True,
        )
        for dq in (False, True)
        for name, dtype in DTYPES.items()
    ),
    Variant("nf4_linear", "forward", partial(_linear, False), (1, 4, 16), graph=True),
    Variant("nf4_linear", "forward + backward", partial(_linear, True), everywhere=True),
)
