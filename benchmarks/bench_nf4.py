"""NF4 on one 4096 x 4096 weight: quantize, dequantize and the linear layer, against bitsandbytes and plain bf16.

A quantize reads 2 bytes and writes 0.53 an element, a dequantize the reverse; the linear layer does 2 T K N products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peft_ext import NF4Weight, ops, reference

from .harness import Row, compare

N = K = 4096
LINEAR_TOKENS = (1, 16, 512)


def run(ceilings: dict[str, float]) -> list[Row]:
    import bitsandbytes as bnb

    rows = []
    weight = torch.randn(N, K, dtype=torch.bfloat16) * 0.02
    packed_bytes = N * K // 2 + N * K // 64 * 4
    for double_quant in (False, True):
        kind = "double-quantized" if double_quant else "plain"
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
        ours = NF4Weight.from_bitsandbytes(packed, state)
        assert torch.equal(ops.nf4_quantize(weight, 64, double_quant).packed, packed)
        rows.append(
            compare(
                "nf4_quantize",
                f"4096x4096 bf16, {kind}",
                {
                    "ours": lambda dq=double_quant: ops.nf4_quantize(weight, 64, dq),
                    "bitsandbytes": lambda dq=double_quant: bnb.functional.quantize_4bit(
                        weight, quant_type="nf4", compress_statistics=dq
                    ),
                },
                ceilings=ceilings,
                bytes_moved=N * K * 2 + packed_bytes,
            )
        )
        for dtype in (torch.float32, torch.bfloat16):
            state.dtype = dtype
            assert torch.equal(ops.nf4_dequantize(ours, dtype), reference.nf4_dequantize(ours, dtype))
            assert torch.equal(ops.nf4_dequantize(ours, dtype), bnb.functional.dequantize_4bit(packed, state))

            def theirs(state=state, packed=packed, dtype=dtype) -> torch.Tensor:
                state.dtype = dtype
                return bnb.functional.dequantize_4bit(packed, state)

            rows.append(
                compare(
                    "nf4_dequantize",
                    f"4096x4096 to {str(dtype).removeprefix('torch.')}, {kind}",
                    {"ours": lambda w=ours, d=dtype: ops.nf4_dequantize(w, d), "bitsandbytes": theirs},
                    ceilings=ceilings,
                    bytes_moved=packed_bytes + N * K * dtype.itemsize,
                )
            )
    for tokens in LINEAR_TOKENS:
        rows.append(_linear(tokens, weight, ceilings))
    return rows


def _linear(tokens: int, weight: torch.Tensor, ceilings: dict[str, float]) -> Row:
    """Forward and backward to x over a frozen double-quantized weight, as a training step uses it."""
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = NF4Weight.from_bitsandbytes(packed, state)
    x = torch.randn(tokens, K, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(tokens, N, dtype=torch.bfloat16)

    def step(layer) -> torch.Tensor:
        x.grad = None
        y = layer(x)
        y.backward(grad)
        return y

    contenders = {
        "ours": lambda: step(lambda x: ops.nf4_linear(x, ours)),
        "bitsandbytes": lambda: step(lambda x: bnb.matmul_4bit(x, packed, state)),
        "bf16 F.linear": lambda: step(lambda x: F.linear(x, weight)),
    }
    exact = F.linear(x.double(), ours.dequantize(torch.bfloat16).double())
    assert (contenders["ours"]().double() - exact).norm() < 5e-3 * exact.norm()
    return compare(
        "nf4_linear", f"T={tokens}, forward + backward", contenders, ceilings=ceilings, flops=4 * tokens * N * K,
        bytes_moved=2 * (N * K // 2),
    )  # fmt: skip
