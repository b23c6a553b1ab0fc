"""A linear layer with an AdaLoRA adapter over a frozen base."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from .. import ops
from .adapted import LowRankLinear


class AdaLoRALinear(LowRankLinear):
    """``Y = x Wᵀ + s · (dropout(x) Aᵀ ∘ E / (ranknum + 1e-5)) Bᵀ + b``; see :func:`peft_ext.ops.lora_linear`.

    Args:
        in_features, out_features, bias, device, dtype: arguments of the frozen base layer.
        r: initial rank. lora_alpha: ``s = lora_alpha`` if lora_alpha is positive, otherwise ``s = r``, as in PEFT.
        lora_dropout: probability that, in training, an element of x is dropped before the product with lora_A.
        adapter_dtype: dtype of the adapter's parameters; default float32 for every dtype of the base.

    ``lora_A [r, in_features]`` and ``lora_B [out_features, r]`` start as normal random numbers (std 0.02), and
    ``lora_E [r, 1]`` starts at zero, so the new layer computes the same output as its base. The buffer ``ranknum [1]``
    holds r until a rank allocator changes ``ranknum``. A rank that the allocator removes has ``lora_E`` 0. Raises
    ValueError for r < 1, for a lora_alpha that is not finite, or for lora_dropout outside [0, 1); TypeError for an r
    that is no integer, or for an adapter_dtype that is no float dtype.

    Source: AdaLoRA (arXiv 2303.10512).
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
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._setup(base, r, lora_alpha, lora_dropout, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        *,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> AdaLoRALinear:
        """Returns an adapted layer over an ``nn.Linear``, an :class:`NF4Linear` or a :class:`PackedLinear`.

        The new layer freezes ``linear`` and refers to ``linear`` itself, not to a copy.
        """
        return cls._over(linear, r, lora_alpha, lora_dropout, adapter_dtype)

    def _setup(self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float, dtype: torch.dtype) -> None:
        self._hold(base)
        self._hold_low_rank(r, lora_alpha, lora_dropout, dtype)
        device = base.weight.device
        self.lora_E = nn.Parameter(torch.empty(r, 1, device=device, dtype=dtype))
        self.register_buffer("ranknum", torch.empty(1, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets the parameters of the adapter, not of the base, so that the layer computes the base's output."""
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        nn.init.zeros_(self.lora_E)
        nn.init.constant_(self.ranknum, float(self.r))

    @property
    def scaling(self) -> float:
        return self.lora_alpha if self.lora_alpha > 0 else float(self.r)

    def rank_scale(self) -> Tensor:
        """Returns ``E / (ranknum + 1e-5)``, the factor of each rank, shape ``[r]``."""
        return self.lora_E.flatten() / (self.ranknum + 1e-5)

    def adapted(self, x: Tensor) -> Tensor:
        return ops.lora_linear(
            x, self._weight(), self.lora_A, self.lora_B, self._bias(x),
            rank_scale=self.rank_scale(), scaling=self.scaling, dropout_p=self.lora_dropout, training=self.training,
        )  # fmt: skip

    def _scaled_A(self) -> Tensor:
        return (self.rank_scale()[:, None] * self.lora_A).to(self.lora_B.dtype)
