"""One adapted layer, forward and backward, bf16 base and float32 adapters of rank 16, against PEFT's own layer.

The floor is the frozen layer's two products; "frozen" is PyTorch's bf16 F.linear doing just that, so that
``frozen 0.80x`` reads: the frozen layer takes 0.80 of our adapted one's time.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from peft_ext.nn import LoRALinear, NF4Linear

from .harness import Row, compare

RANK = 16
# (T, K, N): SmolLM2-135M's layers at 4 x 256 tokens, and a square one.
SHAPES = ((1024, 576, 576), (1024, 576, 1536), (1024, 1536, 576), (512, 4096, 4096))


def _peft_layer(linear: nn.Module, dropout: float) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = linear

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(x)

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=["proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(Holder(), config).base_model.model.proj.train()


def _step(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    x.grad = None
    y = layer(x)
    y.backward(grad)
    return y


def run(ceilings: dict[str, float]) -> list[Row]:
    return [
        _compare(shape, base, dropout, ceilings)
        for shape in SHAPES
        for base in ("bf16", "nf4")
        for dropout in (0.0, 0.05)
    ]


def _compare(shape: tuple[int, int, int], base: str, dropout: float, ceilings: dict[str, float]) -> Row:
    tokens, k, n = shape
    linear = nn.Linear(k, n, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(tokens, k, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(tokens, n, dtype=torch.bfloat16)
    if base == "bf16":
        held: nn.Module = linear
        stock: nn.Module = nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
        stock.weight = linear.weight
    else:
        held, stock = _nf4_layers(linear)
    ours = LoRALinear.from_linear(held, RANK, 2 * RANK, dropout).train()
    peft = _peft_layer(stock, dropout)
    nn.init.normal_(ours.lora_B, std=0.02)
    with torch.no_grad():
        peft.lora_A["default"].weight.copy_(ours.lora_A)
        peft.lora_B["default"].weight.copy_(ours.lora_B)
    _verify(ours, peft, x, grad, dropout)
    contenders = {
        "ours": lambda: _step(ours, x, grad),
        "PEFT" if base == "bf16" else "PEFT + bitsandbytes": lambda: _step(peft, x, grad),
        "frozen": lambda: _step(lambda x: F.linear(x, linear.weight), x, grad),
    }
    case = f"T={tokens} {k}->{n}, {base} base, dropout {dropout}"
    return compare("lora_linear", case, contenders, ceilings=ceilings, flops=4 * tokens * k * n)


def _nf4_layers(linear: nn.Linear) -> tuple[NF4Linear, nn.Module]:
    """The layer's weight in NF4 as ours and as bitsandbytes' layer, over the same storage."""
    from bitsandbytes.nn import Linear4bit

    ours = NF4Linear.from_linear(linear)
    theirs = Linear4bit(
        ours.in_features, ours.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    theirs.weight = ours.nf4.to_bitsandbytes()
    theirs.quant_state = theirs.weight.quant_state
    return ours, theirs


def _verify(ours: nn.Module, peft: nn.Module, x: torch.Tensor, grad: torch.Tensor, dropout: float) -> None:
    """Without dropout: value and gradients agree with PEFT's within bf16's rounding. The mask is the tests' affair."""
    if dropout:
        return
    y, grad_x = _step(ours, x, grad), x.grad.clone()
    theirs = _step(peft, x, grad)
    pairs = [(y, theirs), (grad_x, x.grad), (ours.lora_A.grad, peft.lora_A["default"].weight.grad),
             (ours.lora_B.grad, peft.lora_B["default"].weight.grad)]  # fmt: skip
    for a, b in pairs:
        assert (a.double() - b.double()).norm() < 1e-2 * b.double().norm()
