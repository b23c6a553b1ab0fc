"""A linear layer with a LoRA adapter over a frozen base."""

from __future__ import annotations

import math
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from .. import ops
from ..weight import NF4Weight
from .nf4 import NF4Linear

__all__ = ["LoRALinear"]


class LoRALinear(nn.Module):
    """``Y = x Wᵀ + s · dropout(x) Aᵀ Bᵀ + b``; see :func:`peft_ext.ops.lora_linear`.

    Args:
        in_features, out_features, bias, device, dtype: of the frozen base layer.
        r: rank. lora_alpha: ``s = lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.
        lora_dropout: probability to drop an element of x on the low-rank path, in training.
        adapter_dtype: of ``lora_A`` and ``lora_B``; default float32, whatever the base is.

    ``lora_A [r, in_features]`` starts Kaiming-uniform (a = sqrt 5), ``lora_B [out_features, r]`` zero: the adapted
    layer starts as the base. Raises ValueError for r < 1 or lora_dropout outside [0, 1).
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
        """Adapt ``linear`` (an ``nn.Linear`` or :class:`NF4Linear`), which is held, frozen, not copied."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._setup(linear, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype)
        return module.train(linear.training)

    def _setup(
        self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, dtype: torch.dtype
    ) -> None:
        if r < 1:
            raise ValueError(f"LoRALinear: r is {r}, wanted at least 1")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"LoRALinear: lora_dropout is {lora_dropout}, wanted 0 <= p < 1")
        self.base_layer = base.requires_grad_(False)
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, r, device=device, dtype=dtype))
        self._unmerged: Union[Tensor, NF4Weight, None] = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Restart the adapter: the layer computes what its base does. The base is left as it is."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def _weight(self) -> Union[Tensor, NF4Weight]:
        return self.base_layer.nf4 if isinstance(self.base_layer, NF4Linear) else self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base_layer(x)
        bias = self.base_layer.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return ops.lora_linear(
            x, self._weight(), self.lora_A, self.lora_B, bias,
            scaling=self.scaling, dropout_p=self.lora_dropout, training=self.training,
        )  # fmt: skip

    def delta_weight(self) -> Tensor:
        """``s · B A``, ``[out_features, in_features]``, in the adapters' dtype."""
        return self.scaling * (self.lora_B @ self.lora_A)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapter into the base weight: rounded to its dtype, or requantized to NF4.

        The weight from before is kept (not in the state dict), so that :meth:`unmerge` gives back its very bits.
        """
        if self.merged:
            return
        held = self._weight()
        if isinstance(held, NF4Weight):
            merged = held.dequantize(torch.float32) + self.delta_weight().float()
            nf4 = ops.nf4_quantize(merged.to(held.dtype), held.blocksize, held.nested is not None)
            self.base_layer.set_nf4(nf4)
            self._unmerged = held
        else:
            wide = torch.promote_types(held.dtype, torch.float32)
            merged = (held.to(wide) + self.delta_weight().to(wide)).to(held.dtype)
            self._unmerged, held.data = held.data, merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the very bits from before :meth:`merge`."""
        if self._unmerged is None:
            return
        if isinstance(self._unmerged, NF4Weight):
            self.base_layer.set_nf4(self._unmerged)
        else:
            self.base_layer.weight.data = self._unmerged
        self._unmerged = None

    def _apply(self, fn: Any, recurse: bool = True) -> LoRALinear:
        super()._apply(fn, recurse)
        if isinstance(self._unmerged, NF4Weight):
            self._unmerged = self._unmerged.to(self.base_layer.weight.device)
        elif self._unmerged is not None:
            self._unmerged = fn(self._unmerged)
        return self

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}, merged={self.merged}"
