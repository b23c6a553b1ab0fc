"""A linear layer with a DoRA adapter over a frozen base."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.checks import check_dtype
from ..reference.dora import output_scale
from .lora import LoRALinear


class DoRALinear(LoRALinear):
    """``Y = g ∘ (x Wᵀ + s · dropout(x) Aᵀ Bᵀ) + b``, ``g = magnitude / ‖W + s·B A‖``; see
    :func:`peft_ext.ops.dora_linear`.

    Args:
        in_features, out_features, r, lora_alpha, lora_dropout, bias, use_rslora, device, dtype, adapter_dtype: the
            arguments of :class:`LoRALinear`.
        dropout_mode: "lora": dropout acts on the low-rank path only; "peft": dropout also acts on the base product, as
            in PEFT.
        norm_grad: whether the gradient flows through the norm. DoRA's paper and PEFT treat the norm as a constant.

    ``lora_magnitude_vector [out_features]`` starts as the norm of each row of the base weight, so the new layer
    computes the same output as its base, up to rounding. If the layer is on the meta device, or the base weight is set
    later, load a state dict or call :meth:`reset_parameters` afterwards.

    While the adapter is not merged, each forward computes the norm again. A cached norm would be unsafe, because a
    write through ``param.data`` changes neither the tensor's version counter nor its address.
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
        dropout_mode: str = "lora",
        norm_grad: bool = False,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        nn.Module.__init__(self)
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._setup(base, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, dropout_mode, norm_grad)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        dropout_mode: str = "lora",
        norm_grad: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> DoRALinear:
        """Returns an adapted layer over an ``nn.Linear``, an :class:`NF4Linear` or a :class:`PackedLinear`.

        The new layer freezes ``linear`` and refers to ``linear`` itself, not to a copy.
        """
        return cls._over(linear, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, dropout_mode, norm_grad)

    def _setup(
        self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, dtype: torch.dtype,
        dropout_mode: str, norm_grad: bool,
    ) -> None:  # fmt: skip
        if dropout_mode not in ("lora", "peft"):
            raise ValueError(f"DoRALinear: dropout_mode is {dropout_mode!r}, wanted 'lora' or 'peft'")
        check_dtype("DoRALinear", dtype)
        self.dropout_mode, self.norm_grad = dropout_mode, norm_grad
        self.lora_magnitude_vector = nn.Parameter(
            torch.empty(base.out_features, device=base.weight.device, dtype=dtype)
        )
        super()._setup(base, r, lora_alpha, lora_dropout, use_rslora, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Resets the parameters of the adapter, not of the base, so that the layer computes the base's output."""
        super().reset_parameters()
        self.lora_magnitude_vector.copy_(self.weight_norm())

    def weight_norm(self) -> Tensor:
        """Returns ``‖W + s·B A‖`` of each row, ``[out_features]``; see :func:`peft_ext.ops.dora_weight_norm`.

        The norms are float32, or float64 for a float64 base weight.
        """
        return ops.dora_weight_norm(self._weight(), self.lora_A, self.lora_B, self.scaling)

    def adapted(self, x: Tensor) -> Tensor:
        return ops.dora_linear(
            x, self._weight(), self.lora_A, self.lora_B, self.lora_magnitude_vector, self._bias(x),
            scaling=self.scaling, dropout_p=self.lora_dropout, training=self.training,
            dropout_mode=self.dropout_mode, norm_grad=self.norm_grad,
        )  # fmt: skip

    def _row_scale(self) -> Tensor:
        return output_scale(self.lora_magnitude_vector, self.weight_norm())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout_mode={self.dropout_mode!r}, norm_grad={self.norm_grad}"
