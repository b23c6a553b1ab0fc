"""nn.Dropout on a CPU: a native operator draws the mask, and the backward draws the same mask again, so that no mask is
saved."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

from ... import ops
from ..adapter_layers.reasons import accepts_input, kernel_reason
from .block import Fused

__all__ = ["Dropout", "dropouts_of_adapters"]


class Dropout(Fused):
    """A fused nn.Dropout on a CPU. The dropouts of LoRA and AdaLoRA layers do not get the class Dropout of peft_ext."""

    block_kind = "dropout"

    def block_reason(self) -> Optional[str]:
        if reason := self.replaced_reason():
            return reason
        if self.inplace or not 0.0 <= self.p < 1.0:
            return "it drops in place, or all"
        return kernel_reason("dropout", "cpu")

    def call_reason(self, x: Tensor) -> Optional[str]:
        if x.device.type != "cpu":
            return f"it is on {x.device.type}, where PyTorch's own is used"
        return None if self.training and self.p > 0.0 else "it drops nothing in evaluation, or with p = 0"

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, Dropout):
            return type(self).forward(self, input)
        acts = not torch.compiler.is_compiling() and accepts_input(input) and self.call_reason(input) is None
        # The operator runs for a contiguous input alone, because its result is contiguous, while PyTorch's result has
        # the strides of the input.
        if not acts or not input.is_contiguous() or self.block_reason() is not None:
            return self.stock_class.forward(self, input)
        return ops.dropout(input, self.p)


def dropouts_of_adapters(model: nn.Module) -> set[nn.Module]:
    """Returns the dropout modules of LoRA and AdaLoRA layers."""
    held = (getattr(module, "lora_dropout", None) for module in model.modules())
    return {dropout for children in held if isinstance(children, nn.Module) for dropout in children.modules()}
