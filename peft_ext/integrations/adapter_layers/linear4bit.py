"""bitsandbytes' 4-bit linear layers, computed by :func:`peft_ext.ops.frozen_linear`."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from ... import ops
from .base import FOUR_BIT, Linear4bit, fuses, operands_4bit, quant_state_of
from .reasons import accepts_input, kernel_reason, replaced_on_instance, weight_reason

if FOUR_BIT:

    @fuses(Linear4bit)
    class FusedLinear4bit(Linear4bit):
        """bitsandbytes' ``Linear4bit`` with an NF4 or an FP4 weight, computed by :func:`peft_ext.ops.frozen_linear`."""

        reads = (
            "compute_dtype", "compute_type_is_set", "quant_state", "set_compute_type", "weight.quant_state.absmax",
            "weight.quant_state.blocksize", "weight.quant_state.code", "weight.quant_state.dtype",
            "weight.quant_state.nested", "weight.quant_state.offset", "weight.quant_state.quant_type",
            "weight.quant_state.shape", "weight.quant_state.state2",
        )  # fmt: skip

        def stock_reason(self) -> Optional[str]:
            if replaced_on_instance(self):
                return "its forward was replaced on the instance (accelerate's device hooks do that)"
            return weight_reason(self) or kernel_reason("frozen_linear", quant_state_of(self).absmax.device.type)

        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(self, FusedLinear4bit):  # `restore` gave self its stock class
                return type(self).forward(self, x)
            if self.stock_reason() is None and accepts_input(x):
                if (operands := operands_4bit(self, x, x.dtype)) is not None:
                    return ops.frozen_linear(*operands).to(x.dtype)
            return super().forward(x)

        @property
        def support_avx512bf16_for_cpu(self) -> bool:
            """Always False, so that bitsandbytes does not repack the layer's NF4 or FP4 weight in evaluation. No
            gradient flows to the input of a layer with a repacked weight in later training, and the state dict of a
            layer with a repacked weight has scales that are rounded to bfloat16.
            """
            return False

        @support_avx512bf16_for_cpu.setter
        def support_avx512bf16_for_cpu(self, value: bool) -> None:
            self.__dict__["support_avx512bf16_for_cpu"] = value
