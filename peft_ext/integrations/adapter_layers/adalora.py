"""PEFT's AdaLoRA layers, computed by :func:`peft_ext.ops.lora_linear` with the scaled singular values as the scale per
rank."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..._imports import optional
from ...ops.checks import under_a_transform
from ...weights.nf4 import NF4Weight
from .base import FOUR_BIT, Linear8bitLt, fused_class, fuses
from .lora import LowRank
from .merging import Merged, MergesNF4
from .reasons import adalora_adapter, plain_types

SVDLinear = SVDLinear8bitLt = SVDLinear4bit = None
with optional("peft", "AdaLoRA over a linear layer that is not bitsandbytes' is not fused"):
    from peft.tuners.adalora import SVDLinear
if Linear8bitLt is not None:
    with optional("peft", "AdaLoRA over bitsandbytes' Linear8bitLt is not fused"):
        from peft.tuners.adalora import SVDLinear8bitLt
if FOUR_BIT:
    with optional("peft", "AdaLoRA over bitsandbytes' Linear4bit is not fused"):
        from peft.tuners.adalora import SVDLinear4bit


def _is_traced() -> bool:
    """Returns whether a call is compiled, traced or transformed."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or under_a_transform()


class AdaLora(LowRank):
    """Base class of the fused AdaLoRA layers, with parameters lora_A, lora_B, lora_E.

    The scale per rank is ``ρ = s·E/(ranknum + 1e-5)``, where s is the scaling of the adapter and E is lora_E.
    """

    reads = (*LowRank.reads, "lora_E", "ranknum")

    def pair(self, name: str) -> tuple[Optional[Tensor], Optional[Tensor]]:
        modules = self._modules
        return modules["lora_A"]._parameters.get(name), modules["lora_B"]._parameters.get(name)

    checked_adapter = adalora_adapter

    def _parts(self, name: str) -> Optional[tuple]:
        lora_A, lora_B = self.pair(name)
        if lora_A is None or lora_B is None or name in self.lora_variant:
            return None
        held = (lora_A, lora_B, *self._scale_tensors(name))
        return lora_A, lora_B, (), held, ()

    def _scale_tensors(self, name: str) -> tuple[Tensor, ...]:
        return self._modules["lora_E"]._parameters.get(name), self._modules["ranknum"]._parameters.get(name)

    def _rank_scale(self, name: str, scaling: float) -> Tensor:
        modules = self._modules
        rank_scale = modules["lora_E"]._parameters[name].flatten() / (modules["ranknum"]._parameters[name] + 1e-5)
        return rank_scale if scaling == 1.0 else rank_scale * scaling

    def _scales(self, name: str, is_common: bool = False) -> tuple[Tensor, float]:
        # The operator takes E as the scale per rank, and a number as the scaling, so that autograd sees no division.
        # In a trace, which has no values, and for a ranknum on a GPU, whose value the host would have to wait for,
        # ranknum stays a tensor. In a trace, the first condition returns before the second condition and `item()`,
        # which torch.compile can't trace.
        modules = self._modules
        lora_E, ranknum = modules["lora_E"]._parameters[name], modules["ranknum"]._parameters[name]
        if not is_common and (_is_traced() or type(ranknum) not in plain_types()):
            return super()._scales(name)
        if ranknum.device.type != "cpu" or ranknum.requires_grad or torch._C._len_torch_dispatch_stack() > 0:
            return super()._scales(name)
        return lora_E, self.scaling[name] / (ranknum.item() + 1e-5)


if SVDLinear is not None:

    @fuses(SVDLinear)
    class FusedSVDLinear(AdaLora, MergesNF4, SVDLinear):
        """Fused ``peft.tuners.adalora.SVDLinear``."""

        def _factors(self, names: list[str], nf4: NF4Weight) -> Optional[tuple[Tensor, Tensor, Optional[Tensor]]]:
            return self._side_by_side(names)

        def _merged(self, name: str, weight: Tensor, bias: Optional[Tensor], unmerged: Tensor) -> Merged:
            return weight + self.get_delta_weight(name).float(), bias


# The following fused classes have no code but that of AdaLora. Over ``Linear8bitLt`` only the low-rank part is fused.
FusedSVDLinear8bitLt = fused_class("FusedSVDLinear8bitLt", AdaLora, SVDLinear8bitLt)
FusedSVDLinear4bit = fused_class("FusedSVDLinear4bit", AdaLora, SVDLinear4bit)
