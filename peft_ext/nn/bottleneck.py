"""A bottleneck adapter as a separate module, without a base layer."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import checks
from ..reference.bottleneck import ACTIVATIONS

_INITS = ("normal", "bert", "mam")


class BottleneckAdapter(nn.Module):
    """``Y = residual + s · (act(x Dᵀ + b_d) Vᵀ + b_v)``; see :func:`peft_ext.ops.bottleneck_adapter`. D is the weight
    of ``down``, and V is the weight of ``up``.

    Args:
        features: number of features of x and of Y.
        bottleneck: M, the number of rows of D; default ``max(1, features // reduction_factor)``.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        scale: the factor s, a constant. bias: whether the biases b_d and b_v exist.
        init: "normal": weights N(0, 1e-3²) and zero biases, close to the identity; "bert": weights N(0, 0.02²) and
            zero biases; "mam": D Kaiming-uniform (a = √5), V and both biases zero, exactly the identity.
        dtype: dtype of the parameters; default float32 for every dtype of x.

    The caller decides at which place of a model the adapter runs. ``adapter(sublayer_output)`` is an adapter after
    attention or after the feed-forward (Houlsby). ``adapter(sum)`` is an adapter after the residual sum that follows
    the feed-forward (Pfeiffer); if a LayerNorm follows the sum, call ``norm(adapter(norm(sum), sum))``.
    ``adapter(sublayer_input, sublayer_output)`` is an adapter parallel to a sublayer.

    Raises: ValueError for features or a bottleneck below 1, a reduction_factor that is not above 0, a scale that is not
    finite, an unknown activation or an unknown init; TypeError for a size that is no integer or a dtype that is no
    float dtype.

    Sources: Houlsby and others (arXiv 1902.00751); Pfeiffer and others (arXiv 2005.00247); for the parallel adapter and
    "mam", He and others (arXiv 2110.04366).
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
        """Initializes the adapter's parameters again, by the initialization that ``init`` names."""
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
        """Returns Y ``[..., features]`` in x's dtype. ``residual`` has x's shape and dtype; the default is x itself."""
        return ops.bottleneck_adapter(
            x, self.down.weight, self.down.bias, self.up.weight, self.up.bias,
            scale=self.scale, activation=self.activation, residual=residual,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"bottleneck={self.bottleneck}, activation={self.activation!r}, scale={self.scale:g}"
