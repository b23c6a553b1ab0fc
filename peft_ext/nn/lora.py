"""A linear layer with a LoRA adapter over a frozen base."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .. import ops
from .adapted import LowRankLinear


class LoRALinear(LowRankLinear):
    """``Y = x Wᵀ + s · dropout(x) Aᵀ Bᵀ + b``; see :func:`peft_ext.ops.lora_linear`.

    Args:
        in_features, out_features, bias, device, dtype: arguments of the frozen base layer.
        r: rank. lora_alpha: ``s = lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.
        lora_dropout: probability that, in training, an element of x is dropped before the product with lora_A.
        adapter_dtype: dtype of ``lora_A`` and ``lora_B``; default float32 for every dtype of the base.

    ``lora_A [r, in_features]`` starts Kaiming-uniform (a = sqrt 5) and ``lora_B [out_features, r]`` starts at zero, so
    the new layer computes the same output as its base. Raises ValueError for r < 1, a lora_alpha that is not finite, or
    lora_dropout outside [0, 1); TypeError for an r that is no integer, or an adapter_dtype that is no float dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        *,
        bias: bool = True,
        use_rslora: bool = False,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._setup(base, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> LoRALinear:
        """Returns an adapted layer over an ``nn.Linear``, an :class:`NF4Linear` or a :class:`PackedLinear`.

        The new layer freezes ``linear`` and refers to ``linear`` itself, not to a copy.
        """
        return cls._over(linear, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype)

    def _setup(
        self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, dtype: torch.dtype
    ) -> None:
        self._hold(base)
        self._hold_low_rank(r, lora_alpha, lora_dropout, dtype)
        self.use_rslora = use_rslora
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets the parameters of the adapter, not of the base, so that the layer computes the base's output."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def adapted(self, x: Tensor) -> Tensor:
        return ops.lora_linear(
            x, self._weight(), self.lora_A, self.lora_B, self._bias(x),
            scaling=self.scaling, dropout_p=self.lora_dropout, training=self.training,
        )  # fmt: skip
