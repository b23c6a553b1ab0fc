"""A linear layer with an IA3 vector over a frozen base."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.checks import check_dtype
from .adapted import AdaptedLinear


class IA3Linear(AdaptedLinear):
    """``Y = l ∘ (x Wᵀ + b)``, or ``Y = (l ∘ x) Wᵀ + b`` with ``feedforward``; see :func:`peft_ext.ops.ia3_linear`.

    Args:
        in_features, out_features, bias, device, dtype: arguments of the frozen base layer.
        feedforward: whether ``ia3_l`` scales the layer's input instead of its output.
        adapter_dtype: dtype of ``ia3_l``; default float32 for every dtype of the base.

    ``ia3_l`` has shape ``[out_features, 1]``, or ``[1, in_features]`` with ``feedforward``. ``ia3_l`` starts as ones,
    so the new layer computes the same output as its base.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        feedforward: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._setup(base, feedforward, adapter_dtype)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, feedforward: bool = False, adapter_dtype: torch.dtype = torch.float32
    ) -> IA3Linear:
        """Returns an adapted layer over an ``nn.Linear``, an :class:`NF4Linear` or a :class:`PackedLinear`.

        The new layer freezes ``linear`` and refers to ``linear`` itself, not to a copy.
        """
        return cls._over(linear, feedforward, adapter_dtype)

    def _setup(self, base: nn.Linear, feedforward: bool, dtype: torch.dtype) -> None:
        check_dtype("IA3Linear", dtype)
        self._hold(base)
        self.feedforward = feedforward
        shape = (1, base.in_features) if feedforward else (base.out_features, 1)
        self.ia3_l = nn.Parameter(torch.empty(shape, device=base.weight.device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets the parameters of the adapter, not of the base, so that the layer computes the base's output."""
        nn.init.ones_(self.ia3_l)

    def adapted(self, x: Tensor) -> Tensor:
        return ops.ia3_linear(x, self._weight(), self.ia3_l, self._bias(x), feedforward=self.feedforward)

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight * self.ia3_l.to(weight.dtype)

    def merged_bias(self, bias: Tensor) -> Tensor:
        return bias if self.feedforward else bias * self.ia3_l.flatten()

    def extra_repr(self) -> str:
        return f"feedforward={self.feedforward}, merged={self.merged}"
