"""PEFT's (IA)³ layers, computed by :func:`peft_ext.ops.ia3_linear`.

If several adapters are active, their vectors are first multiplied with each other. If the base layer's own forward has
to run, only the product with the vector is fused, by :func:`peft_ext.ops.ia3_scale`. Nothing is fused if PEFT's class
for ``Linear4bit`` is over a base layer that the operators can't compute.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from ... import ops
from ..._imports import optional
from ...ops.ia3 import checked_ia3_linear
from .base import FOUR_BIT, Fused, fuses, operands, sums_wider, weight_of
from .known import KNOWN, facts_of, remember, single_name
from .merging import Merged, MergesNF4
from .reasons import accepts_input, alone_reason, base_reason, checked_vectors, kernel_reason, layer_reason

IA3Linear = IA3Linear4bit = None
with optional("peft", "(IA)³ over a linear layer that is not bitsandbytes' is not fused"):
    from peft.tuners.ia3 import Linear as IA3Linear
if FOUR_BIT:
    with optional("peft", "(IA)³ over bitsandbytes' Linear4bit is not fused"):
        from peft.tuners.ia3 import Linear4bit as IA3Linear4bit


class IA3Layer(Fused):
    """Base class of the fused (IA)³ layers: ``l ∘ (x Wᵀ + b)``, or ``(l ∘ x) Wᵀ + b`` if ``is_feedforward``, with the
    adapter's vector l (``ia3_l``)."""

    reads = (*Fused.reads, "ia3_l", "is_feedforward")

    # Class attribute: whether the stock forward only multiplies the base layer's input or output by the vector, without
    # casts.
    _scales_any_base = False

    def _reasons(self) -> tuple[Optional[str], Optional[str]]:
        return self._checked()[:2]

    def _checked(self) -> tuple[Optional[str], Optional[str], list[Tensor]]:
        """Returns three values for the next call: why PEFT's own forward has to run, why the base layer's own forward
        has to run (each None if it need not run), and the vectors ia3_l of the active adapters."""
        if reason := layer_reason(self):
            return reason, None, []
        reason, vectors = checked_vectors(self)
        if reason is not None:
            return reason, None, []
        device = vectors[0].device.type
        if (reason := base_reason(self)) is None:
            return kernel_reason("ia3_linear", device), None, vectors
        alone = alone_reason(self) if self._scales_any_base else "its class casts around the base layer"
        return (f"{reason}; {alone}" if alone else kernel_reason("ia3_scale", device)), reason, vectors

    def _dtypes(self, x: Tensor, vector: Tensor) -> tuple[torch.dtype, Optional[torch.dtype]]:
        """Returns the dtype in which PEFT passes x to the base layer, and the dtype of PEFT's result.

        The second dtype that ``_dtypes`` returns is None if PEFT's result has the dtype of the base layer's result.
        """
        return x.dtype, None

    def _common(self, x: Any) -> Optional[tuple]:
        """Returns a tuple for a call with one active adapter: the facts (see :mod:`.known`), the base layer, and ia3_l.

        Returns None for a call that the fast path of :mod:`.known` does not cover; the checks then have to run.
        """
        vector = self._modules["ia3_l"]._parameters.get(single_name(self))
        if vector is None or not self._scales_any_base:
            return None
        facts = facts_of(self, x, "ia3_linear", (), (vector,), (self.is_feedforward,))
        return None if facts is None else (facts, self._modules["base_layer"], vector)

    def _fused(self, x: Tensor) -> Optional[Tensor]:
        if (common := self._common(x)) is not None and common[0] in KNOWN:
            _, base, vector = common
            weight = weight_of(base)
            return checked_ia3_linear(x, weight, base._parameters["bias"], vector, self.is_feedforward)
        reason, alone, vectors = self._checked()
        if reason is not None or not accepts_input(x):
            return None
        vector = vectors[0]
        if len(vectors) > 1:
            for other in vectors[1:]:
                vector = vector * other
        base = self._modules["base_layer"]
        if alone is not None or (type(base) in FOUR_BIT and sums_wider(base, x)):
            if self.is_feedforward:
                return base(ops.ia3_scale(x, vector.flatten()))
            result = base(x)
            if accepts_input(result):
                return ops.ia3_scale(result, vector.flatten())
            return (result * vector.flatten()).to(result)
        seen, dtype = self._dtypes(x, vector)
        if (found := operands(base, x, seen)) is None:
            return None
        if found[0] is not x or found[2] is not base._parameters["bias"] or found[3] is not x.dtype:
            common = None
        x, weight, bias, base_dtype = found
        dtype = dtype or base_dtype
        y = ops.ia3_linear(x, weight, vector, bias, feedforward=self.is_feedforward)
        if common is not None:
            remember(common[0])
        return y if y.dtype is dtype else y.to(dtype)


if IA3Linear is not None:

    @fuses(IA3Linear)
    class FusedIA3Linear(IA3Layer, MergesNF4, IA3Linear):
        """Fused ``peft.tuners.ia3.Linear``."""

        _scales_any_base = True

        def _merged(self, name: str, weight: Tensor, bias: Optional[Tensor], unmerged: Tensor) -> Merged:
            vector = self.ia3_l[name].float()
            if bias is not None and not self.is_feedforward:
                bias = bias * vector.flatten()
            return weight * vector, bias


if IA3Linear4bit is not None:

    @fuses(IA3Linear4bit)
    class FusedIA3Linear4bit(IA3Layer, IA3Linear4bit):
        """Fused ``peft.tuners.ia3.bnb.Linear4bit``. Outside of CUDA's autocast, PEFT's class for ``Linear4bit``
        computes in float32 and returns float32."""

        def _dtypes(self, x: Tensor, vector: Tensor) -> tuple[torch.dtype, Optional[torch.dtype]]:
            if not torch.is_autocast_enabled():  # PEFT checks CUDA's autocast on every device
                return torch.float32, torch.float32
            wide = torch.promote_types(x.dtype, vector.dtype)
            return (wide if self.is_feedforward else x.dtype), wide
