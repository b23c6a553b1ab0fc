"""A bottleneck adapter as a module of its own."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import checks
from ..reference.bottleneck import ACTIVATIONS

__all__ = ["BottleneckAdapter"]

_INITS = ("normal", "bert", "mam")


class BottleneckAdapter(nn.Module):
    """``Y = residual + s · (act(x Dᵀ + b_d) Vᵀ + b_v)``; see :func:`peft_ext.ops.bottleneck_adapter`.

    Args:
        features: of x and Y. bottleneck: M, the rows of D; default ``features // reduction_factor``.
        activation: "gelu", "gelu_tanh", "relu" or "silu". scale: s, a fixed number. bias: b_d and b_v.
        init: "normal": weights N(0, 1e-3²), zero biases, near the identity; "bert": N(0, 0.02²), zero biases; "mam":
            D Kaiming-uniform (a = √5), V and biases zero, the identity.
        dtype: of the parameters; default float32, whatever the activations are.

    Where it stands is the caller's: after attention and after the feed-forward (Houlsby), ``adapter(sublayer_output)``;
    after the latter's residual sum (Pfeiffer), ``adapter(sum)``, or ``norm(adapter(norm(sum), sum))`` where a LayerNorm
    follows; or beside one (parallel), ``adapter(sublayer_input, sublayer_output)``.

    Raises: ValueError for a bottleneck below 1, an unknown activation or init.

    Sources: Houlsby et al. (arXiv 1902.00751), Pfeiffer et al. (arXiv 2005.00247), in parallel and "mam" He et al.
    (arXiv 2110.04366).
    """

    def __init__(
        self,
        features: int,
        bottleneck: Optional[int] = None,
        *,
        reduction_factor: float = 16.0,
        activation: str = "gelu",
        scale: float = 1.0,
        bias: bool = True,
        init: str = "normal",
        device: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        op = "BottleneckAdapter"
        checks.check_count(op, "features", features)
        checks.check_scale(op, scale, argument="scale")
        checks.check_dtype(op, dtype)
        if bottleneck is None:
            if not isinstance(reduction_factor, (int, float)) or not reduction_factor > 0:
                raise ValueError(f"BottleneckAdapter: reduction_factor is {reduction_factor}, wanted more than 0")
            bottleneck = max(1, int(features // reduction_factor))
        checks.check_count(op, "bottleneck", bottleneck)
        if activation not in ACTIVATIONS:
            raise ValueError(f"BottleneckAdapter: activation is {activation!r}, wanted one of {ACTIVATIONS}")
        if init not in _INITS:
            raise ValueError(f"BottleneckAdapter: init is {init!r}, wanted one of {_INITS}")
        self.features, self.bottleneck = features, bottleneck
        self.activation, self.scale, self.init = activation, float(scale), init
        self.down = nn.Linear(features, bottleneck, bias=bias, device=device, dtype=dtype)
        self.up = nn.Linear(bottleneck, features, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Restarts the adapter, as ``init`` says."""
        if self.init == "mam":
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.up.weight)
        else:
            std = 1e-3 if self.init == "normal" else 0.02
            nn.init.normal_(self.down.weight, std=std)
            nn.init.normal_(self.up.weight, std=std)
        for linear in (self.down, self.up):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        """``[..., features]`` of x's dtype; ``residual``, of x's shape and dtype, is x itself by default."""
        return ops.bottleneck_adapter(
            x, self.down.weight, self.down.bias, self.up.weight, self.up.bias,
            scale=self.scale, activation=self.activation, residual=residual,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"bottleneck={self.bottleneck}, activation={self.activation!r}, scale={self.scale:g}"
